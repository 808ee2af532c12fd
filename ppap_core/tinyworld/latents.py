"""The tiny world of latents: scenes of 128 x 128 pixels, an autoencoder, and two class-conditional models of its latents.

The latents are of Stable Diffusion 3's kind: 16 channels with its shift and scale, and with its linear colours, which the
autoencoder was trained to agree with.
"""
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..guiders.latents import LatentSpace
from ..io.files import load_tensors
from ..noise import expand, to_vp
from .loaders import CONDITIONS, WEIGHTS, load_weights
from .networks.autoencoder import CHANNELS, TinyAutoencoder
from .networks.denoiser import TinyUNet
from .networks.flow import TinyControl, TinyFlow, from_diffusers
from .scenes import CLASSES

SIZE = 128
SHIFT, SCALE = 0.0609, 1.5305  # a model diffuses (latent - SHIFT) * SCALE
FACTORS = torch.tensor([  # of each channel on red, green and blue in [-1, 1]: a fit to the large VAE, as in previews
    [-0.0922, -0.0175, 0.0749], [0.0311, 0.0633, 0.0954], [0.1994, 0.0927, 0.0458], [0.0856, 0.0339, 0.0902],
    [0.0587, 0.0272, -0.0496], [-0.0006, 0.1104, 0.0309], [0.0978, 0.0306, 0.0427], [-0.0042, 0.1038, 0.1358],
    [-0.0194, 0.0020, 0.0669], [-0.0488, 0.0130, -0.0268], [0.0922, 0.0988, 0.0951], [-0.0278, 0.0524, -0.0542],
    [0.0332, 0.0456, 0.0895], [-0.0069, -0.0030, -0.0810], [-0.0596, -0.0465, -0.0293], [-0.1448, -0.1463, -0.1189]])
BIAS = torch.tensor([0.2394, 0.2135, 0.1925])
SPACE = LatentSpace("SD3", FACTORS, BIAS)


class Encoded(NamedTuple):
    """Scenes as a model of latents is trained on them."""

    latent: Tensor  # (B, 16, 16, 16), scaled
    label: Tensor   # (B,)
    hint: Tensor    # (B, 16, 16, 16), of their depth, for a ControlNet


def scale_latent(latent: Tensor) -> Tensor:
    """A latent of the autoencoder (B, 16, h, w) -> the latent that a model diffuses."""
    return (latent - SHIFT) * SCALE


def unscale_latent(latent: Tensor) -> Tensor:
    """A latent that a model diffuses (B, 16, h, w) -> the latent that the autoencoder decodes."""
    return latent / SCALE + SHIFT


def scale_hint(latent: Tensor) -> Tensor:
    """A hint's latent of the autoencoder (B, 16, h, w) -> the input of a ControlNet of Stable Diffusion 3: no shift."""
    return latent * SCALE


def depth_hint(depth: Tensor) -> Tensor:
    """Depth (B, 1, H, W) in [0, 1] -> the picture (B, 3, H, W) in [-1, 1] that a ControlNet is shown: near is white."""
    return (2 * depth - 1).expand(-1, 3, -1, -1)


def class_labels(names: str) -> Tensor:
    """Labels (B,) long of classes such as "star, ring"; an empty name is -1, no class. ValueError for unknown classes."""
    classes = [name.strip() for name in names.split(",")] if names.strip() else [""]
    for name in classes:
        if name and name not in CLASSES:
            raise ValueError(f"there is no class '{name}': expected some of {', '.join(CLASSES)}")
    return torch.tensor([CLASSES.index(name) if name else -1 for name in classes])


def timestep_sigmas() -> Tensor:
    """Noise levels of the timesteps 0 to 999, (1000,): square roots of betas spaced linearly (Rombach et al. 2022)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = (1 - betas).cumprod(0)
    return ((1 - signal) / signal).sqrt().float()


class TinyEps(TinyUNet):
    """A noise-predicting model of the latents on the schedule of Stable Diffusion 1.5.

    x (B, 16, H, W): (latent + sigma noise) / sqrt(1 + sigma^2), sides divisible by 4; timestep (B,), whole numbers from 0
    to 999; pooled (B, CONDITIONS) -> the noise, like x
    """

    sigmas: Tensor

    def __init__(self) -> None:
        super().__init__(width=64, blocks=2, channels=CHANNELS, conditions=CONDITIONS)
        self.register_buffer("sigmas", timestep_sigmas(), persistent=False)

    def forward(self, x: Tensor, timestep: Tensor, pooled: Tensor | None = None) -> Tensor:
        """The noise under a Gaussian prior, corrected by the network (Karras et al. 2022, table 1)."""
        sigma = expand(self.sigmas[timestep.round().long()], x)
        return (sigma * x - super().forward(x, timestep / 250, pooled)) / (1 + sigma**2).sqrt()


def denoise_by_eps(net: TinyEps, x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
    """Expected latent of x = latent + sigma noise (B, 16, h, w) by the noise-predicting model, at the nearest timestep.

    sigma (B,); condition (B, CONDITIONS).
    """
    timestep = (timestep_sigmas().to(x).log()[None] - sigma.log()[:, None]).abs().argmin(1)
    return x - expand(sigma, x) * net(to_vp(x, sigma), timestep.to(x), condition)


def load_autoencoder(folder: Path = WEIGHTS) -> TinyAutoencoder:
    """The trained autoencoder."""
    return load_weights(TinyAutoencoder(), "vae/tinyworld_vae", folder)


def load_flow(folder: Path = WEIGHTS) -> TinyFlow:
    """The trained flow model."""
    return load_weights(TinyFlow(), "diffusion_models/tinyworld_flow", folder)


def load_control(folder: Path = WEIGHTS) -> TinyControl:
    """The trained ControlNet of the flow model, for depth."""
    net = TinyControl()
    tensors, _ = load_tensors(folder / "controlnet/tinyworld_depth.safetensors")
    net.load_state_dict(from_diffusers(tensors, net.state_dict()))
    return net.eval().requires_grad_(False)


def load_eps(folder: Path = WEIGHTS) -> TinyEps:
    """The trained noise-predicting model."""
    return load_weights(TinyEps(), "tinyworld_eps", folder)
