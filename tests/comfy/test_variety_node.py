"""Variety in a real ComfyUI: the images of a batch, and those of earlier ones, are kept apart."""
from typing import Any

import pytest
import torch
from helpers import says
from helpers.workbench import Workbench, ksampler
from helpers.worlds import PixelWorld
from torch import Tensor

SETTINGS = {"weight": 0.7, "strength": "balanced"}


def spread(images: Tensor) -> float:
    """Mean distance of images to each other in layout."""
    return float(torch.pdist(torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)).mean())


def varied(world: PixelWorld, weight: float = 0.7, sampling: dict | None = None, **inputs: Any) -> Tensor:
    [guider] = world.comfy("PPAPVariety", **inputs)
    return world.guided(world.term(guider, weight=weight, strength="balanced"), **(sampling or {}))


@pytest.mark.parametrize("steps", [4, 8])
def test_images_of_a_batch_differ_more(pixels: PixelWorld, steps: int):
    made, plain = varied(pixels, sampling={"steps": steps}), pixels.sample(steps=steps)
    assert spread(made) > 1.1 * spread(plain)


def test_a_weight_of_0_changes_nothing(pixels: PixelWorld):
    assert torch.equal(varied(pixels, weight=0.0), pixels.sample())


def test_any_guider_says_in_what_they_differ(pixels: PixelWorld):
    in_class, in_layout = varied(pixels, guider=pixels.plain), varied(pixels)
    assert not torch.equal(in_class, in_layout) and in_class.isfinite().all()


def test_further_images_are_kept_away_from(pixels: PixelWorld):
    latent = {"samples": pixels.latent["samples"][:1]}
    alone, earlier = pixels.sample(latent_image=latent), pixels.seen()
    assert torch.equal(varied(pixels, sampling={"latent_image": latent}), alone), "one image has no others"
    assert not torch.equal(varied(pixels, unlike=earlier, sampling={"latent_image": latent}), alone)


def test_frames_of_a_video_are_not_kept_apart(bench: Workbench):
    scene = bench.scene("Wan 2.1")
    [guider] = bench.comfy("PPAPVariety")
    with says(ValueError, "unlike each other", "frames"):
        ksampler(bench, bench.guide(scene, guider=guider))
