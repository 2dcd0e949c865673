"""Scoring against pycocoevalcap: 5,000 captions against 25,010 references, and CIDEr of 250 samples
for a training step.

    python -m benchmarks.scoring [--json FILE]

Published captions of COCO's Karpathy test split ($ONCEOVER_REAL/results/coco_karpathy_test).
pycocoevalcap runs its Java tokenizer, BLEU, ROUGE-L and CIDEr, as users do. Both start from
captions in memory. Figures are medians of their runs, but for `prepare` and pycocoevalcap's CIDEr
of one training step, which run once.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from benchmarks.measure import header, real_option, report
from data.results import read_references, read_results
from data.tokens import tokenize_all
from data.vocabulary import EOS, PAD, Vocabulary
from pipeline.scoring.metrics import score
from pipeline.scoring.ngrams import References
from pipeline.scoring.token_cider import TokenCider

IMAGES, SAMPLES, LENGTH = 50, 5, 20  # of one training step


@click.command(context_settings={"show_default": True})
@real_option("folder of the published captions")
@click.option("--runs", default=5, help="runs of ours; pycocoevalcap has three")
@click.option("--json", "out", type=click.Path(path_type=Path), help="write the figures here too")
def main(real: Path, runs: int, out: Path | None) -> None:
    """Time our scores and pycocoevalcap's in one run, and check that they are the same."""
    folder = real / "results" / "coco_karpathy_test"
    captions_file, references_file = folder / "jiahuei_caption_00156000.json", folder / "refs.json"
    captions = read_results(captions_file)
    references = {image.id: image.captions for image in read_references(references_file)}
    theirs, wanted = measure(lambda: pycocoevalcap(captions, references), 3)
    ours, scores = measure(lambda: score(captions, References(references)), runs)
    with tempfile.TemporaryDirectory() as work:
        kept = Path(work) / "kept.npz"
        References(references).save(kept)
        prepared, again = measure(lambda: score(captions, References.load(kept)), runs)
        in_memory = References.load(kept)
        validation, _ = measure(lambda: score(captions, in_memory), runs)
        os.environ["XDG_CACHE_HOME"] = work
        command = [
            sys.executable,
            "-m",
            "pipeline.evaluate",
            "--captions",
            captions_file,
            "--references",
            references_file,
        ]
        started, _ = measure(lambda: subprocess.run(command, check=True, capture_output=True), runs)
    for found in (scores.values, again.values):
        assert all(abs(found[name] - wanted[name]) < 1e-6 for name in wanted), (found, wanted)
    figures = header() | {
        "captions": len(captions),
        "references": sum(map(len, references.values())),
        "pycocoevalcap_s": theirs,
        "ours_s": ours,
        "ratio": theirs / ours,
        "references_kept_s": prepared,
        "references_in_memory_s": validation,
        "command_s": started,
    }
    figures |= training_step(references)
    report(figures, out)


def measure(work: Callable, runs: int) -> tuple[float, object]:
    """Median seconds, and what the last run gave."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found


def pycocoevalcap(
    captions: dict[int, str], references: dict[int, tuple[str, ...]]
) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with contextlib.redirect_stdout(io.StringIO()):
        truth = PTBTokenizer().tokenize(
            {i: [{"caption": c} for c in group] for i, group in references.items()}
        )
        given = PTBTokenizer().tokenize({i: [{"caption": captions[i]}] for i in references})
        bleu, _ = Bleu().compute_score(truth, given, verbose=0)
        rouge, _ = Rouge().compute_score(truth, given)
        cider, _ = Cider().compute_score(truth, given)
    return dict(
        zip(
            ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"],
            [*bleu, rouge, cider],
            strict=True,
        )
    )


def training_step(references: dict[int, tuple[str, ...]], steps: int = 100) -> dict[str, object]:
    """Milliseconds for CIDEr of 50 images' 5 samples against their 5 references each, other images
    every step.

    The samples are captions of the image or of another one, half of them with three words changed,
    up to 20 words.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    tokens = {image_id: tokenize_all(group[:5]) for image_id, group in references.items()}
    vocabulary = Vocabulary.build((words for group in tokens.values() for words in group), 5)
    rng, ids = random.Random(0), list(tokens)
    batches = []
    for _ in range(steps):
        owners = rng.sample(ids, IMAGES)
        samples = [
            [_sample(rng, tokens, ids, i, vocabulary) for _ in range(SAMPLES)] for i in owners
        ]
        batches.append((owners, np.array(samples)))
    figures: dict[str, object] = {}
    for eos in (False, True):
        start = time.perf_counter()
        cider = TokenCider(tokens, vocabulary, eos)
        name = f"cider{'_eos' if eos else ''}"
        figures[f"{name}_prepare_s"] = time.perf_counter() - start
        seconds = []
        for owners, batch in batches:
            rows = cider.rows(owners)
            start = time.perf_counter()
            cider(rows, batch)
            seconds.append(time.perf_counter() - start)
        figures[f"{name}_ms"] = statistics.median(seconds) * 1e3
        figures[f"{name}_ms_90th"] = float(np.percentile(seconds, 90)) * 1e3
    # the plain way: pycocoevalcap's scorer over the samples, document frequencies at hand
    owners, batch = batches[-1]
    counted = CiderScorer()
    for group in tokens.values():
        counted += ("", [" ".join(words) for words in group])
    counted.compute_doc_freq()
    start = time.perf_counter()
    scorer = CiderScorer()
    for owner, group in zip(owners, batch.tolist(), strict=True):
        for sample in group:
            scorer += (vocabulary.decode(sample), [" ".join(words) for words in tokens[owner]])
    scorer.document_frequency = counted.document_frequency
    scorer.compute_cider()
    figures["cider_pycocoevalcap_ms"] = (time.perf_counter() - start) * 1e3
    return figures


def _sample(
    rng: random.Random, tokens: dict, ids: list[int], image_id: int, vocabulary: Vocabulary
) -> list[int]:
    words = list(rng.choice(tokens[image_id if rng.random() < 0.5 else rng.choice(ids)]))
    if rng.random() < 0.5:
        for _ in range(3):
            words[rng.randrange(len(words))] = rng.choice(vocabulary.words[4:200])
    return ([*vocabulary.encode(words), EOS][:LENGTH] + [PAD] * LENGTH)[:LENGTH]


if __name__ == "__main__":
    main()
