"""Inner features of a MODEL's network, in the core's convention: where they are, and the passes that end there."""
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.model_base
import comfy.samplers
from torch import Tensor, nn

from . import latents, noise_levels
from .shared_weights import uncompiled

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
UNREAD = ("area", "control")  # parts of a conditioning that features are read without
COARSEST = 64  # places of a latent along one side that a place of a map may stand for
PATCHES = (1, 2, 16, 32)  # and a token, in transformers of latents and of pixels; fewer sizes mistake fewer texts for maps


class _ReachedError(BaseException):
    """Ends a pass at the features; no `except Exception` of another pack may take it for a failure."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.features = features


class InnerFeatures:
    """Inner features of a sampling's model under its positive conditioning.

    The first positive conditioning that acts at the noise level counts, for the whole picture and without ControlNets.
    model: as samplers have it. options: its model_options. positive: of the sampling, prepared by ComfyUI.
    """

    def __init__(self, model: comfy.model_base.BaseModel, options: dict, positive: Sequence[Mapping] | None):
        self.model, self.options = model, {key: value for key, value in options.items() if key != "multigpu_clones"}
        self.positive = [{key: value for key, value in cond.items() if key not in UNREAD} for cond in positive or ()]

    def read(self, place: str, x: Tensor, sigma: Tensor) -> Tensor:
        """Run the model as far as one of its modules, and return the features there: (B, D, h, w) or (B, N, D).

        ValueError if the network has no such module, or does not ask it.
        """
        with _hooked([layer_at(self.model.diffusion_model, place)], partial(_end, _sizes(x))):
            for cond in self.positive:
                try:
                    self.run(cond, x, sigma)
                except _ReachedError as reached:
                    return reached.features
        raise ValueError(f"the features at {place} were not computed at sigma {float(sigma[0]):.4g}: expected a positive "
                         "conditioning there, and nothing on the model that answers in its place, as a cache does")

    def run(self, cond: Mapping, x: Tensor, sigma: Tensor) -> None:
        """Run the model on noisy states in the core's convention, with one conditioning."""
        state, level = noise_levels.from_ve(self.model.model_sampling, x, sigma)
        state = latents.with_axes(state, self.model.latent_format.latent_dimensions)
        with uncompiled():  # compiled layers call no hooks that came later
            comfy.samplers.calc_cond_batch(self.model, [[dict(cond)]], state, level, self.options)

    def find(self, x: Tensor, sigma: Tensor, as_map: bool) -> tuple[str, Tensor]:
        """Run the whole model once; return the name of the module whose features tell most, and an example of them.

        as_map: whether only features that are a map will do. ValueError where there are none.
        """
        layers = blocks_of(self.model.diffusion_model)
        found: dict[nn.Module, Tensor] = {}
        with _hooked(layers.values(), partial(_keep, found, _sizes(x))):
            self.run(self.positive[0], x, sigma)
        return best_place({name: found[layer] for layer, name in zip(layers.values(), layers, strict=True)
                           if layer in found}, as_map)


def layer_at(net: nn.Module, place: str) -> nn.Module:
    """Return a module of a network by its name. ValueError if it has none of that name."""
    try:
        return net.get_submodule(place)
    except AttributeError as error:
        raise ValueError(f"this readout reads features at {place}, which this model does not have: use it with the model "
                         "that it was distilled on, or distil another one for this model") from error


def blocks_of(net: nn.Module) -> dict[str, nn.Module]:
    """Modules by name that are made of others and stand in a list or a sequence: the blocks of any network, and more."""
    parents = {name: parent for name, parent in net.named_modules() if isinstance(parent, CONTAINERS)}
    return {f"{name}.{child}" if name else child: layer for name, parent in parents.items()
            for child, layer in parent.named_children() if any(True for _ in layer.children())}


def best_place(found: Mapping[str, Tensor], as_map: bool) -> tuple[str, Tensor]:
    """Return the module whose features tell most of what the picture will be, as measured in docs/benchmark.md.

    Where a U-Net goes down and up again it is the last at the bottom; in a transformer, whose blocks are alike, the middle
    one. found: features by the names of modules, in the order of the network.
    """
    blocks = {name: features for name, features in found.items()
              if not any(name.startswith(f"{other}.") for other in found if other != name)}
    maps = [_places(features) for features in blocks.values() if features.ndim == 4]
    fewest = min(maps, default=max(map(_places, blocks.values()), default=0))
    coarsest = [name for name, features in blocks.items() if features.ndim == 4 and _places(features) == fewest
                or features.ndim == 3 and not as_map and _places(features) >= fewest]
    if not coarsest:
        raise ValueError("no inner features that could be read were found in this model" +
                         (": its blocks have tokens, and no maps" if as_map and blocks else "") +
                         "; use experts, which look at its predictions")
    name = coarsest[-1 if max(maps, default=0) > fewest else len(coarsest) // 2]
    return name, blocks[name]


def in_places(output: Any, shape: tuple[int, int, int]) -> Tensor | None:
    """Features among the output of a module: the finest map (B, D, h, w) if there is one, else the most tokens (B, N, D).

    shape: (B, H, W) of what is diffused. None for an output without either.
    """
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    tensors = [part for part in parts
               if isinstance(part, Tensor) and part.is_floating_point() and part.ndim > 2 and len(part) == shape[0]]
    maps = [found for part in tensors if (found := _as_map(part, shape[1:])) is not None]
    tokens = [part for part in tensors if part.ndim == 3]
    return max(maps, key=_places, default=max(tokens, key=_places, default=None))


def _places(features: Tensor) -> int:
    """Number of places of a map (B, D, h, w), or of tokens (B, N, D)."""
    return features.shape[2:].numel() if features.ndim == 4 else features.shape[1]


def _as_map(part: Tensor, sides: tuple[int, int]) -> Tensor | None:
    if part.ndim == 3:
        size = next((size for size in _grids(sides, PATCHES) if min(size) > 1 and math.prod(size) == part.shape[1]), None)
        return part.mT.unflatten(2, size) if size else None
    if part.ndim == 5 and 1 in part.shape[1:3]:  # a time axis of length one, before or behind the channels
        part = part.squeeze(2 if part.shape[2] == 1 else 1)
    grids = _grids(sides, range(1, COARSEST + 1))
    if part.ndim != 4:
        return None
    return part if part.shape[2:] in grids else part.movedim(3, 1) if part.shape[1:3] in grids else None


def _grids(sides: tuple[int, int], sizes: Iterable[int]) -> list[tuple[int, int]]:
    """Heights and widths of maps whose places stand for squares of these sizes."""
    return [(math.ceil(sides[0] / size), math.ceil(sides[1] / size)) for size in sizes]


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return len(x), x.shape[-2], x.shape[-1]


def _end(shape: tuple[int, int, int], layer: nn.Module, inputs: Any, output: Any) -> None:
    features = in_places(output, shape)
    if features is not None:
        raise _ReachedError(features)


def _keep(found: dict[nn.Module, Tensor], shape: tuple[int, int, int], layer: nn.Module, inputs: Any, output: Any) -> None:
    features = in_places(output, shape)
    if features is not None:
        found[layer] = features.detach().clone()


@contextmanager
def _hooked(layers: Iterable[nn.Module], hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    """Context manager: call hook(module, inputs, output) behind each of these modules."""
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
