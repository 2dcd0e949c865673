"""Evaluation of files of captions against reference files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data import DataError
from data.results import choose, read_ids, read_references, read_results
from data.segmentation import UNSPACED_RUN, without_blanks
from data.sources import Image
from pipeline.cli import UserError
from pipeline.evaluate.config import EvaluateConfig, Job, frequencies, make_scorer, train_tokens
from pipeline.scoring.ngrams import References, cached_path, load_cached, save_cached, user_cache
from pipeline.terminal import say


def jobs_of_files(config: EvaluateConfig) -> Iterator[Job]:
    """A job for each file of captions, with the references of its images."""
    if config.out and len(config.captions) > 1 and (config.out.suffix or config.out.is_file()):
        raise UserError(
            f"--out {config.out} with several --captions must be a folder: each gets its own "
            "NAME.json there"
        )
    stems = [file.stem for file in config.captions]
    if config.out and len(set(stems)) < len(stems):
        raise UserError(
            f"several --captions are called {max(stems, key=stems.count)}.json, and so would "
            "be their scores"
        )
    assert config.references is not None  # --captions needs it
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
    config: EvaluateConfig,
    file: Path,
    captions: dict[int, str],
    opened: dict[tuple[int, ...], References],
) -> tuple[dict[int, str], References]:
    """Match captions with references. Files over the same images share one set of references; the
    rest is counted.
    """
    if () not in opened:
        opened[()] = open_references(config)
        if config.segment is None and any(map(UNSPACED_RUN.search, opened[()].vocabulary)):
            captions_by_image = references_by_image(config)
            warn_without_blanks(
                caption for group in captions_by_image.values() for caption in group
            )
    references = opened[()]
    if unknown := [image_id for image_id in captions if image_id not in references.rows]:
        if not config.ids:
            raise DataError(
                f"image {unknown[0]} of {file} has no references in {config.references} "
                f"({len(unknown):,} such)"
            )
        say(
            f"{file}: {len(unknown):,} captions are left out: {config.ids} does not have their "
            "images"
        )
    if missing := [image_id for image_id in references.rows if image_id not in captions]:
        if config.ids and not config.limit:
            raise DataError(
                f"image {missing[0]} of {config.ids} has no caption in {file} "
                f"({len(missing):,} such)"
            )
        say(
            f"{file} captions {len(references) - len(missing):,} of {len(references):,} images "
            f"of {config.references}; "
            "the others are left out (with --ids they would be an error)"
        )
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
    """The reference statistics of the whole file, or of --ids, from the cache folder if they are
    there.
    """
    folder = config.cache_dir or user_cache()
    if folder is None:
        return count_references(config)
    assert config.references is not None  # --captions needs it
    ids = read_ids(config.ids) if config.ids else None
    segment = segment_of_file(config)
    options = json.dumps([config.split, ids, bool(config.df), segment]).encode()
    path = cached_path(
        folder,
        config.references.read_bytes(),
        options,
        config.df.read_bytes() if config.df else b"",
    )
    references = load_cached(path)
    if references is None:
        references = count_references(config)
        save_cached(references, path)
    return references


def count_references(config: EvaluateConfig) -> References:
    captions = references_by_image(config)
    return References(captions, frequencies=frequencies(config), segment=segment_of_file(config))


def segment_of_file(config: EvaluateConfig) -> str:
    return config.segment or "words"


def warn_without_blanks(captions: Iterable[str]) -> None:
    if example := without_blanks(captions):
        say(
            f"warning: the captions have no spaces between words (as {example[:40]!r}), so "
            "that each sentence is one word; "
            "pass --segment characters"
        )


def references_by_image(
    config: EvaluateConfig, only: set[int] | None = None
) -> dict[int, Sequence[str]]:
    assert config.references is not None  # --captions needs it
    images = read_references(config.references, config.split)
    if config.ids:
        images = choose(images, read_ids(config.ids), config.references, config.ids)
    found: dict[int, Sequence[str]] = {
        image.id: image.captions for image in images if image.captions or config.ids
    }
    if not found:
        raise DataError(f"{config.references} has images but no captions to score against")
    return (
        found
        if only is None
        else {image_id: found[image_id] for image_id in found if image_id in only}
    )
