"""Guidance with ComfyUI's own kinds of models, its samplers and its other patches; docs/compatibility.md lists the same."""
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import says
from helpers.features import ADDING, ANYWHERE, FEATURES, MIXING, inpainted, mask_of
from helpers.model_families import FAMILIES, small, without_network
from helpers.workbench import (
    EPS,
    FLOW,
    SAMPLER_NODES,
    THROUGH,
    VIDEO,
    Scene,
    Workbench,
    cfg_guider,
    ksampler,
    sampler_custom,
    steered,
    two_halves,
    with_guider,
)
from torch import Tensor

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
RAW = {"strength": "raw", "weight": 8.0}  # the gradient itself, whose size tells what the guider saw


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("node", SAMPLER_NODES)
def test_a_kind_of_model_is_steered_in_every_sampler_node(bench: Workbench, family: str, node: str):
    steered(bench, bench.scene(family), SAMPLER_NODES[node])


@pytest.fixture(scope="module")
def network(bench: Workbench) -> Any:
    """A network aimed at something."""
    [loaded] = bench.comfy("PPAPLoadGuider", guider_name="tinyworld/class")
    return bench.comfy("PPAPAimAtClass", guider=loaded, classes="star")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_steers_every_kind_of_model(bench: Workbench, network: Any, family: str, caplog: pytest.LogCaptureFixture):
    """A network steers every kind of model and logs no warning."""
    steered(bench, bench.scene(family), guider=network)
    assert [record.message for record in caplog.records if record.name.startswith(bench.comfy.pack.__name__)] == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("term", [{"view": "noisy"}, {"strength": "raw", "weight": 1.0}], ids=["noisy view", "raw strength"])
def test_every_kind_of_model_is_steered_by_other_terms(bench: Workbench, family: str, term: dict):
    """Guidance works in the noisy view and by the raw gradient."""
    steered(bench, bench.scene(family), **term)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_pass_through_every_kind_of_model(bench: Workbench, family: str):
    steered(bench, bench.scene(family), **THROUGH)


def test_what_has_no_gradient_is_refused(bench: Workbench):
    scene = bench.scene(FLOW)
    model = scene.model.clone()
    model.set_model_unet_function_wrapper(without_gradient)
    with says(ValueError, "do not pass through this model", "in the prediction"):
        ksampler(bench, bench.guide(replace(scene, model=model), **THROUGH))


def without_gradient(apply_model: Any, args: dict) -> Tensor:
    made = apply_model(args["input"], args["timestep"], **args["c"])
    return torch.from_numpy(made.detach().numpy().copy())


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO, "Cosmos-Predict2"])
def test_the_gradient_through_a_model_is_a_finite_difference(bench: Workbench, family: str):
    """The gradient of the energy of the prediction.

    A single Euler step ends at the prediction, and x = image + sigma noise, so that dE / dnoise = sigma dE / dx.
    """
    import comfy.sample
    import comfy.samplers

    scene, bridge = bench.scene(family), bench.comfy.pack.nodes.bridge
    empty = bridge.latents.as_diffused(scene.model, scene.latent["samples"])
    noise, direction = torch.randn(2, *empty.shape, generator=torch.Generator().manual_seed(8))
    asked = dict(steps=1, cfg=4.0, sampler_name="euler", scheduler="simple", positive=scene.positive,
                 negative=scene.negative, latent_image=torch.zeros_like(noise), denoise=0.5)

    def prediction(scene: Scene, noise: Tensor) -> Tensor:
        with torch.inference_mode():
            return comfy.sample.sample(scene.model, noise, **asked).double()

    sigmas = comfy.samplers.KSampler(scene.model, 1, torch.device("cpu"), "euler", "simple", 0.5, {}).sigmas
    sigma = bridge.noise_levels.ve_level(scene.model.get_model_object("model_sampling"), sigmas[0])
    raw = {"strength": "raw", "weight": 0.3, **THROUGH}
    inside = scene.model.model.process_latent_in
    shift = inside(prediction(bench.guide(scene, **raw), noise)) - inside(prediction(scene, noise))
    step = 1e-2
    higher, lower = (bench.energy(scene, prediction(scene, noise + by * direction).float()).double().sum()
                     for by in (step, -step))
    assert float((shift * direction).sum()) == pytest.approx(float(-0.3 * sigma * (higher - lower) / (2 * step)), rel=0.02)


@pytest.mark.parametrize("family", [EPS, FLOW])
def test_a_model_that_computes_in_half_precision_is_steered(bench: Workbench, network: Any, family: str):
    with torch.inference_mode():
        scene = Scene(*small(family, torch.bfloat16))
    plain, _ = steered(bench, scene)
    guided = ksampler(bench, bench.guide(scene, guider=network))
    assert guided.isfinite().all() and not torch.equal(guided, plain)


def test_the_model_of_the_negative_prompt_may_be_unguided(bench: Workbench):
    """DualModelGuider, with guidance on its first model only."""
    if "DualModelGuider" not in bench.comfy.registered:
        pytest.skip("this ComfyUI has no DualModelGuider")
    other = bench.scene(FLOW).model
    steered(bench, bench.scene(FLOW), lambda bench, scene: with_guider(
        bench, scene, "DualModelGuider", positive=scene.positive, cfg=scene.cfg, model_negative=other,
        negative=scene.negative))


@pytest.mark.parametrize(("latents", "kind"), [
    ("StableAudio1", "V_PREDICTION"), ("ACEAudio", "FLOW"), ("Hunyuan3Dv2", "FLUX"), ("LTXAV", "FLUX"),
    ("MiniMaxH3AV", "FLOW"), ("Wan21", "IMG_TO_IMG_FLOW")])
def test_what_cannot_be_steered_is_refused_in_one_sentence(bench: Workbench, latents: str, kind: str):
    with says(ValueError, kind if kind == "IMG_TO_IMG_FLOW" else latents):
        bench.guide(Scene(without_network(latents, kind), [], [], {}))


def test_latent_colours_are_those_of_comfyui_s_previews(bench: Workbench):
    """The linear colours are right for every latent format that has them."""
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
        image = bench.comfy.pack.nodes.bridge.latents.space_of(model).colors(latent)[0].movedim(0, -1)
        assert (255 * (image + 1).clamp(0, 2) / 2 - wanted).abs().max() <= 1, name


# Other features of ComfyUI

@pytest.mark.parametrize(("feature", "family"), [(name, family) for name, (_, families) in FEATURES.items()
                                                 for family in families])
@pytest.mark.parametrize("term", [{}, THROUGH], ids=["", "through the model"])
def test_guidance_and_another_feature_work_at_once(bench: Workbench, feature: str, family: str, term: dict):
    scene = FEATURES[feature][0](bench, bench.scene(family))
    both = steered(bench, scene, **term)
    for without, made in zip(bench.plain(family), both, strict=True):
        assert made.shape != without.shape or not torch.equal(made, without), f"{feature} has no effect"


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_guidance_leaves_what_inpainting_keeps(bench: Workbench, family: str):
    scene = inpainted(bench, bench.scene(family))
    plain, guided = ksampler(bench, scene), ksampler(bench, bench.guide(scene))
    kept = (mask_of(scene)[0] == 0).expand(plain.shape)
    assert torch.equal(guided[kept], plain[kept]) and not torch.equal(guided[~kept], plain[~kept])


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_a_term_steers_latents_only_under_its_mask(bench: Workbench, family: str):
    scene = replace(bench.scene(family), steps=1)
    plain, guided = ksampler(bench, scene), ksampler(bench, bench.guide(scene, mask=mask_of(scene)))
    kept = (mask_of(scene)[0] == 0).expand(plain.shape)
    assert torch.equal(guided[kept], plain[kept]) and not torch.equal(guided[~kept], plain[~kept])


def test_each_frame_of_a_video_has_its_own_target_and_mask(bench: Workbench, network: Any):
    scene = replace(bench.scene(VIDEO), steps=1)
    [three] = bench.comfy("PPAPAimAtClass", guider=network, classes="star, disk, ring")
    masks = torch.zeros(3, *scene.latent["samples"].shape[-2:])
    masks[1] = 1.0
    plain, guided = ksampler(bench, scene), ksampler(bench, bench.guide(scene, guider=three, mask=masks))
    assert [torch.equal(guided[:, :, frame], plain[:, :, frame]) for frame in range(3)] == [True, False, True]


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_an_image_is_steered_alone_as_it_is_in_a_batch(bench: Workbench, family: str):
    scene = bench.guide(bench.scene(family))
    empty = scene.latent["samples"][:1]
    alone = ksampler(bench, replace(scene, latent={"samples": empty, "batch_index": [1]}))
    together = ksampler(bench, replace(scene, latent={"samples": torch.cat([empty, empty])}))
    assert torch.allclose(alone, together[1:], rtol=1e-3, atol=1e-3 * together.std().item())


@pytest.mark.parametrize(("node", "skips"), [("EasyCache", False), ("LazyCache", True)])
@pytest.mark.parametrize("family", [EPS, "Flux"])
@pytest.mark.parametrize("term", [{}, THROUGH], ids=["", "through the model"])
def test_a_cache_that_skips_predictions_skips_their_guidance(bench: Workbench, family: str, node: str, skips: bool,
                                                             term: dict):
    scene = replace(bench.scene(family), steps=8, cfg=1.0)
    cached = bench.patch(scene, node, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False)
    guidance = bench.guide(cached, **term)
    plain, neutral, guided = (ksampler(bench, each) for each in (cached, bench.guide(cached, 0.0, **term), guidance))
    assert not torch.equal(plain, ksampler(bench, scene)), "nothing was cached"
    assert torch.equal(neutral, plain) and guided.isfinite().all() and not torch.equal(guided, plain)
    [report] = bench.comfy("PPAPGuidanceReport", model=guidance.model, latent={"samples": guided})
    assert (len(report.records) < scene.steps) == skips


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_the_sampler_nodes_agree_on_a_steered_image(bench: Workbench, family: str):
    scene = bench.guide(bench.scene(family))
    wanted = ksampler(bench, scene)
    assert torch.equal(sampler_custom(bench, scene), wanted) and torch.equal(cfg_guider(bench, scene), wanted)
    assert torch.allclose(two_halves(bench, scene), wanted, rtol=1e-3, atol=1e-3 * wanted.std().item())


@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_guided_ksampler_reports_each_step_and_each_picture(bench: Workbench, family: str):
    scene = bench.scene(family)
    latent, report = bench.comfy("PPAPGuidedKSampler", **scene.inputs(), terms=bench.terms(), max_rms=0.0, seed=scene.seed,
                                 steps=scene.steps, denoise=scene.denoise, sampler_name=scene.sampler,
                                 scheduler=scene.scheduler)
    assert torch.equal(latent["samples"], ksampler(bench, bench.guide(scene)))
    pictures = scene.latent["samples"][:, 0].flatten(0, -3).shape[0]
    assert [len(reading.energy) for reading in report.records] == [pictures] * scene.steps


# Order on the MODEL wire

def both_ways(bench: Workbench, feature: str, family: str, view: str, **changes: Any) -> tuple[Tensor, Tensor]:
    """Latents with guidance after a feature on the MODEL wire, and before it."""
    scene, patch = replace(bench.scene(family), **changes), FEATURES[feature][0]
    return tuple(ksampler(bench, each) for each in (bench.guide(patch(bench, scene), view=view, **RAW),
                                                    patch(bench, bench.guide(scene, view=view, **RAW))))


@pytest.mark.parametrize(("feature", "family"), [(name, family) for name in ANYWHERE for family in FEATURES[name][1]])
def test_guidance_may_stand_before_or_after_these(bench: Workbench, feature: str, family: str):
    after, before = both_ways(bench, feature, family, "denoised")
    assert torch.equal(after, before)


@pytest.mark.parametrize(("feature", "family"), [(name, family) for name in ADDING for family in FEATURES[name][1]])
def test_order_changes_what_is_seen_where_features_add(bench: Workbench, feature: str, family: str):
    """A feature that adds to the prediction changes what a guider of the prediction sees, and nothing else."""
    noisy_after, noisy_before = both_ways(bench, feature, family, "noisy", steps=1)
    assert torch.allclose(noisy_after, noisy_before, rtol=1e-4, atol=1e-4 * noisy_after.std().item())
    after, before = both_ways(bench, feature, family, "denoised", steps=1)
    assert not torch.allclose(after, before, rtol=1e-4, atol=1e-4 * after.std().item())


@pytest.mark.parametrize(("feature", "family"), [(name, family) for name in MIXING for family in FEATURES[name][1]])
def test_guidance_is_weaker_before_features_that_mix(bench: Workbench, feature: str, family: str):
    """A feature that mixes the prediction anew weakens guidance that stands before it."""
    patch, once = FEATURES[feature][0], {"steps": 1, "denoise": 0.5}
    unguided = ksampler(bench, patch(bench, replace(bench.scene(family), **once)))
    after, before = ((made - unguided).norm() for made in both_ways(bench, feature, family, "noisy", **once))
    assert 0 < before < after


# All samplers and schedules

def failures(bench: Workbench, family: str, settings: list[dict]) -> dict[str, str]:
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
def test_every_sampler_is_steered(bench: Workbench, family: str):
    from comfy.samplers import KSampler

    assert failures(bench, family, [{"sampler": name} for name in KSampler.SAMPLERS]) == {}


@pytest.mark.parametrize("family", [EPS, FLOW])
def test_every_schedule_is_steered(bench: Workbench, family: str):
    from comfy.samplers import KSampler

    assert failures(bench, family, [{"scheduler": name} for name in KSampler.SCHEDULERS]) == {}


# The document

def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading of the document, without its head."""
    section = DOCUMENT.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def named(families: tuple[str, ...]) -> str:
    """The text by which the document names kinds of models."""
    others = [family for family in FAMILIES if family not in families]
    return f"all but {', '.join(others)}" if len(others) < len(families) else ", ".join(families)


def test_the_document_lists_the_tested_models_and_nodes():
    head, *kinds = rows("Models and sampler nodes")
    assert head[3:] == list(SAMPLER_NODES) and [row[0] for row in kinds] == list(FAMILIES)
    assert all(row[3:] == ["yes"] * len(SAMPLER_NODES) for row in kinds)
    for name, latents, *_ in kinds:
        family = FAMILIES[name]
        assert latents.startswith(f"{family.latent[1]} channels") and ("flow" in latents) == family.flow
        assert ("frames" in latents) == (len(family.latent) == 5)


def test_the_document_says_which_comfyui_has_a_kind_of_model(bench: Workbench):
    import comfy.supported_models
    import comfyui_version

    new = tuple(map(int, comfyui_version.__version__.split(".")[:2])) >= (0, 33)
    for family, _, version, *_ in rows("Models and sampler nodes")[1:]:
        there = hasattr(comfy.supported_models, FAMILIES[family].config)
        assert there == {"both": True, "0.33": new}[version], family


def test_the_document_lists_the_tested_features():
    listed = {feature: families for feature, families, _ in rows("Other features")[1:]}
    assert listed == {feature: named(families) for feature, (_, families) in FEATURES.items()}


def test_the_document_says_where_the_order_matters():
    orders = {feature: order for feature, _, order in rows("Other features")[1:]}
    expected = {"before or after": ANYWHERE, "after, if the guider should see it": ADDING, "after": MIXING}
    for order, features in expected.items():
        assert {feature for feature, said in orders.items() if said == order} == set(features)
