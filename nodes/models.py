"""A MODEL of ComfyUI in the core's terms: its noise levels, what it diffuses, and what can be seen of that."""
from collections.abc import Callable
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.sd
import comfy.supported_models_base
import torch
from torch import Tensor
from torch.nn import functional as F

from ..ppap_core import tinyworld
from ..ppap_core.autoguidance import Autoguidance
from ..ppap_core.experts import PIXELS
from ..ppap_core.guidance import Ramp, constant
from ..ppap_core.noise import NoiseInterval, expand, flow_to_ve
from ..ppap_core.tinyworld import latent as tinylatent
from ..ppap_core.tinyworld.denoiser import SIGMA_DATA
from ..ppap_core.view import LatentSpace
from .memory import patcher, private_copy

Patcher = comfy.model_patcher.ModelPatcher
SIZES = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # how an empty LATENT says which size is meant
PURE_NOISE = 100.0  # above this noise level nothing can be seen; a flow starts there, at t = 1


# The tiny worlds as models of ComfyUI

class Pixels(comfy.latent_formats.LatentFormat):
    """Pixels in [-1, 1] as a latent."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class TinyConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks of a kind of model."""

    sampling_settings = {"sigma_min": tinyworld.SIGMA_MIN, "sigma_max": tinyworld.SIGMA_MAX, "sigma_data": SIGMA_DATA}
    latent_format = Pixels


class TinyEpsConfig(comfy.supported_models_base.BASE):
    """The noise-predicting model has Stable Diffusion 1.5's schedule, ComfyUI's default."""

    latent_format = comfy.latent_formats.SD3


class TinyDiffusion(torch.nn.Module):
    """The tiny network in the call that ComfyUI makes; there is nothing it could be conditioned on."""

    dtype = torch.float32

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, timestep: Tensor, **unused: Any) -> Tensor:
        return self.net(x, timestep)


class TinyLatentDiffusion(TinyDiffusion):
    """The same for the noise-predicting model of latents: the pooled output is its condition, sides are padded to fours."""

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, **unused: Any) -> Tensor:
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % 4, 0, -height % 4), mode="replicate")
        return self.net(padded, timestep, y)[..., :height, :width]


class TinyLatentModel(comfy.model_base.BaseModel):
    """A model that is conditioned on the pooled output."""

    def encode_adm(self, **given: Any) -> Tensor:
        return given["pooled_output"]


def tinyworld_model(version: str = "denoiser") -> Patcher:
    """A tiny denoiser as a MODEL: ComfyUI's own EDM preconditioning around the bare network."""
    model = comfy.model_base.BaseModel(TinyConfig({"disable_unet_model_creation": True}), comfy.model_base.ModelType.EDM)
    model.diffusion_model = TinyDiffusion(TINY_DENOISERS[version]().net)
    return patcher(model)


def tinyworld_eps_model() -> Patcher:
    """The noise-predicting sibling of the tiny flow model as a MODEL."""
    model = TinyLatentModel(TinyEpsConfig({"disable_unet_model_creation": True}), comfy.model_base.ModelType.EPS)
    model.diffusion_model = TinyLatentDiffusion(tinylatent.load_eps())
    return patcher(model)


def tinyworld_flow_model(**how: Any) -> Patcher:
    """The tiny flow model as the stock loader gives it; how: as that loader has it."""
    model = comfy.sd.load_diffusion_model_state_dict(tinylatent.load_flow().state_dict(), **how)
    model.cached_patcher_init = (tinyworld_flow_model, ())  # where ComfyUI wants the same weights once more
    return model


TINY_DENOISERS = {"denoiser": tinyworld.load_denoiser, "bad sibling": tinyworld.load_sibling}
TINY_MODELS = {"flow": tinyworld_flow_model, "eps": tinyworld_eps_model}


def pixel_vae() -> comfy.sd.VAE:
    """The VAE of models whose latents are pixels already."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


def tinyworld_vae() -> comfy.sd.VAE:
    """The VAE of the latent tiny world."""
    return comfy.sd.VAE(sd=tinylatent.load_autoencoder().state_dict())


def class_conditioning(labels: Tensor) -> list:
    """The CONDITIONING of the latent tiny world for labels (B,): -1 asks for nothing."""
    wanted = tinyworld.condition(labels)
    return [[wanted[:, None], {"pooled_output": wanted}]]


# Noise levels

def is_flow(sampling: Any) -> bool:
    return isinstance(sampling, comfy.model_sampling.CONST)


def to_ve(sampling: Any, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """ComfyUI's noisy state and noise level in the core's convention, x = image + sigma * noise."""
    if not is_flow(sampling):
        return x, sigma
    x, sigma = flow_to_ve(x, sigma.clamp(max=0.9999))  # a flow starts at pure noise, t = 1, which no VE level can say
    return x, sigma * getattr(sampling, "noise_scale", 1.0)


def from_ve(sampling: Any, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The way back: a noisy state and noise level of the core as ComfyUI's model wants them."""
    if not is_flow(sampling):
        return x, sigma
    time = sigma / (sigma + getattr(sampling, "noise_scale", 1.0))
    return x * expand(1 - time, x), time


def ve_level(sampling: Any, sigma: float) -> float:
    """One noise level of ComfyUI in the core's convention."""
    return to_ve(sampling, torch.ones(1, 1), torch.tensor([float(sigma)], dtype=torch.float64))[1].item()


def sigma_range(model: Patcher) -> tuple[float, float]:
    """Lowest and highest noise level of a model."""
    sampling = model.get_model_object("model_sampling")
    return ve_level(sampling, sampling.sigma_min), ve_level(sampling, sampling.sigma_max)


def window_of(sampling: Any, start: float, end: float) -> NoiseInterval:
    """Shares of the sampling as noise levels: 0 takes in the highest, 1 the lowest; windows that touch do not overlap."""
    low, high = (ve_level(sampling, sampling.percent_to_sigma(share)) for share in (end, start))
    return NoiseInterval(low, float("inf") if start <= 0 else high)


def ramp_for(model: Patcher, window: NoiseInterval, first: float, last: float) -> Callable[[float], float]:
    """A factor that goes from `first` to `last` over what a window has of a model's noise levels."""
    lowest, highest = sigma_range(model)
    low, high = max(window.lo, lowest), min(window.hi, highest)
    return constant if low >= high or first == last == 1 else Ramp(NoiseInterval(low, high), first, last)


def autoguidance_for(model: Patcher, weight: float, start: float, end: float, first: float, last: float) -> Autoguidance:
    """Settings in shares of the sampling as noise levels of a model."""
    window = window_of(model.get_model_object("model_sampling"), start, end)
    return Autoguidance(weight, window, ramp_for(model, window, first, last))


# What is diffused

def require_supported(model: Patcher) -> None:
    """ValueError for models that guidance cannot steer."""
    sampling = model.get_model_object("model_sampling")
    strange = [getattr(comfy.model_sampling, name) for name in ("IMG_TO_IMG", "IMG_TO_IMG_FLOW")
               if hasattr(comfy.model_sampling, name)]
    known = (comfy.model_sampling.EPS, comfy.model_sampling.CONST, comfy.model_sampling.COSMOS_RFLOW)
    if not isinstance(sampling, known) or isinstance(sampling, tuple(strange)):
        raise ValueError(f"this model's sampling is {type(sampling).__bases__[-1].__name__}, expected a noise-predicting, "
                         "velocity-predicting, EDM or flow model: use another model")
    latent = model.get_model_object("latent_format")
    if latent.latent_dimensions not in (2, 3) or type(latent).__name__.endswith("AV"):  # packed with sound
        raise ValueError(f"this model's latents are {type(latent).__name__}, which are no pictures or not only: expected an "
                         "image or video model")


def is_pixel(model: Patcher) -> bool:
    """Whether a model diffuses images themselves."""
    latent = model.get_model_object("latent_format")
    return latent.latent_channels == 3 and latent.latent_dimensions == 2 and latent.scale_factor == 1.0


def sigma_data_of(model: Patcher) -> float:
    """The spread of what a model diffuses: latents are scaled to one."""
    return SIGMA_DATA if is_pixel(model) else 1.0


def space_name(model: Patcher) -> str:
    """The kind of what a model diffuses: models of one kind share experts."""
    return PIXELS if is_pixel(model) else type(model.get_model_object("latent_format")).__name__


def space_of(model: Patcher) -> LatentSpace | None:
    """The latents of a model, by the colours that its previews use; None for pixels. ValueError where none are known."""
    if is_pixel(model):
        return None
    latent = model.get_model_object("latent_format")
    if latent.latent_rgb_factors is None:
        raise ValueError(f"ComfyUI knows no colours of the latents of this model, {type(latent).__name__}: expected a plain "
                         "guider of the denoised view with the VAE connected where it guides, or another model")
    with torch.inference_mode(False):
        factors = torch.tensor(latent.latent_rgb_factors)
        bias = torch.tensor(latent.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
    reshape = getattr(latent, "latent_rgb_factors_reshape", None)
    shuffle = round((latent.latent_channels / len(factors)) ** 0.5) if reshape else 1
    return LatentSpace(space_name(model), factors, bias, shuffle)


def preview(model: Patcher, diffused: Tensor) -> Tensor | None:
    """The image of what is diffused that previews show; None where a model's latents have no known colours."""
    if is_pixel(model):
        return diffused
    known = model.get_model_object("latent_format").latent_rgb_factors is not None
    return space_of(model).colours(diffused) if known else None


class Decoder(torch.nn.Module):
    """A private copy of a VAE that can be differentiated through: what is diffused -> image (B, 3, H, W) in [-1, 1]."""

    def __init__(self, vae: comfy.sd.VAE, model: Patcher):
        super().__init__()
        if vae.latent_dim != 2:
            raise ValueError("this VAE decodes videos, and a guider looks through it at one image at a time: disconnect it, "
                             "and the guiders will look at the colours of the latents")
        with torch.inference_mode(False):
            self.net = private_copy(vae.first_stage_model).to(vae.vae_dtype).eval().requires_grad_(False)
        self.process_out = model.get_model_object("latent_format").process_out
        self.halves = vae.process_output(torch.zeros(1)).item()  # a VAE answers in [-1, 1], or in [0, 1] already

    def forward(self, diffused: Tensor, sigma: Tensor) -> Tensor:
        weight = next(self.net.parameters())
        image = self.net.decode(self.process_out(diffused).to(weight.dtype)).float()
        return image if self.halves else 2 * image - 1


def mask_for(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A MASK (B|1, H, W), or the noise mask of a LATENT (B|1, 1, H, W), on the grid of what is diffused, (B|1, 1, h, w)."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if mask.shape[-2:] == shape[-2:]:
        return mask
    return F.interpolate(mask, shape[-2:], mode="bilinear", antialias=True).clamp(0, 1)


def fitting(model: Patcher, latent: dict) -> Tensor:
    """The samples of a LATENT as a model diffuses them: an empty one takes on its channels and its size."""
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **{key: latent[key] for key in SIZES
                                                                               if key in latent})


def without_sizes(latent: dict) -> dict:
    """A LATENT that no longer says of which size an empty one would be."""
    return {key: value for key, value in latent.items() if key not in SIZES}


def frames_as_images(x: Tensor) -> Tensor:
    """(B, C, T, h, w) -> (B T, C, h, w); images stay as they are."""
    return x.movedim(2, 1).flatten(0, 1) if x.ndim == 5 else x


def images_as_frames(x: Tensor, like: Tensor) -> Tensor:
    """The way back to the shape of `like`."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).movedim(1, 2) if like.ndim == 5 else x
