import hashlib
import json
import os
import unicodedata
from pathlib import Path

import pytest

from data import DataError
from data.datasets import folder
from data.datasets.registry import DATASETS, open_source
from data.image_formats import HEIC
from data.sources import check_captioned, image_id, same_photograph
from pipeline.sources import SourceOptions

# Small data sets, written by the tests: an image file is empty, for a source opens none.


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def coco_json(names: dict[int, str], splits: dict[int, str] | None = None) -> dict:
    """A COCO file in which image i has the captions "first of i" and "second of i"."""
    images = [
        {"id": i, "file_name": name} | ({"split": splits[i]} if splits else {})
        for i, name in names.items()
    ]
    texts = [(i, f"{word} of {i}") for word in ("first", "second") for i in names]
    return {
        "images": images,
        "annotations": [
            {"id": 1000 + n, "image_id": i, "caption": text} for n, (i, text) in enumerate(texts)
        ],
    }


def karpathy_json(names: list[str], splits: list[str], **more) -> dict:
    return {
        "images": [
            {
                "filename": name,
                "imgid": n,
                "split": split,
                "sentences": [{"raw": f"It's {n}."}],
                **more,
            }
            for n, (name, split) in enumerate(zip(names, splits, strict=True))
        ]
    }


def refusal(*arguments, **named) -> str:
    with pytest.raises(DataError) as caught:
        open_source(*arguments, **named)
    return str(caught.value)


def in_tenth(name: str) -> bool:
    """The oracle of the dev split, as DESIGN.md writes it."""
    return int(hashlib.sha256(name.split("/")[-1].encode()).hexdigest()[:8], 16) % 10 == 0


# Splits


def test_flickr8k_has_546_dev_photographs_of_5473_train(real):
    source = open_source("karpathy", real / "flickr8k")
    assert (len(source.images), source.missing, source.splits, source.reported()) == (
        6473,
        (),
        ("train", "val"),
        "val",
    )
    dev, train, val = source.select("dev"), source.select("train"), source.select("val")
    assert (len(dev), len(train), len(val)) == (546, 5473 - 546, 1000)
    assert all(in_tenth(image.name) for image in dev) and not any(
        in_tenth(image.name) for image in train
    )
    assert not {i.id for i in dev} & {i.id for i in val} and len(source.select("all")) == 6473
    assert (
        source.images[0].captions[0]
        == "A child in a pink dress is climbing up a set of stairs in an entry way ."
    )
    assert all(
        len(image.captions) == 5 and image.path == source.root / image.name
        for image in source.images
    )


def test_karpathy_and_coco_files_of_one_data_set_draw_one_dev_split(real):
    root = real / "flickr8k"
    coco = open_source("coco", None, root / "captions_train.json", root / "images")
    assert [i.id for i in coco.select("dev")] == [
        i.id for i in open_source("karpathy", root).select("dev")
    ]
    assert coco.reported() == "dev"  # the file says train of each


def test_dev_is_val_where_there_is_a_test_split(tmp_path):
    names = [f"{n}.jpg" for n in range(60)]
    touch(tmp_path, *names)
    write(
        tmp_path / "dataset.json", karpathy_json(names, (["train", "restval", "val", "test"] * 15))
    )
    source = open_source("karpathy", tmp_path)
    assert source.splits == ("train", "val", "test") and source.reported() == "test"
    assert source.select("dev") == source.select("val") and len(source.select("val")) == 15
    # restval joins, in order
    assert [i.id for i in source.select("train")] == [n for n in range(60) if n % 4 < 2]


def test_a_test_split_alone_leaves_dev_to_the_train_photographs(tmp_path):
    touch(tmp_path, *(f"train/{n}.jpg" for n in range(60)), "test/a.jpg")
    source = open_source("folder", tmp_path)
    assert {i.name for i in source.select("dev")} == {
        f"train/{n}.jpg" for n in range(60) if in_tenth(f"{n}.jpg")
    }
    assert (
        source.reported() == "test"
        and len(source.select("dev")) + len(source.select("train")) == 60
    )


def test_a_coco_file_without_splits_is_all_and_gives_train_and_dev(tmp_path):
    names = {n: f"{n}.jpg" for n in range(60)}
    source = open_source("coco", None, write(tmp_path / "c.json", coco_json(names)), tmp_path)
    assert source.splits == ("all",) and source.reported() == "all"
    assert {i.name for i in source.select("dev")} == {
        name for name in names.values() if in_tenth(name)
    }
    assert {i.id for i in source.select("train")} == set(names) - {
        i.id for i in source.select("dev")
    }


@pytest.mark.parametrize("tenth", [True, False])
def test_a_tiny_set_gives_dev_the_photograph_with_the_smallest_hash(tmp_path, tenth):
    """Of three photographs that the hash would take all, or none."""
    names = [name for name in (f"{n}.jpg" for n in range(100)) if in_tenth(name) is tenth][:3]
    touch(tmp_path, *names)
    source = open_source("folder", tmp_path)
    smallest = min(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert [i.name for i in source.select("dev")] == [smallest]
    assert [i.name for i in source.select("train")] == sorted(set(names) - {smallest})


def test_one_photograph_is_train_and_leaves_no_dev(tmp_path):
    touch(tmp_path, "a.jpg")
    source = open_source("folder", tmp_path)
    assert len(source.select("train")) == 1
    with pytest.raises(DataError, match="split 'dev' has no images"):
        source.select("dev")


@pytest.mark.parametrize("split", ["val", "test", "tset"])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path, split):
    touch(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(DataError) as caught:
        open_source("folder", tmp_path).select(split)
    message = str(caught.value)
    assert repr(split) in message and "folder" in message and str(tmp_path) in message
    assert "its splits: train (and dev" in message


# The official layouts and Karpathy's names over them


@pytest.fixture
def photographs(real) -> list[tuple[dict, list[dict]]]:
    """COCO's own entries of the 226 val2017 photographs that are at hand, each with its
    annotations.
    """
    content = json.loads((real / "coco_annotations/captions_val2017.json").read_text())
    here = set(os.listdir(real / "coco/images"))
    captions: dict[int, list[dict]] = {}
    for entry in content["annotations"]:
        captions.setdefault(entry["image_id"], []).append(entry)
    return [
        (entry, captions[entry["id"]]) for entry in content["images"] if entry["file_name"] in here
    ]


def official(
    root: Path, photographs: list, real: Path, year: int, form: str, split: str = "val"
) -> Path:
    """The official layout of one split, photographs linked; `form` is a file name's."""
    (root / f"{split}{year}").mkdir(parents=True)
    images = [entry | {"file_name": form.format(entry["id"])} for entry, _ in photographs]
    for entry, (old, _) in zip(images, photographs, strict=True):
        (root / f"{split}{year}" / entry["file_name"]).symlink_to(
            (real / "coco/images" / old["file_name"]).resolve()
        )
    content = {
        "images": images,
        "annotations": [caption for _, captions in photographs for caption in captions],
    }
    write(root / f"annotations/captions_{split}{year}.json", content)
    return root


@pytest.mark.parametrize("year, form", [(2017, "{:012d}.jpg"), (2014, "COCO_val2014_{:012d}.jpg")])
def test_the_official_layout_is_read_with_only_val_downloaded(
    tmp_path, real, photographs, capsys, year, form
):
    source = open_source(f"coco{year}", official(tmp_path, photographs, real, year, form))
    assert len(source.images) == 226 and source.missing == () and source.splits == ("val",)
    assert source.reported() == "val" and source.annotations == tmp_path / "annotations"
    for image, (entry, captions) in zip(source.images, photographs, strict=True):
        assert image.id == entry["id"] and image.name == f"val{year}/{form.format(image.id)}"
        assert image.path == tmp_path / image.name and image.path.is_file()
        assert image.captions == tuple(caption["caption"] for caption in captions)
    assert capsys.readouterr() == ("", "")  # pycocotools is kept quiet


def test_the_official_layout_is_read_with_both_splits(tmp_path, real, photographs):
    official(tmp_path, photographs[:100], real, 2017, "{:012d}.jpg", "train")
    source = open_source(
        "coco2017", official(tmp_path, photographs[100:], real, 2017, "{:012d}.jpg")
    )
    assert source.splits == ("train", "val") and source.reported() == "val"
    dev, train = source.select("dev"), source.select("train")
    assert len(dev) + len(train) == 100 and len(source.select("val")) == 126
    assert all(in_tenth(i.name) for i in dev) and not any(in_tenth(i.name) for i in train)


def test_the_official_layout_says_which_files_it_lacks(tmp_path):
    (tmp_path / "annotations").mkdir()
    message = refusal("coco2014", tmp_path)
    assert (
        "captions_train2014.json" in message
        and "captions_val2014.json" in message
        and str(tmp_path) in message
    )
    assert "--dataset coco" in refusal("coco2017", tmp_path, write(tmp_path / "c.json", {}))


def test_karpathy_names_of_2014_are_found_in_folders_of_2017(tmp_path, real, photographs):
    """2014's val is mostly 2017's train: here one photograph in three stands in each folder, one
    nowhere.
    """
    splits, places = ("train", "val", "test"), ("train2017", "val2017", "elsewhere")
    for n, (entry, _) in enumerate(photographs):
        touch(tmp_path, f"{places[n % 3]}/{entry['file_name']}")
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{entry['id']:012d}.jpg",
            "imgid": n,
            "cocoid": entry["id"],
            "split": splits[n % 3],
            "sentences": [{"raw": caption["caption"]} for caption in captions],
        }
        for n, (entry, captions) in enumerate(photographs)
    ]
    write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    source = open_source("karpathy", tmp_path)
    for n, (image, (entry, _)) in enumerate(zip(source.images, photographs, strict=True)):
        absent = f"val2014/COCO_val2014_{entry['id']:012d}.jpg"
        assert image.name == (absent if n % 3 == 2 else f"{places[n % 3]}/{entry['file_name']}")
        assert image.id == entry["id"] and same_photograph(image.name, absent)
        assert image.path.exists() is (n % 3 != 2)
    assert source.missing == source.images[2::3]


def test_karpathy_names_of_2014_are_found_on_the_other_side_of_2014(tmp_path):
    touch(
        tmp_path,
        "train2014/COCO_train2014_000000000009.jpg",
        "val2014/COCO_val2014_000000000042.jpg",
    )
    names = ["COCO_val2014_000000000009.jpg", "COCO_val2014_000000000042.jpg"]
    write(tmp_path / "dataset.json", karpathy_json(names, ["val", "test"], filepath="val2014"))
    source = open_source("karpathy", tmp_path)
    assert [i.name for i in source.images] == [
        "train2014/COCO_train2014_000000000009.jpg",
        "val2014/COCO_val2014_000000000042.jpg",
    ]


def test_a_large_karpathy_file_lists_each_folder_once_and_asks_for_no_single_photograph(
    tmp_path, monkeypatch
):
    """The disk is asked as often for 10,000 photographs as for ten: a full COCO file opens soon."""
    count = 10_000
    names = [f"COCO_val2014_{n:012d}.jpg" for n in range(count)]
    file = write(
        tmp_path / "dataset_coco.json", karpathy_json(names, ["train"] * count, filepath="val2014")
    )
    touch(tmp_path, "val2014/COCO_val2014_000000000007.jpg")
    listed, scandir, asked, stat = [], os.scandir, [], os.stat

    def counted_stat(path, **more):
        asked.append(path)
        return stat(path, **more)

    monkeypatch.setattr(os, "scandir", lambda place: listed.append(place) or scandir(place))
    monkeypatch.setattr(os, "stat", counted_stat)
    source = open_source("karpathy", tmp_path, file)
    assert len(listed) == len(set(listed)) == 6  # the root, images and COCO's four
    assert len(asked) < 100
    assert len(source.images) == count and len(source.missing) == count - 1


# Karpathy's files


def test_karpathy_photographs_are_found_in_filepath_then_images_then_the_root(tmp_path):
    touch(tmp_path, "deep/er/a.jpg", "images/a.jpg", "images/b.jpg", "b.jpg", "c.jpg")
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    write(tmp_path / "dataset_x.json", karpathy_json(names, ["train"] * 4, filepath="deep/er"))
    source = open_source("karpathy", tmp_path)
    assert [i.name for i in source.images] == [
        "deep/er/a.jpg",
        "images/b.jpg",
        "c.jpg",
        "deep/er/d.jpg",
    ]
    assert [i.id for i in source.missing] == [3]


def test_karpathy_photographs_are_found_in_another_folder_by_images(tmp_path):
    touch(tmp_path, "flickr30k-images/a.jpg", "flickr30k-images/b.jpg")
    write(tmp_path / "dataset.json", karpathy_json(["a.jpg", "b.jpg"], ["train", "test"]))
    source = open_source("karpathy", tmp_path, images=tmp_path / "flickr30k-images")
    assert [i.name for i in source.images] == ["a.jpg", "b.jpg"] and source.missing == ()


def test_karpathy_ids_are_cocoid_else_imgid_and_captions_are_raw_else_tokens(tmp_path):
    images = [
        {
            "filename": "a.jpg",
            "imgid": 0,
            "cocoid": 42,
            "split": "test",
            "sentences": [{"raw": "A Dog."}],
        },
        {
            "filename": "b.jpg",
            "imgid": 1,
            "split": "train",
            "sentences": [{"tokens": ["a", "cat"]}],
        },
        {"filename": "c.jpg", "imgid": 2, "split": "train"},
    ]
    write(tmp_path / "dataset.json", {"images": images})
    source = open_source("karpathy", tmp_path)
    assert [(i.id, i.captions) for i in source.images] == [
        (42, ("A Dog.",)),
        (1, ("a cat",)),
        (2, ()),
    ]


def test_karpathy_wants_one_dataset_file_or_its_name(tmp_path):
    message = refusal("karpathy", tmp_path)
    assert "no dataset*.json" in message and "--annotations" in message
    one = write(tmp_path / "dataset_one.json", karpathy_json(["a.jpg"], ["train"]))
    write(tmp_path / "dataset_two.json", karpathy_json(["b.jpg"], ["train"]))
    message = refusal("karpathy", tmp_path)
    assert "dataset_one.json, dataset_two.json" in message and "--annotations" in message
    assert open_source("karpathy", tmp_path, one).annotations == one


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"sentences": [{"raw": 5}]}, "the caption is 5, not a string"),
        ({"sentences": [{}]}, '"raw" text or "tokens"'),
        ({"sentences": 7}, '"raw" text or "tokens"'),
        ({"split": "trian"}, "unknown split 'trian'"),
        ({"split": None}, "unknown split None"),
        ({"imgid": "7"}, "image id '7' is not"),
        ({"imgid": 2**63}, "is not an integer of 64 bits"),
        ({"filename": "../a.jpg"}, "is outside the root"),
        ({"filepath": "/etc"}, "is outside the root"),
    ],
)
def test_a_karpathy_entry_that_is_wrong_is_named(tmp_path, entry, message):
    content = karpathy_json(["a.jpg"], ["train"])
    content["images"][0] |= entry
    file = write(tmp_path / "dataset.json", content)
    told = refusal("karpathy", tmp_path)
    assert message in told and str(file) in told and "a.jpg" in told


# COCO's files


def test_a_coco_file_may_carry_splits(tmp_path):
    names = {1: "a.jpg", 2: "sub/b.jpg", 3: "c.jpg", 4: "d.jpg", 5: "e.jpg"}
    splits = {1: "restval", 2: "validation", 3: "test", 4: "dev", 5: "train"}
    touch(tmp_path / "photos", "a.jpg", "sub/b.jpg", "c.jpg", "d.jpg")
    file = write(tmp_path / "c.json", coco_json(names, splits))
    source = open_source("coco", tmp_path, file, tmp_path / "photos")
    assert [i.split for i in source.images] == ["train", "val", "test", "val", "train"]
    assert [i.name for i in source.images] == list(
        names.values()
    ) and source.root == tmp_path / "photos"
    assert [i.id for i in source.missing] == [5] and source.images[0].captions == (
        "first of 1",
        "second of 1",
    )
    # the root serves as --images
    assert open_source("coco", tmp_path / "photos", file).images == source.images


def test_an_image_without_captions_is_no_error(tmp_path):
    images = {
        "images": coco_json({1: "a.jpg"})["images"]
    }  # as image_info_test2017.json: no annotations at all
    for content in (images, images | {"annotations": []}):
        assert (
            open_source("coco", tmp_path, write(tmp_path / "i.json", content)).images[0].captions
            == ()
        )


def test_a_coco_file_with_a_byte_order_mark_or_categories_is_read(tmp_path):
    content = coco_json({1: "a.jpg"}) | {"categories": [{"id": 1}]}
    source = open_source(
        "coco", tmp_path, write(tmp_path / "c.json", "\ufeff" + json.dumps(content))
    )
    assert source.images[0].captions == ("first of 1", "second of 1")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"annotations": [{"id": 7, "image_id": 99, "caption": "x"}]}, "annotation 7 "),
        ({"annotations": [{"id": 7, "image_id": 99, "caption": "x"}]}, "image 99"),
        ({"annotations": [{"id": 7, "image_id": 1, "caption": ["x"]}]}, "annotation 7 "),
        ({"annotations": [{"id": 7, "image_id": 1}]}, "the caption is null, not a string"),
        ({"annotations": [{"id": 7, "caption": "x"}]}, "annotation number 0 has no image_id"),
        ({"annotations": {}}, 'no list of objects "annotations"'),
        ({"images": None}, 'no list of objects "images"'),
        ({"images": ["a.jpg"]}, 'no list of objects "images"'),
        ({"images": []}, "annotation 1000 "),
        ({"images": [], "annotations": []}, "has no images"),
        ({"images": [{"filename": "a.jpg"}]}, "--dataset karpathy"),
        ({"images": [{"id": 1.5, "file_name": "a.jpg"}]}, "image id 1.5"),
        (
            {"images": [{"id": 1, "file_name": "a/../../b.jpg"}]},
            "'a/../../b.jpg' is outside the root",
        ),
        (
            {"images": [{"id": 1, "file_name": "/etc/passwd"}]},
            "'/etc/passwd' is outside the root",
        ),
        ({"images": [{"id": 1, "file_name": ""}]}, "'' is not a file name"),
        ({"images": [{"id": 1, "file_name": "\ud800.jpg"}]}, "is not UTF-8"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "split": "tset"}]}, "image 1 "),
        (
            {
                "images": [
                    {"id": 1, "file_name": "a.jpg", "split": "val"},
                    {"id": 2, "file_name": "b.jpg"},
                ]
            },
            "image 2 ",
        ),
    ],
)
def test_a_coco_file_that_is_wrong_is_named_with_the_entry(tmp_path, change, message):
    file = write(tmp_path / "captions.json", coco_json({1: "a.jpg"}) | change)
    told = refusal("coco", tmp_path, file)
    assert message in told and str(file) in told


def test_two_images_with_one_id_are_both_named(tmp_path):
    content = coco_json({1: "a.jpg"})
    content["images"].append({"id": 1, "file_name": "b.jpg"})
    told = refusal("coco", tmp_path, write(tmp_path / "c.json", content))
    assert "a.jpg and b.jpg have the same id, 1" in told


@pytest.mark.parametrize(
    "content, message", [('{"images": [', "not complete JSON"), ("[]", "no list of objects")]
)
@pytest.mark.parametrize("dataset", ["coco", "karpathy"])
def test_broken_json_is_named(tmp_path, dataset, content, message):
    told = refusal(dataset, tmp_path, write(tmp_path / "dataset.json", content))
    assert message in told and str(tmp_path / "dataset.json") in told


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "dataset.json").write_bytes('{"images": "café"}'.encode("latin-1"))
    told = refusal("karpathy", tmp_path)
    assert "not UTF-8 at byte 15" in told and "dataset.json" in told


# Folders


def test_a_folder_is_read_at_any_depth_in_the_order_of_paths(tmp_path):
    touch(tmp_path, "b.JPG", "a/z.jpeg", "a/b/c.Png", "a.webp", "é/1.tiff", "notes.txt")
    touch(tmp_path, ".hidden/x.jpg", ".x.jpg", "a/.h/y.gif")
    source = open_source("folder", tmp_path)
    assert [i.name for i in source.images] == [
        "a.webp",
        "a/b/c.Png",
        "a/z.jpeg",
        "b.JPG",
        "é/1.tiff",
    ]
    assert source.splits == ("train",) and source.reported() == "dev" and source.missing == ()
    assert all(
        i.id == image_id(i.name) and i.path == tmp_path / i.name and i.captions == ()
        for i in source.images
    )


def test_a_loop_of_links_ends_and_real_paths_come_first(tmp_path):
    touch(tmp_path, "z/a.jpg", "z/y/b.jpg")
    (tmp_path / "a-link").symlink_to(tmp_path / "z")
    (tmp_path / "z/up").symlink_to(tmp_path)
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    source = open_source("folder", tmp_path)
    assert [i.name for i in source.images] == ["gone.jpg", "self.jpg", "z/a.jpg", "z/y/b.jpg"]
    assert [i.name for i in source.missing] == ["gone.jpg", "self.jpg"]


def test_links_out_of_the_folder_are_followed(tmp_path):
    touch(tmp_path / "elsewhere", "a.jpg")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/val").symlink_to(tmp_path / "elsewhere")
    source = open_source("folder", tmp_path / "root")
    assert [(i.name, i.split) for i in source.images] == [("val/a.jpg", "val")]


@pytest.mark.parametrize(
    "train, val, test",
    [
        ("train", "val", "test"),
        ("training", "valid", "testing"),
        ("Train", "dev", "eval"),
        ("TRAINING", "Validation", "Evaluation"),
    ],
)
def test_folders_called_so_are_splits(tmp_path, train, val, test):
    touch(tmp_path, f"{train}/1.jpg", f"{train}/deep/2.jpg", f"{val}/3.jpg", f"{test}/4.jpg")
    source = open_source("folder", tmp_path)
    assert {i.name[-5]: i.split for i in source.images} == {
        "1": "train",
        "2": "train",
        "3": "val",
        "4": "test",
    }
    assert source.reported() == "test" and source.select("dev") == source.select("val")


@pytest.mark.parametrize(
    "folder, split",
    [
        ("images/train", "train"),
        ("data/Images/Validation/cats", "val"),
        ("test-2017", "test"),
        ("train_2017", "train"),
        ("val.1", "val"),
        ("val2017", "val"),
        ("my test photos", "test"),
        ("a/2017-TEST/b", "test"),
        ("val/validation", "val"),
        ("train-test-split/test", "test"),
        ("train_val", None),
        ("trains", None),
        ("contest", None),
        ("test.jpg_", "test"),
    ],
)
def test_a_folder_at_any_depth_tells_the_split_as_in_imagefolder(tmp_path, folder, split):
    touch(tmp_path / "train", f"{folder}/1.jpg")  # the root's own name tells nothing
    (image,) = open_source("folder", tmp_path / "train").images
    assert image.split == (split or "train")
    touch(tmp_path / "train", "other/2.jpg")
    if split == "train":  # the split was told, not only the default
        assert "other/2.jpg" in refusal("folder", tmp_path / "train")


def test_a_path_through_folders_of_two_splits_is_refused_with_both(tmp_path):
    touch(tmp_path, "images/test-2017/train/1.jpg")
    told = refusal("folder", tmp_path)
    assert "test-2017 and train" in told and "images/test-2017/train" in told and "rename" in told


def test_images_outside_split_folders_are_train_unless_train_is_one(tmp_path):
    touch(tmp_path, "val/1.jpg", "cats/val/2.jpg", "3.jpg")
    source = open_source("folder", tmp_path)
    assert {i.name: i.split for i in source.images} == {
        "3.jpg": "train",
        "cats/val/2.jpg": "val",
        "val/1.jpg": "val",
    }
    touch(tmp_path, "train/4.jpg")
    told = refusal("folder", tmp_path)
    assert "3.jpg" in told and str(tmp_path) in told and "train" in told


def test_metadata_jsonl_gives_captions_and_splits(tmp_path):
    touch(tmp_path, "a.jpg", "sub/b.jpg", "c.jpg", "d.jpg")
    rows = [
        {"file_name": "a.jpg", "caption": "one, two", "split": "train"},
        {"file_name": "./sub/b.jpg", "captions": ["three", "four"], "split": "dev"},
        {"file_name": "c.jpg", "captions": "five", "split": "test"},
        {"file_name": "gone.jpg", "text": "six", "split": "test"},
        {"file_name": "d.jpg", "caption": None, "split": "train"},
    ]
    write(
        tmp_path / "metadata.jsonl", "\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\n"
    )
    source = open_source("folder", tmp_path)
    assert {i.name: (i.split, i.captions) for i in source.images} == {
        "a.jpg": ("train", ("one, two",)),
        "c.jpg": ("test", ("five",)),
        "d.jpg": ("train", ()),
        "gone.jpg": ("test", ("six",)),
        "sub/b.jpg": ("val", ("three", "four")),
    }
    assert [i.name for i in source.missing] == [
        "gone.jpg"
    ] and source.annotations == tmp_path / "metadata.jsonl"


def test_metadata_csv_gives_captions_row_by_row_or_as_a_list(tmp_path):
    touch(tmp_path, "train/a.jpg", "train/b.jpg", "val/a.jpg")
    rows = (
        '\ufefffile_name,captions\r\na.jpg,one\r\na.jpg,"two, '
        '""too"""\r\nb.jpg,"[""three"", ""four""]"\r\n'
    )
    (tmp_path / "train/metadata.csv").write_bytes(rows.encode())
    # under `caption` a bracket is text
    write(tmp_path / "val/metadata.csv", "file_name,caption\na.jpg,[five]\n")
    source = open_source("folder", tmp_path)
    assert {i.name: i.captions for i in source.images} == {
        "train/a.jpg": ("one", 'two, "too"'),
        "train/b.jpg": ("three", "four"),
        "val/a.jpg": ("[five]",),
    }
    assert source.splits == ("train", "val") and source.annotations is None


def test_metadata_may_name_a_file_that_the_walk_leaves_out(tmp_path):
    touch(tmp_path, "a.jpg", "b.jfif")
    write(tmp_path / "metadata.csv", "file_name,caption\nb.jfif,one\n")
    source = open_source("folder", tmp_path)
    assert [i.name for i in source.images] == ["a.jpg", "b.jfif"] and source.missing == ()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("metadata.jsonl", '{"file_name": "a.jpg"}\n{"file_name": \n', "line 2: not JSON"),
        ("metadata.jsonl", '\n["a.jpg"]', "line 2: not an object"),
        (
            "metadata.jsonl",
            '{"caption": "x"}',
            "line 1: has no column file_name; its columns: caption",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "captions": ["x", 3]}',
            "line 1: the caption is 3, not a string",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "split": "trian"}',
            "line 1: unknown split 'trian'",
        ),
        ("metadata.jsonl", '{"file_name": "../a.jpg"}', "line 1: '../a.jpg' is outside the root"),
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "split": "val"}\n{"file_name": "a.jpg", "split": "test"}',
            "line 2",
        ),
        ("metadata.csv", "file_name,caption\na.jpg,a dog, a cat\n", "line 2: more cells"),
        (
            "metadata.csv",
            "file_name,captions\na.jpg,\"['a dog']\"\n",
            "line 2: \"['a dog']\" begins like a JSON list",
        ),
        ("metadata.csv", 'file_name,caption\na.jpg,"a dog\n', "line 2: "),
        (
            "metadata.csv",
            "name,caption\na.jpg,x\n",
            ": has no column file_name; its columns: name, caption",
        ),
    ],
)
def test_a_metadata_row_that_is_wrong_is_named_by_file_and_line(tmp_path, name, text, message):
    touch(tmp_path, "a.jpg")
    write(tmp_path / name, text)
    told = refusal("folder", tmp_path)
    assert message in told and str(tmp_path / name) in told


def test_a_row_may_not_contradict_its_split_folder(tmp_path):
    touch(tmp_path, "train/a.jpg", "val/b.jpg")
    write(tmp_path / "train/metadata.jsonl", '{"file_name": "a.jpg", "split": "test"}')
    told = refusal("folder", tmp_path)
    assert "train/a.jpg" in told and "test" in told and "line 1" in told


@pytest.mark.parametrize("place", [".", "train", "a/b"])
def test_two_metadata_files_in_one_folder_are_refused(tmp_path, place):
    touch(tmp_path / place, "a.jpg", "metadata.csv", "metadata.jsonl")
    told = refusal("folder", tmp_path)
    assert "keep one" in told and str(tmp_path / place) in told


def test_metadata_of_every_folder_names_photographs_from_its_own_folder(tmp_path):
    touch(
        tmp_path,
        "dogs/a.jpg",
        "people/old/a.jpg",
        "train/cats/a.jpg",
        "eval/b.jpg",
        ".hidden/a.jpg",
    )
    for place in ("train/cats", ".hidden"):
        write(
            tmp_path / place / "metadata.jsonl",
            json.dumps({"file_name": "a.jpg", "text": f"in {place}"}),
        )
    write(tmp_path / "eval/metadata.csv", "file_name,text\nb.jpg,in eval\n")
    write(
        tmp_path / "dogs/metadata.jsonl",
        json.dumps({"file_name": "a.jpg", "text": "in dogs", "split": "Training"}),
    )
    write(
        tmp_path / "people/old/metadata.jsonl",
        '{"file_name": "a.jpg", "text": "in people/old", "split": "Valid"}',
    )
    source = open_source("folder", tmp_path)
    assert {i.name: (i.split, i.captions) for i in source.images} == {
        "dogs/a.jpg": ("train", ("in dogs",)),
        "eval/b.jpg": ("test", ("in eval",)),
        "people/old/a.jpg": ("val", ("in people/old",)),
        "train/cats/a.jpg": ("train", ("in train/cats",)),
    }
    assert source.notes == ()


def test_a_photograph_in_two_metadata_files_has_the_captions_of_both_once(tmp_path):
    touch(tmp_path, "dogs/a.jpg")
    write(
        tmp_path / "metadata.csv",
        "file_name,text\ndogs/a.jpg,one\ndogs/a.jpg,two\ndogs/a.jpg,two\n",
    )
    write(tmp_path / "dogs/metadata.csv", "file_name,text\na.jpg,two\na.jpg,three\n")
    assert open_source("folder", tmp_path).images[0].captions == ("one", "two", "two", "three")


@pytest.mark.parametrize(
    "name, text",
    [
        ("metadata.csv", "\ufeff File_Name , Caption \na.jpg,one\n"),
        ("metadata.jsonl", '\ufeff{" FILE_NAME": "a.jpg", "Caption ": "one"}'),
    ],
)
def test_columns_are_known_with_blanks_capitals_and_a_byte_order_mark(tmp_path, name, text):
    touch(tmp_path, "a.jpg")
    write(tmp_path / name, text)
    assert open_source("folder", tmp_path).images[0].captions == ("one",)


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "metadata.csv",
            "image,caption\na.jpg,one\n",
            "has no column file_name; its columns: image, caption",
        ),
        ("metadata.csv", "image,caption\n", "has no column file_name; its columns: image, caption"),
        ("metadata.csv", "", "is empty"),
        ("metadata.jsonl", "\n", "is empty"),
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg"}\n{"image": "a.jpg", "text": "x"}',
            "line 2: has no column file_name; its columns: image, text",
        ),
        ("metadata.csv", "file_name,text,text\na.jpg,one,two\n", "has the column text 2 times"),
    ],
)
def test_metadata_without_the_columns_that_are_needed_names_those_it_has(
    tmp_path, name, text, message
):
    touch(tmp_path, "sub/a.jpg")
    write(tmp_path / "sub" / name, text)
    told = refusal("folder", tmp_path)
    assert message in told and str(tmp_path / "sub" / name) in told


def test_metadata_without_a_column_of_captions_is_said(tmp_path):
    touch(tmp_path, "a.jpg")
    write(tmp_path / "metadata.csv", "file_name,prompt\na.jpg,one\n")
    assert (
        "has no column caption, captions or text; its columns: file_name, prompt"
        in open_source("folder", tmp_path).notes[0]
    )
    write(tmp_path / "metadata.csv", "file_name,split\na.jpg,test\n")
    assert open_source("folder", tmp_path).notes == ()


def test_what_is_no_photograph_is_counted_by_suffix_and_captions_are_not_counted(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(folder, "SUFFIXES", folder.SUFFIXES - {*HEIC})
    touch(
        tmp_path,
        "a.jpg",
        "a.txt",
        "a.json",
        "b/c.png",
        "b/C.txt",
        "x.heic",
        "b/y.heic",
        "clip.MP4",
        "LICENSE",
    )
    touch(tmp_path, ".hidden.zip", "dataset_x.json", "notes.txt", "metadata.parquet")
    write(tmp_path / "captions.txt", "image,caption\na.jpg,one\n")
    write(tmp_path / "b/metadata.csv", "file_name,text\nc.png,two\n")
    files = "6 files ignored: .heic 2, .mp4 1, .parquet 1, .txt 1, without suffix 1"
    assert (
        open_source("folder", tmp_path).notes[0]
        == files + "; to read .heic: pip install -e '.[heic]'"
    )


def test_a_file_that_metadata_names_is_an_image_whatever_its_suffix(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "SUFFIXES", frozenset({".jpg"}))
    touch(tmp_path, "a.jpg", "b.heic", "c.heic")
    write(tmp_path / "metadata.csv", "file_name,text\nb.heic,one\n")
    source = open_source("folder", tmp_path)
    assert [i.name for i in source.images] == ["a.jpg", "b.heic"] and source.missing == ()
    assert source.notes == ("1 file ignored: .heic 1; to read .heic: pip install -e '.[heic]'",)


# Kaggle's and Flickr8k's caption files, and captions beside the photographs


@pytest.mark.parametrize(
    "photos", [".", "Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset"]
)
@pytest.mark.parametrize("below", [".", "archive"])
def test_kaggles_captions_txt_names_photographs_beside_it(tmp_path, photos, below):
    touch(tmp_path / below / photos, "1.jpg", "2.jpg")
    text = '\ufeffimage,caption\r\n1.jpg,"A dog , running ."\r\n1.jpg,A dog .\r\n2.jpg,A cat .\r\n'
    (tmp_path / below / "captions.txt").write_bytes(text.encode())
    source = open_source("folder", tmp_path)
    assert {i.name.rpartition("/")[2]: i.captions for i in source.images} == {
        "1.jpg": ("A dog , running .", "A dog ."),
        "2.jpg": ("A cat .",),
    }
    assert (
        source.missing == source.notes == ()
        and source.annotations == tmp_path / below / "captions.txt"
    )
    assert all(i.path.is_file() and i.path == tmp_path / i.name for i in source.images)


@pytest.mark.parametrize(
    "line, caption",
    [
        ("a.jpg,A dog, a cat, and a ball .", "A dog, a cat, and a ball ."),
        ('a.jpg,A "red, hot" dog', 'A "red, hot" dog'),
        ('a.jpg,"A dog, a cat"', "A dog, a cat"),
        ('a.jpg,"A ""big"" dog, a cat"', 'A "big" dog, a cat'),
        ('a.jpg,"A dog,\nand, a cat"', "A dog,\nand, a cat"),
        ('"a.jpg",A dog', "A dog"),
        ('a.jpg,A 5" dog', 'A 5" dog'),
        ("a.jpg,A dog,", "A dog,"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_in_kaggles_captions_txt_all_after_the_first_comma_is_the_caption(
    tmp_path, line, caption, end
):
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "captions.txt").write_bytes(
        end.join(["image,caption", line, "b.jpg,Last, one", ""]).encode()
    )
    assert [i.captions for i in open_source("folder", tmp_path).images] == [
        (caption,),
        ("Last, one",),
    ]


@pytest.mark.parametrize("sign, said", [(";", "';'"), ("\t", "a tab"), ("|", "'|'")])
@pytest.mark.parametrize(
    "name, header",
    [
        ("metadata.csv", "file_name,Text"),
        ("captions.txt", "image,caption"),
        ("captions.txt", '"image", "caption"'),
    ],
)
def test_columns_separated_by_another_sign_than_a_comma_are_refused_with_it(
    tmp_path, name, header, sign, said
):
    touch(tmp_path, "a.jpg")
    write(tmp_path / name, header.replace(",", sign) + f"\na.jpg{sign}a dog, running\n")
    told = refusal("folder", tmp_path)
    assert f"separated by {said}; save it with commas" in told and str(tmp_path / name) in told


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["metadata.csv", "captions.txt", "metadata.jsonl"])
def test_text_in_utf_16_is_refused_by_its_name(tmp_path, name, encoding):
    touch(tmp_path, "a.jpg")
    (tmp_path / name).write_text("file_name,text\na.jpg,a dog\n", encoding=encoding)
    assert f"{name} is UTF-16; save it as UTF-8" in refusal("folder", tmp_path)


@pytest.mark.parametrize(
    "name",
    ["results.csv", "captions.json", "deep/results_20130124.token", "a.caption", "Metadata.csv"],
)
def test_a_file_of_captions_that_is_not_read_is_named_where_captions_are_missing(tmp_path, name):
    touch(tmp_path, "a.jpg", "b.jpg", name)
    assert (
        f"1 file may contain captions but is not read: {name}; captions are read from"
        in open_source("folder", tmp_path).notes[-1]
    )
    write(
        tmp_path / "metadata.jsonl",
        "\n".join(f'{{"file_name": "{n}.jpg", "text": "x"}}' for n in "ab"),
    )
    assert not any("not read" in note for note in open_source("folder", tmp_path).notes)


def test_a_captions_txt_of_another_form_is_not_read_and_it_is_said(tmp_path):
    touch(tmp_path, "a.jpg")
    write(tmp_path / "captions.txt", "my holiday\n")
    source = open_source("folder", tmp_path)
    assert (
        "captions.txt is not read: its first line is 'my holiday'" in source.notes[0]
        and source.images[0].captions == ()
    )


def flickr8k(
    root: Path, names: list[str], text: str = ".", photos: str = "Flicker8k_Dataset"
) -> Path:
    lines = [
        f"{name}#{n}\t{word} {name} ."
        for name in names
        for n, word in enumerate(("First", "Second"))
    ]
    write(root / text / "Flickr8k.token.txt", "\n".join(lines) + "\n")
    touch(root / text, "Flickr8k.lemma.token.txt", "readme.txt", "ExpertAnnotations.txt")
    touch(root / photos, *(name for name in names if name.endswith(".jpg")))
    return root


@pytest.mark.parametrize("text", [".", "Flickr8k_text"])
@pytest.mark.parametrize("photos", ["Flicker8k_Dataset", "Images"])
def test_flickr8ks_own_files_are_read_and_its_broken_name_is_counted(tmp_path, text, photos):
    broken = "2258277193_586949ec62.jpg.1"
    source = open_source("folder", flickr8k(tmp_path, ["1.jpg", broken, "2.jpg"], text, photos))
    assert [(i.name, i.captions) for i in source.images] == [
        (f"{photos}/{n}.jpg", (f"First {n}.jpg .", f"Second {n}.jpg .")) for n in (1, 2)
    ]
    assert source.missing == () and source.splits == ("train",) and len(source.notes) == 1
    assert source.notes[0].startswith("2 captions in ") and broken in source.notes[0]


def test_flickr8ks_files_of_splits_say_which_photographs_there_are(tmp_path):
    flickr8k(tmp_path, [f"{n}.jpg" for n in range(6)], "Flickr8k_text")
    for split, names in {
        "train": "0.jpg\r\n1.jpg\r\n",
        "dev": "2.jpg\n",
        "test": "3.jpg\ngone.jpg\n",
    }.items():
        write(tmp_path / f"Flickr8k_text/Flickr_8k.{split}Images.txt", names)
    source = open_source("folder", tmp_path)
    assert {i.name.rpartition("/")[2]: i.split for i in source.images} == {
        "0.jpg": "train",
        "1.jpg": "train",
        "2.jpg": "val",
        "3.jpg": "test",
        "gone.jpg": "test",
    }
    assert [i.name for i in source.missing] == ["Flicker8k_Dataset/gone.jpg"]
    assert source.notes[0].startswith("2 photographs are in none of Flickr_8k's split files")
    write(tmp_path / "Flickr8k_text/Flickr_8k.devImages.txt", "0.jpg\n")
    assert "0.jpg is also in Flickr_8k.trainImages.txt" in refusal("folder", tmp_path)


def test_flickr8k_without_its_photographs_names_their_folder(tmp_path):
    flickr8k(tmp_path, ["1.jpg"], photos="elsewhere")
    told = refusal("folder", tmp_path)
    assert (
        "Flicker8k_Dataset" in told
        and "Flickr8k_Dataset.zip" in told
        and "1 photograph, none of which is" in told
    )


def test_a_token_file_line_that_is_wrong_is_named(tmp_path):
    flickr8k(tmp_path, ["1.jpg"])
    write(tmp_path / "Flickr8k.token.txt", "1.jpg#0\tA dog .\n1.jpg A dog .\n")
    assert "line 2: '1.jpg A dog .' is not a name" in refusal("folder", tmp_path)


def test_captions_from_txt_are_the_lines_of_the_file_beside_each_photograph(tmp_path):
    touch(tmp_path, "a.jpg", "sub/b.PNG", unicodedata.normalize("NFD", "é.jpg"), "bare.jpg")
    write(tmp_path / "a.txt", "\ufeffsks dog, running\r\n\r\n a dog \r\n")
    write(tmp_path / "sub/b.TXT", "a cat")
    write(tmp_path / unicodedata.normalize("NFC", "é.txt"), "a bird\n")
    write(tmp_path / "metadata.csv", "file_name,text,split\na.jpg,other,test\n")
    source = open_source("folder", tmp_path, captions_from="txt")
    assert [i.captions for i in source.images] == [
        ("sks dog, running", "a dog"),
        (),
        ("a bird",),
        ("a cat",),
    ]
    assert source.images[0].split == "test" and source.notes == ()
    (tmp_path / "metadata.csv").unlink()
    source = open_source("folder", tmp_path)
    assert all(i.captions == () for i in source.images)
    assert source.notes == (
        "3 photographs have a .txt file of their name; train and evaluate read these captions with "
        "--captions-from txt",
    )


def test_captions_from_txt_wants_a_folder_with_such_files(tmp_path):
    touch(tmp_path, "a.jpg", "b.txt")
    assert "no photograph in" in refusal("folder", tmp_path, captions_from="txt")
    assert "--dataset folder" in refusal("karpathy", tmp_path, captions_from="txt")


# Names that differ only in Unicode's normal form, in case or in slashes

NFC, NFD = (unicodedata.normalize(form, "café.jpg") for form in ("NFC", "NFD"))
SAME = [
    ([NFC], NFD, NFD),
    ([NFD], NFC, NFC),
    (["a.jpg"], "a.JPG", "a.JPG"),
    (["IMG_1.JPG"], "img_1.jpg", "img_1.jpg"),
    (["a.JPG"], ["a.jpg", "A.JPG"], "a.jpg"),
    (["sub\\a.jpg"], "sub/a.jpg", "sub/a.jpg"),
    ([".\\sub\\a.jpg"], "Sub/A.jpg", "Sub/A.jpg"),
    (["./sub//a.jpg"], "sub/a.jpg", "sub/a.jpg"),
    (
        [f"été/{NFC}"],
        unicodedata.normalize("NFD", f"été/{NFC}"),
        unicodedata.normalize("NFD", f"été/{NFC}"),
    ),
    (["a\\b.jpg"], ["a\\b.jpg", "a/b.jpg"], "a\\b.jpg"),
]


@pytest.mark.parametrize("dataset", ["folder", "coco", "karpathy"])
@pytest.mark.parametrize("named, there, found", SAME)
def test_a_name_that_differs_only_in_form_case_or_slash_is_found_as_it_is_on_the_disk(
    tmp_path, dataset, named, there, found
):
    touch(tmp_path, *([there] if isinstance(there, str) else there))
    if dataset == "folder":
        write(tmp_path / "metadata.jsonl", json.dumps({"file_name": named[0], "text": "one"}))
        source = open_source("folder", tmp_path)
    else:
        content = coco_json({1: named[0]}) if dataset == "coco" else karpathy_json(named, ["train"])
        source = open_source(dataset, tmp_path, write(tmp_path / "c.json", content))
    image = next(image for image in source.images if image.captions)
    assert image.name == found and image.path == tmp_path / found and source.missing == ()
    assert same_photograph(named[0], found)
    if dataset == "folder":
        assert image.id == image_id(found)


@pytest.mark.parametrize(
    "names, there, missing",
    [
        # which of the two it is, nobody knows
        (["aB.jpg", "Ab.jpg"], ["ab.jpg"], ["aB.jpg", "Ab.jpg"]),
        (["ab.jpg", "Ab.jpg"], ["ab.jpg"], ["Ab.jpg"]),
        (["AB.jpg"], ["ab.jpg", "Ab.jpg"], ["AB.jpg"]),
    ],
)
def test_a_name_that_may_mean_two_photographs_is_missing(tmp_path, names, there, missing):
    touch(tmp_path, *there)
    source = open_source(
        "coco", tmp_path, write(tmp_path / "c.json", coco_json(dict(enumerate(names))))
    )
    assert [image.name for image in source.missing] == missing


def test_backslashes_do_not_lead_out_of_the_root(tmp_path):
    touch(tmp_path, "a.jpg", "root/b.jpg")
    write(tmp_path / "root/metadata.jsonl", json.dumps({"file_name": "..\\a.jpg", "text": "x"}))
    assert "is outside the root" in refusal("folder", tmp_path / "root")


def test_images_without_captions_are_counted_and_five_are_named(tmp_path):
    touch(tmp_path, *(f"{n}.jpg" for n in range(7)))
    images = open_source("folder", tmp_path).images
    with pytest.raises(DataError) as told:
        check_captioned(images, "train")
    assert (
        "7 images have no caption in split 'train'" in str(told.value)
        and str(told.value).count(".jpg") == 5
    )
    with pytest.raises(DataError, match=r"^image \d+ \(0.jpg\) has no caption in split 'dev'"):
        check_captioned(images[:1], "dev")


def test_an_annotation_of_coco_needs_no_id(tmp_path):
    content = coco_json({1: "a.jpg", 2: "b.jpg"})
    for entry, id_ in zip(content["annotations"], (None, 1.5, [], "x"), strict=True):
        entry["id"] = id_
    del content["annotations"][0]["id"]
    source = open_source("coco", tmp_path, write(tmp_path / "c.json", content))
    assert [i.captions for i in source.images] == [
        ("first of 1", "second of 1"),
        ("first of 2", "second of 2"),
    ]


def test_two_names_with_one_hash_are_both_named(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "b.jpg")
    monkeypatch.setattr(folder, "image_id", lambda name: 5)
    assert "a.jpg and b.jpg have the same id, 5" in refusal("folder", tmp_path)


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path):
    try:
        open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "w").close()
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert "not UTF-8" in refusal("folder", tmp_path)


# Opening, ids, names


def test_a_folder_without_images_is_refused(tmp_path):
    touch(tmp_path, "notes.txt")
    told = refusal("folder", tmp_path)
    assert "no images" in told and str(tmp_path) in told and "1 file ignored: .txt 1" in told


def test_an_unknown_dataset_is_answered_with_the_nearest(tmp_path):
    told = refusal("karpaty", tmp_path)
    assert "did you mean 'karpathy'?" in told and all(name in told for name in DATASETS)


@pytest.mark.parametrize(
    "dataset", [name for name in DATASETS if name not in ("sample", "webdataset")]
)
def test_a_missing_place_is_named(tmp_path, dataset):
    gone = tmp_path / "gone"
    assert f"{gone} is not a folder; --root" in refusal(dataset, gone)
    assert f"{gone} is not a folder; --images" in refusal(dataset, tmp_path, images=gone)
    assert f"{gone} does not exist; --annotations" in refusal(dataset, tmp_path, gone)
    assert "--root" in refusal(dataset, None)


def test_captions_that_a_dataset_cannot_take_are_refused(tmp_path):
    touch(tmp_path, "a.jpg")
    assert "--annotations FILE" in refusal("coco", tmp_path)
    assert "--annotations FILE" in refusal("coco", tmp_path, tmp_path)
    assert "is a folder" in refusal("karpathy", tmp_path, tmp_path)
    assert "metadata.jsonl" in refusal("folder", tmp_path, write(tmp_path / "c.json", {}))


def test_the_sample_is_drawn_and_read_as_karpathys(tmp_path, monkeypatch):
    def draw(root: Path) -> None:
        write(root / "dataset_sample.json", karpathy_json(["a.jpg"], ["test"]))
        touch(root, "images/a.jpg")

    with pytest.raises(DataError, match="is not a folder"):  # commands draw it, reading does not
        open_source("sample", tmp_path / "new")
    monkeypatch.setattr("pipeline.sources.ensure_sample", draw)
    source = SourceOptions(root=tmp_path / "new").open_source()
    assert (source.dataset, source.images[0].name, source.missing) == ("sample", "images/a.jpg", ())


def test_the_id_of_a_name_is_63_bits_of_its_sha256():
    bits = bin(int(hashlib.sha256("é/1.jpg".encode()).hexdigest(), 16))[2:].zfill(256)
    assert image_id("é/1.jpg") == int(bits[:63], 2) < 2**63


def test_one_photograph_may_be_named_as_of_2014_or_2017():
    assert same_photograph("val2014/COCO_val2014_000000391895.jpg", "train2017/000000391895.jpg")
    assert same_photograph(
        "COCO_train2014_000000391895.jpg", "images/COCO_val2014_000000391895.jpg"
    )
    assert same_photograph("COCO_test2015_000000000001.jpg", "000000000001.jpg")
    assert not same_photograph("val2017/000000391895.jpg", "val2017/000000391896.jpg")
    assert not same_photograph("my_COCO_val2014_1.jpg", "1.jpg")


def test_the_digest_tells_which_photographs_whatever_their_order(tmp_path):
    def digest(names: dict[int, str]) -> str:
        return open_source("coco", tmp_path, write(tmp_path / "c.json", coco_json(names))).digest

    one = digest({1: "a.jpg", 2: "b.jpg"})
    assert one == digest({2: "b.jpg", 1: "a.jpg"}) and len(one) == 64
    assert (
        len(
            {
                one,
                digest({1: "a.jpg"}),
                digest({1: "b.jpg", 2: "a.jpg"}),
                digest({1: "a.jpg", 3: "b.jpg"}),
            }
        )
        == 4
    )
