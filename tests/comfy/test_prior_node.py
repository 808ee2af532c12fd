"""Plug-and-play priors with ComfyUI's own kinds of models: what is found, what is kept, and what may change."""
from dataclasses import replace

import pytest
import torch
from helpers import says
from helpers.model_families import FAMILIES
from helpers.workbench import EPS, FLOW, THROUGH, VIDEO, Workbench, ksampler, search
from helpers.worlds import LatentWorld, PixelWorld

from ppap_core.guidance.prior import PriorConfig, PriorObjective, optimize_images
from ppap_core.guidance.terms import Term
from ppap_core.tinyworld.loaders import load_denoiser, load_guider

GRADIENTS = ({}, THROUGH)


# What is found

@pytest.mark.parametrize("gradient", GRADIENTS, ids=["", "through the model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model_is_a_prior(bench: Workbench, family: str, gradient: dict):
    scene = bench.scene(family)
    before = bench.plain(family)[0]
    settings = {"cfg": 2.0, "learning_rate": 0.2, **gradient}
    free, bright = (search(bench, scene.conditioned(), terms, **settings) for terms in ((), bench.terms(4.0)))
    assert free.shape == before.shape and free.isfinite().all()
    assert bench.energy(scene, bright).mean() < bench.energy(scene, free).mean()
    assert torch.equal(search(bench, scene.conditioned(), bench.terms(0.0), **settings), free), "weight 0 changes the image"
    assert torch.equal(bench.plain(family)[0], before)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=["", "through the model"])
def test_in_pixels_the_node_finds_what_the_core_finds(pixels: PixelWorld, gradient: dict):
    found = search(pixels, pixels.conditioned(), pixels.term(weight=0.5, strength="balanced"), **gradient)
    guider = load_guider("class").aim(pixels.guider.target)
    objective = PriorObjective(load_denoiser(), [Term(guider, 0.5, normalized=True)])
    config = PriorConfig(6, 1.0, 5.0, 0.1, bool(gradient))
    images, _ = optimize_images(objective, torch.zeros(3, 3, 32, 32), config, [3, 4, 5])
    off = (found - images).abs()  # Adam turns rounding into steps where gradients are small
    assert off.mean() < 1e-3 and off.max() < 0.2


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_latents_are_found_under_prompt_and_terms(comfy, kind: str):
    """The search obeys prompt and terms for a flow and an epsilon model, by colours and through the VAE."""
    world = LatentWorld(comfy)
    scene = {"model": world.model(kind), "positive": world.star, "negative": world.nothing,
             "latent_image": {"samples": torch.zeros(2, 16, 12, 16)}}
    [terms] = comfy("PPAPGuidanceTerm", guider=world.guider, weight=1.0, start_percent=0.0, end_percent=1.0,
                    factor_at_start=1.0, factor_at_end=1.0, view="own")
    free, asked_for = (search(world, scene, each, steps=30) for each in ((), terms))
    assert world.energy(kind, asked_for).mean() < world.energy(kind, free).mean()
    assert not torch.equal(free, search(world, {**scene, "positive": world.nothing}, steps=30))
    through = search(world, scene, terms, steps=30, vae=world.vae)
    assert through.isfinite().all() and not torch.equal(through, asked_for)


def test_neutral_values_of_a_search_change_nothing(pixels: PixelWorld):
    """A learning rate of 0 leaves the latent bit for bit."""
    start = {"samples": 0.3 * torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))}
    inputs = pixels.conditioned(latent_image=start)
    still = search(pixels, inputs, pixels.term(), learning_rate=0.0, start_noise=0.0)
    assert torch.equal(still, start["samples"])
    moved = search(pixels, inputs, pixels.term(), start_noise=0.0)
    assert not torch.equal(moved, still)
    assert not torch.equal(search(pixels, inputs, pixels.term(), start_noise=0.0, clean_up=0.5), moved)


def test_a_mask_says_what_may_change(pixels: PixelWorld):
    mask = torch.zeros(1, 32, 32)
    mask[..., 20:] = 1
    start = {"samples": 0.3 * torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))}
    [start] = pixels.comfy("SetLatentNoiseMask", samples=start, mask=mask)
    found = search(pixels, pixels.conditioned(latent_image=start), pixels.term(), clean_up=0.5)
    assert torch.equal(found[..., :20], start["samples"][..., :20])
    assert not torch.isclose(found[..., 20:], start["samples"][..., 20:]).all(1).any()


def test_a_noise_mask_of_another_pack_is_read(pixels: PixelWorld):
    """A mask in bytes whose last dimension is its channel."""
    mask = torch.zeros(1, 32, 32)
    mask[..., 20:] = 1
    start = {"samples": torch.full((1, 3, 32, 32), 0.1)}
    sound, foreign = (search(pixels, pixels.conditioned(latent_image={**start, "noise_mask": form}), pixels.term())
                      for form in (mask, (255 * mask).to(torch.uint8)[..., None]))
    assert torch.equal(sound, foreign) and not torch.equal(sound, start["samples"])


@pytest.mark.parametrize("side", [128, 160])
def test_a_painted_mask_may_have_any_size(pixels: PixelWorld, side: int):
    """The mask is resized, and another mask is another search."""
    start, found = {"samples": torch.full((1, 3, 32, 32), 0.1)}, []
    for place in (20, 90):
        mask = torch.zeros(1, side, side)
        mask[:, place:place + 30, 11:51] = 1
        [painted] = pixels.comfy("SetLatentNoiseMask", samples=start, mask=mask)
        found.append(search(pixels, pixels.conditioned(latent_image=painted)))
    changed = [(each != 0.1).any(1) for each in found]
    assert all(each.any() for each in changed) and not (changed[0] & changed[1]).any()


def test_an_empty_latent_takes_on_the_size_that_the_model_means(pixels: PixelWorld):
    """Newer versions say of which scale an empty latent is; 8 pixels for a place are 8 places of a model of pixels."""
    empty = {"samples": torch.zeros(1, 4, 4, 5), "downscale_ratio_spacial": 8}
    if "downscale_ratio_spacial" not in pixels.comfy("EmptyLatentImage", width=64, height=64, batch_size=1)[0]:
        pytest.skip("this ComfyUI does not say of which scale an empty latent is")
    stock = pixels.sample(latent_image=empty)
    assert search(pixels, pixels.conditioned(latent_image=empty)).shape == stock.shape == (1, 3, 32, 40)
    assert pixels.samples(name="of a size", latent_image=empty, count=64).store.images.shape[-2:] == (32, 40)


def test_of_several_particles_the_best_is_kept_for_each_image(pixels: PixelWorld):
    terms = pixels.term(weight=0.3, strength="balanced")
    three = search(pixels, pixels.conditioned(), terms, particles=3)
    apart = torch.stack([search(pixels, pixels.conditioned(), terms, seed=3 + 3 * i) for i in range(3)])
    energies = torch.stack([pixels.energy(pixels.guider, each) for each in apart])
    best = apart[energies.argmin(0), torch.arange(3)]
    assert (three - best).abs().mean() < 1e-3


def test_a_video_is_found_as_one(bench: Workbench):
    scene = bench.scene(VIDEO)
    one = search(bench, scene.conditioned(), bench.terms(1.0), particles=2)
    both = [search(bench, scene.conditioned(), bench.terms(1.0), seed=seed)
            for seed in (3, 3 + scene.latent["samples"].shape[0] * scene.latent["samples"].shape[2])]
    assert min((one - each).abs().mean() for each in both) < 0.02 * one.abs().mean()


# What is kept

@pytest.mark.parametrize("gradient", GRADIENTS, ids=["", "through the model"])
def test_a_search_that_was_cancelled_goes_on(pixels: PixelWorld, gradient: dict, monkeypatch: pytest.MonkeyPatch):
    import comfy.model_management as management

    module = pixels.comfy.pack.nodes.bridge.priors
    settings = {"seed": 77, "steps": 9, **gradient}
    whole = search(pixels, pixels.conditioned(), pixels.term(), **settings)
    for state in pixels.comfy.pack.nodes.bridge.paths.output_folder("ppap_prior").glob("*.safetensors"):
        state.unlink()
    done: list[int] = []

    def watched(total):
        def report(step, preview):
            assert preview.shape == (1, 3, 32, 32)
            done.append(step)
            if step == 4 and len(done) == 4:
                raise management.InterruptProcessingException
        return report
    monkeypatch.setattr(module, "Progress", watched)
    with pytest.raises(management.InterruptProcessingException):
        search(pixels, pixels.conditioned(), pixels.term(), **settings)
    assert torch.equal(search(pixels, pixels.conditioned(), pixels.term(), **settings), whole)
    assert done == list(range(1, 10))
    assert torch.equal(search(pixels, pixels.conditioned(), pixels.term(), **settings), whole)  # it is there already
    assert done == list(range(1, 10))
    assert not torch.equal(search(pixels, pixels.conditioned(), pixels.term(weight=3.0), **settings), whole)
    assert len(done) == 18, "another weight is another search"


def test_latents_without_colours_are_searched(bench: Workbench):
    """A search needs no previews."""
    scene = bench.scene(EPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene.model.model.latent_format, "latent_rgb_factors", None)
        assert search(bench, scene.conditioned(), seed=91).isfinite().all()


def test_the_model_is_left_as_it_was(bench: Workbench):
    for family in (EPS, FLOW):
        scene = bench.scene(family)
        before = bench.plain(family)[0]
        search(bench, scene.conditioned(), bench.terms(1.0), **THROUGH)
        assert torch.equal(ksampler(bench, scene), before)


def test_guidance_on_the_model_goes_on_working(bench: Workbench):
    scene = bench.scene(EPS)
    plain, guided = (search(bench, each.conditioned()) for each in (scene, bench.guide(scene, 2.0)))
    assert bench.energy(scene, guided).mean() < bench.energy(scene, plain).mean()


def test_levels_in_the_wrong_order_are_refused(pixels: PixelWorld):
    with says(ValueError, "sigma_min", "0.1", "0.05"):
        search(pixels, pixels.conditioned(), sigma_max=0.05)


def test_experts_of_other_latents_are_refused(comfy, pixels: PixelWorld):
    world = LatentWorld(comfy)
    term = pixels.term(replace(world.experts("flow", "denoised")))
    with says(ValueError, "distilled for"):
        search(pixels, pixels.conditioned(), term)
