"""The best of several images by several terms: standings, and energies without a gradient."""
import math

import pytest
import torch
from helpers import VIEWS, images, level, says, small_guider

from ppap_core.guidance import gradients
from ppap_core.guidance.choice import best_first, judge_images, standings
from ppap_core.guidance.gradients import energy_alone, energy_gradient
from ppap_core.guiders.guider import clean
from ppap_core.guiders.variety import unlike


def test_one_term_ranks_by_its_energy():
    energies = torch.tensor([[3.0, 1.0, 2.0, 10.0]])
    standing = standings(energies, [0.3])
    torch.testing.assert_close(standing, (4 - energies[0]) / energies[0].std(correction=0))
    assert best_first(standing).tolist() == [1, 2, 0, 3] == best_first(standings(1000 * energies - 5, [7.0])).tolist()
    assert best_first(standings(energies, [-0.3])).tolist() == [3, 0, 2, 1]


def test_several_terms_count_by_their_weights_alone():
    """Of two candidates each stands one deviation from the mean, whatever the unit."""
    energies = torch.tensor([[0.0, 1.0], [5000.0, 100.0]])
    torch.testing.assert_close(standings(energies, [3.0, 1.0]), torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(standings(energies, [1.0, -1.0]), torch.tensor([1.0, -1.0]))
    assert not standings(energies, [1.0, 1.0]).any() and not standings(energies, [0.0, 0.0]).any()


def test_groups_are_ranked_apart():
    energies = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0))
    together = standings(energies, [1.0, 2.0])
    for group in range(5):
        torch.testing.assert_close(together[group], standings(energies[:, group], [1.0, 2.0]))
    assert best_first(together).shape == (5, 4)


@pytest.mark.parametrize("energies", [[4.0, 4.0, 4.0], [1e6, 1e6 + 0.1, 1e6]])
def test_rounding_is_no_difference(energies: list):
    standing = standings(torch.tensor([energies]), [1.0])
    assert not standing.any() and best_first(standing).tolist() == [0, 1, 2]


def test_what_is_no_number_is_last_and_spoils_nothing():
    standing = standings(torch.tensor([[3.0, math.nan, 1.0, math.inf]]), [1.0])
    assert standing.tolist() == [-1.0, -math.inf, 1.0, -math.inf] and best_first(standing).tolist() == [2, 0, 1, 3]
    assert standings(torch.full((1, 2), math.nan), [1.0]).tolist() == [-math.inf] * 2
    assert standings(torch.zeros(0, 3), []).tolist() == [0.0] * 3


@pytest.mark.parametrize("task", ["class", "depth", "features"])
@pytest.mark.parametrize("view", VIEWS)
def test_the_energy_alone_is_that_beside_a_gradient(task: str, view: str):
    guider, x = small_guider(task, view), images()
    for sigma in (0.0, 0.5):
        expected = energy_gradient(guider, x, level(sigma, x))[0]
        with torch.inference_mode():
            torch.testing.assert_close(energy_alone(guider, x, level(sigma, x)), expected)
    with torch.inference_mode():
        torch.testing.assert_close(judge_images(guider, x), guider.energy(x, clean(x)))


def test_variety_is_judged_among_the_whole_batch(monkeypatch: pytest.MonkeyPatch):
    guider, x = unlike(small_guider("features")), images(5)
    whole = judge_images(guider, x)
    def short(guider, point, *rest, real=gradients._energy_only):
        if len(point) > 2:
            raise torch.OutOfMemoryError
        return real(guider, point, *rest)
    monkeypatch.setattr(gradients, "_energy_only", short)
    torch.testing.assert_close(judge_images(guider, x), whole)


def test_one_image_that_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch):
    def never(*unused):
        raise RuntimeError("CUDA out of memory")
    monkeypatch.setattr(gradients, "_energy_only", never)
    with says(torch.OutOfMemoryError, "single image of 28 x 20"):
        judge_images(small_guider("class"), images())
