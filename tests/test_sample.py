"""The drawn sample: captions are true, the judge is strict, files are COCO's, a seed gives the same
bytes.
"""

import hashlib
import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from data import DataError
from data.datasets.sample import (
    COLOURS,
    HEIGHT,
    MIN_DISTANCE,
    MIN_OFFSET,
    REACH,
    RELATIONS,
    SHAPES,
    SIZES,
    WIDTH,
    Scene,
    Thing,
    caption_scene,
    draw_sample,
    draw_scene,
    ensure_sample,
    is_true,
    load_scenes,
    make_scene,
    scene_rng,
)

COUNT, SEED = 80, 3
SCENE = Scene(
    (
        Thing("small", "red", "circle", 60.0, 60.0, 15.0),
        Thing("large", "blue", "square", 180.0, 80.0, 28.0),
        Thing("small", "green", "star", 70.0, 150.0, 15.0),
    )
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "sample"
    draw_sample(root, COUNT, SEED)
    return root


@pytest.fixture(scope="module")
def captioned() -> list[tuple[Scene, list[str]]]:
    made = []
    for index in range(600):
        rng = scene_rng(1, index)
        scene = make_scene(rng)
        made.append((scene, caption_scene(scene, rng)))
    return made


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def test_things_lie_whole_inside_the_picture_and_apart(captioned):
    for scene, _ in captioned:
        assert len(scene.things) in (2, 3)
        assert len({thing.words for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            reach = REACH * thing.radius
            assert reach < thing.x < WIDTH - reach and reach < thing.y < HEIGHT - reach
        for a, b in combinations(scene.things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) >= max(
                MIN_DISTANCE, REACH * (a.radius + b.radius)
            )


def test_no_shape_reaches_further_than_said():
    assert all(np.hypot(*corners.T).max() <= REACH for corners in SHAPES.values())


def test_the_picture_shows_each_thing_in_its_colour_at_its_centre():
    for index in range(20):
        rng = scene_rng(2, index)
        scene = make_scene(rng)
        pixels = np.asarray(draw_scene(scene, rng)).astype(float)
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        for thing in scene.things:
            x, y = round(thing.x), round(thing.y)
            seen = pixels[y - 3 : y + 4, x - 3 : x + 4].mean((0, 1))
            nearest = min(COLOURS, key=lambda colour: np.abs(seen - COLOURS[colour]).sum())
            assert nearest == thing.colour


def test_every_drawn_caption_is_true_with_and_without_case_and_punctuation(captioned):
    for scene, captions in captioned:
        assert len(set(captions)) == 5
        for caption in captions:
            assert is_true(caption, scene), caption
            assert is_true(" ".join(re.findall(r"\w+", caption.lower())), scene), caption


def test_captions_vary_in_wording_and_use_every_word(captioned):
    text = " ".join(caption.lower() for _, captions in captioned for caption in captions)
    words = {
        word for group in (SIZES, RELATIONS) for synonyms in group.values() for word in synonyms
    }
    assert all(re.search(rf"\b{word}\b", text) for word in words | set(COLOURS) | set(SHAPES))
    sentences = [caption for _, captions in captioned for caption in captions]
    assert len(set(sentences)) > 0.98 * len(sentences)


def test_changing_a_single_attribute_makes_a_caption_false_unless_the_scene_has_that_too():
    swaps = [[word for words in SIZES.values() for word in words], list(COLOURS), list(SHAPES)]
    meaning = {word: size for size, words in SIZES.items() for word in words}
    changed = 0
    for index in range(60):
        rng = scene_rng(4, index)
        scene = make_scene(rng)
        scene = Scene(scene.things[:2])  # with two things no other can step in for the altered one
        for caption in caption_scene(scene, rng):
            for words in swaps:
                for found in re.finditer(rf"\b({'|'.join(words)})\b", caption.lower()):
                    for other in words:
                        if meaning.get(other, other) != meaning.get(found[0], found[0]):
                            altered = (
                                caption.lower()[: found.start()]
                                + other
                                + caption.lower()[found.end() :]
                            )
                            assert not is_true(altered, scene), altered
                            changed += 1
    assert changed > 5000


def test_changing_the_relation_makes_a_caption_false_unless_the_centres_differ_that_way_too():
    a, b = SCENE.things[:2]
    truth = {
        "left": True,
        "right": False,
        "above": True,
        "below": False,
    }  # 120 pixels left, 20 higher
    for relation, phrases in RELATIONS.items():
        for phrase in phrases:
            assert (
                is_true(f"a small red circle is {phrase} a big blue square", SCENE)
                == truth[relation]
            )
            assert (
                is_true(f"{phrase} a big blue square is a small red circle", SCENE)
                == truth[relation]
            )
            assert (
                is_true(f"a big blue square with a small red circle {phrase} it", SCENE)
                == truth[relation]
            )
    level = Scene((a, Thing(*b.words, b.x, a.y + MIN_OFFSET - 1, b.radius)))
    assert not is_true("a small red circle above a big blue square", level)


def test_words_of_a_phrase_may_stand_in_any_order():
    for phrase in (
        "tiny red circle",
        "red little circle",
        "circle in red of small size",
        "small circle in red",
    ):
        assert is_true(f"The {phrase} is to the left of a large blue square.", SCENE), phrase


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a small red circle",
        "a red circle is left of a large blue square",
        "a small circle is left of a large blue square",
        "a small red is left of a large blue square",
        "a small tiny circle is left of a large blue square",
        "a small red circle and a large blue square",
        "a small red circle is left of a small red circle",
        "a small red circle is left of it",
        "a small red circle is left a large blue square",
        "small red circle left of large blue square",
        "a small red circle is left of a large blue square and a small black star",
        "a small red circle is left of a large blue square above a small green star",
        "a small red circle is left of right of a large blue square",
        "a small red circle is not left of a large blue square",
        "a small red red circle is left of a large blue square",
        "a large red circle is left of a small blue square",
        "a small blue circle is left of a large red square",
        "<unk> small red circle is left of a large blue square",
    ],
)
def test_anything_short_doubled_or_false_is_not_true(caption):
    assert not is_true(caption, SCENE)


def test_captions_of_other_scenes_are_nearly_always_false(captioned):
    judged = [
        is_true(caption, captioned[(index + shift) % len(captioned)][0])
        for shift in (1, 7, 50)
        for index, (_, captions) in enumerate(captioned)
        for caption in captions
    ]
    assert np.mean(judged) < 0.01


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(sample, tmp_path):
    draw_sample(tmp_path / "again", COUNT, SEED)
    draw_sample(tmp_path / "other", 10, SEED + 1)
    assert digests(tmp_path / "again") == digests(sample)
    pictures = [{digest for name, digest in digests(root).items() if name.endswith(".jpg")}
                for root in (sample, tmp_path / "other")]  # fmt: skip
    assert not pictures[0] & pictures[1]


def test_a_larger_sample_begins_with_the_smaller_ones_scenes(sample, tmp_path):
    draw_sample(tmp_path / "small", 10, SEED)
    small, large = digests(tmp_path / "small"), digests(sample)
    names = [name for name in small if name.endswith(".jpg")]
    assert len(names) == 10 and all(small[name] == large[name] for name in names)
    few, many = (
        json.loads((root / "dataset_sample.json").read_text())
        for root in (tmp_path / "small", sample)
    )
    assert few["images"] == many["images"][:10]
    assert load_scenes(tmp_path / "small").items() <= load_scenes(sample).items()


def test_pycocotools_reads_the_layout_of_coco_2014(sample, capsys):
    scenes, seen = load_scenes(sample), set()
    for folder in ("train2014", "val2014"):
        coco = COCO(str(sample / "annotations" / f"captions_{folder}.json"))
        assert set(coco.dataset) == {"info", "licenses", "images", "annotations"}
        for image in coco.loadImgs(coco.getImgIds()):
            assert image["file_name"] == f"COCO_{folder}_{image['id']:012d}.jpg"
            with Image.open(sample / folder / image["file_name"]) as picture:
                assert (picture.format, picture.mode) == ("JPEG", "RGB")
                assert picture.size == (image["width"], image["height"])
            captions = coco.imgToAnns[image["id"]]
            assert len(captions) == 5
            assert all(is_true(each["caption"], scenes[image["id"]]) for each in captions)
            seen.add(image["id"])
        assert len(list((sample / folder).iterdir())) == len(coco.imgs)
    assert seen == set(range(1, COUNT + 1)) == set(scenes)


def test_the_split_file_is_karpathys_and_agrees_with_coco(sample):
    images = json.loads((sample / "dataset_sample.json").read_text())["images"]
    by_id = {}
    for folder in ("train2014", "val2014"):
        content = json.loads((sample / "annotations" / f"captions_{folder}.json").read_text())
        by_id |= {
            each["id"]: (each["image_id"], each["caption"]) for each in content["annotations"]
        }
    assert [image["imgid"] for image in images] == list(range(COUNT))
    for image in images:
        assert (sample / image["filepath"] / image["filename"]).is_file()
        assert image["filepath"] == ("train2014" if image["split"] == "train" else "val2014")
        assert image["sentids"] == [sentence["sentid"] for sentence in image["sentences"]]
        for sentence in image["sentences"]:
            assert by_id.pop(sentence["sentid"]) == (image["cocoid"], sentence["raw"])
            assert sentence["imgid"] == image["imgid"]
            assert sentence["tokens"] == re.findall(r"\w+", sentence["raw"].lower())
    assert not by_id
    splits = [image["split"] for image in images]
    assert {name: splits.count(name) for name in set(splits)} == {
        "train": 62,
        "restval": 2,
        "val": 8,
        "test": 8,
    }


def test_a_sample_that_exists_is_left_alone_and_one_that_differs_is_an_error(sample, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in sample.rglob("*")}
    ensure_sample(sample, COUNT, SEED)
    assert {path: path.stat().st_mtime_ns for path in sample.rglob("*")} == before
    with pytest.raises(
        DataError, match=f"count {COUNT}, seed {SEED}, not of .*count {COUNT}, seed 9"
    ):
        ensure_sample(sample, COUNT, seed=9)
    with pytest.raises(DataError, match="count 81"):
        ensure_sample(sample, COUNT + 1, SEED)
    with pytest.raises(DataError, match="exists"):
        draw_sample(sample, COUNT, SEED)
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match="not a drawn sample"):
        ensure_sample(tmp_path)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"
    with pytest.raises(DataError, match="not a drawn sample"):
        load_scenes(tmp_path)


def test_a_drawing_cut_off_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("data.datasets.sample._karpathy_image", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw_sample(tmp_path / "sample", 10)
    assert not list(tmp_path.iterdir())


def test_a_sample_has_ten_to_a_hundred_thousand_scenes(tmp_path):
    for count in (9, 100_001):
        with pytest.raises(DataError, match=r"10 to 100,000"):
            ensure_sample(tmp_path / "sample", count)
