"""The latent tiny world in a real ComfyUI: its files in the stock loaders, and guidance of its latents."""
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import says
from helpers.worlds import HEIGHT, KINDS, WIDTH, LatentWorld

from benchmarks.networks import load_judge


@pytest.fixture(scope="module")
def world(comfy) -> LatentWorld:
    return LatentWorld(comfy)


# The files, and the networks in them

def test_the_stock_loaders_list_and_load_the_world_s_files(comfy, world: LatentWorld):
    import folder_paths

    assert "tinyworld_flow.safetensors" in folder_paths.get_filename_list("diffusion_models")
    assert "tinyworld_vae.safetensors" in folder_paths.get_filename_list("vae")
    [model] = comfy("UNETLoader", unet_name="tinyworld_flow.safetensors", weight_dtype="default")
    assert torch.equal(world.sample(model), world.sample(world.model("flow")))
    [vae] = comfy("VAELoader", vae_name="tinyworld_vae.safetensors")
    latents = {"samples": world.sample(model)}
    [image] = comfy("VAEDecode", samples=latents, vae=vae)
    assert image.shape == (3, 8 * HEIGHT, 8 * WIDTH, 3)
    assert torch.equal(image, comfy("VAEDecode", samples=latents, vae=world.vae)[0])


def test_the_stock_loader_makes_a_turbo_model_of_the_flow(comfy, world: LatentWorld):
    import folder_paths
    from comfy.sd import load_diffusion_model_state_dict

    from benchmarks.turbo import load_turbo

    assert "tinyworld_turbo.safetensors" in folder_paths.get_filename_list("loras")
    [model] = comfy("LoraLoaderModelOnly", model=world.model("flow"), lora_name="tinyworld_turbo.safetensors",
                    strength_model=1.0)
    merged = load_diffusion_model_state_dict(load_turbo().state_dict())
    torch.testing.assert_close(world.sample(model), world.sample(merged), rtol=0, atol=1e-3)
    assert not torch.allclose(world.sample(model), world.sample(world.model("flow")), atol=1e-2)


def test_the_stock_checkpoint_loader_loads_the_flow_model_too(comfy, world: LatentWorld):
    import folder_paths
    from safetensors.torch import save_file

    folder = Path(folder_paths.models_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path("checkpoints", str(folder))
    net = comfy.pack.ppap_core.tinyworld.latents.load_flow()
    save_file({f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in net.state_dict().items()},
              folder / "tiny.safetensors")
    model = comfy("CheckpointLoaderSimple", ckpt_name="tiny.safetensors")[0]
    assert torch.equal(world.sample(model), world.sample(world.model("flow")))


def test_the_models_are_the_core_s_networks(comfy, world: LatentWorld):
    core = comfy.pack.ppap_core.tinyworld.latents
    x, pooled = torch.randn(2, 16, HEIGHT, WIDTH), comfy.pack.ppap_core.tinyworld.loaders.condition(torch.tensor([3, -1]))
    t = torch.tensor([0.2, 0.9])
    with torch.inference_mode():
        flow = world.model("flow").model
        theirs = flow.apply_model(x, t, c_crossattn=pooled[:, None], y=pooled)
        ours = x - t[:, None, None, None] * core.load_flow()(x, t, pooled[:, None], pooled)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)
        eps, sigma = world.model("eps").model, core.timestep_sigmas()[[100, 900]]
        theirs = eps.apply_model(x, sigma, y=pooled)
        seen = x / (1 + sigma[:, None, None, None] ** 2).sqrt()
        ours = x - sigma[:, None, None, None] * core.load_eps()(seen, torch.tensor([100.0, 900.0]), pooled)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)


def test_the_colours_of_the_latents_are_those_that_comfyui_knows(comfy, world: LatentWorld):
    space, core = comfy.pack.nodes.bridge.latents.space_of(world.model("flow")), comfy.pack.ppap_core.tinyworld.latents
    assert space.name == core.SPACE.name == "SD3"
    torch.testing.assert_close(space.factors, core.FACTORS)
    torch.testing.assert_close(space.bias, core.BIAS)


def test_the_vae_is_the_core_s_autoencoder(comfy, world: LatentWorld):
    core = comfy.pack.ppap_core.tinyworld.latents
    scenes = comfy.pack.ppap_core.tinyworld.scenes.draw(range(2), (8 * HEIGHT, 8 * WIDTH)).image
    [encoded] = comfy("VAEEncode", pixels=(scenes.movedim(1, -1) + 1) / 2, vae=world.vae)
    with torch.inference_mode():
        torch.testing.assert_close(encoded["samples"], core.load_autoencoder().encode(scenes), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_is_asked_for_by_ordinary_conditioning(comfy, world: LatentWorld, kind: str):
    model = world.model(kind)
    star, nothing = (world.sample(model, positive=positive) for positive in (world.star, world.nothing))
    assert not torch.equal(star, nothing)
    assert not torch.equal(world.sample(model, positive=world.star, cfg=3.0), star)
    [zeroed] = comfy("ConditioningZeroOut", conditioning=world.star)
    assert torch.equal(world.sample(model, positive=zeroed), nothing)
    [each] = comfy("PPAPClassConditioning", classes="star, , ring")
    assert each[0][1]["pooled_output"].sum(1).tolist() == [1, 0, 1]


# Guidance of latents

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [
    {"weight": 0.0}, {"weight": 0.0, "strength": "raw"}, {"start_percent": 0.5, "end_percent": 0.5},
    {"mask": torch.zeros(1, 40, 30)}], ids=["weight 0", "raw weight 0", "closed window", "zero mask"])
def test_a_neutral_term_leaves_the_latent_bit_for_bit(world: LatentWorld, kind: str, changes: dict):
    assert torch.equal(world.guided(kind, **changes), world.sample(world.model(kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("view", ["noisy", "denoised"])
@pytest.mark.parametrize("strength", ["balanced", "raw"])
def test_guidance_lowers_the_energy_of_latents(world: LatentWorld, kind: str, view: str, strength: str):
    weight = {"balanced": 0.3, "raw": 60.0}[strength]
    plain, guided = world.sample(world.model(kind)), world.guided(kind, view=view, strength=strength, weight=weight)
    before, after = (world.energy(kind, samples).mean() for samples in (plain, guided))
    if view == "denoised":  # a plain guider is lost on noise, and that is what experts are for
        assert after < before - 0.1, (before, after)
    assert guided.isfinite().all() and not torch.equal(plain, guided)


@pytest.mark.parametrize("sampler", ["euler", "lcm", "euler_ancestral"])
@pytest.mark.parametrize("gradient", ["in the prediction", "through the model"])
def test_four_steps_are_guided_in_parts(world: LatentWorld, sampler: str, gradient: str):
    """As turbo models are sampled; one sub-step changes no bit."""
    sampling = {"steps": 4, "sampler_name": sampler}
    whole, same, parts = (world.guided("flow", sampling=sampling, gradient=gradient, weight=0.7, **changes)
                          for changes in ({}, {"substeps": 1}, {"substeps": 4}))
    assert torch.equal(whole, same)
    plain, before, after = (world.energy("flow", samples).mean()
                            for samples in (world.sample(world.model("flow"), **sampling), whole, parts))
    assert after < min(before, plain - 0.1), (plain, before, after)


def test_sub_steps_tell_one_sampling_from_another(world: LatentWorld):
    fingerprint = world.comfy.pack.nodes.bridge.terms.fingerprint_terms
    settings = {"guider": world.guider, "weight": 0.7, "start_percent": 0.0, "end_percent": 1.0, "factor_at_start": 1.0,
                "factor_at_end": 1.0, "view": "own"}
    plain, same, parts = (fingerprint(world.comfy("PPAPGuidanceTerm", **settings, **changes)[0])
                          for changes in ({}, {"substeps": 1}, {"substeps": 4}))
    assert plain == same != parts


@pytest.mark.parametrize("kind", KINDS)
def test_a_guider_looks_through_the_vae(world: LatentWorld, kind: str, caplog):
    plain, guided = world.sample(world.model(kind)), world.guided(kind, vae=world.vae)
    assert not caplog.records, "the memory of looking through the VAE is known"
    assert not torch.equal(guided, world.guided(kind)), "the colours and the decoded image are different things to see"

    def decoded_energy(samples: torch.Tensor) -> torch.Tensor:
        [image] = world.comfy("VAEDecode", samples={"samples": samples}, vae=world.vae)
        image = world.comfy.pack.nodes.bridge.tensors.image_from_comfy(image)
        with world.comfy.pack.nodes.bridge.autograd.outside_inference_mode(), torch.no_grad():
            return world.guider.energy(image, torch.zeros(len(image)))
    assert decoded_energy(guided).mean() < decoded_energy(plain).mean() - 0.1
    assert torch.equal(world.guided(kind, vae=world.vae, weight=0.0), plain)


def test_the_private_decoder_decodes_as_the_vae(comfy, world: LatentWorld):
    """It passes gradients, and the VAE's weights stay as they were."""
    before = {name: tensor.clone() for name, tensor in world.vae.first_stage_model.state_dict().items()}
    decoder = comfy.pack.nodes.bridge.latents.Decoder(world.vae, world.model("flow"))
    samples = world.sample(world.model("flow"))
    seen = decoder(world.model("flow").model.process_latent_in(samples).clone(), torch.zeros(3))
    [image] = comfy("VAEDecode", samples={"samples": samples}, vae=world.vae)
    torch.testing.assert_close((seen.clamp(-1, 1) + 1) / 2, image.movedim(-1, 1), rtol=0, atol=1e-4)
    with comfy.pack.nodes.bridge.autograd.outside_inference_mode():
        point = samples.clone().requires_grad_(True)
        assert torch.autograd.grad(decoder(point, torch.zeros(3)).sum(), point)[0].abs().max() > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in world.vae.first_stage_model.state_dict().items())


def test_terms_look_each_in_its_own_way(comfy, world: LatentWorld):
    """One at the noisy colours, one at the decoded prediction, one through its experts' stems."""
    def term(guider: Any, **changes: Any) -> tuple:
        return comfy("PPAPGuidanceTerm", **{"guider": guider, "weight": 0.1, "start_percent": 0.0, "end_percent": 1.0,
                                            "factor_at_start": 1.0, "factor_at_end": 1.0, "view": "own",
                                            "mask": torch.ones(1, 16, 16), **changes})[0]
    terms = term(world.guider, view="noisy", terms=term(world.guider, terms=term(world.experts("flow", "denoised"))))
    [guided] = comfy("PPAPApplyGuidance", model=world.model("flow"), terms=terms, max_rms=0.0, vae=world.vae)
    [report] = comfy("PPAPGuidanceReport", model=guided, latent={"samples": world.sample(guided)})
    energies = [[each.energy for each in report.records if each.term == term][0] for term in range(3)]
    assert not any(torch.equal(a, b) for a, b in zip(energies, energies[1:], strict=False))


def test_a_mask_of_any_size_steers_its_part_of_the_latent(world: LatentWorld):
    mask = torch.zeros(1, 8 * HEIGHT, 8 * WIDTH)
    mask[:, :, :4 * WIDTH] = 1
    [rule] = world.comfy("PPAPRule", rule="brightness")
    [bright] = world.comfy("PPAPAimAtNumber", guider=rule, number=0.9)
    plain, guided = world.sample(world.model("flow")), world.guided("flow", bright, mask=mask)
    gain = (world.seen("flow", guided) - world.seen("flow", plain)).mean(dim=(0, 1, 2))
    assert gain[:WIDTH // 2 - 1].mean() > 3 * gain[WIDTH // 2 + 1:].mean().abs()


# Experts of latents

@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_experts_serve_every_model_of_their_latents(comfy, world: LatentWorld, view: str):
    """Experts distilled from a flow model guide an epsilon model of the same latents, before and after saving."""
    guider = world.experts("flow", view)
    assert guider.net.space_name == "SD3" and len(guider.net.stems) == 2
    comfy("PPAPSaveExperts", guider=guider, file_name=f"latent {view}")
    [loaded] = comfy("PPAPLoadExperts", guider=world.guider, file_name=f"latent {view}.safetensors")
    for kind in KINDS:
        guided = world.guided(kind, guider)
        assert torch.equal(world.guided(kind, loaded), guided)
        assert not torch.equal(guided, world.sample(world.model(kind)))


def test_experts_are_refused_where_other_things_are_diffused(comfy, world: LatentWorld):
    pixels = comfy("PPAPTinyWorld", batch_size=1)[0]
    [terms] = comfy("PPAPGuidanceTerm", guider=world.experts("flow", "denoised"), weight=1.0, start_percent=0.0,
                    end_percent=1.0, factor_at_start=1.0, factor_at_end=1.0, view="own")
    with says(ValueError, "SD3", "pixel", "distilled for a model of this kind"):
        comfy("PPAPApplyGuidance", model=pixels, terms=terms, max_rms=0.0)
    import comfy.latent_formats as formats

    other = world.model("flow").clone()
    other.add_object_patch("latent_format", formats.Flux())
    with says(ValueError, "SD3", "Flux", "distilled for a model of this kind"):
        comfy("PPAPApplyGuidance", model=other, terms=terms, max_rms=0.0)


def test_samples_of_latents_need_a_vae(comfy, world: LatentWorld):
    with says(ValueError, "connect the model's VAE"):
        world.samples("flow", "without", vae=None)


def test_samples_hold_latents_and_their_decoded_images(comfy, world: LatentWorld):
    """Euler's last step arrives at the last prediction."""
    store = world.samples("eps", "both").store
    assert store.denoised.shape == (64, 6, 16, HEIGHT, WIDTH) and store.images.shape == (64, 3, 8 * HEIGHT, 8 * WIDTH)
    samples = world.model("eps").model.process_latent_out(store.denoised[:3, -1].float())
    [image] = comfy("VAEDecode", samples={"samples": samples}, vae=world.vae)
    assert (image.movedim(-1, 1) - store.images[:3] / 255).abs().max() < 0.03


# A change of variables

def as_velocity(comfy, world: LatentWorld) -> Any:
    """The flow network as a model of another prediction type, v in EDM's noise: D is the same function of the state."""
    from comfy.model_base import ModelType

    models = comfy.pack.nodes.bridge.tinyworld

    class Config(models.TinyEpsConfig):
        sampling_settings = {"sigma_min": 0.002, "sigma_max": 500.0, "sigma_data": 1.0}

    class AsVelocity(models.TinyDiffusion):
        def forward(self, x, timestep, y, **unused):
            sigma = (4 * timestep).exp()[:, None, None, None]
            noisy, t = x * (sigma**2 + 1).sqrt(), sigma / (1 + sigma)
            flow = (1 - t) * noisy
            denoised = flow - t * self.net(flow, t.flatten(), y[:, None], y)
            return (noisy / (sigma**2 + 1) - denoised) * (sigma**2 + 1).sqrt() / sigma

    model = models.TinyLatentModel(Config({"disable_unet_model_creation": True}), ModelType.V_PREDICTION_EDM)
    model.diffusion_model = AsVelocity(comfy.pack.ppap_core.tinyworld.latents.load_flow())
    return models.patcher(model)


@pytest.mark.parametrize("strength", ["balanced", "raw"])
@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_flow_and_velocity_are_guided_to_the_same_image(comfy, world: LatentWorld, view: str, strength: str):
    """Euler steps are the same in both, so that experts of the one are experts of the other, to rounding."""
    from comfy.sample import sample_custom
    from comfy.samplers import sampler_object

    [terms] = comfy("PPAPGuidanceTerm", guider=world.experts("flow", view), start_percent=0.0, end_percent=1.0, view="own",
                    factor_at_start=1.0, factor_at_end=1.0, strength=strength,
                    weight={"balanced": 0.3, "raw": 2.0}[strength])
    t = torch.tensor([0.99, 0.8, 0.5, 0.2, 0.0])
    start, noise = torch.randn(2, 2, 16, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))
    found = []
    for model, sigmas in ((world.model("flow"), t), (as_velocity(comfy, world), t / (1 - t))):
        [model] = comfy("PPAPApplyGuidance", model=model, terms=terms, max_rms=0.0)
        with torch.inference_mode():
            found.append(sample_custom(model, noise, 1.0, sampler_object("euler"), sigmas, world.star, world.nothing, start))
    assert (found[0] - found[1]).abs().mean() < 1e-3 * found[0].abs().mean()


# Words

def test_what_guidance_did_is_told_in_words(comfy, world: LatentWorld):
    def term(**changes: Any) -> tuple:
        return comfy("PPAPGuidanceTerm", **{"guider": world.guider, "weight": 0.3, "start_percent": 0.0, "end_percent": 1.0,
                                            "factor_at_start": 1.0, "factor_at_end": 1.0, "view": "own", **changes})[0]
    terms = term(terms=term(start_percent=0.3, end_percent=0.3), end_percent=0.5)
    [guided] = comfy("PPAPApplyGuidance", model=world.model("flow"), terms=terms, max_rms=0.0)
    [report] = comfy("PPAPGuidanceReport", model=guided, latent={"samples": world.sample(guided)})
    assert report.levels == 5
    [text] = comfy("PPAPReadGuidance", report=report)
    idle, busy = text.splitlines()
    assert "at work in none of 5 steps" in idle
    assert "of 5 steps, energy" in busy and len({each.sigma for each in report.records}) < 5


def test_latents_without_pictures_are_refused(comfy, world: LatentWorld):
    """Audio, and latents without known colours unless a VAE is connected."""
    import comfy.latent_formats as formats

    [terms] = comfy("PPAPGuidanceTerm", guider=world.guider, weight=1.0, start_percent=0.0, end_percent=1.0,
                    factor_at_start=1.0, factor_at_end=1.0, view="own")
    odd, audio = (world.model("flow").clone() for _ in range(2))
    odd.add_object_patch("latent_format", type("Odd", (formats.LatentFormat,), {"latent_channels": 16})())
    audio.add_object_patch("latent_format", formats.StableAudio1())
    for model, words in ((audio, ["StableAudio1", "not only pictures"]), (odd, ["Odd", "VAE"])):
        with says(ValueError, *words):
            comfy("PPAPApplyGuidance", model=model, terms=terms, max_rms=0.0)
    [guided] = comfy("PPAPApplyGuidance", model=odd, terms=terms, max_rms=0.0, vae=world.vae)
    assert not torch.equal(world.sample(guided), world.sample(odd)), "a VAE needs no colours"


def test_guidance_through_a_vae_has_its_own_fingerprint(comfy, world: LatentWorld):
    [terms] = comfy("PPAPGuidanceTerm", guider=world.guider, weight=1.0, start_percent=0.0, end_percent=1.0,
                    factor_at_start=1.0, factor_at_end=1.0, view="own")
    models = [comfy("PPAPApplyGuidance", model=world.model("flow"), terms=terms, max_rms=0.0, vae=vae)[0]
              for vae in (None, world.vae)]
    recipes = [comfy.pack.nodes.bridge.fingerprint.fingerprint_model(model)["model"] for model in models]
    assert recipes[0] != recipes[1]


def test_experts_keep_their_stems_where_a_vae_is_connected(world: LatentWorld):
    guider = world.experts("flow", "denoised")
    assert torch.equal(world.guided("flow", guider, vae=world.vae), world.guided("flow", guider))
    assert not torch.equal(world.guided("flow", replace(guider, decode=None), vae=world.vae), world.guided("flow", guider))


# The ControlNet of depth

class Control:
    """The stock ControlNet of depth, asked for the depth of three scenes."""

    def __init__(self, world: LatentWorld):
        self.world, self.scenes = world, world.comfy.pack.ppap_core.tinyworld.scenes
        [self.net] = world.comfy("ControlNetLoader", control_net_name="tinyworld_depth.safetensors")
        self.depth = self.scenes.draw(range(40, 43), (8 * HEIGHT, 8 * WIDTH)).depth

    def conditioning(self, strength: float = 1.0) -> dict:
        picture = self.depth.movedim(1, -1).expand(-1, -1, -1, 3)
        positive, negative = self.world.comfy("ControlNetApplyAdvanced", positive=self.world.nothing,
                                              negative=self.world.nothing, control_net=self.net, image=picture,
                                              strength=strength, start_percent=0.0, end_percent=1.0, vae=self.world.vae)
        return {"positive": positive, "negative": negative, "steps": 12}

    def error(self, samples: torch.Tensor) -> float:
        """Mean error of the depth that a judge sees, who never guides."""
        [image] = self.world.comfy("VAEDecode", samples={"samples": samples}, vae=self.world.vae)
        image = self.world.comfy.pack.nodes.bridge.tensors.image_from_comfy(image)
        with torch.inference_mode():
            seen = load_judge("depth").predict(image, torch.zeros(3))
        wanted = torch.nn.functional.interpolate(self.depth, seen.shape[-2:], mode="bilinear", antialias=True)
        return (seen - wanted).abs().mean().item()


@pytest.fixture(scope="module")
def control(world: LatentWorld) -> Control:
    return Control(world)


def test_the_stock_loader_loads_the_core_s_controlnet(comfy, control: Control):
    core = comfy.pack.ppap_core.tinyworld.latents
    x, hint = torch.randn(2, 2, 16, HEIGHT, WIDTH)
    given, t = comfy.pack.ppap_core.tinyworld.loaders.condition(torch.tensor([2, -1])), torch.tensor([0.2, 0.9])
    with torch.inference_mode():
        net = control.net.control_model.float()
        [theirs] = net(x, 1000 * t, y=given, context=given[:, None], hint=hint)["output"]
        [ours] = core.load_control()(x, t, given[:, None], hint)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-4)


def test_controlnet_and_guidance_share_the_graph(world: LatentWorld, control: Control):
    flow, free = world.model("flow"), {"steps": 12}
    controlled, uncontrolled = (world.sample(flow, **sampling) for sampling in (control.conditioning(), free))
    assert control.error(controlled) < 0.5 * control.error(uncontrolled), "the ControlNet does its part"
    [rule] = world.comfy("PPAPRule", rule="brightness")
    [bright] = world.comfy("PPAPAimAtNumber", guider=rule, number=0.75)
    both = world.guided("flow", bright, sampling=control.conditioning())
    assert world.energy("flow", both, bright).mean() < 0.6 * world.energy("flow", controlled, bright).mean()
    assert control.error(both) < 0.7 * control.error(world.guided("flow", bright, sampling=free)), "and goes on doing it"
    assert torch.equal(world.guided("flow", bright, weight=0.0, sampling=control.conditioning()), controlled)
    assert torch.equal(world.sample(flow, **control.conditioning(0.0)), uncontrolled)


def test_depth_guidance_brings_the_depth_of_a_scene(comfy, world: LatentWorld, control: Control):
    """Without ControlNet and without experts: the judge sees the wanted depth, who never guided."""
    [guider] = comfy("PPAPLoadGuider", guider_name="tinyworld/depth")
    picture = control.depth.movedim(1, -1).expand(-1, -1, -1, 3)
    [aimed] = comfy("PPAPAimAtImage", guider=guider, image=picture, image_is="a map")
    free = {"steps": 12}
    plain, guided = world.sample(world.model("flow"), **free), world.guided("flow", aimed, sampling=free)
    assert control.error(guided) < 0.75 * control.error(plain)
