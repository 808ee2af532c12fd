"""Particles of Guided KSampler in a real ComfyUI: drawn anew while any sampler samples any model."""
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import randn, says
from helpers.workbench import Scene, Workbench
from helpers.worlds import PixelWorld
from torch import Tensor

SAMPLERS = ("euler_ancestral", "dpmpp_2m_sde", "uni_pc")
MORE_SAMPLERS = ("euler", "heun", "dpmpp_2m", "dpmpp_sde", "ddim", "lcm", "dpm_fast", "dpm_adaptive", "res_multistep")


def steered(world: PixelWorld, terms: tuple | None = None, **changes: Any) -> tuple[dict, Any]:
    return world.comfy("PPAPGuidedKSampler", model=world.model, terms=terms or world.term(), max_rms=0.0,
                       **{**world.settings(steps=6), **changes})


def with_particles(bench: Workbench, scene: Scene, **changes: Any) -> Tensor:
    settings = {"terms": bench.terms(1.0), "max_rms": 0.0, "seed": scene.seed, "steps": 6, "denoise": scene.denoise,
                "sampler_name": scene.sampler, "scheduler": scene.scheduler, "particles": 3, "terms_guide": False,
                "give_up": 1.0, "draws": 2}
    return bench.comfy("PPAPGuidedKSampler", **scene.inputs(), **{**settings, **changes})[0]["samples"]


def energies(world: PixelWorld, latent: dict) -> Tensor:
    return world.energy(world.guider, latent["samples"])


def test_one_particle_changes_no_bit(pixels: PixelWorld):
    plain, _ = steered(pixels)
    assert torch.equal(steered(pixels, particles=1, give_up=1.0, draws=9)[0]["samples"], plain["samples"])
    unguided = pixels.sample(steps=6)
    assert torch.equal(steered(pixels, terms_guide=False)[0]["samples"], unguided)
    assert torch.equal(steered(pixels, pixels.term(weight=0.0), particles=3)[0]["samples"], unguided)


def test_without_giving_up_the_best_of_several_is_taken(pixels: PixelWorld):
    """The first particle is what the stock sampler makes."""
    best, _ = steered(pixels, particles=4, give_up=0.0, terms_guide=False)
    plain, more = pixels.sample(steps=6), energies(pixels, best)
    first = pixels.energy(pixels.guider, plain)
    assert (more <= first + 1e-4).all() and (more < first - 0.1).any()


@pytest.mark.wide
def test_drawing_anew_beats_the_best_of_several(pixels: PixelWorld):
    world = PixelWorld(pixels.comfy, batch=24)
    several, drawn = (energies(world, steered(world, particles=4, give_up=share, terms_guide=False, steps=12)[0]).mean()
                      for share in (0.0, 1.0))
    assert drawn < several - 0.2


def test_the_report_says_what_became_of_them(pixels: PixelWorld):
    latent, report = steered(pixels, particles=3, draws=2, give_up=0.5)
    assert latent["samples"].shape == pixels.latent["samples"].shape
    assert "at work in 6 of 6 steps" in report.summary()
    assert "guided; drawn anew 2 times, each time with an effective number of 2;" in report.summary()
    _, report = steered(pixels, particles=3, draws=0, terms_guide=False)
    assert report.summary().startswith("particles: 3 for each image, not guided; never drawn anew; the best one at the end")


def test_particles_repeat_and_follow_the_seed(pixels: PixelWorld):
    one, again, other = (steered(pixels, particles=3, seed=seed)[0]["samples"] for seed in (5, 5, 6))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("guide", [False, True])
def test_an_image_alone_has_the_particles_that_it_has_in_a_batch(pixels: PixelWorld, guide: bool):
    settings = {"particles": 3, "give_up": 1.0, "terms_guide": guide}
    together = steered(pixels, **settings)[0]["samples"]
    one = {"samples": pixels.latent["samples"][:1], "batch_index": [1]}
    alone = steered(pixels, **settings, latent_image=one)[0]["samples"]
    torch.testing.assert_close(alone, together[1:2], rtol=1e-3, atol=1e-3)


def test_a_scorer_without_a_gradient_chooses(pixels: PixelWorld):
    guider = replace(pixels.guider, net=lambda image, sigma: pixels.guider.net(image, sigma).round())
    terms = pixels.term(guider)
    drawn = energies(pixels, steered(pixels, terms, particles=4, give_up=1.0, terms_guide=False)[0])
    assert drawn.mean() < pixels.energy(pixels.guider, pixels.sample(steps=6)).mean() - 1


def test_a_variety_guides_and_does_not_choose(pixels: PixelWorld):
    [variety] = pixels.comfy("PPAPVariety")
    apart = pixels.term(variety, weight=0.2, strength="balanced")
    latent, report = steered(pixels, (*apart, *pixels.term()), particles=2)
    assert latent["samples"].isfinite().all() and report.summary().endswith("by tinyworld/guider_class")
    with says(ValueError, "another term"):
        steered(pixels, apart, particles=2)


def test_a_mask_of_the_latent_is_kept(pixels: PixelWorld):
    start, mask = pixels.sample(steps=6), torch.zeros(3, 32, 32)
    mask[:, :, 16:] = 1
    latent = {"samples": start, "noise_mask": mask}
    made = steered(pixels, particles=3, give_up=1.0, latent_image=latent)[0]["samples"]
    torch.testing.assert_close(made[..., :15], start[..., :15], atol=1e-4, rtol=0)
    assert (made - start)[..., 17:].abs().mean() > 0.05


def test_each_image_keeps_its_target_and_mask(pixels: PixelWorld):
    """Of two terms of one network, too."""
    guider = pixels.plain.aim(torch.tensor([2, 5, 7]))
    terms = *pixels.term(guider, mask=torch.rand(3, 8, 8)), *pixels.term(pixels.plain.aim(torch.tensor([3])), weight=1e-3)
    made = steered(pixels, terms, particles=4, give_up=1.0)[0]["samples"]
    swapped = pixels.energy(pixels.plain.aim(torch.tensor([5, 7, 2])), made)
    assert pixels.energy(guider, made).mean() < swapped.mean()


def test_nothing_is_sampled_where_denoise_is_0(pixels: PixelWorld):
    start = randn(3, *pixels.latent["samples"].shape[1:])
    for guide in (False, True):
        latent, report = steered(pixels, particles=3, denoise=0.0, latent_image={"samples": start}, terms_guide=guide)
        assert torch.equal(latent["samples"], start) and report.summary()


@pytest.mark.parametrize(("family", "guide"), [
    ("SD 1.5", True), ("SD 3", False), ("Wan 2.1", True),
    *(pytest.param(*case, marks=pytest.mark.wide) for case in (("SD 1.5", False), ("SD 3", True), ("Wan 2.1", False)))])
def test_models_of_all_kinds_have_particles(bench: Workbench, family: str, guide: bool):
    scene = bench.scene(family)
    drawn, best, first = (with_particles(bench, scene, give_up=share, particles=count, terms_guide=guide)
                          for share, count in ((1.0, 3), (0.0, 3), (0.0, 1)))
    assert drawn.shape == scene.latent["samples"].shape and drawn.isfinite().all()
    assert (bench.energy(scene, best) <= bench.energy(scene, first) + 0.01).all() or scene.latent["samples"].ndim == 5
    assert bench.energy(scene, best).mean() <= bench.energy(scene, first).mean() + 0.01


@pytest.mark.filterwarnings("ignore:Should have t")  # torchsde, where levels are rounded
@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize(("family", "sampler"), [
    *(("SD 1.5", name) for name in SAMPLERS),
    *(pytest.param("SD 1.5", name, marks=pytest.mark.wide) for name in MORE_SAMPLERS),
    *(pytest.param("SD 3", name, marks=pytest.mark.wide) for name in (*SAMPLERS, *MORE_SAMPLERS))])
def test_samplers_of_all_kinds_have_particles(bench: Workbench, family: str, sampler: str):
    scene = replace(bench.scene(family), sampler=sampler)
    independent, drawn = (with_particles(bench, scene, give_up=share) for share in (0.0, 1.0))
    assert drawn.isfinite().all() and not torch.equal(drawn, independent)
    assert drawn.std() < 2 * independent.std()


def test_a_sampling_with_particles_can_be_cancelled(pixels: PixelWorld, monkeypatch: pytest.MonkeyPatch):
    """ComfyUI looks for the cancel button whenever a progress bar moves."""
    import comfy.model_management as management
    import comfy.utils

    def look(*unused: Any, **more: Any) -> None:
        management.throw_exception_if_processing_interrupted()
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", look)
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        steered(pixels, particles=3)
