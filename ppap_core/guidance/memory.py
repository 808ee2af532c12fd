"""Memory that the gradient of a guider needs, found by running it on tensors without values."""
import copy
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..guiders.guider import Guider
from ..io.storage import storages
from .gradients import energy_at


def gradient_bytes(guider: Guider, shape: tuple[int, ...], compute_dtype: torch.dtype | None = None) -> int:
    """Bytes that autograd keeps between the energy of images and its gradient, without the weights.

    shape: of what the guider looks at, (B, C, H, W). compute_dtype: type that the network computes in; None or float32: as
    it is. The backward pass itself needs up to as much again, usually a fifth.
    """
    saved: dict[int, torch.UntypedStorage] = {}  # by address; held, so that no other storage gets the same one
    with torch.inference_mode(False), torch.enable_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake, weights = _fake_guider(guider, mode)
        with mode:
            point = torch.zeros(shape, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(partial(_record_storage, saved), _unchanged):
            energy_at(fake, point, torch.ones(shape[0]), compute_dtype)
    own = {weight.untyped_storage()._cdata for weight in weights}
    return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


def _record_storage(saved: dict[int, torch.UntypedStorage], tensor: Tensor) -> Tensor:
    saved.update((storage._cdata, storage) for storage in storages(tensor))
    return tensor


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _fake_guider(guider: Guider, mode: FakeTensorMode) -> tuple[Guider, list[Tensor]]:
    """The guider with networks of fake weights, and these weights."""
    net, weights = _to_fake(guider.net, mode)
    if isinstance(guider.decode, MethodType) and guider.decode.__self__ is guider.net:  # such as a bank's stems
        return replace(guider, net=net, decode=getattr(net, guider.decode.__name__)), weights
    decode, decoder_weights = _to_fake(guider.decode, mode)
    return replace(guider, net=net, decode=decode), weights + decoder_weights


def _to_fake(net: Any, mode: FakeTensorMode) -> tuple[Any, list[Tensor]]:
    """A copy of a network with fake weights, which have a shape but no values, and these weights; functions have none."""
    if not isinstance(net, nn.Module):
        return net, []
    tensors = [*net.parameters(), *net.buffers()]
    with mode:
        empty = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    weights = [nn.Parameter(fake, requires_grad=False) if isinstance(real, nn.Parameter) else fake
               for real, fake in zip(tensors, empty, strict=True)]
    replaced = {id(real): fake for real, fake in zip(tensors, weights, strict=True)}
    return copy.deepcopy(net, replaced), weights
