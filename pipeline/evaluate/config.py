"""The options of pipeline.evaluate, and the jobs that are scored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import DataError
from data.files import check_outputs
from data.results import (
    check_server_name,
    read_references,
    read_results,
    server_files,
    server_split,
)
from data.segmentation import SEGMENTS, segmented_all
from data.sources import Image, Source
from pipeline.cli import DEVICES, PRECISIONS, UserError, flag_of, setting
from pipeline.decoding.options import DecodingOptions
from pipeline.scoring.ngrams import References
from pipeline.scoring.report import FORMATS, Scorer
from pipeline.scoring.vqa import VARIANTS
from pipeline.sources import SourceOptions
from pipeline.tasks.captioning import UNFINISHED

# files of a checkpoint that no score may replace
CHECKPOINT_FILES = (
    "config.json", "vocab.json", "tokenizer.json", "answers.json", "model.safetensors",
    "frequencies.safetensors", "backbone.safetensors", "last.safetensors", "metrics.jsonl",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateConfig(DecodingOptions, SourceOptions):
    """The options of pipeline.evaluate."""

    checkpoint: tuple[Path, ...] = setting(
        (),
        "checkpoint folder written by pipeline.train, or hf-hub:user/name; repeat it for an "
        "ensemble  [runs/DATASET]",
    )
    features: Path | None = setting(None, "feature cache  [cache/DATASET]")
    split: str | None = setting(
        None, "split to score  [test, else val]", choices=("train", "dev", "val", "test", "all")
    )
    captions: tuple[Path, ...] = setting(
        (), "COCO results file to score instead of a checkpoint; may be repeated"
    )
    answers: Path | None = setting(
        None,
        "VQA results file to score instead of a checkpoint; --dataset is vqa unless it is passed",
    )
    ranks: Path | None = setting(
        None,
        "file of ranks of dialogue options (VisDial's server format) to score instead of a "
        "checkpoint; --dataset is visdial unless it is passed",
    )
    references: Path | None = setting(
        None, "reference captions for --captions: a COCO captions file or Karpathy's JSON"
    )
    against: Path | None = setting(
        None,
        "results file of another model on the same images or questions, for a paired bootstrap "
        "test of the difference",
    )
    df: Path | None = setting(
        None,
        "captions file for CIDEr's document frequencies; of Karpathy's JSON the train split  [the "
        "references]",
    )
    cache_dir: Path | None = setting(
        None,
        "folder for cached reference statistics  [$XDG_CACHE_HOME/onceover, ~/.cache/onceover]",
    )
    train_captions: Path | None = setting(
        None, "training captions, for the share of novel captions  [the checkpoint's own]"
    )
    segment: str | None = setting(
        None,
        "unit of the captions: characters for languages without spaces between words  [the run's, "
        "else words]",
        choices=SEGMENTS,
    )
    meteor: bool = setting(False, "also compute METEOR (needs Java)")
    spice: bool = setting(False, "also compute SPICE (needs Java)")
    accuracy: str | None = setting(
        None,
        "variant of the accuracy of answers, as in pipeline.train --task vqa  [the run's]",
        choices=VARIANTS,
    )
    wups: bool = setting(False, "also compute WUPS, the score of DAQUAR (needs WordNet of nltk)")
    rank: str | None = setting(
        None,
        "score that ranks the options of dialogues, as in pipeline.train --task dialog  [the "
        "run's]",
        choices=("mean", "sum"),
    )
    bootstrap: int = setting(
        1000,
        "number of bootstrap resamples for intervals and --against; 0: no intervals",
        at_least=0,
        at_most=1_000_000,
        group="scores",
    )
    examples: int = setting(
        0, "print the N worst and the N best captions by CIDEr", at_least=0, group="output"
    )
    format: str = setting("table", "output format", choices=FORMATS)
    server: str | None = setting(
        None,
        "write the files for the evaluation server of COCO captions or of VQA (EvalAI), with this "
        "method name",
    )
    answers_out: Path | None = setting(
        None, "file for the answers of --task vqa, in VQA results format"
    )
    out: Path | None = setting(
        None, "output file; a folder if --captions is repeated  [CHECKPOINT/scores-SPLIT.json]"
    )
    batch: int = setting(100, "images per batch", at_least=1, group="machine")
    limit: int | None = setting(None, "score only the first N images", at_least=1, group="data")
    device: str = setting("auto", "device of the decoder", choices=DEVICES, group="machine")
    precision: str = setting(
        "auto", "precision of matrix products", choices=PRECISIONS, group="machine"
    )
    seed: int = setting(
        0,
        "random seed of the bootstrap and of --sample (sampled captions also depend on --batch)",
        at_least=0,
        group="machine",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_out()
        if self.captions and not self.references:
            raise UserError(
                "--captions needs --references: a COCO captions file with the reference captions"
            )
        if self.captions and self.checkpoint:
            raise UserError("--captions and --checkpoint: score a file or a checkpoint, not both")
        if self.captions and (decoding := self.given()):
            raise UserError(
                f"{flag_of(next(iter(decoding)))} is a decoding option, but --captions are not "
                "decoded; remove the option"
            )
        for name in ("answers", "ranks"):
            file = getattr(self, name)
            if file and (self.captions or self.checkpoint or (self.answers and self.ranks)):
                raise UserError(
                    f"--{name} goes with neither --captions nor --checkpoint nor another file: "
                    "score one file, or a checkpoint"
                )
            if file and (decoding := self.given()):
                raise UserError(
                    f"{flag_of(next(iter(decoding)))} is a decoding option, but --{name} are not "
                    "decoded; remove the option"
                )
        if self.features and (self.answers or self.captions or self.ranks):
            raise UserError(
                "--features is the feature cache of a checkpoint; a file is scored without features"
            )
        if self.exclude_ids and self.captions:
            raise UserError("--exclude-ids goes with --dataset; for --captions pass --ids")
        if self.references and not self.captions:
            raise UserError(
                "--references goes with --captions; the references of a checkpoint come from "
                "--dataset"
            )
        if self.server:
            check_server_name(self.server)
            for name in ("questions", "dialogs"):
                if len(self.extensions.get("dataset", {}).get(name, ())) > 1:
                    raise UserError(f"--server takes one --{name} file; several are passed")
        if self.server and (
            self.limit
            or self.exclude_ids
            or len(self.captions) > 1
            or (self.ids and not self.captions)
        ):
            raise UserError(
                "--server needs the captions of all images, or the answers to all questions, by "
                "one method: no --limit, --ids or --exclude-ids, and at most one --captions"
            )
        if self.against and (len(self.captions) > 1 or not self.bootstrap):
            raise UserError(
                "--against compares with one other results file by bootstrap resampling: pass at "
                "most one --captions, and --bootstrap above 0"
            )

    def check_outputs(
        self, files: Sequence[tuple[str, Path]], source: Source | None = None
    ) -> None:
        """Raise DataError if an output file is an input file or another output file.

        Called before anything is computed.

        Args:
            files: the path of each output file, with the option that named it.
        """
        inputs = [self.references, self.ids, self.against, self.df, self.train_captions]
        inputs += [self.exclude_ids, self.answers, self.ranks, *self.captions, *self.annotations]
        options = self.extensions.get("dataset", {})
        inputs += [*options.get("questions", ()), *options.get("dialogs", ()), options.get("dense")]
        inputs += [source.annotations, *(image.path for image in source.images)] if source else []
        folders = [folder.resolve() for folder in self.checkpoint]
        for option, path in files:
            name = path.name
            if path.resolve().parent in folders and name in CHECKPOINT_FILES:
                raise UserError(f"{option} {path} is a file of the checkpoint; pass another path")
        check_outputs(files, [path for path in inputs if path])

    def _check_out(self) -> None:
        """Raise UserError if an output is a folder where a file is needed."""
        if self.answers_out and self.answers_out.is_dir():
            raise UserError(
                f"--answers-out {self.answers_out} is a folder; name the file, such as "
                f"{self.answers_out / 'answers.json'}"
            )
        if self.out is None:
            return
        if self.out.is_dir() and len(self.captions) < 2:
            raise UserError(
                f"--out {self.out} is a folder; name the file, such as {self.out / 'scores.json'}"
            )


@dataclass(frozen=True)
class Job:
    """Captions to score.

    Attributes:
        name: name in the table of scores.
        captions: captions by image id.
        images: with --server, all images that need a caption.
        scorer: the references; None if the images have no references.
        out: path of scores.json; None: no file.
        others: the captions of --against; None without --against.
        about: further entries of scores.json.
    """

    name: str
    captions: dict[int, str]
    images: Sequence[Image]
    scorer: Scorer | None
    out: Path | None
    others: dict[int, str] | None = None
    about: dict[str, Any] = field(default_factory=dict)


def caption_files(
    config: EvaluateConfig, out: Path | None, images: Sequence[Image]
) -> list[tuple[str, Path]]:
    """Return the files that are written for captions, with the option that names each.

    Args:
        out: path of scores.json; None: no files of scores.
        images: with --server, all images that need a caption.
    """
    files = []
    if out:
        files = [("--out", out), ("--out", out.with_name(f"{out.stem}-images.jsonl"))]
    if config.server:
        paths = server_files(out.parent if out else Path(), config.server, server_split(images))
        files += [("--server", path) for path in paths]
    return files


def read_against(
    config: EvaluateConfig, image_ids: Iterable[int], has_references: bool
) -> dict[int, str] | None:
    """Return the captions of --against for these images; None without --against.

    Raises:
        DataError: an image has no caption.
        UserError: the images have no references, so nothing can be compared.
    """
    if config.against is None:
        return None
    if not has_references:
        raise UserError("--against compares scores, but the images have no reference captions")
    captions, image_ids = read_results(config.against), list(image_ids)
    if missing := [image_id for image_id in image_ids if image_id not in captions]:
        raise DataError(
            f"image {missing[0]} has no caption in {config.against} ({len(missing):,} such); "
            "--against needs captions of the same images"
        )
    return {image_id: captions[image_id] for image_id in image_ids}


def frequencies(config: EvaluateConfig) -> dict[int, Sequence[str]] | None:
    """Return the captions of --df by image id, or None without --df.

    Raises:
        DataError: the file has no captions of a train split.
    """
    if config.df is None:
        return None
    captions: dict[int, Sequence[str]] = {
        image.id: image.captions for image in read_references(config.df, "train") if image.captions
    }
    if not captions:
        raise DataError(
            f"--df {config.df} has no captions of a train split for the document frequencies"
        )
    return captions


def train_tokens(
    config: EvaluateConfig, segment: str, images: Iterable[Image] = ()
) -> frozenset[tuple[str, ...]] | None:
    """Return the tokens of the training captions, or None if there are no training captions.

    The captions of --train-captions replace those of `images`.

    Raises:
        DataError: --train-captions has no captions of a train split.
    """
    if config.train_captions:
        images = read_references(config.train_captions, "train")
    captions = [caption for image in images for caption in image.captions]
    if config.train_captions and not captions:
        raise DataError(
            f"--train-captions {config.train_captions} has no captions of a train split"
        )
    return frozenset(map(tuple, segmented_all(captions, segment))) if captions else None


def make_scorer(
    config: EvaluateConfig,
    references: References,
    name: str,
    train: frozenset[tuple[str, ...]] | None,
) -> Scorer:
    """Return a scorer with the bootstrap settings of the command."""
    df_source = config.df.name if config.df else "references"
    return Scorer(references, name, df_source, train, config.bootstrap, config.seed, UNFINISHED)
