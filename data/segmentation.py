"""Captions of scripts that are written without blanks between words: Chinese, Japanese, Thai and others.

The scorer's tokens are what stands between blanks, so that a whole Chinese sentence is one token. With
segment "characters" each character of such a script, with the marks that belong to it, is a token of its own;
words of other scripts stay whole. Captions are joined again without the blanks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from data.tokens import tokenize

SEGMENTS = ("words", "characters")

# Thai, Lao, Tibetan, Burmese, Khmer, Tai and Javanese scripts; kana, bopomofo and Han.
UNSPACED = (
    "\u0e01-\u0e4e\u0e81-\u0edf\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\ua980-\ua9ff"
    "\uaa60-\uaadf\u2e80-\u2fdf\u3005-\u3007\u3041-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00016ff0-\U00018cff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
WIDE_SIGNS = "\u3000-\u3004\u3008-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # 。 、 「 ！
UNSPACED_RUN = re.compile(f"[{UNSPACED}]+")
BLANK_BESIDE = re.compile(f"(?<=[{UNSPACED}{WIDE_SIGNS}]) | (?=[{UNSPACED}{WIDE_SIGNS}])")


def segmented(caption: str, segment: str = "words") -> list[str]:
    """The tokens of a caption; `segment` is one of SEGMENTS."""
    if segment == "words" or not UNSPACED_RUN.search(caption):
        return tokenize(caption)
    tokens: list[str] = []
    end = 0
    for run in UNSPACED_RUN.finditer(caption):
        tokens += tokenize(caption[end : run.start()])
        tokens += characters(run[0])
        end = run.end()
    return tokens + tokenize(caption[end:])


def characters(run: str) -> list[str]:
    """The characters of a run of unspaced scripts, each with the marks after it."""
    found: list[str] = []
    for sign in run:
        if found and unicodedata.category(sign).startswith("M"):
            found[-1] += sign
        else:
            found.append(sign)
    return found


def join_characters(text: str) -> str:
    """Text without the blanks beside characters and punctuation of unspaced scripts."""
    return BLANK_BESIDE.sub("", text)


def without_blanks(captions: Iterable[str]) -> str | None:
    """The first caption that shows that most of them have no blanks between words; None where they have.

    Captions that somebody has cut into words have runs of two or three characters; sentences have
    longer ones. Thai sentences have a blank now and then.
    """
    runs = lengths = whole = count = 0
    example, total = None, 0
    for caption in captions:
        total += 1
        found = [sum(not unicodedata.category(sign).startswith("M") for sign in run)
                 for run in UNSPACED_RUN.findall(caption)]  # fmt: skip
        if not found:
            continue
        pieces = [piece for piece in caption.split() if UNSPACED_RUN.search(piece)]
        count, runs, lengths = count + 1, runs + len(pieces), lengths + sum(found)
        whole += len(pieces) == 1
        if example is None and len(pieces) == 1:
            example = caption
    if not runs or 2 * count < total or example is None:
        return None
    mean = lengths / runs
    return example if mean > 6 or (mean > 2 and whole > 0.9 * count) else None


def segmented_all(captions: Sequence[str], segment: str = "words") -> list[list[str]]:
    """The tokens of each caption, in order."""
    return [segmented(caption, segment) for caption in captions]
