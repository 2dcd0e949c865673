"""Image-text sentiment on the embedded sample, whose true labels are known.

    python -m benchmarks.sample_sentiment [--work FOLDER] [--seeds 0,1,2] [--json FILE]

A text such as "i love the red ones" is positive if the scene has a red thing, so that the label
needs the text and the image. Trains --task sentiment once for each seed, and with the first seed
also with --use text and --use image, and scores the held-out scenes (split test).

The aims: an accuracy of 0.95 with text and image; with one of them half of the labels, as by
chance. A sample and a cache in --work are reused. The options of training were chosen on dev.
"""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.measure import header, report
from benchmarks.sample_runs import sample_command, train_all

EPOCHS = ("--epochs", "8")  # chosen on dev


@sample_command
def main(work: Path, seeds: str, out: Path | None) -> None:
    """Train image-text sentiment on the sample, and report the accuracy on held-out scenes."""
    start = time.monotonic()
    names = seeds.split(",")
    options: dict[str, tuple[str, ...]] = {
        f"seed {seed}": (*EPOCHS, "--seed", seed) for seed in names
    }
    for use in ("text", "image"):
        options[f"{use} alone"] = (*EPOCHS, "--seed", names[0], "--use", use)
    figures = header()
    for name, (_, scores) in train_all(work, "sentiment", options).items():
        for score in ("accuracy", "macro_f1", "calibration_error", "seconds"):
            figures[f"{name}: {score}"] = scores[score]
        if name.startswith("seed"):
            figures[f"{name}: accuracy with shuffled features"] = scores["shuffled"]["accuracy"]
    figures["minutes"] = (time.monotonic() - start) / 60
    report(figures, out)


if __name__ == "__main__":
    main()
