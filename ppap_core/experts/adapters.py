"""LoRA adapters inside a network, one per expert, switched in place. The only file that uses peft."""
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..io.packages import importing
from ..io.values import shown
from .adapted_layer import AdaptedLayer, is_linear, mixes_channels, takes_adapter

MAX_EXPERTS = 256
MAX_SHARE, FREE_NUMBERS = 4, 2**24  # weights of all experts over the network's at most; so many are never too many
SPARE_SHARE, SPARE_BYTES = 0.25, 16 * 2**20  # memory that merged weights may add to a network's: the larger of the two


@dataclass(frozen=True)
class LoraSpec:
    """Size and placement of the adapters (Hu et al. 2021)."""

    rank: int = 8
    alpha: float = 8.0             # an adapter is scaled by alpha / rank
    targets: tuple[str, ...] = ()  # module names; (): every Linear and ungrouped Conv2d but the head


def default_targets(net: nn.Module) -> tuple[str, ...]:
    """Names of every linear layer and ungrouped Conv2d but the last, the head. ValueError for fewer than two such layers.

    The stem, which meets the noise first, is among them. Left out is what takes no adapter, see `left_out`.
    """
    layers = _adaptable(net)
    if len(layers) < 2:
        raise ValueError(f"{type(net).__name__} has {len(layers)} Linear or Conv2d layers that take an adapter: experts "
                         "need at least two, because the last one stays as it is; guide with the plain network")
    return tuple(layers[:-1])


def left_out(net: nn.Module) -> tuple[str, ...]:
    """Names of the layers but the last one, the head, that mix channels and take no adapter.

    They are grouped, transposed, 1D and 3D convolutions, layers whose weight is computed from others (weight and spectral
    norm), and those inside `nn.MultiheadAttention`.
    """
    taken = _adaptable(net)
    return tuple(name for name in [name for name, module in net.named_modules() if mixes_channels(module)][:-1]
                 if name not in taken)


def _adaptable(net: nn.Module) -> list[str]:
    attention = tuple(f"{name}." for name, module in net.named_modules() if isinstance(module, nn.MultiheadAttention))
    return [name for name, module in net.named_modules() if not name.startswith(attention) and takes_adapter(module)]


def require_moderate_size(net: nn.Module, spec: LoraSpec, count: int, beside: int = 0) -> None:
    """ValueError for more adapters than a network of this size is worth, before memory is taken for them.

    beside: further weights of each expert.
    """
    each = beside + sum(spec.rank * (weight.shape[0] + weight[0].numel()) for weight in _weights(net, spec.targets))
    own = sum(parameter.numel() for parameter in net.parameters())
    if count > MAX_EXPERTS or count * each > max(MAX_SHARE * own, FREE_NUMBERS):
        raise ValueError(f"{count} experts of rank {shown(spec.rank)} would have {shown(count * each)} weights, and their "
                         f"network has {own}: expected at most {MAX_EXPERTS} experts with {MAX_SHARE} times as many in all; "
                         "choose a lower rank, or fewer experts")


def _weights(net: nn.Module, targets: Iterable[str]) -> list[Tensor]:
    found = [getattr(net.get_submodule(name), "weight", None) for name in targets]
    weights = [weight for weight in found if isinstance(weight, Tensor) and weight.ndim > 1]
    if len(weights) < len(found):
        raise ValueError("some of the layers that are to take an adapter have no matrix: expected linear and convolutional "
                         "layers")
    return weights


def inject_adapters(net: nn.Module, spec: LoraSpec, count: int) -> None:
    """Put adapters 0 to count - 1 into a network in place. ImportError without a peft that works."""
    with importing("peft", "experts need", "peft>=0.18", "transformers", "guiding with a plain guider works without it"):
        from peft import LoraConfig
        from peft.functional import inject_adapter_in_model
        from peft.tuners.lora import Conv2d, Linear
    names = "|".join(re.escape(name) for name in spec.targets)
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=f"({names})")  # type: ignore[arg-type]
    linear, conv = (type(f"Adapted{kind.__name__}", (AdaptedLayer, kind), {}) for kind in (Linear, Conv2d))
    layers = map(net.get_submodule, spec.targets)
    config._register_custom_module({nn.Conv2d: conv} | {type(layer): linear for layer in layers if is_linear(layer)})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws from the global generator
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # several adapters are the point
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)  # judged by is_linear
        for index in range(count):
            inject_adapter_in_model(config, net, adapter_name=_name(index))
    _replace_in_lists(net)


def _replace_in_lists(net: nn.Module) -> None:
    """Put adapted layers into plain lists too, by which Mask2Former and OneFormer, say, call layers past their modules."""
    adapted = {id(module.base_layer): module for module in net.modules() if isinstance(module, AdaptedLayer)}
    for module in net.modules():
        for values in vars(module).values():
            if isinstance(values, list):
                values[:] = [adapted.get(id(value), value) for value in values]


def initialize_adapter(parameters: dict[str, nn.Parameter], generator: torch.Generator) -> None:
    """Start one adapter as LoRA does, from a generator of its own: A uniform (He et al. 2015), B zero."""
    for name, parameter in parameters.items():
        if ".lora_A" in name:
            start = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
            parameter.data.copy_(start)


def adapter_parameters(net: nn.Module, index: int) -> dict[str, nn.Parameter]:
    """The parameters of one adapter under names that do not hold its number."""
    mark = f".{_name(index)}."
    return {name.replace(mark, "."): parameter for name, parameter in net.named_parameters() if mark in name}


def _name(index: int) -> str:
    return f"expert_{index}"


class AdaptedLayers:
    """The layers of a network that carry adapters.

    In as many of them as memory allows, the sum of weight and active adapter is kept beside the plain weight, so that there
    the adapter costs no time. Small weights come first: they sit where images are large, and there an adapter costs most.
    In training nothing is merged.
    """

    def __init__(self, net: nn.Module, adapter_bytes: int):
        """adapter_bytes: memory of all adapters, which counts against what merging may add."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers: Iterable[Any] = (module for module in net.modules() if isinstance(module, BaseTunerLayer))
        self.layers: list[Any] = sorted(layers, key=lambda layer: layer.base_layer.weight.numel())
        base_bytes = sum(parameter.nbytes for parameter in net.parameters()) - adapter_bytes
        self.merged = self._hold_merged(max(SPARE_SHARE * base_bytes, SPARE_BYTES) - adapter_bytes)
        self.training = False

    def _hold_merged(self, spare: float) -> list[tuple[Any, nn.Parameter]]:
        """Give layers a copy of their weight to merge into, while it fits; returns them with their plain weights."""
        merged = []
        for layer in self.layers:
            plain = layer.base_layer.weight
            spare -= plain.nbytes
            if spare < 0:
                break
            layer.base_layer.weight = nn.Parameter(plain.detach().clone(), requires_grad=False)
            layer.enable_adapters(False)
            merged.append((layer, plain))
        return merged

    def plain_state(self, net: nn.Module) -> dict[str, Tensor]:
        """The state of the network that carries the layers, under the names and with the values of one without adapters."""
        plain = {id(layer.base_layer.weight): weight for layer, weight in self.merged}
        return {name.replace(".base_layer.", "."): plain.get(id(tensor), tensor)
                for name, tensor in net.state_dict(keep_vars=True).items() if ".lora_" not in name}

    def activate(self, index: int) -> None:
        """Switch to one adapter."""
        for layer in self.layers if self.training else self.layers[len(self.merged):]:
            layer.set_adapter([_name(index)], inference_mode=True)
        if not self.training:
            self.merge(index)

    @torch.no_grad()
    def merge(self, index: int) -> None:
        """Renew the merged weights from the plain ones and one adapter."""
        for layer, plain in self.merged:
            weight: Tensor = layer.base_layer.weight
            with torch.autocast(weight.device.type, enabled=False):  # the sum stays exact, whatever the network computes in
                weight.data.copy_(plain.to(weight.device) + layer.get_delta_weight(_name(index)))

    def set_training(self, training: bool) -> None:
        """Unmerge all layers for training, or mark the merged ones as such again; follow up with `activate`."""
        self.training = training
        for layer, plain in self.merged:
            if training:
                layer.base_layer.weight.data.copy_(plain)
            layer.enable_adapters(training)
