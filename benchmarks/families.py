"""Models that diffuse one space, among which experts travel: those of the latent tiny world, and those of its pixels."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ppap_core import (
    Denoiser,
    GuidanceSettings,
    Guider,
    Term,
    Trajectories,
    TrajectoryRecorder,
    guided,
    karras_sigmas,
    sample_euler,
)
from ppap_core.guiders.latents import LatentSpace
from ppap_core.noise import PIXEL_SIGMA_DATA, expand
from ppap_core.rng import seeded_noise
from ppap_core.tinyworld.latents import (
    CHANNELS,
    SPACE,
    TinyEps,
    denoise_by_eps,
    load_autoencoder,
    load_eps,
    load_flow,
    unscale_latent,
)
from ppap_core.tinyworld.loaders import CONDITIONS, SIGMA_MAX, SIGMA_MIN, SIZE, load_denoiser, load_guider, load_sibling
from ppap_core.tinyworld.networks.flow import TinyFlow

from .latent_world import GRID, eps_sigmas, flow_sigmas

STEPS, FEW_STEPS = 16, 8


@dataclass(frozen=True)
class Model:
    """A diffusion model and how it is sampled."""

    denoise: Denoiser   # differentiable where its input requires a gradient
    sigmas: Tensor      # noise levels of its sampler, descending to 0
    lends: bool = True  # whether its experts guide the other models too


@dataclass(frozen=True)
class Family:
    """Models of one space by name, and what is common to them.

    guider: the plain one, which can judge the space. shape: of a state (C, h, w). decode: state -> image in [-1, 1].
    """

    name: str
    models: dict[str, Model]
    guider: Guider
    space: LatentSpace | None
    shape: tuple[int, int, int]
    sigma_data: float
    decode: Callable[[Tensor], Tensor]

    def sample(self, model: Model, seeds: Sequence[int], terms: Sequence[Term] = ()) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of noise of the given seeds, guided by terms."""
        denoise = guided(model.denoise, terms, GuidanceSettings(sigma_data=self.sigma_data))
        return self._sample(denoise, model.sigmas, seeds)

    def sample_recorded(self, model: Model, seeds: Sequence[int]) -> tuple[Tensor, Trajectories]:
        """Images as `sample` makes them, and their trajectories, for a `SampleStore`."""
        recorder = TrajectoryRecorder()
        return self._sample(recorder.wrap(model.denoise), model.sigmas, seeds), recorder.trajectories(seeds)

    def _sample(self, denoise: Denoiser, sigmas: Tensor, seeds: Sequence[int]) -> Tensor:
        states = sample_euler(denoise, seeded_noise(seeds, self.shape) * sigmas[0], sigmas)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return torch.cat([self.decode(part).float() for part in states.split(16)]).clamp(-1, 1)


def in_bfloat16(denoise: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    """Predict with the network in bfloat16, which is precise enough here; differentiable where x requires a gradient."""
    with torch.set_grad_enabled(x.requires_grad), torch.autocast("cpu", torch.bfloat16):
        return denoise(x, sigma)


def denoise_by_flow(net: TinyFlow, x: Tensor, sigma: Tensor) -> Tensor:
    """Expected latent of x = latent + sigma noise by the flow model, unconditional."""
    condition, t = x.new_zeros(len(x), CONDITIONS), sigma / (1 + sigma)
    state = (1 - expand(t, x)) * x
    return state - expand(t, x) * net(state, t, condition[:, None], condition, [])


def denoise_unconditionally(net: TinyEps, x: Tensor, sigma: Tensor) -> Tensor:
    """Expected latent of x = latent + sigma noise by the noise-predicting model, unconditional."""
    return denoise_by_eps(net, x, sigma, x.new_zeros(len(x), CONDITIONS))


def latent_family() -> Family:
    """The flow model in 16 steps and in 8, and the noise-predicting model in 16."""
    flow = partial(in_bfloat16, partial(denoise_by_flow, load_flow()))
    eps = partial(in_bfloat16, partial(denoise_unconditionally, load_eps()))
    autoencoder = load_autoencoder()
    return Family("latents", {"flow": Model(flow, flow_sigmas(STEPS)), "eps": Model(eps, eps_sigmas(STEPS)),
                              "flow in 8 steps": Model(flow, flow_sigmas(FEW_STEPS), lends=False)},
                  load_guider("class"), SPACE, (CHANNELS, GRID, GRID), 1.0,
                  lambda states: autoencoder.decode(unscale_latent(states)))


def pixel_family() -> Family:
    """The denoiser, and its bad version of half the width and a sixteenth of the training."""
    sigmas = karras_sigmas(STEPS, SIGMA_MIN, SIGMA_MAX)
    models = {name: Model(partial(in_bfloat16, load()), sigmas)
              for name, load in (("denoiser", load_denoiser), ("sibling", load_sibling))}
    return Family("pixels", models, load_guider("class"), None, (3, SIZE, SIZE), PIXEL_SIGMA_DATA, lambda states: states)


FAMILIES: dict[str, Callable[[], Family]] = {"latents": latent_family, "pixels": pixel_family}
