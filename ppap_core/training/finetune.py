"""LoRA fine-tuning of a diffusion model on images: few steps and a low rank make a bad sibling, more of both a good one."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..noise import expand
from ..rng import seeded
from .loop import RunOptions, optimize
from .lora import LoraUpdate, named_layers, supports_lora, with_adapters

Predict = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images (B, C, H, W), noise like them, share of the noise schedule (B,)) -> (denoised prediction, noise level (B,))"""


@dataclass(frozen=True)
class FineTune:
    """The training of one LoRA."""

    steps: int = 400   # optimiser steps
    rank: int = 4
    batch: int = 4     # images in a step
    lr: float = 1e-3   # first learning rate of AdamW; falls to zero along a cosine
    seed: int = 0

    def fingerprint_fields(self) -> dict[str, object]:
        """Fields for `digest`, with the constant by which version 0.1.0 recognises saved work."""
        return {**vars(self), "save_every": 50}


def initial_updates(net: nn.Module, rank: int, seed: int, device: torch.device) -> dict[str, LoraUpdate]:
    """A trainable update for every layer that supports one, by name, as LoRA starts: down random, up zero.

    seed: of the random numbers. device: where the network computes; weights may wait elsewhere. ValueError if the network
    has no such layer.
    """
    updates: dict[str, LoraUpdate] = {}
    for name, layer in named_layers(net).items():
        if supports_lora(layer):
            weight: Tensor = layer.weight
            down = torch.empty(rank, *weight.shape[1:])
            nn.init.kaiming_uniform_(down, a=5**0.5, generator=seeded(seed, len(updates)))
            up = torch.zeros(weight.shape[0], rank)
            updates[name] = LoraUpdate(up.to(device).requires_grad_(), down.to(device).requires_grad_())
    if not updates:
        raise ValueError(f"{type(net).__name__} has no Linear or Conv2d layer that could be fine-tuned")
    return updates


def fine_tune(net: nn.Module, predict: Predict, images: Tensor, config: FineTune, sigma_data: float = 1.0,
              options: RunOptions = RunOptions()) -> tuple[dict[str, LoraUpdate], list[float]]:
    """Train low-rank updates of a network on images and return them with the loss of every step.

    net: the network inside `predict`; its weights stay as they are. images: (n, C, H, W). sigma_data: their std.
    options: run_id is completed by the settings and the shape of the images; on_step gets the updates by layer.
    ValueError if the network has no layer that could be updated.
    """
    with torch.inference_mode(False):
        images = images.clone()

    def loss(step: int) -> Tensor:
        generator = seeded(config.seed, step, 1)
        chosen = images[torch.randint(len(images), (config.batch,), generator=generator)]
        noise = torch.randn(chosen.shape, generator=generator).to(chosen)
        denoised, sigma = predict(chosen, noise, torch.rand(config.batch, generator=generator))
        return denoising_loss(denoised, chosen, sigma, sigma_data)

    return train_updates(net, loss, config, images.device, "the fine-tuning",
                         options.identified({"config": dict(vars(config)), "images": list(images.shape)}))


def train_updates(net: nn.Module, loss: Callable[[int], Tensor], config: FineTune, device: torch.device, name: str,
                  options: RunOptions) -> tuple[dict[str, LoraUpdate], list[float]]:
    """Train low-rank updates of a network by loss(step) and return them with the loss of every step.

    device: where the network computes. name: of the training, for error messages. options: on_step gets the updates.
    ValueError if the network has no layer that could be updated.
    """
    with torch.inference_mode(False):
        updates = initial_updates(net, config.rank, config.seed, device)
        parameters = {f"{layer}.{part}": getattr(update, part)
                      for layer, update in updates.items() for part in ("up", "down")}
        with with_adapters(net, {layer: [update] for layer, update in updates.items()}):
            losses = optimize(parameters, loss, config.steps, config.lr, name, options.reporting(updates))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return updates, losses


def denoising_loss(denoised: Tensor, target: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss (Karras et al. 2022, eq. 8): that of noise prediction at low noise, of velocity at high noise.

    denoised, target: (B, C, ...). sigma: (B,). sigma_data: std of the images.
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (expand(weight, target) * (denoised - target).square()).mean()


def as_lora(updates: dict[str, LoraUpdate], prefix: str) -> dict[str, Tensor]:
    """Copies of the updates under the names of a LoRA file: prefix, the layer's name, lora_up, lora_down and alpha."""
    tensors = {}
    for name, update in updates.items():
        up = update.up.detach().clone().cpu()
        tensors[f"{prefix}{name}.lora_up.weight"] = up.reshape(*up.shape, *(1,) * (update.down.ndim - 2))
        tensors[f"{prefix}{name}.lora_down.weight"] = update.down.detach().clone().cpu()
        tensors[f"{prefix}{name}.alpha"] = torch.tensor(float(up.shape[1]))
    return tensors
