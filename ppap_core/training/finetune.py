"""Low-rank fine-tuning of a diffusion model on images: with few steps and a low rank it makes a bad sibling, with more of
both a good one."""
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from ..noise import expand
from ..rng import seeded
from .loop import RunOptions, optimize
from .lora import LoraUpdate, supports_lora, with_adapters

Predict = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images (B, C, H, W), noise like them, share of the noise schedule (B,)) -> (denoised prediction, noise level (B,))"""


@dataclass(frozen=True)
class FineTune:
    """The training of one sibling."""

    steps: int = 400
    rank: int = 4
    batch: int = 4
    lr: float = 1e-3
    seed: int = 0
    save_every: int = 50


def fresh_changes(net: nn.Module, rank: int, seed: int) -> dict[str, LoraUpdate]:
    """For every layer that can have one a change that is nothing yet; as LoRA starts, up is zero and down is random."""
    changes = {}
    for name, layer in net.named_modules():
        if supports_lora(layer):
            weight = layer.weight
            down = torch.empty(rank, *weight.shape[1:])
            nn.init.kaiming_uniform_(down, a=5**0.5, generator=seeded(seed, len(changes)))
            up = torch.zeros(weight.shape[0], rank)
            changes[name] = LoraUpdate(*(each.to(weight.device).requires_grad_(True) for each in (up, down)))
    if not changes:
        raise ValueError(f"{type(net).__name__} has no Linear or Conv2d layer that could be fine-tuned")
    return changes


def fine_tune(net: nn.Module, predict: Predict, images: Tensor, config: FineTune, sigma_data: float = 1.0,
              options: RunOptions = RunOptions()) -> tuple[dict[str, LoraUpdate], list[float]]:
    """Low-rank changes of `net`, the network inside `predict`, that make it better on images (n, C, H, W), and the losses.

    The loss is EDM's (Karras et al. 2022, eq. 8), which is that of noise prediction at low noise and of velocity at high.
    The weights of the network stay as they are. options: run_id is completed by the settings and the shape of the images;
    on_step gets the changes as they are after the step.
    """
    with torch.inference_mode(False):
        changes = fresh_changes(net, config.rank, config.seed)
        images = images.clone()

        def loss(step: int) -> Tensor:
            generator = seeded(config.seed, step, 1)
            chosen = images[torch.randint(len(images), (config.batch,), generator=generator)]
            noise = torch.randn(chosen.shape, generator=generator).to(chosen)
            share = torch.rand(config.batch, generator=generator)
            with with_adapters(net, {name: [change] for name, change in changes.items()}):
                denoised, sigma = predict(chosen, noise, share)
            weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
            return (expand(weight, chosen) * (denoised - chosen).square()).mean()

        parameters = {f"{name}.{part}": getattr(change, part) for name, change in changes.items() for part in ("up", "down")}
        run_id = {"config": {key: value for key, value in asdict(config).items() if key != "save_every"},
                  "images": list(images.shape)}
        options = replace(options.identified(run_id).reporting(changes), save_every=config.save_every)
        losses = optimize(parameters, loss, config.steps, config.lr, "the fine-tuning", options)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return changes, losses


def as_lora(changes: dict[str, LoraUpdate], prefix: str) -> dict[str, Tensor]:
    """The changes under the names of a LoRA file, copied: prefix, then the layer's name."""
    found = {}
    for name, change in changes.items():
        up = change.up.detach().clone().cpu()
        found[f"{prefix}{name}.lora_up.weight"] = up.reshape(*up.shape, *(1,) * (change.down.ndim - 2))
        found[f"{prefix}{name}.lora_down.weight"] = change.down.detach().clone().cpu()
        found[f"{prefix}{name}.alpha"] = torch.tensor(float(up.shape[1]))
    return found
