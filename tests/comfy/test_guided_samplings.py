"""A guided MODEL keeps apart the samplings that are made with it: one after another, one inside another, and failed ones."""
import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import says
from helpers.workbench import FLOW, Workbench, autoguided, ksampler, with_lora_at
from helpers.worlds import PixelWorld


@pytest.fixture
def guided(comfy, pixels: PixelWorld) -> Any:
    return comfy("PPAPApplyGuidance", model=pixels.model, terms=pixels.term(), max_rms=0.0)[0]


def sample(pixels: PixelWorld, model: Any, **changes: Any) -> dict:
    """A LATENT by the stock KSampler."""
    return pixels.comfy("KSampler", model=model, **pixels.settings(**changes))[0]


def report(comfy, model: Any, latent: dict) -> Any:
    return comfy("PPAPGuidanceReport", model=model, latent=latent)[0]


def interrupted(model: Any, action: Any) -> Any:
    """The MODEL with a patch that does something in its second call, and restores what ComfyUI takes away when it nests."""
    patched, calls = model.clone(), []

    def patch(args: dict) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            outer = args["model"].current_patcher
            action()
            args["model"].current_patcher = outer
        return args["denoised"]
    patched.set_model_sampler_post_cfg_function(patch)
    return patched


def test_six_samplings_have_six_reports(comfy, pixels: PixelWorld, guided: Any):
    steps = [2, 3, 4, 5, 6, 7]
    sampled = [sample(pixels, guided, steps=count, seed=count) for count in steps]
    assert [report(comfy, guided, latent).levels for latent in sampled] == steps
    with says(ValueError, "not sampled with this guided model"):
        report(comfy, guided, {"samples": sampled[0]["samples"] + 1})


def test_a_seed_leaves_no_trace_in_the_next(comfy, pixels: PixelWorld, guided: Any):
    """A guided model that has sampled other seeds gives the image that a new one gives."""
    [new] = comfy("PPAPApplyGuidance", model=pixels.model, terms=pixels.term(), max_rms=0.0)
    for seed in (11, 12):
        sample(pixels, guided, seed=seed)
    assert torch.equal(sample(pixels, guided)["samples"], sample(pixels, new)["samples"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_latent_of_another_type_is_recognised(comfy, pixels: PixelWorld, guided: Any, dtype: torch.dtype):
    """Newer versions of ComfyUI may hand on LATENTs of half precision."""
    latent = sample(pixels, guided)
    assert report(comfy, guided, {"samples": latent["samples"].to(dtype)}).levels == 5


def test_little_is_kept_of_a_sampling(comfy, pixels: PixelWorld, guided: Any):
    """Numbers for the report, and neither latents nor networks."""
    sample(pixels, guided)
    [feature] = guided.get_attachment("ppap")
    [run] = {id(run): run for run in feature.finished.values()}.values()
    assert max(value.numel() for record in run.records for value in (record.energy, record.rms)) == 3
    assert vars(feature.runs) == {"_states": []}


def test_a_sampling_that_fails_leaves_nothing_behind(comfy, pixels: PixelWorld, guided: Any):
    def fail() -> None:
        raise RuntimeError("the sampler broke")

    before = sample(pixels, guided)
    with pytest.raises(RuntimeError, match="the sampler broke"):
        sample(pixels, interrupted(guided, fail), seed=9)
    again = sample(pixels, guided, seed=6)
    assert [report(comfy, guided, latent).levels for latent in (before, again)] == [5, 5]
    assert torch.equal(sample(pixels, guided)["samples"], before["samples"])


def test_a_sampling_inside_another_changes_neither(comfy, pixels: PixelWorld, guided: Any):
    """The inner one has another size, so that its terms would not fit the outer one."""
    inner, small = [], {"samples": torch.zeros(1, 3, 20, 28)}

    def nest() -> None:
        inner.append(sample(pixels, guided, latent_image=small, steps=3))
    [around] = comfy("PPAPApplyGuidance", model=interrupted(pixels.model, nest), terms=pixels.term(), max_rms=0.0)
    nested, masked = sample(pixels, guided), pixels.term(mask=torch.ones(1, 32, 32))
    outer = sample(pixels, around)
    assert torch.equal(outer["samples"], nested["samples"]) and len(inner) == 1
    [both] = comfy("PPAPApplyGuidance", model=interrupted(guided, nest), terms=masked, max_rms=0.0)
    outer = sample(pixels, both)
    assert report(comfy, both, outer).levels == 5 and report(comfy, guided, inner[1]).levels == 3
    assert torch.equal(inner[0]["samples"], inner[1]["samples"])
    assert torch.equal(inner[0]["samples"], sample(pixels, guided, latent_image=small, steps=3)["samples"])


def test_autoguidance_nests_and_recovers(bench: Workbench):
    scene = bench.scene(FLOW)
    auto = autoguided(bench, scene, with_lora_at(scene, 0.5))
    plain, failures = ksampler(bench, auto), [lambda: ksampler(bench, auto), lambda: 1 / 0]
    nested = replace(auto, model=interrupted(auto.model, failures[0]))
    assert torch.equal(ksampler(bench, nested), plain)
    with pytest.raises(ZeroDivisionError):
        ksampler(bench, replace(auto, model=interrupted(auto.model, failures[1])))
    assert torch.equal(ksampler(bench, auto), plain)


def test_copied_options_share_the_guidance(guided: Any):
    """Older versions of ComfyUI deep-copy the options of a MODEL for every clone."""
    [hook] = guided.model_options["sampler_post_cfg_function"]
    [copied] = copy.deepcopy(guided.model_options)["sampler_post_cfg_function"]
    assert copied.__self__ is hook.__self__
