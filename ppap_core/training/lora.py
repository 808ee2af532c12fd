"""Low-rank updates of a network's layers that work beside the weights and leave them as they are."""
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LoraUpdate:
    """scale * up @ down, added to a layer's weight (out, in) or (out, in, k, k) (Hu et al. 2021)."""

    up: Tensor                           # (out, r)
    down: Tensor                         # (r, in) or (r, in, k, k)
    scale: float = 1.0                   # 0 changes nothing
    rows: tuple[int, int] | None = None  # (first, count) of the rows updated, where a weight joins several; None: all

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """The update of a layer's output for an input x, in the updated rows."""
        up, down = self.up.to(x), self.down.to(x)
        if down.ndim == 2:
            return self.scale * F.linear(F.linear(x, down), up)
        low = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
        return self.scale * F.conv2d(low, up[:, :, None, None])


Adapters = Mapping[str, Sequence[LoraUpdate]]
"""Updates by the name of a layer."""


@contextmanager
def with_adapters(net: nn.Module, adapters: Adapters) -> Iterator[None]:
    """Context manager: add low-rank updates to the layers of a network by forward hooks.

    ValueError for a name of no layer, and for a layer that cannot be updated.
    """
    layers = named_layers(net)
    for name in adapters:
        if not supports_lora(layers.get(name)):
            raise ValueError("low-rank updates are for Linear layers and for Conv2d layers that are ungrouped and padded by "
                             f"zeros, and {name} is {layers.get(name, 'no layer of the network')}")
    hooks = [layers[name].register_forward_hook(partial(_add, updates)) for name, updates in adapters.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def named_layers(net: nn.Module) -> dict[str, Any]:
    """Layers of a network by name; torch.compile around one of them leaves the names as they were."""
    return {name.replace("_orig_mod.", ""): layer for name, layer in net.named_modules()}


def supports_lora(layer: Any) -> bool:
    """Whether a layer can have a low-rank update: a linear layer, or an ungrouped 2D convolution padded by zeros.

    Judged by what the layer has and not by its class: quantised and streamed layers are of their loaders' own classes.
    """
    ndim = getattr(getattr(layer, "weight", None), "ndim", 0)
    if ndim == 2:
        return hasattr(layer, "in_features") and hasattr(layer, "out_features")
    return (ndim == 4 and hasattr(layer, "stride") and not getattr(layer, "transposed", True)
            and layer.groups == 1 and layer.padding_mode == "zeros")


def _add(updates: Sequence[LoraUpdate], layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    output = output.clone()  # a layer may return a tensor that others still need
    for update in updates:
        channels = -1 if update.down.ndim == 2 else 1
        rows = update.rows or (0, output.shape[channels])
        output.narrow(channels, *rows).add_(update(layer, inputs[0]))
    return output
