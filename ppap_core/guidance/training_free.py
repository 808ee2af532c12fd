"""The training-free family of guided sampling in one place: an off-the-shelf network judges the prediction of every step.

DPS (Chung et al. 2023), LGD-MC (Song et al. 2023), FreeDoM (Yu et al. 2023), MPGD (He et al. 2024), Universal Guidance
(Bansal et al. 2023) and TFG (Ye et al. 2024), who saw that they are one algorithm. One step, from sigma to sigma':

    D  = denoise(x, sigma),  E~(z) = -log mean_k exp(-E(z + spread_k)),  g = dE~(D(x))/dx through the denoiser
    M  = D after `iterations` steps  M <- M - mu dE~/dM  without the denoiser
    x' = D + (x - D) sigma'/sigma  -  rho A(g)  +  b (M - D)

and again from x' + sqrt(sigma^2 - sigma'^2) noise where steps are repeated. The methods differ in A (RHO_RULES), in b and
the schedule of mu (MU_RULES), and in the numbers (METHODS). They are written for the variance-preserving scale, where
x_vp = x sqrt(abar), abar = 1 / (1 + sigma^2) and the gradient is g / sqrt(abar); the rules hold what follows for ours.
The plain step is Euler's, which is DDIM with eta 0, whatever sampler a method was published with.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from ..noise import EVERYWHERE, NoiseInterval, expand
from ..rng import seeded
from ..sampling import Denoiser
from .gradients import differentiable, energy_at, finite

MIN_ENERGY = 1e-6  # as p -> 1, float32 holds -log p as a rounding or as 0: divided by that, a gradient looks like a fault

Offsets = Sequence[Tensor | float]  # of the perturbed predictions, each (B, C, H, W); 0.0 is the prediction itself


class Step(NamedTuple):
    """From one noise level to the next."""

    sigma: float
    following: float
    increase: float  # TFG's schedule: abar_t / abar_(t-1), over its mean over all steps


def _vp(step: Step) -> float:
    """What x_(t-1) += grad, both of the variance-preserving scale, is in ours."""
    return math.sqrt((1 + step.sigma**2) * (1 + step.following**2))


RhoRule = Callable[[Step, Tensor, Tensor, Tensor], Tensor]
RHO_RULES: dict[str, RhoRule] = {  # (step, x - D, energy (B,), g) -> A(g)
    # LGD-MC: x_(t-1) += rho grad
    "state": lambda step, noise, energy, g: _vp(step) * g,
    # DPS: x_(t-1) += rho grad / |log p|
    "energy": lambda step, noise, energy, g: _vp(step) * g / expand(energy.abs().clamp_min(MIN_ENERGY), g),
    # FreeDoM: a step as long as rms(eps) sqrt(1 - abar_t) / sqrt(abar_t) times the prediction's share in the DDPM step,
    # sqrt(abar_(t-1)) (1 - abar_t / abar_(t-1)) / (1 - abar_t); for each sample, where the published one is for the batch
    "noise": lambda step, noise, energy, g: (1 - (step.following / step.sigma) ** 2) * g * expand(_rms(noise) / _rms(g), g),
    # Universal Guidance: eps -= rho sqrt(1 - abar_t) grad
    "forward": lambda step, noise, energy, g: step.sigma * (step.sigma - step.following) * g,
    # TFG: x_(t-1) += rho_t grad / sqrt(abar_t / abar_(t-1)), with a rho_t that grows as the noise falls
    "increase": lambda step, noise, energy, g: step.increase * (1 + step.sigma**2) * g,
}
MU_RULES: dict[str, Callable[[Step], tuple[float, float]]] = {  # step -> (factor of mu, b)
    "constant": lambda step: (1.0, 1.0),                              # MPGD: the predicted noise is kept
    "increase": lambda step: (step.increase, 1.0),                    # TFG
    "backward": lambda step: (1.0, 1 - step.following / step.sigma),  # Universal Guidance: the state is kept
}


@dataclass(frozen=True)
class TrainingFree:
    """Settings of one method. rho = mu = 0 is plain sampling, bit for bit, whatever the others are."""

    rho: float = 0.0                        # strength of the gradient through the denoiser; 0 never asks for it
    mu: float = 0.0                         # strength of each step on the prediction itself; 0 takes none
    rho_rule: str = "increase"              # a key of RHO_RULES
    mu_rule: str = "increase"               # a key of MU_RULES
    spread: float = 0.0                     # of the perturbed predictions, std spread sigma / sqrt(1 + sigma^2); 0: none
    samples: int = 1                        # how many perturbed predictions are judged
    iterations: int = 1                     # steps on the prediction
    recurrences: int = 1                    # how often a step is done; 1 repeats none
    repeat: NoiseInterval = EVERYWHERE      # where it is repeated
    clip: bool = False                      # the prediction to [-1, 1], for images and never for latents

    def __post_init__(self):
        for name, rules in (("rho_rule", RHO_RULES), ("mu_rule", MU_RULES)):
            if getattr(self, name) not in rules:
                raise ValueError(f"there is no {name} {getattr(self, name)!r}: choose one of {', '.join(rules)}")
        if min(self.samples, self.iterations, self.recurrences) < 1 or not self.spread >= 0:
            raise ValueError("samples, iterations and recurrences must be at least 1 and spread at least 0, got "
                             f"{self.samples}, {self.iterations}, {self.recurrences} and {self.spread}")


METHODS: dict[str, TrainingFree] = {  # a place to start from: every one wants its strength searched for each task
    "dps": TrainingFree(rho=1.0, rho_rule="energy"),
    "lgd": TrainingFree(rho=1.0, rho_rule="state", spread=1.0, samples=10),
    # FreeDoM's text guidance of ImageNet repeats timesteps 500 to 800 of 1000, which are these noise levels
    "freedom": TrainingFree(rho=0.02, rho_rule="noise", recurrences=10, repeat=NoiseInterval(3.44, 25.74)),
    "mpgd": TrainingFree(mu=1.0, mu_rule="constant"),
    # its text guidance of ImageNet, which has no backward part; that is given the strength a search of TFG starts from
    "ugd": TrainingFree(rho=2.0, mu=0.25, rho_rule="forward", mu_rule="backward", iterations=4, recurrences=10),
    "tfg": TrainingFree(rho=1.0, mu=0.25, spread=0.001, iterations=4),  # for labels of CIFAR10
}


def sample_training_free(denoise: Denoiser, guider: Guider, x: Tensor, sigmas: Tensor, method: TrainingFree,
                         seeds: Sequence[int]) -> Tensor:
    """Samples (B, C, H, W) guided to the guider's target. x = noise * sigmas[0]; sigmas descending, ending in 0.

    Where rho is not 0 the denoiser must let gradients through. Image i depends on x[i], its target and seeds[i] only: the
    noise of round r of step k comes from seeded(seeds[i], k, r, 0) for perturbations and seeded(seeds[i], k, r, 1) for the
    state, r counted from 0. Images whose gradient is not finite are left unguided in that step.
    Works under torch.inference_mode(), as long as the weights were made outside of it.
    """
    if len(seeds) != len(x):
        raise ValueError(f"there are {len(seeds)} seeds for {len(x)} images: give one for each")
    guiding = method.rho != 0 or method.mu != 0
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone()  # what was made under inference mode cannot take part in gradients
        for i, step in enumerate(_steps(sigmas.tolist())):
            std = method.spread * step.sigma / math.sqrt(1 + step.sigma**2)
            rounds = method.recurrences if guiding and step.sigma in method.repeat else 1
            for again in range(rounds):
                if again:
                    back = math.sqrt(step.sigma**2 - step.following**2)
                    x = x + back * _noise(seeds, x, i, again, 1)[:, 0]
                offsets = (std * _noise(seeds, x, i, again, 0, count=method.samples)).unbind(1) if std else [0.0]
                x = _step(denoise, guider, x, step, method, offsets)
    return x


def _steps(levels: list[float]) -> list[Step]:
    pairs = list(pairwise(levels))
    ratios = [(1 + following**2) / (1 + sigma**2) for sigma, following in pairs]  # abar_t / abar_(t-1)
    return [Step(*pair, ratio * len(ratios) / sum(ratios)) for pair, ratio in zip(pairs, ratios, strict=True)]


def _step(denoise: Denoiser, guider: Guider, x: Tensor, step: Step, method: TrainingFree,
          offsets: Offsets) -> Tensor:
    """The state at the next noise level."""
    level = x.new_full((len(x),), step.sigma)
    look = (lambda x, sigma: denoise(x, sigma).clamp(-1, 1)) if method.clip else denoise
    denoised, vjp = differentiable(look, x, level) if method.rho else (look(x, level), None)
    following = denoised + (x - denoised) * (step.following / step.sigma)
    if method.rho:
        value, gradient = _energy_gradient(guider, denoised, offsets)
        shift = RHO_RULES[method.rho_rule](step, x - denoised, value, vjp(gradient))
        following = following - method.rho * finite(shift, guider.name, step.sigma)
    if method.mu:
        factor, share = MU_RULES[method.mu_rule](step)
        mean = denoised
        for _ in range(method.iterations):
            _, gradient = _energy_gradient(guider, mean, offsets)
            mean = mean - method.mu * factor * finite(gradient, guider.name, step.sigma)
        following = following + share * (mean - denoised)
    return following


def _energy_gradient(guider: Guider, image: Tensor, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """Energy (B,) of images, smoothed over their perturbations, and its gradient."""
    with torch.enable_grad():
        point = image.clone().requires_grad_(True)
        energies = torch.stack([energy_at(guider, point + offset, clean(point)) for offset in offsets])
        value = math.log(len(offsets)) - (-energies).logsumexp(0)
        return value.detach(), torch.autograd.grad(value.sum(), point)[0]


def _noise(seeds: Sequence[int], x: Tensor, *place: int, count: int = 1) -> Tensor:
    """(B, count, C, H, W)"""
    return torch.stack([torch.randn(count, *x.shape[1:], generator=seeded(seed, *place)) for seed in seeds]).to(x)


def _rms(part: Tensor) -> Tensor:
    """(B,), at least what squares do not underflow below: whatever is divided by its own stays at most 1."""
    return part.square().flatten(1).mean(1).clamp_min(torch.finfo(part.dtype).tiny).sqrt()
