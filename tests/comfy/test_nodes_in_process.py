"""The nodes in a real ComfyUI, called as its executor calls them."""
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import says
from helpers.guider_families import FAMILIES
from helpers.worlds import PixelWorld

from benchmarks.networks import load_judge
from ppap_core.guiders.rules import RULES

SAMPLERS = ("euler", "heun", "dpmpp_2m_sde", "uni_pc")


@pytest.fixture(scope="module")
def world(comfy) -> PixelWorld:
    return PixelWorld(comfy)


def test_the_tiny_world_is_the_core_s_denoiser(comfy, world: PixelWorld):
    denoise = comfy.pack.ppap_core.tinyworld.loaders.load_denoiser()
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for sigma in (0.02, 0.5, 4.0, 80.0):
            level = torch.full((3,), sigma)
            ours, theirs = denoise(x * sigma, level), world.model.model.apply_model(x * sigma, level)
            assert (ours - theirs).abs().max() < 1e-5
    [image] = comfy("VAEDecode", samples={"samples": x.clamp(-1, 1)}, vae=world.vae)
    assert torch.allclose(image, (x.clamp(-1, 1).movedim(1, -1) + 1) / 2)


@pytest.mark.parametrize("changes", [
    {"weight": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}, {"mask": torch.zeros(1, 32, 32)},
    {"factor_at_start": 0.0, "factor_at_end": 0.0}], ids=["weight 0", "closed window", "zero mask", "factors 0"])
def test_a_neutral_term_leaves_the_image_bit_for_bit(world: PixelWorld, changes: dict):
    assert torch.equal(world.guided(world.term(**changes)), world.sample())


def test_an_open_window_and_no_limit_are_neutral(world: PixelWorld):
    free = world.guided()
    assert torch.equal(world.guided(max_rms=100.0), free)
    assert not torch.equal(world.guided(max_rms=0.01), free)
    assert torch.equal(world.guided(world.term(mask=torch.ones(3, 32, 32))), free)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_guidance_steers_every_sampler(world: PixelWorld, sampler: str, view: str):
    plain, guided = world.sample(sampler_name=sampler), world.guided(world.term(view=view), sampler_name=sampler)
    assert guided.isfinite().all() and (guided - plain).abs().mean() > 1e-4


def test_only_experts_of_the_noisy_view_start_warm(world: PixelWorld):
    """In the noisy view an expert starts as its neighbour ended."""
    for view, alike in (("noisy", True), ("denoised", False)):
        first, second = world.starts(view)
        assert all(torch.equal(first[name], second[name]) for name in first) == alike, view


def test_guidance_makes_the_judge_see_what_was_asked_for(comfy):
    world = PixelWorld(comfy, batch=16)
    judge = load_judge("class").aim(torch.tensor([3]))
    plain, guided = (images.clone() for images in (world.sample(steps=12), world.guided(world.term(weight=8.0), steps=12)))
    before, after = (judge.score(images.clamp(-1, 1), torch.zeros(16)).mean() for images in (plain, guided))
    assert after > before + 0.2


def test_the_windows_of_a_sampling_share_every_step_once(comfy, world: PixelWorld):
    model = world.model
    to_core_term = comfy.pack.nodes.bridge.terms.to_core_term
    terms = [to_core_term(model, world.term(start_percent=a, end_percent=b)[0], (1, 3, 32, 32), None)
             for a, b in ((0.0, 0.3), (0.3, 0.6), (0.6, 1.0))]
    edge = float(model.get_model_object("model_sampling").percent_to_sigma(0.3))
    for sigma in (80.0, 1e9, edge, 1.0, 0.02, 0.0):
        assert sum(sigma in term.schedule.window for term in terms) == 1


def test_a_ramp_spans_the_noise_of_the_model(comfy, world: PixelWorld):
    """A ramp goes from the first factor at the highest noise level to the last at the lowest."""
    term = comfy.pack.nodes.bridge.terms.to_core_term(world.model, world.term(factor_at_start=3.0, factor_at_end=0.5)[0],
                                               (1, 3, 32, 32), None)
    assert term.schedule.ramp(80.0) == pytest.approx(3.0) and term.schedule.ramp(0.02) == pytest.approx(0.5)


def flow_sampling() -> Any:
    from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow

    return type("Flow", (ModelSamplingDiscreteFlow, CONST), {})()


def test_a_flow_model_is_steered_from_pure_noise_on(world: PixelWorld):
    flow = world.model.clone()
    flow.add_object_patch("model_sampling", flow_sampling())
    [guided] = world.comfy("PPAPApplyGuidance", model=flow, terms=world.term(factor_at_end=0.5), max_rms=0.2)
    plain, steered = (world.sample(model, scheduler="simple") for model in (flow, guided))
    assert steered.isfinite().all() and not torch.equal(plain, steered)


def test_a_flow_model_is_converted_to_the_noise_of_the_core(comfy):
    noise_levels, flow = comfy.pack.nodes.bridge.noise_levels, flow_sampling()
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.9])
    noisy, sigma = noise_levels.to_ve(flow, x, t)
    assert sigma.tolist() == pytest.approx([0.25, 9.0])
    assert torch.allclose(noisy, x / torch.tensor([0.8, 0.1]).reshape(2, 1, 1, 1), atol=1e-5)
    window = noise_levels.PercentSchedule(0.0, 0.5).window(flow)
    assert float("inf") == window.hi and window.lo == pytest.approx(1.0)


def test_a_balanced_weight_means_the_same_for_every_guider(comfy, world: PixelWorld):
    [bright] = comfy("PPAPRule", rule="brightness")
    [bright] = comfy("PPAPAimAtNumber", guider=bright, number=0.9)
    for guider in (world.guider, bright):
        _, report = comfy("PPAPGuidedKSampler", model=world.model, terms=world.term(guider, weight=0.2, strength="balanced"),
                          max_rms=0.0, **world.settings())
        for each in report.records:
            uncertain = each.sigma * 0.5 / (each.sigma**2 + 0.25) ** 0.5
            assert each.rms.tolist() == pytest.approx([0.2 * uncertain] * 3, rel=1e-3)
    assert not torch.equal(world.guided(world.term(strength="balanced")), world.guided(world.term()))


def test_image_to_image_and_one_class_for_each_image(comfy, world: PixelWorld):
    [guider] = comfy("PPAPAimAtClass", guider=world.plain, classes="star, 0, ring")
    start = {"samples": world.sample()}
    plain = world.sample(latent_image=start, denoise=0.5)
    guided = world.guided(world.term(guider), latent_image=start, denoise=0.5)
    assert plain.shape == guided.shape and not torch.equal(plain, guided)


def test_guidance_repeats_and_leaves_the_model_alone(world: PixelWorld):
    plain, first = world.sample(), world.guided()
    [model] = world.comfy("PPAPApplyGuidance", model=world.model, terms=world.term(), max_rms=0.0)
    assert torch.equal(world.sample(model), first) and torch.equal(world.sample(model), first)
    assert torch.equal(world.sample(), plain)


def test_two_applied_guidances_add_up_like_combined_terms(comfy, world: PixelWorld):
    a, b = world.term(weight=2.0), world.term(weight=3.0, view="noisy")
    [both] = comfy("PPAPCombineTerms", first=a, second=b)
    [one] = comfy("PPAPApplyGuidance", model=world.model, terms=both, max_rms=0.0)
    assert torch.equal(world.sample(one), world.guided(world.term(weight=3.0, view="noisy", terms=a)))
    [nested] = comfy("PPAPApplyGuidance", model=world.model, terms=a, max_rms=0.0)
    [nested] = comfy("PPAPApplyGuidance", model=nested, terms=a, max_rms=0.0)
    latent = {"samples": world.sample(nested)}
    [report] = comfy("PPAPGuidanceReport", model=nested, latent=latent)
    assert report.names == ("1: tinyworld/guider_class", "2: tinyworld/guider_class")
    assert {each.term for each in report.records} == {0, 1}


def test_the_guided_ksampler_is_the_stock_one_on_a_guided_model(comfy, world: PixelWorld):
    latent, report = comfy("PPAPGuidedKSampler", model=world.model, terms=world.term(), max_rms=0.3, **world.settings())
    assert torch.equal(latent["samples"], world.guided(max_rms=0.3))
    assert len(report.records) == 5
    [plot] = comfy("PPAPPlotGuidance", report=report)
    assert plot.shape == (1, 600, 720, 3) and plot.std() > 0


def test_the_report_counts_noise_levels_not_calls(comfy, world: PixelWorld):
    latent, report = comfy("PPAPGuidedKSampler", model=world.model, terms=world.term(), max_rms=0.0,
                           **world.settings(sampler_name="heun"))
    assert len(report.records) > 5 and len({each.sigma for each in report.records}) == 5


def test_guiders_are_counted_among_the_loaded_models(world: PixelWorld):
    import comfy.model_management as management

    management.unload_all_models()
    world.guided()
    loaded = {id(each.model.model) for each in management.current_loaded_models}
    assert id(world.plain.net) in loaded
    assert not any(tensor.is_inference() for tensor in world.plain.net.state_dict().values())


def test_inference_weights_become_differentiable_again(world: PixelWorld):
    """Weights that ComfyUI moved in inference mode."""
    with torch.inference_mode():
        world.plain.net.to(torch.float64).to(torch.float32)
    assert any(tensor.is_inference() for tensor in world.plain.net.parameters())
    assert world.guided().isfinite().all()


def test_experts_guide_and_are_saved_and_loaded(comfy, world: PixelWorld):
    guider = world.experts()
    comfy("PPAPSaveExperts", guider=guider, file_name="two experts")
    [loaded] = comfy("PPAPLoadExperts", guider=world.guider, file_name="two experts.safetensors")
    file = comfy.pack.nodes.bridge.paths.expert_file("two experts.safetensors")
    _, about = comfy.pack.ppap_core.io.files.load_tensors(file)
    assert about["recipe"]["steps"] == 2 and about["recipe"]["samples"]["sampler"] == "euler"
    assert torch.equal(world.guided(world.term(loaded)), world.guided(world.term(guider)))
    assert not torch.equal(world.guided(world.term(guider)), world.guided(world.term(world.guider)))


@pytest.mark.parametrize(("task", "size"), [("class", 256), ("depth", 32), ("segmentation", 32)])
def test_what_a_guider_sees_is_a_picture_of_each_image(comfy, task: str, size: int):
    [guider] = comfy("PPAPLoadGuider", guider_name=f"tinyworld/{task}")
    [seen] = comfy("PPAPLookThrough", guider=guider, image=torch.rand(2, 40, 24, 3))
    assert seen.shape == (2, size, size, 3) and seen.std() > 0 and 0 <= seen.min() and seen.max() <= 1


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_a_picture_and_its_map_are_the_same_target(comfy, world: PixelWorld, task: str):
    """The map that the guider predicts of a picture aims at the same as the picture."""
    [guider] = comfy("PPAPLoadGuider", guider_name=f"tinyworld/{task}")
    picture = (world.sample()[:1].movedim(1, -1) + 1) / 2
    [seen] = comfy("PPAPLookThrough", guider=guider, image=picture)
    [by_picture] = comfy("PPAPAimAtImage", guider=guider, image=picture, image_is="a picture")
    [by_map] = comfy("PPAPAimAtImage", guider=guider, image=seen, image_is="a map")
    if task == "segmentation":
        assert torch.equal(by_picture.target, by_map.target)
    else:
        both = torch.stack([by_picture.target.flatten(), by_map.target.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.999
    assert world.guided(world.term(by_map)).isfinite().all()


def rule(world: PixelWorld, name: str, plain: torch.Tensor) -> Any:
    """A rule aimed as people aim it: at an image, at half as much again as there is, or at nothing."""
    [guider] = world.comfy("PPAPRule", rule=name)
    if RULES[name].aim == "image":
        return world.comfy("PPAPAimAtImage", guider=guider, image=world.seen(), image_is="a picture")[0]
    if RULES[name].aim == "number":
        measured = guider.predict(plain.clone(), torch.zeros(len(plain))).mean().item()
        return world.comfy("PPAPAimAtNumber", guider=guider, number=1.5 * measured)[0]
    return guider


@pytest.mark.parametrize("name", RULES)
def test_each_rule_steers_without_a_network(comfy, world: PixelWorld, name: str):
    plain = world.sample(steps=8)
    guider = rule(world, name, plain)
    guided = world.guided(world.term(guider, weight=2.0), steps=8)
    before, after = (world.energy(guider, images) for images in (plain, guided))
    assert guided.isfinite().all() and after.mean() < 0.9 * before.mean(), (before, after)
    [seen] = comfy("PPAPLookThrough", guider=guider, image=world.seen())
    assert seen.shape[0] == 1 and seen.shape[-1] == 3 and 0 <= seen.min() and seen.max() <= 1


def test_a_rule_and_a_network_steer_together_and_both_are_loaded(world: PixelWorld):
    import comfy.model_management as management

    [symmetry] = world.comfy("PPAPRule", rule="symmetry left-right")
    management.unload_all_models()
    both = world.guided(world.term(symmetry, weight=1.0, terms=world.term()))
    assert both.isfinite().all() and not torch.equal(both, world.guided())
    loaded = {id(each.model.model) for each in management.current_loaded_models}
    assert {id(world.plain.net), id(symmetry.net)} <= loaded
    management.unload_all_models()
    assert torch.equal(world.guided(world.term(symmetry, weight=1.0, terms=world.term())), both)


def test_a_palette_is_reached(comfy, world: PixelWorld):
    [stripes] = comfy("PPAPPalette", colours="#1d3557:3, #ffd166")
    assert stripes.shape == (1, 64, 64, 3)
    assert torch.equal(comfy("PPAPPalette", colours="#1D3557:3,ffd166:1,")[0], stripes), "a width of 1 is neutral"
    yellow = torch.tensor([0xFF, 0xD1, 0x66]) / 255
    assert (stripes - yellow).abs().amax(-1).lt(0.01).float().mean() == 0.25
    [guider] = comfy("PPAPRule", rule="colours")
    [guider] = comfy("PPAPAimAtImage", guider=guider, image=stripes, image_is="a picture")

    def distance(images: torch.Tensor) -> torch.Tensor:
        """Mean distance of the quantiles of red, green and blue from those of the palette."""
        shares = (torch.arange(100) + 0.5) / 100
        ours, wanted = (each.flatten(2).quantile(shares, dim=2) for each in ((images + 1) / 2, stripes.movedim(-1, 1)))
        return (ours - wanted).abs().mean()
    plain, guided = world.sample(steps=12), world.guided(world.term(guider, weight=8.0), steps=12)
    before, after = distance(plain), distance(guided)
    assert after < 0.08 and after < before / 2.5, (before, after)


def test_several_classes_are_aimed_at_in_one_image(comfy, world: PixelWorld):
    """Weights scale the classes, and weight 0 changes nothing."""
    [both] = comfy("PPAPAimAtClass", guider=world.plain, classes="star + ring:0.5")
    assert both.target.shape == (1, 8) and sorted(both.target.unique().tolist()) == [0.0, 0.5, 1.0]
    guided = world.guided(world.term(both, weight=8.0))
    assert world.energy(both, guided).mean() < world.energy(both, world.sample()).mean()
    [away] = comfy("PPAPAimAtClass", guider=world.plain, classes="star + ring:-1, disk, heart + 0")
    assert away.target.shape == (3, 8) and world.guided(world.term(away)).isfinite().all()
    [nothing] = comfy("PPAPAimAtClass", guider=world.plain, classes="star:0")
    assert torch.equal(world.guided(world.term(nothing)), world.sample())


def test_a_mask_says_where_a_class_shall_be(comfy):
    world, judge = PixelWorld(comfy, batch=8), load_judge("segmentation")
    mask = torch.zeros(1, 32, 32)
    mask[:, 13:25, 6:18] = 1
    [guider] = comfy("PPAPLoadGuider", guider_name="tinyworld/segmentation")
    [guider] = comfy("PPAPAimAtMask", guider=guider, mask=mask, name="disk")
    plain, guided = (world.sample(steps=12), world.guided(world.term(guider, weight=40.0), max_rms=0.3, steps=12))
    with comfy.pack.nodes.bridge.autograd.outside_inference_mode(), torch.no_grad():
        before, after = ((judge.predict(images.clone().clamp(-1, 1), torch.zeros(8)).argmax(1)[:, mask[0] > 0] == 1)
                         .float().mean() for images in (plain, guided))
    assert after > before + 0.25, (before, after)


def reader(guider: Any, task: str = "embedding") -> Any:
    """The classifier as if it were a network that knows texts: its answer is what a text has to come close to."""
    return replace(guider, task=task, read_text=lambda text: torch.eye(8)[[len(text) % 8]])


def test_a_text_is_aimed_at_and_each_line_is_for_one_image(comfy, world: PixelWorld):
    [guider] = comfy("PPAPAimAtText", guider=reader(world.plain), text="a red star")
    assert guider.target.tolist() == torch.eye(8)[[2]].tolist() and not guider.target.is_inference()
    guided = world.guided(world.term(guider))
    assert guided.isfinite().all() and not torch.equal(guided, world.sample())
    [lines] = comfy("PPAPAimAtText", guider=reader(world.plain), text="a red star\n\n a ring \nthe moon")
    assert lines.target.argmax(1).tolist() == [2, 6, 0] and world.guided(world.term(lines)).isfinite().all()
    [asked] = comfy("PPAPAimAtText", guider=reader(world.plain, "mask"), text="star")
    assert asked.target is None and asked.prompt.shape == (1, 8)


def test_cut_outs_change_what_is_seen_and_none_are_neutral(comfy, world: PixelWorld):
    [guider] = comfy("PPAPCutOuts", guider=world.guider, count=3)
    guided = world.guided(world.term(guider))
    assert guided.isfinite().all() and not torch.equal(guided, world.guided())
    [none] = comfy("PPAPCutOuts", guider=world.guider, count=0)
    assert torch.equal(world.guided(world.term(none)), world.guided())
    for task in ("class", "embedding", "number", "style"):
        assert comfy("PPAPCutOuts", guider=replace(world.plain, task=task), count=4)[0].cutouts == 4
    [symmetry] = comfy("PPAPRule", rule="symmetry half turn")
    assert comfy("PPAPCutOuts", guider=symmetry, count=0)[0] == symmetry


def test_a_temperature_of_1_is_neutral(world: PixelWorld):
    """A lower one teaches something else."""
    usual, named, sharper = world.experts(), world.experts(temperature=1.0), world.experts(temperature=0.25)
    assert torch.equal(world.guided(world.term(named)), world.guided(world.term(usual)))
    assert not torch.equal(world.guided(world.term(sharper)), world.guided(world.term(usual)))


def test_the_output_of_a_network_is_chosen(comfy, world: PixelWorld):
    """An output that the network does not have is refused."""
    [guider] = comfy("PPAPLoadGuider", guider_name="tinyworld/class", answer="own")
    assert guider.net is world.plain.net or guider.name == world.plain.name
    with says(ValueError, "tiny world", "style", "'own'"):
        comfy("PPAPLoadGuider", guider_name="tinyworld/class", answer="style")


def test_samples_do_not_depend_on_interruptions(comfy, world: PixelWorld):
    import comfy.model_management as management

    settings = {"latent_image": {"samples": torch.zeros(16, 3, 32, 32)}, "count": 128, "steps": 7}
    straight = world.samples(name="straight", **settings)
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        world.samples(name="stopped", **settings)
    world.samples(name="stopped", **settings | {"count": 64})
    stopped = world.samples(name="stopped", **settings)
    assert len(straight.store) == 128
    for name in ("images", "sigmas", "noisy_vp", "denoised"):
        assert torch.equal(getattr(straight.store, name), getattr(stopped.store, name))


def test_a_model_is_known_by_its_weights_and_patches(comfy, world: PixelWorld):
    about = comfy.pack.nodes.bridge.fingerprint.fingerprint_model
    again = PixelWorld(comfy)
    assert about(world.model, world.conditioning) == about(again.model, again.conditioning)
    [strong], [weak] = (comfy("PPAPApplyGuidance", model=world.model, terms=world.term(weight=weight), max_rms=0.0)
                        for weight in (2.0, 1.0))
    assert len({about(model)["model"] for model in (world.model, strong, weak)}) == 3
    again.model.add_patches({"diffusion_model.net.stem.bias": (torch.ones(64),)})
    assert about(world.model, world.conditioning) != about(again.model, again.conditioning)


def test_fingerprints_know_controlnets_and_patches(comfy, world: PixelWorld):
    """A search or a store that was made with other settings must not be taken for this one."""
    from comfy.controlnet import T2IAdapter

    about = comfy.pack.nodes.bridge.fingerprint.fingerprint_model

    def controlled(hint: float, strength: float, weights: float = 0.0, end: float = 1.0) -> list:
        control = T2IAdapter(torch.nn.Conv2d(3, 4, 1), 4, 8, None)
        with torch.no_grad():
            control.t2i_model.weight.fill_(weights), control.t2i_model.bias.zero_()
        control.set_cond_hint(torch.full((1, 3, 32, 32), hint), strength, (0.0, end))
        [[tensor, more]] = world.conditioning
        return [[tensor, {**more, "control": control}]]

    kinds = [(0.5, 1.0), (0.6, 1.0), (0.5, 0.9), (0.5, 1.0, 0.1), (0.5, 1.0, 0.0, 0.8)]
    assert len({about(world.model, controlled(*kind))["conditioning"] for kind in kinds}) == len(kinds)
    first, cancelled = controlled(*kinds[0]), controlled(*kinds[0])
    cancelled[0][1]["control"].model_sampling_current = torch.nn.Linear(2, 2)  # left by a cancelled sampling
    cancelled[0][1]["control"].cond_hint = torch.ones(1)
    assert about(world.model, first) == about(world.model, cancelled)
    cancelled[0][1]["control"].extra_args["control_type"] = [1]
    assert about(world.model, first) != about(world.model, cancelled)
    patched = [world.model.clone() for _ in range(3)]
    for model, scale in zip(patched, (1.0, 3.0, 3.0), strict=True):
        model.set_model_sampler_post_cfg_function(lambda args, scale=scale: scale * args["denoised"])
    one, three, again = (about(model)["model"] for model in patched)
    assert one != three == again


def test_the_fingerprint_ignores_which_expert_is_active(comfy, world: PixelWorld):
    experts, bridge = world.experts(), comfy.pack.nodes.bridge
    [model] = comfy("PPAPApplyGuidance", model=world.model, terms=world.term(experts), max_rms=0.0)
    names = []
    for index in (0, 1):
        experts.net.select(index)
        names.append(bridge.fingerprint.fingerprint_model(model)["model"])
    first, second = (bridge.terms.fingerprint_terms(world.term(each))
                     for each in (experts, world.experts(seed=1)))
    assert names[0] == names[1] and first != second


def test_a_guided_ksampler_returns_what_it_cannot_sample(comfy, world: PixelWorld):
    """A denoise of 0 and a latent without numbers come back as they are."""
    def run(**changes: Any) -> tuple:
        return comfy("PPAPGuidedKSampler", model=world.model, terms=world.term(), max_rms=0.0, **world.settings(**changes))

    start = {"samples": torch.full((3, 3, 32, 32), 0.3)}
    latent, report = run(latent_image=start, denoise=0.0)
    assert torch.equal(latent["samples"], start["samples"]) and report.levels == 0
    assert comfy("PPAPPlotGuidance", report=report)[0].ndim == 4 and comfy("PPAPReadGuidance", report=report)
    nothing, report = run(latent_image={"samples": torch.full((3, 3, 32, 32), torch.nan)}, denoise=0.5)
    assert nothing["samples"].isnan().any() and report.levels > 0


def test_wrong_inputs_are_refused_in_one_sentence(comfy, world: PixelWorld):
    with says(ValueError, "'stair'", "star"):
        comfy("PPAPAimAtClass", guider=world.plain, classes="stair")
    with says(ValueError, "'half'", "star:0.5"):
        comfy("PPAPAimAtClass", guider=world.plain, classes="star:half")
    with says(ValueError, "predicts class", "a drawn map", "depth"):
        comfy("PPAPAimAtImage", guider=world.plain, image=torch.rand(1, 32, 32, 3), image_is="a map")
    with says(ValueError, "no target"):
        world.guided(world.term(world.plain))
    with says(ValueError, "2 images", "3 are"):
        world.guided(world.term(comfy("PPAPAimAtClass", guider=world.plain, classes="star, disk")[0]))
    with says(ValueError, "the mask", "(2, 1, 32, 32)", "(3, 3, 32, 32)"):
        world.guided(world.term(mask=torch.ones(2, 16, 32)))
    with says(ValueError, "start at 0.6", "end at 0.4"):
        world.term(start_percent=0.6, end_percent=0.4)
    with says(ValueError, "denoised view", "noisy"):
        world.term(world.experts(), view="noisy")
    with says(ValueError, "no experts to save"):
        comfy("PPAPSaveExperts", guider=world.plain, file_name="nothing")
    with says(ValueError, "not a plain guider"):
        world.experts(guider=world.experts())
    with says(ValueError, "not sampled with this guided model"):
        comfy("PPAPGuidanceReport", model=world.model, latent=world.latent)
    with says(ValueError, "no guider '../class'", "tinyworld/class"):
        comfy("PPAPLoadGuider", guider_name="../class")


def test_each_aim_node_refuses_foreign_guiders(comfy, world: PixelWorld):
    """Each Aim node, the palette and the cut-outs say in one sentence what they are not for."""
    [depth] = comfy("PPAPLoadGuider", guider_name="tinyworld/depth")
    [regions] = comfy("PPAPLoadGuider", guider_name="tinyworld/segmentation")
    [symmetry], [bright] = (comfy("PPAPRule", rule=name) for name in ("symmetry half turn", "brightness"))
    mask = torch.ones(1, 32, 32)
    with says(ValueError, "tinyworld/guider_class", "knows no texts", "CLIP"):
        comfy("PPAPAimAtText", guider=world.plain, text="a star")
    with says(ValueError, "no text was given"):
        comfy("PPAPAimAtText", guider=reader(world.plain), text=" \n ")
    with says(ValueError, "tinyworld/guider_depth", "predicts depth", "a mask", "segmentation"):
        comfy("PPAPAimAtMask", guider=depth, mask=mask, name="star")
    with says(ValueError, "the mask is empty"):
        comfy("PPAPAimAtMask", guider=regions, mask=mask * 0, name="star")
    with says(ValueError, "no class 'tree'", "wall"):
        comfy("PPAPAimAtMask", guider=regions, mask=mask, name="tree")
    with says(ValueError, "was not asked yet", "aim it at a text"):
        comfy("PPAPAimAtMask", guider=reader(depth, "mask"), mask=mask, name="")
    with says(ValueError, "predicts class", "a number"):
        comfy("PPAPAimAtNumber", guider=world.plain, number=0.5)
    with says(ValueError, "brightness", "no target"):
        world.guided(world.term(bright))
    with says(ValueError, "depth", "parts of an image", "without cut-outs"):
        comfy("PPAPCutOuts", guider=depth, count=8)
    with says(ValueError, "brightness", "is a rule", "without cut-outs"):
        comfy("PPAPCutOuts", guider=bright, count=8)
    with says(ValueError, "rule/symmetry half turn", "experts"):
        world.experts(guider=symmetry)
    with says(ValueError, "'#12345'", "six hexadecimal digits"):
        comfy("PPAPPalette", colours="#ff0000, #12345")
    palette = comfy.registered["PPAPPalette"]
    assert palette.validate_inputs("#ff0000") is True and "no colour was given" in palette.validate_inputs(" , ")


def test_damaged_and_foreign_experts_are_refused(comfy, world: PixelWorld):
    comfy("PPAPSaveExperts", guider=world.experts(), file_name="whole")
    file = comfy.pack.nodes.bridge.paths.expert_file("whole.safetensors")
    file.with_name("cut.safetensors").write_bytes(file.read_bytes()[:-100])
    with says(ValueError, "cut.safetensors", "cannot be read"):
        comfy("PPAPLoadExperts", guider=world.plain, file_name="cut.safetensors")
    with comfy.pack.nodes.bridge.autograd.outside_inference_mode():
        other = comfy.pack.ppap_core.tinyworld.loaders.load_guider("class")  # not the one network that all nodes share
        for parameter in other.net.parameters():
            parameter.data.mul_(1.01)
    with says(ValueError, "whole.safetensors", "fingerprint"):
        comfy("PPAPLoadExperts", guider=other, file_name="whole.safetensors")


def test_the_ways_of_a_tagger_are_set_where_it_is_loaded(comfy, tmp_path):
    """The network is read once, whatever is set; a tag aimed at is one of its own."""
    import folder_paths

    FAMILIES["tagger (timm ViT)"].write(tmp_path / "guiders" / "tagger")
    folder_paths.add_model_folder_path("ppap_guiders", str(tmp_path / "guiders"))
    try:
        [own] = comfy("PPAPLoadGuider", guider_name="tagger")
        [other] = comfy("PPAPLoadGuider", guider_name="tagger", channels="red first", padding="none")
    finally:
        folder_paths.get_folder_paths("ppap_guiders").remove(str(tmp_path / "guiders"))
    assert own.net is other.net and own.preprocess.bgr and own.preprocess.square
    assert not other.preprocess.bgr and not other.preprocess.square
    assert comfy("PPAPAimAtClass", guider=own, classes="star + ring:-1")[0].target.tolist() == [[0, 1, 0, 0, -1]]


def test_one_of_several_numbers_is_aimed_at(comfy, world: PixelWorld):
    guider = replace(world.plain, task="number")
    target = comfy("PPAPAimAtNumber", guider=guider, number=2.0, name="ring")[0].target
    assert target.shape == (1, 8) and target.isnan().sum() == 7 and target.nan_to_num().sum() == 2
    guided = world.guided(world.term(guider.aim(target)))
    assert guided.isfinite().all() and not torch.equal(guided, world.sample())
