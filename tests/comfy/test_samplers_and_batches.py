"""Guidance with ComfyUI's other samplers and guiders, and with batches put together by its nodes."""
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.features import mask_of
from helpers.workbench import (
    EPS,
    FLOW,
    SAMPLER_NODES,
    THROUGH,
    VIDEO,
    Scene,
    Workbench,
    custom_inputs,
    ksampler,
    steered,
    with_guider,
)
from torch import Tensor

TERMS = pytest.mark.parametrize("term", [{}, THROUGH], ids=["", "through the model"])


@pytest.fixture(scope="module")
def samplers(bench: Workbench, load_extras: Callable[..., None]) -> Workbench:
    """The workbench, with ComfyUI's nodes of single samplers."""
    load_extras("advanced_samplers", "rebatch")
    return bench


def alone(scene: Scene) -> Scene:
    """The scene with the first of its images."""
    return replace(scene, latent={"samples": scene.latent["samples"][:1]})


def sampled_by(node: str, **inputs: Any) -> Callable[[Workbench, Scene], Tensor]:
    """Sample with SamplerCustom and a sampler of a node."""
    def sample(bench: Workbench, scene: Scene) -> Tensor:
        if node not in bench.comfy.registered:
            pytest.skip(f"this ComfyUI has no {node}")
        [sampler] = bench.comfy(node, **inputs)
        settings = {**scene.inputs(), **custom_inputs(bench, scene), "sampler": sampler}
        return bench.comfy("SamplerCustom", **settings, add_noise=True, noise_seed=scene.seed)[0]["samples"]
    return sample


# Samplers

@pytest.mark.parametrize(("family", "term"), [(EPS, {}), (FLOW, {}), (FLOW, THROUGH)], ids=str)
def test_every_cfg_plus_plus_sampler_is_steered(bench: Workbench, family: str, term: dict):
    """These samplers read the unconditional prediction, beside the guided one."""
    from comfy.samplers import KSampler

    names = [name for name in KSampler.SAMPLERS if name.endswith("cfg_pp")]
    assert len(names) >= 6
    for name in names:
        steered(bench, replace(alone(bench.scene(family)), cfg=1.5, sampler=name), **term)


@TERMS
@pytest.mark.parametrize("sampler", [
    sampled_by("SamplerEulerCFGpp", version="alternative"),
    sampled_by("SamplerLCM", s_noise=1.0, s_noise_end=0.5, noise_clip_std=2.0),
    sampled_by("SamplerER_SDE", solver_type="ER-SDE", max_stage=3, eta=1.0, s_noise=1.0)], ids=["CFG++", "LCM", "ER-SDE"])
def test_a_sampler_of_a_node_is_steered(samplers: Workbench, sampler: Callable, term: dict):
    steered(samplers, replace(samplers.scene(FLOW), cfg=1.5), sampler, **term)


@TERMS
@pytest.mark.parametrize("family", [EPS, FLOW])
def test_a_sampler_that_enlarges_the_latent_is_steered(samplers: Workbench, family: str, term: dict):
    """The latent is larger from step to step, and a mask grows with it."""
    sampler = sampled_by("SamplerLCMUpscale", scale_ratio=1.5, scale_steps=2, upscale_method="bilinear")
    scene = replace(alone(samplers.scene(family)), cfg=1.5)
    plain, guided = steered(samplers, scene, sampler, mask=mask_of(scene), **term)
    assert plain.shape[-2:] == guided.shape[-2:] == (18, 30)


# Guiders of SamplerCustomAdvanced

@pytest.mark.parametrize("node", SAMPLER_NODES)
def test_gradients_pass_through_the_model_in_every_sampler_node(bench: Workbench, node: str):
    steered(bench, bench.scene(EPS), SAMPLER_NODES[node], **THROUGH)


@TERMS
def test_two_prompts_may_be_nested(bench: Workbench, term: dict):
    def nested(bench: Workbench, scene: Scene) -> Tensor:
        return with_guider(bench, scene, "DualCFGGuider", cond1=scene.positive, cond2=scene.negative, cfg_conds=scene.cfg,
                           negative=scene.negative, cfg_cond2_negative=2.0, style="nested")
    steered(bench, bench.scene(EPS), nested, **term)


# Caches

@pytest.mark.parametrize(("term", "off"), [({}, False), (THROUGH, True)], ids=["", "through the model"])
def test_keys_and_values_are_not_kept_where_a_gradient_passes(bench: Workbench, term: dict, off: bool):
    """Qwen-Image 2.1 reads this option, in versions of ComfyUI that have it."""
    options: list[dict] = []

    def predict(apply_model: Any, args: dict) -> Tensor:
        options.append(args["c"]["transformer_options"])
        return apply_model(args["input"], args["timestep"], **args["c"])
    scene = bench.scene(FLOW)
    model = scene.model.clone()
    model.set_model_unet_function_wrapper(predict)
    ksampler(bench, bench.guide(replace(scene, model=model), **term))
    assert [each.get("qwen_image21_cache") == {"device": "off"} for each in options] == [off] * len(options)
    assert options and "qwen_image21_cache" not in model.model_options["transformer_options"]


# Batches

def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.std().item())


@TERMS
@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_a_repeated_latent_is_steered_as_a_batch(bench: Workbench, family: str, term: dict):
    """A chosen image of the batch, sampled by its index, is the one of the whole batch."""
    scene = alone(bench.scene(family))
    [three] = bench.comfy("RepeatLatentBatch", samples=scene.latent, amount=3)
    [last] = bench.comfy("LatentFromBatch", samples=three, batch_index=2, length=1)
    assert last["batch_index"] == [2]
    plain, guided = steered(bench, replace(scene, latent=three), **term)
    single = ksampler(bench, bench.guide(replace(scene, latent=last), **term))
    assert close(single, guided[2:]) and not close(single, plain[2:])


@pytest.mark.parametrize("family", [EPS, FLOW])
def test_images_of_one_noise_are_steered_alike(bench: Workbench, family: str):
    [three] = bench.comfy("RepeatLatentBatch", samples=alone(bench.scene(family)).latent, amount=3)
    [same] = bench.comfy("LatentBatchSeedBehavior", samples=three, seed_behavior="fixed")
    _, guided = steered(bench, replace(bench.scene(family), latent=same))
    assert close(guided[1:], guided[:1].expand(2, *guided.shape[1:]))


def test_a_batch_put_together_anew_is_steered_as_before(samplers: Workbench):
    """Each image of a batch in two parts is that of the whole batch."""
    scene = samplers.scene(EPS)
    [four] = samplers.comfy("RepeatLatentBatch", samples=scene.latent, amount=2)
    [parts] = samplers.comfy("RebatchLatents", latents=[four], batch_size=[3])
    assert [len(part["samples"]) for part in parts] == [3, 1]
    guided = samplers.guide(scene)
    whole = ksampler(samplers, replace(guided, latent=four))
    assert close(torch.cat([ksampler(samplers, replace(guided, latent=part)) for part in parts]), whole)
