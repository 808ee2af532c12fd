"""Weights of a network's folder: read as they were saved, laid out as the network names them, and asked for if they lack."""
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...io.files import read_safetensors
from ..guider import Guider
from .contents import weight_files

log = logging.getLogger(__name__)

MOST_TIMES, SMALL_PARTS, SMALL_NUMBERS = 4, 10_000, 2**24
SIDES = (32, 42, 56, 64, 84, 96, 112, 128, 160, 192, 224, 256, 384, 512)  # pixels; the first that fits is quickest


class Loaded(NamedTuple):
    """A network with those of its tensors that no file held."""

    net: nn.Module
    missing: dict[str, Tensor]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder's safetensors, numbers in single precision, whatever they were saved in."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor
            for file in weight_files(folder) for name, tensor in read_safetensors(file)[0].items()}


@contextmanager
def no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager: let this thread make networks of up to four times as many parameters as some weights.

    ValueError before memory is taken for more. Small networks are made in any case.
    """
    most_parts = max(MOST_TIMES * len(weights), SMALL_PARTS)
    most_numbers = max(MOST_TIMES * sum(tensor.numel() for tensor in weights.values()), SMALL_NUMBERS)
    thread, made = threading.get_ident(), [0, 0]

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == thread:
            made[:] = made[0] + 1, made[1] + parameter.numel()
            if made[0] > most_parts or made[1] > most_numbers:
                raise ValueError(f"its config.json describes more than {most_numbers:,} parameters in {most_parts:,} "
                                 f"tensors, and its files hold {len(weights)} tensors")
    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def unwrapped(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Weights without the names of one wrapper more each time, as `module.`, `_orig_mod.` or `backbone.`

    A wrapper is a first part that the names of all floating tensors share.
    """
    inner = dict(weights)
    while inner:
        first = {name.partition(".")[0] for name, tensor in inner.items() if tensor.is_floating_point()}
        if len(first) != 1 or any("." not in name for name, tensor in inner.items() if tensor.is_floating_point()):
            return
        prefix = f"{first.pop()}."
        inner = {name.removeprefix(prefix): tensor for name, tensor in inner.items() if name.startswith(prefix)}
        yield inner


def tensors_without_weights(net: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The floating tensors of these names that share no memory with another; integers are tables that a network makes."""
    own = net.state_dict()
    filled = {tensor.data_ptr() for name, tensor in own.items() if name not in names}
    return {name: own[name] for name in sorted(names)
            if own[name].is_floating_point() and own[name].data_ptr() not in filled}


@torch.no_grad()
def require_unused(guider: Guider, missing: Mapping[str, Tensor], said: str,
                   text: Callable[[], Tensor] | None = None) -> None:
    """Refuse a guider whose answer depends on tensors that no file held; those that it never reads become zeros.

    missing: name -> tensor of the network. said: the file and what it does not fit, to begin the sentence. text: the
    embedding (1, D) of any text, of a network that reads texts. ValueError with the name of one that is needed.
    """
    if not missing:
        return
    probe = _Probe(guider, missing, text)
    if probe.reaches(list(missing)):
        raise ValueError(f"{said}: {len(missing)} weights are missing, such as {probe.one_that_is_used()}; copy the folder "
                         "again")
    log.warning("%s: %d weights are missing that its answer never reads, such as %s; it guides without them", guider.name,
                len(missing), next(iter(missing)))


class _Probe:
    """A guider's answer to one small image, under different values of some of its tensors."""

    def __init__(self, guider: Guider, tensors: Mapping[str, Tensor], text: Callable[[], Tensor] | None):
        self.guider, self.tensors, self.text = guider, tensors, text
        self._fill(list(tensors), 0.0)
        self.image = self._smallest_image()
        self.plain = self._answer(self.image)

    def reaches(self, names: list[str]) -> bool:
        """Whether the answer changes with these tensors: NaN passes through sums, and another number through comparisons."""
        return any(self._changes(names, value) for value in (float("nan"), 1.0))

    def one_that_is_used(self) -> str:
        """The name of a tensor that the answer depends on, where it depends on them all together."""
        names = list(self.tensors)
        while len(names) > 1:
            half = names[:len(names) // 2]
            names = half if self.reaches(half) else names[len(half):]
        return names[0]

    def _changes(self, names: list[str], value: float) -> bool:
        self._fill(names, value)
        try:
            return not all(map(_alike, self._answer(self.image), self.plain))
        except Exception:  # an index made of NaN ends in errors of all kinds
            return True
        finally:
            self._fill(names, 0.0)

    def _fill(self, names: list[str], value: float) -> None:
        for name in names:
            self.tensors[name].fill_(value)

    def _answer(self, image: Tensor) -> list[Tensor]:
        prompt = [self.text()] if self.text else []
        asked = prompt if self.guider.task == "mask" else []
        return [self.guider.net(image, image.new_zeros(1), *asked), *prompt]

    def _smallest_image(self) -> Tensor:
        own = self.guider.preprocess(torch.zeros(1, 3, 64, 64)).shape[-2:]
        for side in (side for side in SIDES if side**2 < own[0] * own[1]):
            image = _smooth(side, side)
            try:
                self._answer(image)
            except Exception:  # each network says in its own way that it wants another size
                continue
            return image
        return _smooth(*own)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether outputs differ by rounding at most; NaN differs."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def _smooth(height: int, width: int) -> Tensor:
    """An image (1, 3, height, width) of different values everywhere."""
    return torch.linspace(-2, 2, 3 * height * width).sin().reshape(1, 3, height, width)
