"""The latent tiny world as one value: the models that the benchmark samples, guides and judges with."""
from collections.abc import Sequence

import torch
from torch import Tensor

from ppap_core import Denoiser, base_network, karras_sigmas, sample_euler
from ppap_core.noise import expand
from ppap_core.rng import seeded_noise
from ppap_core.tinyworld import latents
from ppap_core.tinyworld.latents import SIZE, load_autoencoder, load_control, load_flow, unscale_latent
from ppap_core.tinyworld.loaders import CONDITIONS, LABELS, load_guider
from ppap_core.tinyworld.networks.autoencoder import CHANNELS, SHRINK

from .networks import load_judge

GRID = SIZE // SHRINK
TIME_SHIFT = 3.0  # of the flow's times, as is usual for models of this kind


class LatentWorld:
    """The flow model in the core's convention, the autoencoder, and guiders and judges of all tasks, on one device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.flow = load_flow().to(self.device)
        self.control, self.autoencoder = load_control().to(self.device), load_autoencoder().to(self.device)
        self.guiders, self.judges = ({task: load(task) for task in LABELS} for load in (load_guider, load_judge))
        for guider in (*self.guiders.values(), *self.judges.values()):
            base_network(guider).to(self.device)

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, given: Tensor | None = None, hint: Tensor | None = None) -> Tensor:
        """Expected latent (B, 16, h, w) of x = latent + sigma noise.

        given: condition (B, CONDITIONS); None: unconditional.
        hint: of the ControlNet, (B, 16, h, w); None: without it.
        """
        return self.predict(x, sigma, given, hint)

    def predict(self, x: Tensor, sigma: Tensor, given: Tensor | None = None, hint: Tensor | None = None) -> Tensor:
        """Expected latents as `denoise` has them, differentiable."""
        given = x.new_zeros(len(x), CONDITIONS) if given is None else given
        t = sigma / (1 + sigma)
        state, context = (1 - expand(t, x)) * x, given[:, None]
        control = [] if hint is None else self.control(state, t, context, hint)
        return state - expand(t, x) * self.flow(state, t, context, given, control)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, 8h, 8w) in [-1, 1]."""
        return self.autoencoder.decode(unscale_latent(latents)).clamp(-1, 1)

    def decoder(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """The images of latents as a guider's decoder: differentiable, not clamped."""
        return self.autoencoder.decode(unscale_latent(latents))

    def sample(self, seeds: Sequence[int], sigmas: Tensor, denoise: Denoiser) -> Tensor:
        """Latents of the given seeds after Euler steps along these noise levels, descending to 0."""
        noise = seeded_noise(seeds, (CHANNELS, GRID, GRID)).to(self.device)
        return sample_euler(denoise, noise * sigmas[0], sigmas)


def flow_sigmas(steps: int) -> Tensor:
    """Noise levels of a flow's times shifted by TIME_SHIFT, descending to 0, (steps + 1,)."""
    ramp = torch.linspace(1 - 0.5 / steps, 0, steps + 1)
    t = TIME_SHIFT * ramp / (1 + (TIME_SHIFT - 1) * ramp)
    return t / (1 - t)


def eps_sigmas(steps: int) -> Tensor:
    """Noise levels in the range of the noise-predicting model, descending to 0, (steps + 1,)."""
    trained = latents.timestep_sigmas()
    return karras_sigmas(steps, float(trained[0]), float(trained[-1]))
