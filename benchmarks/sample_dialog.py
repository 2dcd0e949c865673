"""Visual dialog on the embedded sample, whose true answers are known.

    python -m benchmarks.sample_dialog [--work FOLDER] [--seeds 0,1,2] [--json FILE]

Trains --task dialog once for each seed and scores the held-out scenes (split test): R@1 of the true
answer among 100 candidates, and the share of generated answers that are the true one. Beside it:

- the R@1 of each seed with features shuffled between images,
- the R@1 of a decoder that reads no earlier rounds (--no-history), and
- the R@1 of a decoder without regions (--features none), both with the first seed.

The aims: R@1 and generated answers at least 0.90, R@1 without history at least 0.20 lower, and with
shuffled features within 0.05 of the decoder without regions. A sample and a cache in --work are
reused. The options of training were chosen on dev. The decoders are trained at the same time, each
in a process of one thread.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.measure import header, report
from benchmarks.sample_runs import WITHOUT_REGIONS, Job, sample_command, train_all
from data.cache.reader import FeatureCache
from data.datasets.registry import open_source
from data.tokens import tokenize
from pipeline.checkpoints.checkpoint import load_checkpoint
from pipeline.decoding.captioner import generate_texts, make_generator
from pipeline.runtime import open_machine

# chosen on dev: seven epochs, of which the last is validated; without regions dev no longer
# improves after the second
EPOCHS = ("--epochs", "7", "--eval-steps", "900")


@sample_command
def main(work: Path, seeds: str, out: Path | None) -> None:
    """Train visual dialog on the sample, and report the scores on held-out scenes."""
    start = time.monotonic()
    names = seeds.split(",")
    options: dict[str, tuple[str, ...]] = {
        f"seed {seed}": (*EPOCHS, "--seed", seed) for seed in names
    }
    options["without history"] = (*EPOCHS, "--seed", names[0], "--no-history")
    options[WITHOUT_REGIONS] = ("--epochs", "2", "--seed", names[0])
    figures = header()
    for name, (job, scores) in train_all(work, "dialog", options).items():
        figures |= {f"{name}: {score}": scores[score] for score in ("R@1", "MRR", "seconds")}
        if name.startswith("seed"):
            figures[f"{name}: R@1 with shuffled features"] = scores["shuffled"]["R@1"]
            figures[f"{name}: generated answers"] = generated_answers(job)
    figures["minutes"] = (time.monotonic() - start) / 60
    report(figures, out)


def generated_answers(job: Job) -> float:
    """Return the share of generated answers on test that are the true one."""
    checkpoint, machine, cache = load_checkpoint(job.run), open_machine(), FeatureCache(job.cache)
    task = checkpoint.new_task()
    examples = task.examples(open_source("sample", job.sample), "test")
    generator = make_generator(checkpoint.captioner, checkpoint, machine, {})
    texts = generate_texts(generator, cache, examples)
    right = [tokenize(texts[e.id][0].text) == tokenize(e.targets[0]) for e in examples]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
