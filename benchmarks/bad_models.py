"""Bad versions of the tiny denoisers, to guide away from: smaller and less trained ones, the same network damaged, and what
users can make of a fine-tune."""
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppap_core import karras_sigmas
from ppap_core.io.files import load_tensors, save_tensors
from ppap_core.noise import PIXEL_SIGMA_DATA, expand
from ppap_core.tinyworld.loaders import CONDITIONS, SIGMA_MAX, SIGMA_MIN, load_denoiser, load_sibling, load_weights
from ppap_core.tinyworld.networks.denoiser import TinyDenoiser
from ppap_core.tinyworld.scenes import CLASSES, draw
from ppap_core.training.finetune import FineTune, fine_tune
from ppap_core.training.loop import RunOptions
from ppap_core.training.lora import LoraUpdate, with_adapters

from .networks import load_conditional_denoiser, load_conditional_sibling
from .train_tinyworld import NETWORKS, TRAINING_SEEDS, Network, TrainConfig, fit

Model = Callable[..., Tensor]
"""(x, sigma) or, for a conditional model, (x, sigma, condition) -> denoised"""


class LoraModel(NamedTuple):
    """A LoRA of the denoiser on images of stars: its training, the step that it is taken from, and its strength."""

    rank: int
    steps: int
    taken_at: int
    strength: float

    def file(self, folder: Path, step: int) -> Path:
        """Where the LoRA of a step is kept."""
        return folder / f"lora_{self.rank}_{self.steps}_{step}.safetensors"


BUNDLED, QUARTER = "half the width, a sixteenth of the training", "half the width, a quarter of the training"
TUNED = "a LoRA"
LORAS = {TUNED: LoraModel(8, 400, 400, 1.0),
         "the LoRA after a sixteenth of its steps": LoraModel(8, 400, 25, 1.0),
         "a LoRA of rank 1, a sixteenth of the steps": LoraModel(1, 25, 25, 1.0),
         "half the strength of the LoRA": LoraModel(8, 400, 400, 0.5),
         "the model without the LoRA": LoraModel(8, 400, 400, 0.0)}
STAR = CLASSES.index("star")
FULL_STEPS = {False: 11_000, True: 13_500}  # of the good denoisers; the conditional one started as the other


def load_bad_model(kind: str, conditional: bool, folder: Path, device: torch.device) -> Model:
    """A denoiser of KINDS.

    conditional: whether it takes a condition, which LoRAs never do.
    folder: keeps the models that have to be trained; an interrupted training is resumed.
    """
    if kind == BUNDLED:
        return (load_conditional_sibling() if conditional else load_sibling()).to(device)
    if kind == QUARTER:
        return _quarter_trained(conditional, folder, device)
    if kind in LORAS:
        return _with_lora(LORAS[kind], folder, device)
    return DAMAGES[kind]((load_conditional_denoiser() if conditional else load_denoiser()).to(device))


def _quarter_trained(conditional: bool, folder: Path, device: torch.device) -> nn.Module:
    base = "conditional_denoiser" if conditional else "denoiser"
    make, name = partial(TinyDenoiser, width=32, conditions=CONDITIONS if conditional else 0), f"{base}_32_0.25"
    if not (folder / f"{name}.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = TrainConfig(FULL_STEPS[conditional] // 4, ema=0.99, half=True)
        fit(name, Network(make, NETWORKS[base].loss, config), folder, device)
    return load_weights(make(), name, folder).to(device)


def _with_lora(lora: LoraModel, folder: Path, device: torch.device) -> "AdaptedModel":
    net = load_denoiser().to(device)
    if not lora.file(folder, lora.taken_at).exists():
        _train_lora(net, lora, folder, device)
    tensors = {name: tensor.to(device) for name, tensor in load_tensors(lora.file(folder, lora.taken_at))[0].items()}
    layers = {name.rpartition(".")[0] for name in tensors}
    return AdaptedModel(net, {layer: [LoraUpdate(tensors[f"{layer}.up"], tensors[f"{layer}.down"], lora.strength)]
                              for layer in layers})


@dataclass(frozen=True)
class AdaptedModel:
    """A model with low-rank updates: (x, sigma) -> denoised."""

    net: nn.Module
    updates: dict[str, Sequence[LoraUpdate]]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        with with_adapters(self.net, self.updates):
            return self.net(x, sigma)


def _train_lora(net: nn.Module, lora: LoraModel, folder: Path, device: torch.device) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    taken = {other.taken_at for other in LORAS.values() if other[:2] == lora[:2]}
    images = draw(range(TRAINING_SEEDS, TRAINING_SEEDS + 1024), label=STAR).image.to(device)
    sigmas = karras_sigmas(1001, SIGMA_MIN, SIGMA_MAX)[:-1].to(device)
    fine_tune(net, partial(_predict, net, sigmas), images, FineTune(lora.steps, lora.rank, 16), PIXEL_SIGMA_DATA,
              RunOptions(on_step=partial(_save_lora, lora, folder, taken)))


def _predict(net: nn.Module, sigmas: Tensor, images: Tensor, noise: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    sigma = sigmas[(1000 * share).long().to(sigmas.device)]
    return net(images + expand(sigma, images) * noise, sigma), sigma


def _save_lora(lora: LoraModel, folder: Path, taken: set[int], step: int, loss: float,
               updates: Mapping[str, LoraUpdate]) -> None:
    if step + 1 in taken:
        tensors = {f"{layer}.{part}": getattr(update, part).detach() for layer, update in updates.items()
                   for part in ("up", "down")}
        save_tensors(lora.file(folder, step + 1), tensors, {"rank": lora.rank, "step": step + 1})


class Dropout:
    """A forward hook that drops a share of a block's outputs, at random from a fixed seed."""

    def __init__(self, share: float, device: torch.device):
        self.share, self.generator = share, torch.Generator(device).manual_seed(0)

    def __call__(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        keep = torch.rand(output.shape, generator=self.generator, device=output.device) >= self.share
        return output * keep / (1 - self.share)


def dropped(good: TinyDenoiser, x: Tensor, sigma: Tensor, *given: Tensor, share: float = 0.1) -> Tensor:
    """The network with a share of the outputs of its blocks dropped. 0 changes nothing."""
    drop = Dropout(share, x.device)
    hooks = [block.register_forward_hook(drop) for part in (good.net.down, good.net.middle, good.net.up) for block in part]
    try:
        return good(x, sigma, *given)
    finally:
        for hook in hooks:
            hook.remove()


def noisier(good: nn.Module, x: Tensor, sigma: Tensor, *given: Tensor, share: float = 0.2) -> Tensor:
    """The network on an input with a share more noise than sigma says. 0 changes nothing."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return good(x + share * expand(sigma, x) * noise, sigma, *given)


def quantized(good: nn.Module, bits: int = 4) -> nn.Module:
    """The network with its weights rounded to so many bits, scaled for each output channel."""
    rough = deepcopy(good)
    for weight in rough.parameters():
        if weight.ndim > 1:
            step = weight.data.flatten(1).abs().amax(1).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            step = expand(step, weight)
            weight.data.copy_((weight.data / step).round() * step)
    return rough


DAMAGES: dict[str, Callable[[TinyDenoiser], Model]] = {"dropout": lambda good: partial(dropped, good),
                                                    "noise on the input": lambda good: partial(noisier, good),
                                                    "weights of four bits": quantized}
KINDS = (BUNDLED, QUARTER, *DAMAGES, *LORAS)
