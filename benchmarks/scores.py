"""Quality of the bundled weights on scenes that nothing was trained on: python -m benchmarks.scores"""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ppap_core import Guider
from ppap_core.guiders.guider import clean
from ppap_core.noise import expand
from ppap_core.tinyworld import latents
from ppap_core.tinyworld.loaders import LABELS, condition, load_guider
from ppap_core.tinyworld.scenes import CLASSES, Scenes, draw, truth
from ppap_core.viz.drawing import contact_sheet, save_picture

from .latent_world import LatentWorld, eps_sigmas, flow_sigmas
from .networks import load_held_out_judge, load_judge
from .report import Column, markdown
from .tiny_world import TinyWorld, load_world

COUNT, STEPS, CONFIDENT = 1000, 32, 0.9
LATENTS = 128  # samples of each model of latents
NOISE = (0.0, 0.1, 0.2, 0.5, 1.0)


@torch.no_grad()
def score(guider: Guider, scenes: Scenes, sigma: float) -> float:
    """Share of right classes or pixels, or correlation of depths, under noise of std sigma."""
    noise = torch.randn(scenes.image.shape, generator=torch.Generator().manual_seed(0))
    images = scenes.image + expand(torch.full((len(noise),), sigma), noise) * noise
    if guider.task == "class":
        return float((guider.predict(images, clean(images)).argmax(1) == scenes.label).float().mean())
    return float(guider.aim(truth(scenes, guider.task)).score(images, clean(images)).mean())


@torch.no_grad()
def latent_lines() -> list[str]:
    """The quality of the latent world's networks in sentences."""
    world = LatentWorld()
    labels = torch.arange(LATENTS, device=world.device) % len(CLASSES)
    scenes = draw(range(64), latents.SIZE).image.to(world.device)
    eps = partial(latents.denoise_by_eps, latents.load_eps().to(world.device))
    error = (world.decode(latents.scale_latent(world.autoencoder.encode(scenes))) - scenes).abs().mean()
    lines = [f"The autoencoder gives scenes back with a mean error of {error:.3f}, where they span -1 to 1."]
    for name, denoise, sigmas in (("flow", world.denoise, flow_sigmas(STEPS)), ("noise-predicting", eps, eps_sigmas(STEPS))):
        unconditional = class_probabilities(world, denoise, sigmas, torch.full_like(labels, -1)).max(1).values
        conditional = class_probabilities(world, denoise, sigmas, labels).argmax(1)
        confident, right = (float(hits.float().mean()) for hits in (unconditional > CONFIDENT, conditional == labels))
        lines.append(f"The judge is sure of the class of {confident:.0%} of {LATENTS} samples of the {name} model, and sees "
                     f"the class that the model was conditioned on in {right:.0%}.")
    return lines


def class_probabilities(world: LatentWorld, denoise: Callable[..., Tensor], sigmas: Tensor, labels: Tensor,
                        batch: int = 32) -> Tensor:
    """Probabilities (B, K) by the judge of classes for images conditioned on labels (B,); -1: unconditional."""
    judge, parts = world.judges["class"], []
    for start in range(0, len(labels), batch):
        given = condition(labels[start:start + batch])
        images = world.decode(world.sample(range(start, start + batch), sigmas, partial(denoise, given=given)))
        parts.append(judge.predict(images, clean(images)).softmax(1))
    return torch.cat(parts)


def network_table() -> str:
    """Scores of guiders and judges at several noise levels, in Markdown."""
    scenes = draw(range(COUNT))
    columns = [Column("network", "{network}", numeric=False),
               *(Column(f"noise {sigma:g}", f"{{scores[{index}]:.3f}}") for index, sigma in enumerate(NOISE))]
    rows = [{"network": f"{role}, {task}", "scores": [score(load(task), scenes, sigma) for sigma in NOISE]}
            for role, load in (("guider", load_guider), ("judge", load_judge), ("second judge", load_held_out_judge))
            for task in LABELS]
    return markdown(columns, rows)


@torch.no_grad()
def denoiser_line(world: TinyWorld, images: Tensor) -> str:
    """How clearly samples of the denoiser show a class, in a sentence."""
    best = world.class_judge.predict(images, clean(images)).softmax(1).max(1)
    share = (best.values > CONFIDENT).float().mean()
    return (f"The judge is sure, above {CONFIDENT:g}, of the class of {share:.1%} of {len(images)} samples of the denoiser; "
            f"each class: {best.indices.bincount(minlength=8).tolist()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="write 64 samples of the denoiser into this PNG")
    options = parser.parse_args()
    print(network_table(), flush=True)
    world = load_world()
    images = torch.cat([world.sample(range(start, start + 64), STEPS) for start in range(0, 512, 64)])
    print("\n".join([denoiser_line(world, images), *latent_lines()]))
    if options.picture:
        rows = {f"seeds {start} to {start + 7}": images[start:start + 8] for start in range(0, 64, 8)}
        save_picture(contact_sheet(rows, scale=2), options.picture)


if __name__ == "__main__":
    main()
