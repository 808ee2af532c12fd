"""How good the bundled weights are, on scenes that nothing was trained on: python -m benchmarks.scores"""
import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ppap_core.guiders.guider import Guider, clean
from ppap_core.noise import expand
from ppap_core.tinyworld import latents
from ppap_core.tinyworld.loaders import LABELS, condition, load_guider
from ppap_core.tinyworld.scenes import CLASSES, Scenes, draw, truth
from ppap_core.viz.plots import contact_sheet, save_picture

from .latent_world import LatentWorld, eps_sigmas, flow_sigmas
from .networks import load_held_out_judge, load_judge
from .tiny_world import load_world

COUNT, STEPS, CONFIDENT = 1000, 32, 0.9
LATENTS = 128  # samples of each model of latents
NOISE = (0.0, 0.1, 0.2, 0.5, 1.0)


@torch.no_grad()
def score(guider: Guider, scenes: Scenes, sigma: float) -> float:
    """Share of right classes or pixels, or correlation of depths, under noise of this size."""
    noise = torch.randn(scenes.image.shape, generator=torch.Generator().manual_seed(0))
    images = scenes.image + expand(torch.full((len(noise),), sigma), noise) * noise
    if guider.task == "class":
        return float((guider.predict(images, clean(images)).argmax(1) == scenes.label).float().mean())
    return float(guider.aim(truth(scenes, guider.task)).score(images, clean(images)).mean())


@torch.no_grad()
def latent_lines() -> list[str]:
    """What the networks of the latent world do, in words."""
    world = LatentWorld()
    labels = torch.arange(LATENTS, device=world.device) % len(CLASSES)
    scenes = draw(range(64), latents.SIZE).image.to(world.device)
    eps = partial(latents.denoise_by_eps, latents.load_eps().to(world.device))
    error = (world.decode(latents.scale_latent(world.autoencoder.encode(scenes))) - scenes).abs().mean()
    lines = [f"The autoencoder gives scenes back with a mean error of {error:.3f}, where they span -1 to 1."]
    for name, denoise, sigmas in (("flow", world.denoise, flow_sigmas(STEPS)), ("noise-predicting", eps, eps_sigmas(STEPS))):
        anything = judged(world, denoise, sigmas, torch.full_like(labels, -1)).max(1).values
        told = judged(world, denoise, sigmas, labels).argmax(1)
        sure, right = (float(each.float().mean()) for each in (anything > CONFIDENT, told == labels))
        lines.append(f"The judge is sure of the class of {sure:.0%} of {LATENTS} samples of the {name} model, and sees the "
                     f"class that the model was told in {right:.0%}.")
    return lines


def judged(world: LatentWorld, denoise: Callable[..., Tensor], sigmas: Tensor, labels: Tensor, batch: int = 32) -> Tensor:
    """What the judge of classes thinks of images of these classes, (B, K) probabilities."""
    judge, found = world.judges["class"], []
    for start in range(0, len(labels), batch):
        given = condition(labels[start:start + batch])
        images = world.decode(world.sample(range(start, start + batch), sigmas, partial(denoise, given=given)))
        found.append(judge.predict(images, clean(images)).softmax(1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="write 64 samples of the denoiser into this PNG")
    options = parser.parse_args()
    scenes = draw(range(COUNT))
    print("| network | " + " | ".join(f"noise {sigma:g}" for sigma in NOISE) + " |\n|---|" + "---:|" * len(NOISE))
    for role, load in (("guider", load_guider), ("judge", load_judge), ("second judge", load_held_out_judge)):
        for task in LABELS:
            scored = (score(load(task), scenes, sigma) for sigma in NOISE)
            print(f"| {role}, {task} | " + " | ".join(f"{each:.3f}" for each in scored) + " |", flush=True)
    world = load_world()
    images = torch.cat([world.sample(range(start, start + 64), STEPS) for start in range(0, 512, 64)])
    with torch.no_grad():
        best = world.class_judge.predict(images, clean(images)).softmax(1).max(1)
    share = (best.values > CONFIDENT).float().mean()
    print(f"\nThe judge is sure, above {CONFIDENT:g}, of the class of {share:.1%} of {len(images)} samples of the denoiser; "
          f"each class: {best.indices.bincount(minlength=8).tolist()}")
    print("\n".join(latent_lines()))
    if options.picture:
        rows = {f"seeds {start} to {start + 7}": images[start:start + 8] for start in range(0, 64, 8)}
        save_picture(contact_sheet(rows, scale=2), options.picture)


if __name__ == "__main__":
    main()
