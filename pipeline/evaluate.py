"""Score captions: those of a checkpoint or several, made over cached features, or anybody's from a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import DataError
from data.cache.reader import FeatureCache, write_whole
from data.results import choose, read_ids, read_references, read_results, server_split, write_results, write_server
from data.segmentation import SEGMENTS, UNSPACED_RUN, segmented_all, without_blanks
from data.sources import CAPTIONS_FROM, DATASETS, Image, Source, check_captioned, open_source
from pipeline.cli import DEVICES, PRECISIONS, UserError, command, setting
from pipeline.decoding.options import DecodingOptions, by_option
from pipeline.scoring.java import Meteor, NotComputed
from pipeline.scoring.ngrams import References, keep, kept_path, load_kept, user_cache
from pipeline.scoring.report import (
    FORMATS,
    ON_REQUEST,
    Card,
    Scorer,
    compare,
    image_lines,
    make_card,
    print_cards,
    print_examples,
)
from pipeline.terminal import progress, say

if TYPE_CHECKING:  # torch takes seconds to import, and scoring a file needs none of it
    from pipeline.checkpoints.checkpoint import Checkpoint
    from pipeline.decoding.captioner import Caption


@dataclass(frozen=True)
class EvaluateConfig(DecodingOptions):
    """Which checkpoint, over which cache, on which captions; or which file of captions."""

    checkpoint: tuple[Path, ...] = setting((), "folder that pipeline.train wrote; several: their ensemble  [runs/DATASET]")
    features: Path | None = setting(None, "the cache  [cache/DATASET]")
    dataset: str = setting("sample", "layout of the captions", choices=DATASETS)
    root: Path | None = setting(None, "folder of the dataset  [sample: datasets/sample]")
    annotations: Path | None = setting(None, "caption file, where the layout does not name it")
    images: Path | None = setting(None, "folder of the photographs, for --dataset coco")
    captions_from: str = setting("auto", "of --dataset folder: its caption files, or the .txt beside each photograph",
                                 choices=CAPTIONS_FROM)  # fmt: skip
    split: str | None = setting(None, "what to score  [test, else val]", choices=("train", "dev", "val", "test", "all"))
    captions: tuple[Path, ...] = setting((), "score this file in COCO results format, no checkpoint; may be repeated")
    references: Path | None = setting(None, "what --captions are scored against: a COCO captions file, or Karpathy's")
    ids: Path | None = setting(None, "file of the image ids to score, as of a Karpathy split: one a line, or a JSON list")
    against: Path | None = setting(None, "another results file over the same images: is the difference real?")
    df: Path | None = setting(None, "captions (Karpathy's: train) whose document frequencies CIDEr takes  [the references]")
    cache_dir: Path | None = setting(None, "where counted references are kept  [$XDG_CACHE_HOME/onceover, ~/.cache/onceover]")
    train_captions: Path | None = setting(None, "training captions, for the share of novel ones  [the checkpoint's own]")
    segment: str | None = setting(
        None, "what a word is: characters for captions without blanks between words  [the run's, else words]", choices=SEGMENTS
    )
    meteor: bool = setting(False, "METEOR too (Java)")
    spice: bool = setting(False, "SPICE too (Java)")
    bootstrap: int = setting(1000, "resamples for intervals and --against; 0: no intervals")
    examples: int = setting(0, "print the N worst and the N best captions by CIDEr")
    format: str = setting("table", "of what is printed", choices=FORMATS)
    server: str | None = setting(None, "write COCO's server files for a method of this name")
    out: Path | None = setting(None, "scores.json; a folder for several --captions  [CHECKPOINT/scores-SPLIT.json]")
    batch: int = setting(100, "images decoded together")
    limit: int | None = setting(None, "score only the first N images")
    device: str = setting("auto", "where to decode", choices=DEVICES)
    precision: str = setting("auto", "of products", choices=PRECISIONS)
    seed: int = setting(0, "of the resamples and of --sample (whose captions depend on --batch too)")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("batch", 1), ("limit", 1), ("bootstrap", 0), ("examples", 0), ("seed", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least {least}")
        if self.bootstrap > 1_000_000:
            raise UserError(f"--bootstrap is {self.bootstrap:,}; more than a million resamples tell nothing new")
        read = [*self.captions, *(getattr(self, name) for name in ("references", "ids", "against", "df", "train_captions"))]
        if self.out and any(file and file.resolve() == self.out.resolve() for file in read):
            raise UserError(f"--out {self.out} would overwrite a file that is read; name another")
        if self.out and self.out.is_dir() and len(self.captions) < 2:
            raise UserError(f"--out {self.out} is a folder; name the file, as {self.out / 'scores.json'}")
        if self.captions and not self.references:
            raise UserError("--captions needs --references: a COCO captions file to score them against")
        if self.captions and self.checkpoint:
            raise UserError("--captions and --checkpoint: score a file or a checkpoint, not both")
        if self.captions and (found := self.given()):
            raise UserError(f"--{next(iter(found)).replace('_', '-')} is of decoding; --captions are scored as they are")
        if self.references and not self.captions:
            raise UserError("--references goes with --captions; a checkpoint is scored against its --dataset")
        if self.server and (self.limit or len(self.captions) > 1):
            raise UserError("--server takes one method's captions of all images: no --limit, at most one --captions")
        if self.against and (len(self.captions) > 1 or not self.bootstrap):
            raise UserError("--against compares with one results file, by resampling: one --captions, and --bootstrap above 0")


@dataclass(frozen=True)
class Job:
    """Captions with what they are scored against; `scorer` is None where the images have no references."""

    name: str
    captions: dict[int, str]
    images: Sequence[Image]  # for the server: all that should have a caption; empty where not needed
    scorer: Scorer | None
    out: Path | None
    about: dict[str, Any] = field(default_factory=dict)  # further entries of scores.json


@command(EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Caption a split over cached features and score the captions; or score a file of captions.

    Without options: the embedded sample, with the run and the cache that bare commands made of it.
    A file: --captions results.json --references annotations.json [--ids FILE] [--out scores.json].
    """
    jobs = list(jobs_of_files(config)) if config.captions else [job_of_checkpoint(config)]
    if config.server:
        send_to_server(config, jobs[0])
    with open_meteor(config.meteor) as meteor:
        cards = [make_card(job.name, job.captions, job.scorer, meteor, config.spice) for job in jobs if job.scorer]
        if config.against and cards:
            cards[0].record["against"] = compare(cards[0], other_card(config, jobs[0], meteor))
    scored = [(job, card) for job, card in zip([job for job in jobs if job.scorer], cards, strict=True)]
    for job, card in scored:
        write_card(job, card)
    if cards:
        print_cards(cards, config.format)
    for job, card in scored:
        print_examples(card, job.captions, config.examples, aside=config.format != "table")
    refuse_silence(cards)


# ------------------------------------------------------------------------------------------------------------ from files


def jobs_of_files(config: EvaluateConfig) -> Iterator[Job]:
    """Each file of captions with the references of its images."""
    if config.out and len(config.captions) > 1 and (config.out.suffix or config.out.is_file()):
        raise UserError(f"--out {config.out} with several --captions must be a folder: each gets its own NAME.json there")
    stems = [file.stem for file in config.captions]
    if config.out and len(set(stems)) < len(stems):
        raise UserError(f"several --captions are called {max(stems, key=stems.count)}.json, and so would be their scores")
    train = train_tokens(config, segment_of_file(config))
    opened: dict[tuple[int, ...], References] = {}
    for file in config.captions:
        captions = dict(list(read_results(file).items())[: config.limit])
        images: Sequence[Image] = ()
        if config.server:
            images = read_references(config.references, config.split)
        scorer = None
        if not images or any(image.captions for image in images):
            captions, references = match(config, file, captions, opened)
            scorer = make_scorer(config, references, config.references.name, train)
        else:
            say(f"{config.references} has no captions: nothing is scored")
        several = len(config.captions) > 1
        out = config.out / f"{file.stem}.json" if config.out and several else config.out
        yield Job(file.name, captions, images, scorer, out)


def match(
    config: EvaluateConfig, file: Path, captions: dict[int, str], opened: dict[tuple[int, ...], References]
) -> tuple[dict[int, str], References]:
    """The captions to score and their references, one set for files that caption the same images; the rest is counted."""
    if () not in opened:
        opened[()] = open_references(config)
        if config.segment is None and any(map(UNSPACED_RUN.search, opened[()].vocabulary)):
            captions_by_image = references_by_image(config)
            warn_without_blanks(caption for group in captions_by_image.values() for caption in group)
    references = opened[()]
    if unknown := [image_id for image_id in captions if image_id not in references.rows]:
        if not config.ids:
            raise DataError(f"image {unknown[0]} of {file} has no references in {config.references} ({len(unknown):,} such)")
        say(f"{file}: {len(unknown):,} captions are left out: {config.ids} does not have their images")
    if missing := [image_id for image_id in references.rows if image_id not in captions]:
        if config.ids and not config.limit:
            raise DataError(f"image {missing[0]} of {config.ids} has no caption in {file} ({len(missing):,} such)")
        say(f"{file} captions {len(references) - len(missing):,} of {len(references):,} images of {config.references}; "
            "the others are left out (with --ids they would be an error)")  # fmt: skip
        key = tuple(image_id for image_id in references.rows if image_id in captions)
        if not key:
            raise DataError(f"no image of {file} is in {config.references}")
        if key not in opened:
            captions_of_key = references_by_image(config, set(key))
            opened[key] = References(
                captions_of_key, frequencies=frequencies(config), segment=segment_of_file(config)
            )
        references = opened[key]
    return {image_id: captions[image_id] for image_id in references.rows}, references


def open_references(config: EvaluateConfig) -> References:
    """The counted references of the whole file, or of --ids: read from the cache folder, else counted and kept there."""
    folder = config.cache_dir or user_cache()
    if folder is None:
        return count_references(config)
    ids = read_ids(config.ids) if config.ids else None
    segment = segment_of_file(config)
    options = json.dumps([config.split, ids, bool(config.df), segment]).encode()
    path = kept_path(folder, config.references.read_bytes(), options, config.df.read_bytes() if config.df else b"")
    references = load_kept(path)
    if references is None:
        references = count_references(config)
        keep(references, path)
    return references


def count_references(config: EvaluateConfig) -> References:
    captions = references_by_image(config)
    return References(captions, frequencies=frequencies(config), segment=segment_of_file(config))


def segment_of_file(config: EvaluateConfig) -> str:
    return config.segment or "words"


def warn_without_blanks(captions: Iterable[str]) -> None:
    if example := without_blanks(captions):
        say(f"warning: the captions have no blanks between words (as {example[:40]!r}), so that each sentence is one word; "
            "pass --segment characters")  # fmt: skip


def references_by_image(config: EvaluateConfig, only: set[int] | None = None) -> dict[int, Sequence[str]]:
    images = read_references(config.references, config.split)
    if config.ids:
        images = choose(images, read_ids(config.ids), config.references, config.ids)
    found = {image.id: image.captions for image in images if image.captions or config.ids}
    if not found:
        raise DataError(f"{config.references} has images but no captions to score against")
    return found if only is None else {image_id: found[image_id] for image_id in found if image_id in only}


def frequencies(config: EvaluateConfig) -> dict[int, Sequence[str]] | None:
    if config.df is None:
        return None
    found = {image.id: image.captions for image in read_references(config.df, "train") if image.captions}
    if not found:
        raise DataError(f"--df {config.df} has no captions of a train split to take document frequencies from")
    return found


def train_tokens(
    config: EvaluateConfig, segment: str, images: Iterable[Image] = ()
) -> frozenset[tuple[str, ...]] | None:
    if config.train_captions:
        images = read_references(config.train_captions, "train")
    captions = [caption for image in images for caption in image.captions]
    if config.train_captions and not captions:
        raise DataError(f"--train-captions {config.train_captions} has no captions of a train split")
    return frozenset(map(tuple, segmented_all(captions, segment))) if captions else None


def make_scorer(
    config: EvaluateConfig, references: References, name: str, train: frozenset[tuple[str, ...]] | None
) -> Scorer:
    source = config.df.name if config.df else "references"
    return Scorer(references, name, source, train, config.bootstrap, config.seed)


# ------------------------------------------------------------------------------------------------------ from a checkpoint


def job_of_checkpoint(config: EvaluateConfig) -> Job:
    """Caption the split over the cache; the captions are written at once, before any score."""
    from pipeline.checkpoints.checkpoint import load_checkpoint, refuse_other_features
    from pipeline.checkpoints.hub import SCHEME, checkpoint_folder

    folders = config.checkpoint or (Path("runs") / config.dataset,)
    if config.out is None and any(str(folder).startswith(SCHEME) for folder in folders):
        raise UserError("a checkpoint of the hub has no folder here to write scores into; pass --out scores.json")
    checkpoints = [load_checkpoint(checkpoint_folder(folder)) for folder in folders]
    checkpoint = checkpoints[0]
    folder = folders[0].parent / "+".join(folder.name for folder in folders)
    cache = FeatureCache(config.features or Path("cache") / config.dataset)
    for place, each in zip(folders, checkpoints, strict=True):
        refuse_other_features(each, cache)
        if each.vocabulary.words != checkpoint.vocabulary.words:
            raise UserError(f"{place} and {folders[0]} have other vocabularies; an ensemble needs runs on the same captions")
    root = Path("datasets/sample") if config.dataset == "sample" and config.root is None else config.root
    source = open_source(config.dataset, root, config.annotations, config.images, config.captions_from)
    for note in source.notes:
        say(note)
    split = config.split or choose_split(source, checkpoint)
    if split == "dev" and any(each.training.get("train_on_dev") for each in checkpoints):
        say("warning: this checkpoint was trained on dev too; its scores there say nothing of other photographs")
    wanted = source.select(split)
    if config.ids:
        wanted = choose(wanted, read_ids(config.ids), source.annotations or source.root, config.ids)
    if config.server:
        server_split(wanted)  # refused before hours of decoding, not after
    images, left_out = cache.select(wanted[: config.limit])
    if not images:
        raise DataError(f"split {split!r} has no image with features in {cache.path}: all are unreadable")
    scored = not config.server or any(image.captions for image in images)
    if scored:
        check_captioned(images, split)
    say(f"{folder} on {split} of {source.dataset} {source.root}: {len(images):,} images, {left_out} left out")
    written, decoding = decode(config, checkpoints, cache, [image.id for image in images])
    out = config.out or folder / f"scores-{split}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    captions = {image_id: found[0].text for image_id, found in written.items()}
    write_results(out.with_name(f"captions-{split}.json"), captions)
    if config.nbest is not None:
        write_whole(out.with_name(f"nbest-{split}.json"), nbest_lines(written))
        say(f"all captions, with log-probabilities: {out.with_name(f'nbest-{split}.json')}")
    scorer = None
    if scored:
        segment = config.segment or checkpoint.vocabulary.segment
        captions_by_image = {image.id: image.captions for image in images}
        references = References(captions_by_image, frequencies=frequencies(config), segment=segment)
        train = train_tokens(config, segment, [image for image in source.images if image.split == "train"])
        scorer = make_scorer(config, references, f"{source.dataset}-{split}", train)
    about = {"split": split, "left_out_unreadable": left_out, "decoding": decoding}
    return Job(folder.name, captions, wanted, scorer, out, about)


def choose_split(source: Source, checkpoint: Checkpoint) -> str:
    """The split to report, said: test, else val, else what was not trained on of a source that names no splits."""
    split = source.reported()
    if split == "all" and checkpoint.trained_on == source.digest:
        split = "dev"
    if split in ("dev", "all"):
        try:
            source.select(split)
        except DataError as error:  # one photograph, which is train
            raise UserError(f"{error}; to score what was trained on, pass --split train") from error
        say(f"{source.root} names no test or val: scoring {split}; dev is what pipeline.train keeps from training")
    return split


def decode(
    config: EvaluateConfig, checkpoints: Sequence[Checkpoint], cache: FeatureCache, ids: Sequence[int]
) -> tuple[dict[int, list[Caption]], dict[str, Any]]:
    """Captions by image id, and the options that they were found with."""
    from models.generation.ensemble import Ensemble
    from pipeline.decoding.captioner import caption_rows, lighten, make_writer
    from pipeline.runtime import open_machine

    machine = open_machine(config.device, config.seed, config.precision)
    decoding = {**checkpoints[0].decoding, **config.given()}
    captioners = [checkpoint.captioner.to(machine.device) for checkpoint in checkpoints]
    captioner = captioners[0] if len(captioners) == 1 else Ensemble(captioners).eval()
    lighten(captioner, machine)
    defaults = dict(checkpoints[0].decoding)
    if config.sample:
        del decoding["beam"], defaults["beam"]
    how = "samples" if config.sample else f"beam {decoding['beam']}"
    how += f", consensus with {config.consensus} samples" if config.consensus else ""
    with by_option(), progress(len(ids), "images", how) as bar:
        checkpoint = replace(checkpoints[0], decoding=defaults)
        writer = make_writer(captioner, checkpoint, machine, config.given(), config.seed)
        captions = caption_rows(writer, cache, ids, config.batch, bar.step)
    say(f"{len(ids):,} captions in {bar.seconds:.1f} s, {bar.rate:.0f} images/s, {how}, on {machine}")
    return captions, decoding


def nbest_lines(written: Mapping[int, Sequence[Caption]]) -> str:
    """All captions of each image as JSON, an image a line."""
    lines = [
        json.dumps({"image_id": image_id, "captions": [caption.record() for caption in captions]}, ensure_ascii=False)
        for image_id, captions in written.items()
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


# --------------------------------------------------------------------------------------------------------- both, onwards


@contextlib.contextmanager
def open_meteor(wanted: bool) -> Iterator[Meteor | NotComputed | None]:
    """METEOR's program, for all captions of this command; or why it cannot run."""
    if not wanted:
        yield None
        return
    try:
        meteor = Meteor()
    except NotComputed as error:
        yield error
        return
    with meteor:
        yield meteor


def other_card(config: EvaluateConfig, job: Job, meteor: Meteor | NotComputed | None) -> Card:
    """The card of --against, over exactly the images of `job`."""
    captions = read_results(config.against)
    missing = [image_id for image_id in job.captions if image_id not in captions]
    if missing:
        raise DataError(f"image {missing[0]} has no caption in {config.against} ({len(missing):,} such); "
                        "two captioners are compared over the same images")  # fmt: skip
    captions = {image_id: captions[image_id] for image_id in job.captions}
    return make_card(config.against.name, captions, job.scorer, meteor, config.spice)


def write_card(job: Job, card: Card) -> None:
    """scores.json, and beside it the scores of each image; nothing where no --out is given for a file of captions."""
    if job.out is None:
        return
    job.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(job.out, json.dumps(card.record | job.about, indent=2) + "\n")
    images = job.out.with_name(f"{job.out.stem}-images.jsonl")
    write_whole(images, image_lines(card, job.captions))
    say(f"scores: {job.out}\neach image's: {images}")
    if "split" in job.about:
        say(f"captions: {job.out.with_name('captions-' + job.about['split'] + '.json')}")


def send_to_server(config: EvaluateConfig, job: Job) -> None:
    folder = job.out.parent if job.out else Path()
    for path in write_server(folder, config.server, job.captions, job.images):
        say(f"for the server: {path}")


def refuse_silence(cards: Iterable[Card]) -> None:
    """A score that was asked for by its option and is not there ends in an error, after all others are written."""
    found: Mapping[str, str] = {
        name: why for card in cards for name, why in card.not_computed.items() if name in card.values and name in ON_REQUEST
    }
    if found:
        raise UserError("; ".join(found.values()))


if __name__ == "__main__":
    main()
