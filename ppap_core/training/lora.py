"""Low-rank changes of a network's layers that work beside the weights and leave them as they are."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LoraUpdate:
    """scale * up @ down, to be added to a layer's weight (out, in) or (out, in, k, k): up (out, r), down (r, in[, k, k])."""

    up: Tensor
    down: Tensor
    scale: float = 1.0
    rows: tuple[int, int] | None = None  # first and count, where a layer's weight holds several that were once separate

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What it adds to the output of the layer, for its own rows."""
        up, down = self.up.to(x), self.down.to(x)
        if down.ndim == 2:
            return self.scale * F.linear(F.linear(x, down), up)
        low = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
        return self.scale * F.conv2d(low, up[:, :, None, None])


Adapters = dict[str, Sequence[LoraUpdate]]  # by the name of a layer


@contextmanager
def with_adapters(net: nn.Module, changes: Adapters) -> Iterator[None]:
    """In here the layers of a network behave as if their weights had these changes. ValueError for what is no such layer."""
    layers = dict(net.named_modules())
    for name in changes:
        if not supports_lora(layers.get(name)):
            raise ValueError("a low-rank change is for Linear layers and for Conv2d layers that are ungrouped and padded by "
                             f"zeros, and {name} is {layers.get(name, 'no layer of the network')}")
    hooks = [layers[name].register_forward_hook(partial(_add, parts)) for name, parts in changes.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def supports_lora(layer: nn.Module | None) -> bool:
    """Whether a layer can have a low-rank change."""
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear) or plain


def _add(parts: Sequence[LoraUpdate], layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    across = -1 if isinstance(layer, nn.Linear) else 1
    output = output.clone()  # a layer may hand out what others still need
    for part in parts:
        output.narrow(across, *(part.rows or (0, output.shape[across]))).add_(part(layer, inputs[0]))
    return output
