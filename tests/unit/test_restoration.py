"""Restoration from linear measurements: operators against dense matrices, and guidance against exact posteriors."""
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import gaussian_denoise, level, randn, says
from torch import Tensor

from ppap_core.guidance.restoration import DiffPIR, ImplicitPrior, sample_diffpir, sample_implicit_prior
from ppap_core.guidance.shift import GuidanceSettings, guided
from ppap_core.guidance.terms import Term
from ppap_core.guidance.training_free import TrainingFree, sample_training_free
from ppap_core.guiders.copies import averages, blurs
from ppap_core.guiders.operators import (
    Blur,
    Downscale,
    LinearOperator,
    Mask,
    Measurement,
    Mixed,
    Partly,
    Separable,
    likelihood_guider,
    squared_error_guider,
)
from ppap_core.noise import NoiseInterval
from ppap_core.rng import seeded
from ppap_core.sampling import karras_sigmas, sample_euler, sample_renewing
from ppap_core.schedules import Schedule

B, SHAPE, SEEDS = 3, (2, 8, 12), (5, 1, 2**40)
LEVELS = torch.tensor([10.0, 3.0, 1.0, 0.3, 0.1, 0.0], dtype=torch.float64)
NOISE = 0.2
STD = 0.5  # of the data of gaussian_denoise
EXACT = {"rtol": 1e-9, "atol": 1e-9}
KEPT = (torch.arange(8 * 12).reshape(1, 1, 8, 12) % 3 > 0).double()
SMALLER = Separable(averages(8, 5), averages(12, 7) @ blurs(12, 0.8))
OPERATORS = {"mask": Mask(KEPT), "downscale": Downscale(4), "blur": Blur(1.2), "separable": SMALLER,
             "mixed": Mixed(SMALLER, (0.3, 0.6)), "partly": Partly(Downscale(4), KEPT[..., :2, :3]),
             "partly mixed": Partly(Mixed(Mask(torch.ones(1, 1, 1, 1)), (0.3, 0.6)), KEPT)}


@pytest.fixture(params=[*OPERATORS])
def operator(request: pytest.FixtureRequest) -> LinearOperator:
    return OPERATORS[request.param]


def images(seed: int = 0) -> Tensor:
    return randn(B, *SHAPE, seed=seed, dtype=torch.float64)


def measured(operator: LinearOperator) -> Measurement:
    return Measurement(operator, operator.apply(images(7)) + NOISE * operator.apply(images(8)), NOISE)


def dense(operator: LinearOperator) -> Tensor:
    """A of all values of an image, (measured, values)."""
    size = SHAPE[0] * SHAPE[1] * SHAPE[2]
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *SHAPE)
    return operator.apply(basis).flatten(1).mT


def column(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).mT


def posterior_mean(measurement: Measurement, mean: Tensor, variance: float) -> Tensor:
    """E[image | y] where the image is N(mean, variance), by a dense solve."""
    matrix = dense(measurement.operator)
    precision = matrix.mT @ matrix / NOISE**2 + torch.eye(matrix.shape[1], dtype=torch.float64) / variance
    weighed = matrix.mT @ column(measurement.values) / NOISE**2 + column(mean) / variance
    return torch.linalg.solve(precision, weighed).mT.reshape(mean.shape)


def test_the_adjoint_is_the_transposed(operator: LinearOperator):
    values = operator.apply(images())
    assert torch.allclose((values * values).sum(), (images() * operator.adjoint(values)).sum(), **EXACT)
    assert torch.allclose(column(operator.adjoint(values)), dense(operator).mT @ column(values), **EXACT)


def test_functions_of_the_gram_matrix_are_exact(operator: LinearOperator):
    values, matrix = operator.apply(images()), dense(operator)
    shifted = matrix @ matrix.mT + 0.3 * torch.eye(len(matrix), dtype=torch.float64)
    solved = operator.on_gram(values, lambda value: 1 / (value + 0.3))
    assert torch.allclose(column(solved), torch.linalg.solve(shifted, column(values)), **EXACT)


def test_the_proximal_step_solves_its_problem(operator: LinearOperator):
    measurement, image = measured(operator), images(1)
    expected = posterior_mean(measurement, image, NOISE**2 / 0.4)
    assert torch.allclose(measurement.proximal(image, 0.4), expected, **EXACT)
    assert torch.equal(measurement.proximal(image, float("inf")), image)


@pytest.mark.parametrize("name", ["mask", "downscale"])
def test_the_pseudo_inverse_has_the_measurement(name: str):
    operator = OPERATORS[name]
    values = operator.apply(images())
    measurement = measured(operator)
    smallest = measurement.pseudo_inverse(values)
    assert torch.allclose(operator.apply(smallest), values, **EXACT)
    assert torch.allclose(column(smallest), torch.linalg.pinv(dense(operator)) @ column(values), **EXACT)


def test_a_blurred_image_is_inverted_where_it_was_measured():
    measurement = measured(Blur(1.2))
    project = [measurement.pseudo_inverse(measurement.operator.apply(images()), cut) for cut in (0.0, 0.1, 2.0)]
    assert torch.allclose(project[0], images(), atol=1e-6) and not project[2].any()
    again = measurement.pseudo_inverse(measurement.operator.apply(project[1]), 0.1)
    assert torch.allclose(again, project[1], **EXACT) and not torch.allclose(project[1], images(), atol=0.1)


@pytest.mark.parametrize("through", [False, True], ids=["prediction", "through the model"])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 8.0])
def test_a_likelihood_of_weight_1_is_exact_on_gaussians(operator: LinearOperator, sigma: float, through: bool):
    measurement, x = measured(operator), images(2) * (1 + sigma)
    term = Term(likelihood_guider(measurement, STD), 1.0, backprop_through_model=through)
    given = guided(gaussian_denoise, [term])(x, level(sigma, x))
    variance = 1 / (1 / sigma**2 + 1 / STD**2)
    expected = posterior_mean(measurement, gaussian_denoise(x, level(sigma, x)), variance)
    assert torch.allclose(given, expected, **EXACT)


def test_the_squared_error_counts_every_value_of_an_image_once():
    """So that at weight 1 / r^2 the whole of what was measured is corrected, whatever is measured."""
    for name in ("mask", "downscale"):
        measurement, point = measured(OPERATORS[name]), images(2).requires_grad_()
        gradient = torch.autograd.grad(squared_error_guider(measurement).energy(point, level(1.0, point)).sum(), point)[0]
        assert torch.allclose(-gradient, measurement.pseudo_inverse(measurement.residual(point)), **EXACT)


@pytest.mark.parametrize("guider", [squared_error_guider, likelihood_guider])
def test_measurements_of_other_images_are_refused(guider: Callable):
    with says(ValueError, "for 3 images but 2 are sampled"):
        guider(measured(OPERATORS["mask"])).energy(images()[:2], torch.ones(2))


def test_a_measurement_without_noise_is_refused():
    with says(ValueError, "must be above 0, got 0"):
        Measurement(OPERATORS["mask"], images(), 0.0)


def test_diffpir_is_its_algorithm_in_its_own_notation(operator: LinearOperator):
    """alpha-bar, eps and states of the variance-preserving scale, as in algorithm 1 of the paper."""
    measurement, strength, share = measured(operator), 0.7, 0.4
    levels = LEVELS[:-1].tolist()
    kept = [(1 + sigma**2) ** -0.5 for sigma in levels]  # sqrt(alpha-bar)
    state = images(3) * levels[0] * kept[0]
    for k in range(len(levels) - 1):
        clean = gaussian_denoise(state / kept[k], level(levels[k], state))
        clean = measurement.proximal(clean, strength * NOISE**2 / levels[k] ** 2)
        eps = (state - kept[k] * clean) / (1 - kept[k] ** 2) ** 0.5
        fresh = torch.stack([torch.randn(SHAPE, generator=seeded(seed, k)) for seed in SEEDS]).double()
        noise = (1 - share) ** 0.5 * eps + share**0.5 * fresh
        state = kept[k + 1] * clean + (1 - kept[k + 1] ** 2) ** 0.5 * noise
    expected = gaussian_denoise(state / kept[-1], level(levels[-1], state))
    settings = DiffPIR(strength, share)
    given = sample_diffpir(gaussian_denoise, measurement, images(3) * levels[0], LEVELS, settings, SEEDS)
    assert torch.allclose(given, expected, **EXACT)


def test_diffpir_without_measurement_and_noise_is_plain(operator: LinearOperator):
    x, settings = images(3) * LEVELS[0], DiffPIR(float("inf"), 0.0)
    given = sample_diffpir(gaussian_denoise, measured(operator), x, LEVELS, settings, SEEDS)
    assert torch.allclose(given, sample_euler(gaussian_denoise, x, LEVELS), **EXACT)


def test_a_likelihood_term_is_diffpir_without_fresh_noise(operator: LinearOperator):
    """Where images vary without bound, r is sigma; DiffPIR leaves the last prediction alone."""
    measurement, x = measured(operator), images(3) * LEVELS[0]
    term = Term(likelihood_guider(measurement, 1e6), 1.0, Schedule(NoiseInterval(lo=0.2)))
    denoise = guided(gaussian_denoise, [term], GuidanceSettings(sigma_data=1e6))
    given = sample_diffpir(gaussian_denoise, measurement, x, LEVELS, DiffPIR(1.0, 0.0), SEEDS)
    assert torch.allclose(given, sample_euler(denoise, x, LEVELS), rtol=1e-6)


def test_the_implicit_prior_takes_its_published_steps(operator: LinearOperator):
    """With the columns of M as a basis of what was measured, and f the residual of the denoiser."""
    settings = ImplicitPrior(first_step=0.2, noise=0.3, last_sigma=0.0, cut=0.2, most=3)
    measurement, start = measured(operator), images(3) * 2
    vectors, sizes, _ = torch.linalg.svd(dense(operator).mT, full_matrices=False)
    basis = vectors[:, sizes >= 0.2**0.5 * sizes.max()]
    known = basis.mT @ column(measurement.pseudo_inverse(measurement.values, 0.2))
    state, sigma = column(start) + basis @ known, (start.square().mean((1, 2, 3)).sqrt())
    for t in range(1, 4):
        image = state.mT.reshape(start.shape)
        residual = column(gaussian_denoise(image, sigma) - image)
        change = residual - basis @ (basis.mT @ residual) + basis @ (known - basis.mT @ state)
        sigma, h = change.square().mean(0).sqrt(), 0.2 * t / (1 + 0.2 * (t - 1))
        amount = ((1 - 0.3 * h) ** 2 - (1 - h) ** 2) ** 0.5 * sigma
        noise = torch.stack([torch.randn(SHAPE, generator=seeded(seed, t)) for seed in SEEDS]).double()
        state = state + h * change + amount * column(noise)
    expected = gaussian_denoise(state.mT.reshape(start.shape), sigma)
    given = sample_implicit_prior(gaussian_denoise, measurement, start, settings, SEEDS)
    assert torch.allclose(given, expected, **EXACT)


def test_the_implicit_prior_ends_at_the_measurement():
    measurement = measured(OPERATORS["downscale"])
    settings = ImplicitPrior(first_step=0.1, noise=0.5, last_sigma=0.001)
    given = sample_implicit_prior(gaussian_denoise, measurement, images(3) * 2, settings, SEEDS)
    assert torch.allclose(measurement.operator.apply(given), measurement.values, atol=2e-3)


def test_restored_images_depend_on_their_own_seeds_alone():
    measurement, x = measured(OPERATORS["mask"]), images(3) * 2
    one = replace(measurement, values=measurement.values[1:2])
    ascent = ImplicitPrior(first_step=0.1, noise=0.5)
    for sample in (lambda given, start, seeds: sample_implicit_prior(gaussian_denoise, given, start, ascent, seeds),
                   lambda given, start, seeds: sample_diffpir(gaussian_denoise, given, start, LEVELS, DiffPIR(), seeds)):
        assert torch.allclose(sample(measurement, x, SEEDS)[1:2], sample(one, x[1:2], SEEDS[1:2]), **EXACT)


def test_dps_is_its_published_step_of_a_measurement():
    """x_(t-1) loses zeta grad |y - A x0|^2 / |y - A x0| in x_t, where x_(t-1) is a step of the sampler with fresh noise."""
    measurement, zeta, share = measured(OPERATORS["mask"]), 0.3, 0.4
    levels = LEVELS.tolist()
    kept = [(1 + sigma**2) ** -0.5 for sigma in levels]  # sqrt(alpha-bar)
    state = images(3) * levels[0] * kept[0]
    for k in range(len(levels) - 1):
        point = state.clone().requires_grad_()
        clean = gaussian_denoise(point / kept[k], level(levels[k], point))
        distance = measurement.residual(clean).flatten(1).norm(dim=1)
        gradient = torch.autograd.grad(distance.square().sum(), point)[0] / distance.detach().reshape(-1, 1, 1, 1)
        eps = ((point - kept[k] * clean) / (1 - kept[k] ** 2) ** 0.5).detach()
        fresh = torch.stack([torch.randn(1, *SHAPE, generator=seeded(seed, k, 0, 2))[0] for seed in SEEDS]).double()
        noise = (1 - share) ** 0.5 * eps + share**0.5 * fresh
        state = kept[k + 1] * clean.detach() + (1 - kept[k + 1] ** 2) ** 0.5 * noise - zeta * gradient
    method = TrainingFree(rho=zeta * 2**0.5, rho_rule="distance", renewal=share)
    guider = squared_error_guider(measurement)
    given = sample_training_free(gaussian_denoise, guider, images(3) * LEVELS[0], LEVELS, method, SEEDS)
    assert torch.allclose(given, state, **EXACT)


def test_renewed_noise_keeps_the_distribution_of_a_gaussian():
    """Euler's steps from 20 to 0.05 end at 0.5 times noise, whatever is drawn anew."""
    x, seeds = randn(64, *SHAPE, seed=3, dtype=torch.float64) * 20, range(64)
    sigmas = karras_sigmas(60, 0.05, 20.0)
    assert torch.equal(sample_renewing(gaussian_denoise, x, sigmas, 0.0, seeds), sample_euler(gaussian_denoise, x, sigmas))
    images = [sample_renewing(gaussian_denoise, x, sigmas, share, seeds) for share in (0.0, 0.2)]
    assert all(abs(float(image.std()) - 0.5) < 0.03 for image in images) and not torch.allclose(*images, atol=0.5)
