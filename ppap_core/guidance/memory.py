"""How much memory the gradient of a guider needs, found without computing anything."""
import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..guiders.guider import Guider
from .gradients import energy_at


def gradient_bytes(guider: Guider, shape: tuple[int, ...], compute: torch.dtype | None = None, without: tuple = ()) -> int:
    """Bytes that autograd keeps between the energy of images (B, 3, H, W) and its gradient, beside the weights.

    Counted on tensors that have a shape and no numbers. compute: the type the network computes in. without: objects that
    hang on the network and are not part of it. The backward pass itself needs up to as much again, usually a fifth.
    """
    from torch._subclasses import FakeTensorMode

    with torch.inference_mode(False), torch.enable_grad():
        mode, kept = FakeTensorMode(allow_non_fake_inputs=True), {}
        net, weights = _to_fake(guider.net, mode, without)
        decode = guider.decode
        if isinstance(decode, nn.Module):
            decode, more = _to_fake(decode, mode, without)
            weights += more
        elif getattr(decode, "__self__", None) is guider.net:
            decode = getattr(net, decode.__name__)
        with mode:
            point = torch.zeros(shape, requires_grad=True)

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage  # held, so that no other gets its number
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            energy_at(replace(guider, net=net, decode=decode), point, torch.ones(shape[0]), compute)
    own = {weight.untyped_storage()._cdata for weight in weights}
    return sum(storage.nbytes() for number, storage in kept.items() if number not in own)


def _to_fake(net: nn.Module, mode, without: tuple) -> tuple[nn.Module, list[Tensor]]:
    """A copy of a network whose weights have no numbers, and these weights; what the network does cannot change it."""
    tensors = [*net.parameters(), *net.buffers()]
    with mode:
        empty = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors]
    hollow = [nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
              for old, new in zip(tensors, empty, strict=True)]
    known = {id(old): new for old, new in zip(tensors, hollow, strict=True)}
    return copy.deepcopy(net, known | {id(each): None for each in without}), hollow
