"""Noise levels, seeded noise and the two samplers, against closed forms."""
import pytest
import torch
from helpers import randn

from ppap_core.noise import expand
from ppap_core.rng import seeded_noise
from ppap_core.sampling import karras_sigmas, sample_euler, sample_heun

SPREAD = 0.5


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The exact denoiser of images from N(0, SPREAD^2)."""
    return x * expand(SPREAD**2 / (SPREAD**2 + sigma**2), x)


def exact(x: torch.Tensor, sigma_max: float) -> torch.Tensor:
    """The end of the probability flow from sigma_max: the scale falls from sqrt(s^2 + sigma^2) to s."""
    return x * SPREAD / (SPREAD**2 + sigma_max**2) ** 0.5


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_karras_noise_levels_fall_to_the_lowest_then_zero(steps):
    sigmas = karras_sigmas(steps, 0.02, 80.0)
    assert sigmas.shape == (steps + 1,) and sigmas[-1] == 0 and bool((sigmas.diff() < 0).all())
    assert sigmas[0].item() == pytest.approx(80.0, rel=1e-6)
    if steps > 1:
        assert sigmas[-2].item() == pytest.approx(0.02, rel=1e-6)


def test_karras_noise_levels_are_even_in_the_seventh_root():
    gaps = (karras_sigmas(10, 0.02, 80.0)[:-1].double() ** (1 / 7)).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(9), rtol=1e-5, atol=0)


def test_noise_depends_on_its_own_seed_only():
    together = seeded_noise([5, 9, 2**63, 5], (3, 5, 7))
    assert together.shape == (4, 3, 5, 7)
    assert torch.equal(together[0], together[3]) and not torch.equal(together[0], together[1])
    assert torch.equal(torch.cat([seeded_noise([5], (3, 5, 7)), seeded_noise([9, 2**63], (3, 5, 7))]), together[:3])


def test_noise_does_not_touch_the_global_generator():
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    seeded_noise([1, 2], (3, 5, 7))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("sampler, order", [(sample_euler, 1), (sample_heun, 2)])
def test_a_sampler_has_its_order_of_convergence(sampler, order):
    """Twice the steps, 2^order less error."""
    x, errors = randn(2, 3, 5, 7, dtype=torch.float64) * 10, []
    for steps in (64, 128, 256):
        sigmas = torch.cat([karras_sigmas(steps, 1.0, 10.0)[:-1].double(), torch.tensor([0.99, 0.0], dtype=torch.float64)])
        # without the last step, whose jump to zero has an error of its own
        states = []
        def keep(x, sigma, states=states):
            states.append((x, float(sigma[0])))
            return gaussian(x, sigma)
        sampler(keep, x, sigmas)
        reached, sigma = states[-1]
        truth = x * ((SPREAD**2 + sigma**2) / (SPREAD**2 + 100.0)) ** 0.5
        errors.append((reached - truth).abs().max().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("sampler, tolerance", [(sample_euler, 0.08), (sample_heun, 0.005)])
def test_a_sampler_reaches_the_exact_image(sampler, tolerance):
    x = randn(2, 3, 5, 7, dtype=torch.float64) * 20
    out = sampler(gaussian, x, karras_sigmas(60, 0.01, 20.0).double())
    torch.testing.assert_close(out, exact(x, 20.0), rtol=0, atol=tolerance)


@pytest.mark.parametrize("sampler, evaluations", [(sample_euler, 6), (sample_heun, 11)])
def test_the_cost_of_a_sampling_is_known(sampler, evaluations):
    calls = []
    def count(x, sigma):
        assert sigma.shape == (2,) and float(sigma[0]) > 0
        calls.append(float(sigma[0]))
        return gaussian(x, sigma)
    sampler(count, randn(2, 3, 5, 7) * 5, karras_sigmas(6, 0.1, 5.0))
    assert len(calls) == evaluations


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_the_last_step_returns_the_prediction(sampler):
    out = sampler(lambda x, sigma: torch.full_like(x, 0.25), randn(2, 3, 5, 7) * 5, karras_sigmas(3, 0.1, 5.0))
    torch.testing.assert_close(out, torch.full_like(out, 0.25), rtol=0, atol=1e-6)
