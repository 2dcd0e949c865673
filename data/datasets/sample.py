"""The embedded sample: drawn scenes with true captions, laid out on disk as COCO 2014 is.

A scene is two or three coloured shapes on a soft background; a caption names two of them, each with
its size, colour and shape, and one relation between them. Scenes are known, so a caption can be
judged (`is_true`), and nothing but looking gets one right. Scene i depends on (seed, i) alone: a
larger sample begins with the smaller one's scenes.

    ROOT/train2014/COCO_train2014_%012d.jpg           Karpathy's train
    ROOT/val2014/COCO_val2014_%012d.jpg               Karpathy's restval, val and test, as in COCO
    ROOT/annotations/captions_{train,val}2014.json    COCO's captions
    ROOT/dataset_sample.json                          Karpathy's split file
    ROOT/scenes.json                                  the truth: [{id, width, height, things:
                                                      [{size, ...}]}]
    ROOT/sample.json                                  the record: {format, count, seed}

Lengths are pixels of the picture, x to the right and y down, from its upper left corner.
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
# between two centres: wider than two large shapes, and than a cell of a 5x5 feature grid
NEAREST = 0.28 * WIDTH
TRUE_BY = 10  # pixels by which centres must differ for a relation to be true
CLEAR = 1.3  # a caption's axis is that much longer than the other, so none is borderline

SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
RADII = {"small": (14.0, 17.0), "large": (25.0, 30.0)}
COLOURS = {  # RGB; a drawn colour lies within SHADE of it in each channel
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
    """Corners [N,2] of a regular polygon, or of a star with an `inner` radius, the first corner
    pointing up.
    """
    radii = np.tile([outer, inner], count) if inner else np.full(count, outer)
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii) - np.pi / 2
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _cross(long: float, thin: float) -> np.ndarray:
    """Corners [12,2] of an upright cross: arms `long` from the centre, 2 `thin` wide."""
    arm = np.array([(-thin, -thin), (-thin, -long), (thin, -long)])
    turns = [
        np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]])
        for t in np.arange(4) * np.pi / 2
    ]
    return np.concatenate([arm @ turn for turn in turns])


# corners for radius 1, none further out than REACH; areas are alike, so that size is not shape
SHAPES = {
    "circle": _spokes(48, 1.0),
    "square": np.array([(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]),
    "triangle": _spokes(3, 1.18),
    "star": _spokes(5, 1.18, 0.52),
    "cross": _cross(1.08, 0.38),
}
REACH = 1.19
TILT = 12.0  # degrees a shape may lean either way

RELATIONS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "under", "lower than"),
}
_NOUN_PHRASES = (  # the commonest wording twice
    "{size} {colour} {shape}",
    "{size} {colour} {shape}",
    "{colour} {size} {shape}",
    "{size} {shape} in {colour}",
    "{colour} {shape} of {size} size",
)
# {a} stands in {relation} to {b}. Drawn captions say where before what: within minutes a decoder
# learns to name what stands somewhere, but not yet to say where a thing that it has named stands
# (docs/log.md).
_SENTENCES = (
    "{relation} {b} is {a}",
    "{relation} {b}, there is {a}",
    "{relation} {b} sits {a}",
    "{relation} {b} one can see {a}",
    "in this picture, {relation} {b} is {a}",
    "looking {relation} {b}, one sees {a}",
)
_UNDERSTOOD = (
    *_SENTENCES,
    "{a} is {relation} {b}",
    "{a} {relation} {b}",
    "{b} with {a} {relation} it",
)


@dataclass(frozen=True)
class Thing:
    """One shape: its words, and its centre and radius in pixels."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def words(self) -> tuple[str, str, str]:
        return self.size, self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """What a picture of `width` x `height` pixels shows; no two things share size, colour and
    shape.
    """

    things: tuple[Thing, ...]
    width: int = WIDTH
    height: int = HEIGHT


def scene_rng(seed: int, index: int) -> np.random.Generator:
    """The one source of chance of scene `index` (from 0): make, draw, caption, in that order."""
    return np.random.default_rng([seed, index])


def _pick(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]


# --- the scene and its picture
# ------------------------------------------------------------------------------------


def make_scene(rng: np.random.Generator) -> Scene:
    """Two or three things, whole inside the picture, apart, each pair with a clear relation."""
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
        and np.hypot(a.x - b.x, a.y - b.y) >= NEAREST
        and _clear_relation(a, b) is not None
    )


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture, RGB: a gradient, the things antialiased in a shade of their colour, light noise
    over all.
    """
    # a colour a corner, near grey
    tones = rng.uniform(130, 240, (2, 2, 1)) + rng.uniform(-14, 14, (2, 2, 3))
    picture = Image.fromarray(tones.astype(np.uint8)).resize(
        (scene.width, scene.height), Image.Resampling.BICUBIC
    )
    for thing in scene.things:
        shade = np.clip(
            np.array(COLOURS[thing.colour]) + rng.integers(-SHADE, SHADE + 1, 3), 0, 255
        )
        _draw_thing(picture, thing, tuple(shade.tolist()), np.deg2rad(rng.uniform(-TILT, TILT)))
    grain = rng.integers(-4, 5, (scene.height, scene.width, 1), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))


def _draw_thing(
    picture: Image.Image, thing: Thing, shade: tuple[int, int, int], tilt: float, finer: int = 4
) -> None:
    """Draw on a mask `finer` times as fine, of the thing's own neighbourhood only, then shrink:
    smooth edges.
    """
    left, upper = int(thing.x - REACH * thing.radius) - 1, int(thing.y - REACH * thing.radius) - 1
    side = int(2 * REACH * thing.radius) + 4
    turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    corners = (
        SHAPES[thing.shape] @ turn * thing.radius + (thing.x - left, thing.y - upper)
    ) * finer
    mask = Image.new("L", (side * finer, side * finer))
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    picture.paste(shade, (left, upper), mask.reduce(finer))


def encode_jpeg(picture: Image.Image) -> bytes:
    """The file's bytes, as the sample stores them."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# --- captions and their truth
# -------------------------------------------------------------------------------------


def caption_scene(scene: Scene, rng: np.random.Generator, n: int = 5) -> list[str]:
    """`n` different true captions, each of two things in either order."""
    pairs = [
        (a, b, _clear_relation(a, b))
        for a, b in permutations(scene.things, 2)
        if _clear_relation(a, b)
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


def _clear_relation(a: Thing, b: Thing) -> str | None:
    """Where a lies seen from b, along the longer axis; None if neither axis is clearly the
    longer.
    """
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= CLEAR * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= CLEAR * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _stands(a: Thing, relation: str, b: Thing) -> bool:
    ahead = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return ahead[relation] >= TRUE_BY


def _either(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_MEANING = {word: ("size", size) for size, words in SIZES.items() for word in words}
_MEANING |= {colour: ("colour", colour) for colour in COLOURS} | {
    shape: ("shape", shape) for shape in SHAPES
}
_RELATION_OF = {phrase: relation for relation, phrases in RELATIONS.items() for phrase in phrases}
_THREE = " (?:and |in |of )?".join([_either(_MEANING)] * 3) + "(?: size)?"
_GRAMMAR = [
    re.compile(sentence.format(a=f"(?:a|an|the) (?P<a>{_THREE})", b=f"(?:a|an|the) (?P<b>{_THREE})",
                               relation=f"(?P<relation>{_either(_RELATION_OF)})").replace(",", ""))
    for sentence in _UNDERSTOOD
]  # fmt: skip


def is_true(caption: str, scene: Scene) -> bool:
    """Whether `caption` names two things of `scene`, each with size, colour and shape, and one
    relation, all true.

    Case and punctuation do not matter. Anything the sample's grammar does not say (an attribute
    short or twice, a third thing, other words) is not true.
    """
    words = " ".join(re.findall(r"[a-z]+", caption.lower()))
    match = next(filter(None, (pattern.fullmatch(words) for pattern in _GRAMMAR)), None)
    if match is None:
        return False
    a, b = _named(match["a"], scene), _named(match["b"], scene)
    return a is not None and b is not None and _stands(a, _RELATION_OF[match["relation"]], b)


def _named(phrase: str, scene: Scene) -> Thing | None:
    """The thing a noun phrase names: it must give size, colour and shape, once each, in any
    order.
    """
    said = [_MEANING[word] for word in phrase.split() if word in _MEANING]
    wanted = dict(said)
    if len(wanted) < 3:  # the grammar lets three words through: fewer kinds, and one was said twice
        return None
    words = (wanted["size"], wanted["colour"], wanted["shape"])
    return next((thing for thing in scene.things if thing.words == words), None)


# --- on disk
# --------------------------------------------------------------------------------------------------


def draw_sample(root: Path, count: int = 2500, seed: int = 0) -> None:
    """Write a sample of `count` scenes to `root`, which must not exist; it appears whole or not at
    all.
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
    """Draw the sample unless `root` already holds it; anything else there is an error."""
    root = Path(root)
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        draw_sample(root, count, seed)
        return
    wanted = {"format": FORMAT, "count": count, "seed": seed}
    try:
        found = json.loads((root / "sample.json").read_text())
        there = ", ".join(f"{name} {found[name]}" for name in wanted)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{root} exists and is not a drawn sample; pass another folder for the sample"
        ) from None
    if any(found[name] != value for name, value in wanted.items()):
        asked = ", ".join(f"{name} {value}" for name, value in wanted.items())
        raise DataError(
            f"{root} holds a sample of {there}, not of {asked}; pass another folder, or remove "
            "this one"
        )


def load_scenes(root: Path) -> dict[int, Scene]:
    """The truth of a drawn sample, by image id."""
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
    """Karpathy's split of scene `index`: of every 40, 31 train, 1 restval, 4 val, 4 test."""
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
        about: dict[str, Any] = {
            "description": f"Onceover's drawn scenes, {count} from seed {seed}",
            "url": "",
            "version": "1.0",
        }
        about |= {"year": 2014, "contributor": "Onceover", "date_created": "2014/01/01"}
        licenses = [{"id": 1, "name": "No known copyright restrictions", "url": ""}]
        _write_json(
            root / f"annotations/captions_{folder}.json",
            {"info": about, "licenses": licenses, **part},
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
    ids = _sentence_ids(index, captions)  # those of COCO's annotations, as Karpathy has them
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
