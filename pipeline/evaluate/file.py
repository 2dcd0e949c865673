"""Evaluation of files of captions against reference files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data import DataError
from data.files import user_cache
from data.results import choose, read_ids, read_references, read_results
from data.segmentation import UNSPACED_RUN, without_blanks
from data.sources import Image
from pipeline.cli import UserError
from pipeline.evaluate.config import (
    EvaluateConfig,
    Job,
    frequencies,
    make_scorer,
    read_against,
    train_tokens,
)
from pipeline.scoring.ngrams import References, cached_path, load_cached, save_cached
from pipeline.terminal import say


def jobs_of_files(config: EvaluateConfig) -> Iterator[Job]:
    """Yield a job for each file of captions, with the references of its images."""
    if config.out and len(config.captions) > 1 and (config.out.suffix or config.out.is_file()):
        raise UserError(
            f"--out {config.out} with several --captions must be a folder; the scores of each "
            "file are written to NAME.json there"
        )
    stems = [file.stem for file in config.captions]
    if config.out and len(set(stems)) < len(stems):
        raise UserError(
            f"several --captions are called {max(stems, key=stems.count)}.json, so their scores "
            "would overwrite each other; rename the files"
        )
    assert config.references is not None  # --captions needs it
    train = train_tokens(config, segment_of_file(config))
    references_by_ids: dict[tuple[int, ...], References] = {}
    several = len(config.captions) > 1
    for file in config.captions:
        captions = dict(list(read_results(file).items())[: config.limit])
        images: Sequence[Image] = ()
        if config.server:
            images = read_references(config.references, config.split)
        scorer = None
        if not images or any(image.captions for image in images):
            captions, references = match_references(config, file, captions, references_by_ids)
            scorer = make_scorer(config, references, config.references.name, train)
        else:
            say(f"{config.references} has no captions, so nothing is scored")
        out = config.out / f"{file.stem}.json" if config.out and several else config.out
        others = read_against(config, captions, scorer is not None)
        yield Job(file.name, captions, images, scorer, out, others)


def match_references(
    config: EvaluateConfig,
    file: Path,
    captions: dict[int, str],
    references_by_ids: dict[tuple[int, ...], References],
) -> tuple[dict[int, str], References]:
    """Return the captions and the references of the images that have both.

    Args:
        captions: the captions of `file`, by image id.
        references_by_ids: the references that were already opened, by image ids. The key () has
            the references of all images. Files with captions of the same images share one entry.

    Raises:
        DataError: a caption has no references without --ids, an image of --ids has no caption, or
            no image has both.
    """
    if () not in references_by_ids:
        references_by_ids[()] = open_references(config)
        if config.segment is None and any(
            map(UNSPACED_RUN.search, references_by_ids[()].vocabulary)
        ):
            captions_by_image = references_by_image(config)
            warn_without_spaces(
                caption for group in captions_by_image.values() for caption in group
            )
    references = references_by_ids[()]
    if unknown := [image_id for image_id in captions if image_id not in references.rows]:
        if not config.ids:
            raise DataError(
                f"image {unknown[0]} of {file} has no references in {config.references} "
                f"({len(unknown):,} such)"
            )
        say(f"{file}: {len(unknown):,} captions are left out, because {config.ids} does not "
            "contain their images")  # fmt: skip
    if missing := [image_id for image_id in references.rows if image_id not in captions]:
        if config.ids and not config.limit:
            raise DataError(
                f"image {missing[0]} of {config.ids} has no caption in {file} "
                f"({len(missing):,} such)"
            )
        say(
            f"{file} has captions of {len(references) - len(missing):,} of {len(references):,} "
            f"images of {config.references}; the other images are left out. With --ids, a missing "
            "caption is an error"
        )
        image_ids = tuple(image_id for image_id in references.rows if image_id in captions)
        if not image_ids:
            raise DataError(f"no image of {file} is in {config.references}")
        if image_ids not in references_by_ids:
            references_by_ids[image_ids] = References(
                references_by_image(config, set(image_ids)),
                frequencies=frequencies(config),
                segment=segment_of_file(config),
            )
        references = references_by_ids[image_ids]
    return {image_id: captions[image_id] for image_id in references.rows}, references


def open_references(config: EvaluateConfig) -> References:
    """Return the n-gram statistics of all references, or of the images of --ids.

    The statistics are read from --cache-dir if the same files were scored before. Otherwise they
    are computed and saved there.
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
    """Compute the n-gram statistics of the references."""
    captions = references_by_image(config)
    return References(captions, frequencies=frequencies(config), segment=segment_of_file(config))


def segment_of_file(config: EvaluateConfig) -> str:
    """Return the unit of the captions of a file: "words" or "characters"."""
    return config.segment or "words"


def warn_without_spaces(captions: Iterable[str]) -> None:
    """Print a warning if the captions have no spaces between words."""
    if example := without_blanks(captions):
        say(
            f"warning: the captions have no spaces between words (such as {example[:40]!r}), so "
            "each sentence counts as one word; pass --segment characters"
        )


def references_by_image(
    config: EvaluateConfig, only: set[int] | None = None
) -> dict[int, Sequence[str]]:
    """Return the reference captions by image id.

    Args:
        only: ids of the images to return; None: all images of the split or of --ids.

    Raises:
        DataError: no image has captions.
    """
    assert config.references is not None  # --captions needs it
    images = read_references(config.references, config.split)
    if config.ids:
        images = choose(images, read_ids(config.ids), config.references, config.ids)
    captions: dict[int, Sequence[str]] = {
        image.id: image.captions for image in images if image.captions or config.ids
    }
    if not captions:
        raise DataError(f"{config.references} has images but no captions to score against")
    if only is None:
        return captions
    return {image_id: captions[image_id] for image_id in captions if image_id in only}
