"""Latents with a time axis of length one are images: samples, experts, the VAE, priors and trainings take them as such."""
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import randn, says
from helpers.model_families import small_vae, small_video_vae
from helpers.workbench import (
    THROUGH,
    Scene,
    Workbench,
    autoguided,
    ksampler,
    search,
    steered,
    train_lora,
    with_lora_at,
)
from helpers.worlds import HEIGHT, WIDTH, FilmWorld, LatentWorld
from torch import Tensor

FAMILIES = ("Qwen-Image", "Cosmos-Predict2", "Wan 2.1")


@pytest.fixture(params=FAMILIES)
def scene(bench: Workbench, request: pytest.FixtureRequest) -> Scene:
    """A model of frames with a latent of one frame, 12 by 20."""
    return replace(bench.scene(request.param), latent={"samples": torch.zeros(2, 16, 1, 12, 20)})


def made_by(world: Any, model: Any, positive: list, vae: Any, name: str, latent: Tensor) -> Any:
    """A store of 64 samples."""
    return world.comfy("PPAPGenerateSamples", name=name, count=64, steps=3, cfg=1.0, sampler_name="euler", seed=0,
                       scheduler="simple", model=model, vae=vae, positive=positive, latent_image={"samples": latent})[0]


def family_of(bench: Workbench, scene: Scene) -> str:
    return next(family for family in FAMILIES if bench.scene(family).model is scene.model)


def made(bench: Workbench, scene: Scene, vae: Any, name: str, size: tuple[int, ...] = (1, 4, 8)) -> Any:
    return made_by(bench, scene.model, scene.positive, vae, name, torch.zeros(32, 16, *size))


@pytest.fixture(scope="module")
def distilled(bench: Workbench) -> Callable[..., Any]:
    """(family, view) -> experts that have hardly learned anything, made once."""
    made_before: dict[tuple, Any] = {}

    def distil(family: str, view: str = "denoised") -> Any:
        if (family, view) not in made_before:
            [plain] = bench.comfy("PPAPLoadGuider", guider_name="tinyworld/class")
            [aimed] = bench.comfy("PPAPAimAtClass", guider=plain, classes="star")
            samples = made(bench, bench.scene(family), small_vae(16), f"one frame {family}")
            made_before[family, view], _, *_ = bench.comfy(
                "PPAPDistilExperts", samples=samples, guider=aimed, view=view, experts=2, sigma_min=0.0, sigma_max=0.0,
                steps=1, batch_size=2, learning_rate=1e-3, rank=2, alpha=2.0, seed=0)
        return made_before[family, view]
    return distil


def test_samples_of_one_frame_are_images(bench: Workbench, scene: Scene):
    store = made(bench, scene, small_vae(16), f"frames {FAMILIES.index(family_of(bench, scene))}").store
    assert store.denoised.shape[2:] == (16, 4, 8) and store.images.shape == (64, 3, 8, 16)


def test_a_latent_without_time_makes_the_same_samples(bench: Workbench):
    """ComfyUI's empty latents of images have four dimensions."""
    scene = bench.scene("Qwen-Image")
    flat, framed = (made(bench, scene, small_vae(16), name, size).store for name, size in (
        ("without time", (4, 8)), ("with time", (1, 4, 8))))
    assert torch.equal(flat.denoised, framed.denoised) and torch.equal(flat.images, framed.images)


def test_samples_are_decoded_by_the_video_vae(bench: Workbench):
    vae, scene = small_video_vae(), bench.scene("Qwen-Image")
    store = made(bench, scene, vae, "by a video vae").store
    samples = scene.model.model.process_latent_out(store.denoised[:2, -1].float()[:, :, None])
    [image] = bench.comfy("VAEDecode", samples={"samples": samples}, vae=vae)
    assert store.images.shape == (64, 3, 32, 64)
    assert (image.movedim(-1, 1) - store.images[:2] / 255).abs().max() < 0.03


@pytest.mark.parametrize("view", ["denoised", "noisy"])
def test_experts_guide_one_frame(bench: Workbench, scene: Scene, distilled: Callable, view: str):
    experts = distilled(family_of(bench, scene), view)
    assert experts.net.space_name == "Wan21"
    plain, neutral, guided = (ksampler(bench, each) for each in (
        scene, bench.guide(scene, guider=experts, weight=0.0), bench.guide(scene, guider=experts, weight=1.0)))
    assert torch.equal(plain, neutral) and guided.isfinite().all() and not torch.equal(plain, guided)
    assert guided.shape == (2, 16, 1, 12, 20)


def test_experts_of_one_frame_go_through_the_model(bench: Workbench, scene: Scene, distilled: Callable):
    guided = bench.guide(scene, guider=distilled("Qwen-Image"), weight=1.0, **THROUGH)
    made, plain = ksampler(bench, guided), ksampler(bench, scene)
    assert made.isfinite().all() and not torch.equal(made, plain)


def test_one_frame_is_guided_through_the_video_vae(bench: Workbench, scene: Scene, caplog: pytest.LogCaptureFixture):
    scene = replace(scene, latent={"samples": torch.zeros(2, 16, 1, 4, 6)}, steps=2)
    vae, plain = small_video_vae(), ksampler(bench, scene)

    def through_vae(weight: float) -> Tensor:
        return ksampler(bench, bench.patch(scene, "PPAPApplyGuidance", terms=bench.terms(weight), max_rms=0.0, vae=vae))
    guided = through_vae(0.5)
    assert not [record for record in caplog.records if "memory" in record.message], "the memory of the VAE is not known"
    assert torch.equal(through_vae(0.0), plain)
    before, after = (brightness(bench, vae, samples) for samples in (plain, guided))
    assert (after - 0.9).abs().mean() < (before - 0.9).abs().mean()


def brightness(bench: Workbench, vae: Any, samples: Tensor) -> Tensor:
    [image] = bench.comfy("VAEDecode", samples={"samples": samples}, vae=vae)
    return image.mean((1, 2, 3))


def test_the_private_video_decoder_decodes_as_the_vae(bench: Workbench):
    """Gradients pass it, though the latents' scale was made in inference mode."""
    vae, model, pack = small_video_vae(), bench.scene("Wan 2.1").model, bench.comfy.pack.nodes.bridge
    decoder = pack.latents.Decoder(vae, model)
    with pack.autograd.outside_inference_mode():
        latent = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        image = decoder(latent, torch.ones(2))
        [gradient] = torch.autograd.grad(image.square().sum(), latent)
        samples = model.model.process_latent_out(latent.detach()[:, :, None])
    [wanted] = bench.comfy("VAEDecode", samples={"samples": samples}, vae=vae)
    assert image.shape == (2, 3, 32, 48) and gradient.isfinite().all() and (gradient != 0).float().mean() > 0.9
    torch.testing.assert_close((image.detach().clamp(-1, 1) + 1) / 2, wanted.movedim(-1, 1), rtol=0, atol=1e-4)


def test_an_image_vae_shows_a_frame_too(bench: Workbench, scene: Scene):
    guided = bench.patch(scene, "PPAPApplyGuidance", terms=bench.terms(0.5), max_rms=0.0, vae=small_vae(16))
    assert not torch.equal(ksampler(bench, guided), ksampler(bench, scene))


def test_latents_scaled_in_inference_mode_are_decoded(bench: Workbench):
    """Playground's latents have a mean and a deviation for each channel too."""
    scene = bench.scene("Playground 2.5 (EDM)")
    guided = bench.patch(scene, "PPAPApplyGuidance", terms=bench.terms(0.5), max_rms=0.0, vae=small_vae(4))
    assert not torch.equal(ksampler(bench, guided), ksampler(bench, scene))


def test_a_prior_finds_one_frame(bench: Workbench, scene: Scene, distilled: Callable):
    terms = bench.terms(guider=distilled("Qwen-Image"))
    for samples in (torch.zeros(2, 16, 1, 12, 20), torch.ones(2, 16, 12, 20)):
        found = search(bench, {**scene.conditioned(), "latent_image": {"samples": samples}}, terms, steps=2)
        assert found.shape == (2, 16, 1, 12, 20) and found.isfinite().all()


def test_a_lora_is_trained_on_latents_without_time(bench: Workbench, scene: Scene):
    """Images as four dimensions or five give the same LoRA."""
    family, patches = family_of(bench, scene), []
    for shape in ((2, 16, 12, 20), (2, 16, 1, 12, 20)):
        of_shape = replace(scene, latent={"samples": torch.zeros(shape)})
        model, losses = train_lora(bench, of_shape, f"one frame {FAMILIES.index(family)} {len(shape)}", steps=2)
        assert losses.isfinite().all()
        patches.append(model.patches)
    flat, framed = ({key: value[-1][1].weights[0] for key, value in each.items()} for each in patches)
    assert flat.keys() == framed.keys() and all(torch.equal(flat[key], framed[key]) for key in flat)


def test_image_models_refuse_videos_in_words(bench: Workbench):
    scene = replace(bench.scene("SD 3"), latent={"samples": torch.zeros(4, 16, 3, 12, 20)})
    uses = (lambda: train_lora(bench, scene, "videos", steps=2), lambda: search(bench, scene.conditioned(), bench.terms()))
    for use in uses:
        with says(ValueError, "(4, 16, 3, 12, 20)", "single images", "own VAE"):
            use()


def test_image_models_take_one_frame(bench: Workbench):
    """Samples, searches and trainings of a model without a time axis."""
    scene = replace(bench.scene("SD 3"), latent={"samples": torch.zeros(2, 16, 1, 12, 20)})
    assert made(bench, scene, small_vae(16), "a frame of an image model").store.denoised.shape[2:] == (16, 4, 8)
    assert search(bench, scene.conditioned(), bench.terms(), steps=2).shape == (2, 16, 12, 20)
    assert train_lora(bench, scene, "a frame of an image model", steps=2)[1].isfinite().all()


def test_autoguidance_of_one_frame(bench: Workbench, scene: Scene):
    bad = with_lora_at(scene, 0.5)
    plain, neutral, guided = (ksampler(bench, each) for each in (
        scene, autoguided(bench, scene, bad, 1.0), autoguided(bench, scene, bad)))
    assert torch.equal(plain, neutral) and guided.isfinite().all() and not torch.equal(plain, guided)


def test_a_guider_steers_one_frame(bench: Workbench, scene: Scene):
    steered(bench, scene)


@pytest.fixture(scope="module")
def worlds(comfy: Callable[..., tuple]) -> tuple[LatentWorld, FilmWorld]:
    return LatentWorld(comfy), FilmWorld(comfy)


def test_a_twin_with_time_gives_the_same_samples(worlds: tuple[LatentWorld, FilmWorld]):
    of_images, of_frames = (world.samples("flow", name).store for world, name in zip(worlds, ("flow", "twin"), strict=True))
    for one, other in ((of_images.denoised, of_frames.denoised), (of_images.noisy_vp, of_frames.noisy_vp),
                       (of_images.images, of_frames.images)):
        assert torch.equal(one, other)


def test_a_twin_with_time_teaches_the_same_experts(worlds: tuple[LatentWorld, FilmWorld]):
    of_images, of_frames = (world.experts("flow", "denoised", world.samples("flow", name)).net
                            for world, name in zip(worlds, ("flow", "twin"), strict=True))
    for index in range(2):
        one, other = of_images.weights(index), of_frames.weights(index)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def autoguided_twin(world: LatentWorld, latent: dict) -> Tensor:
    scene = Scene(world.model("flow"), world.star, world.nothing, latent, steps=3)
    [model] = world.comfy("PPAPAutoguidance", model=scene.model, bad_model=with_lora_at(scene, 0.1), weight=2.0,
                          start_percent=0.0, end_percent=1.0, factor_at_start=1.0, factor_at_end=1.0)
    return world.sample(model, steps=3)


def searched_twin(world: LatentWorld, latent: dict) -> Tensor:
    inputs = {"model": world.model("flow"), "positive": world.star, "negative": world.nothing, "latent_image": latent}
    [terms] = world.comfy("PPAPGuidanceTerm", guider=world.guider, weight=0.3, start_percent=0.0, end_percent=1.0,
                          factor_at_start=1.0, factor_at_end=1.0, view="own")
    return search(world, inputs, terms, steps=3)


def trained_twin(world: LatentWorld, latent: dict) -> Tensor:
    settings = {"name": f"twin {latent['samples'].ndim}", "steps": 2, "rank": 2, "batch_size": 2, "learning_rate": 1e-2}
    inputs = {"model": world.model("flow"), "positive": world.star, "latent": latent}
    return world.sample(world.comfy("PPAPTrainLora", **inputs, **settings, seed=0)[0], steps=3)


def baked_twin(world: LatentWorld, latent: dict) -> Tensor:
    settings = {"name": f"baked twin {latent['samples'].ndim}", "steps": 2, "rank": 2, "batch_size": 2, "seed": 0}
    samples = world.samples("flow", "flow" if latent["samples"].ndim == 4 else "twin")
    inputs = {"model": world.model("flow"), "positive": world.star, "samples": samples}
    return world.sample(world.comfy("PPAPBakeGuidance", **inputs, **settings, learning_rate=1e-2)[0], steps=3)


@pytest.mark.parametrize("use", [autoguided_twin, searched_twin, trained_twin, baked_twin])
def test_a_twin_with_time_does_all_else_alike(worlds: tuple[LatentWorld, FilmWorld], use: Callable[..., Tensor]):
    """Autoguidance, priors and Train LoRA of (B, C, 1, h, w) are those of (B, C, h, w), bit for bit."""
    of_images, of_frames = worlds
    samples = randn(3, 16, HEIGHT, WIDTH)
    image, frame = use(of_images, {"samples": samples}), use(of_frames, {"samples": samples[:, :, None]})
    assert torch.equal(frame[:, :, 0], image) and not torch.equal(image, of_images.sample(of_images.model("flow"), steps=3))


def test_a_twin_with_time_has_the_same_preview(worlds: tuple[LatentWorld, FilmWorld]):
    latents, x = worlds[0].comfy.pack.nodes.bridge.latents, randn(2, 16, HEIGHT, WIDTH)
    image, frame = (latents.preview(world.model("flow"), x) for world, x in zip(worlds, (x, x[:, :, None]), strict=True))
    assert torch.equal(image, frame)


@pytest.mark.parametrize("term", [{}, {"view": "noisy"}, THROUGH, {"strength": "raw"},
                                  {"mask": torch.ones(1, 8, 8).tril()}],
                         ids=["in the prediction", "noisy", "through the model", "raw", "mask"])
@pytest.mark.parametrize("how", ["experts", "colours", "VAE"])
def test_a_twin_with_time_is_guided_alike(worlds: tuple[LatentWorld, FilmWorld], how: str, term: dict):
    """Guidance of (B, C, 1, h, w) is that of (B, C, h, w), bit for bit."""
    of_images, of_frames = worlds
    view = term.get("view", "denoised")
    guider = of_images.experts("flow", view) if how == "experts" else None
    settings = {"guider": guider, "vae": of_images.vae if how == "VAE" else None, **term}
    image, frame = (world.guided("flow", **settings) for world in worlds)
    assert frame.shape == (3, 16, 1, HEIGHT, WIDTH) and torch.equal(frame[:, :, 0], image)
    assert not torch.equal(image, of_images.sample(of_images.model("flow")))


def test_the_tiny_model_of_one_frame_makes_the_flows_images(worlds: tuple[LatentWorld, FilmWorld]):
    world, _ = worlds
    model, vae = world.comfy("PPAPTinyLatentWorld", kind="flow, one frame")
    images, frames = (world.sample(each, latent_image={"samples": torch.zeros(2, 16, *shape, HEIGHT, WIDTH)})
                      for each, shape in ((world.model("flow"), ()), (model, (1,))))
    assert torch.equal(frames[:, :, 0], images)
    decoded = (world.comfy("VAEDecode", samples={"samples": part}, vae=vae)[0] for part in (images, frames))
    assert torch.equal(*decoded)
