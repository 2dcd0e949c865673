"""Photographs with a text and a label, and the reader of MVSA-Single and MVSA-Multiple.

    ROOT/data/ID.jpg, ROOT/data/ID.txt      a photograph and its tweet
    ROOT/labelResultAll.txt                 a header, then lines `ID<TAB>text,image`: the labels of
                                            the text and of the photograph, positive, neutral or
                                            negative. MVSA-Multiple has three pairs per line, by
                                            three people (Niu et al. 2016)

The label of a pair follows the rule of MultiSentiNet (Xu and Mao 2017), which published figures
use. Of three labels of a text, and of a photograph, the one that at least two people gave counts;
without one the pair is left out. Equal labels of text and photograph are the label of the pair. If
one of them is neutral, the other is the label. A pair of positive and negative is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data import DataError
from data.sources import Image, Source, read_text

RULE = "MultiSentiNet"
LABELS = ("positive", "neutral", "negative")


@dataclass(frozen=True)
class Options:
    """Options of --dataset mvsa."""

    encoding: str = field(
        default="utf-8", metadata={"help": "encoding of the texts, such as gb18030"}
    )


class LabelledText(NamedTuple):
    """A text about an image, with its label. Several texts may be about one image.

    id: its number, from 1. label: None if it is unknown.
    """

    id: int
    image_id: int
    text: str
    label: str | None


@dataclass(frozen=True)
class LabelledSource(Source):
    """Photographs with labelled texts.

    label_rule: how the labels of several people became one; "" if there is one.
    """

    texts: tuple[LabelledText, ...] = field(default=(), repr=False)
    label_rule: str = ""


def combined_label(text_labels: Sequence[str], image_labels: Sequence[str]) -> str | None:
    """Return the label of a pair by the rule of MultiSentiNet; None: the pair is left out."""
    majority = []
    for labels in (text_labels, image_labels):
        label, count = Counter(labels).most_common(1)[0]
        if count * 2 <= len(labels):
            return None
        majority.append(label)
    text, image = majority
    if text == image or image == "neutral":
        return text
    return image if text == "neutral" else None


def read(
    dataset: str,
    root: Path | None,
    annotations: Path | None,
    images: Path | None,
    encoding: str = "utf-8",
) -> LabelledSource:
    """Read MVSA. The id of an image is the number of its file.

    Raises DataError for a line of another form, an unknown label, an id that occurs twice, and
    texts without a file (with their number and the first five).
    """
    assert root is not None or images is not None  # open_source refuses a dataset without folders
    base = root or images
    assert base is not None
    file = annotations or base / "labelResultAll.txt"
    if not file.exists():
        raise DataError(f"{file} does not exist; --root must be the folder MVSA_Single or MVSA")
    labels: dict[int, str | None] = {}
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        is_header = number == 1 and not line[:1].isdecimal()
        if line.strip() and not is_header:
            id_, label = _read_line(line, f"{file}, line {number}")
            if id_ in labels:
                raise DataError(f"{file}, line {number}: {id_} occurs twice")
            labels[id_] = label
    kept = {id_: label for id_, label in labels.items() if label is not None}
    if not kept:
        raise DataError(f"{file}: none of {len(labels):,} pairs has a label by the rule of {RULE}")
    without = [id_ for id_ in kept if not (base / f"data/{id_}.txt").exists()]
    if without:
        first = ", ".join(map(str, without[:5]))
        raise DataError(f"{len(without):,} texts are not in {base / 'data'}, such as {first}")
    photographs, missing, texts = [], [], []
    for number, (id_, label) in enumerate(kept.items(), start=1):
        name = f"data/{id_}.jpg"
        photographs.append(Image(id_, name, base / name, "train", ()))
        if not photographs[-1].path.exists():
            missing.append(photographs[-1])
        text = read_text(base / f"data/{id_}.txt", encoding)
        texts.append(LabelledText(number, id_, " ".join(text.split()), label))
    notes = (
        f"{len(kept):,} of {len(labels):,} pairs have a label by the rule of {RULE}; the others "
        "are left out",
    )
    return LabelledSource(
        dataset, base, tuple(photographs), tuple(missing), file, notes, tuple(texts), RULE
    )


def _read_line(line: str, where: str) -> tuple[int, str | None]:
    """Return the id of a pair and its label; None: the pair is left out."""
    id_, *pairs = line.split()
    split = [pair.split(",") for pair in pairs]
    if not id_.isascii() or not id_.isdecimal() or len(id_) > 18 or len(pairs) not in (1, 3):
        raise DataError(f"{where}: {line[:60]!r} is not an id with one or three pairs of labels")
    for pair in split:
        if len(pair) != 2 or not {*pair} <= {*LABELS}:
            raise DataError(
                f"{where}: {','.join(pair)[:60]!r} is not a pair of {', '.join(LABELS)}"
            )
    return int(id_), combined_label([pair[0] for pair in split], [pair[1] for pair in split])
