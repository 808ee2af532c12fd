"""Rank Images and Best Seeds in a real ComfyUI: the best of a batch, and the noises that lead to it."""
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import says
from helpers.workbench import Workbench
from helpers.worlds import LatentWorld, PixelWorld
from torch import Tensor, nn


class Whole(nn.Module):
    """A scorer that no gradient passes: how many of the pixels are bright, in whole percent."""

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        return (100 * (image > 0).flatten(1).float().mean(1, keepdim=True)).round()


def ranked(world: PixelWorld, images: Tensor, terms: tuple, **inputs: Any) -> tuple:
    return world.comfy("PPAPRankImages", image=images, terms=terms, **{"count": 1, **inputs})


@pytest.fixture(scope="module")
def images(pixels: PixelWorld) -> Tensor:
    """Six images of the tiny world."""
    return pixels.comfy("VAEDecode", samples={"samples": six(pixels)}, vae=pixels.vae)[0]


def six(world: PixelWorld) -> Tensor:
    return world.sample(latent_image={"samples": world.latent["samples"][:1].repeat(6, 1, 1, 1)})


def energies(world: PixelWorld, images: Tensor, guider: Any) -> Tensor:
    return world.energy(guider, images.movedim(-1, 1) * 2 - 1)


# Rank Images

def test_images_are_sorted_by_the_energy_of_a_term(pixels: PixelWorld, images: Tensor):
    best, _, ordered, text, scores, mask = ranked(pixels, images, pixels.term(), count=2)
    order = energies(pixels, images, pixels.guider).argsort()
    assert torch.equal(ordered, images[order]) and torch.equal(best, images[order[:2]])
    assert all(f"image {index + 1}:" in line for index, line in zip(order.tolist(), text.splitlines(), strict=True))
    assert scores == sorted(scores, reverse=True) and abs(sum(scores)) < 1e-4
    assert "met to" in text and "energy" in text
    assert mask.shape == images.shape[:3] and torch.equal(mask.mean((1, 2)).nonzero().flatten(), order[:2].sort().values)


def test_a_negative_weight_turns_the_order_round(pixels: PixelWorld, images: Tensor):
    ordered, turned = (ranked(pixels, images, pixels.term(weight=weight))[2] for weight in (2.0, -0.5))
    assert torch.equal(turned, ordered.flip(0))


def test_weights_of_0_keep_the_order(pixels: PixelWorld, images: Tensor):
    _, _, ordered, text, scores, _ = ranked(pixels, images, pixels.term(weight=0.0))
    assert torch.equal(ordered, images) and scores == [0.0] * 6 and "weight 0" in text


def test_units_of_energies_do_not_matter(pixels: PixelWorld, images: Tensor):
    """The energy of a rule is the sum over thousands of values, that of a class a few nats."""
    [rule] = pixels.comfy("PPAPRule", rule="brightness")
    [bright] = pixels.comfy("PPAPAimAtNumber", guider=rule, number=0.9)
    def order(star: float) -> Tensor:
        return ranked(pixels, images, (*pixels.term(bright, weight=1.0), *pixels.term(weight=star)))[2]
    by_light, by_class = energies(pixels, images, bright).argsort(), energies(pixels, images, pixels.guider).argsort()
    assert torch.equal(order(1e-4), images[by_light]) and torch.equal(order(1e4), images[by_class])
    assert not torch.equal(order(1.0), order(1e-4)) or not torch.equal(order(1.0), order(1e4))


@pytest.mark.parametrize("net", [Whole(), lambda image, sigma: Whole()(image, sigma)], ids=["module", "function"])
def test_a_scorer_needs_no_gradient(pixels: PixelWorld, images: Tensor, net: Any):
    guider = replace(pixels.plain, name="whole", net=net, task="number", preprocess=lambda image: image,
                     target=torch.tensor([[100.0]]))
    ordered = ranked(pixels, images, pixels.term(guider))[2]
    bright = (ordered > 0.5).flatten(1).float().mean(1)
    assert (bright[:-1] >= bright[1:] - 0.011).all() and bright[0] > bright[-1]


def test_latents_of_the_best_are_handed_on(pixels: PixelWorld, images: Tensor):
    samples = six(pixels)
    latent = {"samples": samples, "batch_index": [10, 11, 12, 13, 14, 15], "noise_mask": torch.ones(1, 32, 32)}
    picked = ranked(pixels, images, pixels.term(), count=3, latent=latent)[1]
    order = energies(pixels, images, pixels.guider).argsort()[:3]
    assert torch.equal(picked["samples"], samples[order]) and picked["batch_index"] == (order + 10).tolist()
    assert torch.equal(picked["noise_mask"], latent["noise_mask"])
    with says(ValueError, "holds 2 images", "6 are ranked"):
        ranked(pixels, images, pixels.term(), latent={"samples": samples[:2]})
    blocked = ranked(pixels, images, pixels.term())[1]
    assert "connect" in blocked.message


def test_a_target_of_each_image_goes_with_it(pixels: PixelWorld, images: Tensor):
    many = images.repeat(4, 1, 1, 1)[:20]  # more than are judged at once
    guider = pixels.plain.aim(torch.arange(20) % 8)
    order = energies(pixels, many, guider).argsort(stable=True)
    assert torch.equal(ranked(pixels, many, pixels.term(guider))[2], many[order])


def test_all_but_the_best_are_sampled_again(pixels: PixelWorld, images: Tensor):
    mask = ranked(pixels, images, pixels.term(), count=2)[-1]
    [latent] = pixels.comfy("SetLatentNoiseMask", samples={"samples": six(pixels)}, mask=1 - mask)
    changed = (pixels.sample(latent_image=latent, seed=6) - latent["samples"]).abs().amax((1, 2, 3))
    assert torch.equal(changed < 1e-3, mask.amax((1, 2)) > 0)


# Best Seeds

def best_seeds(world: PixelWorld, **changes: Any) -> tuple:
    settings = {"model": world.model, "terms": world.term(), "seed": 5, "candidates": 8, "count": 2, "steps": 4, "cfg": 1.0,
                "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0, "positive": world.conditioning,
                "negative": world.conditioning, "latent_image": world.latent, **changes}
    return world.comfy("PPAPBestSeeds", **settings)


def test_the_best_seeds_are_those_of_the_short_samplings(pixels: PixelWorld):
    """A sampler with the same seed and steps makes of the latent the very images that were judged."""
    latent, picture, text = best_seeds(pixels)
    every = pixels.sample(steps=4, latent_image={"samples": pixels.latent["samples"][:1].repeat(8, 1, 1, 1)})
    order = pixels.energy(pixels.guider, every).argsort()[:2]
    assert latent["batch_index"] == order.tolist()
    chosen = pixels.sample(steps=4, latent_image=latent)
    torch.testing.assert_close(chosen, every[order], atol=1e-4, rtol=1e-4)
    assert text.splitlines()[0].startswith(f"1. candidate {order[0] + 1}:") and picture.shape[0] == 1


def test_batches_of_the_search_change_nothing(pixels: PixelWorld):
    one = {"samples": pixels.latent["samples"][:1]}
    alone, together = (best_seeds(pixels, latent_image=latent, count=8)[0] for latent in (one, pixels.latent))
    assert alone["batch_index"] == together["batch_index"] and len(alone["samples"]) == 8


@pytest.mark.parametrize("vae", [False, True])
def test_seeds_of_latents_are_judged_as_in_guidance(latents: LatentWorld, vae: bool):
    model = latents.model("flow")
    terms = latents.comfy("PPAPGuidanceTerm", guider=latents.guider, weight=1.0, start_percent=0.0, end_percent=1.0,
                          factor_at_start=1.0, factor_at_end=1.0, view="own")[0]
    latent, picture, _ = latents.comfy(
        "PPAPBestSeeds", model=model, terms=terms, seed=3, candidates=4, count=1, steps=2, cfg=1.0, sampler_name="euler",
        scheduler="simple", denoise=1.0, positive=latents.nothing, negative=latents.nothing,
        latent_image={"samples": torch.zeros(2, 16, 12, 16)}, vae=latents.vae if vae else None)
    assert picture.ndim == 4 and picture.std() > 0.01
    if not vae:
        every = latents.sample(model, steps=2, latent_image={"samples": torch.zeros(4, 16, 12, 16)})
        assert latent["batch_index"] == [int(latents.energy("flow", every).argmin())]


def test_seeds_of_videos_are_judged_by_all_frames(bench: Workbench):
    scene = bench.scene("Wan 2.1")
    latent, picture, text = bench.comfy("PPAPBestSeeds", **scene.conditioned(), terms=bench.terms(1.0), seed=1, candidates=3,
                                        count=2, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0)
    assert latent["samples"].shape == (2, *scene.latent["samples"].shape[1:]) and len(text.splitlines()) == 3
    assert picture.isfinite().all()


def test_a_search_can_be_cancelled(pixels: PixelWorld):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        best_seeds(pixels)
    seen = pixels.seen()
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        ranked(pixels, seen, pixels.term())


def test_variety_cannot_choose_seeds(pixels: PixelWorld):
    [guider] = pixels.comfy("PPAPVariety")
    with says(ValueError, "another term"):
        best_seeds(pixels, terms=pixels.term(guider))
