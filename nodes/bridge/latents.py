"""Pixels and latents that a MODEL of ComfyUI diffuses, the images made of them, and shapes of LATENTs and masks."""
from copy import copy
from typing import Any, TypeAlias

import comfy.latent_formats
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.sd
import torch
from torch import Tensor
from torch.nn import functional as F

from ...ppap_core.guiders.latents import PIXELS, LatentSpace
from ...ppap_core.guiders.resize import resize
from ...ppap_core.noise import PIXEL_SIGMA_DATA
from ...ppap_core.rng import seeded_noise
from .frames import FrameDecoder, shown_at, take_frames
from .memory import private_copy

Patcher: TypeAlias = comfy.model_patcher.ModelPatcher
SIZES = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # by which an empty LATENT says its size
OBJECTS = ("hunyuan3d", "trellis", "triposplat")  # what ComfyUI calls networks of 3D objects begins so
COLOR_SIZE, COLOR_PATCH = 16, 4  # sides of latents that a VAE shows the colours of, and of their patches of one value


def require_supported(model: Patcher) -> None:
    """ValueError for models that cannot be guided."""
    latent, sampling = model.get_model_object("latent_format"), model.get_model_object("model_sampling")
    if makes := _makes_instead(model):
        raise ValueError(f"this model makes {makes} (its latents are {type(latent).__name__}), and guiders judge pictures: "
                         "expected an image or video model")
    if latent.latent_dimensions not in (2, 3) or type(latent).__name__.endswith("AV"):  # packed with sound
        raise ValueError(f"this model's latents are {type(latent).__name__}, which are not or not only pictures: expected "
                         "an image or video model")
    if not adds_noise(sampling):
        raise ValueError(f"this model's sampling is {type(sampling).__bases__[-1].__name__}, which adds no noise to "
                         "pictures: expected a noise-predicting, velocity-predicting, EDM or flow model")


def _makes_instead(model: Patcher) -> str:
    """Name what a model makes instead of pictures, by what ComfyUI found in its file; "" for all others."""
    settings = getattr(getattr(model.model, "model_config", None), "unet_config", {})
    if "audio_model" in settings:
        return "sound"
    return "3D objects" if str(settings.get("image_model")).startswith(OBJECTS) else ""


def adds_noise(sampling: Any) -> bool:
    """Ask a sampling for a noisy picture: whether that is picture + sigma noise, or the mixture of a flow."""
    sigma, one = torch.tensor([0.5]), torch.ones(1, 1, 1, 1)
    of_noise, of_picture = (sampling.noise_scaling(sigma, noise, picture).item()
                            for noise, picture in ((one.clone(), 0 * one), (0 * one, one.clone())))
    return of_noise != 0 and of_picture == (0.5 if isinstance(sampling, comfy.model_sampling.CONST) else 1.0)


def diffuses_pixels(model: Patcher) -> bool:
    """Tell whether a model diffuses the images themselves, at whatever scale: three channels, and no fewer pixels."""
    latent = model.get_model_object("latent_format")
    return latent.latent_channels == 3 and (latent.scale_factor == 1.0 or
                                            getattr(latent, "spacial_downscale_ratio", 0) == 1)


def is_pixel(model: Patcher) -> bool:
    """Tell whether a model diffuses images in [-1, 1], which guiders and experts look at as they are."""
    return diffuses_pixels(model) and model.get_model_object("latent_format").scale_factor == 1.0


def sigma_data_of(model: Patcher) -> float:
    """Return the standard deviation of what a model diffuses: its own where it says so; ComfyUI scales latents to 1."""
    if not diffuses_pixels(model):
        return 1.0
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.EDM):
        return float(sampling.sigma_data)
    return PIXEL_SIGMA_DATA * model.get_model_object("latent_format").scale_factor


def space_name(model: Patcher) -> str:
    """Return the kind of what a model diffuses; models of one kind share experts."""
    return PIXELS if is_pixel(model) else type(model.get_model_object("latent_format")).__name__


def space_of(model: Patcher, vae: comfy.sd.VAE | None = None) -> LatentSpace | None:
    """Return the latents of a model with linear colours, see `latent_space`; None for pixels."""
    return None if is_pixel(model) else latent_space(model, vae)


def latent_space(model: Patcher, vae: comfy.sd.VAE | None = None) -> LatentSpace:
    """Return the latents of a model with the colours of ComfyUI's previews, or else those that its VAE shows.

    ValueError for latents whose colours neither tells.
    """
    latent = model.get_model_object("latent_format")
    if not knows_colors(model):
        return space_seen_by(vae, model)
    if diffuses_pixels(model):
        return LatentSpace(space_name(model), torch.eye(3) / latent.scale_factor, torch.zeros(3))
    with torch.inference_mode(False):
        factors = torch.tensor(latent.latent_rgb_factors)
        bias = torch.tensor(latent.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
    return LatentSpace(space_name(model), factors, bias, _shuffle_of(latent))


def _shuffle_of(latent: Any) -> int:
    """Return the pixels along a side that a place of latents holds in its channels; 0 where those lie in another order."""
    unpack = getattr(latent, "latent_rgb_factors_reshape", None)
    if unpack is None:
        return 1
    packed = torch.arange(float(latent.latent_channels)).reshape(1, -1, 1, 1)
    unpacked = first_frame(unpack(with_axes(packed, latent.latent_dimensions)))
    side = unpacked.shape[-1]
    fits = packed.shape[1] % side**2 == 0 and torch.equal(unpacked, F.pixel_shuffle(packed, side))
    return side if fits else 0


def space_seen_by(vae: comfy.sd.VAE | None, model: Patcher) -> LatentSpace:
    """Return the latents of a model with the linear colours that best agree with what its VAE makes of patches of noise."""
    latent = model.get_model_object("latent_format")
    if vae is None and type(latent) is comfy.latent_formats.LatentFormat:
        raise ValueError("this model names no latents, as networks that look at pictures and make none (SAM 3 and Depth "
                         "Anything, say): expected an image or video model, or one with its VAE connected")
    if vae is None:
        raise ValueError(f"ComfyUI does not know the colours of this model's latents, {type(latent).__name__}: connect the "
                         "model's VAE where it guides, which shows them, or use another model")
    side, channels = COLOR_SIZE // COLOR_PATCH, latent.latent_channels
    patches = seeded_noise(range(max(1, 4 * channels // side**2)), (channels, side, side))
    noise = F.interpolate(patches, COLOR_SIZE, mode="nearest")
    samples = latent.process_out(with_axes(noise, latent.latent_dimensions))
    images = F.adaptive_avg_pool2d(2 * decode_images(vae, samples)[..., :3].movedim(-1, 1).float().cpu() - 1, COLOR_SIZE)
    with torch.inference_mode(False):
        places = noise.movedim(1, -1).flatten(0, -2)
        known = torch.cat([places, torch.ones(len(places), 1)], dim=1)
        fit = torch.linalg.lstsq(known, images.clone().movedim(1, -1).flatten(0, -2)).solution
        return LatentSpace(space_name(model), fit[:-1].clone(), fit[-1].clone())


def preview(model: Patcher, diffused: Tensor) -> Tensor | None:
    """Return the preview (B, 3, H, W) of what is diffused; None for latents whose colours ComfyUI does not know."""
    if is_pixel(model):
        return frames_as_images(diffused)
    return latent_space(model).colors(frames_as_images(diffused)) if knows_colors(model) else None


def knows_colors(model: Patcher) -> bool:
    """Tell whether the colours of what a model diffuses are known without its VAE."""
    latent = model.get_model_object("latent_format")
    return diffuses_pixels(model) or latent.latent_rgb_factors is not None and _shuffle_of(latent) > 0


class Decoder(torch.nn.Module):
    """A private copy of a VAE that gradients can pass: (latent (B, C, h, w), sigma) -> image (B, 3, H, W) in [-1, 1].

    A VAE of videos decodes one frame; see `of_frames` for more. ValueError for a VAE of sound.
    """

    net: Any

    def __init__(self, vae: comfy.sd.VAE, model: Patcher):
        super().__init__()
        if vae.latent_dim not in (2, 3):
            raise ValueError("this VAE does not decode images: connect the model's own VAE, or none, and the guiders will "
                             "look at the colours of the latents")
        with torch.inference_mode(False):
            self.net = private_copy(vae.first_stage_model).to(vae.vae_dtype).eval().requires_grad_(False)
            self.latent_format = _cloned(model.get_model_object("latent_format"))
        self.axes = vae.latent_dim
        self.decodes_to_unit = vae.process_output(torch.zeros(1)).item() == 0  # others map 0 to 0.5

    def forward(self, latent: Tensor, sigma: Tensor) -> Tensor:
        return first_frame(self.decode(latent))

    def decode(self, latent: Tensor) -> Tensor:
        """Return the images (B, 3, H, W) of latents (B, C, h, w), or the videos (B, 3, T', H, W) of (B, C, T, h, w)."""
        weight = next(self.net.parameters())
        latent = self.latent_format.process_out(with_axes(latent, self.latent_format.latent_dimensions))
        image = self.net.decode(with_axes(latent, self.axes).to(weight.dtype)).float()[:, :3]
        return 2 * image - 1 if self.decodes_to_unit else image

    def of_frames(self, count: int) -> "Decoder | FrameDecoder":
        """Return what shows a guider each frame of videos of so many frames; a VAE of images decodes each alone."""
        return self if count == 1 or self.axes == 2 else FrameDecoder(self)


def _cloned(latent_format: Any) -> Any:
    """Copy what scales latents: its tensors may have been made in inference mode, where no gradient passes."""
    copied = copy(latent_format)
    vars(copied).update({name: value.clone() for name, value in vars(copied).items() if isinstance(value, Tensor)})
    return copied


def decode_images(vae: comfy.sd.VAE, samples: Tensor) -> Tensor:
    """Return the images (B, H, W, 3) in [0, 1] that a VAE makes of images, or of videos of one frame."""
    image = vae.decode(with_axes(samples, vae.latent_dim))
    return image[:, 0] if image.ndim == 5 else image


def decode_frames(vae: comfy.sd.VAE, samples: Tensor, chosen: Tensor) -> Tensor:
    """Return the images (B K, H, W, 3) in [0, 1] of chosen frames (B, K) of videos; images are decoded as they are."""
    if (count := frame_count(samples)) == 1 or vae.latent_dim == 2:
        return decode_images(vae, take_frames(samples, chosen))
    videos = vae.decode(samples)
    return take_frames(videos.movedim(-1, 1), shown_at(chosen, count, videos.shape[1])).movedim(1, -1)


def mask_for(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Resize a mask (B|1, H, W) in [0, 1] to what is diffused: (B|1, 1, h, w).

    shape: (B, C, h, w) of what is diffused.
    """
    return resize(mask[:, None].float(), (shape[-2], shape[-1])).clamp(0, 1)


def resize_empty_latent(model: Patcher, latent: dict) -> Tensor:
    """Return the samples of a LATENT; an empty one is given the channels and the size that a model diffuses.

    ValueError for videos where the model diffuses images.
    """
    sizes = {key: latent[key] for key in SIZES if key in latent}
    return as_diffused(model, comfy.sample.fix_empty_latent_channels(model, latent["samples"], **sizes))


def without_sizes(latent: dict) -> dict:
    """Return a LATENT without the keys that only an empty one needs."""
    return {key: value for key, value in latent.items() if key not in SIZES}


def as_diffused(model: Patcher, samples: Tensor) -> Tensor:
    """Give images the time axis that a model diffuses, or take it away; ValueError for videos where it diffuses images."""
    axes = model.get_model_object("latent_format").latent_dimensions
    samples = with_axes(samples, axes)
    if samples.ndim != 2 + axes:
        raise ValueError(f"the latent has the shape {tuple(samples.shape)}, but this model diffuses single images: connect "
                         "a latent of images, empty or encoded by the model's own VAE")
    return samples


def with_axes(x: Tensor, axes: int) -> Tensor:
    """Add or drop a time axis of length one, for so many axes behind the channels; longer videos stay as they are."""
    if x.ndim == 4 and axes == 3:
        return x[:, :, None]
    return x[:, :, 0] if axes == 2 and x.ndim == 5 and x.shape[2] == 1 else x


def first_frame(x: Tensor) -> Tensor:
    """Return the first frame of videos (B, C, T, h, w), as images; images stay as they are."""
    return x[:, :, 0] if x.ndim == 5 else x


def frame_count(x: Tensor) -> int:
    """Return how many frames each video of a batch has; 1 for images."""
    return x.shape[2] if x.ndim == 5 else 1


def frames_as_images(x: Tensor) -> Tensor:
    """Flatten videos (B, C, T, h, w) to frames (B T, C, h, w); images stay as they are."""
    return x.movedim(2, 1).flatten(0, 1) if x.ndim == 5 else x


def images_as_frames(x: Tensor, like: Tensor) -> Tensor:
    """Undo `frames_as_images`, for something of the shape of `like`."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).movedim(1, 2) if like.ndim == 5 else x
