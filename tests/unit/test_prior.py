"""The prior finds exact modes, each image for itself, and a stopped search goes on as if it had not stopped."""
import math
from dataclasses import replace

import pytest
import torch
from helpers import gaussian_denoise, level, randn, says, small_guider
from helpers.gaussian import GaussianMixture
from torch import Tensor

from ppap_core.guidance import prior
from ppap_core.guidance.prior import (
    PriorConfig,
    PriorGradient,
    PriorObjective,
    best_of,
    optimize_images,
    prior_gradient,
    renoise_and_sample,
    repeat_term,
    run_prior,
    sigma_schedule,
)
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import Guider, IgnoreSigma
from ppap_core.guiders.rules import rule_guider
from ppap_core.noise import NoiseInterval
from ppap_core.schedules import ALWAYS, Schedule
from ppap_core.training.loop import RunOptions

SHAPE = (3, 5, 4)
EXACT = PriorConfig(learning_rate=0.2, sigma_min=0.02)  # with opposite_noise
SHORT = PriorConfig(steps=12, learning_rate=0.5)
WAYS = {"score distillation": {}, "through the model": {"backprop_through_model": True}}


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    return GaussianMixture.of_shape(SHAPE)


@pytest.fixture
def opposite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gradient is the mean over two opposite draws of noise: a search then ends at a mode, not at a sample near it."""
    def mean_of_both(objective, image: Tensor, noise: Tensor, *settings) -> PriorGradient:
        draws = [prior_gradient(objective, image, sign * noise, *settings) for sign in (1, -1)]
        return PriorGradient(*(sum(parts) / 2 for parts in zip(*draws, strict=True)))
    monkeypatch.setattr(prior, "prior_gradient", mean_of_both)


def starts(count: int = 20) -> Tensor:
    return randn(count, *SHAPE, seed=3, dtype=torch.float64)


def solve(denoise, terms, start: Tensor, config: PriorConfig = SHORT, **more) -> Tensor:
    return run_prior(PriorObjective(denoise, terms, 1.0), start, config, range(70, 70 + len(start)), **more)[0]


def observed(value: Tensor, error: float) -> Guider:
    """-log of the likelihood of a value (1, h, w) of the first channel that was measured with an error."""
    class Measured(torch.nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image[:, :1] / error / (image[0].numel() / value.numel()) ** 0.5  # the task averages, then counts values
    scale = 1 / error / (SHAPE[0] * SHAPE[1] * SHAPE[2] / value.numel()) ** 0.5
    return Guider("measured", IgnoreSigma(Measured()), lambda image: image, "features", target=value[None] * scale)


# Exact modes

@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("label", [0, 2])
def test_every_start_ends_at_the_exact_mode_of_the_class(mixture, opposite_noise, way, label):
    term = Term(mixture.guider().aim(torch.tensor([label])))
    ends = solve(mixture, [term], starts(), replace(EXACT, **way))
    assert (ends - mixture.means[label]).flatten(1).norm(dim=1).max() < 0.01  # the means are about ten apart


def test_every_start_ends_at_the_exact_mode_given_a_measurement(mixture, opposite_noise):
    """The posterior of each Gaussian is a Gaussian again; the measurement is nearest to the second."""
    value, error = mixture.means[1][:1] + 0.2, 0.4
    tight, loose = 1 / mixture.width**2, 1 / error**2
    mode = mixture.means[1].clone()
    mode[0] = ((tight * mixture.means[1][0] + loose * value) / (tight + loose))[0]
    at_first = mixture.means[1:2] + 0.5 * starts()  # far off, but of the second: others have modes of their own
    ends = solve(mixture, [Term(observed(value, error))], at_first, replace(EXACT, sigma_max=1.0))
    assert (ends - mode).abs().max() < 0.01
    assert (mode - mixture.means[1]).abs().max() > 0.05


def test_without_terms_every_start_ends_at_some_mode(mixture, opposite_noise):
    ends = solve(mixture, [], starts(), EXACT)
    distances = (ends[:, None] - mixture.means).flatten(2).norm(dim=2)
    assert distances.min(1).values.max() < 0.01
    assert len(distances.argmin(1).unique()) > 1


@pytest.mark.parametrize("sigma", [0.05, 0.5, 7.0])
def test_the_prior_gradient_is_that_of_log_p_for_gaussians(sigma):
    """-log p of x is (image - mean) / (spread^2 + sigma^2) in the mean over the noise, which opposite draws are."""
    image, noise = randn(2, 3, 5, 4, dtype=torch.float64), randn(2, 3, 5, 4, seed=1, dtype=torch.float64)
    wanted = image / (0.25 + sigma**2)  # of `gaussian_denoise`: mean 0, spread 0.5
    for through in (False, True):
        both = [prior_gradient(PriorObjective(gaussian_denoise), image, draw, level(sigma, image), through).gradient
                for draw in (noise, -noise)]
        assert torch.allclose(sum(both) / 2, wanted, rtol=1e-9)


def test_the_gradient_through_the_model_is_that_of_the_error(mixture):
    image, noise, sigma, step = starts(1), randn(1, *SHAPE, seed=8, dtype=torch.float64), 0.8, 1e-5
    direction, objective = randn(1, *SHAPE, seed=9, dtype=torch.float64), PriorObjective(mixture, sigma_data=1.0)

    def error(point: Tensor) -> float:
        return prior_gradient(objective, point, noise, level(sigma, point), True).error.item() * point.numel()
    slope = (error(image + step * direction) - error(image - step * direction)) / (2 * step)
    gradient = prior_gradient(objective, image, noise, level(sigma, image), True).gradient
    scale = (1 + 1 / sigma**2) / 2  # to -log p of a Gaussian
    assert math.isclose(slope * scale, (gradient * direction).sum().item(), rel_tol=1e-6)


# Constraints

def test_terms_that_are_not_there_change_nothing(mixture):
    guider, start = mixture.guider().aim(torch.tensor([1])), starts(3)
    free, mask = solve(mixture, [], start), torch.zeros(1, 1, *SHAPE[1:])
    for term in (Term(guider, 0.0), Term(guider, 1.0, Schedule(NoiseInterval(100.0))), Term(guider, 1.0, mask=mask)):
        assert torch.equal(solve(mixture, [term], start), free)
    assert not torch.equal(solve(mixture, [Term(guider)], start), free)


def test_a_normalized_term_pulls_weight_times_the_prior():
    """A normalized term pulls weight times as hard as the prior, whatever its energy."""
    image, noise, sigma = randn(3, 3, 20, 28), randn(3, 3, 20, 28, seed=4), torch.full((3,), 0.7)
    mask = torch.zeros(1, 1, 20, 28)
    mask[..., :9] = 1

    def gradient(*terms: Term) -> Tensor:
        return prior_gradient(PriorObjective(gaussian_denoise, terms), image, noise, sigma).gradient

    free = gradient()
    size = free.square().flatten(1).mean(1).sqrt()
    for weight in (1.0, 2.5):
        everywhere, inside = (gradient(Term(small_guider(), weight, normalized=True, mask=each)) - free
                              for each in (None, mask))
        assert torch.allclose(everywhere.square().flatten(1).mean(1).sqrt(), weight * size, rtol=1e-4)
        assert inside[..., 9:].abs().max() == 0
        assert torch.allclose(inside[..., :9].square().flatten(1).mean(1).sqrt(), weight * size, rtol=1e-4)


def test_a_rule_is_obeyed_and_the_window_says_when(mixture, opposite_noise):
    rule, start = rule_guider("symmetry left-right"), starts(4)

    def asymmetry(schedule: Schedule) -> float:
        ends = solve(mixture, [Term(rule, 2.0, schedule, normalized=True)], start, replace(EXACT, steps=150))
        return (ends - ends.flip(3)).abs().mean().item()
    free = asymmetry(Schedule(NoiseInterval(100.0)))
    assert asymmetry(ALWAYS) < 0.2 * free
    assert asymmetry(Schedule(NoiseInterval(5.0))) > 0.8 * free  # what was symmetric at high noise is so no more


def test_half_of_a_mask_steers_half_of_the_image():
    guider, mask = rule_guider("brightness").aim(torch.tensor([[1.0]])), torch.zeros(1, 1, 6, 8)
    mask[..., :4] = 1
    start = randn(2, 3, 6, 8)
    free, half = (solve(gaussian_denoise, terms, start) for terms in ([], [Term(guider, 1.0, mask=mask)]))
    assert torch.equal(half[..., 4:], free[..., 4:])
    assert (half[..., :4] > free[..., :4]).float().mean() > 0.9


def test_any_parameters_of_an_image_may_be_optimized(mixture, opposite_noise):
    start, term = starts(3), Term(mixture.guider().aim(torch.tensor([2])))
    plain = solve(mixture, [term], start)
    assert torch.equal(solve(mixture, [term], start, render=lambda point: point), plain)
    folded = solve(mixture, [term], start.flatten(1), render=lambda point: point.unflatten(1, SHAPE))
    assert torch.equal(folded, plain.flatten(1))
    corner = randn(4, 2, seed=6, dtype=torch.float64)  # two numbers make the whole image: a mean and its opposite
    drawn = solve(mixture, [Term(mixture.guider().aim(torch.tensor([3])))], corner, EXACT,
                  render=lambda point: (point.softmax(1)[..., None, None, None] * mixture.means[[1, 3]]).sum(1))
    assert (drawn.softmax(1)[:, 1] > 0.99).all()


# Each image for itself, and what is kept

def test_an_image_does_not_depend_on_the_others(mixture):
    start = starts(3)
    guider = mixture.guider().aim(torch.tensor([1, 2, 0]))
    together = solve(mixture, [Term(guider)], start)
    for i in range(3):
        term = Term(guider.aim(guider.target[i:i + 1]))
        alone, _ = run_prior(PriorObjective(mixture, [term], 1.0), start[i:i + 1], SHORT, [70 + i])
        assert torch.allclose(together[i:i + 1], alone, atol=1e-9)


def test_other_seeds_find_other_images(mixture):
    a, b = (run_prior(PriorObjective(mixture), starts(2), SHORT, seeds)[0] for seeds in ([1, 2], [1, 3]))
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])


@pytest.mark.parametrize("stop", [0, 4, 11])
def test_a_stopped_search_goes_on_as_if_it_had_not_stopped(mixture, tmp_path, stop):
    term, start = Term(mixture.guider().aim(torch.tensor([1]))), starts(2)
    objective = PriorObjective(mixture, [term])
    whole, losses = run_prior(objective, start, SHORT, [5, 6])

    def cancel(step: int, parts: list[float], points: Tensor) -> None:
        assert len(parts) == 2
        assert points.shape == start.shape
        if step == stop:
            raise KeyboardInterrupt
    state = tmp_path / "prior.state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run_prior(objective, start, SHORT, [5, 6], options=RunOptions(state_file=state, on_step=cancel))
    again, same = run_prior(objective, start, SHORT, [5, 6], options=RunOptions(state_file=state))
    assert torch.equal(again, whole)
    assert same == losses
    assert len(losses) == SHORT.steps
    with says(ValueError, "another", "seeds"):
        run_prior(objective, start, SHORT, [5, 7], options=RunOptions(state_file=state))


def test_it_works_in_inference_mode_and_leaves_the_start_alone():
    start = randn(2, 3, 20, 28)
    before, term = start.clone(), Term(small_guider(), 0.5, normalized=True)
    outside = solve(gaussian_denoise, [term], start)
    with torch.inference_mode():
        inside = solve(gaussian_denoise, [term], start.clone())
    assert torch.equal(inside, outside)
    assert torch.equal(start, before)
    assert not outside.requires_grad


# Noise levels, the end, particles

def test_noise_levels_fall_and_swing_between_their_ends(monkeypatch: pytest.MonkeyPatch):
    swinging = sigma_schedule(PriorConfig(steps=40))
    monkeypatch.setattr(prior, "WAVE", 0.0)
    falling = sigma_schedule(PriorConfig(steps=40))
    assert falling == sorted(falling, reverse=True)
    assert math.isclose(falling[0], 10.0)
    assert math.isclose(falling[-1], 0.05)
    ratios = [a / b for a, b in zip(falling, falling[1:], strict=False)]
    assert math.isclose(min(ratios), max(ratios))
    assert swinging != sorted(swinging, reverse=True)
    assert min(swinging) == swinging[-1] == 0.05
    assert max(swinging) <= 10.0
    assert sigma_schedule(PriorConfig(steps=1)) == [10.0]


def test_renoising_samples_from_its_noise_level(mixture):
    """Renoising samples from the level of the added noise, and does nothing at zero."""
    image = starts(3)
    assert renoise_and_sample(mixture, image, 0.0, 0.02, 8, [1, 2, 3]) is image
    tidy = renoise_and_sample(mixture, image, 4.0, 0.02, 16, [1, 2, 3])
    distances = ((tidy[:, None] - mixture.means).flatten(2).norm(dim=2)).min(1).values
    assert distances.max() < 4 * mixture.width * math.sqrt(math.prod(SHAPE))
    assert torch.equal(renoise_and_sample(mixture, image[1:2], 4.0, 0.02, 16, [2]), tidy[1:2])


def test_of_several_particles_the_one_of_least_energy_is_kept():
    images = torch.arange(6.0).reshape(6, 1)  # three particles of two images
    energies = torch.tensor([3.0, 0.5, 1.0, 4.0, 2.0, 0.4])
    assert best_of(images, energies, 3).flatten().tolist() == [2.0, 5.0]
    assert torch.equal(best_of(images, energies, 1), images)


def test_particles_share_target_and_mask_of_their_image(mixture):
    """Each particle has an energy of its own."""
    targets, masks = torch.tensor([1, 2]), randn(2, 1, *SHAPE[1:], seed=2).sigmoid()
    term = repeat_term(Term(mixture.guider().aim(targets), 0.5, mask=masks), 3)
    assert term.guider.target.tolist() == [1, 2, 1, 2, 1, 2]
    assert torch.equal(term.mask, masks.repeat(3, 1, 1, 1))
    images = torch.cat([mixture.means[[1, 2]], mixture.means[[2, 1]], mixture.means[[1, 3]]])
    energies = PriorObjective(mixture, [term]).energy(images)
    assert energies.shape == (6,)
    assert energies[[0, 1, 4]].max() < 1e-6 < 1 < energies[[2, 3, 5]].min()
    assert torch.equal(best_of(images, energies, 3), mixture.means[[1, 2]])
    one = Term(mixture.guider().aim(torch.tensor([1])))
    assert repeat_term(one, 3).guider.target.tolist() == [1]


# Faults

@pytest.mark.parametrize("wrong", [{"sigma_min": 0.0}, {"sigma_min": 20.0}, {"steps": 0}, {"sigma_max": math.inf}])
def test_wrong_noise_levels_are_refused(wrong):
    with says(ValueError, "sigma_min", *map(str, wrong.values())):
        PriorConfig(**wrong)


def test_a_wrong_number_of_seeds_is_refused(mixture):
    with says(ValueError, "3 seeds", "2 images"):
        run_prior(PriorObjective(mixture), starts(2), SHORT, [1, 2, 3])


def test_a_wrong_number_of_seeds_for_a_whole_search_is_refused():
    with says(ValueError, "3 seeds", "4 images"):
        optimize_images(PriorObjective(lambda x, sigma: x), torch.zeros(2, 1, 1, 2), PriorConfig(2, particles=2), [1, 2, 3])


def test_a_model_without_gradients_is_refused_on_demand():
    """Gradients of the model are needed only where the search goes through it."""
    closed = torch.no_grad()(gaussian_denoise)
    start = randn(1, 3, 5, 4)
    assert solve(closed, [], start).shape == start.shape
    with says(ValueError, "no gradient"):
        solve(closed, [], start, replace(SHORT, backprop_through_model=True))


def test_a_model_that_answers_nonsense_stops_the_search_in_words():
    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = gaussian_denoise(x, sigma)
        denoised[1] = float("nan")
        return denoised
    with says(ValueError, "the prior", "nan"):
        solve(broken, [], randn(2, 3, 5, 4))


def test_images_that_end_as_nan_are_not_handed_out():
    """The search is fine, and the sampling after it breaks."""
    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        return gaussian_denoise(x, sigma) * (float("nan") if float(sigma[0]) == 3.0 else 1.0)
    config = replace(SHORT, sigma_max=2.0, renoise_sigma=3.0, renoise_steps=2)
    with says(ValueError, "not finite", "lower"):
        optimize_images(PriorObjective(broken), randn(1, 3, 5, 4), config, [1])
