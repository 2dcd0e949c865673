"""Tokens for scripts without spaces between words: Chinese, Japanese, Thai and others.

The scorer splits a caption at spaces, so that a Chinese sentence is a single token. With segment
"characters", each character of such a script is a token, together with its combining marks. Words
of other scripts remain whole. Captions are joined again without these spaces.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence

from data.tokens import tokenize

SEGMENTS = ("words", "characters")

# The scripts without spaces: Thai, Lao, Tibetan, Burmese, Khmer, Tai and Javanese scripts; kana, bopomofo and Han.
UNSPACED = (
    "\u0e01-\u0e4e\u0e81-\u0edf\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\ua980-\ua9ff"
    "\uaa60-\uaadf\u2e80-\u2fdf\u3005-\u3007\u3041-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00016ff0-\U00018cff\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
WIDE_PUNCTUATION = (
    "\u3000-\u3004\u3008-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # 。 、 「 ！
)
UNSPACED_RUN = re.compile(f"[{UNSPACED}]+")
EAST_ASIAN = re.compile(
    "[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
SPACE_BESIDE = re.compile(
    f"(?<=[{UNSPACED}{WIDE_PUNCTUATION}]) | (?=[{UNSPACED}{WIDE_PUNCTUATION}])"
)


def segmented(caption: str, segment: str = "words") -> list[str]:
    """Return the tokens of a caption. `segment` is one of SEGMENTS."""
    if segment == "words" or not UNSPACED_RUN.search(caption):
        return tokenize(caption)
    tokens: list[str] = []
    end = 0
    for run in UNSPACED_RUN.finditer(caption):
        tokens += tokenize(caption[end : run.start()])
        tokens += characters(run[0])
        end = run.end()
    return tokens + tokenize(caption[end:])


# A prompt may have several parts, each after one of these marks: the caption of the image, and the
# questions and answers of a dialogue. Each mark is a token.
CAPTION, QUESTION, ANSWER = MARKS = ("<caption>", "<question>", "<answer>")
_MARK = re.compile("(" + "|".join(MARKS) + ")")
_MARK_IN_TEXT = re.compile("<+(" + "|".join(mark.strip("<>") for mark in MARKS) + ")>+")


def prompt_tokens(prompt: str, segment: str = "words") -> list[str]:
    """Return the tokens of a prompt. Its marks are tokens."""
    parts = _MARK.split(prompt)
    if len(parts) == 1:
        return segmented(prompt, segment)
    tokens: list[str] = []
    for part in parts:
        tokens += [part] if part in MARKS else _part_tokens(part, segment)
    return tokens


@functools.lru_cache(maxsize=1 << 16)  # the prompts of a dialogue repeat its earlier parts
def _part_tokens(part: str, segment: str) -> tuple[str, ...]:
    return tuple(segmented(part, segment))


def without_marks(text: str) -> str:
    """Return a text in which nothing is a mark: "<answer>" becomes "answer"."""
    return _MARK_IN_TEXT.sub(r"\1", text)


def characters(run: str) -> list[str]:
    """Return the characters of a run of unspaced scripts, each with its combining marks."""
    clusters: list[str] = []
    for character in run:
        if clusters and unicodedata.category(character).startswith("M"):
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


def join_characters(text: str) -> str:
    """Remove the spaces beside characters and punctuation of unspaced scripts."""
    return SPACE_BESIDE.sub("", text)


def without_blanks(captions: Iterable[str]) -> str | None:
    """Return an example if the captions have no spaces between words; None if they have spaces.

    The decision uses the mean number of characters between two spaces. A word has about two
    characters (Chinese, Japanese) or four (Thai and others); a clause has more. At least a quarter
    of the captions must be in such scripts.
    """
    total = 0
    # by whether the script is East Asian: captions, and the lengths of their parts between spaces
    groups: dict[bool, list[tuple[str, list[int]]]] = {True: [], False: []}
    for caption in captions:
        total += 1
        if UNSPACED_RUN.search(caption):
            lengths = [sum(map(_is_character, part)) for part in caption.split()]
            east_asian = EAST_ASIAN.search(caption) is not None
            groups[east_asian].append((caption, [length for length in lengths if length]))
    for east_asian, group in groups.items():
        if 4 * len(group) < max(total, 1):
            continue
        all_lengths = [length for _, lengths in group for length in lengths]
        mean = sum(all_lengths) / max(len(all_lengths), 1)
        one_part = sum(len(lengths) == 1 for _, lengths in group) > 0.9 * len(group)
        if mean > (3 if east_asian else 5) or (one_part and mean > 2):
            caption, _ = max(group, key=lambda item: max(item[1], default=0) / len(item[0]))
            return caption
    return None


def _is_character(character: str) -> bool:
    return UNSPACED_RUN.match(character) is not None and not unicodedata.category(
        character
    ).startswith("M")


def segmented_all(captions: Sequence[str], segment: str = "words") -> list[list[str]]:
    """Return the tokens of each caption, in order."""
    return [segmented(caption, segment) for caption in captions]
