"""Full-size networks with random weights: denoisers with classifier-free guidance, decoders of latents, and a classifier."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppap_core import Guider, IgnoreSigma, LatentSpace, to_vp
from ppap_core.guiders.latents import Stem
from ppap_core.guiders.preprocess import timm_preprocess
from ppap_core.io.packages import importing
from ppap_core.noise import expand

NETWORKS: dict[str, dict[str, Any]] = {
    "SD 1.5": {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
               "attention_head_dim": 8},
    "SDXL": {"block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
             "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}
"""The published configurations, as far as they differ from the defaults of diffusers."""

VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
       "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
CLASSIFIER = "resnet50"


@dataclass(frozen=True)
class TextDenoiser:
    """A UNet with classifier-free guidance, both halves in one batch: (x, sigma) -> prediction.

    inputs: its further inputs, for a batch of two.
    scale: of classifier-free guidance; 1: as without.
    """

    unet: nn.Module
    dtype: torch.dtype
    inputs: dict[str, Any]
    scale: float = 7.5

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        x_vp = to_vp(x, sigma).to(self.dtype).repeat(2, 1, 1, 1)
        unconditional, conditional = self.unet(x_vp, **self.inputs).sample.float().chunk(2)
        return x - expand(sigma, x) * (unconditional + self.scale * (conditional - unconditional))


def denoiser(name: str, device: str, dtype: torch.dtype = torch.float32) -> TextDenoiser:
    """A network of NETWORKS with random weights, conditioned on 77 tokens."""
    config, zeros = NETWORKS[name], partial(torch.zeros, device=device, dtype=dtype)
    unet = built(lambda: from_diffusers("UNet2DConditionModel")(**config), device, dtype)
    added = {"text_embeds": zeros(2, 1280), "time_ids": zeros(2, 6)} if "addition_embed_type" in config else None
    return TextDenoiser(unet, dtype, {"timestep": torch.full((2,), 500, device=device), "added_cond_kwargs": added,
                                      "encoder_hidden_states": zeros(2, 77, config["cross_attention_dim"])})


def classifiers(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Guider]:
    """A classifier as a guider of latents, aimed at a class, by every way to make an image of a latent."""
    guider = classifier(device)
    return {way: replace(guider, decode=partial(_decode, decoder)) for way, decoder in decoders(device, dtype).items()}


def classifier(device: str) -> Guider:
    """The guider of images. ImportError without timm."""
    with importing("timm", "measuring what a guided step costs needs", "timm>=1.0.15"):
        import timm
        from timm.data import resolve_data_config
    net = built(lambda: timm.create_model(CLASSIFIER, pretrained=False), device)
    return Guider(f"timm/{CLASSIFIER}", IgnoreSigma(net), timm_preprocess(resolve_data_config({}, model=net)), "class",
                  target=torch.zeros(1, dtype=torch.long, device=device))


def decoders(device: str, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to make an image (B, 3, H, W) of a latent (B, 4, h, w)."""
    space = LatentSpace("four channels", torch.full((4, 3), 0.2, device=device), torch.zeros(3, device=device))
    tiny: Any = built(from_diffusers("AutoencoderTiny"), device, dtype)
    whole: Any = built(lambda: from_diffusers("AutoencoderKL")(**VAE), device, dtype)
    return {"colours": space.colors, "stem": built(lambda: Stem(space, torch.Generator()), device),
            "taesd": lambda latent: tiny.decode(latent.to(dtype)).sample,
            "vae": lambda latent: whole.decode(latent.to(dtype)).sample}


def _decode(decoder: Callable[[Tensor], Tensor], latent: Tensor, sigma: Tensor) -> Tensor:
    # a view, because the counter cannot follow a gradient that ends at the input of a module; images are never half
    return decoder(latent.view_as(latent)).float()


def from_diffusers(name: str) -> Callable[..., nn.Module]:
    """A class of diffusers. ImportError without that package."""
    with importing("diffusers", "measuring what a guided step costs needs", "diffusers>=0.32", "transformers"):
        import diffusers
    return getattr(diffusers, name)


def built(make: Callable[[], nn.Module], device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen network with random weights, allocated on its device at once, so that memory never holds it twice."""
    with torch.device("meta"):
        net = nn.Module.to(make().eval().requires_grad_(False), dtype)  # diffusers' own `to` warns needlessly
    if device == "meta":
        return net
    net, generator = net.to_empty(device=device), torch.Generator(device).manual_seed(0)
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            bound = (3 / weight[0].numel()) ** 0.5  # inputs and outputs have about the same std
            weight.uniform_(-bound, bound, generator=generator)
        else:
            weight.fill_(name.endswith("weight"))
    for name, buffer in net.named_buffers():
        buffer.fill_(name.endswith("var"))
    return net
