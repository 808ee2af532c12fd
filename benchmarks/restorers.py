"""The ways of restoring faces that the benchmark compares, with the settings that are searched."""
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ppap_core import (
    Denoiser,
    Guider,
    Schedule,
    Term,
    TrainingFree,
    guided,
    sample_renewing,
    sample_training_free,
)
from ppap_core.guidance.restoration import DiffPIR, ImplicitPrior, sample_diffpir, sample_implicit_prior
from ppap_core.guidance.shift import posterior_std
from ppap_core.guiders.operators import Measurement, likelihood_guider, squared_error_guider
from ppap_core.noise import PIXEL_SIGMA_DATA
from ppap_core.schedules import ALWAYS, falling


class Case(NamedTuple):
    """Faces to restore, and where the sampling starts."""

    denoise: Denoiser
    measurement: Measurement
    x: Tensor       # (B, 1, 40, 40) at the first noise level
    sigmas: Tensor  # of the sampler, descending to 0
    seeds: Sequence[int]


Setting = Mapping[str, Any]
Sample = Callable[[Case, Setting], Tensor]


class Method(NamedTuple):
    """A way to restore faces, and the settings that are searched."""

    sample: Sample
    points: tuple[Setting, ...] = ({},)


def with_term(make: Callable[[Measurement], Guider], through: bool, case: Case, setting: Setting) -> Tensor:
    """Faces guided by one term. Through the model, shifts are as large as the posterior variance and not as sigma^2."""
    schedule = Schedule(ramp=posterior_share) if through else ALWAYS
    term = Term(make(case.measurement), setting["weight"], schedule, backprop_through_model=through)
    return sample_renewing(guided(case.denoise, [term]), case.x, case.sigmas, setting["share"], case.seeds)


def with_new_term(through: bool, case: Case, setting: Setting) -> Tensor:
    """Faces guided by one term as nodes have it by default: balanced, from twice its weight to nothing."""
    term = Term(likelihood_guider(case.measurement), setting["weight"], falling(case.sigmas.tolist()), normalized=True,
                backprop_through_model=through)
    return sample_renewing(guided(case.denoise, [term]), case.x, case.sigmas, setting["share"], case.seeds)


def posterior_share(sigma: float) -> float:
    """Posterior variance over sigma^2, as pseudo-inverse guidance has it (Song et al. 2023)."""
    return (posterior_std(sigma, PIXEL_SIGMA_DATA) / sigma) ** 2


def with_dps(case: Case, setting: Setting) -> Tensor:
    """Faces by diffusion posterior sampling, whose step is the gradient of the distance from the measurement."""
    method = TrainingFree(rho=setting["rho"], rho_rule="distance", renewal=setting["share"])
    guider = squared_error_guider(case.measurement)
    return sample_training_free(case.denoise, guider, case.x, case.sigmas, method, case.seeds)


def with_diffpir(case: Case, setting: Setting) -> Tensor:
    """Faces by DiffPIR."""
    return sample_diffpir(case.denoise, case.measurement, case.x, case.sigmas, DiffPIR(**setting), case.seeds)


def with_implicit_prior(case: Case, setting: Setting) -> Tensor:
    """Faces by the stochastic ascent of the authors of the diffusion model."""
    return sample_implicit_prior(case.denoise, case.measurement, case.x, ImplicitPrior(0.05, **setting), case.seeds)


def without_model(case: Case, setting: Setting) -> Tensor:
    """The smallest image that has the measurement."""
    return case.measurement.pseudo_inverse(case.measurement.values, cut=0.1)


def settings(**choices: Sequence[Any]) -> tuple[Setting, ...]:
    """Settings that go through all choices of one or several values at once."""
    return tuple(dict(zip(choices, values, strict=True)) for values in zip(*choices.values(), strict=True))


OURS = settings(weight=(1, 0.7, 1, 1.5), share=(0.4, 1, 1, 1))
OURS_SQUARED = settings(weight=(6, 4, 6), share=(0.4, 1, 1))
METHODS = {
    "no model: pseudo-inverse": Method(without_model),
    "squared error, in the prediction": Method(partial(with_term, squared_error_guider, False), OURS_SQUARED),
    "squared error, through the model": Method(partial(with_term, squared_error_guider, True), OURS_SQUARED),
    "likelihood, in the prediction": Method(partial(with_term, likelihood_guider, False), OURS),
    "likelihood, through the model": Method(partial(with_term, likelihood_guider, True), OURS),
    "likelihood, balanced, in the prediction": Method(partial(with_new_term, False), settings(weight=[0.7], share=[1])),
    "likelihood, balanced, through the model": Method(partial(with_new_term, True), settings(weight=[0.3], share=[1])),
    "DPS": Method(with_dps, settings(rho=(2, 1, 2, 4), share=(0.4, 1, 1, 1))),
    "DiffPIR": Method(with_diffpir, settings(strength=(1, 0.3, 1, 4), share=(0.4, 1, 1, 1))),
    "Kadkhodaie & Simoncelli": Method(with_implicit_prior, settings(noise=(0.05, 0.1, 0.3, 0.1), cut=(0.1, 0.1, 0.1, 0.02))),
}
"""Rows of the table: two energies of ours, each with its gradient in the prediction and through the model, and others'."""
