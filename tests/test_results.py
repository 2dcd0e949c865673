"""Captions and references as files: what is read, what is refused, what COCO's server is given."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from data import DataError, results
from data.results import (
    SERVER_IMAGES,
    choose,
    read_ids,
    read_references,
    read_results,
    write_results,
    write_server,
)
from data.sources import Image


def put(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def images(split: str, count: int) -> list[Image]:
    names = (f"COCO_{split}2014_{number:012d}.jpg" for number in range(count))
    return [Image(number, name, Path(name), "all", ()) for number, name in enumerate(names)]


def test_results_are_read_as_they_are_written(tmp_path):
    captions = {5: "ein Hund läuft", 2: "", 9: "a cat"}
    write_results(tmp_path / "r.json", captions)
    assert read_results(tmp_path / "r.json") == captions and list(
        read_results(tmp_path / "r.json")
    ) == [5, 2, 9]
    assert json.loads((tmp_path / "r.json").read_text())[0] == {
        "image_id": 5,
        "caption": "ein Hund läuft",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image_id": 1, "capt', "is not complete JSON"),
        ({"images": []}, "is not a results file"),
        ([1, 2], "is not a results file"),
        ([], "contains no captions"),
        ([{"image_id": 1}], "entry 0 has no image_id or no caption"),
        ([{"image_id": "1", "caption": "a"}], "entry 0: the image id '1' is not an integer"),
        ([{"image_id": 1.0, "caption": "a"}], "the image id 1.0 is not an integer"),
        ([{"image_id": 7, "caption": ["a"]}], r'image 7: the caption is \["a"\], not a string'),
        (
            [{"image_id": 7, "caption": "a \ud800 dog"}],
            "image 7: the caption .* contains a lone surrogate, which is half a character",
        ),
        ("[" * 100_000, "is not complete JSON"),
        ('[{"image_id": ' + "9" * 5000 + ', "caption": "a"}]', "is not complete JSON"),
        ([{"image_id": 7, "caption": None}], "image 7: the caption is null, not a string"),
        (
            [{"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}],
            "image 7 has two captions, 'a' and 'b'",
        ),
    ],
)
def test_results_that_cannot_be_scored_are_an_error_that_names_file_and_image(
    tmp_path, content, message
):
    with pytest.raises(DataError, match=message) as error:
        read_results(put(tmp_path / "r.json", content))
    assert "r.json" in str(error.value)


def test_references_are_read_from_coco_s_and_from_karpathy_s_files(tmp_path):
    annotations = [
        {"id": 1, "image_id": 3, "caption": "a dog"},
        {"id": 2, "image_id": 3, "caption": "dogs"},
    ]
    coco = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in (3, 4)],
        "annotations": annotations,
    }
    found = {image.id: image.captions for image in read_references(put(tmp_path / "c.json", coco))}
    assert found == {3: ("a dog", "dogs"), 4: ()}
    karpathy = {"dataset": "coco", "images": [
        {"filename": f"{n}.jpg", "cocoid": n, "split": split, "sentences": [{"raw": f"a {split}"}]}
        for n, split in enumerate(["train", "restval", "val", "test", "restval"])]}  # fmt: skip
    file = put(tmp_path / "k.json", karpathy)
    for split, ids in ((None, [3]), ("test", [3]), ("val", [2]), ("train", [0, 1, 4])):
        assert [image.id for image in read_references(file, split)] == ids
    (tmp_path / "k.json").write_text(json.dumps({"info": "x" * 100_000, **karpathy}))
    assert [image.id for image in read_references(file, "val")] == [2]
    with pytest.raises(DataError, match=r"no\.json"):
        read_references(tmp_path / "no.json")


def test_the_whole_train_split_is_read_where_a_tenth_of_it_is_dev(real: Path):
    folder = real / "flickr8k"
    assert len(read_references(folder / "dataset_flickr8k.json", "train")) == 5473
    assert len(read_references(folder / "captions_train.json", "train")) == 5473


def test_ids_are_read_by_line_and_as_a_list(tmp_path):
    assert (
        read_ids(put(tmp_path / "a", "5\n3\n\n5\n"))
        == read_ids(put(tmp_path / "b", [5, 3]))
        == [5, 3]
    )
    for content in ("5\nx.jpg\n", "[5", "", "[]", '["5"]', "99999999999999999999"):
        with pytest.raises(DataError, match="ids"):
            read_ids(put(tmp_path / "ids", content))


def test_karpathy_s_lists_pick_their_images(real: Path):
    folder = real / "coco_annotations"
    for split in ("val", "test"):
        assert len(read_ids(folder / f"karpathy_{split}_ids.txt")) == 5000
    test = read_references(real / "results" / "coco_karpathy_test" / "refs.json")
    ids = read_ids(folder / "karpathy_test_ids.txt")
    assert [image.id for image in choose(test, ids, Path("refs.json"), Path("ids"))] == ids
    with pytest.raises(DataError, match=r"image \d+ of .*karpathy_val_ids.txt is not in refs.json"):
        val = folder / "karpathy_val_ids.txt"
        choose(test, read_ids(val), Path("refs.json"), val)


# --------------------------------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def server() -> dict[str, list[Image]]:
    return {split: images(split, count) for split, count in SERVER_IMAGES.items()}


def captions(of: list[Image]) -> dict[int, str]:
    return {image.id: f"a dog of {image.id}" for image in of}


def test_the_server_gets_both_files_by_its_names_and_zipped(tmp_path, server):
    assert [
        path.name
        for path in write_server(tmp_path, "onceover", captions(server["val"]), server["val"])
    ] == ["captions_val2014_onceover_results.json"]
    written = write_server(tmp_path, "onceover", captions(server["test"]), server["test"])
    assert [path.name for path in written] == [
        "captions_test2014_onceover_results.json",
        "onceover_results.zip",
    ]
    with zipfile.ZipFile(written[1]) as archive:
        assert sorted(archive.namelist()) == [
            "captions_test2014_onceover_results.json",
            "captions_val2014_onceover_results.json",
        ]
        found = json.loads(archive.read("captions_val2014_onceover_results.json"))
    assert len(found) == 40_504 and found[7] == {"image_id": 7, "caption": "a dog of 7"}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json", ".zip"]


def test_what_the_server_would_refuse_is_an_error_before_anything_is_written(
    tmp_path, server, monkeypatch
):
    monkeypatch.setattr(results, "SERVER_IMAGES", {"val": 404, "test": 407})
    server = {split: of[: results.SERVER_IMAGES[split]] for split, of in server.items()}
    whole = captions(server["val"])
    for given, of, message in (
        (
            {k: v for k, v in whole.items() if k != 12},
            server["val"],
            "images without a caption: 1, for example 12",
        ),
        (whole | {99_999: "a"}, server["val"], "captions of other images: 1, for example 99999"),
        (whole, server["val"][:-1], "all 404 images of val2014"),
        (whole, [Image(0, "val2017/000000000000.jpg", Path("a"), "all", ())], "of val2014"),
        (whole, [*server["val"][:-1], server["test"][-1]], "of val2014"),
    ):
        with pytest.raises(DataError, match=message):
            write_server(tmp_path, "ours", given, of)
    with pytest.raises(DataError, match="a name of letters"):
        write_server(tmp_path, "../ours", whole, server["val"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(results, "SERVER_ZIP_BYTES", 1000)
    write_server(tmp_path, "ours", whole, server["val"])
    with pytest.raises(DataError, match="the server accepts 1,000"):
        write_server(tmp_path, "ours", captions(server["test"]), server["test"])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".json"]
