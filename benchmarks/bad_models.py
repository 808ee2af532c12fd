"""Bad versions of the tiny denoisers, to guide with and to compare: true siblings, the same network damaged, and those that
users can make of a fine-tune."""
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ppap_core.io.files import load_tensors, save_tensors
from ppap_core.noise import PIXEL_SIGMA_DATA, expand
from ppap_core.sampling import karras_sigmas
from ppap_core.tinyworld.loaders import CONDITIONS, SIGMA_MAX, SIGMA_MIN, load_denoiser, load_sibling, load_weights
from ppap_core.tinyworld.networks.denoiser import TinyDenoiser
from ppap_core.tinyworld.scenes import CLASSES, draw
from ppap_core.training.finetune import FineTune, fine_tune
from ppap_core.training.loop import RunOptions
from ppap_core.training.lora import LoraUpdate, with_adapters

from .networks import load_conditional_denoiser, load_conditional_sibling
from .train_tinyworld import NETWORKS, TRAINING_SEEDS, Recipe, fit

Model = Callable[..., Tensor]  # (x, sigma) or (x, sigma, what it is told) -> denoised
BUNDLED, QUARTER = "half the width, a sixteenth of the training", "half the width, a quarter of the training"
DAMAGED = ("dropout", "noise on the input", "weights of four bits")
TUNED = "a LoRA"
MADE = {  # name -> (rank, training steps of it, the step at which it was kept, strength)
    TUNED: (8, 400, 400, 1.0), "the LoRA after a sixteenth of its steps": (8, 400, 25, 1.0),
    "a LoRA of rank 1, a sixteenth of the steps": (1, 25, 25, 1.0), "half the strength of the LoRA": (8, 400, 400, 0.5),
    "the model without the LoRA": (8, 400, 400, 0.0)}
STAR = CLASSES.index("star")
KINDS = (BUNDLED, QUARTER, *DAMAGED, *MADE)


def bad_version(kind: str, told: bool, folder: Path, device: torch.device) -> Model:
    """A denoiser of KINDS; what has to be trained is kept in the folder, and gone on with if it was stopped."""
    if kind == BUNDLED:
        return (load_conditional_sibling() if told else load_sibling()).to(device)
    if kind == QUARTER:
        return _quarter_trained(told, folder, device)
    if kind in MADE:
        return _made(kind, folder, device)
    good = (load_conditional_denoiser() if told else load_denoiser()).to(device)
    return {"dropout": partial(dropped, good), "noise on the input": partial(noisier, good),
            "weights of four bits": quantised(good)}[kind]


def _quarter_trained(told: bool, folder: Path, device: torch.device) -> nn.Module:
    base = "conditional_denoiser" if told else "denoiser"
    net, name = partial(TinyDenoiser, width=32, conditions=CONDITIONS if told else 0), f"{base}_32_0.25"
    if not (folder / f"{name}.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        fit(name, net(), NETWORKS[base][1], Recipe(FULL[told] // 4, ema=0.99, half=True), folder, device)
    return load_weights(net(), name, folder).to(device)


def _made(kind: str, folder: Path, device: torch.device) -> Model:
    """The denoiser with a LoRA that makes it one of stars, or with less of that."""
    rank, steps, at, strength = MADE[kind]
    net, file = load_denoiser().to(device), folder / f"lora_{rank}_{steps}_{at}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sigmas = karras_sigmas(1001, SIGMA_MIN, SIGMA_MAX)[:-1].to(device)

        def predict(images: Tensor, noise: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
            sigma = sigmas[(1000 * share).long().to(device)]
            return net(images + expand(sigma, images) * noise, sigma), sigma

        def keep(step: int, loss: float, changes: dict[str, LoraUpdate]) -> None:
            if step + 1 in {each[2] for each in MADE.values() if each[:2] == (rank, steps)}:
                save_tensors(folder / f"lora_{rank}_{steps}_{step + 1}.safetensors", {
                    f"{name}.{part}": getattr(change, part).detach() for name, change in changes.items()
                    for part in ("up", "down")}, {"rank": rank, "step": step + 1})
        images = draw(range(TRAINING_SEEDS, TRAINING_SEEDS + 1024), label=STAR).image.to(device)
        fine_tune(net, predict, images, FineTune(steps, rank, 16), PIXEL_SIGMA_DATA, RunOptions(on_step=keep))
    tensors = {name: tensor.to(device) for name, tensor in load_tensors(file)[0].items()}
    names = {name.rpartition(".")[0] for name in tensors}
    changes = {name: [LoraUpdate(tensors[f"{name}.up"], tensors[f"{name}.down"], strength)] for name in names}

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        with with_adapters(net, changes):
            return net(x, sigma)
    return denoise


FULL = {False: 11_000, True: 13_500}  # steps of the good denoisers; the one that is told started as the other one


def dropped(good: nn.Module, x: Tensor, sigma: Tensor, *told: Tensor, share: float = 0.1) -> Tensor:
    """The network without a tenth of what its blocks give."""
    generator = torch.Generator(x.device).manual_seed(0)

    def drop(block: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        keep = torch.rand(output.shape, generator=generator, device=output.device) >= share
        return output * keep / (1 - share)
    hooks = [block.register_forward_hook(drop) for part in (good.net.down, good.net.middle, good.net.up) for block in part]
    try:
        return good(x, sigma, *told)
    finally:
        for hook in hooks:
            hook.remove()


def noisier(good: nn.Module, x: Tensor, sigma: Tensor, *told: Tensor, share: float = 0.2) -> Tensor:
    """The network on an input with a fifth more noise than it is told of."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    return good(x + share * expand(sigma, x) * noise, sigma, *told)


def quantised(good: nn.Module, bits: int = 4) -> nn.Module:
    """The network with so few bits for each weight, scaled for each output channel."""
    rough = deepcopy(good)
    for weight in rough.parameters():
        if weight.ndim > 1:
            step = weight.data.flatten(1).abs().amax(1).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            step = step.reshape(-1, *(1,) * (weight.ndim - 1))
            weight.data.copy_((weight.data / step).round() * step)
    return rough
