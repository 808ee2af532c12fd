"""Noise-range experts: one frozen network and a small LoRA adapter for each interval of noise.

The only file that uses peft.
"""
import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..guiders.guider import Guider, IgnoreSigma, has_network
from ..guiders.latents import PIXELS, VIEWS, LatentSpace, Stem
from ..io.files import with_prefix
from ..io.function_fingerprint import hashed_as
from ..io.hashing import fingerprint_network
from ..rng import seeded
from ..schedules import ExpertSchedule

SPARE_SHARE, SPARE_BYTES = 0.25, 16 * 2**20  # what a bank may add to its network's memory: the larger of the two


@dataclass(frozen=True)
class LoraSpec:
    """Size and place of the adapters."""

    rank: int = 8
    alpha: float = 8.0            # scale of an adapter = alpha / rank
    targets: tuple[str, ...] = ()  # module names; () = every Linear and ungrouped Conv2d but the head


def default_targets(net: nn.Module) -> tuple[str, ...]:
    """Every Linear and ungrouped Conv2d but the last one, the head. The stem, which meets the noise first, is among them.

    peft cannot adapt grouped convolutions at any rank, and torch's own attention reads its weights past an adapter.
    """
    inside = tuple(f"{name}." for name, module in net.named_modules() if isinstance(module, nn.MultiheadAttention))
    layers = [name for name, module in net.named_modules() if not name.startswith(inside)
              and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))]
    if len(layers) < 2:
        raise ValueError(f"{type(net).__name__} has {len(layers)} Linear or Conv2d layers: experts need at least two, "
                         "because the last one stays as it is")
    return tuple(layers[:-1])


def _share_weights(net: nn.Module) -> nn.Module:
    """A copy of the modules that holds the very same parameters and buffers."""
    tensors = [*net.parameters(), *net.buffers()]
    return copy.deepcopy(net, {id(tensor): tensor for tensor in tensors})


def _adapted_layers(net: nn.Module) -> list[nn.Module]:
    """The layers that carry adapters, found once because a switch must not walk the whole network."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in net.modules() if isinstance(module, BaseTunerLayer)]


class ExpertBank(nn.Module):
    """One frozen network and one LoRA adapter for each interval of a schedule, switched in place: net(image, sigma).

    Shares every weight of the network it is given and leaves that network untouched, so that the plain guider stays
    usable beside its experts. In as many layers as a quarter more memory allows, the active expert is merged into a copy
    of the weight, so that it costs no time. Always in eval mode: batch-norm statistics stay those of clean images, the same
    in distillation and in guidance.

    view: what the experts look at, "noisy" or "denoised". space: the latents they look at, each through a stem of its own
    that belongs to it like its adapter; None for images.
    """

    def __init__(self, base: nn.Module, schedule: ExpertSchedule, lora: LoraSpec = LoraSpec(),
                 view: str = "denoised", seed: int = 0, space: LatentSpace | None = None):
        super().__init__()
        if view not in VIEWS:
            raise ValueError(f"there is no view '{view}': expected one of {', '.join(VIEWS)}")
        self.fingerprint = fingerprint_network(base)
        self.training_info: dict = {}  # how the experts were made, for people
        self.schedule, self.view, self.space = schedule, view, space
        self.lora = replace(lora, targets=lora.targets or default_targets(base))
        self.net = _share_weights(base)
        self.stems = nn.ModuleList(Stem(space, seeded(seed, index, 1)) for index in range(len(schedule)) if space)
        self._inject(seed)
        self._layers = sorted(_adapted_layers(self.net), key=lambda layer: layer.base_layer.weight.numel())
        self._merged = self._choose_merged()
        self._beside = self._layers[len(self._merged):]
        self.eval().requires_grad_(False)
        self._in_training: list[nn.Parameter] = []
        self.active = -1
        self.select(0)

    @property
    def space_name(self) -> str:
        """What the experts look at, for files and people."""
        return self.space.name if self.space else PIXELS

    def _inject(self, seed: int) -> None:
        try:
            from peft import LoraConfig
            from peft.functional import inject_adapter_in_model
        except ImportError as error:
            raise ImportError(f"experts need the package peft ({error}): install it with 'pip install peft>=0.18'; guiding "
                              "with a plain guider works without it") from error
        names = "|".join(re.escape(name) for name in self.lora.targets)
        config = LoraConfig(r=self.lora.rank, lora_alpha=self.lora.alpha, target_modules=f"({names})")
        with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
            for index in range(len(self.schedule)):
                inject_adapter_in_model(config, self.net, adapter_name=f"expert_{index}")
        for index in range(len(self.schedule)):  # an expert's start depends on (seed, index) only
            generator = seeded(seed, index)
            for name, parameter in self._named(index).items():
                if ".lora_A" in name:
                    start = torch.empty(parameter.shape)
                    nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
                    parameter.data.copy_(start)

    def _choose_merged(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """Layers that hold the sum of weight and adapter, so that the adapter costs no time, and their plain weights.

        Each needs a second copy of its weight. Small weights come first: they sit where images are large, and there an
        adapter costs most.
        """
        own = sum(parameter.nbytes for index in range(len(self.schedule)) for parameter in self._named(index).values())
        spare = max(SPARE_SHARE * (sum(parameter.nbytes for parameter in self.net.parameters()) - own), SPARE_BYTES) - own
        chosen = []
        for layer in self._layers:
            plain = layer.base_layer.weight
            spare -= plain.nbytes
            if spare < 0:
                break
            layer.base_layer.weight = nn.Parameter(plain.detach().clone(), requires_grad=False)
            layer.enable_adapters(False)
            chosen.append((layer, plain))
        return chosen

    @torch.no_grad()
    def _merge(self) -> None:
        for layer, plain in self._merged:
            weight = layer.base_layer.weight
            with torch.autocast(weight.device.type, enabled=False):  # the sum stays exact, whatever the network computes in
                weight.data.copy_(plain.to(weight.device) + layer.get_delta_weight(f"expert_{self.active}"))

    def _named(self, index: int) -> dict[str, nn.Parameter]:
        """The parameters of one expert under names that do not depend on its number."""
        mark = f".expert_{index}."
        adapter = {name.replace(mark, "."): parameter for name, parameter in self.net.named_parameters() if mark in name}
        return adapter | (with_prefix("stem", dict(self.stems[index].named_parameters())) if self.space else {})

    def select(self, index: int) -> None:
        """Switch expert `index` on and the others off."""
        if not 0 <= index < len(self.schedule):
            raise IndexError(f"there is no expert {index}: this bank has {len(self.schedule)}")
        if index != self.active:
            self.active = index
            self._switch(self._layers if self._in_training else self._beside)
            if not self._in_training:
                self._merge()
            for parameter in self._in_training:
                parameter.requires_grad_(True)

    def _switch(self, layers: list[nn.Module]) -> None:
        for layer in layers:
            layer.set_adapter([f"expert_{self.active}"], inference_mode=True)

    def train(self, mode: bool = True) -> "ExpertBank":
        """Stays in eval mode."""
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
        low, high = (self.schedule.index(float(value)) for value in sigma.aminmax())
        if low != high:
            raise ValueError(f"one batch holds noise levels of the experts {low} and {high}: split it, so that all "
                             "images of a call belong to one interval")
        return low

    @contextmanager
    def trainable(self, index: int) -> Iterator[list[nn.Parameter]]:
        """Select an expert and yield its parameters with requires_grad on; off again on exit."""
        self.select(index)
        parameters = list(self._named(index).values())
        try:
            self._in_training = parameters
            for layer, plain in self._merged:
                layer.base_layer.weight.data.copy_(plain)
                layer.enable_adapters(True)
            self._switch(self._layers)
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield parameters
        finally:
            self._in_training = []
            for layer, _ in self._merged:
                layer.enable_adapters(False)
            for parameter in parameters:
                parameter.requires_grad_(False)
            self._merge()

    def weights(self, index: int) -> dict[str, Tensor]:
        """The weights of one expert, without the base."""
        return {name: parameter.detach() for name, parameter in self._named(index).items()}

    def load(self, index: int, weights: dict[str, Tensor]) -> None:
        """Put weights into one expert. ValueError naming what is missing, unexpected or of another shape."""
        own = self._named(index)
        for what, names in (("misses", own.keys() - weights.keys()), ("has unexpected", weights.keys() - own.keys())):
            if names:
                raise ValueError(f"expert {index} {what} {len(names)} weights, such as {min(names)}: "
                                 "the file belongs to another network or another LoRA placement")
        for name, parameter in own.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(f"{name} of expert {index} has shape {tuple(weights[name].shape)}, "
                                 f"expected {tuple(parameter.shape)}: check rank and network")
        for name, parameter in own.items():
            parameter.data.copy_(weights[name])
        if index == self.active and not self._in_training:
            self._merge()

    def trainable_share(self) -> float:
        """Weights of one expert over the weights of the base."""
        one = sum(parameter.numel() for parameter in self._named(0).values())
        everything = sum(parameter.numel() for parameter in self.parameters())
        return one / (everything - one * len(self.schedule))


def base_network(guider: Guider) -> nn.Module:
    """The frozen network of a plain guider. ValueError if it has experts already, or is a rule."""
    if isinstance(guider.net, nn.Module) and not has_network(guider):
        raise ValueError(f"{guider.name} has no network that could learn: expected one from Load Guider; a rule guides "
                         "without experts")
    if not isinstance(guider.net, IgnoreSigma):
        raise ValueError(f"{guider.name} is not a plain guider: experts are made from a guider without experts")
    return guider.net.net


def with_experts(guider: Guider, bank: ExpertBank) -> Guider:
    """The guider with a bank in the place of its network; it looks at what the experts were distilled for."""
    return replace(guider, net=bank, view=bank.view, decode=bank.decode if bank.space else None)
