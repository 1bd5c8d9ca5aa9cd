"""A GPU that is none: its tensors say they are on "cuda:0" and compute on the CPU, and what would go wrong on a real
one raises: tensors of both devices in one operator, and, where that is not allowed, waiting for the device.

The tensors are PyTorch's fake tensors, each with a real one behind it. Backward passes are not pretended.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
VALUES = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
# Triton's kernels cannot run here: of their results only shapes are known.
UNKNOWN = "goal_ray"


class MixedDevices(Exception):
    """One operator was given tensors of the host and of the GPU."""


class WaitsForTheDevice(Exception):
    """The host would have to wait until the GPU has done all its work."""


class _PretendedGpu(FakeTensorMode):
    def __init__(self, may_wait: bool):
        super().__init__(allow_non_fake_inputs=True)
        self.may_wait = may_wait

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is torch.ops.aten.to:  # in inference mode; `_to_copy`, or nothing, elsewhere
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        wanted = kwargs.get("device")
        if not there and (wanted is None or torch.device(wanted).type != "cuda"):
            return func(*args, **kwargs)
        self.check(func, tensors, there, args, kwargs)
        to_host = wanted is not None and torch.device(wanted).type == "cpu"
        if func.namespace in (UNKNOWN, "prim") or any(tensor.real_tensor is None for tensor in there):
            return super().__torch_dispatch__(func, types, args, kwargs)
        real_args, real_kwargs = tree_map_only(FakeTensor, lambda tensor: tensor.real_tensor, (args, kwargs))
        if "device" in kwargs:
            real_kwargs["device"] = torch.device("cpu")
        result = func(*real_args, **real_kwargs)
        if (
            torch.Tag.inplace_view in func.tags
        ):  # such as squeeze_: the fake tensor changes its shape as the real one did
            return super().__torch_dispatch__(func, types, args, kwargs)
        given = {id(tensor.real_tensor): tensor for tensor in there} | {id(tensor): tensor for tensor in tensors}
        return tree_map_only(Tensor, lambda real: given.get(id(real), real if to_host else self.wrap(real)), result)

    def check(self, func: Any, tensors: list[Tensor], there: list[FakeTensor], args: Any, kwargs: Any) -> None:
        """Raises for what a GPU would refuse, or wait for."""
        here = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        if func in COPIES:
            wanted = kwargs.get("device")
            crosses = bool(here and there) or (
                wanted is not None and (torch.device(wanted).type == "cuda") == bool(here)
            )
            waits = crosses and not (kwargs.get("non_blocking") or args[-1] is True)
        else:
            index = func.name().startswith("aten::index")  # takes indices on the host, and copies them
            if there and not index and any(tensor.dim() for tensor in here):
                raise MixedDevices(f"{func}: {[(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]}")
            masks = index and any(tensor.dtype == torch.bool for tensor in tensors[1:])
            waits = func in VALUES or masks or (index and any(tensor.dim() for tensor in here))
        if waits and not self.may_wait:
            raise WaitsForTheDevice(str(func))

    def wrap(self, real: Tensor) -> FakeTensor:
        """The GPU's tensor for a real one."""
        with torch.inference_mode(False), _disable_current_modes():
            shape = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta")
            return FakeTensor(self, shape, GPU, real_tensor=real)


@contextmanager
def pretended_gpu(may_wait: bool = False) -> Iterator[None]:
    """Inside, tensors and modules may go to GPU."""
    with pytest.MonkeyPatch.context() as patch, _PretendedGpu(may_wait):
        patch.setattr(nn.Module, "to", move)  # PyTorch's own does not change real parameters to fake ones
        yield


def move(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`nn.Module.to`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = convert(parameter.data, *args, **kwargs)
                part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = convert(buffer, *args, **kwargs)
    return module


def convert(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, with a memory format for pictures alone, as modules have it, and never waiting."""
    if tensor.dim() != 4:
        kwargs.pop("memory_format", None)
    return tensor.to(*args, **{**kwargs, "non_blocking": True})
