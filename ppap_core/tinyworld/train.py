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


def fit(name: str, net: nn.Module, loss: Callable, recipe: Recipe, folder: Path, device: torch.device,
        save_every: int = 250) -> None:
    """Train a network on fresh scenes and write `folder/name.safetensors`; resumes from its state file."""
    state_file = folder / f"{name}.state.safetensors"
    net.to(device).train()
    average = {key: value.detach().clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=0.01)
    first = 0
    if state_file.exists():
        tensors, about = load_tensors(state_file)
        net.load_state_dict(without_prefix("net", tensors))
        average = {key: value.to(device) for key, value in without_prefix("average", tensors).items()}
        restore_optimizer(optimizer, without_prefix("optimizer", tensors))
        first = about["step"]
    started, total = time.monotonic(), 0.0
    for step in range(first, recipe.steps):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        start = TRAINING_SEEDS * (1 + recipe.seed) + step * recipe.batch
        scenes = Scenes(*(part.to(device) for part in draw(range(start, start + recipe.batch))))
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe)
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(net, scenes, generator).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        decay = min(recipe.ema, (1 + step) / (10 + step))
        for key, current in net.state_dict().items():
            average[key].lerp_(current.to(average[key].dtype), 1 - decay) if current.is_floating_point() \
                else average[key].copy_(current)
        total += value.item()
        if (step + 1) % save_every == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            print(f"{name}: step {step + 1}/{recipe.steps}, loss {total / save_every:.4f}, "
                  f"{pace:.3f} s/step, {pace * (recipe.steps - step - 1) / 60:.0f} min to go", flush=True)
            total = 0.0
            save_tensors(state_file, with_prefix("net", net.state_dict()) | with_prefix("average", average)
                         | with_prefix("optimizer", optimizer_tensors(optimizer)), {"step": step + 1})
    save_tensors(folder / f"{name}.safetensors", average, {"name": name, "recipe": asdict(recipe)})
    state_file.unlink(missing_ok=True)


OUTPUTS = {task: (max(len(labels), 1), dense) for task, (labels, dense) in TASKS.items()}
LOSSES = {"class": class_loss, "depth": depth_loss, "segmentation": segmentation_loss}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable, Recipe]] = {
    "denoiser": (TinyDenoiser, denoiser_loss, Recipe(steps=15_000, ema=0.9995)),
    **{f"guider_{task}": (partial(tiny_resnet, *OUTPUTS[task]), LOSSES[task], Recipe(steps=3000, seed=1)) for task in TASKS},
    **{f"judge_{task}": (partial(tiny_convnext, *OUTPUTS[task]), LOSSES[task], Recipe(steps=2000, seed=2)) for task in TASKS},
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
