"""METEOR and SPICE, computed by the Java programs in pycocoevalcap (the extra `java`).

METEOR    Denkowski and Lavie 2014: version 1.5, English, alignment by exact words, stems, synonyms
          and paraphrases
SPICE     Anderson et al. 2016: F-measure of the tuples of scene graphs; it needs Stanford CoreNLP
          3.6.0, which must be downloaded once

Both read the same words as BLEU, ROUGE-L and CIDEr. If a program cannot run, the functions raise
`NotComputed` with the reason.
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

# Columns of METEOR's 23 statistics.
TEST_LENGTH, REFERENCE_LENGTH, CHUNKS, TEST_MATCHES, REFERENCE_MATCHES = 0, 1, 20, 21, 22
CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# SPICE's serializer needs access to these packages. Java 8 ignores the unknown option --add-opens.
PACKAGES = ("lang", "math", "util", "util.concurrent", "net", "text")
ADD_OPENS = [
    "-XX:+IgnoreUnrecognizedVMOptions",
    *(f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in PACKAGES),
]


class NotComputed(RuntimeError):
    """A score cannot be computed on this machine. The message names the reason and a fix."""


class Meteor:
    """A running METEOR program, as a context manager that ends the program.

    Captions and references are strings of words that are separated by single blanks.
    Raises NotComputed if the program cannot run.
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
        # stderr is a file: nothing reads it during the run, and a full pipe would block the program
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
        with contextlib.suppress(BrokenPipeError):  # there may be unread input
            self.stdin.close()
        self.stdout.close()
        self.errors.close()

    def statistics(
        self, captions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """Compute the statistics [I,23] float64 of one caption per image.

        `score` computes METEOR from them, for an image or for a sum over images.
        """
        # `|||` separates the captions of a line. pycocoevalcap removes it from the scored caption.
        lines = [
            " ||| ".join(["SCORE", *group, caption.replace("|||", "").replace("  ", " ")])
            for caption, group in zip(captions, references, strict=True)
        ]
        with progress(len(lines), "captions", "METEOR") as bar:
            replies = self._query(lines, 1, bar.step)
        statistics = np.array([[float(x) for x in line.split()] for line in replies])
        # In a sum, METEOR counts no chunk for a caption that is equal to its reference.
        is_equal = (
            (statistics[:, CHUNKS] == 1)
            & (statistics[:, TEST_MATCHES] == statistics[:, TEST_LENGTH])
            & (statistics[:, REFERENCE_MATCHES] == statistics[:, REFERENCE_LENGTH])
        )
        statistics[is_equal, CHUNKS] = 0
        return statistics

    def score(self, statistics: np.ndarray) -> np.ndarray:
        """Compute METEOR [S] of each row of `statistics` [S,23]."""
        lines = ["EVAL ||| " + " ".join(f"{x:.1f}" for x in row) for row in statistics]
        # Each reply has two lines: the score of one segment, then the score of all segments.
        return np.array([float(line) for line in self._query(lines, 2)[1::2]])

    def _query(self, lines: Sequence[str], replies: int, on_reply=lambda count: None) -> list[str]:
        """Send lines to the program, and return its `replies` lines for each of them.

        A thread sends the lines, so that the program never waits for the next one.
        """

        def send() -> None:
            with contextlib.suppress(BrokenPipeError):  # the missing reply is reported below
                for line in lines:
                    self.stdin.write(line + "\n")
                self.stdin.flush()

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        all_replies: list[str] = []
        for _ in range(len(lines) * replies):
            reply = self.stdout.readline()
            if not reply:
                self.errors.seek(0)
                errors = self.errors.read().decode(errors="replace")
                raise NotComputed(f"METEOR's Java stopped: {_main_error(errors)}")
            all_replies.append(reply.strip())
            on_reply(1)
        sender.join()
        return all_replies


def spice(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Compute SPICE [I] float64 of one caption per image; NaN if a scene graph gives no score.

    Captions and references are strings of words that are separated by single blanks. The score of
    the corpus is the mean. Raises NotComputed if the program cannot run.
    """
    folder = _program("SPICE") / "spice"
    if missing := [name for name in CORENLP if not (folder / "lib" / name).exists()]:
        raise NotComputed(
            f"SPICE needs Stanford CoreNLP 3.6.0, and {folder / 'lib'} lacks "
            f"{' and '.join(missing)}; download it with: "
            "python -m pycocoevalcap.spice.get_stanford_models"
        )
    entries = [
        {"image_id": row, "test": caption, "refs": list(group)}
        for row, (caption, group) in enumerate(zip(captions, references, strict=True))
    ]
    say(f"SPICE of {len(entries):,} captions: the parser takes some minutes")
    with tempfile.TemporaryDirectory() as temporary:
        input_file, output_file = Path(temporary) / "input.json", Path(temporary) / "output.json"
        input_file.write_text(json.dumps(entries), encoding="utf-8")
        command = [
            "java",
            *ADD_OPENS,
            "-Xmx8G",
            "-jar",
            "spice-1.0.jar",
            str(input_file),
            "-out",
            str(output_file),
            "-subset",
            "-silent",
        ]
        process = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if process.returncode or not output_file.exists():
            raise NotComputed(f"SPICE's Java stopped: {_main_error(process.stderr)}")
        results = json.loads(output_file.read_text(encoding="utf-8"))
    scores = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in results}
    return np.array(
        [np.nan if scores[row] is None else float(scores[row]) for row in range(len(entries))]
    )


def _program(score: str) -> Path:
    """The folder of pycocoevalcap. Raises NotComputed if it or Java is not installed."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None:
        raise NotComputed(f"{score} needs pycocoevalcap: pip install 'onceover[java]'")
    if shutil.which("java") is None:
        raise NotComputed(
            f"{score} needs Java, and no java is on the PATH; install a Java runtime, for example "
            "with: apt install default-jre"
        )
    assert package.submodule_search_locations is not None  # it is a package
    return Path(next(iter(package.submodule_search_locations)))


def _main_error(errors: str) -> str:
    """The most informative line in the error output of a Java program."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    messages = [line for line in lines if not line.startswith("at ")]  # without the stack trace
    return next(
        (line for line in messages if "Exception" in line or "Error" in line),
        messages[-1] if messages else "it printed no error",
    )
