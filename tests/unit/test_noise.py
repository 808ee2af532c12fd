"""Noise levels: every one of them has exactly one expert, and one convention holds for all models."""
import math

import pytest
import torch
from helpers import images, randn, says

from ppap_core.noise import EVERYWHERE, NoiseInterval, expand, flow_to_ve, to_vp
from ppap_core.schedules import ExpertSchedule

SCHEDULES = [
    ExpertSchedule((0.02, 0.3, 0.7, 5.0, 80.0)),
    ExpertSchedule.log_spaced(5, 0.02, 80.0),
    ExpertSchedule.log_spaced(7, 0.03, 14.6),
    ExpertSchedule.log_spaced(1, 0.1, 10.0),
]


@pytest.mark.parametrize("sigma, inside", [(0.5, True), (0.75, True), (0.4999, False), (1.0, False), (1.5, False)])
def test_an_interval_holds_its_lower_end_and_not_its_upper_end(sigma, inside):
    assert (sigma in NoiseInterval(0.5, 1.0)) is inside


def test_everywhere_holds_every_noise_level():
    assert all(sigma in EVERYWHERE for sigma in (0.0, 1e-30, 1.0, 1e30))


@pytest.mark.parametrize("lo, hi", [(-0.1, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_an_impossible_interval_is_refused(lo, hi):
    with says(ValueError, "noise interval", "lo", "hi"):
        NoiseInterval(lo, hi)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_noise_level_belongs_to_exactly_one_expert(schedule):
    first, last = schedule.edges[0], schedule.edges[-1]
    shares = torch.rand(500, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = (first * (last / first) ** share for share in shares)
    near_edges = (math.nextafter(edge, end) for edge in schedule.edges[:-1] for end in (edge, math.inf))
    for sigma in (*drawn, *near_edges):
        assert [k for k in range(len(schedule)) if sigma in schedule[k]] == [schedule.index(sigma)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_level_on_an_edge_goes_to_the_expert_trained_on_it(schedule):
    for k in range(1, len(schedule)):
        assert schedule.index(schedule.edges[k]) == k
        assert schedule.index(math.nextafter(schedule.edges[k], 0)) == k - 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_beyond_the_ends_go_to_the_outer_experts(schedule):
    assert [schedule.index(sigma) for sigma in (0.0, schedule.edges[0] / 2)] == [0, 0]
    assert [schedule.index(sigma) for sigma in (schedule.edges[-1], 1e9, math.inf)] == [len(schedule) - 1] * 3


def test_a_noise_level_that_is_not_a_number_is_refused():
    with says(ValueError, "NaN"):
        SCHEDULES[0].index(math.nan)


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_an_expert_that_a_schedule_does_not_have_is_refused(index):
    with says(IndexError, index, "has 4"):
        SCHEDULES[0][index]


@pytest.mark.parametrize("edges", [(), (1.0,), (1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (1.0, math.inf),
                                   (1.0, math.nan)])
def test_edges_that_do_not_ascend_are_refused(edges):
    with says(ValueError, "ascending"):
        ExpertSchedule(edges)


@pytest.mark.parametrize("lo, hi", [(0.02, 80.0), (0.7, 0.9), (0.7, 0.7 + 3e-7), (0.1, 0.1 + 1e-7), (1.0, 1.0 + 5e-7),
                                    (3.1, 3.1 + 2e-6)])
def test_drawn_noise_levels_stay_inside_their_interval(lo, hi):
    """In a narrow interval rounding is not rare; in a wide one it would break one training in many."""
    schedule = ExpertSchedule((lo / 2, lo, hi, hi * 2))
    drawn = schedule[1].sample(2000, torch.Generator().manual_seed(0))
    assert drawn.shape == (2000,) and drawn.dtype == torch.float32
    assert {schedule.index(float(sigma)) for sigma in drawn} == {1}


def test_drawn_noise_levels_are_uniform_in_log_sigma():
    drawn = NoiseInterval(0.02, 80.0).sample(4000, torch.Generator().manual_seed(0)).double()
    share = (drawn / 0.02).log() / math.log(80 / 0.02)
    counts = torch.histc(share, bins=8, min=0, max=1)
    assert counts.sum() == 4000 and counts.min() > 400 and counts.max() < 600  # 500 each, give or take 21


def test_drawn_noise_levels_depend_on_the_generator_only():
    first, second = (NoiseInterval(0.1, 1.0).sample(9, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, NoiseInterval(0.1, 1.0).sample(9, torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("interval", [EVERYWHERE, NoiseInterval(0.0, 1.0), NoiseInterval(1.0, math.inf)])
def test_drawing_noise_levels_needs_two_positive_ends(interval):
    with says(ValueError, "cannot draw"):
        interval.sample(3, torch.Generator())


def test_log_spaced_intervals_have_equal_ratios():
    """Intervals have equal ratios and the exact ends."""
    edges = ExpertSchedule.log_spaced(5, 0.02, 80.0).edges
    assert edges[0] == 0.02 and edges[-1] == 80.0
    assert [high / low for low, high in zip(edges, edges[1:], strict=False)] == pytest.approx([4000**0.2] * 5, rel=1e-12)


@pytest.mark.parametrize("make", [lambda: ExpertSchedule.log_spaced(0, 0.1, 1.0),
                                  lambda: ExpertSchedule.equal_shares(0, 0.1, 1.0, [0.1, 1.0]),
                                  lambda: ExpertSchedule.equal_shares(2, 0.2, 1.0, [0.1, 1.0, 1.0])])
def test_a_number_of_experts_that_is_impossible_is_refused(make):
    with says(ValueError, "expert"):
        make()


@pytest.mark.parametrize("steps, experts", [(16, 5), (25, 5), (11, 11), (7, 2), (3, 1)])
def test_equal_shares_ignore_spacing_and_order_of_steps(steps, experts):
    sigmas = (torch.linspace(0, 1, steps, dtype=torch.float64) ** 3 * 80 + 0.02).tolist()
    schedule = ExpertSchedule.equal_shares(experts, sigmas[0], 90.0, [*reversed(sigmas), *sigmas, 0.001, 100.0])
    shares = [0] * experts
    for sigma in sigmas:
        assert schedule.index(sigma * (1 - 1e-6)) == schedule.index(sigma * (1 + 1e-6)), "no step lies on an edge"
        shares[schedule.index(sigma)] += 1
    assert (schedule.edges[0], schedule.edges[-1]) == (sigmas[0], 90.0)
    assert min(shares) >= 1 and max(shares) - min(shares) <= 1


def test_noise_levels_multiply_each_image_of_a_batch():
    x = randn(3, 2, 5, 7)
    sigma = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    factor = expand(sigma, x)
    assert factor.shape == (3, 1, 1, 1) and factor.dtype == x.dtype
    assert torch.equal((factor * x)[1], 2.0 * x[1])


def test_an_expert_sees_pixels_of_unit_size_at_every_noise_level():
    for sigma in (0.05, 1.0, 30.0):
        image = randn(3, 3, 40, 56, seed=1)
        seen = to_vp(image + sigma * randn(3, 3, 40, 56, seed=2), torch.full((3,), sigma))
        assert seen.std(dim=(1, 2, 3)).tolist() == pytest.approx([1.0] * 3, abs=0.05)


def test_an_expert_sees_a_clean_image_as_it_is():
    x = images()
    assert torch.equal(to_vp(x, x.new_zeros(3)), x)


def test_a_flow_state_becomes_the_same_image_with_ve_noise():
    image, noise = randn(3, 3, 5, 7, dtype=torch.float64), randn(3, 3, 5, 7, seed=1, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 0.95], dtype=torch.float64)
    x, sigma = flow_to_ve((1 - expand(t, image)) * image + expand(t, image) * noise, t)
    torch.testing.assert_close(x, image + expand(sigma, image) * noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(sigma, torch.tensor([0.0, 3 / 7, 19.0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [1.0, 1.5])
def test_a_flow_state_of_pure_noise_is_refused(t):
    with says(ValueError, t, "t < 1"):
        flow_to_ve(randn(2, 3, 5, 7), torch.tensor([0.5, t]))
