"""Weights that dynamic VRAM streams to a network, held for as long as a gradient needs them."""
from collections.abc import Iterable, Iterator
from typing import Any

import comfy.ops
import torch

SOURCES = ("weight", "bias")  # parameters of a streamed layer, which wait in main memory; the layer works with copies


def is_streamed(layer: torch.nn.Module) -> bool:
    """Tell whether dynamic VRAM streams the weights of a layer."""
    return hasattr(layer, "_v")


class StreamedWeights:
    """Context manager: what layers were given to work with stays theirs until the context ends.

    ComfyUI gives up the video memory of a streamed weight when its layer has used it, but a gradient needs it once more.
    What does not fit into video memory is a copy of its own, which the gradient holds. networks: of a gradient.
    """

    def __init__(self, networks: Iterable[torch.nn.Module]):
        self.is_needed = any(_streamed(networks))
        self.held: list[tuple[torch.nn.Module, Any]] = []  # (layer, how ComfyUI gives its memory up)

    def __enter__(self) -> None:
        if self.is_needed:
            self._give_up, comfy.ops.uncast_bias_weight = comfy.ops.uncast_bias_weight, self._hold

    def _hold(self, layer: torch.nn.Module, weight: Any, bias: Any, stream: Any) -> None:
        if is_streamed(layer):
            self.held.append((layer, stream))
        else:
            self._give_up(layer, weight, bias, stream)

    def __exit__(self, *error: Any) -> None:
        if self.is_needed:
            comfy.ops.uncast_bias_weight = self._give_up
            for layer, stream in self.held:
                self._give_up(layer, None, None, stream)


def renew_streamed(networks: Iterable[torch.nn.Module]) -> None:
    """Have streamed weights that were made in inference mode, which autograd never accepts, transferred anew."""
    for layer in _streamed(networks):
        if any(tensor is not None and tensor.is_inference() for tensor in (getattr(layer, "_v_weight", None),
                                                                           getattr(layer, "_v_bias", None))):
            layer._v_signature = None


def _streamed(networks: Iterable[torch.nn.Module]) -> Iterator[Any]:
    return (layer for net in networks for layer in net.modules() if is_streamed(layer))
