"""What models diffuse: pixels at any scale, and latents whose colours only the VAE shows; and their further inputs."""
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import randn, says
from helpers.every_class import build, names
from helpers.every_class import without_network as of_class
from helpers.model_families import small_vae, small_video_vae, without_network
from helpers.workbench import THROUGH, Scene, Workbench, ksampler, steered
from torch.nn import functional as F


@pytest.fixture
def latents(bench: Workbench) -> Any:
    return bench.comfy.pack.nodes.bridge.latents


def scaled(kind: str, scale: float) -> Any:
    """A MODEL of pixels that are multiplied by a scale."""
    model = without_network(kind)
    model.model.latent_format.scale_factor = scale
    return model


@pytest.mark.parametrize("kind", ["ChromaRadiance", "ZImagePixelSpace", "HiDreamO1Pixel", "PixelDiTPixel"])
def test_models_of_pixels_are_known_by_what_they_diffuse(latents: Any, kind: str):
    model = without_network(kind)
    assert latents.is_pixel(model) and latents.space_of(model) is None and latents.space_name(model) == "pixel"
    assert latents.sigma_data_of(model) == 0.5


def test_pixels_at_another_scale_are_shown_at_their_own(latents: Any):
    if "ZImagePixelSpace" not in names():
        pytest.skip("this ComfyUI does not say how much smaller latents are")
    model, image = scaled("ChromaRadiance", 2.0), randn(2, 3, 6, 10)
    assert latents.diffuses_pixels(model) and not latents.is_pixel(model)
    assert latents.sigma_data_of(model) == 1.0
    assert torch.equal(latents.latent_space(model).colors(2 * image), image)
    assert torch.equal(latents.preview(model, 2 * image), image)


def test_latents_of_three_channels_are_no_pixels(latents: Any):
    model = scaled("ChromaRadiance", 0.2)
    model.model.latent_format.spacial_downscale_ratio = 4
    assert not latents.diffuses_pixels(model) and latents.sigma_data_of(model) == 1.0


def test_the_spread_of_pixels_is_the_model_s_own(latents: Any):
    model = without_network("ChromaRadiance", "EDM")
    model.model.model_sampling.sigma_data = 0.7
    assert latents.sigma_data_of(model) == 0.7


def test_unknown_colours_are_read_off_the_vae(latents: Any):
    """The linear colours of SD 3, taken from its format, agree with what a linear VAE shows of its latents."""
    model = without_network("SD3")
    known = latents.latent_space(model)
    latent = model.model.latent_format
    latent.latent_rgb_factors = None
    with says(ValueError, "SD3", "connect the model's VAE"):
        latents.latent_space(model)
    found = latents.latent_space(model, LinearVae(latent, 0.1 * known.factors))
    assert found.name == "SD3" and found.shuffle == 1
    torch.testing.assert_close(found.factors, 0.1 * known.factors, rtol=0, atol=1e-3)
    assert found.bias.abs().max() < 1e-3


def test_packed_latents_are_unpacked_as_their_format_says(latents: Any):
    """A format whose channels hold the places of a patch in another order than a pixel shuffle is shown by its VAE."""
    model = without_network("Flux2")
    known, latent = latents.latent_space(model), model.model.latent_format
    packed = randn(2, 128, 3, 5)
    shown = torch.einsum("bchw, cd -> bdhw", latent.latent_rgb_factors_reshape(packed), known.factors)
    assert known.shuffle == 2
    torch.testing.assert_close(known.colors(packed), shown + known.bias[:, None, None])
    latent.latent_rgb_factors_reshape = by_place
    assert not latents.knows_colors(model)
    with says(ValueError, "Flux2", "connect the model's VAE"):
        latents.latent_space(model)
    latent.latent_dimensions, latent.latent_rgb_factors_reshape = 3, of_videos
    assert latents.latent_space(model).shuffle == 2


def by_place(x: torch.Tensor) -> torch.Tensor:
    """Unpack channels of which those of a place lie together."""
    return x.unflatten(1, (2, 2, 32)).permute(0, 3, 4, 1, 5, 2).flatten(2, 3).flatten(3)


def of_videos(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.pixel_shuffle(frame, 2) for frame in x.unbind(2)], 2)


class LinearVae:
    """A VAE whose images are linear in its latents, in [0, 1]."""

    latent_dim = 2

    def __init__(self, latent_format: Any, factors: torch.Tensor):
        self.latent_format, self.factors = latent_format, factors

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        image = torch.einsum("bchw, cd -> bhwd", self.latent_format.process_in(samples), self.factors)
        return (image / 2 + 0.5).repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.mark.parametrize("term", [{"view": "noisy"}, {"view": "denoised"}])
def test_frames_of_unknown_colours_are_guided_with_their_vae(bench: Workbench, term: dict):
    """The VAE decodes single images; frames are seen in the colours that it shows."""
    scene = bench.scene("Wan 2.1")
    plain, model = ksampler(bench, scene), scene.model.clone()
    model.add_object_patch("latent_format", colourless(scene))
    hidden = replace(scene, model=model)
    with says(ValueError, "connect the model's VAE"):
        ksampler(bench, bench.guide(hidden, **term))
    guided = bench.patch(hidden, "PPAPApplyGuidance", terms=bench.terms(0.5, **term), max_rms=0.0, vae=small_vae(16))
    made = ksampler(bench, guided)
    assert made.isfinite().all() and not torch.equal(made, plain)


def colourless(scene: Scene) -> Any:
    kind = type(scene.model.model.latent_format)
    latent = type(kind.__name__, (kind,), {})()
    latent.latent_rgb_factors = None
    return latent


# Words

@pytest.mark.parametrize(("name", "words"), [
    ("ACEStep", ["makes sound", "ACEAudio"]), ("StableAudio", ["makes sound", "StableAudio1"]),
    ("Hunyuan3Dv2", ["makes 3D objects"]), ("Trellis2", ["makes 3D objects"]), ("TripoSplat", ["makes 3D objects"]),
    ("SAM3", ["look at pictures and make none"]), ("DepthAnything3", ["look at pictures and make none"]),
    ("RT_DETR_v4", ["look at pictures and make none"])])
def test_what_makes_no_pictures_is_told_what_it_makes(bench: Workbench, name: str, words: list[str]):
    if name not in names():
        pytest.skip(f"this ComfyUI has no {name}")
    with says(ValueError, *words, "expected an image or video model"):
        bench.guide(Scene(of_class(name), [], [], {}))


def reported(bench: Workbench, guided: Scene) -> str:
    """What Guidance Summary says of a sampling."""
    [report] = bench.comfy("PPAPGuidanceReport", model=guided.model, latent={"samples": ksampler(bench, guided)})
    return bench.comfy("PPAPReadGuidance", report=report)[0]


@pytest.mark.parametrize(("view", "words"), [("denoised", "what it makes of that is guided"),
                                             ("noisy", "sees next to nothing: use the denoised view")])
def test_the_report_says_what_a_model_of_pictures_is_given(bench: Workbench, view: str, words: str):
    if "LotusD" not in names():
        pytest.skip("this ComfyUI has no LotusD")
    with torch.inference_mode():
        scene = Scene(*build("LotusD"), steps=1)
    text = reported(bench, bench.guide(scene, view=view))
    assert "given a picture instead of noise" in text and words in text
    assert "given a picture" not in reported(bench, bench.guide(bench.scene("SD 1.5"), view=view))


def test_the_report_says_where_colours_come_from(bench: Workbench):
    scene = replace(bench.scene("SD 3"), model=bench.scene("SD 3").model.clone())
    scene.model.add_object_patch("latent_format", colourless(scene))
    for view, said in (("noisy", True), ("denoised", False)):  # the denoised view is decoded by the VAE
        terms = bench.terms(view=view)
        text = reported(bench, bench.patch(scene, "PPAPApplyGuidance", terms=terms, max_rms=0.0, vae=small_vae(16)))
        assert ("read off the VAE" in text) == said


def test_the_report_says_how_a_vae_shows_frames(bench: Workbench):
    for count, said in ((1, False), (2, True)):
        scene = replace(bench.scene("Wan 2.1"), latent={"samples": torch.zeros(1, 16, count, 4, 6)}, steps=1)
        guided = bench.patch(scene, "PPAPApplyGuidance", terms=bench.terms(), max_rms=0.0, vae=small_video_vae())
        assert ("each frame behind the one before it" in reported(bench, guided)) == said


# Other inputs of a model

@pytest.mark.parametrize("gradient", [{}, THROUGH], ids=["", "through the model"])
@pytest.mark.parametrize("name", ["Flux", "Flux2", "QwenImage", *(
    pytest.param(name, marks=pytest.mark.wide) for name in ("JoyImage", "Omnigen2", "Boogu", "MageFlow"))])
def test_models_that_edit_are_guided_beside_their_references(bench: Workbench, name: str, gradient: dict):
    """Kontext, Klein, Qwen-Image-Edit and others take pictures in the CONDITIONING."""
    if name not in names():
        pytest.skip(f"this ComfyUI has no {name}")
    with torch.inference_mode():
        scene = Scene(*build(name), steps=2)
    reference = randn(1, *scene.latent["samples"].shape[1:], seed=4)
    referring = replace(scene, positive=with_reference(scene.positive, reference))
    assert not torch.equal(steered(bench, referring, **gradient)[0], ksampler(bench, scene))


def with_reference(conditioning: list, latent: torch.Tensor) -> list:
    return [[context, {**settings, "reference_latents": [latent]}] for context, settings in conditioning]


@pytest.mark.parametrize("gradient", [{}, THROUGH], ids=["", "through the model"])
@pytest.mark.parametrize("name", ["SD15", "FluxInpaint"])
def test_models_that_inpaint_are_guided(bench: Workbench, name: str, gradient: dict):
    """Their input has the mask and the masked picture as further channels."""
    with torch.inference_mode():
        scene = Scene(*build(name, {"in_channels": 9} if name == "SD15" else {}), steps=2)
    shape = scene.latent["samples"].shape
    image, mask = randn(*shape, seed=5), torch.ones(1, 1, *shape[-2:]).tril()
    given = {"concat_latent_image": image, "concat_mask": mask}
    scene = replace(scene, positive=[[context, {**settings, **given}] for context, settings in scene.positive],
                    negative=[[context, {**settings, **given}] for context, settings in scene.negative])
    steered(bench, scene, **gradient)
