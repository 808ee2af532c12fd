"""The tiny worlds as models of ComfyUI."""
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.sd
import comfy.supported_models_base
import torch
from torch import Tensor
from torch.nn import functional as F

from ...ppap_core.noise import PIXEL_SIGMA_DATA
from ...ppap_core.tinyworld import latents, loaders
from .latents import Patcher
from .memory import patcher


def empty_conditioning() -> list:
    """Return the CONDITIONING of a model that takes none."""
    return [[torch.zeros(1, 1, 1), {}]]


def empty_pixels(batch: int, size: int) -> dict:
    """Return an empty LATENT of a pixel model."""
    return {"samples": torch.zeros(batch, 3, size, size)}


class Pixels(comfy.latent_formats.LatentFormat):
    """Pixels in [-1, 1] as a latent."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class TinyConfig(comfy.supported_models_base.BASE):
    """ComfyUI's description of the pixel model."""

    sampling_settings = {"sigma_min": loaders.SIGMA_MIN, "sigma_max": loaders.SIGMA_MAX, "sigma_data": PIXEL_SIGMA_DATA}
    latent_format = Pixels


class TinyEpsConfig(comfy.supported_models_base.BASE):
    """ComfyUI's description of the noise-predicting model, with its default schedule, that of Stable Diffusion 1.5."""

    latent_format = comfy.latent_formats.SD3


class TinyDiffusion(torch.nn.Module):
    """A tiny network behind the call that ComfyUI makes. It takes no conditioning."""

    dtype = torch.float32

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor | None = None, **unused: Any) -> Tensor:
        return self.net(x, timestep)


class TinyLatentDiffusion(TinyDiffusion):
    """The noise-predicting network of latents: its condition is the pooled output; sides are padded to multiples of 4."""

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor | None = None, **unused: Any) -> Tensor:
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % 4, 0, -height % 4), mode="replicate")
        return self.net(padded, timestep, y)[..., :height, :width]


class TinyLatentModel(comfy.model_base.BaseModel):
    """A model that is conditioned on the pooled output of a CONDITIONING."""

    def encode_adm(self, **given: Any) -> Tensor:
        return given["pooled_output"]


def tinyworld_model(version: str = "denoiser") -> Patcher:
    """Load a tiny denoiser as a MODEL: ComfyUI's own EDM preconditioning around the bare network."""
    model = comfy.model_base.BaseModel(TinyConfig({"disable_unet_model_creation": True}), comfy.model_base.ModelType.EDM)
    model.diffusion_model = TinyDiffusion(TINY_DENOISERS[version]().net)
    return patcher(model)


def tinyworld_eps_model() -> Patcher:
    """Load the noise-predicting sibling of the tiny flow model as a MODEL."""
    model = TinyLatentModel(TinyEpsConfig({"disable_unet_model_creation": True}), comfy.model_base.ModelType.EPS)
    model.diffusion_model = TinyLatentDiffusion(latents.load_eps())
    return patcher(model)


def tinyworld_flow_model(**loader_options: Any) -> Patcher:
    """Load the tiny flow model by the stock loader, with its options."""
    model = comfy.sd.load_diffusion_model_state_dict(latents.load_flow().state_dict(), **loader_options)
    model.cached_patcher_init = (tinyworld_flow_model, ())  # by which ComfyUI loads the weights a second time
    return model


class OneFrame(comfy.latent_formats.SD3):
    """The latents of the tiny world with a time axis, (B, 16, 1, h, w), as image models of frames have them."""

    latent_dimensions = 3


def tinyworld_one_frame_model() -> Patcher:
    """Load the tiny flow model as one whose latents have a time axis of length one."""
    model = tinyworld_flow_model()
    model.cached_patcher_init = (tinyworld_one_frame_model, ())
    model.model.latent_format = OneFrame()
    net = model.model.diffusion_model
    net.forward = partial(_on_the_frame, net.forward)  # a module around it would rename the weights that LoRAs change
    return model


def _on_the_frame(run: Callable[..., Tensor], x: Tensor, *given: Any, **named: Any) -> Tensor:
    """Run a network of images on latents (B, C, 1, h, w)."""
    return run(x[:, :, 0], *given, **named)[:, :, None]


TINY_DENOISERS = {"denoiser": loaders.load_denoiser, "bad sibling": loaders.load_sibling}
TINY_MODELS = {"flow": tinyworld_flow_model, "eps": tinyworld_eps_model, "flow, one frame": tinyworld_one_frame_model}


def pixel_vae() -> comfy.sd.VAE:
    """Return the VAE of models whose latents are already pixels."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


def tinyworld_vae() -> comfy.sd.VAE:
    """Load the VAE of the latent tiny world. It decodes latents of one frame, too, as earlier versions of ComfyUI do not."""
    vae = comfy.sd.VAE(sd=latents.load_autoencoder().state_dict())
    net = vae.first_stage_model
    net.decode = partial(_without_time, net.decode)
    return vae


def _without_time(decode: Callable[..., Tensor], latent: Tensor, *given: Any, **named: Any) -> Tensor:
    return decode(latent.squeeze(2) if latent.ndim == 5 else latent, *given, **named)


def class_conditioning(labels: Tensor) -> list:
    """Return the CONDITIONING of the latent tiny world for labels (B,); -1 is unconditional."""
    condition = loaders.condition(labels)
    return [[condition[:, None], {"pooled_output": condition}]]
