"""Readouts in a real ComfyUI: distilled on a model's features, they guide it, and are saved and refused like experts."""
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import says
from helpers.caches import cached
from helpers.workbench import Workbench, ksampler
from helpers.worlds import LatentWorld, PixelWorld

SETTINGS = {"heads": 2, "steps": 4, "batch_size": 16, "learning_rate": 3e-3, "seed": 0}
UNET, JOINT, TOKENS, VIDEO = "SD 1.5", "SD 3", "Flux", "Wan 2.1"


def distilled(world: PixelWorld, store: str, **changes: Any) -> tuple[Any, dict]:
    """A readout of the tiny classifier on few samples, and its losses."""
    samples = world.samples(name=store, steps=4)
    settings = {"model": world.model, "samples": samples, "guider": world.guider, "positive": world.conditioning, **SETTINGS}
    return world.comfy("PPAPDistillReadout", **settings | changes)


@pytest.fixture(scope="module")
def readout(pixels: PixelWorld) -> Any:
    """A readout that has hardly learned anything, aimed at stars."""
    return distilled(pixels, "readout")[0]


@pytest.mark.slow
def test_a_readout_leads_to_what_the_plain_guider_sees(pixels: PixelWorld):
    guider, losses = distilled(pixels, "readout", steps=200)
    assert all(sum(head[-10:]) < sum(head[:10]) for head in losses.values())
    world = PixelWorld(pixels.comfy, batch=16)
    plain, guided = world.sample(), world.guided(world.term(guider, weight=0.3, strength="balanced"))
    assert world.energy(world.guider, guided).mean() < world.energy(world.guider, plain).mean() - 0.5


def test_weight_0_of_a_readout_changes_nothing(pixels: PixelWorld, readout: Any):
    assert torch.equal(pixels.guided(pixels.term(readout, weight=0.0)), pixels.sample())
    assert torch.equal(pixels.guided(pixels.term(readout, start_percent=0.5, end_percent=0.5)), pixels.sample())


def test_the_report_says_what_a_readout_reads(pixels: PixelWorld, readout: Any):
    latent, report = pixels.comfy("PPAPGuidedKSampler", model=pixels.model, max_rms=0.0, **pixels.settings(),
                                  terms=pixels.term(readout, weight=0.3, strength="balanced"))
    assert not torch.equal(latent["samples"], pixels.sample())
    assert "at work in 5 of 5 steps" in report.summary() and "read from 128 features of the model at" in report.summary()
    assert not report.warnings()


def test_a_saved_readout_guides_as_before(pixels: PixelWorld, readout: Any):
    pixels.comfy("PPAPSaveExperts", guider=readout, file_name="a readout")
    [loaded] = pixels.comfy("PPAPLoadExperts", guider=pixels.guider, file_name="a readout.safetensors")
    weighed = {"weight": 0.3, "strength": "balanced"}
    guided = pixels.guided(pixels.term(readout, **weighed))
    assert torch.equal(pixels.guided(pixels.term(loaded, **weighed)), guided)
    [again, losses] = distilled(pixels, "readout")
    assert torch.equal(pixels.guided(pixels.term(again, **weighed)), guided) and all(map(len, losses.values()))


def test_aim_and_preview_look_through_the_plain_network(pixels: PixelWorld, readout: Any):
    [picture] = [pixels.seen()]
    for node, more in (("PPAPAimAtImage", {"image_is": "a picture"}), ("PPAPLookThrough", {})):
        ours, plain = (pixels.comfy(node, guider=guider, image=picture, **more)[0] for guider in (readout, pixels.guider))
        assert torch.equal(ours.target, plain.target) if more else torch.equal(ours, plain)


def test_a_readout_stands_beside_a_term_through_the_model(pixels: PixelWorld, readout: Any):
    """One pass for gradients serves both, at any cfg."""
    weighed, few = {"weight": 0.3, "strength": "balanced"}, {"steps": 2, "cfg": 2.0}
    terms = pixels.term(readout, **weighed), pixels.term(gradient="through the model", **weighed)
    both, *alone = (pixels.guided(chosen, **few) for chosen in ((*terms[0], *terms[1]), *terms))
    assert both.isfinite().all() and not any(torch.equal(both, other) for other in (*alone, pixels.sample(**few)))


@pytest.mark.parametrize(("batches", "words"), [([1], ""), ([2], "holds 2 prompts"), ([1, 2], "holds 3 prompts")])
def test_several_prompts_are_told(comfy: Any, batches: list[int], words: str):
    told = comfy.pack.nodes.bridge.readouts.describe_prompts([[torch.zeros(size, 4, 8), {}] for size in batches])
    assert words in told and bool(told) == bool(words)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_a_readout_guides_a_latent_model(latents: LatentWorld, kind: str):
    guider, _ = latents.comfy("PPAPDistillReadout", model=latents.model(kind), samples=latents.samples(kind, f"read {kind}"),
                              guider=latents.guider, positive=latents.nothing, **SETTINGS)
    plain, guided = latents.sample(latents.model(kind)), latents.guided(kind, guider, strength="balanced")
    assert guided.isfinite().all() and not torch.equal(plain, guided)
    with says(ValueError, "use it with the model that it was distilled on"):
        latents.guided("eps" if kind == "flow" else "flow", guider)


def connected(bench: Workbench, scene: Any) -> Any:
    """A guider with an untrained readout of a model, at the place where a distillation would read."""
    bridge, core = bench.comfy.pack.nodes.bridge, bench.comfy.pack.ppap_core
    cfg_guider = bridge.sampler.new_cfg_guider(scene.model, scene.positive, scene.negative, 1.0)

    def find(predict: Any, noise: torch.Tensor, extra_args: dict) -> tuple:
        inner = bridge.features.InnerFeatures(cfg_guider.inner_model, extra_args["model_options"],
                                              cfg_guider.conds["positive"])
        x = bridge.latents.frames_as_images(noise)
        return inner.find(x, torch.ones(len(x)), False)
    with torch.inference_mode():
        place, features = bridge.sampler.run_inside_sampler(cfg_guider, tuple(scene.latent["samples"].shape), 0, find)
    [plain] = bench.comfy("PPAPLoadGuider", guider_name="tinyworld/class")
    with bridge.autograd.outside_inference_mode():
        schedule = core.schedules.ExpertSchedule((0.1, 1.0, 20.0))
        readout = core.experts.readout.new_readout(plain, schedule, place, features.clone(), torch.zeros(1, 8))
        return core.experts.readout.with_readout(plain.aim(torch.tensor([3])), readout)


@pytest.mark.parametrize("family", [UNET, JOINT, TOKENS, VIDEO])
def test_a_readout_guides_every_kind_of_network(bench: Workbench, family: str):
    """U-Net, transformers whose blocks return pairs or tokens of text and picture, and videos of one frame."""
    scene = bench.scene(family)
    if family == VIDEO:
        scene = replace(scene, latent={"samples": scene.latent["samples"][:, :, :1]})
    guider = connected(bench, scene)
    plain, guided = (bench.comfy("KSampler", **each.inputs(), seed=each.seed, steps=2, sampler_name="euler",
                                 scheduler="simple", denoise=1.0)[0]["samples"]
                     for each in (scene, bench.guide(scene, guider=guider)))
    assert guided.isfinite().all() and not torch.equal(plain, guided)


@pytest.mark.parametrize("cache", ["EasyCache", "network", "wrapper and holder"])
def test_a_cache_does_not_answer_in_the_place_of_the_features(bench: Workbench, cache: str):
    """It answers the model in every other step, and is never asked what it remembers for features."""
    scene = bench.scene(UNET)
    guider = connected(bench, scene)
    used = (bench.patch(scene, cache, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)
            if cache == "EasyCache" else replace(scene, model=cached(scene.model, cache, alternate=True)))
    guided = bench.guide(replace(used, steps=4, cfg=1.0), guider=guider)
    samples = ksampler(bench, guided)
    assert "at work in 4 of 4 steps" in bench.comfy("PPAPGuidanceReport", model=guided.model,
                                                    latent={"samples": samples})[0].summary()


def test_what_a_readout_cannot_do_is_refused(pixels: PixelWorld, readout: Any):
    with says(ValueError, "has no other view"):
        pixels.term(readout, view="denoised")
    [parts] = pixels.comfy("PPAPCutOuts", guider=readout, count=2)
    with says(ValueError, "without cut-outs"):
        pixels.guided(pixels.term(parts))
    with says(ValueError, "images are searched for"):
        pixels.comfy("PPAPPlugAndPlayPrior", model=pixels.model, positive=pixels.conditioning, negative=pixels.conditioning,
                     latent_image=pixels.latent, terms=pixels.term(readout), steps=2, seed=0, cfg=1.0, learning_rate=1.0,
                     sigma_max=10.0, sigma_min=0.05, start_noise=1.0, clean_up=0.0, particles=1,
                     gradient="in the prediction")
    [rule] = pixels.comfy("PPAPRule", rule="brightness")
    with says(ValueError, "is a rule"):
        distilled(pixels, "readout", guider=rule)
    narrow = pixels.comfy("PPAPTinyWorld", batch_size=3, version="bad sibling")[0]
    [guided] = pixels.comfy("PPAPApplyGuidance", model=narrow, terms=pixels.term(readout), max_rms=0.0)
    with says(ValueError, "128 features", "has 64 there"):
        pixels.sample(guided)
