"""Layers with adapters that are right for every layer of their kind, however a network uses it."""
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

PeftLayer: Any = object  # one of peft's classes stands behind it, see `adapters`


class AdaptedLayer(PeftLayer):
    """Makes the adapters of a peft layer changes of its weight: a layer in training does what it does once they are merged.

    Peft repeats a convolution without its dilation and padding mode, and layers that standardise their weight do so after an
    adapter was merged into it. Such layers are computed with their changed weight, and so are those whose weight is read by
    a network that never calls them.
    """

    @property
    def weight(self) -> Tensor:
        """The plain weight and the active adapter."""
        weight: Tensor = self.base_layer.weight
        if self.disable_adapters:  # it is merged
            return weight
        with torch.autocast(weight.device.type, enabled=False):
            return sum(map(self.get_delta_weight, self.active_adapters), weight).to(weight.dtype)

    def __getattr__(self, name: str) -> Any:  # some networks read a layer's stride, say, to pad its input
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name not in getattr(self.base_layer, "__constants__", ()):
                raise  # what others put on a layer, to manage its memory, say, is not ours to show twice
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Output of the layer with the active adapter."""
        if self.disable_adapters or is_plain(self.base_layer):
            return super().forward(x, *args, **kwargs)
        return functional_call(self.base_layer, {"weight": self.weight}, (x, *args), kwargs)


def is_plain(layer: Any) -> bool:
    """Whether a low-rank change of the weight may be computed beside the layer, which is cheaper."""
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and set(layer.dilation) == {1}
    return type(layer) is nn.Linear


def mixes_channels(layer: Any) -> bool:
    """Whether a layer multiplies by a matrix or kernel, as embeddings and norms do not."""
    other = hasattr(layer, "num_embeddings") or hasattr(layer, "normalized_shape")
    return not other and getattr(getattr(layer, "weight", None), "ndim", 0) > 1


def takes_adapter(layer: nn.Module) -> bool:
    """Whether a layer can have an adapter: an ungrouped 2D convolution, or a linear layer, that owns its weight."""
    if "weight" not in layer._parameters:  # computed from others (weight or spectral norm), and nothing can be added to it
        return False
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and (is_plain(layer) or _can_be_repeated(layer))
    return is_linear(layer)


def is_linear(layer: Any) -> bool:
    """Whether a layer keeps the matrix of a linear layer, judged by what it has: libraries have classes of their own."""
    shape = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and tuple(weight.shape) == shape


def _can_be_repeated(layer: nn.Conv2d) -> bool:
    """Whether the layer's class makes a convolution of a lower rank when it is asked as torch's is; peft does that."""
    try:
        with torch.device("meta"):
            low: Any = type(layer)(layer.in_channels, 1, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
                                   bias=False)
    except Exception:  # classes of other libraries take other arguments, and raise whatever they raise
        return False
    return low.weight.shape == (1, *layer.weight.shape[1:])
