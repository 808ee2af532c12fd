"""Restoration in a real ComfyUI: a grey, small, blurred or torn picture in, the whole picture out, of pixels and latents."""
from typing import Any

import pytest
import torch
from helpers import says
from helpers.worlds import LatentWorld, PixelWorld
from torch import Tensor

KINDS = ("grey copy", "small copy", "blurred copy", "known part")
ANCESTRAL = {"sampler_name": "euler_ancestral", "steps": 8}


def damaged(kind: str, image: Tensor) -> dict[str, Any]:
    """The inputs of Aim at Image for an IMAGE (B, H, W, 3) of which a copy of a kind is left, and of Rule."""
    if kind == "grey copy":
        return {"image": (image * torch.tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True).expand(-1, -1, -1, 3)}
    if kind == "small copy":
        return {"image": torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 4).movedim(1, -1)}
    missing = torch.zeros(1, *image.shape[1:3])
    missing[:, image.shape[1] // 4:-image.shape[1] // 3, image.shape[2] // 4:-image.shape[2] // 3] = 1
    return {"image": image * (1 - missing[..., None]), "missing": missing} if kind == "known part" else {"image": image}


def aimed(comfy: Any, kind: str, image: Tensor) -> Any:
    [guider] = comfy("PPAPRule", rule=kind, blur=1.0)
    return comfy("PPAPAimAtImage", guider=guider, image_is="a picture", **damaged(kind, image))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pixel_model_restores_a_picture(pixels: PixelWorld, kind: str):
    guider, balanced = aimed(pixels.comfy, kind, pixels.seen()), {"weight": 0.7, "strength": "balanced"}
    plain, made = pixels.sample(**ANCESTRAL), pixels.guided(pixels.term(guider, **balanced), **ANCESTRAL)
    before, after = (pixels.energy(guider, images).sqrt() for images in (plain, made))
    assert made.isfinite().all() and float(after.mean()) < 0.2 * float(before.mean())


@pytest.mark.parametrize("kind, decoded", [("grey copy", False), ("small copy", False), ("blurred copy", False),
                                           ("known part", False), ("known part", True)])
def test_a_latent_model_restores_a_picture(latents: LatentWorld, kind: str, decoded: bool):
    """By linear colours, of an eighth of the size, or by the VAE."""
    comfy, model = latents.comfy, latents.model("flow")
    sampling = {"sampler_name": "euler_ancestral", "steps": 16, "latent_image": {"samples": torch.zeros(1, 16, 12, 16)}}
    picture = comfy("VAEDecode", samples={"samples": latents.sample(model, **sampling | {"seed": 77})}, vae=latents.vae)[0]
    guider, vae = aimed(comfy, kind, picture), latents.vae if decoded else None
    falling = {"weight": 0.7, "factor_at_start": 2.0, "factor_at_end": 0.0}
    plain, made = latents.sample(model, **sampling), latents.guided("flow", guider, vae, sampling=sampling, **falling)
    before, after = (decoded_energy(latents, guider, each) if decoded else latents.energy("flow", each, guider)
                     for each in (plain, made))
    assert float(after.sqrt()) < (0.3 if decoded else 0.5) * float(before.sqrt())


def decoded_energy(world: LatentWorld, guider: Any, samples: Tensor) -> Tensor:
    image = world.comfy("VAEDecode", samples={"samples": samples}, vae=world.vae)[0]
    with world.comfy.pack.nodes.bridge.autograd.outside_inference_mode(), torch.no_grad():
        return guider.energy(image.clone().movedim(-1, 1) * 2 - 1, torch.zeros(len(image)))


def test_a_weight_of_0_restores_nothing(pixels: PixelWorld):
    guider = aimed(pixels.comfy, "known part", pixels.seen())
    assert torch.equal(pixels.guided(pixels.term(guider, weight=0.0)), pixels.sample())


def test_a_prior_restores_too(pixels: PixelWorld):
    guider = aimed(pixels.comfy, "small copy", pixels.seen())
    found = [pixels.comfy("PPAPPlugAndPlayPrior", **pixels.conditioned(), seed=1, steps=15, cfg=1.0, learning_rate=1.0,
                          sigma_max=10.0, sigma_min=0.05, start_noise=1.0, clean_up=0.0, particles=1,
                          gradient="in the prediction", terms=terms)[0]["samples"]
             for terms in ((), pixels.term(guider, weight=1.0, strength="balanced"))]
    before, after = (pixels.energy(guider, images).sqrt() for images in found)
    assert bool((after < 0.3 * before).all())


RULES = (*KINDS, "seamless tiling", "symmetry half turn", "colours")


@pytest.mark.parametrize("name", RULES)
def test_finished_images_meet_a_rule_exactly(pixels: PixelWorld, name: str):
    """By the guider that guided them: one wire says it all."""
    comfy, made = pixels.comfy, pixels.comfy("VAEDecode", samples={"samples": pixels.sample()}, vae=pixels.vae)[0]
    guider = aimed(comfy, name, pixels.seen()) if name in KINDS else comfy("PPAPRule", rule=name)[0]
    if name == "colours":
        [guider] = comfy("PPAPAimAtImage", guider=guider, image=comfy("PPAPPalette", colours="#1d3557, #ffd166")[0],
                         image_is="a picture")
    for change in ("not seen", "smallest"):
        [image] = comfy("PPAPFinish", image=made, guider=guider, strength=1.0, change=change)
        with comfy.pack.nodes.bridge.autograd.outside_inference_mode(), torch.no_grad():
            error = comfy.pack.ppap_core.guiders.exact.off_by(guider, image.clone().movedim(-1, 1) * 2 - 1)
        assert image.shape == made.shape and float(error.max()) < {"colours": 0.03, "blurred copy": 0.05}.get(name, 2e-6)
    assert torch.equal(comfy("PPAPFinish", image=made, guider=guider, strength=0.0)[0], made)


def test_what_cannot_be_met_exactly_says_so(pixels: PixelWorld):
    image = pixels.seen()
    for guider, words in ((pixels.guider, "cannot be met exactly"), (pixels.comfy("PPAPRule", rule="colours")[0], "target")):
        with says(ValueError, words):
            pixels.comfy("PPAPFinish", image=image, guider=guider, strength=1.0)


def test_other_guiders_take_no_torn_picture(pixels: PixelWorld):
    [guider] = pixels.comfy("PPAPRule", rule="layout")
    with says(ValueError, "rule/layout", "known part"):
        pixels.comfy("PPAPAimAtImage", guider=guider, image=pixels.seen(), image_is="a picture",
                     missing=torch.zeros(1, 32, 32))
