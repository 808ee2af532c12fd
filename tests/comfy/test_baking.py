"""Guidance baked into a LoRA in a real ComfyUI: it does what guidance did, in any graph, and resumes."""
from typing import Any

import pytest
import torch
from helpers.worlds import PixelWorld

SETTINGS = {"steps": 6, "rank": 4, "batch_size": 8, "learning_rate": 1e-3, "seed": 0}


def guided_samples(world: PixelWorld, weight: float = 0.3, **changes: Any) -> Any:
    terms = world.term(weight=weight, strength="balanced")
    [model] = world.comfy("PPAPApplyGuidance", model=world.model, terms=terms, max_rms=0.0)
    return world.samples(name=f"guided {weight}", model=model, steps=6, **changes)


def baked(world: PixelWorld, name: str, samples: Any = None, **changes: Any) -> tuple:
    return world.comfy("PPAPBakeGuidance", model=world.model, samples=samples or guided_samples(world),
                       positive=world.conditioning, name=name, **SETTINGS | changes)


@pytest.mark.slow
def test_a_baked_lora_leads_where_guidance_led(pixels: PixelWorld):
    world = PixelWorld(pixels.comfy, batch=16)
    model, _ = baked(world, "baked star", steps=150, rank=8)
    [loaded] = world.comfy("LoraLoaderModelOnly", model=world.model, lora_name="baked star.safetensors", strength_model=1.0)
    [half] = world.comfy("LoraLoaderModelOnly", model=world.model, lora_name="baked star.safetensors", strength_model=0.5)
    images = [world.sample(each) for each in (None, half, model)]
    plain, middle, full = (world.energy(world.guider, image).mean() for image in images)
    assert full < middle < plain - 0.2
    assert torch.equal(images[-1], world.sample(loaded)), "stock loaders see the same LoRA"
