"""Captions of scripts that are written without spaces between words: Chinese, Japanese, Thai and
others.

The scorer's tokens are what stands between blanks, so that a whole Chinese sentence is one token.
With segment "characters" each character of such a script, with the marks that belong to it, is a
token of its own; words of other scripts stay whole. Captions are joined again without the blanks.
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
WIDE_SIGNS = (
    "\u3000-\u3004\u3008-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # 。 、 「 ！
)
UNSPACED_RUN = re.compile(f"[{UNSPACED}]+")
EAST_ASIAN = re.compile(
    "[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
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
    """A caption that shows that they have no spaces between words; None where they have.

    What stands between two blanks is a word, of two characters in the mean (Chinese, Japanese) or
    four (Thai and others), or a clause, which is longer. A quarter of the captions must be of such
    scripts.
    """
    total = 0
    found: dict[bool, list[tuple[str, list[int]]]] = {
        True: [],
        False: [],
    }  # by whether of East Asia
    for caption in captions:
        total += 1
        if UNSPACED_RUN.search(caption):
            pieces = [sum(map(_is_character, piece)) for piece in caption.split()]
            found[EAST_ASIAN.search(caption) is not None].append(
                (caption, [n for n in pieces if n])
            )
    for east_asian, group in found.items():
        if 4 * len(group) < max(total, 1):
            continue
        lengths = [length for _, pieces in group for length in pieces]
        mean = sum(lengths) / max(len(lengths), 1)
        whole = sum(len(pieces) == 1 for _, pieces in group) > 0.9 * len(group)
        if mean > (3 if east_asian else 5) or (whole and mean > 2):
            return max(group, key=lambda each: max(each[1], default=0) / len(each[0]))[0]
    return None


def _is_character(sign: str) -> bool:
    return UNSPACED_RUN.match(sign) is not None and not unicodedata.category(sign).startswith("M")


def segmented_all(captions: Sequence[str], segment: str = "words") -> list[list[str]]:
    """The tokens of each caption, in order."""
    return [segmented(caption, segment) for caption in captions]
