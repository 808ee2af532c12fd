"""Guidance as a shift of the prediction. The central test is the first one; the rest are invariants and faults."""
import logging
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers import EXAMPLES, VIEWS, B, H, W, disturb, images, level, randn, says, small_guider
from helpers.gaussian import GaussianMixture
from torch import Tensor

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.guidance.gradients import HALF, Prediction, Vjp, energy_gradient, predict, slice_guider
from ppap_core.guidance.shift import Guidance, GuidanceSettings, guidance_shift, guided
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import Guider, IgnoreSigma
from ppap_core.guiders.rules import rule_guider
from ppap_core.guiders.tasks import TASKS
from ppap_core.noise import EVERYWHERE, NoiseInterval, expand, flow_to_ve
from ppap_core.rng import seeded_noise
from ppap_core.sampling import karras_sigmas, sample_euler, sample_heun
from ppap_core.schedules import ExpertSchedule, Ramp, Schedule

SHAPE = (3, 5, 7)
LEVELS = [0.05, 0.4, 2.0, 10.0]
EXACT = {"rtol": 0, "atol": 1e-12}


def mixture() -> GaussianMixture:
    """Classes that overlap, so that the exact classifier is unsure at every noise level of the tests."""
    whole = GaussianMixture.of_shape(SHAPE)
    return GaussianMixture(0.3 * whole.means, whole.width)


def state(sigma: float, seed: int = 3) -> torch.Tensor:
    """Noisy states half way between two classes."""
    means = mixture().means
    return (means[0] + means[1]) / 2 + sigma * randn(B, *SHAPE, seed=seed, dtype=torch.float64)


def smooth(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A denoiser of a single Gaussian, for pictures."""
    return x * expand(0.25 / (0.25 + sigma**2), x)


def situation(sigma: float = 1.5, count: int = B, dtype: torch.dtype = torch.float32):
    """State, noise level and prediction of a picture model."""
    x = images(count, dtype=dtype) + sigma * randn(count, 3, H, W, seed=9, dtype=dtype)
    return x, level(sigma, x), smooth(x, level(sigma, x))


def guide(terms: Sequence[Term], x: Tensor, sigma: Tensor, denoised: Tensor, vjp: Vjp | None = None,
          **settings) -> Guidance | None:
    return guidance_shift(terms, Prediction(x, sigma, denoised, vjp), GuidanceSettings(**settings))


def gradient_at(guider: Guider, x: Tensor, sigma: Tensor, denoised: Tensor,
                compute_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    return energy_gradient(guider, x if guider.view == "noisy" else denoised, sigma, compute_dtype)


# The oracle

@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("label", [0, 1, 3])
def test_weight_one_gives_the_exact_conditional_denoiser(sigma, label):
    """An exact denoiser and an exact classifier give the exact conditional denoiser."""
    world, x = mixture(), state(sigma)
    denoise = guided(world, [Term(world.guider().aim(torch.tensor([label])))])
    expected = world.denoise_class(x, level(sigma, x), label)
    torch.testing.assert_close(denoise(x, level(sigma, x)), expected, **EXACT)
    if sigma < 5:
        assert (world(x, level(sigma, x)) - expected).abs().max() > 1e-3  # and guidance had something to do


def test_each_image_of_a_batch_is_guided_to_its_own_class():
    world, x, labels = mixture(), state(0.8), [3, 0, 2]
    out = guided(world, [Term(world.guider().aim(torch.tensor(labels)))])(x, level(0.8, x))
    for i, label in enumerate(labels):
        expected = world.denoise_class(x, level(0.8, x), label)[i]
        torch.testing.assert_close(out[i], expected, **EXACT)


@pytest.mark.parametrize("sampler", [sample_heun, sample_euler])
def test_a_whole_guided_sampling_is_the_sampling_of_the_class(sampler):
    world, sigmas = mixture(), karras_sigmas(12, 0.02, 20.0).double()
    x = seeded_noise(range(B), SHAPE).double() * sigmas[0]
    out = sampler(guided(world, [Term(world.guider().aim(torch.tensor([2])))]), x, sigmas)
    expected = sampler(lambda x, sigma: world.denoise_class(x, sigma, 2), x, sigmas)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    assert (sampler(world, x, sigmas) - expected).abs().max() > 0.1


def test_the_shift_of_a_flow_model_is_the_same_step():
    """t^2 / (1 - t) times the gradient in the flow's state is sigma^2 times the gradient in the VE state."""
    world, t = mixture(), torch.full((B,), 0.6, dtype=torch.float64)
    flow = 0.4 * state(0.0) + 0.6 * randn(B, *SHAPE, dtype=torch.float64)
    guider = world.guider().aim(torch.tensor([1]))
    x, sigma = flow_to_ve(flow, t)
    shift = guide([Term(guider)], x, sigma, world(x, sigma)).delta
    point = flow.clone().requires_grad_()
    energy = -world.log_likelihood(flow_to_ve(point, t)[0], sigma).log_softmax(1)[:, 1]
    gradient = torch.autograd.grad(energy.sum(), point)[0]
    torch.testing.assert_close(shift, -(0.6**2 / 0.4) * gradient, **EXACT)
    torch.testing.assert_close(world(x, sigma) + shift, world.denoise_class(x, sigma, 1), **EXACT)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.usefixtures("linear")
def test_the_denoised_view_is_exact_for_gaussians(sigma):
    """With prior N(0, s^2) and E = <a, image> the posterior mean moves by -Cov(image | x) a = -r^2 a."""
    spread = 0.7
    def denoise(x, sigma):
        return x * expand(spread**2 / (spread**2 + sigma**2), x)
    a, x = randn(1, 3, H, W, seed=2, dtype=torch.float64), randn(B, 3, H, W, dtype=torch.float64) * sigma
    out = guided(denoise, [Term(linear_guider(a), 1.3)], GuidanceSettings(spread))(x, level(sigma, x))
    variance = 1 / (1 / spread**2 + 1 / sigma**2)
    torch.testing.assert_close(out, denoise(x, level(sigma, x)) - 1.3 * variance * a, **EXACT)


def linear_guider(a: torch.Tensor):
    """E = <a, image> for the prediction."""
    guider = replace(small_guider("depth"), net=lambda image, sigma: image, preprocess=lambda image: image)
    return replace(guider, task="linear", target=a)


@pytest.fixture
def linear(monkeypatch):
    energy = replace(TASKS["depth"], loss=lambda output, target: (output * target).flatten(1).sum(1))
    monkeypatch.setattr("ppap_core.guiders.guider.TASKS", TASKS | {"linear": energy})


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.usefixtures("linear")
def test_gradients_through_the_model_are_exact_for_gaussians(sigma):
    """With prior N(0, S) the posterior mean moves by -Cov(image | x) a, and sigma^2 dD/dx is that covariance."""
    draws = randn(3 * 5 * 7, 20, seed=7, dtype=torch.float64)
    covariance = draws @ draws.T / 20 + 0.01 * torch.eye(3 * 5 * 7, dtype=torch.float64)
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(len(covariance), dtype=torch.float64))
    def denoise(x, sigma):
        return (x.flatten(1) @ gain).view_as(x)
    a, x = randn(1, *SHAPE, seed=2, dtype=torch.float64), randn(B, *SHAPE, dtype=torch.float64) * sigma
    out = guided(denoise, [Term(linear_guider(a), 1.3, backprop_through_model=True)])(x, level(sigma, x))
    moved = (sigma**2 * a.flatten(1) @ gain).view_as(a)
    torch.testing.assert_close(out, denoise(x, level(sigma, x)) - 1.3 * moved, rtol=0, atol=1e-10)


# Gradients and what a guider looks at

@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("view", VIEWS)
def test_the_gradient_is_the_finite_difference_of_the_energy(view, task):
    guider = small_guider(task, view, dtype=torch.float64)
    x, sigma, denoised = situation(dtype=torch.float64)
    energy, gradient = gradient_at(guider, x, sigma, denoised)
    direction, step = randn(B, 3, H, W, seed=4, dtype=torch.float64), 1e-5
    def moved(by):
        point = (x if view == "noisy" else denoised) + by * direction
        seen = point / math.sqrt(1 + 1.5**2) if view == "noisy" else point
        return guider.energy(seen, sigma)
    torch.testing.assert_close(energy, moved(0), **EXACT)
    slope = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope, (moved(step) - moved(-step)) / (2 * step), rtol=1e-5, atol=1e-8)


def wavy(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A denoiser that mixes pixels and is not linear."""
    return torch.tanh(x.roll(1, -1) + 0.3 * x * x.flip(-2)) * expand(1 / (1 + sigma), x)


@pytest.mark.parametrize("task", TASKS)
def test_gradients_through_the_model_are_finite_differences(task):
    """The gradient through the model is a finite difference of the energy of its prediction."""
    guider = small_guider(task, "denoised", dtype=torch.float64)
    x, sigma, _ = situation(dtype=torch.float64)
    shift = guidance_shift([Term(guider, backprop_through_model=True)], predict(wavy, x, sigma, with_vjp=True)).delta
    direction, step = randn(B, 3, H, W, seed=4, dtype=torch.float64), 1e-5
    def moved(by):
        return guider.energy(wavy(x + by * direction, sigma), sigma)
    slope = -(shift * direction).flatten(1).sum(1) / 1.5**2
    torch.testing.assert_close(slope, (moved(step) - moved(-step)) / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("share", [True, False])
def test_a_gradient_through_the_model_may_be_large_or_small(share):
    """A balanced step has the size it was given; a raw one scales with the gradient, and half precision keeps both."""
    x, sigma, _ = situation()
    def scaled(factor, dtype):
        def denoise(x, sigma):
            return (x.to(dtype) * factor).to(x)
        term = Term(small_guider(), 0.5, normalized=share, backprop_through_model=True)
        return guided(denoise, [term])(x, sigma) - denoise(x, sigma)
    for factor in (1e-4, 1.0):
        full, half = scaled(factor, torch.float32), scaled(factor, torch.float16)
        torch.testing.assert_close(half, full, rtol=0.05, atol=0.02 * float(full.abs().max()))
        assert full.abs().max() > 0


@pytest.mark.parametrize("term", [Term(small_guider(), 0.0, backprop_through_model=True),
                                  Term(small_guider(view="noisy"), backprop_through_model=True),
                                  Term(small_guider(), 1.0, Schedule(NoiseInterval(0, 0.1)), backprop_through_model=True)])
def test_a_model_that_need_not_be_gone_through_is_not(term):
    x, sigma, _ = situation()
    asked = []
    def denoise(x, sigma):
        asked.append(x.requires_grad)
        return smooth(x, sigma)
    out = guided(denoise, [term])(x, sigma)
    assert asked == [False] and torch.equal(out, guided(smooth, [replace(term, backprop_through_model=False)])(x, sigma))


def test_each_image_goes_through_the_model_for_itself():
    x, sigma, _ = situation()
    denoise = guided(wavy, [Term(small_guider(), 0.5, normalized=True, backprop_through_model=True),
                            Term(small_guider("depth"), 2.0)])
    together = denoise(x, sigma)
    for i in range(B):
        torch.testing.assert_close(denoise(x[i:i + 1], sigma[i:i + 1])[0], together[i], rtol=1e-4, atol=1e-6)


def test_gradients_through_the_model_in_inference_mode():
    """They leave no gradient behind."""
    term, (x, sigma, _) = Term(small_guider(), 0.5, normalized=True, backprop_through_model=True), situation()
    expected = guided(wavy, [term])(x, sigma)
    assert not expected.requires_grad
    with torch.inference_mode():
        x, sigma, _ = situation()
        assert torch.equal(guided(wavy, [term])(x, sigma) + 0, expected)


def test_a_model_that_cannot_be_gone_through_is_said_in_words():
    x, sigma, denoised = situation()
    with says(ValueError, "lets no gradient through", "torch.no_grad"):
        guided(torch.no_grad()(smooth), [Term(small_guider(), backprop_through_model=True)])(x, sigma)
    with says(ValueError, "has no vjp"):
        guide([Term(small_guider(), backprop_through_model=True)], x, sigma, denoised)


def test_each_view_sees_its_own_image_only():
    """The noisy view does not see the prediction, nor the denoised view the noisy state."""
    x, sigma, denoised = situation()
    for view in VIEWS:
        terms = [Term(small_guider(view=view))]
        first = guide(terms, x, sigma, denoised).delta
        other_state = guide(terms, x + 1, sigma, denoised).delta
        other_prediction = guide(terms, x, sigma, denoised + 1).delta
        assert torch.equal(first, other_state) is (view == "denoised")
        assert torch.equal(first, other_prediction) is (view == "noisy")


@pytest.mark.parametrize("view", VIEWS)
def test_guidance_lowers_the_energy(view):
    guider = small_guider(view=view)
    x, sigma, denoised = situation(0.5)
    shift = guide([Term(guider, 0.05)], x, sigma, denoised)
    before, after = (gradient_at(guider, x + more, sigma, denoised + more)[0] for more in (0.0, shift.delta))
    assert torch.equal(shift.records[0].energy, before) and bool((after < before).all())


# Neutral values

@pytest.mark.parametrize("term", [
    {"weight": 0.0},
    {"schedule": Schedule(NoiseInterval(2.0, 3.0))},
    {"schedule": Schedule(NoiseInterval(0.0, 1.5))},   # half-open: ends just below
    {"mask": torch.zeros(1, 1, H, W)},
    {"schedule": Schedule(ramp=lambda sigma: 0.0)},
])
def test_an_idle_term_changes_no_bit(term):
    """A term that is switched off changes no bit, and its network is not run."""
    def fail(image, sigma):
        raise AssertionError("the network was run")
    x, sigma, denoised = situation()
    denoise = guided(lambda x, sigma: denoised, [Term(replace(small_guider(), net=fail), **term)])
    assert denoise(x, sigma) is denoised
    assert guide([Term(replace(small_guider(), net=fail), **term)], x, sigma, denoised) is None


def test_no_term_is_no_guidance():
    x, sigma, denoised = situation()
    assert guided(lambda x, sigma: denoised, [])(x, sigma) is denoised


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("settings", [
    {"schedule": Schedule(NoiseInterval(1.5, 2.0))},
    {"mask": torch.ones(1, 1, H, W)},
    {"mask": torch.ones(B, 1, H, W)},
    {"schedule": Schedule(ramp=Ramp(NoiseInterval(0.1, 10.0), 1.0, 1.0))},
    {"substeps": 1},
])
def test_a_neutral_setting_changes_no_bit(view, settings):
    x, sigma, denoised = situation()
    plain = guide([Term(small_guider(view=view), 2.0)], x, sigma, denoised)
    other = guide([Term(small_guider(view=view), 2.0, **settings)], x, sigma, denoised)
    assert torch.equal(other.delta, plain.delta)


def test_a_limit_above_the_size_of_the_shift_changes_no_bit():
    x, sigma, denoised = situation()
    terms = [Term(small_guider(), 2.0)]
    assert torch.equal(guide(terms, x, sigma, denoised, max_rms=100.0).delta,
                       guide(terms, x, sigma, denoised).delta)


# Sub-steps

@pytest.mark.parametrize("normalized", [False, True])
def test_sub_steps_start_where_the_last_one_led(normalized):
    x, sigma, denoised = situation()
    term, point = Term(small_guider(), 0.9, normalized=normalized, substeps=3), denoised
    for _ in range(3):
        point = point + guide([replace(term, weight=0.3, substeps=1)], x, sigma, point).delta
    found = guide([term], x, sigma, denoised)
    torch.testing.assert_close(found.delta, point - denoised)
    assert torch.equal(found.records[0].energy, term.guider.energy(denoised, sigma))
    assert not torch.allclose(found.delta, guide([replace(term, substeps=1)], x, sigma, denoised).delta, rtol=0.01)


def test_sub_steps_ask_the_model_once_and_its_vjp_each_time():
    x, sigma, _ = situation()
    predicted = predict(wavy, x, sigma, with_vjp=True)
    pulled = []
    def vjp(gradient):
        pulled.append(gradient)
        return predicted.vjp(gradient)
    term = Term(small_guider(), 0.5, normalized=True, backprop_through_model=True, substeps=4)
    assert guide([term], x, sigma, predicted.denoised, vjp).delta.isfinite().all()
    assert len(pulled) == 4 and not torch.equal(pulled[0], pulled[3])


def test_the_noisy_view_has_no_sub_steps():
    """Its state does not move within a step."""
    asked, guider = [], small_guider(view="noisy")
    def net(image, sigma):
        asked.append(1)
        return guider.net(image, sigma)
    x, sigma, denoised = situation()
    terms = [Term(replace(guider, net=net), 0.7, substeps=count) for count in (1, 5)]
    one, five = (guide([term], x, sigma, denoised).delta for term in terms)
    assert torch.equal(one, five) and len(asked) == 2


def test_a_shift_of_no_part_is_refused():
    with says(ValueError, "0 sub-steps", "1 for none"):
        Term(small_guider(), substeps=0)


# Combining

@pytest.mark.parametrize("view", VIEWS)
def test_the_shift_is_proportional_to_the_weight(view):
    x, sigma, denoised = situation()
    one, three = (guide([Term(small_guider(view=view), w)], x, sigma, denoised).delta for w in (1.0, -3.0))
    torch.testing.assert_close(three, -3 * one)


def test_two_terms_are_the_sum_of_each():
    x, sigma, denoised = situation()
    mask = torch.zeros(1, 1, H, W)
    mask[..., : W // 3] = 1
    terms = [Term(small_guider("class", "noisy"), 0.7), Term(small_guider("depth", "denoised"), 2.0, mask=mask)]
    both = guide(terms, x, sigma, denoised)
    single = [guide([term], x, sigma, denoised) for term in terms]
    torch.testing.assert_close(both.delta, single[0].delta + single[1].delta)
    assert [record.term for record in both.records] == [0, 1]
    for record, alone in zip(both.records, single, strict=True):
        assert torch.equal(record.energy, alone.records[0].energy) and record.sigma == 1.5
        torch.testing.assert_close(record.rms, alone.delta.square().mean(dim=(1, 2, 3)).sqrt())


def test_a_term_that_is_off_keeps_the_places_of_the_others():
    x, sigma, denoised = situation()
    terms = [Term(small_guider("class"), 0.0), Term(small_guider("depth"))]
    assert [record.term for record in guide(terms, x, sigma, denoised).records] == [1]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("task", TASKS)
def test_an_image_in_a_batch_is_guided_as_it_is_alone(task, view):
    guider = small_guider(task, view)
    guider = guider.aim(torch.cat([guider.target, guider.target.flip(-1) + (task == "class"), guider.target]))
    x, sigma, denoised = situation()
    together = guide([Term(guider, 3.0)], x, sigma, denoised, max_rms=0.01)
    for i in range(B):
        one = slice(i, i + 1)
        alone = guide([Term(guider.aim(guider.target[one]), 3.0)], x[one], sigma[one], denoised[one], max_rms=0.01)
        torch.testing.assert_close(together.delta[one], alone.delta, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(together.records[0].rms[one], alone.records[0].rms, rtol=1e-4, atol=0)


@pytest.mark.parametrize("view", VIEWS)
def test_half_a_mask_leaves_the_other_half_untouched_bit_for_bit(view):
    x, sigma, denoised = situation()
    mask = torch.zeros(1, 1, H, W)
    mask[:, :, : H // 2] = 1
    guider = small_guider(view=view)
    out = guided(lambda x, sigma: denoised, [Term(guider, 5.0, mask=mask)])(x, sigma)
    whole = guided(lambda x, sigma: denoised, [Term(guider, 5.0)])(x, sigma)
    assert torch.equal(out[:, :, H // 2:], denoised[:, :, H // 2:])
    assert torch.equal(out[:, :, : H // 2], whole[:, :, : H // 2])
    assert (out - denoised)[:, :, : H // 2].abs().min() > 0


def test_each_image_can_have_its_own_mask():
    x, sigma, denoised = situation()
    mask = torch.tensor([1.0, 0.0, 0.5])[:, None, None, None].expand(B, 1, H, W)
    whole = guide([Term(small_guider())], x, sigma, denoised).delta
    torch.testing.assert_close(guide([Term(small_guider(), mask=mask)], x, sigma, denoised).delta, whole * mask)


@pytest.mark.parametrize("limit", [1e-5, 0.003, 0.02])
def test_the_limit_holds_for_each_image_and_keeps_its_direction(limit):
    x, sigma, denoised = situation()
    terms = [Term(small_guider(), 2.0), Term(small_guider("depth", "noisy"), 0.5)]
    free = guide(terms, x, sigma, denoised)
    held = guide(terms, x, sigma, denoised, max_rms=limit)
    sizes = free.delta.square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(held.delta.square().mean(dim=(1, 2, 3)).sqrt(), sizes.clamp_max(limit), rtol=1e-4, atol=0)
    expected = free.delta * (limit / sizes).clamp_max(1)[:, None, None, None]
    torch.testing.assert_close(held.delta, expected, rtol=1e-4, atol=1e-9)
    assert torch.equal(held.records[0].rms, free.records[0].rms)  # records hold the size before the limit


# Windows and ramps

@pytest.mark.parametrize("sigma, on", [(0.5, True), (0.8, True), (1.0, False), (0.4999, False)])
def test_a_term_works_inside_its_half_open_window_only(sigma, on):
    x, levels, denoised = situation(sigma)
    levels = levels.double().fill_(sigma)  # 0.4999 and 0.5 are not the same in float64
    shift = guide([Term(small_guider(), schedule=Schedule(NoiseInterval(0.5, 1.0)))], x, levels, denoised)
    assert (shift is not None) is on


@pytest.mark.parametrize("sigma, factor", [(10.0, 3.0), (1.0, 2.0), (0.1, 1.0), (100.0, 3.0), (0.001, 1.0), (10**0.5, 2.5)])
def test_a_ramp_starts_at_high_noise_and_ends_at_low_noise(sigma, factor):
    assert Ramp(NoiseInterval(0.1, 10.0), 3.0, 1.0)(sigma) == pytest.approx(factor, rel=1e-12)


def test_a_ramp_multiplies_the_weight():
    x, sigma, denoised = situation(1.0)
    schedule = Schedule(ramp=Ramp(NoiseInterval(0.1, 10.0), 3.0, 1.0))
    ramped = guide([Term(small_guider(), 2.0, schedule)], x, sigma, denoised)
    torch.testing.assert_close(ramped.delta, guide([Term(small_guider(), 4.0)], x, sigma, denoised).delta)


@pytest.mark.parametrize("window", [EVERYWHERE, NoiseInterval(0.0, 1.0), NoiseInterval(1.0, math.inf),
                                    NoiseInterval(2.0, 2.0)])
def test_a_ramp_needs_two_positive_ends_of_its_window(window):
    with says(ValueError, "ramp", window.lo, window.hi):
        Ramp(window, 0.0, 1.0)(0.5)


# Inside ComfyUI

@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("view", VIEWS)
def test_guidance_works_under_inference_mode(view, task):
    """ComfyUI runs whole workflows under it: the state, the prediction, the target and the mask are made there."""
    guider = small_guider(task, view)
    x, sigma, denoised = situation()
    expected = guide([Term(guider, 2.0, mask=torch.full((1, 1, H, W), 0.5))], x, sigma, denoised).delta
    with torch.inference_mode():
        x, sigma, denoised = situation()
        term = Term(guider.aim(EXAMPLES[task].target.clone()), 2.0, mask=torch.full((1, 1, H, W), 0.5))
        assert term.guider.target.is_inference() and x.is_inference()
        out = guide([term], x, sigma, denoised, max_rms=1e3).delta
        assert torch.equal(out + 0, expected)


@pytest.mark.parametrize("view", VIEWS)
def test_experts_guide_in_inference_mode_across_intervals(view):
    plain = small_guider(view=view)
    bank = ExpertBank(base_network(plain), ExpertSchedule((0.1, 1.0, 10.0)), LoraSpec(rank=2), view)
    terms = [Term(with_experts(plain, bank))]
    with torch.inference_mode():
        for sigma in (0.5, 3.0):
            x, levels, denoised = situation(sigma)
            shift = guide(terms, x, levels, denoised).delta
            assert torch.equal(shift + 0, guide([Term(plain)], x, levels, denoised).delta)


def test_guidance_changes_none_of_its_inputs():
    """Guidance changes none of its inputs and leaves no gradient behind."""
    guider = small_guider()
    x, sigma, denoised = situation()
    kept = x.clone(), sigma.clone(), denoised.clone()
    shift = guide([Term(guider)], x, sigma, denoised)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, sigma, denoised), strict=True))
    assert not shift.delta.requires_grad and not x.requires_grad and not shift.records[0].energy.requires_grad
    assert all(parameter.grad is None for parameter in guider.net.parameters())


def test_a_guided_denoiser_reports_its_shifts_and_stacks():
    x, sigma, _ = situation()
    first, second = Term(small_guider("class"), 0.5), Term(small_guider("depth", "noisy"), 0.2)
    seen = []
    inner = guided(smooth, [first], on_guidance=seen.append)
    out = guided(inner, [second], on_guidance=seen.append)(x, sigma)
    torch.testing.assert_close(out, smooth(x, sigma) + seen[0].delta + seen[1].delta)
    assert [len(shift.records) for shift in seen] == [1, 1]


# Half precision

def alike(a: torch.Tensor, b: torch.Tensor) -> float:
    """The least cosine of two gradients, over the images."""
    return float(torch.cosine_similarity(a.flatten(1), b.flatten(1)).min())


class Watch(torch.nn.Module):
    """A network that remembers the type it answered in and the sizes of the batches it was asked about."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net, self.types, self.counts = net, [], []

    def forward(self, image, sigma, *prompt):
        self.counts.append(len(image))
        out = self.net(image, sigma, *prompt)
        self.types.append(out.dtype)
        return out


@pytest.mark.parametrize("compute", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("view", VIEWS)
def test_full_precision_changes_no_bit(view, compute):
    plain, other = (guide([Term(small_guider(view=view))], *situation(), compute_dtype=dtype) for dtype in (None, compute))
    assert torch.equal(other.delta, plain.delta) and torch.equal(other.records[0].energy, plain.records[0].energy)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("compute", HALF)
def test_half_precision_stays_inside_the_network(compute, task):
    """Energy and gradient are in full precision."""
    guider = small_guider(task)
    watched = replace(guider, net=Watch(guider.net))
    energy, gradient = gradient_at(guider, *situation())
    half, rough = gradient_at(watched, *situation(), compute)
    assert watched.net.types == [compute] and half.dtype == rough.dtype == torch.float32
    torch.testing.assert_close(half, energy, rtol=0.05, atol=0.02)
    assert not torch.equal(rough, gradient) and alike(rough, gradient) > 0.99
    torch.testing.assert_close(rough.norm(), gradient.norm(), rtol=0.05, atol=0)


def test_small_gradients_do_not_vanish_in_float16():
    guider = small_guider()
    base_network(guider).head.weight.data *= 1e-5
    _, gradient = gradient_at(guider, *situation())
    assert gradient.abs().max() < 1e-6
    assert alike(gradient_at(guider, *situation(), torch.float16)[1], gradient) > 0.99


def test_the_energy_of_a_large_image_stays_in_float16():
    """It does not overflow."""
    image = randn(1, 3, 200, 180).tanh()
    for task in ("number", "features"):
        guider = small_guider(task)
        _, gradient = gradient_at(guider, image, level(1.0, image), image)
        _, half = gradient_at(guider, image, level(1.0, image), image, torch.float16)
        assert half.isfinite().all() and alike(half, gradient) > 0.99


def test_the_energy_of_a_decoded_latent_stays_in_float16():
    """A small latent shows a large image; its energy does not overflow."""
    def decode(latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latent, scale_factor=8, mode="bilinear")
    latent, guider = randn(1, 3, 48, 56).tanh(), replace(small_guider("number"), decode=decode)
    _, gradient = gradient_at(guider, latent, level(1.0, latent), latent)
    _, half = gradient_at(guider, latent, level(1.0, latent), latent, torch.float16)
    assert half.isfinite().all() and alike(half, gradient) > 0.99


@pytest.mark.parametrize("compute", HALF)
@pytest.mark.parametrize("rule", ["sharpness", "edges", "colours"])
def test_what_has_no_weights_stays_precise(rule, compute):
    x, sigma, denoised = situation()
    guider = rule_guider(rule)
    guider = guider.aim(guider.predict(images(1, seed=4), sigma[:1]))
    full, half = (guide([Term(guider)], x, sigma, denoised, compute_dtype=dtype).delta for dtype in (None, compute))
    assert torch.equal(half, full)


def test_half_precision_leaves_the_experts_as_they_were():
    guider, x = small_guider(), images()
    gradients = []
    for compute in (None, torch.bfloat16):
        bank = ExpertBank(base_network(guider), ExpertSchedule.log_spaced(2, 0.1, 10.0), LoraSpec(2, 2.0))
        for index in range(2):
            disturb(bank, index)
        bank.select(0)
        gradient_at(with_experts(guider, bank), x, level(8.0, x), x, compute)
        gradients.append(gradient_at(with_experts(guider, bank), x, level(8.0, x), x)[1])
    assert torch.equal(*gradients)


def test_half_precision_works_under_inference_mode():
    terms = [Term(small_guider())]
    expected = guide(terms, *situation(), compute_dtype=torch.bfloat16).delta
    with torch.inference_mode():
        assert torch.equal(guide(terms, *situation(), compute_dtype=torch.bfloat16).delta, expected)


# Memory

class Cramped(Watch):
    """A network that runs out of memory when it is asked about too many images at once, half way through."""

    def __init__(self, net: torch.nn.Module, room: int, error: Exception | None = None):
        super().__init__(net)
        self.room, self.error, self.graph = room, error, None
        self.freed = []

    def forward(self, image, sigma, *prompt):
        if self.graph:
            self.freed.append(self.graph() is None)
        if len(image) > self.room:
            self.counts.append(len(image))
            begun = image * 2
            self.graph = weakref.ref(begun)
            raise self.error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(image, sigma, *prompt)


def cramped(guider, room: int, **more):
    return replace(guider, net=Cramped(guider.net, room, **more))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("room", "asked"), [(4, [5, 3, 2]), (2, [5, 3, 2, 2, 1]), (1, [5, 3, 2, 1, 1, 1, 1, 1])])
def test_a_batch_is_guided_in_parts_where_memory_is_short(room, asked, task, view):
    """Parts of a batch are guided as the whole batch would be."""
    guider = small_guider(task, view)
    targets = [guider.target, guider.target.flip(-1) + (task == "class")]
    guider = guider.aim(torch.cat([targets[i % 2] for i in range(5)]))
    small, mask = cramped(guider, room), randn(5, 1, H, W).sigmoid()
    whole = guide([Term(guider, 2.0, mask=mask)], *situation(count=5))
    parts = guide([Term(small, 2.0, mask=mask)], *situation(count=5))
    torch.testing.assert_close(parts.delta, whole.delta, rtol=1e-4, atol=1e-5 * float(whole.delta.abs().max()))
    torch.testing.assert_close(parts.records[0].energy, whole.records[0].energy)
    assert small.net.counts == asked


@pytest.mark.parametrize("size", [1, 4])
def test_a_prompt_is_cut_along_with_the_batch(size):
    guider = replace(small_guider("embedding"), prompt=randn(size, 6, seed=2))
    net = guider.net

    def answer(image, sigma, prompt):
        return net(image, sigma) * prompt

    whole = gradient_at(replace(guider, net=answer), *situation(count=4))
    parts = gradient_at(replace(guider, net=Cramped(answer, 1)), *situation(count=4))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_what_was_begun_is_freed_before_the_next_part():
    small = cramped(small_guider(), 1)
    gradient_at(small, *situation(count=4))
    assert small.net.counts == [4, 2, 1, 1, 1, 1] and small.net.freed == [True] * 5


def test_a_single_image_that_does_not_fit_is_said_in_words():
    with says(torch.OutOfMemoryError, "small/class", "single image", f"{W} x {H}", "smaller"):
        guide([Term(cramped(small_guider(), 0))], *situation())


def test_other_devices_say_it_in_their_own_words():
    error = RuntimeError("MPS backend out of memory (MPS allocated: 8.10 GB, max allowed: 9.07 GB).")
    small = cramped(small_guider(), 2, error=error)
    torch.testing.assert_close(gradient_at(small, *situation())[1], gradient_at(small_guider(), *situation())[1],
                               rtol=1e-4, atol=1e-7)


def test_other_faults_are_not_taken_for_a_lack_of_memory():
    small = cramped(small_guider(), 2, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        guide([Term(small)], *situation())
    assert small.net.counts == [B]


@pytest.mark.parametrize("name", ["target", "prompt"])
def test_a_target_for_half_a_batch_is_refused(name):
    """A target for half a batch is refused, whatever part of the batch fits into memory."""
    guider = replace(small_guider("embedding"), **{name: randn(2, 6)})
    with says(ValueError, "small/embedding", name, "2 images", "4 are sampled"):
        guide([Term(cramped(guider, 2))], *situation(count=4))


def test_the_guider_for_a_part_keeps_what_is_for_all_images():
    guider = replace(small_guider("embedding"), prompt=randn(5, 6))
    part = slice_guider(guider, slice(1, 4), 5)
    assert torch.equal(part.prompt, guider.prompt[1:4]) and part.target is guider.target and part.net is guider.net


# Faults

class Faulty(torch.nn.Module):
    """A network whose answer on some images of a batch is not a number."""

    def __init__(self, net: torch.nn.Module, bad: list[int], value: float):
        super().__init__()
        self.net, self.bad, self.value = net, bad, value

    def forward(self, image):
        out = self.net(image)
        factor = torch.ones(len(image), 1)
        factor[self.bad] = self.value
        return out * factor


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("bad", [[1], [0, 2]])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_failing_image_is_unguided_the_others_are_not(view, bad, value, caplog):
    """An image whose gradient is not finite."""
    guider = small_guider(view=view)
    faulty = replace(guider, net=IgnoreSigma(Faulty(base_network(guider), bad, value)))
    x, sigma, denoised = situation()
    healthy = guide([Term(guider)], x, sigma, denoised).delta
    with caplog.at_level(logging.WARNING):
        out = guided(lambda x, sigma: denoised, [Term(faulty)], GuidanceSettings(max_rms=50.0))(x, sigma)
    for i in range(B):
        assert torch.equal(out[i], denoised[i] if i in bad else denoised[i] + healthy[i])
    assert len(caplog.records) == 1
    for word in (guider.name, "1.5", f"{len(bad)} of {B}", "unguided"):
        assert word in caplog.text


def test_a_network_that_fails_does_not_silence_the_other_terms():
    guider, other = small_guider(), small_guider("depth")
    faulty = replace(guider, net=IgnoreSigma(Faulty(base_network(guider), [0, 1, 2], math.nan)))
    x, sigma, denoised = situation()
    both = guide([Term(faulty), Term(other)], x, sigma, denoised).delta
    assert torch.equal(both, guide([Term(other)], x, sigma, denoised).delta)


def test_a_healthy_network_logs_nothing(caplog):
    guide([Term(small_guider())], *situation())
    assert not caplog.records


@pytest.mark.parametrize("shape", [(1, 1, W, H), (1, 1, H, W + 1), (1, 1, H // 2, W // 2), (2, 1, H, W),
                                   (B + 1, 1, H, W), (H, W)])
def test_a_mask_of_another_size_or_batch_is_refused(shape):
    with says(ValueError, "mask", shape, (B, 3, H, W)):
        guide([Term(small_guider(), mask=torch.ones(shape))], *situation())


def test_a_target_for_another_batch_is_refused():
    with says(ValueError, "small/class", "2 images", "3 are sampled"):
        guide([Term(small_guider().aim(torch.tensor([0, 1])))], *situation())


def test_a_guider_without_a_target_is_refused_at_once():
    with says(ValueError, "small/class", "no target"):
        guide([Term(replace(small_guider(), target=None))], *situation())


def test_one_call_with_two_noise_levels_is_refused():
    x, _, denoised = situation()
    with says(ValueError, 0.5, 2.0, "one level"):
        guide([Term(small_guider())], x, torch.tensor([0.5, 0.5, 2.0]), denoised)


# Balanced terms

def balanced_shift(term: Term, sigma: float = 1.5, count: int = B) -> torch.Tensor:
    x, level_of, denoised = situation(sigma, count)
    return guide([term], x, level_of, denoised).delta


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("sigma", [0.05, 1.5, 40.0])
def test_a_balanced_shift_is_a_share_of_what_is_uncertain(view, sigma):
    shift = balanced_shift(Term(small_guider(view=view), 0.3, normalized=True), sigma)
    uncertain = sigma * 0.5 / math.hypot(sigma, 0.5)
    torch.testing.assert_close(shift.square().flatten(1).mean(1).sqrt(), torch.full((B,), 0.3 * uncertain))


def test_a_normalized_term_keeps_the_raw_direction():
    """A normalized term has the direction of the raw one at every scale of the energy."""
    raw = balanced_shift(Term(small_guider("depth")))
    balanced = balanced_shift(Term(small_guider("depth"), normalized=True))
    cosine = torch.nn.functional.cosine_similarity(raw.flatten(1), balanced.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(B))
    number = rule_guider("contrast").aim(torch.tensor([[0.9]]))
    louder = replace(number, net=lambda image, sigma: 30 * number.net(image, sigma), target=30 * number.target)
    torch.testing.assert_close(balanced_shift(Term(louder, normalized=True)), balanced_shift(Term(number, normalized=True)))
    assert not torch.allclose(balanced_shift(Term(louder)), balanced_shift(Term(number)))


def test_balance_is_each_sample_s_own():
    together = balanced_shift(Term(small_guider(), normalized=True))
    alone = balanced_shift(Term(small_guider(), normalized=True), count=1)
    torch.testing.assert_close(together[:1], alone)


def test_a_normalized_shift_is_as_strong_in_a_small_mask():
    mask = torch.zeros(1, 1, H, W)
    mask[..., 3:9, 5:16] = 1
    shift = balanced_shift(Term(small_guider(), 0.2, mask=mask, normalized=True))
    inside = shift[..., 3:9, 5:16].square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(inside, torch.full((B,), 0.2 * 1.5 * 0.5 / math.hypot(1.5, 0.5)))
    assert not (shift * (1 - mask)).any()


def test_a_normalized_term_rests_where_the_target_is_met():
    """A normalized term does nothing where the target is met to rounding."""
    met = torch.tensor([[False], [True], [False]])  # the second image of the batch
    guider = rule_guider("contrast").aim(torch.tensor([[0.9], [0.0], [0.9]]))

    def net(image: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.where(met, 1e-5 * (1 + image.mean((1, 2, 3))[:, None]), guider.net(image, sigma))
    term = Term(replace(guider, net=net), normalized=True)
    assert guide([replace(term, normalized=False)], *situation()).delta[1].any(), "there is a gradient left"
    shift = balanced_shift(term)
    assert not shift[1].any() and shift[0].any() and shift[2].any()


def test_a_normalized_term_without_gradient_does_nothing():
    flat = rule_guider("contrast").aim(torch.tensor([[0.0]]))
    x, sigma, _ = situation()
    guidance = guide([Term(flat, normalized=True)], x, sigma, torch.zeros_like(x))
    assert not guidance.delta.any() and guidance.delta.isfinite().all()
