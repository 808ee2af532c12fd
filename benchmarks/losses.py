"""The losses by which the tiny worlds' networks are trained: (network, batch, generator) -> (B,)."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.priors.label_maps import to_points
from ppap_core import Denoiser, to_vp
from ppap_core.guiders.tasks import cross_entropy, pixel_cross_entropy
from ppap_core.noise import PIXEL_SIGMA_DATA, expand
from ppap_core.tinyworld.latents import SCALE, SIZE, SPACE, Encoded, scale_latent, timestep_sigmas
from ppap_core.tinyworld.loaders import condition
from ppap_core.tinyworld.networks.autoencoder import SHRINK, TinyAutoencoder
from ppap_core.tinyworld.scenes import Scenes, truth

from .judges import augment

Loss = Callable[[Any, Any, torch.Generator], Tensor]
"""(network, a batch of its source, generator) -> losses (B,)"""


def conditional_loss(net: nn.Module, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """`denoiser_loss` with the class as a condition, dropped for some scenes, (B,)."""
    given = label_dropout(scenes.label, generator)
    return denoiser_loss(lambda x, sigma: net(x, sigma, given), scenes, generator)


def denoiser_loss(net: Denoiser, scenes: Scenes, generator: torch.Generator, p_mean: float = -0.5) -> Tensor:
    """EDM's loss (Karras et al. 2022, eq. 8), by default with more weight where a scene's shape is decided, (B,).

    p_mean: mean of log sigma.
    """
    image = scenes.image
    sigma = (torch.randn(len(image), generator=generator) * 1.2 + p_mean).exp().to(image.device)
    noise = torch.randn(image.shape, generator=generator).to(image.device)
    error = net(image + sigma[:, None, None, None] * noise, sigma).float() - image
    weight = (sigma**2 + PIXEL_SIGMA_DATA**2) / (sigma * PIXEL_SIGMA_DATA) ** 2
    return weight * error.square().mean(dim=(1, 2, 3))


def label_map_loss(net: Denoiser, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """`denoiser_loss` on one-hot label maps, P_mean 0.9: their shape is decided at more noise, (B,)."""
    return denoiser_loss(net, scenes._replace(image=to_points(scenes.segmentation)), generator, p_mean=0.9)


def absolute_error(depth: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of depth maps (B, 1, h, w), (B,)."""
    return (depth.float() - wanted).abs().flatten(1).mean(1)


LOSSES = {"class": cross_entropy, "depth": absolute_error, "segmentation": pixel_cross_entropy}  # (output, truth) -> (B,)


def task_loss(task: str, net: nn.Module, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Loss of a network's outputs on scenes, augmented as in the training of real networks, (B,)."""
    return LOSSES[task](net(augment(scenes.image, generator)), truth(scenes, task))


CROP = 64  # side of what an autoencoder is trained on: its convolutions are the same everywhere


def autoencoder_loss(net: TinyAutoencoder, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Error of the image decoded from a slightly noisy latent, and of the latent's linear colours, (B,)."""
    top, left = torch.randint((SIZE - CROP) // SHRINK + 1, (2,), generator=generator).tolist()
    image = scenes.image[..., SHRINK * top:SHRINK * top + CROP, SHRINK * left:SHRINK * left + CROP]
    latent = net.encode(image.contiguous(memory_format=torch.channels_last)).float()
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    error = net.decode(latent + 0.1 / SCALE * noise).float() - image
    color_error = SPACE.colors(scale_latent(latent)) - F.avg_pool2d(image, SHRINK)
    parts = (error.abs(), error.square(), 0.25 * color_error.square(), 0.01 * scale_latent(latent).square())
    return torch.stack([part.flatten(1).mean(1) for part in parts]).sum(0)


def flow_loss(net: nn.Module, scenes: Encoded, generator: torch.Generator) -> Tensor:
    """Error of the velocity at logit-normal times (Esser et al. 2024, section 3.1), (B,)."""
    given = label_dropout(scenes.label, generator)
    x, t, target = flow_state(scenes.latent, generator)
    return (net(x, t, given[:, None], given).float() - target).square().flatten(1).mean(1)


def flow_state(latent: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A noisy state, its time (B,), and the velocity there."""
    t = (torch.randn(len(latent), generator=generator) + 0.5).sigmoid().to(latent)
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    return (1 - expand(t, latent)) * latent + expand(t, latent) * noise, t, noise - latent


def control_loss(net: nn.Module, scenes: Encoded, generator: torch.Generator) -> Tensor:
    """Error of the flow model's velocity with the ControlNet, (B,)."""
    x, t, target = flow_state(scenes.latent, generator)
    velocity = net(x, t, label_dropout(scenes.label, generator, 0.5), scenes.hint)
    return (velocity.float() - target).square().flatten(1).mean(1)


def eps_loss(net: nn.Module, scenes: Encoded, generator: torch.Generator) -> Tensor:
    """Error of the noise at timesteps drawn evenly (Ho et al. 2020, eq. 14), (B,)."""
    latent, given = scenes.latent, label_dropout(scenes.label, generator)
    timestep = torch.randint(1000, (len(latent),), generator=generator)
    sigma = timestep_sigmas()[timestep].to(latent)
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    output = net(to_vp(latent + expand(sigma, latent) * noise, sigma), timestep.to(latent), given)
    return (output.float() - noise).square().flatten(1).mean(1)


def label_dropout(label: Tensor, generator: torch.Generator, share: float = 1 / 7) -> Tensor:
    """The condition of each scene, (B, CONDITIONS), and none for a share of them, so that the model learns to do without."""
    without = torch.rand(len(label), generator=generator) < share
    return condition(label.masked_fill(without.to(label.device), -1))
