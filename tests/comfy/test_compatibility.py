"""Guidance with ComfyUI's own kinds of models, its samplers and its other patches; docs/compatibility.md lists the same."""
import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import says
from helpers.small_models import FAMILIES, ODD, control_net, lora, small, t2i_adapter, without_network
from torch import Tensor

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
STEPS, WEIGHT = 3, 0.1
THROUGH = {"gradient": "through the model"}
RAW = {"strength": "raw", "weight": 8.0}  # the gradient itself, whose size tells what the guider saw
EPS, FLOW, VIDEO = "SD 1.5", "SD 3", "Wan 2.1"
EXTRAS = ("custom_sampler", "pag", "slg", "apg", "cfg", "mahiro", "model_advanced", "differential_diffusion", "sag",
          "perpneg", "easycache")


@dataclass(frozen=True)
class Scene:
    """All that a sampling needs. steps and denoise as KSampler takes them."""

    model: Any
    positive: list
    negative: list
    latent: dict
    cfg: float = 4.0
    denoise: float = 1.0
    steps: int = STEPS
    sampler: str = "euler"
    scheduler: str = "simple"
    seed: int = 5

    def asked(self) -> dict:
        """What all sampling nodes are asked alike."""
        return {"model": self.model, "positive": self.positive, "negative": self.negative, "latent_image": self.latent,
                "cfg": self.cfg}


class Bench:
    """Small models, a rule aimed at brightness, and the nodes between them."""

    def __init__(self, comfy: Callable[..., tuple]):
        self.comfy, self.scenes, self.made = comfy, {}, {}
        [rule] = comfy("PPAPRule", rule="brightness")
        [self.guider] = comfy("PPAPAimAtNumber", guider=rule, number=0.9)

    def scene(self, family: str) -> Scene:
        """A model of a family, made once."""
        if family not in self.scenes:
            with torch.inference_mode():  # as loaders do
                self.scenes[family] = Scene(*small(family))
        return self.scenes[family]

    def terms(self, weight: float = WEIGHT, guider: Any = None, **changes: Any) -> tuple:
        """One term, with everything at its neutral value but the weight."""
        settings = {"weight": weight, "start_percent": 0.0, "end_percent": 1.0, "factor_at_start": 1.0, "factor_at_end": 1.0,
                    "view": "own", "strength": "balanced", **changes}
        return self.comfy("PPAPGuidanceTerm", guider=guider or self.guider, **settings)[0]

    def guide(self, scene: Scene, *args: Any, **changes: Any) -> Scene:
        """The scene with guidance on its model."""
        return self.patch(scene, "PPAPApplyGuidance", terms=self.terms(*args, **changes), max_rms=0.0)

    def patch(self, scene: Scene, node: str, **inputs: Any) -> Scene:
        """The scene with another node on its model."""
        return replace(scene, model=self.comfy(node, model=scene.model, **inputs)[0])

    def energy(self, scene: Scene, samples: Tensor, guider: Any = None) -> Tensor:
        """How far the colours of a final latent are from what was asked for, for each image."""
        with self.comfy.pack.nodes.bridge.autograd.autograd(), torch.no_grad():
            image = colours(scene.model.model, samples.clone())
            return (guider or self.guider).energy(image, torch.zeros(len(image)))

    def plain(self, family: str) -> tuple[Tensor, Tensor]:
        """What KSampler makes of a family without and with guidance."""
        if family not in self.made:
            self.made[family] = steered(self, self.scene(family))
        return self.made[family]


@pytest.fixture(scope="module")
def bench(comfy, comfyui: Path) -> Bench:
    import nodes

    for name in EXTRAS:
        assert asyncio.run(nodes.load_custom_node(str(comfyui / "comfy_extras" / f"nodes_{name}.py"),
                                                  module_parent="comfy_extras"))
    return Bench(comfy)


def colours(model: Any, samples: Tensor) -> Tensor:
    """The image that ComfyUI's previews show of a latent; of videos, their frames."""
    latent, known = model.process_latent_in(samples), model.latent_format
    if latent.ndim == 5:
        latent = latent.movedim(2, 1).flatten(0, 1)
    reshape = getattr(known, "latent_rgb_factors_reshape", None)
    factors, bias = torch.tensor(known.latent_rgb_factors), known.latent_rgb_factors_bias or [0.0, 0.0, 0.0]
    image = torch.einsum("bchw, cd -> bdhw", reshape(latent) if reshape else latent, factors)
    return image + torch.tensor(bias)[:, None, None]


def steered(bench: Bench, scene: Scene, sample: Callable | None = None, **term: Any) -> tuple[Tensor, Tensor]:
    """What is made without and with guidance; asserts that weight 0 changes nothing, and that guidance gets its way."""
    plain, guided, neutral = ((sample or ksampler)(bench, each) for each in (
        scene, bench.guide(scene, **term), bench.guide(scene, **{**term, "weight": 0.0})))
    assert plain.isfinite().all() and torch.equal(neutral, plain), "weight 0 changes the image"
    before, after = (bench.energy(scene, samples, term.get("guider")).mean().item() for samples in (plain, guided))
    assert guided.isfinite().all() and after < before, f"the energy went from {before} to {after}"
    return plain, guided


# Sampler nodes

def ksampler(bench: Bench, scene: Scene) -> Tensor:
    return bench.comfy("KSampler", **scene.asked(), seed=scene.seed, steps=scene.steps, denoise=scene.denoise,
                       sampler_name=scene.sampler, scheduler=scene.scheduler)[0]["samples"]


def two_halves(bench: Bench, scene: Scene) -> Tensor:
    """KSamplerAdvanced hands a noisy latent over to another one."""
    def part(latent: dict, first: int, last: int) -> dict:
        asked = {**scene.asked(), "latent_image": latent, "noise_seed": scene.seed, "steps": scene.steps,
                 "sampler_name": scene.sampler, "scheduler": scene.scheduler, "start_at_step": first, "end_at_step": last,
                 "add_noise": "disable" if first else "enable",
                 "return_with_leftover_noise": "disable" if last > scene.steps else "enable"}
        return bench.comfy("KSamplerAdvanced", **asked)[0]
    return part(part(scene.latent, 0, 2), 2, 10000)["samples"]


def schedule(bench: Bench, scene: Scene) -> dict:
    """The sampler and the sigmas of a scene as the custom nodes take them."""
    [sampler] = bench.comfy("KSamplerSelect", sampler_name=scene.sampler)
    [sigmas] = bench.comfy("BasicScheduler", model=scene.model, scheduler=scene.scheduler, steps=scene.steps,
                           denoise=scene.denoise)
    return {"sampler": sampler, "sigmas": sigmas, "latent_image": scene.latent}


def sampler_custom(bench: Bench, scene: Scene) -> Tensor:
    return bench.comfy("SamplerCustom", **{**scene.asked(), **schedule(bench, scene)}, add_noise=True,
                       noise_seed=scene.seed)[0]["samples"]


def with_guider(bench: Bench, scene: Scene, node: str, **inputs: Any) -> Tensor:
    """SamplerCustomAdvanced with one of ComfyUI's guiders."""
    [guider] = bench.comfy(node, model=scene.model, **inputs)
    [noise] = bench.comfy("RandomNoise", noise_seed=scene.seed)
    return bench.comfy("SamplerCustomAdvanced", noise=noise, guider=guider, **schedule(bench, scene))[0]["samples"]


def basic_guider(bench: Bench, scene: Scene) -> Tensor:
    return with_guider(bench, scene, "BasicGuider", conditioning=scene.positive)


def cfg_guider(bench: Bench, scene: Scene) -> Tensor:
    return with_guider(bench, scene, "CFGGuider", positive=scene.positive, negative=scene.negative, cfg=scene.cfg)


def dual_cfg_guider(bench: Bench, scene: Scene) -> Tensor:
    return with_guider(bench, scene, "DualCFGGuider", cond1=scene.positive, cond2=scene.negative, negative=scene.negative,
                       cfg_conds=scene.cfg, cfg_cond2_negative=2.0, style="regular")


def perp_neg_guider(bench: Bench, scene: Scene) -> Tensor:
    return with_guider(bench, scene, "PerpNegGuider", positive=scene.positive, negative=scene.negative,
                       empty_conditioning=scene.negative, cfg=scene.cfg, neg_scale=1.0)


NODES = {"KSampler": ksampler, "KSampler (Advanced), two halves": two_halves, "SamplerCustom": sampler_custom,
         "BasicGuider": basic_guider, "CFGGuider": cfg_guider, "DualCFGGuider": dual_cfg_guider,
         "PerpNegGuider": perp_neg_guider}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("node", NODES)
def test_a_kind_of_model_is_steered_in_every_sampler_node(bench: Bench, family: str, node: str):
    steered(bench, bench.scene(family), NODES[node])


@pytest.fixture(scope="module")
def network(bench: Bench) -> Any:
    """A network aimed at something."""
    [loaded] = bench.comfy("PPAPLoadGuider", guider_name="tinyworld/class")
    return bench.comfy("PPAPAimAtClass", guider=loaded, classes="star")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_steers_every_kind_of_model_without_a_complaint(bench: Bench, network: Any, family: str,
                                                                  caplog: pytest.LogCaptureFixture):
    steered(bench, bench.scene(family), guider=network)
    assert [record.message for record in caplog.records if record.name.startswith(bench.comfy.pack.__name__)] == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("term", [{"view": "noisy"}, {"strength": "raw", "weight": 1.0}], ids=["noisy view", "raw strength"])
def test_every_kind_of_model_is_steered_in_the_other_view_and_strength(bench: Bench, family: str, term: dict):
    steered(bench, bench.scene(family), **term)


def fused() -> bool:
    """Whether this ComfyUI computes Cosmos-Predict2 with a kernel that has no gradient."""
    from comfy.ldm.cosmos import predict2

    return "rms_rope" in Path(predict2.__file__).read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_pass_through_every_kind_of_model_or_it_is_said_that_they_do_not(bench: Bench, family: str):
    if family == "Cosmos-Predict2" and fused():
        with says(ValueError, "do not pass through this model", "in the prediction"):
            ksampler(bench, bench.guide(bench.scene(family), **THROUGH))
    else:
        steered(bench, bench.scene(family), **THROUGH)


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_the_gradient_through_a_model_is_the_finite_difference_of_the_energy_of_its_prediction(bench: Bench, family: str):
    """A single Euler step ends at the prediction, and x = image + sigma noise, so that dE / dnoise = sigma dE / dx."""
    import comfy.sample
    import comfy.samplers

    scene, noise_levels = bench.scene(family), bench.comfy.pack.nodes.bridge.noise_levels
    generator = torch.Generator().manual_seed(8)
    noise, direction = torch.randn(2, *scene.latent["samples"].shape, generator=generator)
    asked = dict(steps=1, cfg=4.0, sampler_name="euler", scheduler="simple", positive=scene.positive,
                 negative=scene.negative, latent_image=torch.zeros_like(noise), denoise=0.5)

    def prediction(scene: Scene, noise: Tensor) -> Tensor:
        with torch.inference_mode():
            return comfy.sample.sample(scene.model, noise, **asked).double()

    sigmas = comfy.samplers.KSampler(scene.model, 1, torch.device("cpu"), "euler", "simple", 0.5, {}).sigmas
    sigma = noise_levels.ve_level(scene.model.get_model_object("model_sampling"), sigmas[0])
    raw = {"strength": "raw", "weight": 0.3, **THROUGH}
    inside = scene.model.model.process_latent_in
    shift = inside(prediction(bench.guide(scene, **raw), noise)) - inside(prediction(scene, noise))
    step = 1e-2
    higher, lower = (bench.energy(scene, prediction(scene, noise + by * direction).float()).double().sum()
                     for by in (step, -step))
    assert float((shift * direction).sum()) == pytest.approx(float(-0.3 * sigma * (higher - lower) / (2 * step)), rel=0.02)


@pytest.mark.parametrize("family", [EPS, FLOW])
def test_a_model_that_computes_in_half_precision_is_steered(bench: Bench, network: Any, family: str):
    with torch.inference_mode():
        scene = Scene(*small(family, torch.bfloat16))
    plain, _ = steered(bench, scene)
    guided = ksampler(bench, bench.guide(scene, guider=network))
    assert guided.isfinite().all() and not torch.equal(guided, plain)


def test_a_second_model_for_the_negative_prompt_may_be_an_unguided_one(bench: Bench):
    if "DualModelGuider" not in bench.comfy.registered:
        pytest.skip("this ComfyUI has no DualModelGuider")
    other = bench.scene(FLOW).model
    steered(bench, bench.scene(FLOW), lambda bench, scene: with_guider(
        bench, scene, "DualModelGuider", positive=scene.positive, cfg=scene.cfg, model_negative=other,
        negative=scene.negative))


@pytest.mark.parametrize(("latents", "kind"), [
    ("StableAudio1", "V_PREDICTION"), ("ACEAudio", "FLOW"), ("Hunyuan3Dv2", "FLUX"), ("LTXAV", "FLUX"),
    ("MiniMaxH3AV", "FLOW"), ("SD15", "IMG_TO_IMG")])
def test_what_cannot_be_steered_is_refused_in_one_sentence(bench: Bench, latents: str, kind: str):
    with says(ValueError, "IMG_TO_IMG" if kind == "IMG_TO_IMG" else latents):
        bench.guide(Scene(without_network(latents, kind), [], [], {}))


def test_the_colours_of_all_latents_are_those_of_comfyui_s_previews(bench: Bench):
    import comfy.latent_formats as formats
    from latent_preview import Latent2RGBPreviewer

    for name in (name for name, kind in vars(formats).items() if isinstance(kind, type) and not name.endswith("AV")):
        model = without_network(name)
        known = model.model.latent_format
        if known.latent_rgb_factors is None or known.latent_channels == 3:
            continue
        reshape = getattr(known, "latent_rgb_factors_reshape", None)
        preview = Latent2RGBPreviewer(known.latent_rgb_factors, known.latent_rgb_factors_bias, *filter(None, [reshape]))
        latent = 0.5 * torch.randn(1, known.latent_channels, 6, 10, generator=torch.Generator().manual_seed(0))
        wanted = torch.tensor(np.array(preview.decode_latent_to_preview(latent)))
        image = bench.comfy.pack.nodes.bridge.latents.space_of(model).colours(latent)[0].movedim(0, -1)
        assert (255 * (image + 1).clamp(0, 2) / 2 - wanted).abs().max() <= 1, name


# Other features of ComfyUI

def mask_of(scene: Scene, kind: str = "left") -> Tensor:
    """A MASK on the grid of the latent: its left half, or rising from left to right."""
    height, width = scene.latent["samples"].shape[-2:]
    across = torch.linspace(0, 1, width).expand(1, height, width)
    return across if kind == "rising" else (across < 0.5).float()


def inpainted(bench: Bench, scene: Scene, kind: str = "left") -> Scene:
    start = torch.randn(scene.latent["samples"].shape, generator=torch.Generator().manual_seed(3))
    [latent] = bench.comfy("SetLatentNoiseMask", samples={"samples": start}, mask=mask_of(scene, kind))
    return replace(scene, latent=latent)


def from_image(bench: Bench, scene: Scene) -> Scene:
    return replace(scene, latent={"samples": 2 * torch.ones_like(scene.latent["samples"])}, denoise=0.5)


def resized(bench: Bench, scene: Scene) -> Scene:
    empty = scene.latent["samples"]
    return replace(scene, latent={"samples": empty.new_zeros(*empty.shape[:-2], *ODD)})


def in_two(bench: Bench, scene: Scene, node: str, **inputs: Any) -> Scene:
    """Another prompt for a part of the image."""
    [part] = bench.comfy(node, conditioning=scene.negative, strength=1.0, **inputs)
    [both] = bench.comfy("ConditioningCombine", conditioning_1=scene.positive, conditioning_2=part)
    return replace(scene, positive=both)


def by_area(bench: Bench, scene: Scene) -> Scene:
    return in_two(bench, scene, "ConditioningSetArea", width=80, height=64, x=40, y=16)


def by_mask(bench: Bench, scene: Scene) -> Scene:
    return in_two(bench, scene, "ConditioningSetMask", mask=mask_of(scene), set_cond_area="default")


def by_time(bench: Bench, scene: Scene) -> Scene:
    [late] = bench.comfy("ConditioningSetTimestepRange", conditioning=scene.negative, start=0.5, end=1.0)
    [early] = bench.comfy("ConditioningSetTimestepRange", conditioning=scene.positive, start=0.0, end=0.5)
    return replace(scene, positive=early + late)


def controlled(bench: Bench, scene: Scene, control: Callable[[], Any]) -> Scene:
    height, width = scene.latent["samples"].shape[-2:]
    image = torch.rand(1, 8 * height, 8 * width, 3, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        control = control()
    positive, negative = bench.comfy("ControlNetApplyAdvanced", positive=scene.positive, negative=scene.negative,
                                     control_net=control, image=image, strength=1.0, start_percent=0.0, end_percent=1.0)
    return replace(scene, positive=positive, negative=negative)


def with_lora(bench: Bench, scene: Scene) -> Scene:
    import comfy.sd

    return replace(scene, model=comfy.sd.load_lora_for_models(scene.model, None, lora(scene.model), 1.0, 0.0)[0])


def with_lora_hooks(bench: Bench, scene: Scene) -> Scene:
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora=lora(scene.model), strength_model=1.0, strength_clip=0.0)
    return replace(scene, positive=comfy.hooks.set_hooks_for_conditioning(scene.positive, hooks))


def patched(node: str, **inputs: Any) -> Callable[[Bench, Scene], Scene]:
    return lambda bench, scene: bench.patch(scene, node, **inputs)


def foreign(scene: Scene, add: Callable[[Any], None]) -> Scene:
    """The scene with a patch of another pack on its model."""
    model = scene.model.clone()
    add(model)
    return replace(scene, model=model)


def guided_already(bench: Bench, scene: Scene) -> Scene:
    return bench.guide(scene, guider=bench.comfy("PPAPRule", rule="smoothness")[0])


def foreign_post_cfg(bench: Bench, scene: Scene) -> Scene:
    return foreign(scene, lambda model: model.set_model_sampler_post_cfg_function(
        lambda args: args["denoised"] + 0.1 * args["cond_denoised"]))


def foreign_wrapper(bench: Bench, scene: Scene) -> Scene:
    def predict(executor, x, timestep, *args, **kwargs):
        return 0.9 * executor(x, timestep, *args, **kwargs)
    return foreign(scene, lambda model: model.add_wrapper_with_key("predict_noise", "another pack", predict))


SKIP = {"double_layers": "0", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0}
UNETS, MMDITS = (EPS, "SDXL"), (FLOW, "Flux", "Chroma")
FEATURES = {
    "CFG 1": (lambda bench, scene: replace(scene, cfg=1.0), (EPS, FLOW, VIDEO)),
    "image to image, denoise 0.5": (from_image, (EPS, FLOW, VIDEO)),
    "inpainting (noise mask)": (inpainted, (EPS, FLOW, VIDEO)),
    "DifferentialDiffusion": (lambda bench, scene: bench.patch(inpainted(bench, scene, "rising"), "DifferentialDiffusion"),
                              (EPS, FLOW)),
    "odd sizes": (resized, tuple(family for family in FAMILIES if family not in ("Cosmos-Predict2", "HunyuanVideo"))),
    "area conditioning": (by_area, (EPS, FLOW)),
    "mask conditioning": (by_mask, (EPS, FLOW)),
    "timestep ranges of conditioning": (by_time, (EPS, FLOW)),
    "ControlNet": (lambda bench, scene: controlled(bench, scene, control_net), (EPS,)),
    "T2I-Adapter": (lambda bench, scene: controlled(bench, scene, t2i_adapter), (EPS,)),
    "LoRA": (with_lora, (EPS, FLOW, VIDEO)),
    "LoRA by hooks": (with_lora_hooks, (EPS, FLOW)),
    "PerturbedAttentionGuidance": (patched("PerturbedAttentionGuidance", scale=3.0), UNETS),
    "SelfAttentionGuidance": (patched("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0), (EPS,)),
    "SkipLayerGuidanceDiT": (patched("SkipLayerGuidanceDiT", scale=3.0, rescaling_scale=0.0, **SKIP), MMDITS),
    "SkipLayerGuidanceDiTSimple": (patched("SkipLayerGuidanceDiTSimple", **SKIP), (FLOW,)),
    "APG": (patched("APG", eta=0.5, norm_threshold=5.0, momentum=0.0), (EPS, FLOW)),
    "CFGZeroStar": (patched("CFGZeroStar"), (EPS, FLOW)),
    "CFGNorm": (patched("CFGNorm", strength=1.0), (EPS, FLOW)),
    "Mahiro": (patched("Mahiro"), (EPS, FLOW)),
    "RescaleCFG": (patched("RescaleCFG", multiplier=0.7), (EPS, FLOW)),
    "ModelSamplingDiscrete": (patched("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True), (EPS,)),
    "ModelSamplingSD3": (patched("ModelSamplingSD3", shift=1.5), (FLOW, VIDEO)),
    "Apply Guidance": (guided_already, (EPS, FLOW, VIDEO)),
    "another pack's post-CFG function": (foreign_post_cfg, (EPS, FLOW, VIDEO)),
    "another pack's PREDICT_NOISE wrapper": (foreign_wrapper, (EPS, FLOW, VIDEO)),
}


@pytest.mark.parametrize(("feature", "family"), [(name, family) for name, (_, families) in FEATURES.items()
                                                 for family in families])
@pytest.mark.parametrize("term", [{}, THROUGH], ids=["", "through the model"])
def test_guidance_and_another_feature_work_at_once(bench: Bench, feature: str, family: str, term: dict):
    scene = FEATURES[feature][0](bench, bench.scene(family))
    both = steered(bench, scene, **term)
    for without, made in zip(bench.plain(family), both, strict=True):
        assert made.shape != without.shape or not torch.equal(made, without), f"{feature} has no effect"


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_guidance_leaves_what_inpainting_keeps(bench: Bench, family: str):
    scene = inpainted(bench, bench.scene(family))
    plain, guided = ksampler(bench, scene), ksampler(bench, bench.guide(scene))
    kept = (mask_of(scene)[0] == 0).expand(plain.shape)
    assert torch.equal(guided[kept], plain[kept]) and not torch.equal(guided[~kept], plain[~kept])


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_a_term_steers_latents_only_under_its_mask(bench: Bench, family: str):
    scene = replace(bench.scene(family), steps=1)
    plain, guided = ksampler(bench, scene), ksampler(bench, bench.guide(scene, mask=mask_of(scene)))
    kept = (mask_of(scene)[0] == 0).expand(plain.shape)
    assert torch.equal(guided[kept], plain[kept]) and not torch.equal(guided[~kept], plain[~kept])


def test_each_frame_of_a_video_has_its_own_target_and_mask(bench: Bench, network: Any):
    scene = replace(bench.scene(VIDEO), steps=1)
    [three] = bench.comfy("PPAPAimAtClass", guider=network, classes="star, disk, ring")
    masks = torch.zeros(3, *scene.latent["samples"].shape[-2:])
    masks[1] = 1.0
    plain, guided = ksampler(bench, scene), ksampler(bench, bench.guide(scene, guider=three, mask=masks))
    assert [torch.equal(guided[:, :, frame], plain[:, :, frame]) for frame in range(3)] == [True, False, True]


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_an_image_is_steered_alone_as_it_is_in_a_batch(bench: Bench, family: str):
    scene = bench.guide(bench.scene(family))
    empty = scene.latent["samples"][:1]
    alone = ksampler(bench, replace(scene, latent={"samples": empty, "batch_index": [1]}))
    together = ksampler(bench, replace(scene, latent={"samples": torch.cat([empty, empty])}))
    assert torch.allclose(alone, together[1:], rtol=1e-3, atol=1e-3 * together.std().item())


@pytest.mark.parametrize(("node", "skips"), [("EasyCache", False), ("LazyCache", True)])
@pytest.mark.parametrize("family", [EPS, "Flux"])
def test_a_cache_that_skips_predictions_skips_their_guidance(bench: Bench, family: str, node: str, skips: bool):
    scene = replace(bench.scene(family), steps=8, cfg=1.0)
    cached = bench.patch(scene, node, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)
    guidance = bench.guide(cached)
    plain, neutral, guided = (ksampler(bench, each) for each in (cached, bench.guide(cached, 0.0), guidance))
    assert not torch.equal(plain, ksampler(bench, scene)), "nothing was cached"
    assert torch.equal(neutral, plain) and guided.isfinite().all() and not torch.equal(guided, plain)
    [report] = bench.comfy("PPAPGuidanceReport", model=guidance.model, latent={"samples": guided})
    assert (len(report.records) < scene.steps) == skips


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_the_sampler_nodes_agree_on_a_steered_image(bench: Bench, family: str):
    scene = bench.guide(bench.scene(family))
    wanted = ksampler(bench, scene)
    assert torch.equal(sampler_custom(bench, scene), wanted) and torch.equal(cfg_guider(bench, scene), wanted)
    assert torch.allclose(two_halves(bench, scene), wanted, rtol=1e-3, atol=1e-3 * wanted.std().item())


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_guided_ksampler_reports_each_step_and_each_picture(bench: Bench, family: str):
    scene = bench.scene(family)
    latent, report = bench.comfy("PPAPGuidedKSampler", **scene.asked(), terms=bench.terms(), max_rms=0.0, seed=scene.seed,
                                 steps=scene.steps, denoise=scene.denoise, sampler_name=scene.sampler,
                                 scheduler=scene.scheduler)
    assert torch.equal(latent["samples"], ksampler(bench, bench.guide(scene)))
    pictures = scene.latent["samples"][:, 0].flatten(0, -3).shape[0]
    assert [len(reading.energy) for reading in report.records] == [pictures] * scene.steps


# Order on the MODEL wire

ANYWHERE = ("DifferentialDiffusion", "LoRA", "APG", "RescaleCFG", "SkipLayerGuidanceDiTSimple", "ModelSamplingDiscrete",
            "ModelSamplingSD3", "another pack's PREDICT_NOISE wrapper")
ADDING = ("PerturbedAttentionGuidance", "SelfAttentionGuidance", "SkipLayerGuidanceDiT", "CFGZeroStar",
          "another pack's post-CFG function")
MIXING = ("Mahiro", "CFGNorm")


def both_ways(bench: Bench, feature: str, family: str, view: str, steps: int) -> tuple[Tensor, Tensor]:
    """What is made with guidance after a feature on the MODEL wire, and before it."""
    scene, patch = replace(bench.scene(family), steps=steps), FEATURES[feature][0]
    return tuple(ksampler(bench, each) for each in (bench.guide(patch(bench, scene), view=view, **RAW),
                                                    patch(bench, bench.guide(scene, view=view, **RAW))))


@pytest.mark.parametrize(("feature", "family"), [(name, family) for name in ANYWHERE for family in FEATURES[name][1]])
def test_guidance_may_stand_before_or_after_these(bench: Bench, feature: str, family: str):
    after, before = both_ways(bench, feature, family, "denoised", STEPS)
    assert torch.equal(after, before)


@pytest.mark.parametrize(("feature", "family"), [(name, family) for name in ADDING for family in FEATURES[name][1]])
def test_what_adds_to_the_prediction_only_changes_what_a_guider_of_it_sees(bench: Bench, feature: str, family: str):
    noisy_after, noisy_before = both_ways(bench, feature, family, "noisy", 1)
    assert torch.allclose(noisy_after, noisy_before, rtol=1e-4, atol=1e-4 * noisy_after.std().item())
    after, before = both_ways(bench, feature, family, "denoised", 1)
    assert not torch.allclose(after, before, rtol=1e-4, atol=1e-4 * after.std().item())


@pytest.mark.parametrize(("feature", "family"), [(name, family) for name in MIXING for family in FEATURES[name][1]])
def test_what_mixes_the_prediction_anew_weakens_guidance_that_stands_before_it(bench: Bench, feature: str, family: str):
    patch = FEATURES[feature][0]
    unguided = ksampler(bench, patch(bench, replace(bench.scene(family), steps=1)))
    after, before = ((made - unguided).norm() for made in both_ways(bench, feature, family, "noisy", 1))
    assert 0 < before < after


# All samplers and schedules

def failures(bench: Bench, family: str, settings: list[dict]) -> dict[str, str]:
    """Which of many settings of KSampler guidance does not work with, and why."""
    scene, found = replace(bench.scene(family), cfg=1.0), {}
    scene = replace(scene, latent={"samples": scene.latent["samples"][:1]})
    for changes in settings:
        try:
            steered(bench, replace(scene, **changes))
        except AssertionError as error:
            found[str(changes)] = str(error)
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the samplers themselves
@pytest.mark.parametrize("family", [EPS, FLOW])
def test_every_sampler_is_steered(bench: Bench, family: str):
    from comfy.samplers import KSampler

    assert failures(bench, family, [{"sampler": name} for name in KSampler.SAMPLERS]) == {}


@pytest.mark.parametrize("family", [EPS, FLOW])
def test_every_schedule_is_steered(bench: Bench, family: str):
    from comfy.samplers import KSampler

    assert failures(bench, family, [{"scheduler": name} for name in KSampler.SCHEDULERS]) == {}


# The document

def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the document, without its head."""
    section = DOCUMENT.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def named(families: tuple[str, ...]) -> str:
    """How the document names kinds of models."""
    others = [family for family in FAMILIES if family not in families]
    return f"all but {', '.join(others)}" if len(others) < len(families) else ", ".join(families)


def test_the_document_lists_the_kinds_of_models_and_the_nodes_that_are_tested():
    head, *kinds = rows("Models and sampler nodes")
    assert head[3:] == list(NODES) and [row[0] for row in kinds] == list(FAMILIES)
    assert all(row[3:] == ["yes"] * len(NODES) for row in kinds)
    for name, latents, *_ in kinds:
        family = FAMILIES[name]
        assert latents.startswith(f"{family.latent[1]} channels") and ("flow" in latents) == family.flow
        assert ("frames" in latents) == (len(family.latent) == 5)


def test_the_document_says_which_comfyui_has_a_kind_of_model(bench: Bench):
    import comfy.supported_models
    import comfyui_version

    new = tuple(map(int, comfyui_version.__version__.split(".")[:2])) >= (0, 33)
    for family, _, version, *_ in rows("Models and sampler nodes")[1:]:
        there = hasattr(comfy.supported_models, FAMILIES[family].config)
        assert there == {"both": True, "0.33": new}[version], family


def test_the_document_lists_the_features_and_what_they_are_tested_with():
    listed = {feature: families for feature, families, _ in rows("Other features")[1:]}
    assert listed == {feature: named(families) for feature, (_, families) in FEATURES.items()}


def test_the_document_says_where_the_order_matters():
    orders = {feature: order for feature, _, order in rows("Other features")[1:]}
    for order, features in (("before or after", ANYWHERE), ("after, if the guider shall see it", ADDING), ("after", MIXING)):
        assert {feature for feature, said in orders.items() if said == order} == set(features)
