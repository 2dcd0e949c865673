"""Start a decoder from the weights of another one, with another vocabulary and other classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from models.decoders.interface import Decoder


@torch.no_grad()
def copy_common_weights(
    decoder: Decoder,
    words: Sequence[str],
    answers: Sequence[str],
    other: Decoder,
    other_words: Sequence[str],
    other_answers: Sequence[str],
) -> int:
    """Copy the weights of `other` that fit into `decoder`, in place.

    A tensor with one row per word (per answer) gets the rows of the words (answers) in common. Of a
    tensor with one row per position it gets the rows that both have. A tensor that `other` lacks,
    such as those of prompts, is unchanged. All other tensors must have the same shape.

    words, answers: the words and the answers of the rows of `decoder`, in order; other_words,
        other_answers: those of `other`.

    Returns the number of copied words.
    """
    own, theirs = decoder.state_dict(), other.state_dict()
    of_words = _names_with_rows_per_word(decoder)
    word_rows, answer_rows = _common(words, other_words), _common(answers, other_answers)
    for name, tensor in own.items():
        if name.startswith("head."):
            rows = answer_rows
        elif name not in theirs:
            continue
        elif name in of_words:
            rows = word_rows
        else:
            positions = torch.arange(min(len(tensor), len(theirs[name])))
            rows = positions, positions
        if len(rows[0]):
            tensor[rows[0]] = theirs[name][rows[1]].to(tensor)
    return len(word_rows[0])


def _common(own: Sequence[str], other: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The indices of the common entries in each of two lists, each [n] int64."""
    index = {entry: number for number, entry in enumerate(other)}
    pairs = [(number, index[entry]) for number, entry in enumerate(own) if entry in index]
    rows = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def _names_with_rows_per_word(decoder: Decoder) -> set[str]:
    """The names of the tensors whose shape depends on the size of the vocabulary."""
    larger = dataclasses.replace(decoder.config, words=decoder.config.words + 1)
    with torch.device("meta"):
        tensors = type(decoder)(larger).state_dict()  # type: ignore[call-arg]
    own = decoder.state_dict()
    return {name for name, tensor in tensors.items() if tensor.shape != own[name].shape}
