"""Autoguidance: the published formula on exact models, its neutral values, and the paper's picture in numbers."""
import math

import pytest
import torch
from helpers import images, level, randn, small_guider
from helpers.gaussian import GaussianMixture

from ppap_core.cli import main
from ppap_core.guidance.autoguidance import Autoguidance, autoguidance_delta, autoguided
from ppap_core.guidance.shift import guided
from ppap_core.guidance.terms import Term
from ppap_core.noise import NoiseInterval
from ppap_core.schedules import Ramp, Schedule
from ppap_core.tinyworld import toy2d

SHAPE = (3, 5, 7)
EXACT = {"rtol": 0, "atol": 1e-12}


def models() -> tuple[GaussianMixture, GaussianMixture]:
    """A mixture and one that was badly learned: its classes are wider and lie elsewhere."""
    good = GaussianMixture.of_shape(SHAPE)
    return good, GaussianMixture(0.8 * good.means + 0.1, 1.7 * good.width)


def never(x, sigma):
    raise AssertionError("the bad model was asked")


@pytest.mark.parametrize("sigma", [0.05, 0.4, 2.0, 10.0])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.1, 7.0])
def test_the_prediction_is_the_published_combination(sigma, weight):
    good, bad = models()
    x = randn(3, *SHAPE, dtype=torch.float64) * (1 + sigma)
    sigma = level(sigma, x)
    prediction = autoguided(good, bad, Autoguidance(weight))(x, sigma)
    torch.testing.assert_close(prediction, weight * good(x, sigma) + (1 - weight) * bad(x, sigma), **EXACT)


def test_several_worse_predictions_are_the_published_sum():
    """Eq. 6 with w = 2.5, a share of 0.3 of it for autoguidance and the rest for classifier-free guidance."""
    main, without, bad = (randn(2, *SHAPE, seed=seed, dtype=torch.float64) for seed in range(3))
    share, weight = 0.3, 2.5
    for_without, for_bad = (1 - share) * (weight - 1) + 1, share * (weight - 1) + 1
    combined = main + autoguidance_delta(main, without, for_without) + autoguidance_delta(main, bad, for_bad)
    torch.testing.assert_close(combined, weight * main - (weight - 1) * (0.7 * without + 0.3 * bad), **EXACT)


@pytest.mark.parametrize("settings", [Autoguidance(1.0), Autoguidance(3.0, Schedule(NoiseInterval(0.5, 1.5))),
                                      Autoguidance(3.0, Schedule(ramp=lambda sigma: 0.0))])
def test_a_neutral_value_changes_no_bit_nor_asks_the_model(settings):
    """The bad model is not run."""
    good, _ = models()
    x = randn(3, *SHAPE, dtype=torch.float64)
    assert torch.equal(autoguided(good, never, settings)(x, level(1.5, x)), good(x, level(1.5, x)))


def test_the_ramp_scales_what_is_added():
    good, bad = models()
    window = NoiseInterval(0.1, 10.0)
    x = randn(3, *SHAPE, dtype=torch.float64)
    ramped = autoguided(good, bad, Autoguidance(3.0, Schedule(window, Ramp(window, 2.0, 0.0))))
    for sigma, weight in ((10.0 - 1e-9, 5.0), (1.0, 3.0), (0.1, 1.0), (10.0, 1.0)):
        expected = autoguided(good, bad, Autoguidance(weight))(x, level(sigma, x))
        torch.testing.assert_close(ramped(x, level(sigma, x)), expected, rtol=0, atol=1e-7)


def test_guidance_by_a_network_shifts_the_combined_prediction():
    def good(x, sigma):
        return 0.9 * x / (1 + sigma[0])
    def bad(x, sigma):
        return 0.5 * x / (1 + sigma[0])
    x = images(3)
    both = autoguided(good, bad, Autoguidance(2.0))
    term = Term(small_guider(view="noisy"), 0.5, normalized=True)
    shift = guided(good, [term])(x, level(0.7, x)) - good(x, level(0.7, x))
    torch.testing.assert_close(guided(both, [term])(x, level(0.7, x)), both(x, level(0.7, x)) + shift)


# The toy

@pytest.mark.slow
def test_the_density_of_a_tree_integrates_to_one():
    """The density integrates to one, and the points drawn from a tree lie in it."""
    grid = torch.linspace(-1.5, 2.5, 800)
    points = torch.cartesian_prod(grid, grid)
    mass = sum(float(toy2d.WANTED.log_density(part).exp().sum()) for part in points.split(50_000)) * (4 / 799) ** 2
    assert mass == pytest.approx(1, abs=1e-3)
    drawn = toy2d.panel(toy2d.WANTED.draw(5000, torch.Generator().manual_seed(4)))
    assert drawn.outliers < 0.004 and drawn.overlap > 0.95
    elsewhere = toy2d.panel(toy2d.OTHER.draw(5000, torch.Generator().manual_seed(4)))
    assert elsewhere.outliers > 0.3 and elsewhere.overlap < 0.5


def test_the_overlap_counts_what_is_missing():
    points = toy2d.WANTED.draw(8000, torch.Generator().manual_seed(4))
    half = points[toy2d.WANTED.nearest(points) % 2 == 0]
    kept = float(toy2d.WANTED.weights[toy2d.WANTED.branch % 2 == 0].sum())
    assert toy2d.panel(half).overlap == pytest.approx(kept, abs=0.05)


@pytest.fixture(scope="module")
def found() -> dict[str, toy2d.Panel]:
    """A third of the training."""
    return toy2d.panels(steps=700, count=2000)


@pytest.mark.slow
def test_autoguidance_removes_outliers_and_keeps_branches(found):
    """Classifier-free guidance loses branches."""
    none, free, _, auto = found.values()
    assert auto.outliers < 0.6 * none.outliers and free.outliers > none.outliers
    assert auto.overlap > free.overlap + 0.1


def test_the_command_writes_the_picture_and_says_the_numbers(tmp_path, capsys):
    main(["toy", "--steps", "24", "--out", str(tmp_path / "new" / "toy.png")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("% outside" in line and "branches met" in line for line in lines)
    assert (tmp_path / "new" / "toy.png").stat().st_size > 1000


def test_the_toy_is_the_same_each_time_and_can_be_stopped(found):
    steps = []

    def stop(done, everything):
        steps.append((done, everything))
        if done == 40:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        toy2d.panels(steps=160, count=8, on_step=stop)
    assert steps[-1] == (40, 340)
    again = toy2d.fit(16, 30, (toy2d.WANTED,), 3)(torch.ones(2, 2), torch.ones(2))
    assert torch.equal(toy2d.fit(16, 30, (toy2d.WANTED,), 3)(torch.ones(2, 2), torch.ones(2)), again)
    assert toy2d.picture(found).shape[1:] == (3, 888, 840) and math.isfinite(float(toy2d.picture(found).mean()))
