"""A pretended GPU: tensors that say `cuda:0` and compute on the CPU.

The code that branches on the device then takes its GPU branch on every machine. As on a GPU, an
operation refuses tensors of two devices, `.numpy()` is refused, and `no_host_sync` refuses what a
CUDA graph cannot capture: to read a value, a shape that depends on values, and a copy from or to
the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
READS = (
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.equal.default, aten.is_nonzero.default,
)  # fmt: skip
# operations that take tensors of the CPU beside those of a GPU
MIXING = (aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default)


class GpuTensor(Tensor):
    """A tensor with values on the CPU whose device is `GPU`."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> GpuTensor:
        self = Tensor._make_wrapper_subclass(
            cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, device=GPU
        )
        self.host = host
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any], may_read: bool = True) -> Any:
    """Run an operation on the values; its results are on the GPU if its arguments are."""
    tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)]
    on_gpu = [part for part in tensors if isinstance(part, GpuTensor)]
    on_cpu = [part for part in tensors if not isinstance(part, GpuTensor) and part.ndim]
    device = kwargs.get("device")
    if on_gpu and on_cpu and func not in MIXING:
        raise AssertionError(f"{func} of tensors on the CPU and on the GPU")
    if not may_read and on_gpu:
        leaves = device is not None and torch.device(device).type != "cuda"
        if func in READS or on_cpu or leaves or _reads_a_mask(func, args):
            raise AssertionError(f"{func}: the host waits for the GPU")
    if not may_read and on_cpu and device is not None and torch.device(device).type == "cuda":
        raise AssertionError(f"{func}: a copy from the host")
    target_is_gpu = bool(on_gpu) if device is None else torch.device(device).type == "cuda"
    if func is aten.copy_.default:
        target_is_gpu = isinstance(args[0], GpuTensor)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    host_args, host_kwargs = tree_map_only(GpuTensor, lambda part: part.host, (args, kwargs))
    result = func(*host_args, **host_kwargs)
    changed = func._schema.name.endswith("_") and not func._schema.name.endswith("__")
    if changed and tensors:
        return args[0]
    if not target_is_gpu:
        return result
    return tree_map_only(Tensor, GpuTensor, result)


def _reads_a_mask(func: Any, args: Any) -> bool:
    if func not in (aten.index.Tensor, aten.index_put_.default):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


class _Operations(TorchDispatchMode):
    def __init__(self, may_read: bool) -> None:
        super().__init__()
        self.may_read = may_read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {}, self.may_read)


class _Devices(TorchFunctionMode):
    """Creates and copies tensors without asking torch for a real GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            devices = [part for part in args[1:] if isinstance(part, torch.device | str)]
            devices += [part.device for part in args[1:] if isinstance(part, Tensor)]
            devices += [kwargs["device"]] if kwargs.get("device") is not None else []
            dtypes = [part for part in args[1:] if isinstance(part, torch.dtype)]
            dtypes += [part.dtype for part in args[1:] if isinstance(part, Tensor)]
            dtypes += [kwargs["dtype"]] if kwargs.get("dtype") is not None else []
            tensor = args[0].to(dtypes[0]) if dtypes else args[0]
            if not devices or torch.device(devices[0]).type == tensor.device.type:
                return tensor
            return aten._to_copy.default(tensor, device=torch.device(devices[0]))
        if func is Tensor.cpu:
            return aten._to_copy.default(args[0], device=torch.device("cpu"))
        device = kwargs.get("device")
        is_operation = isinstance(func, torch._ops.OpOverload)  # `_Operations` handles it
        if not is_operation and device is not None and torch.device(device).type == "cuda":
            made = func(*args, **{**kwargs, "device": "cpu"})
            return made if isinstance(made, GpuTensor) else GpuTensor(made)
        return func(*args, **kwargs)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside this context, tensors can be created on and moved to `GPU`."""
    torch._C._ensureCUDADeviceGuardSet()  # as FakeTensorMode: torch needs no driver
    with _Operations(may_read=True), _Devices():
        yield


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Inside `pretended_gpu`: raises AssertionError where the host would wait for a GPU."""
    with _Operations(may_read=False), _Devices():
        yield


def move(module: nn.Module) -> nn.Module:
    """Move the weights and buffers of a module to the pretended GPU, in place."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                moved = GpuTensor(weight.detach())
                part._parameters[name] = nn.Parameter(moved, weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = GpuTensor(buffer)
    return module
