"""Train every weight of the tiny world from fixed seeds: python -m ppap_core.tinyworld.train [name ...]

Runs on a GPU when there is one and on the CPU when not, and goes on where it was stopped.
"""
import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import load_tensors, optimizer_tensors, restore_optimizer, save_tensors, with_prefix, without_prefix
from ..tasks import cross_entropy, pixel_cross_entropy
from . import TASKS, WEIGHTS
from .denoiser import SIGMA_DATA, TinyDenoiser
from .networks import augment, tiny_convnext, tiny_resnet
from .scenes import Scenes, draw

TRAINING_SEEDS = 10_000_000  # scenes below this number are never trained on


@dataclass(frozen=True)
class Recipe:
    """How one network is trained; goes into its file."""

    steps: int
    batch: int = 64
    lr: float = 1e-3       # AdamW, 200 steps of warm-up, cosine to zero
    ema: float = 0.999     # the averaged weights are what is saved
    seed: int = 0


def denoiser_loss(net: nn.Module, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """EDM's loss (Karras et al. 2022, eq. 8) with more weight where a scene's shape is decided, (B,)."""
    image = scenes.image
    sigma = (torch.randn(len(image), generator=generator) * 1.2 - 0.5).exp().to(image.device)
    noise = torch.randn(image.shape, generator=generator).to(image.device)
    error = net(image + sigma[:, None, None, None] * noise, sigma).float() - image
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return weight * error.square().mean(dim=(1, 2, 3))


def class_loss(net: nn.Module, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Cross-entropy of the class, (B,)."""
    return cross_entropy(net(augment(scenes.image, generator)), scenes.label)


def depth_loss(net: nn.Module, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Absolute error of the depth, (B,)."""
    return (net(augment(scenes.image, generator)).float() - scenes.depth).abs().mean(dim=(1, 2, 3))


def segmentation_loss(net: nn.Module, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy of the pixels, (B,)."""
    return pixel_cross_entropy(net(augment(scenes.image, generator)), scenes.segmentation)


def rate(step: int, recipe: Recipe) -> float:
    """Learning rate of a step."""
    return recipe.lr * min((step + 1) / 200, 1) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def train_step(net: nn.Module, loss: Callable, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int,
               device: torch.device) -> float:
    """One step on scenes that no other step has seen: a function of (recipe, step); returns the loss."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    start = TRAINING_SEEDS * (1 + recipe.seed) + step * recipe.batch
    scenes = Scenes(*(part.to(device) for part in draw(range(start, start + recipe.batch))))
    optimizer.param_groups[0]["lr"] = rate(step, recipe)
    with torch.autocast(device.type, torch.bfloat16):
        value = loss(net, scenes, generator).mean()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()


def update_average(average: dict[str, Tensor], net: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the present ones."""
    for name, current in net.state_dict().items():
        if current.is_floating_point():
            average[name].lerp_(current, 1 - decay)
        else:
            average[name].copy_(current)  # counters of batch norm


def resume(state_file: Path, net: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put back what an interrupted training left; returns the next step."""
    if not state_file.exists():
        return 0
    tensors, about = load_tensors(state_file)
    net.load_state_dict(without_prefix("net", tensors))
    for name, value in without_prefix("average", tensors).items():
        average[name].copy_(value)
    restore_optimizer(optimizer, without_prefix("optimizer", tensors))
    return about["step"]


def fit(name: str, net: nn.Module, loss: Callable, recipe: Recipe, folder: Path, device: torch.device,
        save_every: int = 250) -> None:
    """Train a network on fresh scenes and write `folder/name.safetensors`; goes on from its state file."""
    state_file = folder / f"{name}.state.safetensors"
    net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=0.01)
    average = {key: value.detach().clone() for key, value in net.state_dict().items()}
    first = resume(state_file, net, average, optimizer)
    started, losses = time.monotonic(), []
    for step in range(first, recipe.steps):
        losses.append(train_step(net, loss, optimizer, recipe, step, device))
        update_average(average, net, min(recipe.ema, (1 + step) / (10 + step)))
        if (step + 1) % save_every == 0:
            pace = (time.monotonic() - started) / len(losses)
            print(f"{name}: step {step + 1} of {recipe.steps}, loss {sum(losses[-save_every:]) / save_every:.4f}, "
                  f"{pace * (recipe.steps - step - 1) / 60:.0f} min to go", flush=True)
            save_tensors(state_file, with_prefix("net", net.state_dict()) | with_prefix("average", average)
                         | with_prefix("optimizer", optimizer_tensors(optimizer)), {"step": step + 1})
    save_tensors(folder / f"{name}.safetensors", average, {"name": name, "recipe": asdict(recipe)})
    state_file.unlink(missing_ok=True)


OUTPUTS = {task: (max(len(labels), 1), dense) for task, (labels, dense) in TASKS.items()}
LOSSES = {"class": class_loss, "depth": depth_loss, "segmentation": segmentation_loss}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable, Recipe]] = {
    "denoiser": (TinyDenoiser, denoiser_loss, Recipe(steps=11_000, ema=0.9995)),
    **{f"guider_{task}": (partial(tiny_resnet, *OUTPUTS[task]), loss, Recipe(steps=3000, seed=1))
       for task, loss in LOSSES.items()},
    **{f"judge_{task}": (partial(tiny_convnext, *OUTPUTS[task]), loss, Recipe(steps=2000, seed=2))
       for task, loss in LOSSES.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which networks, of {', '.join(NETWORKS)}; without any, all")
    parser.add_argument("--folder", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in arguments.names or NETWORKS:
        make, loss, recipe = NETWORKS[name]
        torch.manual_seed(recipe.seed)
        fit(name, make(), loss, recipe, arguments.folder, device)


if __name__ == "__main__":
    main()
