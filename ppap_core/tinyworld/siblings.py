"""Bad versions of the tiny denoisers, to guide with and to compare: true siblings, and the same network damaged."""
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..noise import expand
from . import CONDITIONS, TinyDenoiser, load_conditional_denoiser, load_denoiser, load_sibling, load_weights
from .train import NETWORKS, Recipe, fit

Model = Callable[..., Tensor]  # (x, sigma) or (x, sigma, what it is told) -> denoised
BUNDLED = "half the width, a sixteenth of the training"
TRAINED = {  # name -> (width, share of the training)
    BUNDLED: (32, 1 / 16), "a sixteenth of the training": (64, 1 / 16), "half the width": (32, 1.0)}
DAMAGED = ("dropout", "noise on the input", "weights of four bits")
KINDS = (*TRAINED, *DAMAGED)


def bad_version(kind: str, told: bool, folder: Path, device: torch.device) -> Model:
    """A denoiser of KINDS; what has to be trained is kept in the folder, and gone on with if it was stopped."""
    if kind in TRAINED:
        return _trained(kind, told, folder, device)
    good = (load_conditional_denoiser() if told else load_denoiser()).to(device)
    return {"dropout": partial(dropped, good), "noise on the input": partial(noisier, good),
            "weights of four bits": quantised(good)}[kind]


def _trained(kind: str, told: bool, folder: Path, device: torch.device) -> nn.Module:
    if kind == BUNDLED:
        return load_sibling(told).to(device)
    width, share = TRAINED[kind]
    base = "conditional_denoiser" if told else "denoiser"
    net, name = partial(TinyDenoiser, width=width, conditions=CONDITIONS if told else 0), f"{base}_{width}_{share:g}"
    if not (folder / f"{name}.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        fit(name, net(), NETWORKS[base][1], Recipe(round(FULL[told] * share), ema=0.999 if share == 1 else 0.99, half=True),
            folder, device)
    return load_weights(net(), name, folder).to(device)


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
