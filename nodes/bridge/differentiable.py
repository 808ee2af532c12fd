"""What ComfyUI's networks do otherwise while a gradient passes through them."""
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def kernels_in_torch() -> Iterator[None]:
    """Context manager: fused kernels of attention, which have no gradient, are computed by torch, which has one."""
    try:
        import comfy_kitchen
        from comfy_kitchen.backends.eager import rope
    except ImportError:  # older versions of ComfyUI have no such kernels
        yield
        return
    fused = {name: kernel for name, kernel in vars(comfy_kitchen).items() if inspect.isfunction(vars(rope).get(name))}
    plain = {name: vars(rope)[name] for name in fused}
    try:
        vars(comfy_kitchen).update(plain)
        yield
    finally:
        vars(comfy_kitchen).update(fused)


class OutputsThatLearn(TorchFunctionMode):
    """Context manager: operations that write into a tensor by `out=`, which have no gradient, change it in place instead."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if not isinstance(out := kwargs.pop("out", None), torch.Tensor):
            return func(*args, **kwargs) if out is None else func(*args, **kwargs, out=out)
        return out.copy_(func(*args, **kwargs))


class _Held(WeakKeyDictionary):
    """Saved tensors that stay in memory when they are deleted here."""

    def __init__(self) -> None:
        super().__init__()
        self.deleted: list[torch.Tensor] = []

    def __delitem__(self, key: Any) -> None:
        self.deleted.append(self[key])
        super().__delitem__(key)


@contextmanager
def mutation_allowed() -> Iterator[None]:
    """Context manager: networks may change in place what autograd has saved.

    torch copies a saved tensor before it is changed, lets go of it, and knows it by the identity, address and version of
    the object. A later tensor can have all three and would be given the wrong copy, and so a wrong gradient, without an
    error. Here the originals are held until the pass ends.
    """
    with torch.autograd.graph.allow_mutation_on_saved_tensors() as context:
        context.original = _Held()
        yield
