"""A MODEL of ComfyUI in the core's terms: its noise levels, what it diffuses, and what can be seen of that."""
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.sd
import torch
from torch import Tensor
from torch.nn import functional as F

from ...ppap_core.guiders.latents import PIXELS, LatentSpace
from ...ppap_core.noise import PIXEL_SIGMA_DATA
from .memory import private_copy

Patcher = comfy.model_patcher.ModelPatcher
SIZES = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # how an empty LATENT says which size is meant


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
    return PIXEL_SIGMA_DATA if is_pixel(model) else 1.0


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
    return space_of(model).colors(diffused) if known else None


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


def resize_empty_latent(model: Patcher, latent: dict) -> Tensor:
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
