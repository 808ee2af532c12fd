"""Plain tensors behind tensors of other classes, such as quantised weights, which have no storage of their own."""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

is_wrapper = is_traceable_wrapper_subclass


def stored_tensors(tensor: Any) -> list[Tensor]:
    """Return the plain tensors that hold the values of a tensor: those inside it, if it wraps others, or itself."""
    if not is_wrapper(tensor):
        return [tensor.as_subclass(Tensor)]
    names, _ = tensor.__tensor_flatten__()
    return [stored for name in names for stored in stored_tensors(getattr(tensor, name))]


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Return the storages of a tensor; a wrapper has one for each tensor inside it."""
    return [stored.untyped_storage() for stored in stored_tensors(tensor)]


def independent_copy(tensor: Any, device: torch.device | None = None) -> Any:
    """Copy a tensor with all that it wraps, and never as a view; a frozen parameter of a parameter.

    device: of the copy; None: that of the tensor. Tensors whose own `clone` and `detach` do not copy are copied as well.
    """
    if is_wrapper(tensor):
        return _like(tensor, _rewrapped(tensor, partial(independent_copy, device=device)))
    copied = Tensor.detach(tensor).as_subclass(Tensor).to(device or tensor.device, copy=True)
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        copied = copied.as_subclass(type(tensor))
        vars(copied).update(vars(tensor))
    return _like(tensor, copied)


def rewrapped(tensor: Any) -> Any:
    """Wrap anew what a wrapper holds, without a copy of it; made outside inference mode, autograd accepts it."""
    return _like(tensor, _rewrapped(tensor, lambda part: part))


def _rewrapped(tensor: Any, change: Callable[[Tensor], Tensor]) -> Any:
    names, context = tensor.__tensor_flatten__()
    parts = {name: change(getattr(tensor, name)) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


def _like(tensor: Any, copied: Any) -> Any:
    is_parameter = isinstance(tensor, nn.Parameter) and not isinstance(copied, nn.Parameter)
    return nn.Parameter(copied, requires_grad=False) if is_parameter else copied


def named_tensors(net: nn.Module) -> dict[str, Any]:
    """Return the state dict of a network, with its tensors wherever a layer saves a stand-in without values."""
    held = {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}
    return {name: held.get(name, saved) if getattr(saved, "is_meta", False) else saved
            for name, saved in net.state_dict().items()}
