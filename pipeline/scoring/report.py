"""The report on a set of captions: scores, confidence intervals, statistics and a signature.

A `Card` is the report on one captioner, and scores.json contains it. `print_cards` prints cards as
a table, as JSON or as rows of a LaTeX table.
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
from pipeline.scoring.bootstrap import Statistic, interval, mean_of, paired_difference, resample
from pipeline.scoring.java import Meteor, NotComputed, spice
from pipeline.scoring.metrics import BLEU, Scores, bleu, score
from pipeline.scoring.ngrams import References

NAMES = (*BLEU, "METEOR", "ROUGE_L", "CIDEr", "SPICE")  # in the usual order of papers
ON_REQUEST = ("METEOR", "SPICE")  # computed only with --meteor and --spice
FORMATS = ("table", "json", "latex")


@dataclass(frozen=True)
class Scorer:
    """The references of captions, and the settings of the report.

    references: the references of all images.
    name: name of the references, for the signature.
    frequencies: source of the document frequencies, for the signature.
    train: tokens of the training captions, to count novel captions; None: unknown.
    resamples: number of bootstrap resamples; 0: no intervals. seed: seed of the resamples.
    unfinished: words that a complete caption never ends with.
    """

    references: References
    name: str
    frequencies: str = "references"
    train: frozenset[tuple[str, ...]] | None = None
    resamples: int = 1000
    seed: int = 0
    unfinished: frozenset[str] = frozenset()

    @cached_property
    def texts(self) -> list[list[str]]:
        """The references of each image as strings of tokens, for the Java programs."""
        words = list(self.references.vocabulary)
        return [
            [" ".join(words[n] for n in caption) for caption in group]
            for group in self.references.grouped()
        ]

    def signature(self) -> str:
        """All settings that influence the scores, as one line."""
        k = self.references.k
        smallest, largest = int(k.min()), int(k.max())
        parts = {
            "n": len(self.references),
            "refs": self.name,
            "nrefs": smallest if smallest == largest else f"{smallest}-{largest}",
            "case": "lower",
            "tok": "ptb" if self.references.segment == "words" else "ptb+characters",
            "df": self.frequencies,
            "eos": "no",
            "bootstrap": f"{self.resamples}.seed{self.seed}" if self.resamples else "no",
        }
        return signature_line(parts)


@dataclass
class Card:
    """The report on one captioner.

    values: scores of the corpus, by name; None: not computed.
    not_computed: reasons for scores that are not computed, by name.
    per_image: [I] float64 scores by name, in the order of `image_ids`.
    statistics: the sums that the bootstrap resamples.
    resampled: [resamples] scores of the corpus, by name.
    record: the content of scores.json.
    """

    name: str
    values: dict[str, float | None]
    not_computed: dict[str, str]
    per_image: dict[str, np.ndarray]
    image_ids: np.ndarray
    statistics: list[Statistic]
    resampled: dict[str, np.ndarray]
    record: dict[str, Any]
    scorer: Scorer


def make_card(
    name: str,
    captions: Mapping[int, str],
    scorer: Scorer,
    meteor: Meteor | NotComputed | None,
    want_spice: bool,
) -> Card:
    """Score one caption per image of the references.

    meteor: the running program; NotComputed: the reason why it cannot run; None: not requested.
    want_spice: whether SPICE is requested.
    """
    token_lists = segmented_all(list(captions.values()), scorer.references.segment)
    tokens_by_id = dict(zip(captions, token_lists, strict=True))
    scores = score(tokens_by_id, scorer.references)
    tokens = [tokens_by_id[image_id] for image_id in scorer.references.rows]
    card = Card(
        name,
        values=scores.values | dict.fromkeys(scores.not_computed),
        not_computed=dict(scores.not_computed),
        per_image=dict(scores.per_image),
        image_ids=scores.image_ids,
        statistics=_statistics(scores),
        resampled={},
        record={},
        scorer=scorer,
    )
    _add_java(card, [" ".join(words) for words in tokens], scorer, meteor, want_spice)
    if scorer.resamples:
        card.resampled = resample(card.statistics, scorer.resamples, scorer.seed)
    intervals = {name: interval(values) for name, values in card.resampled.items()}
    card.record = {
        "scores": {name: card.values[name] for name in NAMES if name in card.values},
        "intervals": {name: intervals[name] for name in NAMES if name in intervals},
        "not_computed": card.not_computed,
        "signature": scorer.signature(),
        "images": len(tokens),
        "statistics": describe(tokens, scorer),
    }
    return card


def _statistics(scores: Scores) -> list[Statistic]:
    names = [name for name in ("ROUGE_L", "CIDEr") if name in scores.per_image]
    means = [mean_of(name, scores.per_image[name]) for name in names]
    return [Statistic(BLEU, scores.bleu_sums, bleu), *means]


def _add_java(
    card: Card,
    texts: list[str],
    scorer: Scorer,
    meteor: Meteor | NotComputed | None,
    want_spice: bool,
) -> None:
    """Add METEOR and SPICE to a card, or the reasons why they are not computed."""
    for name, requested in (("METEOR", meteor is not None), ("SPICE", want_spice)):
        if not requested:
            card.not_computed[name] = f"not requested; pass --{name.lower()}"
            continue
        card.values[name] = None
        try:
            if name == "SPICE":
                statistic, per_image = _spice(texts, scorer)
            else:
                if isinstance(meteor, NotComputed):
                    raise meteor
                assert meteor is not None  # METEOR is requested
                statistic, per_image = _meteor(meteor, texts, scorer)
        except NotComputed as error:
            card.not_computed[name] = str(error)
            continue
        card.per_image[name] = per_image
        value = float(statistic.scores(statistic.sums.sum(0, keepdims=True))[0, 0])
        if np.isnan(value):
            card.not_computed[name] = f"{name} has no score for any image"
        else:
            card.values[name] = value
            card.statistics.append(statistic)


def _meteor(meteor: Meteor, texts: list[str], scorer: Scorer) -> tuple[Statistic, np.ndarray]:
    sums = meteor.statistics(texts, scorer.texts)
    statistic = Statistic(("METEOR",), sums, lambda sums: meteor.score(sums)[:, None])
    return statistic, meteor.score(sums)


def _spice(texts: list[str], scorer: Scorer) -> tuple[Statistic, np.ndarray]:
    per_image = spice(texts, scorer.texts)
    return mean_of("SPICE", per_image), per_image


def describe(tokens: Sequence[Sequence[str]], scorer: Scorer) -> dict[str, Any]:
    """Compute statistics of captions, given as tokens: lengths, vocabulary and shares.

    unfinished: share of captions that end with one of `scorer.unfinished`. distinct: number of
    distinct captions / number of captions. novel: share of captions that are not training captions;
    None: unknown.
    """
    captions = [tuple(words) for words in tokens]
    lengths = np.array([len(words) for words in captions])
    is_unfinished = [bool(words) and words[-1] in scorer.unfinished for words in captions]
    novel = None
    if scorer.train is not None:
        novel = float(np.mean([words not in scorer.train for words in captions]))
    return {
        "words": {
            "mean": float(lengths.mean()),
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "max": int(lengths.max()),
        },
        "unfinished": float(np.mean(is_unfinished)),
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
    """Compare two captioners on the same images with the paired bootstrap.

    Returns for each score the difference `card - other`, its interval and its p-value.
    """
    result: dict[str, Any] = {
        "name": other.name,
        "scores": other.record["scores"],
        "differences": {},
    }
    for name in NAMES:
        if name in card.resampled and name in other.resampled:
            value, other_value = card.values[name], other.values[name]
            assert value is not None and other_value is not None  # resampled scores have values
            result["differences"][name] = paired_difference(
                value, other_value, card.resampled[name], other.resampled[name]
            )
    return result


def image_lines(card: Card, captions: Mapping[int, str]) -> str:
    """The caption and the scores of each image, as JSON lines in the order of the references."""
    lines, all_nan = [], np.full(len(card.image_ids), np.nan)
    names = [name for name in NAMES if name in card.values]
    for row, image_id in enumerate(card.image_ids.tolist()):
        values = {name: float(card.per_image.get(name, all_nan)[row]) for name in names}
        scores = {name: None if np.isnan(value) else value for name, value in values.items()}
        line = {"image_id": image_id, "caption": captions[image_id], "scores": scores}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def print_cards(cards: Sequence[Card], form: str) -> None:
    """Print cards to stdout. form: one of FORMATS."""
    if form == "json":
        records = [{"name": card.name, **card.record} for card in cards]
        click.echo(json.dumps(records[0] if len(records) == 1 else records, indent=2))
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
    """The reasons for requested scores that are not computed."""
    return [
        f"{name} not computed: {reason}"
        for name, reason in card.not_computed.items()
        if name in card.values
    ]


def _names(cards: Sequence[Card]) -> list[str]:
    """The names of all requested scores."""
    return [name for name in NAMES if any(name in card.values for card in cards)]


def _table(cards: Sequence[Card]) -> list[str]:
    """Format cards as the lines of a table, then describe each card in some lines."""
    names = _names(cards)
    rows: list[tuple[str, list[str]]] = []
    for card in cards:
        intervals = card.record["intervals"]
        rows.append((card.name, [_number(card.values.get(name)) for name in names]))
        if intervals:
            for end, word in enumerate(("from", "to")):
                bounds = [intervals.get(name, (None, None))[end] for name in names]
                rows.append((f"  95 % {word}", list(map(_number, bounds))))
        if other := card.record.get("against"):
            rows += _comparison_rows(card, other, names)
    label_width = max(len(label) for label, _ in rows)
    widths = [max(len(name), 7) for name in names]
    lines = []
    for label, cells in [("", names), *rows]:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
        lines.append(f"{label:<{label_width}}  " + "  ".join(padded))
    for card in cards:
        statistics = card.record["statistics"]
        unfinished, novel = statistics["unfinished"], statistics["novel"]
        parts = [
            f"{card.record['images']:,} captions of {statistics['words']['mean']:.1f} words",
            f"{statistics['vocabulary']:,} different words",
            f"{statistics['distinct']:.1%} distinct",
            *([] if novel is None else [f"{novel:.1%} novel"]),
            f"{unfinished:.2%} end in an article, preposition or conjunction",
            *([f"{statistics['empty']} empty"] if statistics["empty"] else []),
        ]
        lines.append(f"{card.name}: {', '.join(parts)}")
        lines += _missing(card)
        lines.append(f"signature {card.record['signature']}")
    return lines


def _comparison_rows(
    card: Card, other: Mapping[str, Any], names: Sequence[str]
) -> list[tuple[str, list[str]]]:
    """The rows of a table that compare a card with another captioner, from `compare`."""
    differences = [other["differences"].get(name) for name in names]
    values = [f"{item['value']:+.4f}" if item else "-" for item in differences]
    low, high = (
        [f"{item['interval'][end]:+.4f}" if item else "-" for item in differences] for end in (0, 1)
    )
    p_values = [format_p(item["p"], card.scorer.resamples) if item else "-" for item in differences]
    return [
        (f"against {other['name']}", [_number(other["scores"].get(name)) for name in names]),
        ("  difference", values),
        ("  95 % from", low),
        ("  95 % to", high),
        ("  p, paired", p_values),
    ]


def print_examples(card: Card, captions: Mapping[int, str], count: int, to_stderr: bool) -> None:
    """Print the `count` captions with the lowest and the highest CIDEr, with their references.

    If CIDEr is not computed, ROUGE-L is used.
    """
    name = "CIDEr" if "CIDEr" in card.per_image else "ROUGE_L"
    order = np.argsort(card.per_image[name], kind="stable")
    ids, texts = card.image_ids.tolist(), card.scorer.texts
    for label, rows in (("worst", order[:count]), ("best", order[::-1][:count])):
        for row in rows.tolist():
            image_id, value = ids[row], card.per_image[name][row]
            line = f"{label}  image {image_id}  {name} {value:.3f}  {captions[image_id]}"
            click.echo(line, err=to_stderr)
            for text in texts[row]:
                click.echo(f"         {text}", err=to_stderr)


def format_p(p: float, resamples: int) -> str:
    """Format a p-value. The smallest possible one, 1 / (resamples + 1), is an upper bound."""
    smallest = 1 / (resamples + 1)
    return f"<{max(p, 1e-4):.4f}" if p <= smallest else f"{p:.4f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def signature_line(parts: Mapping[str, object]) -> str:
    """Format settings that influence scores, and the version, as one line."""
    try:
        version = metadata.version("onceover")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return "|".join(f"{name}:{value}" for name, value in {**parts, "version": version}.items())
