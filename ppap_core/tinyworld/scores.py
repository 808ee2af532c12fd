"""How good the bundled weights are, on scenes that nothing was trained on: python -m ppap_core.tinyworld.scores"""
import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..guider import Guider, clean
from ..noise import expand
from ..plots import contact_sheet, save_picture
from . import TASKS, load_guider, load_judge
from .scenes import Scenes, draw
from .world import load_world

COUNT, STEPS, CONFIDENT = 1000, 32, 0.9
NOISE = (0.0, 0.1, 0.2, 0.5, 1.0)


def truth(scenes: Scenes, task: str) -> Tensor:
    """What a perfect network of a task would be aimed at."""
    return {"class": scenes.label, "depth": scenes.depth, "segmentation": scenes.segmentation}[task]


@torch.no_grad()
def score(guider: Guider, scenes: Scenes, sigma: float) -> float:
    """Share of right classes or pixels, or correlation of depths, under noise of this size."""
    noise = torch.randn(scenes.image.shape, generator=torch.Generator().manual_seed(0))
    images = scenes.image + expand(torch.full((len(noise),), sigma), noise) * noise
    if guider.task == "class":
        return float((guider.predict(images, clean(images)).argmax(1) == scenes.label).float().mean())
    return float(guider.aim(truth(scenes, guider.task)).score(images, clean(images)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="write 64 samples of the denoiser into this PNG")
    options = parser.parse_args()
    scenes = draw(range(COUNT))
    print("| network | " + " | ".join(f"noise {sigma:g}" for sigma in NOISE) + " |\n|---|" + "---:|" * len(NOISE))
    for role, load in (("guider", load_guider), ("judge", load_judge)):
        for task in TASKS:
            scored = (score(load(task), scenes, sigma) for sigma in NOISE)
            print(f"| {role}, {task} | " + " | ".join(f"{each:.3f}" for each in scored) + " |", flush=True)
    world = load_world()
    images = torch.cat([world.sample(range(start, start + 64), STEPS) for start in range(0, 512, 64)])
    with torch.no_grad():
        best = world.judge.predict(images, clean(images)).softmax(1).max(1)
    share = (best.values > CONFIDENT).float().mean()
    print(f"\nThe judge is sure, above {CONFIDENT:g}, of the class of {share:.1%} of {len(images)} samples of the denoiser; "
          f"each class: {best.indices.bincount(minlength=8).tolist()}")
    if options.picture:
        rows = {f"seeds {start} to {start + 7}": images[start:start + 8] for start in range(0, 64, 8)}
        save_picture(contact_sheet(rows, scale=2), options.picture)


if __name__ == "__main__":
    main()
