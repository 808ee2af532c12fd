"""Which expert works at which step is drawn before anything is sampled, and can be chosen by edges."""
from typing import Any

import pytest
import torch
from helpers import says
from helpers.worlds import LatentWorld, PixelWorld

SETTINGS = {"steps": 8, "scheduler": "karras", "edges": ""}


@pytest.fixture
def rows(comfy, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What is drawn: the arguments of the plot, by name."""
    module, drawn = comfy.pack.nodes.bridge.intervals, {}
    plot = module.interval_plot
    monkeypatch.setattr(module, "interval_plot",
                        lambda sigmas, rows: drawn.update(sigmas=sigmas, rows=rows) or plot(sigmas, rows))
    return drawn


def experts(comfy, pixels: PixelWorld, edges: tuple[float, ...]) -> Any:
    core, bridge = comfy.pack.ppap_core, comfy.pack.nodes.bridge
    spec, schedule = core.experts.adapters.LoraSpec(2, 2.0), core.schedules.ExpertSchedule(edges)
    bank = bridge.distillation.new_bank(pixels.guider, schedule, spec, "denoised", 0, None)
    return core.experts.bank.with_experts(pixels.guider, bank)


def plotted(comfy, model: Any, **changes: Any) -> torch.Tensor:
    return comfy("PPAPPlotIntervals", model=model, **{**SETTINGS, **changes})[0]


def test_the_plot_tells_the_steps_that_a_sampling_takes(comfy, pixels: PixelWorld, rows: dict):
    terms = pixels.term(experts(comfy, pixels, (0.01, 0.3, 4.0, 80.0)), start_percent=0.0, end_percent=0.9,
                        factor_at_start=2.0, factor_at_end=0.0, weight=0.3, strength="balanced")
    picture = plotted(comfy, pixels.model, terms=terms)
    _, report = comfy("PPAPGuidedKSampler", model=pixels.model, terms=terms, max_rms=0.0, **pixels.settings(steps=8))
    [row], sigmas = rows["rows"], rows["sigmas"]
    at_work = [sigma for sigma, weight in zip(sigmas, row.weights, strict=True) if weight]
    assert at_work == [record.sigma for record in report.records] and 0 < len(at_work) < report.levels == len(sigmas)
    assert row.experts == [0 if sigma < 0.3 else 1 if sigma < 4 else 2 for sigma in sigmas]
    assert picture.shape[0] == 1 and picture.shape[2:] == (720, 3)


def test_a_flow_is_told_in_the_noise_levels_of_its_experts(comfy, latents: LatentWorld, rows: dict):
    plotted(comfy, latents.model("flow"), edges="0.3, 1, 4", scheduler="simple")
    times = [1 - step / 8 for step in range(8)]  # before the shift of 3
    [row], [first, *sigmas] = rows["rows"], rows["sigmas"]
    assert sigmas == pytest.approx([3 * time / (1 - time) for time in times[1:]], rel=1e-3) and first > 1000
    assert row.experts[0] == 3 and row.weights is None
    assert row.experts[1:] == [sum(sigma >= edge for edge in (0.3, 1, 4)) for sigma in sigmas]


def test_sigmas_take_the_place_of_scheduler_and_steps(comfy, pixels: PixelWorld, rows: dict):
    plotted(comfy, pixels.model, edges="1", sigmas=torch.tensor([10.0, 0.5, 0.0]))
    assert rows["sigmas"] == [10.0, 0.5] and rows["rows"][0].experts == [1, 0]


def test_the_picture_is_shown_in_the_node(comfy, pixels: PixelWorld):
    shown = comfy.registered["PPAPPlotIntervals"].execute(model=pixels.model, **{**SETTINGS, "edges": "1"})
    assert len(shown.ui.as_dict()["images"]) == 1


@pytest.mark.parametrize(("edges", "words"), [("", "nothing to draw"), ("4, 1", "ascending"), ("much", "ascending"),
                                              ("0, 1", "above 0"), ("1, nan", "ascending")])
def test_what_cannot_be_drawn_is_refused(comfy, pixels: PixelWorld, edges: str, words: str):
    with says(ValueError, words):
        plotted(comfy, pixels.model, edges=edges)


@pytest.mark.wide
def test_the_node_distills_experts_between_its_edges(pixels: PixelWorld):
    assert pixels.experts(edges="1.5", experts=3).net.schedule.edges[1:-1] == (1.5,)
