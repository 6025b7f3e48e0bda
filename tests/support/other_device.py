"""A device on a machine that has none: a GPU that is the CPU in disguise.

Within `other_device()` tensors on the device "meta" have values, and behave towards
those of the CPU as a GPU's do: an operation on both raises, unless one is a number.
Whatever is made without a device is the CPU's, so that code which forgets to say
where fails here as it would there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
ATEN = torch.ops.aten
MOVES = {ATEN.copy_.default, ATEN._to_copy.default}
INDEXED = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default}


class There(Tensor):
    """A tensor on the other device; its values are those of `here`."""

    @staticmethod
    def __new__(cls, here):
        made = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.here = here
        return made

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if not all(issubclass(each, Tensor) for each in types):
            return NotImplemented  # A toolkit's own type knows what to do.
        if function == Tensor.data.__set__:
            args[0].here = args[1].here
        if function is Tensor.tolist:
            return args[0].here.tolist()
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            args = args[0], _indices(args[1]), *args[2:]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("used outside other_device()")

    def __repr__(self):
        return f"There({self.here})"


def _indices(index):
    """Lists as tensors: torch gives those that it makes for "meta" no values."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index) if isinstance(index, list) else index


class _Makers(TorchFunctionMode):
    """Gives values to tensors of data on the other device, which torch leaves out."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and "device" in kwargs:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


class _Machine(TorchDispatchMode):
    """Runs what happens on the other device.

    Args:
        lacks: A dtype that the device does not have.
    """

    def __init__(self, lacks=None):
        super().__init__()
        self.lacks = lacks

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        values, _ = tree_flatten((args, kwargs))
        there = any(isinstance(value, There) for value in values)
        device = kwargs.get("device")
        if device is not None:
            there = device == DEVICE
            kwargs["device"] = torch.device("cpu")
        elif there and function not in MOVES:
            self._check(function, args, values)
        if function is ATEN.copy_.default:
            there = isinstance(args[0], There)
        results = function(*tree_map(_here, args), **tree_map(_here, kwargs))
        if not there:
            return results
        if function._schema.is_mutable:
            # What an operation changes in place it returns.
            return kwargs.get("out", args[0])
        return tree_map(self._there, results)

    def _there(self, value):
        if not isinstance(value, Tensor):
            return value
        if value.dtype is self.lacks:
            raise TypeError(f"the device has no {value.dtype}")
        return There(value)

    def _check(self, function, args, values):
        if function in INDEXED:  # Indices may be the CPU's.
            values = tree_flatten((args[0], args[2:]))[0]
        strangers = [
            value
            for value in values
            if isinstance(value, Tensor) and not isinstance(value, There) and value.ndim
        ]
        if strangers or any(isinstance(value, torch.Generator) for value in values):
            raise RuntimeError(
                f"{function}: expected all tensors to be on the same device, found "
                f"{DEVICE} and cpu"
            )


def _here(value):
    return value.here if isinstance(value, There) else value


@contextmanager
def other_device(lacks: torch.dtype | None = None) -> Iterator[torch.device]:
    """The device, with values, within the block."""
    with _Makers(), _Machine(lacks):
        yield DEVICE


def moved(module: nn.Module) -> nn.Module:
    """Move a module to the other device, in place; within the block."""
    for each in module.modules():
        for name, value in list(each._parameters.items()):
            if value is not None:
                made = There(value.detach().clone())
                each._parameters[name] = nn.Parameter(made, value.requires_grad)
        for name, value in list(each._buffers.items()):
            if value is not None:
                each._buffers[name] = There(value.detach().clone())
    return module
