"""The tensors of a TorchScript archive (OpenAI's published .pt files), without running what is in it.

`torch.jit.load` would compile the archive's code and may call it; `torch.load` with weights_only refuses such archives.
Here only the pickle of the module's attributes is read, and of what it names only tensors, lists and empty holders are
made.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "BoolStorage"): torch.bool,
}


class _Holder:
    """A module of the archive: its attributes, and none of its code."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"attributes of type {type(state).__name__}")
        self.__dict__.update(state)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not isinstance(storage, Tensor):
        raise pickle.UnpicklingError("a tensor without a storage")
    return storage.as_strided(size, stride, offset).clone()


def _same(value: Any, *_: Any) -> Any:
    return value


_BUILDERS = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): OrderedDict,
    **{
        ("torch.jit._pickle", name): _same
        for name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
    },
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Only what stands in the tables above; a class of the archive's own becomes a holder."""
        if module.split(".")[0] == "__torch__":
            return _Holder
        found = _DTYPES.get((module, name)) or _BUILDERS.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage that a tensor is a view of."""
        _, dtype, key, *_ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:] == ["constants.pkl"] for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors among the attributes of the archive's module and its children, by dotted name, on the CPU.

    Raises pickle.UnpicklingError for an archive that names anything but modules and tensors, and what zipfile raises
    for a damaged one.
    """
    with zipfile.ZipFile(path) as archive:
        (root,) = {name.split("/")[0] for name in archive.namelist()}
        try:
            module = _Unpickler(archive, root).load()
        except (AttributeError, IndexError) as error:
            raise pickle.UnpicklingError(f"damaged: {error}") from None
    tensors: dict[str, Tensor] = {}

    def collect(holder: _Holder, prefix: str) -> None:
        for name, value in vars(holder).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _Holder):
                collect(value, f"{prefix}{name}.")

    if isinstance(module, _Holder):
        collect(module, "")
    return tensors
