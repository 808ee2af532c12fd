"""Variety: images of a batch repel each other in what a guider sees, in parts as at once, and also further images."""
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import VIEWS, images, level, says, small_guider
from torch import Tensor

from ppap_core import Guider, Term, guided, rule_guider
from ppap_core.guidance import gradients
from ppap_core.guidance.gradients import energy_gradient
from ppap_core.guiders.variety import closeness, unlike
from ppap_core.io.hashing import digest


def spread(guider: Guider, shown: Tensor) -> float:
    """Mean distance of images to each other in what a guider sees."""
    return float(torch.pdist(guider.predict(shown, level(0.5, shown)).flatten(1)).mean())


def test_closeness_is_that_of_the_formula():
    crowd = torch.tensor([[0.0], [1.0], [3.0]])
    width = 4 / torch.log(torch.tensor(4.0))  # squared distances 1, 4 and 9
    expected = torch.log((1 + (-1 / width).exp() + (-9 / width).exp()) / 3)
    torch.testing.assert_close(closeness(crowd[:1], crowd), expected[None])
    assert float(closeness(crowd[:1], crowd[:1])) == 0 and not closeness(torch.ones(3, 2), torch.ones(3, 2)).any()


@pytest.mark.parametrize("task", ["class", "depth", "features"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_step_down_the_gradient_spreads_the_outputs(task: str, view: str):
    guider, x = unlike(small_guider(task, view)), images(5)
    gradient = energy_gradient(guider, x, level(0.5, x))[1]
    scale = 1.25**0.5 if view == "noisy" else 1.0  # that view looks at x on the variance-preserving scale
    assert spread(guider, (x - 0.02 * gradient / gradient.abs().amax()) / scale) > spread(guider, x / scale)
    assert gradient.flatten(1).any(1).all()


def test_parts_of_a_batch_know_the_others(monkeypatch: pytest.MonkeyPatch):
    guider, x = unlike(small_guider("features")), images(5)
    whole = energy_gradient(guider, x, level(0.5, x))

    def short(guider: Any, point: Tensor, *rest: Any, real: Any = gradients._gradient) -> Any:
        if len(point) > 2:
            raise torch.OutOfMemoryError
        return real(guider, point, *rest)
    monkeypatch.setattr(gradients, "_gradient", short)
    for one, other in zip(energy_gradient(guider, x, level(0.5, x)), whole, strict=True):
        torch.testing.assert_close(one, other)


def test_an_image_alone_is_left_as_it_is():
    x = images(1)
    denoise = guided(lambda x, sigma: x, [Term(unlike(rule_guider("layout")), 1.0, normalized=True)])
    assert torch.equal(denoise(x, level(1.0, x)), x)


def test_other_images_are_kept_away_from():
    x, others = images(1), images(1) + 0.1
    alone, kept_away = unlike(rule_guider("layout")), unlike(rule_guider("layout"), others)
    gradient = energy_gradient(kept_away, x, level(0.5, x))[1]
    assert not energy_gradient(alone, x, level(0.5, x))[1].any()
    moved = x - 0.1 * gradient / gradient.abs().amax()
    assert spread(alone, torch.cat([moved, others])) > spread(alone, torch.cat([x, others]))


def test_cut_outs_are_refused():
    with says(ValueError, "compares whole images", "2 cut-outs"):
        unlike(replace(small_guider("class"), cutouts=2))
    with says(ValueError, "without them"):
        replace(unlike(small_guider("class")), cutouts=1)


def test_it_is_told_from_others_by_what_it_holds():
    rule = rule_guider("layout")
    made = [rule, unlike(rule), unlike(rule, images(1)), unlike(rule, images(2)), replace(unlike(rule), view="noisy")]
    assert len({digest(guider) for guider in made}) == len(made)
