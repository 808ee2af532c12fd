"""Guidance baked into a LoRA in a real ComfyUI: it does what guidance did, with any loader, and resumes."""
from typing import Any

import pytest
import torch
from helpers import says
from helpers.worlds import LatentWorld, PixelWorld

SETTINGS = {"steps": 4, "rank": 2, "batch_size": 4, "learning_rate": 1e-3, "seed": 0}


def guided_samples(world: PixelWorld, steps: int = 2) -> Any:
    terms = world.term(weight=0.3, strength="balanced")
    [model] = world.comfy("PPAPApplyGuidance", model=world.model, terms=terms, max_rms=0.0)
    return world.samples(name=f"guided in {steps}", model=model, steps=steps)


def bake(world: PixelWorld, name: str, samples: Any, **changes: Any) -> Any:
    """The model with a baked LoRA."""
    settings = {"model": world.model, "positive": world.conditioning, **SETTINGS, **changes}
    return world.comfy("PPAPBakeGuidance", samples=samples, name=name, **settings)[0]


def with_file(world: PixelWorld, name: str, strength: float = 1.0) -> Any:
    """The model with a file of models/loras, by the stock loader."""
    return world.comfy("LoraLoaderModelOnly", model=world.model, lora_name=f"{name}.safetensors", strength_model=strength)[0]


@pytest.mark.wide
def test_a_baked_lora_leads_where_guidance_led(pixels: PixelWorld):
    world = PixelWorld(pixels.comfy, batch=16)
    model = bake(world, "star", guided_samples(world, steps=6), steps=100, rank=8, batch_size=8)
    plain, half, full = (world.energy(world.guider, world.sample(each)).mean()
                         for each in (world.model, with_file(world, "star", 0.5), model))
    assert full < half < plain - 0.2


def test_the_samples_hold_what_the_guided_model_predicts(pixels: PixelWorld):
    guided, plain = guided_samples(pixels).store, pixels.samples().store
    assert torch.equal(guided.noisy_vp[:, 0], plain.noisy_vp[:, 0])
    assert not torch.equal(guided.denoised[:, 0], plain.denoised[:, 0])


def test_a_stock_loader_sees_the_same_lora(pixels: PixelWorld):
    before, model = pixels.sample(), bake(pixels, "baked", guided_samples(pixels))
    made = pixels.sample(model)
    assert not torch.equal(made, before) and torch.equal(pixels.sample(), before)
    assert torch.equal(pixels.sample(with_file(pixels, "baked")), made)


def test_baking_at_a_rate_of_0_changes_nothing(pixels: PixelWorld):
    model = bake(pixels, "nothing", guided_samples(pixels), learning_rate=0.0)
    assert torch.equal(pixels.sample(model), pixels.sample())


def test_a_preset_stands_for_numbers(pixels: PixelWorld, monkeypatch: pytest.MonkeyPatch):
    presets = pixels.comfy.pack.ppap_core.experts.presets.BAKING_PRESETS
    monkeypatch.setitem(presets, "quick look", {"steps": 3, "rank": 4})
    samples = guided_samples(pixels)
    made, by_numbers, as_set = (pixels.sample(bake(pixels, "preset", samples, **changes))
                                for changes in ({"preset": "quick look"}, {"steps": 3, "rank": 4}, {"preset": "as set"}))
    assert torch.equal(made, by_numbers) and torch.equal(as_set, pixels.sample(bake(pixels, "preset", samples)))
    assert not torch.equal(made, as_set)


def test_a_baking_that_was_cancelled_goes_on(pixels: PixelWorld, monkeypatch: pytest.MonkeyPatch):
    import comfy.model_management as management

    samples, module = guided_samples(pixels), pixels.comfy.pack.nodes.bridge.baking
    whole, seen = pixels.sample(bake(pixels, "whole", samples)), []

    def stop(self: Any, done: int, preview: Any = None) -> None:
        seen.append(done)
        if done == 2 and len(seen) == 2:
            raise management.InterruptProcessingException
    monkeypatch.setattr(module.Progress, "__call__", stop)
    with pytest.raises(management.InterruptProcessingException):
        bake(pixels, "cancelled", samples)
    assert torch.equal(pixels.sample(bake(pixels, "cancelled", samples)), whole) and seen == [1, 2, 3, 4]


def test_it_says_how_much_was_learned(pixels: PixelWorld):
    module = pixels.comfy.pack.nodes.bridge.baking
    half, nothing = (module.describe_learned(module.Learned(1.0, error), "x") for error in (0.25, 1.0))
    assert "x.safetensors the model predicts guided steps of other images with 50% less error" in half
    assert "train longer" in nothing and "train longer" not in half


def test_samples_of_something_else_are_refused(pixels: PixelWorld, latents: LatentWorld):
    samples = guided_samples(pixels)
    with says(ValueError, "3 channels", "diffuses 16"):
        bake(pixels, "other", samples, model=latents.model("flow"))
    samples.store.manifest["frames"] = 4
    with says(ValueError, "frames of videos"):
        bake(pixels, "frames", samples)
    del samples.store.manifest["frames"]
    samples.store.manifest["prompts"] = "drawn"
    with says(ValueError, "several prompts", "draw_prompts off"):
        bake(pixels, "prompts", samples)
    assert "cannot name a file" in pixels.comfy.registered["PPAPBakeGuidance"].validate_inputs(name="../out")
