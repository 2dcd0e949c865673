"""All that is reported of some captions: scores, how sure they are, what the captions are like, and
how all was computed.

A card is what scores.json holds; `print_cards` shows cards as a table, as JSON or as rows of a
LaTeX table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any

import click
import numpy as np

from data.segmentation import segmented_all
from pipeline.scoring.bootstrap import Statistic, interval, mean_of, p_value, resample
from pipeline.scoring.java import Meteor, NotComputed, spice
from pipeline.scoring.metrics import BLEU, Scores, bleu, score
from pipeline.scoring.ngrams import References

NAMES = (*BLEU, "METEOR", "ROUGE_L", "CIDEr", "SPICE")  # in the order that papers print them
ON_REQUEST = ("METEOR", "SPICE")  # by options of these names
FORMATS = ("table", "json", "latex")


@dataclass(frozen=True)
class Scorer:
    """What captions are held against, and how; METEOR's program, once started, serves all of
    them.
    """

    references: References
    name: str  # of the references
    frequencies: str = "references"  # what document frequencies are taken from
    train: frozenset[tuple[str, ...]] | None = None  # tokens of the training captions
    resamples: int = 1000
    seed: int = 0
    unfinished: frozenset[str] = frozenset()  # words that no whole caption ends with

    @cached_property
    def texts(self) -> list[list[str]]:
        """The references' words joined, by image, for the Java programs."""
        words = list(self.references.vocabulary)
        return [
            [" ".join(words[n] for n in caption) for caption in group]
            for group in self.references.grouped()
        ]

    def signature(self) -> str:
        k = self.references.k
        few, many = int(k.min()), int(k.max())
        parts = {
            "n": len(self.references),
            "refs": self.name,
            "nrefs": few if few == many else f"{few}-{many}",
            "case": "lower",
            "tok": "ptb" if self.references.segment == "words" else "ptb+characters",
            "df": self.frequencies,
            "eos": "no",
            "bootstrap": f"{self.resamples}.seed{self.seed}" if self.resamples else "no",
            "version": _version(),
        }
        return "|".join(f"{name}:{value}" for name, value in parts.items())


@dataclass
class Card:
    """One captioner's scores: corpus values (None: not computed, `not_computed` says why), and what
    they come from.
    """

    name: str
    values: dict[str, float | None]
    not_computed: dict[str, str]
    per_image: dict[str, np.ndarray]
    image_ids: np.ndarray
    statistics: list[Statistic]
    resampled: dict[str, np.ndarray]  # corpus values of each resample
    record: dict[str, Any]  # what scores.json holds
    scorer: Scorer


def make_card(
    name: str,
    captions: Mapping[int, str],
    scorer: Scorer,
    meteor: Meteor | NotComputed | None,
    want_spice: bool,
) -> Card:
    """Score one caption for each image of the references with everything that is asked for."""
    tokenised = dict(
        zip(
            captions, segmented_all(list(captions.values()), scorer.references.segment), strict=True
        )
    )
    scores = score(tokenised, scorer.references)
    tokens = [tokenised[image_id] for image_id in scorer.references.rows]
    values, missing = scores.values | dict.fromkeys(scores.not_computed), dict(scores.not_computed)
    card = Card(
        name,
        values,
        missing,
        dict(scores.per_image),
        scores.image_ids,
        _statistics(scores),
        {},
        {},
        scorer,
    )
    _add_java(card, [" ".join(words) for words in tokens], scorer, meteor, want_spice)
    resampled = card.resampled = (
        resample(card.statistics, scorer.resamples, scorer.seed) if scorer.resamples else {}
    )
    card.record = {
        "scores": {name: card.values[name] for name in NAMES if name in card.values},
        "intervals": {name: interval(resampled[name]) for name in NAMES if name in resampled},
        "not_computed": card.not_computed,
        "signature": scorer.signature(),
        "images": len(tokens),
        "statistics": describe(tokens, scorer),
    }
    return card


def _statistics(scores: Scores) -> list[Statistic]:
    means = [
        mean_of(name, scores.per_image[name])
        for name in ("ROUGE_L", "CIDEr")
        if name in scores.per_image
    ]
    return [Statistic(BLEU, scores.bleu_sums, bleu), *means]


def _add_java(
    card: Card,
    texts: list[str],
    scorer: Scorer,
    meteor: Meteor | NotComputed | None,
    want_spice: bool,
) -> None:
    for name, wanted in (("METEOR", meteor is not None), ("SPICE", want_spice)):
        if not wanted:
            card.not_computed[name] = f"not asked for; pass --{name.lower()}"
            continue
        card.values[name] = None
        try:
            if name == "SPICE":
                found, per_image = _spice(texts, scorer)
            else:
                if isinstance(meteor, NotComputed):
                    raise meteor
                assert meteor is not None  # else it is not wanted
                found, per_image = _meteor(meteor, texts, scorer)
        except NotComputed as error:
            card.not_computed[name] = str(error)
            continue
        card.statistics.append(found)
        card.per_image[name] = per_image
        value = float(found.scores(found.sums.sum(0, keepdims=True))[0, 0])
        if np.isnan(value):
            card.statistics.pop()
            card.not_computed[name] = f"{name} gave no image a score"
        else:
            card.values[name] = value


def _meteor(meteor: Meteor, texts: list[str], scorer: Scorer) -> tuple[Statistic, np.ndarray]:
    sums = meteor.statistics(texts, scorer.texts)
    return Statistic(("METEOR",), sums, lambda added: meteor.score(added)[:, None]), meteor.score(
        sums
    )


def _spice(texts: list[str], scorer: Scorer) -> tuple[Statistic, np.ndarray]:
    per_image = spice(texts, scorer.texts)
    return mean_of("SPICE", per_image), per_image


def describe(tokens: Sequence[Sequence[str]], scorer: Scorer) -> dict[str, Any]:
    """Length in words, vocabulary, share of captions written once, of those that end as none does,
    and of those that no training caption is."""
    captions, unfinished = [tuple(words) for words in tokens], scorer.unfinished
    lengths = np.array([len(words) for words in captions])
    novel = (
        None
        if scorer.train is None
        else float(np.mean([words not in scorer.train for words in captions]))
    )
    return {
        "words": {
            "mean": float(lengths.mean()),
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "max": int(lengths.max()),
        },
        "unfinished": float(
            np.mean([bool(words) and words[-1] in unfinished for words in captions])
        ),
        "empty": int((lengths == 0).sum()),
        "vocabulary": len({word for words in captions for word in words}),
        "distinct": len(set(captions)) / len(captions),
        "novel": novel,
        "references": {
            "words": {"mean": float(scorer.references.counts.mean())},
            "vocabulary": len(np.unique(scorer.references.tokens)),
        },
    }


def compare(card: Card, other: Card) -> dict[str, Any]:
    """Paired bootstrap of two captioners over the same images: difference, interval and p by
    score.
    """
    mine, theirs = card.resampled, other.resampled  # of one seed, so of the same images
    found: dict[str, Any] = {
        "name": other.name,
        "scores": other.record["scores"],
        "differences": {},
    }
    for name in NAMES:
        if name in mine and name in theirs:
            value, against = card.values[name], other.values[name]
            assert value is not None and against is not None  # what is resampled has a value
            difference, differences = value - against, mine[name] - theirs[name]
            found["differences"][name] = {
                "value": difference,
                "interval": interval(differences),
                "p": p_value(difference, differences),
            }
    return found


def image_lines(card: Card, captions: Mapping[int, str]) -> str:
    """Each image's caption and scores, as JSON lines in the order of the references."""
    lines, nothing = [], np.full(len(card.image_ids), np.nan)
    for row, image_id in enumerate(card.image_ids.tolist()):
        found = {
            name: float(card.per_image.get(name, nothing)[row])
            for name in NAMES
            if name in card.values
        }
        scores = {name: None if np.isnan(value) else value for name, value in found.items()}
        line = {"image_id": image_id, "caption": captions[image_id], "scores": scores}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def print_cards(cards: Sequence[Card], form: str) -> None:
    """Cards on stdout, as FORMATS has it."""
    if form == "json":
        found = [{"name": card.name, **card.record} for card in cards]
        click.echo(json.dumps(found[0] if len(found) == 1 else found, indent=2))
    elif form == "latex":
        names = _names(cards)
        click.echo("% " + " & ".join(["captions", *names]) + r" \\")
        for card in cards:
            cells = [
                f"{100 * value:.1f}" if (value := card.values.get(name)) is not None else "--"
                for name in names
            ]
            name = re.sub(r"([&%$#_{}])", r"\\\1", card.name)
            click.echo(" & ".join([name, *cells]) + r" \\")
            for line in _missing(card):
                click.echo(f"% {line}")
    else:
        for line in _table(cards):
            click.echo(line)


def _missing(card: Card) -> list[str]:
    """The reasons why requested scores are missing."""
    return [
        f"{name} not computed: {why}"
        for name, why in card.not_computed.items()
        if name in card.values
    ]


def _names(cards: Sequence[Card]) -> list[str]:
    """The names of the requested scores."""
    return [name for name in NAMES if any(name in card.values for card in cards)]


def _table(cards: Sequence[Card]) -> list[str]:
    names = _names(cards)
    rows: list[tuple[str, list[str]]] = []
    for card in cards:
        intervals = card.record["intervals"]
        rows.append((card.name, [_digits(card.values.get(name)) for name in names]))
        for end, word in enumerate(("from", "to")):
            if intervals:
                rows.append(
                    (
                        f"  95 % {word}",
                        [_digits(intervals.get(name, (None, None))[end]) for name in names],
                    )
                )
        if against := card.record.get("against"):
            found = against["differences"]
            rows.append(
                (
                    f"against {against['name']}",
                    [_digits(against["scores"].get(name)) for name in names],
                )
            )
            rows.append(
                (
                    "  difference",
                    [f"{found[name]['value']:+.4f}" if name in found else "-" for name in names],
                )
            )
            for end, word in enumerate(("from", "to")):
                ends = [
                    f"{found[name]['interval'][end]:+.4f}" if name in found else "-"
                    for name in names
                ]
                rows.append((f"  95 % {word}", ends))
            rows.append(
                (
                    "  p, paired",
                    [_chance(found[name]["p"], card) if name in found else "-" for name in names],
                )
            )
    first = max(len(label) for label, _ in rows)
    widths = [max(len(name), 7) for name in names]
    lines = [
        f"{label:<{first}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for label, cells in [("", names), *rows]
    ]
    for card in cards:
        about = card.record["statistics"]
        parts = [
            f"{card.record['images']:,} captions of {about['words']['mean']:.1f} words",
            f"{about['vocabulary']:,} different words",
            f"{about['distinct']:.1%} distinct",
            *([] if about["novel"] is None else [f"{about['novel']:.1%} novel"]),
            f"{about['unfinished']:.2%} end in an article, preposition or conjunction (no adverb)",
            *([f"{about['empty']} empty"] if about["empty"] else []),
        ]
        lines.append(f"{card.name}: {', '.join(parts)}")
        lines += _missing(card)
        lines.append(f"signature {card.record['signature']}")
    return lines


def print_examples(card: Card, captions: Mapping[int, str], count: int, aside: bool) -> None:
    """The `count` captions with the lowest and the highest CIDEr, each with its references;
    `aside`: on stderr.

    Where CIDEr is not computed, ROUGE-L stands for it.
    """
    name = "CIDEr" if "CIDEr" in card.per_image else "ROUGE_L"
    order = np.argsort(card.per_image[name], kind="stable")
    ids, texts = card.image_ids.tolist(), card.scorer.texts
    for what, rows in (("worst", order[:count]), ("best", order[::-1][:count])):
        for row in rows.tolist():
            value = card.per_image[name][row]
            click.echo(
                f"{what}  image {ids[row]}  {name} {value:.3f}  {captions[ids[row]]}", err=aside
            )
            for text in texts[row]:
                click.echo(f"         {text}", err=aside)


def _chance(p: float, card: Card) -> str:
    """p, as a bound where no resample came near: it is never below 1 / (resamples + 1)."""
    least = 1 / (card.scorer.resamples + 1)
    return f"<{max(p, 1e-4):.4f}" if p <= least else f"{p:.4f}"


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _version() -> str:
    try:
        return metadata.version("onceover")
    except metadata.PackageNotFoundError:
        return "unknown"
