"""Speed of the scores, compared with pycocoevalcap.

    python -m benchmarks.scoring [--json FILE]

The input is 5,000 published captions of COCO's Karpathy test split with 25,010 references
($ONCEOVER_REAL/results/coco_karpathy_test), in memory. pycocoevalcap runs its Java tokenizer, BLEU,
ROUGE-L and CIDEr. In addition, CIDEr of the 250 samples of a training step is timed. Figures are
medians of several runs; `prepare` and pycocoevalcap's CIDEr of a training step run once.
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

IMAGES, SAMPLES, LENGTH = 50, 5, 20  # of a training step


@click.command(context_settings={"show_default": True})
@real_option("folder of the published captions")
@click.option("--runs", default=5, help="runs of ours; pycocoevalcap runs three times")
@click.option("--json", "out", type=click.Path(path_type=Path), help="also write the figures here")
def main(real: Path, runs: int, out: Path | None) -> None:
    """Time our scores and pycocoevalcap's, and check that they are equal."""
    folder = real / "results" / "coco_karpathy_test"
    captions_file, references_file = folder / "jiahuei_caption_00156000.json", folder / "refs.json"
    captions = read_results(captions_file)
    references = {image.id: image.captions for image in read_references(references_file)}
    peer_seconds, peer_scores = measure(lambda: pycocoevalcap(captions, references), 3)
    our_seconds, scores = measure(lambda: score(captions, References(references)), runs)
    with tempfile.TemporaryDirectory() as work:
        saved = Path(work) / "kept.npz"
        References(references).save(saved)
        saved_seconds, saved_scores = measure(lambda: score(captions, References.load(saved)), runs)
        in_memory = References.load(saved)
        in_memory_seconds, _ = measure(lambda: score(captions, in_memory), runs)
        os.environ["XDG_CACHE_HOME"] = work
        command = [sys.executable, "-m", "pipeline.evaluate"]
        command += ["--captions", captions_file, "--references", references_file]
        command_seconds, _ = measure(
            lambda: subprocess.run(command, check=True, capture_output=True), runs
        )
    for values in (scores.values, saved_scores.values):
        assert all(abs(values[name] - peer_scores[name]) < 1e-6 for name in peer_scores), (
            values,
            peer_scores,
        )
    figures = header() | {
        "captions": len(captions),
        "references": sum(map(len, references.values())),
        "pycocoevalcap_s": peer_seconds,
        "ours_s": our_seconds,
        "ratio": peer_seconds / our_seconds,
        "references_kept_s": saved_seconds,
        "references_in_memory_s": in_memory_seconds,
        "command_s": command_seconds,
    }
    figures |= training_step(references)
    report(figures, out)


def measure(work: Callable, runs: int) -> tuple[float, object]:
    """Return the median seconds of several runs, and the result of the last run."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def pycocoevalcap(
    captions: dict[int, str], references: dict[int, tuple[str, ...]]
) -> dict[str, float]:
    """Return pycocoevalcap's scores by name."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with contextlib.redirect_stdout(io.StringIO()):
        reference_tokens = PTBTokenizer().tokenize(
            {i: [{"caption": c} for c in group] for i, group in references.items()}
        )
        caption_tokens = PTBTokenizer().tokenize(
            {i: [{"caption": captions[i]}] for i in references}
        )
        bleu, _ = Bleu().compute_score(reference_tokens, caption_tokens, verbose=0)
        rouge, _ = Rouge().compute_score(reference_tokens, caption_tokens)
        cider, _ = Cider().compute_score(reference_tokens, caption_tokens)
    return dict(
        zip(
            ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"],
            [*bleu, rouge, cider],
            strict=True,
        )
    )


def training_step(references: dict[int, tuple[str, ...]], steps: int = 100) -> dict[str, object]:
    """Return the milliseconds for CIDEr of one training step: 50 images with 5 samples each.

    Each image has 5 references, and each step has other images. A sample has up to 20 words: a
    caption of the image or of another image. Half of the samples have three words replaced.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    tokens = {image_id: tokenize_all(group[:5]) for image_id, group in references.items()}
    vocabulary = Vocabulary.build((words for group in tokens.values() for words in group), 5)
    rng, ids = random.Random(0), list(tokens)
    batches = []
    for _ in range(steps):
        image_ids = rng.sample(ids, IMAGES)
        samples = [
            [_sample(rng, tokens, ids, i, vocabulary) for _ in range(SAMPLES)] for i in image_ids
        ]
        batches.append((image_ids, np.array(samples)))
    figures: dict[str, object] = {}
    for eos in (False, True):
        start = time.perf_counter()
        cider = TokenCider(tokens, vocabulary, eos)
        name = f"cider{'_eos' if eos else ''}"
        figures[f"{name}_prepare_s"] = time.perf_counter() - start
        seconds = []
        for image_ids, batch in batches:
            rows = cider.rows(image_ids)
            start = time.perf_counter()
            cider(rows, batch)
            seconds.append(time.perf_counter() - start)
        figures[f"{name}_ms"] = statistics.median(seconds) * 1e3
        figures[f"{name}_ms_90th"] = float(np.percentile(seconds, 90)) * 1e3
    # pycocoevalcap's scorer over the samples, with precomputed document frequencies
    image_ids, batch = batches[-1]
    all_references = CiderScorer()
    for group in tokens.values():
        all_references += ("", [" ".join(words) for words in group])
    all_references.compute_doc_freq()
    start = time.perf_counter()
    scorer = CiderScorer()
    for image_id, group in zip(image_ids, batch.tolist(), strict=True):
        for sample in group:
            scorer += (vocabulary.decode(sample), [" ".join(words) for words in tokens[image_id]])
    scorer.document_frequency = all_references.document_frequency
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
