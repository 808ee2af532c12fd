"""Recording in Generate Samples while a model samples, and its use in Distil Experts."""
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import says
from helpers.worlds import HEIGHT, WIDTH, LatentWorld, PixelWorld


class Shown:
    """A term of such a weight that it changes no bit, whose guider records the images that guidance shows it."""

    def __init__(self, comfy: Callable[..., tuple], guider: Any, view: str, colours: Callable | None = None):
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.colours = colours
        [self.terms] = comfy("PPAPGuidanceTerm", guider=replace(guider, decode=self.look), weight=1e-30, start_percent=0.0,
                             end_percent=1.0, factor_at_start=1.0, factor_at_end=1.0, view=view, strength="raw")

    def look(self, seen: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if type(seen) is torch.Tensor:  # not where only the memory is told
            self.calls.append((seen.detach().clone(), sigma))
        return self.colours(seen) if self.colours else seen

    def compare(self, store: Any, view: str, batch: int, steps: int) -> None:
        """Every step that the store kept was shown, to the half precision of the store."""
        sigmas = torch.stack([sigma[0] for _, sigma in self.calls]).unflatten(0, (-1, steps))[0]
        shown = [torch.stack([seen for seen, _ in self.calls[i:i + steps]]) for i in range(0, len(self.calls), steps)]
        shown = torch.cat(shown, 1)  # (steps, images, C, h, w)
        assert shown.shape[1] == len(store) == 64 and len(self.calls) == 64 // batch * steps
        steps_of = (store.sigmas[..., None] - sigmas).abs().argmin(-1)
        assert torch.equal(sigmas[steps_of], store.sigmas) and len(steps_of.unique()) == steps
        assert torch.equal(shown[steps_of, torch.arange(64)[:, None]].half(),
                           store.noisy_vp if view == "noisy" else store.denoised)


@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_what_is_recorded_of_pixels_is_what_guidance_would_show(comfy, pixels: PixelWorld, view: str):
    shown = Shown(comfy, pixels.guider, view)
    [model] = comfy("PPAPApplyGuidance", model=pixels.model, terms=shown.terms, max_rms=0.0)
    empty = {"samples": torch.zeros(32, 3, 32, 32)}
    store = pixels.samples(name=f"shown {view}", model=model, steps=4, latent_image=empty).store
    shown.compare(store, view, 32, 4)


@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_what_is_recorded_of_a_flow_is_what_guidance_would_show(comfy, latents: LatentWorld, view: str):
    """From pure noise on, with conditioning and CFG."""
    flow = latents.model("flow")
    shown = Shown(comfy, latents.guider, view, comfy.pack.nodes.bridge.latents.space_of(flow).colors)
    [model] = comfy("PPAPApplyGuidance", model=flow, terms=shown.terms, max_rms=0.0)
    samples = comfy("PPAPGenerateSamples", name=f"shown flow {view}", count=64, steps=4, cfg=3.0, sampler_name="euler",
                    scheduler="simple", seed=0, model=model, positive=latents.star, negative=latents.nothing,
                    vae=latents.vae, latent_image={"samples": torch.zeros(32, 16, HEIGHT, WIDTH)})[0]
    shown.compare(samples.store, view, 32, 4)
    assert samples.store.sigmas.max() > 1000 and samples.store.noisy_vp.isfinite().all()


def test_guidance_on_the_model_is_recorded(comfy, pixels: PixelWorld):
    """The recorded predictions are the guided ones."""
    [model] = comfy("PPAPApplyGuidance", model=pixels.model, terms=pixels.term(weight=8.0), max_rms=0.0)
    plain, guided = (pixels.samples(name=name, model=each, steps=1).store
                     for name, each in (("not guided", pixels.model), ("guided", model)))
    made = (guided.denoised[:, 0].float().clamp(-1, 1) + 1) * 127.5
    assert (made - guided.images).abs().max() < 1, "one step of Euler's arrives at the prediction"
    assert (guided.denoised - plain.denoised).float().abs().mean() > 0.01


def test_samples_do_not_depend_on_how_many_are_made_at_once(pixels: PixelWorld):
    few, many = (pixels.samples(name=f"by {batch}", latent_image={"samples": torch.zeros(batch, 3, 32, 32)}).store
                 for batch in (5, 32))
    assert torch.equal(few.sigmas, many.sigmas) and len(few.sigmas) == 64
    for name in ("images", "noisy_vp", "denoised"):
        torch.testing.assert_close(getattr(few, name).float(), getattr(many, name).float(), rtol=2e-3,
                                   atol=1.0 if name == "images" else 2e-3)


def test_a_sampler_that_asks_twice_a_step_is_heard_both_times(pixels: PixelWorld):
    """Two steps of Heun's are three questions, the last two of them at one noise level: each is kept twice in six."""
    store = pixels.samples(name="heun", sampler_name="heun", latent_image={"samples": torch.zeros(64, 3, 32, 32)}).store
    first, second, third = store.noisy_vp.unflatten(1, (3, 2)).unbind(1)
    for question in (first, second, third):
        assert torch.equal(question[:, 0], question[:, 1])
    levels = store.sigmas.unflatten(1, (3, 2))
    assert len(levels.unique()) == 2 and torch.equal(levels[:, 1], levels[:, 2]) and (levels[:, 0] > levels[:, 1]).all()
    assert not torch.equal(second, third) and not torch.equal(first, second)


def test_each_image_has_a_prompt_of_its_own(latents: LatentWorld):
    """Drawn by its seed: the image is that of the prompt alone, and its trajectory stands beside it."""
    prompts = [latents.nothing, latents.star]
    alone = [latents.samples("flow", f"prompt {index}", positive=each).store for index, each in enumerate(prompts)]
    drawn = latents.samples("flow", "drawn", positive=[*latents.nothing, *latents.star], draw_prompts=True).store
    distances = torch.stack([(drawn.denoised - each.denoised).float().square().flatten(1).mean(1) for each in alone])
    chosen = distances.argmin(0)
    assert 16 < int(chosen.sum()) < 48 and distances.amin(0).max() < 1e-4 < distances.amax(0).min()
    for index, each in enumerate(alone):
        rows = chosen == index
        torch.testing.assert_close(drawn.images[rows].int(), each.images[rows].int(), atol=2, rtol=0)
    assert drawn.manifest["prompts"] == "drawn" and "prompts" not in alone[0].manifest


@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_distillation_never_asks_the_diffusion_model(comfy, pixels: PixelWorld, latents: LatentWorld, view: str):
    settings = {"view": view, "experts": 2, "sigma_min": 0.0, "sigma_max": 0.0, "steps": 3, "batch_size": 4,
                "learning_rate": 1e-3, "rank": 2, "alpha": 2.0, "seed": 5}
    cases = ((pixels.model, pixels.guider, lambda: pixels.samples(name="asked")),
             (latents.model("flow"), latents.guider, lambda: latents.samples("flow", "asked flow")))
    for model, guider, generate in cases:
        asked = []
        hook = model.model.diffusion_model.register_forward_pre_hook(lambda *_, asked=asked: asked.append(1))
        samples = generate()
        before = len(asked)
        guider, losses = comfy("PPAPDistilExperts", samples=samples, guider=guider, **settings)
        hook.remove()
        assert [len(each) for each in losses.values()] == [3, 3] and guider.net.view == view
        assert len(asked) == before


def test_experts_span_the_samples_without_pure_noise(comfy, pixels: PixelWorld, latents: LatentWorld):
    """Intervals share the recorded noise levels equally."""
    schedule_for = comfy.pack.nodes.bridge.distillation.schedule_for
    samples = pixels.samples(name="reach", steps=4)
    lowest, highest = (float(value) for value in samples.store.sigmas.aminmax())
    edges = schedule_for(samples, 3, 0.0, 0.0).edges
    assert edges[::3] == (lowest, highest) == pytest.approx((0.02, 80.0))
    levels = samples.store.sigmas.unique().tolist()
    assert [sum(low < level < high for level in levels[1:-1]) for low, high in pairwise(edges)] == [0, 1, 1], "equal shares"
    assert schedule_for(samples, 1, 0.5, 0.0).edges == (0.5, highest)
    assert schedule_for(samples, 1, 0.0, 7.0).edges == (lowest, 7.0)
    assert schedule_for(samples, 9, 0.0, 0.0, " 2,30.5 ").edges == (lowest, 2.0, 30.5, highest)
    flow = comfy("PPAPGenerateSamples", name="reach flow", count=64, steps=4, cfg=1.0, sampler_name="euler", seed=0,
                 scheduler="simple", model=latents.model("flow"), positive=latents.nothing, vae=latents.vae,
                 latent_image={"samples": torch.zeros(32, 16, HEIGHT, WIDTH)})[0]
    levels = flow.store.sigmas.unique().tolist()
    assert levels[-1] > 1000 and schedule_for(flow, 2, 0.0, 0.0).edges[::2] == (levels[0], levels[-2])


def test_ranges_without_steps_are_refused_before_the_training(comfy, pixels: PixelWorld):
    settings = {"view": "noisy", "sigma_min": 0.0, "sigma_max": 0.0, "steps": 2, "batch_size": 4, "learning_rate": 1e-3,
                "rank": 2, "alpha": 2.0, "seed": 0, "guider": pixels.guider}
    one = pixels.samples(name="one step", steps=1)
    with says(ValueError, "from sigma 80 to 80", "more steps", "sigma_min"):
        comfy("PPAPDistilExperts", samples=one, experts=1, **settings)
    with says(ValueError, "from sigma 100 to 80", "sigma_max"):
        comfy("PPAPDistilExperts", samples=one, experts=1, **settings | {"sigma_min": 100.0})
    folder = comfy.pack.nodes.bridge.paths.output_folder("ppap_distillation", "x").parent
    before = set(folder.iterdir()) if folder.exists() else set()
    with says(ValueError, "2 noise levels", "3 experts", "fewer experts"):
        comfy("PPAPDistilExperts", samples=pixels.samples(name="two steps"), experts=3, **settings)
    assert (set(folder.iterdir()) if folder.exists() else set()) == before


def test_samples_hold_no_model(pixels: PixelWorld):
    samples = pixels.samples()
    assert set(vars(samples)) == {"store", "space", "origin"}
    assert all(isinstance(value, (str, float)) for value in vars(samples.origin).values())
