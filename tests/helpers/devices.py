"""Devices that can do less than a CPU, made by refusing on the CPU what they refuse."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

AA = "_aa"


class Refusing(TorchDispatchMode):
    """A device on which some operators are not implemented; keeps the names of those that ran."""

    def __init__(self, *parts: str):
        super().__init__()
        self.parts, self.ran = parts, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if any(part in name for part in self.parts):
            raise NotImplementedError(f"The operator '{name}' is not currently implemented for this device")
        self.ran.append(name)
        return self.checked(name, function(*args, **(kwargs or {})))

    def checked(self, name, result):
        return result


class WithoutDoubles(Refusing):
    """A device that knows no float64, as Apple's."""

    def checked(self, name, result):
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            raise TypeError(f"Cannot convert a tensor to float64: {name} made one, and this device knows none")
        return result
