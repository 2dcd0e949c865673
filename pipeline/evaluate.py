"""Caption a split over cached features by beam search, and score the captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.captions import CaptionedImages
from data.features import FeatureCache, differences, write_whole
from data.sources import DATASETS, Source, open_source
from pipeline.checkpoint import Checkpoint, load_checkpoint
from pipeline.cli import UserError, command, setting
from pipeline.decoding import caption_rows
from pipeline.runtime import DEVICES, PRECISIONS, Machine, open_machine, progress, say
from pipeline.scoring import score


@dataclass(frozen=True)
class EvaluateConfig:
    """Which checkpoint, over which cache, on which captions."""

    checkpoint: Path | None = setting(None, "folder that pipeline.train wrote  [runs/DATASET]")
    features: Path | None = setting(None, "the cache  [cache/DATASET]")
    dataset: str = setting("sample", "layout of the captions", choices=DATASETS)
    root: Path | None = setting(None, "folder of the dataset  [sample: datasets/sample]")
    annotations: Path | None = setting(None, "caption file, where the layout does not name it")
    images: Path | None = setting(None, "folder of the photographs, for --dataset coco")
    split: str | None = setting(None, "what to score  [test, else val]", choices=("train", "dev", "val", "test", "all"))
    out: Path | None = setting(None, "scores; the captions go beside them  [CHECKPOINT/scores-SPLIT.json]")
    beam: int | None = setting(None, "beams  [the run's]")
    length_penalty: float | None = setting(None, "exponent of the length  [the run's]")
    batch: int = setting(50, "images decoded together")
    limit: int | None = setting(None, "score only the first N images")
    device: str = setting("auto", "where to decode", choices=DEVICES)
    precision: str = setting("auto", "of products", choices=PRECISIONS)
    seed: int = setting(0, "unused by beam search; every stage takes it")

    def __post_init__(self) -> None:
        for name in ("beam", "batch", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least 1")


@command(EvaluateConfig)
def main(config: EvaluateConfig) -> None:
    """Caption a split over cached features, write the captions in COCO results format, and score them.

    Without options: the embedded sample, with the run and the cache that bare commands made of it.
    """
    machine = open_machine(config.device, config.seed, config.precision)
    folder = config.checkpoint or Path("runs") / config.dataset
    checkpoint = load_checkpoint(folder)
    cache = FeatureCache(config.features or Path("cache") / config.dataset)
    refuse_other_features(folder, checkpoint, cache)
    root = Path("datasets/sample") if config.dataset == "sample" and config.root is None else config.root
    source = open_source(config.dataset, root, config.annotations, config.images)
    split = config.split or choose_split(source, checkpoint)
    images = CaptionedImages(source.select(split)[: config.limit], cache, split)
    out = config.out or folder / f"scores-{split}.json"
    say(f"{folder} on {split} of {source.dataset} {source.root}: {len(images):,} images, {images.left_out} left out")
    captions = decode(config, checkpoint, cache, images, machine)
    scores = score(captions, {image.id: image.captions for image in images.images}).values
    write_results(out, split, captions, scores, config, checkpoint, images)
    print_scores(scores, out, split)


def refuse_other_features(folder: Path, checkpoint: Checkpoint, cache: FeatureCache) -> None:
    """A checkpoint reads only features of the identity it was trained on; other provenance is one warning."""
    if found := differences(checkpoint.identity, cache.identity):
        raise UserError(
            f"checkpoint {folder} was trained on {checkpoint.describe()}, {cache.path} holds other features "
            f"({'; '.join(found)}); pass the --features it was trained on"
        )
    if found := differences(checkpoint.provenance, cache.provenance):
        say(f"warning: {cache.path} and the cache of the training differ in {'; '.join(found)}")


def choose_split(source: Source, checkpoint: Checkpoint) -> str:
    """The split to report, said: test, else val, else what was not trained on of a source that names no splits."""
    split = source.reported()
    if split == "all" and checkpoint.trained_on == source.digest:
        split = "dev"
    if split in ("dev", "all"):
        say(f"{source.root} names no test or val: scoring {split}; dev is what pipeline.train keeps from training")
    return split


def decode(
    config: EvaluateConfig, checkpoint: Checkpoint, cache: FeatureCache, images: CaptionedImages, machine: Machine
) -> dict[int, str]:
    ids: Sequence[int] = [image.id for image in images.images]
    beam = checkpoint.decoding["beam"] if config.beam is None else config.beam
    penalty = checkpoint.decoding["length_penalty"] if config.length_penalty is None else config.length_penalty
    captioner = checkpoint.captioner.to(machine.device)
    with progress(len(ids), "images", f"beam {beam}") as bar:
        captions = caption_rows(
            captioner, checkpoint.vocabulary, cache, ids, machine, beam, penalty, config.batch, bar.step
        )
    say(f"{len(ids):,} captions in {bar.seconds:.1f} s, {bar.rate:.0f} images/s, beam {beam}, on {machine}")
    return captions


def write_results(
    out: Path,
    split: str,
    captions: dict[int, str],
    scores: dict[str, float],
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    images: CaptionedImages,
) -> None:
    """scores at `out`, captions (COCO results format) beside it as captions-SPLIT.json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    results = [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()]
    write_whole(out.with_name(f"captions-{split}.json"), json.dumps(results, ensure_ascii=False))
    record = {
        "scores": scores,
        "split": split,
        "images": len(captions),
        "left_out_unreadable": images.left_out,
        "decoding": {
            "beam": config.beam or checkpoint.decoding["beam"],
            "length_penalty": checkpoint.decoding["length_penalty"]
            if config.length_penalty is None
            else config.length_penalty,
        },
    }
    write_whole(out, json.dumps(record, indent=2) + "\n")


def print_scores(scores: dict[str, float], out: Path, split: str) -> None:
    print("  ".join(f"{name:>7}" for name in scores))
    print("  ".join(f"{value:7.4f}" for value in scores.values()))
    print(f"scores: {out}\ncaptions: {out.with_name(f'captions-{split}.json')}")


if __name__ == "__main__":
    main()
