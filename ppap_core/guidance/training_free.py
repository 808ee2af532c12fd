"""The training-free family of guided sampling in one algorithm: an off-the-shelf network judges the prediction of each step.

DPS (Chung et al. 2023), LGD-MC (Song et al. 2023), FreeDoM (Yu et al. 2023), MPGD (He et al. 2024) and Universal Guidance
(Bansal et al. 2023) are special cases of TFG (Ye et al. 2024). One step, from sigma to sigma':

    D  = denoise(x, sigma),  E~(z) = -log mean_k exp(-E(z + spread_k)),  g = dE~(D(x))/dx through the denoiser
    M  = D after `iterations` steps  M <- M - mu dE~/dM  without the denoiser
    x' = D + (x - D) sigma'/sigma  -  rho A(g)  +  b (M - D)

and again from x' + sqrt(sigma^2 - sigma'^2) noise where steps are repeated. The methods differ in A (RHO_RULES), in b and
the schedule of mu (MU_RULES), and in the numbers (METHODS); with `moments`, Adam's direction takes each gradient's place
(arXiv 2603.16797). The papers use the variance-preserving scale, where x_vp = x sqrt(abar), abar = 1 / (1 + sigma^2) and the
gradient is g / sqrt(abar); the rules here are converted to ours. The plain step is Euler's, which is DDIM with eta 0,
whatever sampler a method was published with; `renewal` draws a part of the noise in x - D anew.
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
from .gradients import Prediction, energy_at, predict
from .moments import Moments
from .precision import RunState

MIN_ENERGY = 1e-6  # as p -> 1, float32 rounds -log p, even to 0: a gradient divided by that would explode

Offsets = Sequence[Tensor | float]  # of the perturbed predictions, each (B, C, H, W); 0.0 is the prediction itself


class Step(NamedTuple):
    """A step from one noise level to the next."""

    sigma: float
    next_sigma: float
    increase: float  # TFG's schedule: abar_t / abar_(t-1), over its mean over all steps


class RhoInputs(NamedTuple):
    """Inputs of a rho rule: the step, x - D (B, C, H, W), the energy (B,) and its gradient g in x (B, C, H, W)."""

    step: Step
    noise: Tensor
    energy: Tensor
    gradient: Tensor


def _state_rule(inputs: RhoInputs) -> Tensor:
    """LGD-MC: x_(t-1) += rho grad, both on the variance-preserving scale."""
    return math.sqrt((1 + inputs.step.sigma**2) * (1 + inputs.step.next_sigma**2)) * inputs.gradient


def _energy_rule(inputs: RhoInputs) -> Tensor:
    """DPS: x_(t-1) += rho grad / |log p|."""
    return _state_rule(inputs) / expand(inputs.energy.abs().clamp_min(MIN_ENERGY), inputs.gradient)


def _distance_rule(inputs: RhoInputs) -> Tensor:
    """DPS where the energy is a squared error, as for measurements: x_(t-1) += rho grad / sqrt(energy)."""
    return _state_rule(inputs) / expand(inputs.energy.clamp_min(MIN_ENERGY).sqrt(), inputs.gradient)


def _noise_rule(inputs: RhoInputs) -> Tensor:
    """FreeDoM: a step of length rms(eps) sqrt(1 - abar_t) / sqrt(abar_t) times the prediction's share in the DDPM step.

    That share is sqrt(abar_(t-1)) (1 - abar_t / abar_(t-1)) / (1 - abar_t). The published length is that of the batch; here
    each image has its own.
    """
    share = 1 - (inputs.step.next_sigma / inputs.step.sigma) ** 2
    return share * inputs.gradient * expand(_nonzero_rms(inputs.noise) / _nonzero_rms(inputs.gradient), inputs.gradient)


def _forward_rule(inputs: RhoInputs) -> Tensor:
    """Universal Guidance: eps -= rho sqrt(1 - abar_t) grad."""
    return inputs.step.sigma * (inputs.step.sigma - inputs.step.next_sigma) * inputs.gradient


def _increase_rule(inputs: RhoInputs) -> Tensor:
    """TFG: x_(t-1) += rho_t grad / sqrt(abar_t / abar_(t-1)), with a rho_t that grows as the noise falls."""
    return inputs.step.increase * (1 + inputs.step.sigma**2) * inputs.gradient


def _even_rule(inputs: RhoInputs) -> Tensor:
    """Adam-DPS: x_(t-1) += rho grad / sqrt(abar_t / abar_(t-1))."""
    return (1 + inputs.step.sigma**2) * inputs.gradient


RHO_RULES: dict[str, Callable[[RhoInputs], Tensor]] = {  # name -> A(g)
    "state": _state_rule, "energy": _energy_rule, "distance": _distance_rule, "noise": _noise_rule, "forward": _forward_rule,
    "increase": _increase_rule, "even": _even_rule,
}
MU_RULES: dict[str, Callable[[Step], tuple[float, float]]] = {  # name -> (step -> (factor of mu, b))
    "constant": lambda step: (1.0, 1.0),                               # MPGD: the predicted noise is kept
    "increase": lambda step: (step.increase, 1.0),                     # TFG
    "backward": lambda step: (1.0, 1 - step.next_sigma / step.sigma),  # Universal Guidance: the state is kept
}


@dataclass(frozen=True)
class TrainingFree:
    """Settings of one method. rho = mu = 0 is plain sampling, bit for bit, whatever the others are."""

    rho: float = 0.0                        # strength of the gradient through the denoiser; 0: none is computed
    mu: float = 0.0                         # strength of each step on the prediction itself; 0: no steps
    rho_rule: str = "increase"              # a key of RHO_RULES
    mu_rule: str = "increase"               # a key of MU_RULES
    spread: float = 0.0                     # perturbations have std spread sigma / sqrt(1 + sigma^2); 0: none
    samples: int = 1                        # number of perturbed predictions that are judged
    iterations: int = 1                     # steps on the prediction
    recurrences: int = 1                    # how often a step is done; 1 repeats none
    repeat: NoiseInterval = EVERYWHERE      # where it is repeated
    renewal: float = 0.0                    # share of the noise, in variance, that each step draws anew; 0: none
    moments: Moments | None = None          # of Adam for the gradients, which then only tell directions; None: gradients

    def __post_init__(self):
        for name, rules in (("rho_rule", RHO_RULES), ("mu_rule", MU_RULES)):
            if getattr(self, name) not in rules:
                raise ValueError(f"there is no {name} {getattr(self, name)!r}: choose one of {', '.join(rules)}")
        if min(self.samples, self.iterations, self.recurrences) < 1 or not self.spread >= 0:
            raise ValueError("samples, iterations and recurrences must be at least 1 and spread at least 0, got "
                             f"{self.samples}, {self.iterations}, {self.recurrences} and {self.spread}")


METHODS: dict[str, TrainingFree] = {  # starting points: each needs its strength searched for each task
    "dps": TrainingFree(rho=1.0, rho_rule="energy"),
    "lgd": TrainingFree(rho=1.0, rho_rule="state", spread=1.0, samples=10),
    # FreeDoM's text guidance of ImageNet repeats timesteps 500 to 800 of 1000, which are these noise levels
    "freedom": TrainingFree(rho=0.02, rho_rule="noise", recurrences=10, repeat=NoiseInterval(3.44, 25.74)),
    "mpgd": TrainingFree(mu=1.0, mu_rule="constant"),
    # its text guidance of ImageNet has no backward part; mu is where TFG's search starts
    "ugd": TrainingFree(rho=2.0, mu=0.25, rho_rule="forward", mu_rule="backward", iterations=4, recurrences=10),
    "tfg": TrainingFree(rho=1.0, mu=0.25, spread=0.001, iterations=4),  # for labels of CIFAR10
    # the paper's rho is 0.034 for 100 steps
    "adam_dps": TrainingFree(rho=0.2, rho_rule="even", moments=Moments()),
    "adam_mpgd": TrainingFree(mu=0.1, mu_rule="constant", moments=Moments()),
}


def sample_training_free(denoise: Denoiser, guider: Guider, x: Tensor, sigmas: Tensor, method: TrainingFree,
                         seeds: Sequence[int]) -> Tensor:
    """Samples (B, C, H, W) guided to the guider's target.

    denoise: must let gradients through if method.rho is not 0. guider: of the denoised view; judges predictions as clean
    images. x (B, C, H, W): noise * sigmas[0]; sigmas (steps + 1,): descending, ending in 0. seeds: one for each image.

    Image i depends on x[i], its target and seeds[i] only: the noise of round r of step k, both from 0, comes from
    seeded(seeds[i], k, r, 0) for perturbations, seeded(seeds[i], k, r, 1) for repetitions and seeded(seeds[i], k, r, 2) for
    renewal. Images whose gradient is not finite are left unguided in that step. Works under torch.inference_mode(), as long
    as the weights were made outside it.
    ValueError for another number of seeds.
    """
    if len(seeds) != len(x):
        raise ValueError(f"there are {len(seeds)} seeds for {len(x)} images: give one for each")
    with torch.inference_mode(False), torch.no_grad():
        x, run = x.clone(), RunState()  # tensors made under inference mode cannot take part in gradients
        for index, step in enumerate(_steps(sigmas.tolist())):
            std = method.spread * step.sigma / math.sqrt(1 + step.sigma**2)
            for repetition in range(_repetitions(method, step.sigma)):
                if repetition:
                    back = math.sqrt(step.sigma**2 - step.next_sigma**2)
                    x = x + back * _noise(seeds, x, (index, repetition, 1))[:, 0]
                offsets: Offsets = [0.0]
                if std:
                    offsets = (std * _noise(seeds, x, (index, repetition, 0), method.samples)).unbind(1)
                prediction = predict(denoise, x, x.new_full((len(x),), step.sigma), with_vjp=method.rho != 0)
                x = _step(prediction, guider, step, method, offsets, run)
                if method.renewal:
                    x = x + _renewal(prediction, step, method.renewal, _noise(seeds, x, (index, repetition, 2))[:, 0])
    return x


def _renewal(prediction: Prediction, step: Step, share: float, fresh: Tensor) -> Tensor:
    """Change of the next state by which a share of its noise is fresh."""
    lost = (1 - math.sqrt(1 - share)) / step.sigma * (prediction.x - prediction.denoised)
    return step.next_sigma * (math.sqrt(share) * fresh - lost)


def _steps(levels: list[float]) -> list[Step]:
    pairs = list(pairwise(levels))
    ratios = [(1 + next_sigma**2) / (1 + sigma**2) for sigma, next_sigma in pairs]  # abar_t / abar_(t-1)
    return [Step(*pair, ratio * len(ratios) / sum(ratios)) for pair, ratio in zip(pairs, ratios, strict=True)]


def _repetitions(method: TrainingFree, sigma: float) -> int:
    guides = method.rho != 0 or method.mu != 0
    return method.recurrences if guides and sigma in method.repeat else 1


def _step(prediction: Prediction, guider: Guider, step: Step, method: TrainingFree, offsets: Offsets,
          run: RunState) -> Tensor:
    """The state at the next noise level."""
    denoised, noise = prediction.denoised, prediction.x - prediction.denoised
    state = denoised + noise * (step.next_sigma / step.sigma)
    if prediction.vjp:
        energy, gradient = _smoothed_energy_gradient(guider, denoised, offsets)
        gradient = run.zero_nonfinite(prediction.vjp(gradient), guider.name, step.sigma)
        if method.moments:  # of the gradient on the variance-preserving scale
            scale = math.sqrt(1 + step.sigma**2)
            gradient = run.moments_of("rho", method.moments).direction(scale * gradient) / scale
        shift = RHO_RULES[method.rho_rule](RhoInputs(step, noise, energy, gradient))
        state = state - method.rho * run.zero_nonfinite(shift, guider.name, step.sigma)
    if method.mu:
        factor, share = MU_RULES[method.mu_rule](step)
        mean = denoised
        for _ in range(method.iterations):
            _, gradient = _smoothed_energy_gradient(guider, mean, offsets)
            gradient = run.zero_nonfinite(gradient, guider.name, step.sigma)
            if method.moments:
                gradient = run.moments_of("mu", method.moments).direction(gradient)
            mean = mean - method.mu * factor * gradient
        state = state + share * (mean - denoised)
    return state


def _smoothed_energy_gradient(guider: Guider, image: Tensor, offsets: Offsets) -> tuple[Tensor, Tensor]:
    """E~ (B,) of images, the energy smoothed over perturbations, and its gradient."""
    with torch.enable_grad():
        point = image.clone().requires_grad_(True)
        energies = torch.stack([energy_at(guider, point + offset, clean(point)) for offset in offsets])
        value = math.log(len(offsets)) - (-energies).logsumexp(0)
        return value.detach(), torch.autograd.grad(value.sum(), point)[0]


def _noise(seeds: Sequence[int], x: Tensor, key: tuple[int, int, int], count: int = 1) -> Tensor:
    """Noise (B, count, C, H, W) from generators seeded with each image's seed and the key."""
    return torch.stack([torch.randn(count, *x.shape[1:], generator=seeded(seed, *key)) for seed in seeds]).to(x)


def _nonzero_rms(part: Tensor) -> Tensor:
    """Root mean square of each image, (B,), clamped before squares underflow: x / _nonzero_rms(x) has at most rms 1."""
    return part.square().flatten(1).mean(1).clamp_min(torch.finfo(part.dtype).tiny).sqrt()
