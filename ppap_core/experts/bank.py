"""Noise-range experts: one frozen network and a small LoRA adapter for each interval of noise."""
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..guiders.guider import Guider, IgnoreSigma, has_network
from ..guiders.latents import PIXELS, STEM_LAST, VIEWS, LatentSpace, Stem, View, stem_numbers
from ..io.files import with_prefix
from ..io.function_fingerprint import hashed_as
from ..io.hashing import fingerprint_network
from ..rng import seeded
from ..schedules import ExpertSchedule
from .adapters import (
    AdaptedLayers,
    LoraSpec,
    adapter_parameters,
    default_targets,
    initialize_adapter,
    inject_adapters,
    left_out,
    require_moderate_size,
)


class ExpertBank(nn.Module):
    """One frozen network and one LoRA adapter for each interval of a schedule, switched in place: net(image, sigma).

    Shares every weight of the network it is given and leaves that network untouched, so that the plain guider stays
    usable beside its experts. Where a quarter more memory allows, the active adapter is merged into a copy of its layer's
    weight and costs no time. Always in eval mode: batch-norm statistics stay those of clean images, in distillation and in
    guidance alike.

    base: the network. schedule: the interval of each expert. lora: size and placement of the adapters.
    view: inputs of the experts, "noisy" states or "denoised" predictions.
    seed: of the adapters' and stems' start, which depends on it and the number of the expert only.
    space: the latents that are decoded for the experts, each by a stem of its own that is trained and saved with its
    adapter; None for images. ValueError for an unknown view, a network with too few layers to adapt, and experts of many
        times its size.
    """

    def __init__(self, base: nn.Module, schedule: ExpertSchedule, lora: LoraSpec = LoraSpec(),
                 view: View = "denoised", seed: int = 0, space: LatentSpace | None = None):
        super().__init__()
        if view not in VIEWS:
            raise ValueError(f"there is no view '{view}': expected one of {', '.join(VIEWS)}")
        self.fingerprint = fingerprint_network(base)
        self.training_info: dict = {}  # how the experts were made, for people
        self.schedule, self.view, self.space = schedule, view, space
        self.lora = replace(lora, targets=lora.targets or default_targets(base))
        require_moderate_size(base, self.lora, len(schedule), stem_numbers(space) if space else 0)
        self.left_out = left_out(base)
        self.net = _share_weights(base)
        self.stems = nn.ModuleList(Stem(space, seeded(seed, index, 1)) for index in range(len(schedule)) if space)
        inject_adapters(self.net, self.lora, len(schedule))
        for index in range(len(schedule)):
            initialize_adapter(self._parameters_of(index), seeded(seed, index))
        self.adapted = AdaptedLayers(self.net, sum(
            parameter.nbytes for index in range(len(schedule)) for parameter in self._parameters_of(index).values()))
        self.eval().requires_grad_(False)
        self._in_training: list[nn.Parameter] = []
        self.active = -1
        self.select(0)

    @property
    def space_name(self) -> str:
        """Name of the latents that the experts work on, or "pixel", for files and messages."""
        return self.space.name if self.space else PIXELS

    def _parameters_of(self, index: int) -> dict[str, nn.Parameter]:
        """The parameters of one expert under names that do not hold its number."""
        stem = with_prefix("stem", dict(self.stems[index].named_parameters())) if self.space else {}
        return adapter_parameters(self.net, index) | cast(dict[str, nn.Parameter], stem)

    def select(self, index: int) -> None:
        """Switch expert `index` on and the others off. IndexError if there is no such expert."""
        if not 0 <= index < len(self.schedule):
            raise IndexError(f"there is no expert {index}: this bank has {len(self.schedule)}")
        if index != self.active:
            self.active = index
            self.adapted.activate(index)
            for parameter in self._in_training:
                parameter.requires_grad_(True)

    def train(self, mode: bool = True) -> "ExpertBank":
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, image: Tensor, sigma: Tensor, *prompt: Tensor) -> Tensor:
        """Output of the expert responsible for sigma (B,). ValueError if the batch spans two intervals."""
        self.select(self._responsible(sigma))
        return self.net(image, *prompt)

    @hashed_as("ExpertBank.see")
    def decode(self, latent: Tensor, sigma: Tensor) -> Tensor:
        """The image that the expert responsible for sigma (B,) makes of latents (B, C, h, w)."""
        return self.stems[self._responsible(sigma)](latent)

    def _responsible(self, sigma: Tensor) -> int:
        low, high = (self.schedule.index(float(level)) for level in sigma.aminmax())
        if low != high:
            raise ValueError(f"one batch holds noise levels of the experts {low} and {high}: split it, so that all "
                             "images of a call belong to one interval")
        return low

    @contextmanager
    def trainable(self, index: int) -> Iterator[list[nn.Parameter]]:
        """Context manager: select an expert and yield its parameters with requires_grad on; off again on exit."""
        self.select(index)
        parameters = list(self._parameters_of(index).values())
        try:
            self._in_training = parameters
            self.adapted.set_training(True)
            self.adapted.activate(index)
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield parameters
        finally:
            self._in_training = []
            self.adapted.set_training(False)
            for parameter in parameters:
                parameter.requires_grad_(False)
            self.adapted.merge(self.active)

    def weights(self, index: int) -> dict[str, Tensor]:
        """The weights of one expert by name, without the base."""
        return {name: parameter.detach() for name, parameter in self._parameters_of(index).items()}

    def load(self, index: int, weights: dict[str, Tensor]) -> None:
        """Copy weights into one expert. ValueError naming what is missing, unexpected or of another shape."""
        own = self._parameters_of(index)
        for problem, names in (("misses", own.keys() - weights.keys()), ("has unexpected", weights.keys() - own.keys())):
            if names:
                raise ValueError(f"expert {index} {problem} {len(names)} weights, such as {min(names)}: "
                                 "the file belongs to another network or another LoRA placement")
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(f"{name} of expert {index} has shape {tuple(weights[name].shape)}, "
                                 f"expected {tuple(parameter.shape)}: check rank and network")
        for name, parameter in own.items():
            parameter.data.copy_(weights[name])
        if index == self.active and not self._in_training:
            self.adapted.merge(index)

    def make_plain(self, index: int) -> None:
        """Make one expert the plain network: its adapter adds nothing, and its stem shows the linear colours."""
        self.load(index, {name: weight if _may_stay(name) else torch.zeros_like(weight)
                          for name, weight in self.weights(index).items()})

    def describe_left_out(self) -> str:
        """A sentence about the layers that take no adapter; "" if there are none."""
        if not self.left_out:
            return ""
        names = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
        return (f"{len(self.left_out)} of {len(self.left_out) + len(self.lora.targets)} layers take no adapter, and stay as "
                f"they are in all experts: {names}")

    def trainable_share(self) -> float:
        """Number of weights of one expert over that of the base."""
        expert = sum(parameter.numel() for parameter in self._parameters_of(0).values())
        total = sum(parameter.numel() for parameter in self.parameters())
        return expert / (total - expert * len(self.schedule))


def _may_stay(name: str) -> bool:
    """Whether a weight of an expert has no effect where all others are zero."""
    return ".lora_A." in name or (name.startswith("stem.") and not name.startswith(f"stem.{STEM_LAST}."))


def _share_weights(net: nn.Module) -> nn.Module:
    """A copy of the modules that holds the very parameters and buffers of the original."""
    tensors = [*net.parameters(), *net.buffers()]
    return copy.deepcopy(net, {id(tensor): tensor for tensor in tensors})


def base_network(guider: Guider) -> nn.Module:
    """The frozen network of a plain guider. ValueError if it has experts already, or is a rule."""
    if isinstance(guider.net, nn.Module) and not has_network(guider):
        raise ValueError(f"{guider.name} is a rule and has no network that could learn: rules guide without experts; load a "
                         "guider with a network")
    if not isinstance(guider.net, IgnoreSigma):
        raise ValueError(f"{guider.name} is not a plain guider: experts are made from a guider without experts")
    return guider.net.net


def with_experts(guider: Guider, bank: ExpertBank) -> Guider:
    """The guider with a bank in place of its network, and with the view and decoder that the bank was distilled for."""
    return replace(guider, net=bank, view=bank.view, decode=bank.decode if bank.space else None)
