"""The latent tiny world: scenes of 128 x 128 pixels, an autoencoder, and two models of its latents that know the class.

The latents are of Stable Diffusion 3's kind: 16 channels, its shift and scale, and, because the autoencoder was trained
to agree with them, its linear colours.
"""
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..guiders.latents import LatentSpace
from ..io.files import load_tensors
from ..noise import expand, to_vp
from .loaders import CONDITIONS, WEIGHTS, load_weights
from .networks.autoencoder import TinyAutoencoder
from .networks.denoiser import TinyUNet
from .networks.flow import TinyControl, TinyFlow, from_diffusers
from .scenes import CLASSES

SIZE, CHANNELS, SHRINK = 128, 16, 8
SHIFT, SCALE = 0.0609, 1.5305  # what a model diffuses is (latent - SHIFT) * SCALE
COLOURS = torch.tensor([  # what a channel adds to red, green and blue in [-1, 1]: a fit to the large VAE, as in previews
    [-0.0922, -0.0175, 0.0749], [0.0311, 0.0633, 0.0954], [0.1994, 0.0927, 0.0458], [0.0856, 0.0339, 0.0902],
    [0.0587, 0.0272, -0.0496], [-0.0006, 0.1104, 0.0309], [0.0978, 0.0306, 0.0427], [-0.0042, 0.1038, 0.1358],
    [-0.0194, 0.0020, 0.0669], [-0.0488, 0.0130, -0.0268], [0.0922, 0.0988, 0.0951], [-0.0278, 0.0524, -0.0542],
    [0.0332, 0.0456, 0.0895], [-0.0069, -0.0030, -0.0810], [-0.0596, -0.0465, -0.0293], [-0.1448, -0.1463, -0.1189]])
BIAS = torch.tensor([0.2394, 0.2135, 0.1925])
SPACE = LatentSpace("SD3", COLOURS, BIAS)


class Encoded(NamedTuple):
    """Scenes as a model of latents is trained on them."""

    latent: Tensor  # (B, 16, 16, 16), as it is diffused
    label: Tensor   # (B,)
    hint: Tensor    # (B, 16, 16, 16), of their depth, as a ControlNet is given it


def diffused(latent: Tensor) -> Tensor:
    """What an autoencoder gives, as it is diffused."""
    return (latent - SHIFT) * SCALE


def as_hint(latent: Tensor) -> Tensor:
    """What an autoencoder gives of a hint, as a ControlNet of Stable Diffusion 3 is given it: without the shift."""
    return latent * SCALE


def depth_picture(depth: Tensor) -> Tensor:
    """Depth (B, 1, H, W) in [0, 1] as the picture that a ControlNet is shown, (B, 3, H, W) in [-1, 1]: near is white."""
    return (2 * depth - 1).expand(-1, 3, -1, -1)


def undiffused(latent: Tensor) -> Tensor:
    """The way back."""
    return latent / SCALE + SHIFT


def class_labels(names: str) -> Tensor:
    """'star, ring' -> their numbers, (B,); nothing -> -1, no class. ValueError for what is no class."""
    found = [name.strip() for name in names.split(",")] if names.strip() else [""]
    for name in found:
        if name and name not in CLASSES:
            raise ValueError(f"there is no class '{name}': expected some of {', '.join(CLASSES)}")
    return torch.tensor([CLASSES.index(name) if name else -1 for name in found])


def timestep_sigmas() -> Tensor:
    """Noise levels of the timesteps 0 to 999 (Rombach et al. 2022): betas linear in their roots, (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    return ((1 - kept) / kept).sqrt().float()


class TinyEps(TinyUNet):
    """A noise-predicting model of the latents, on the schedule of Stable Diffusion 1.5.

    x (B, 16, H, W): (latent + sigma noise) / sqrt(1 + sigma^2), sides divisible by 4; timestep (B,), whole numbers of 0 to
    999; pooled (B, CONDITIONS) -> the noise, like x
    """

    def __init__(self):
        super().__init__(width=64, blocks=2, channels=CHANNELS, conditions=CONDITIONS)
        self.register_buffer("sigmas", timestep_sigmas(), persistent=False)

    def forward(self, x: Tensor, timestep: Tensor, pooled: Tensor) -> Tensor:
        """What of the noise a Gaussian prior tells, and what the network knows better (Karras et al. 2022, table 1)."""
        sigma = expand(self.sigmas[timestep.round().long()], x)
        return (sigma * x - super().forward(x, timestep / 250, pooled)) / (1 + sigma**2).sqrt()


def denoise_by_eps(net: TinyEps, x: Tensor, sigma: Tensor, given: Tensor) -> Tensor:
    """Expected latent of x = latent + sigma noise (B, 16, h, w) by the noise-predicting model, at the nearest timestep."""
    timestep = (timestep_sigmas().to(x).log()[None] - sigma.log()[:, None]).abs().argmin(1)
    return x - expand(sigma, x) * net(to_vp(x, sigma), timestep.to(x), given)


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
