"""Backbones with one network, whose weights come from a file, and its precision."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from models import ModelError
from models.backbones.interface import Backbone

# The first convolutions always run in fp32. They subtract nearly equal neighbouring pixels, for
# which bf16 has too few bits. For mobilenetv2_100, the smallest cosine similarity between a row and
# its fp32 value rises from 0.990 to 0.999.
FP32_CONVOLUTIONS = 2
COUNTER = "num_batches_tracked"  # a buffer of batch normalisation that inference does not use
BF16 = f"bf16, first {FP32_CONVOLUTIONS} convolutions fp32"  # recorded in caches


class NetworkBackbone(Backbone):
    """A backbone with one network.

    network: the network without the layers that regions do not need.
    classifier: names of the layers that weight files contain and the network does not.
    """

    def __init__(self, name: str, network: nn.Module, classifier: tuple[str, ...]) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.classifier = classifier

    def weights(self) -> Mapping[str, Tensor]:
        return self.network.state_dict()

    def without_prefix(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
        """Remove the prefix that a wrapper or a larger model added to the keys of the weights.

        Wrappers add a prefix to all keys: `_orig_mod.` (torch.compile), `module.` (DataParallel),
        `model.` (Lightning). Of the prefixes that all keys share, this removes the one that gives
        most keys of the backbone. If the keys share no prefix, the backbone may be a part of a
        larger model; then this selects the tensors of that part.

        Returns the tensors with the backbone's keys, and the prefix ("" if there is none).
        Raises ModelError if several parts have all keys of the backbone.
        """
        # n_averaged is the counter of torch's AveragedModel.
        tensors = {key: value for key, value in tensors.items() if key != "n_averaged"}
        names = [key for key in tensors if not self._is_classifier(key)]
        first, last = min(names, default="").split("."), max(names, default="").split(".")
        pairs = zip(first[:-1], last[:-1], strict=False)
        shared = [part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        if not shared and (prefix := self._prefix_in_larger_model(tensors)):
            part = {key: value for key, value in tensors.items() if key.startswith(prefix)}
            return {key.removeprefix(prefix): value for key, value in part.items()}, prefix
        prefixes = ["".join(f"{part}." for part in shared[:n]) for n in range(len(shared) + 1)]
        expected = self.network.state_dict()
        best = max(
            prefixes,
            key=lambda prefix: sum(name.removeprefix(prefix) in expected for name in names),
        )
        return {key.removeprefix(best): value for key, value in tensors.items()}, best

    def _prefix_in_larger_model(self, tensors: Mapping[str, Tensor]) -> str:
        """The prefix under which a larger model has all weights of the backbone; "" if none."""
        keys = [key for key in self.network.state_dict() if not key.endswith(COUNTER)]
        if not keys or all(key in tensors for key in keys):
            return ""
        prefixes = {key[: -len(keys[0])] for key in tensors if key.endswith(f".{keys[0]}")}
        complete = sorted(p for p in prefixes if all(p + key in tensors for key in keys))
        if len(complete) > 1:
            raise ModelError(
                f"the backbone's weights occur under several prefixes ({', '.join(complete)}); "
                "save one of them alone"
            )
        return complete[0] if complete else ""

    def _is_classifier(self, key: str) -> bool:
        return key.startswith(tuple(f"{name}." for name in self.classifier))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], origin: str) -> list[str]:
        """Load weights strictly, except for tensors of the classifier.

        origin: the source of the weights, for the error message.
        Returns the names of the classifier's tensors, which are ignored.
        Raises ModelError if names or shapes do not fit.
        """
        ignored = sorted(filter(self._is_classifier, tensors))
        expected = self.network.state_dict()
        weights = {key: value for key, value in tensors.items() if key not in ignored}
        for key in expected:  # older files lack this counter, and a frozen network does not use it
            if key.endswith(COUNTER):
                weights.setdefault(key, expected[key])
        if problems := _differences(weights, expected):
            raise ModelError(f"{origin} does not fit backbone {self.name}: {problems}")
        self.network.load_state_dict(weights)
        return ignored

    def digest(self) -> str:
        """SHA-256 over names, shapes and values of the weights, first 16 hex digits.

        It does not depend on the source of the weights, such as a file or the hub.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self.network.state_dict().items()):
            if not key.endswith(COUNTER):
                digest.update(f"{key} {list(value.shape)} ".encode())
                digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@contextlib.contextmanager
def first_convolutions_in_fp32(network: nn.Module) -> Iterator[None]:
    """Make the first convolutions of the forward pass inside the context run in fp32."""
    convolutions: list[nn.Module] = []  # in the order of the forward pass
    hooks = [
        module.register_forward_pre_hook(lambda module, _: convolutions.append(module))
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
    ]
    yield
    for hook in hooks:
        hook.remove()
    for module in list(dict.fromkeys(convolutions))[:FP32_CONVOLUTIONS]:
        module.forward = functools.partial(_in_fp32, module.forward)


def _differences(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Describe how names and shapes of weights differ from the expected ones; "" if they fit."""
    missing = [key for key in expected if key not in weights]
    unknown = [key for key in weights if key not in expected]
    problems = [f"it lacks {key}" for key in missing]
    problems += [f"it has {key}, which the backbone does not have" for key in unknown]
    problems += [
        f"{key} is {list(weights[key].shape)}, the backbone's is {list(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    text = "; ".join(problems[:3])
    if len(problems) > 3:
        text += f" (and {len(problems) - 3} more)"
    if not (missing and unknown):
        return text
    for key in unknown:
        if same := next((name for name in missing if key.endswith(f".{name}")), None):
            return f"{text}; its key {key} is the backbone's {same} under another name"
    return f"{text}; its keys are like {unknown[0]}, the backbone's like {missing[0]}"


def _in_fp32(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        return forward(images.float())
