"""The embedded sample: drawn scenes with true captions, in the file layout of COCO 2014.

A scene is two or three coloured shapes on a smooth background. A caption names two shapes with
their size, colour and form, and one relation between them. The content of each scene is known, so
that `is_true` can verify a caption. Only a model that uses the image can generate true captions.
Scene i depends only on (seed, i), so that a larger sample begins with the scenes of a smaller one.

    ROOT/train2014/COCO_train2014_%012d.jpg           Karpathy's train
    ROOT/val2014/COCO_val2014_%012d.jpg               Karpathy's restval, val and test, as in COCO
    ROOT/annotations/captions_{train,val}2014.json    captions in COCO's format
    ROOT/dataset_sample.json                          split file in Karpathy's format
    ROOT/scenes.json                                  [{id, width, height, things: [{size, ...}]}]
    ROOT/sample.json                                  {format, count, seed}

Lengths are in pixels. x points right and y points down, from the upper left corner.
"""

import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data import DataError

FORMAT = 2
WIDTH, HEIGHT = 256, 192
# Minimum distance of two centres: more than two large shapes or a cell of a 5x5 feature grid.
MIN_DISTANCE = 0.28 * WIDTH
MIN_OFFSET = 10  # a relation is true if the centres differ by at least this many pixels
CLEAR_RATIO = 1.3  # minimum ratio of the two axes in a caption, so that no relation is ambiguous

SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
RADII = {"small": (14.0, 17.0), "large": (25.0, 30.0)}
COLOURS = {  # RGB; a drawn colour differs by at most SHADE in each channel
    "red": (214, 32, 38),
    "orange": (244, 134, 22),
    "yellow": (246, 218, 40),
    "green": (36, 148, 62),
    "blue": (38, 84, 208),
    "purple": (138, 48, 168),
    "black": (28, 28, 30),
}
SHADE = 12


def _spokes(count: int, outer: float, inner: float | None = None) -> np.ndarray:
    """Corners [N,2] of a regular polygon, or of a star if `inner` is given. The first points up."""
    radii = np.tile([outer, inner], count) if inner else np.full(count, outer)
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii) - np.pi / 2
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _cross(long: float, thin: float) -> np.ndarray:
    """Corners [12,2] of an upright cross whose arms have length `long` and width 2 * `thin`."""
    arm = np.array([(-thin, -thin), (-thin, -long), (thin, -long)])
    turns = [
        np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]])
        for t in np.arange(4) * np.pi / 2
    ]
    return np.concatenate([arm @ turn for turn in turns])


# Corners for radius 1, within the distance REACH. All areas are similar, so that size and shape are
# independent.
SHAPES = {
    "circle": _spokes(48, 1.0),
    "square": np.array([(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]),
    "triangle": _spokes(3, 1.18),
    "star": _spokes(5, 1.18, 0.52),
    "cross": _cross(1.08, 0.38),
}
REACH = 1.19
TILT = 12.0  # maximum rotation of a shape in degrees, in both directions

RELATIONS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "under", "lower than"),
}
_NOUN_PHRASES = (  # the most frequent wording occurs twice
    "{size} {colour} {shape}",
    "{size} {colour} {shape}",
    "{colour} {size} {shape}",
    "{size} {shape} in {colour}",
    "{colour} {shape} of {size} size",
)
# The relation of {a} to {b} is {relation}. Generated captions name the position before the object:
# within minutes a decoder learns to name the object at a position, but not yet the position of an
# object that it has named (docs/log.md).
_SENTENCES = (
    "{relation} {b} is {a}",
    "{relation} {b}, there is {a}",
    "{relation} {b} sits {a}",
    "{relation} {b} one can see {a}",
    "in this picture, {relation} {b} is {a}",
    "looking {relation} {b}, one sees {a}",
)
_PARSED_SENTENCES = (
    *_SENTENCES,
    "{a} is {relation} {b}",
    "{a} {relation} {b}",
    "{b} with {a} {relation} it",
)


@dataclass(frozen=True)
class Thing:
    """One shape: its attributes in words, and its centre and radius in pixels."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def words(self) -> tuple[str, str, str]:
        """Size, colour and shape."""
        return self.size, self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """The content of a picture. No two things have the same size, colour and shape."""

    things: tuple[Thing, ...]
    width: int = WIDTH
    height: int = HEIGHT


def scene_rng(seed: int, index: int) -> np.random.Generator:
    """Return the random generator of scene `index` (from 0).

    Use it for `make_scene`, `draw_scene` and `caption_scene`, in this order.
    """
    return np.random.default_rng([seed, index])


def _pick(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]


# -------------------------------------------------------------------------------- scene and picture


def make_scene(rng: np.random.Generator) -> Scene:
    """Draw two or three separate things inside the picture. Each pair has a clear relation."""
    while True:
        things = tuple(_make_thing(rng) for _ in range(_pick(rng, (2, 3))))
        if all(_apart(a, b) for a, b in combinations(things, 2)):
            return Scene(things)


def _make_thing(rng: np.random.Generator) -> Thing:
    size, colour, shape = (_pick(rng, tuple(names)) for names in (SIZES, COLOURS, SHAPES))
    radius, x, y = rng.random(3)
    radius = RADII[size][0] + radius * (RADII[size][1] - RADII[size][0])
    border = REACH * radius + 2
    x, y = border + x * (WIDTH - 2 * border), border + y * (HEIGHT - 2 * border)
    return Thing(size, colour, shape, round(x, 2), round(y, 2), round(radius, 2))


def _apart(a: Thing, b: Thing) -> bool:
    return (
        a.words != b.words
        and np.hypot(a.x - b.x, a.y - b.y) >= MIN_DISTANCE
        and clear_relation(a, b) is not None
    )


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Return the RGB picture: a gradient, antialiased things in shades of their colours, noise."""
    return draw_with_boxes(scene, rng)[0]


def draw_with_boxes(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """Return the picture of `draw_scene`, and the boxes of its things: x0 y0 x1 y1, [n,4]."""
    # one colour per corner, close to grey
    tones = rng.uniform(130, 240, (2, 2, 1)) + rng.uniform(-14, 14, (2, 2, 3))
    picture = Image.fromarray(tones.astype(np.uint8)).resize(
        (scene.width, scene.height), Image.Resampling.BICUBIC
    )
    boxes = []
    for thing in scene.things:
        shade = np.clip(
            np.array(COLOURS[thing.colour]) + rng.integers(-SHADE, SHADE + 1, 3), 0, 255
        )
        tilt = np.deg2rad(rng.uniform(-TILT, TILT))
        boxes.append(_draw_thing(picture, thing, tuple(shade.tolist()), tilt))
    grain = rng.integers(-4, 5, (scene.height, scene.width, 1), dtype=np.int16)
    pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), np.array(boxes).reshape(-1, 4)


def _draw_thing(
    picture: Image.Image, thing: Thing, shade: tuple[int, int, int], tilt: float, scale: int = 4
) -> np.ndarray:
    """Draw a thing with smooth edges: on a mask of `scale` times the resolution, then reduced.

    Returns its box, x0 y0 x1 y1.
    """
    left, upper = int(thing.x - REACH * thing.radius) - 1, int(thing.y - REACH * thing.radius) - 1
    side = int(2 * REACH * thing.radius) + 4
    turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    corners = (
        SHAPES[thing.shape] @ turn * thing.radius + (thing.x - left, thing.y - upper)
    ) * scale
    mask = Image.new("L", (side * scale, side * scale))
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    picture.paste(shade, (left, upper), mask.reduce(scale))
    return np.concatenate([corners.min(0), corners.max(0)]) / scale + (left, upper) * 2


def encode_jpeg(picture: Image.Image) -> bytes:
    """Return the bytes of the JPEG file that the sample contains."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------- captions


def caption_scene(scene: Scene, rng: np.random.Generator, n: int = 5) -> list[str]:
    """Return `n` different true captions, each about two things in either order."""
    pairs = [
        (a, b, clear_relation(a, b))
        for a, b in permutations(scene.things, 2)
        if clear_relation(a, b)
    ]
    captions: dict[str, None] = {}
    while len(captions) < n:
        a, b, relation = _pick(rng, pairs)
        sentence = _pick(rng, _SENTENCES)
        words = sentence.format(
            a=_phrase(a, rng), b=_phrase(b, rng), relation=_pick(rng, RELATIONS[relation])
        )
        captions[words[0].upper() + words[1:] + "."] = None
    return list(captions)


def _phrase(thing: Thing, rng: np.random.Generator) -> str:
    words = _pick(rng, _NOUN_PHRASES).format(
        size=_pick(rng, SIZES[thing.size]), colour=thing.colour, shape=thing.shape
    )
    return ("an " if words[0] in "aeiou" else "a ") + words


def clear_relation(a: Thing, b: Thing) -> str | None:
    """Return the relation of a to b along the longer axis; None if the axes are too similar."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= CLEAR_RATIO * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= CLEAR_RATIO * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def holds(a: Thing, relation: str, b: Thing) -> bool:
    """Return whether a is on this side of b (a key of RELATIONS), by at least MIN_OFFSET pixels."""
    ahead = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return ahead[relation] >= MIN_OFFSET


def _either(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_MEANING = {word: ("size", size) for size, words in SIZES.items() for word in words}
_MEANING |= {colour: ("colour", colour) for colour in COLOURS} | {
    shape: ("shape", shape) for shape in SHAPES
}
_RELATION_OF = {phrase: relation for relation, phrases in RELATIONS.items() for phrase in phrases}
_ATTRIBUTES = " (?:and |in |of )?".join([_either(_MEANING)] * 3) + "(?: size)?"
_GROUPS = {
    "a": f"(?:a|an|the) (?P<a>{_ATTRIBUTES})",
    "b": f"(?:a|an|the) (?P<b>{_ATTRIBUTES})",
    "relation": f"(?P<relation>{_either(_RELATION_OF)})",
}
_GRAMMAR = [
    re.compile(sentence.format(**_GROUPS).replace(",", "")) for sentence in _PARSED_SENTENCES
]


def is_true(caption: str, scene: Scene) -> bool:
    """Return whether a caption is true of a scene.

    A true caption names two things of the scene, each with size, colour and shape, and a true
    relation. Case and punctuation are ignored. A caption outside the sample's grammar is not true:
    a missing or repeated attribute, a third thing, other words.
    """
    words = " ".join(re.findall(r"[a-z]+", caption.lower()))
    match = next(filter(None, (pattern.fullmatch(words) for pattern in _GRAMMAR)), None)
    if match is None:
        return False
    a, b = _find_thing(match["a"], scene), _find_thing(match["b"], scene)
    return a is not None and b is not None and holds(a, _RELATION_OF[match["relation"]], b)


def _find_thing(phrase: str, scene: Scene) -> Thing | None:
    """Return the thing of a noun phrase; None unless it names size, colour and shape once each."""
    attributes = [_MEANING[word] for word in phrase.split() if word in _MEANING]
    by_kind = dict(attributes)
    if len(by_kind) < 3:  # the grammar accepts three words, also if one attribute is repeated
        return None
    words = (by_kind["size"], by_kind["colour"], by_kind["shape"])
    return next((thing for thing in scene.things if thing.words == words), None)


# -------------------------------------------------------------------------------------------- files


def draw_sample(root: Path, count: int = 2500, seed: int = 0) -> None:
    """Write a sample of `count` scenes to `root`, atomically.

    Raises DataError if `root` is not empty, or if `count` is not in 10..100,000.
    """
    if not 10 <= count <= 100_000:
        raise DataError(f"a sample has 10 to 100,000 scenes, not {count:,}")
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"{root} exists; pass another folder for the sample, or remove this one")
    building = root.with_name(f".{root.name}.{os.getpid()}.part")
    try:
        _write_sample(building, count, seed)
        building.rename(root)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def ensure_sample(root: Path, count: int = 2500, seed: int = 0) -> None:
    """Draw the sample unless `root` already contains it.

    Raises DataError if `root` contains anything else.
    """
    root = Path(root)
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        draw_sample(root, count, seed)
        return
    expected = {"format": FORMAT, "count": count, "seed": seed}
    try:
        record = json.loads((root / "sample.json").read_text())
        actual_values = ", ".join(f"{name} {record[name]}" for name in expected)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{root} exists and is not a drawn sample; pass another folder for the sample"
        ) from None
    if any(record[name] != value for name, value in expected.items()):
        expected_values = ", ".join(f"{name} {value}" for name, value in expected.items())
        raise DataError(
            f"{root} contains a sample of {actual_values}, not of {expected_values}; pass another "
            "folder, or remove this one"
        )


def load_scenes(root: Path) -> dict[int, Scene]:
    """Return the scenes of a drawn sample by image id. Raises DataError if there is no sample."""
    path = Path(root) / "scenes.json"
    try:
        records = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {root} is not a drawn sample") from None
    return {
        record["id"]: Scene(
            tuple(Thing(**thing) for thing in record["things"]), record["width"], record["height"]
        )
        for record in records
    }


def _split_of(index: int) -> str:
    """Karpathy's split of scene `index`: of 40 scenes 31 train, 1 restval, 4 val and 4 test."""
    return {8: "val", 9: "test"}.get(index % 10, "restval" if index % 40 == 7 else "train")


def _write_sample(root: Path, count: int, seed: int) -> None:
    coco: dict[str, dict[str, list[Any]]] = {
        folder: {"images": [], "annotations": []} for folder in ("train2014", "val2014")
    }
    karpathy, truth = [], []
    for folder in (*coco, "annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = scene_rng(seed, index)
        scene = make_scene(rng)
        jpeg = encode_jpeg(draw_scene(scene, rng))
        captions = caption_scene(scene, rng)
        split = _split_of(index)
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{index + 1:012d}.jpg"
        (root / folder / name).write_bytes(jpeg)
        _add_coco(coco[folder], index, name, scene, captions)
        karpathy.append(_karpathy_image(index, folder, name, split, captions))
        truth.append({"id": index + 1, **asdict(scene)})
    for folder, part in coco.items():
        info: dict[str, Any] = {
            "description": f"Onceover's drawn scenes, {count} from seed {seed}",
            "url": "",
            "version": "1.0",
        }
        info |= {"year": 2014, "contributor": "Onceover", "date_created": "2014/01/01"}
        licenses = [{"id": 1, "name": "No known copyright restrictions", "url": ""}]
        _write_json(
            root / f"annotations/captions_{folder}.json",
            {"info": info, "licenses": licenses, **part},
        )
    _write_json(root / "dataset_sample.json", {"images": karpathy, "dataset": "sample"})
    _write_json(root / "scenes.json", truth)
    _write_json(root / "sample.json", {"format": FORMAT, "count": count, "seed": seed})


def _write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content) + "\n")


def _sentence_ids(index: int, captions: list[str]) -> range:
    return range(len(captions) * index + 1, len(captions) * (index + 1) + 1)


def _add_coco(part: dict, index: int, name: str, scene: Scene, captions: list[str]) -> None:
    image = {
        "id": index + 1,
        "file_name": name,
        "width": scene.width,
        "height": scene.height,
        "license": 1,
    }
    part["images"].append(
        image | {"coco_url": "", "flickr_url": "", "date_captured": "2014-01-01 00:00:00"}
    )
    for sentence, caption in zip(_sentence_ids(index, captions), captions, strict=True):
        part["annotations"].append({"id": sentence, "image_id": index + 1, "caption": caption})


def _karpathy_image(index: int, folder: str, name: str, split: str, captions: list[str]) -> dict:
    ids = _sentence_ids(index, captions)  # the ids of the COCO annotations, as in Karpathy's files
    sentences = [
        {"raw": raw, "tokens": re.findall(r"\w+", raw.lower()), "imgid": index, "sentid": sentence}
        for sentence, raw in zip(ids, captions, strict=True)
    ]
    image = {
        "filepath": folder,
        "filename": name,
        "imgid": index,
        "cocoid": index + 1,
        "split": split,
    }
    return image | {"sentids": list(ids), "sentences": sentences}
