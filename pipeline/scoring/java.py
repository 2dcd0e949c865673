"""METEOR and SPICE through the Java programs inside pycocoevalcap (the extra `java`), each started
once for many files.

METEOR    Denkowski and Lavie 2014: version 1.5, English, aligned by exact words, stems, synonyms
          and paraphrases
SPICE     Anderson et al. 2016: F of the scene graphs' tuples; needs Stanford CoreNLP 3.6.0, which
          is downloaded once

Both take the words that BLEU, ROUGE-L and CIDEr are computed on. What cannot run here is
`NotComputed`, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.terminal import progress, say

CHUNKS, TEST_MATCHES, REFERENCE_MATCHES = (
    20,
    21,
    22,
)  # of METEOR's 23 statistics; 0 and 1 are the two lengths
CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# SPICE's serializer looks into these; Java 8 does not know the option and ignores it.
PACKAGES = ("lang", "math", "util", "util.concurrent", "net", "text")
OPEN = [
    "-XX:+IgnoreUnrecognizedVMOptions",
    *(f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in PACKAGES),
]


class NotComputed(RuntimeError):
    """A score that cannot be computed here; the message says why and what mends it."""


class Meteor:
    """METEOR of captions, given as words joined by single blanks.

    A context manager: leaving it ends the program.
    """

    def __init__(self) -> None:
        folder = _program("METEOR") / "meteor"
        command = [
            "java",
            "-jar",
            "-Xmx2G",
            "meteor-1.5.jar",
            "-",
            "-",
            "-stdio",
            "-l",
            "en",
            "-norm",
        ]
        # a file, since a full pipe would stop the program
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.java = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            encoding="utf-8",
        )
        assert self.java.stdin is not None and self.java.stdout is not None  # both are pipes
        self.stdin, self.stdout = self.java.stdin, self.java.stdout

    def __enter__(self) -> Meteor:
        return self

    def __exit__(self, *_: object) -> None:
        self.java.kill()
        self.java.wait()
        with contextlib.suppress(BrokenPipeError):  # what was not read yet
            self.stdin.close()
        self.stdout.close()
        self.errors.close()

    def statistics(
        self, captions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """[I,23] float64: what `score` computes METEOR from, of an image or of the sum over
        images.
        """
        # `|||` parts captions here; pycocoevalcap takes it out of the one scored so
        lines = [
            " ||| ".join(["SCORE", *group, caption.replace("|||", "").replace("  ", " ")])
            for caption, group in zip(captions, references, strict=True)
        ]
        with progress(len(lines), "captions", "METEOR") as bar:
            found = np.array(
                [[float(x) for x in line.split()] for line in self._ask(lines, 1, bar.step)]
            )
        whole = (
            (found[:, CHUNKS] == 1)
            & (found[:, TEST_MATCHES] == found[:, 0])
            & (found[:, REFERENCE_MATCHES] == found[:, 1])
        )
        found[whole, CHUNKS] = (
            0  # as METEOR itself does in a sum: a caption that is its reference has no fragments
        )
        return found

    def score(self, statistics: np.ndarray) -> np.ndarray:
        """METEOR [S] of each row of `statistics` [S,23]."""
        lines = ["EVAL ||| " + " ".join(f"{x:.1f}" for x in row) for row in statistics]
        # of one segment, then of all there are
        return np.array([float(line) for line in self._ask(lines, 2)[1::2]])

    def _ask(self, lines: Sequence[str], answers: int, done=lambda count: None) -> list[str]:
        """`answers` lines for each line; a thread asks, so that the program never waits for the
        next question.
        """

        def ask() -> None:
            with contextlib.suppress(BrokenPipeError):  # told below, where its answer is missing
                for line in lines:
                    self.stdin.write(line + "\n")
                self.stdin.flush()

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        found: list[str] = []
        for _ in range(len(lines) * answers):
            answer = self.stdout.readline()
            if not answer:
                self.errors.seek(0)
                raise NotComputed(
                    "METEOR's Java stopped: "
                    f"{_last_line(self.errors.read().decode(errors='replace'))}"
                )
            found.append(answer.strip())
            done(1)
        asking.join()
        return found


def spice(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """SPICE [I] of captions, given as words joined by single blanks; NaN where a scene graph gives
    no score.

    The corpus' score is the mean.
    """
    folder = _program("SPICE") / "spice"
    if absent := [name for name in CORENLP if not (folder / "lib" / name).exists()]:
        raise NotComputed(
            f"SPICE needs Stanford CoreNLP 3.6.0, and {folder / 'lib'} lacks "
            f"{' and '.join(absent)}; with a network: "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    entries = [
        {"image_id": row, "test": caption, "refs": list(group)}
        for row, (caption, group) in enumerate(zip(captions, references, strict=True))
    ]
    say(f"SPICE of {len(entries):,} captions: its parser takes some minutes")
    with tempfile.TemporaryDirectory() as work:
        asked, answered = Path(work) / "asked.json", Path(work) / "answered.json"
        asked.write_text(json.dumps(entries), encoding="utf-8")
        command = [
            "java",
            *OPEN,
            "-Xmx8G",
            "-jar",
            "spice-1.0.jar",
            str(asked),
            "-out",
            str(answered),
            "-subset",
            "-silent",
        ]
        ended = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if ended.returncode or not answered.exists():
            raise NotComputed(f"SPICE's Java stopped: {_last_line(ended.stderr)}")
        found = json.loads(answered.read_text(encoding="utf-8"))
    scores = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in found}
    return np.array(
        [np.nan if scores[row] is None else float(scores[row]) for row in range(len(entries))]
    )


def _program(score: str) -> Path:
    """The folder of pycocoevalcap, where Java is there too."""
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None:
        raise NotComputed(f"{score} needs pycocoevalcap: pip install 'onceover[java]'")
    if shutil.which("java") is None:
        raise NotComputed(
            f"{score} needs Java, and no java is on the PATH; install a JRE, as with apt "
            "install default-jre"
        )
    assert found.submodule_search_locations is not None  # it is a package
    return Path(next(iter(found.submodule_search_locations)))


def _last_line(errors: str) -> str:
    """The line of a Java program's complaint that says what happened."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("at ")]
    return next(
        (line for line in told if "Exception" in line or "Error" in line),
        told[-1] if told else "it said nothing",
    )
