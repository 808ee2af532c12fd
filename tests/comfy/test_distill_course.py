"""Presets, limits and going on in the node Distill Experts, and what it shows on the way."""
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import says
from helpers.worlds import PixelWorld

SETTINGS = {"view": "denoised", "experts": 1, "sigma_min": 0.0, "sigma_max": 0.0, "steps": 13, "batch_size": 4,
            "learning_rate": 1e-3, "rank": 1, "alpha": 1.0, "seed": 0}
EMPTY = {"samples": torch.zeros(64, 3, 4, 8)}


@pytest.fixture
def distil(comfy, pixels: PixelWorld, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the node on samples of which as many are held out, with short presets."""
    core = comfy.pack.ppap_core.experts
    monkeypatch.setattr(core.samples, "HELD_OUT_SHARE", 1)
    monkeypatch.setattr(core.lesson, "CHECK_EVERY", 4)
    for name, steps in (("quick look", 14), ("good", 40)):
        monkeypatch.setitem(core.presets.PRESETS, name, core.presets.PRESETS[name] | {"steps": steps})

    samples = pixels.samples(name="course", latent_image=EMPTY)

    def run(**more: Any) -> Any:
        with torch.inference_mode():
            return comfy.registered["PPAPDistilExperts"].execute(
                **{"samples": samples, "guider": pixels.guider, **SETTINGS, **more})
    return run


@pytest.fixture
def shown(comfy, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[tuple[int, ...]]]:
    """Texts and the sizes of the pictures that the node showed."""
    texts: list[str] = []
    sizes: list[tuple[int, ...]] = []
    progress, course = comfy.pack.nodes.bridge.progress, comfy.pack.nodes.bridge.course
    monkeypatch.setattr(progress, "_send_text", lambda text, node: texts.append(text))
    monkeypatch.setattr(course, "SHOWN_EVERY", 0.0)
    real = progress.Progress.__call__

    def call(self, done, preview=None):
        sizes.append(tuple(preview.shape) if preview is not None else ())
        real(self, done, preview)
    monkeypatch.setattr(progress.Progress, "__call__", call)
    return texts, sizes


def weights(result: Any) -> list[torch.Tensor]:
    bank = result.args[0].net
    return [weight.clone() for index in range(len(bank.schedule)) for weight in bank.weights(index).values()]


def alike(one: Any, other: Any) -> bool:
    return all(map(torch.equal, weights(one), weights(other))) and one.args[1] == other.args[1]


def test_neutral_values_change_nothing(distil):
    plain, named = distil(), distil(preset="as set", minutes=0.0, start=None)
    assert alike(plain, named) and plain.ui == named.ui and "Trained" not in plain.ui["text"][0]


def test_a_preset_trains_its_steps_and_tells(distil, shown):
    """How long it takes stands in the node from the start, and what experts know is drawn below the losses."""
    texts, sizes = shown
    made = distil(preset="quick look", experts=2)
    assert [len(losses) for losses in made.args[1].values()] == [14, 14]
    assert "Trained 14, 14 of 14 steps in" in made.ui["text"][0] and "estimated at the start" in made.ui["text"][0]
    assert texts[0].startswith("Timing") and "left" in texts[1] and "expert 2 of 2, step 14 of 14" in texts[-2]
    assert (1, 3, 300 + 300, 720) in sizes and (1, 3, 420, 720) in sizes
    unvaried = distil(preset="as set, fast", steps=14, experts=2)
    assert [len(losses) for losses in unvaried.args[1].values()] == [14, 14] and not alike(made, unvaried)


@pytest.mark.wide
def test_a_good_preset_ends_where_nothing_rises(distil):
    """Nothing is learned at a rate of zero: after the sixth check, at step 20, it takes a quarter more."""
    made = distil(preset="good", learning_rate=0.0)
    assert [len(losses) for losses in made.args[1].values()] == [25]
    assert "of at most 40 steps" in made.ui["text"][0]


def test_a_limit_of_time_ends_with_what_is_reached(distil, comfy, monkeypatch: pytest.MonkeyPatch):
    course = comfy.pack.nodes.bridge.course.Course
    with monkeypatch.context() as patch:
        patch.setattr(course, "seconds_for", lambda self, index: 0.0)
        stopped = distil(seed=4, minutes=1e-9)
    assert [len(losses) for losses in stopped.args[1].values()] == [0]
    assert "The time was up" in stopped.ui["text"][0] and "Trained 0 of 13 steps" in stopped.ui["text"][0]
    more = distil(seed=4, minutes=60.0)
    assert "Trained 13 of 13 steps" in more.ui["text"][0] and alike(more, distil(seed=4)) and not alike(more, stopped)


def test_experts_go_on_from_earlier_ones(distil, pixels: PixelWorld):
    """At a rate of zero they stay what they were; others learn on."""
    first = distil()
    again, more = distil(start=first.args[0], learning_rate=0.0), distil(start=first.args[0])
    assert all(map(torch.equal, weights(again), weights(first))) and not alike(more, first)
    with says(ValueError, "no experts to go on from", "Load Experts"):
        distil(start=pixels.plain)
    with says(ValueError, "another view (denoised, expected noisy)"):
        distil(start=first.args[0], view="noisy")
