"""Which expert works at which step of a sampling, before anything is sampled."""
from collections.abc import Iterator, Sequence

import comfy.samplers
from torch import Tensor

from ...ppap_core.schedules import ExpertSchedule, read_edges
from ...ppap_core.viz.intervals import IntervalRow, interval_plot
from .latents import Patcher
from .noise_levels import ve_level
from .terms import GuidanceTerm, schedule_of


def plot_intervals(model: Patcher, terms: Sequence[GuidanceTerm], edges: str, sigmas: Tensor) -> Tensor:
    """Draw what works at each step: a row for each term, and one for experts that are only planned.

    edges: noise levels between those, as text; empty: none are planned. sigmas: ComfyUI's noise levels of a sampling, with
    the one that it ends at. ValueError where there is nothing to draw.
    """
    sampling = model.get_model_object("model_sampling")
    levels = [ve_level(sampling, sigma) for sigma in sigmas.tolist()[:-1]]
    rows = [*_planned(edges, levels), *(_row_of(term, model, levels) for term in terms)]
    if not rows or not levels:
        raise ValueError("there is nothing to draw: connect terms, or write the noise levels between planned experts into "
                         "edges, and let the sampling have at least one step")
    return interval_plot(levels, rows)


def levels_of(model: Patcher, scheduler: str, steps: int) -> Tensor:
    """Return ComfyUI's noise levels of a sampling."""
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def _planned(text: str, levels: Sequence[float]) -> Iterator[IntervalRow]:
    if edges := read_edges(text):
        experts = ExpertSchedule((edges[0] / 2, *edges, 2 * edges[-1]))  # the first and the last serve all levels beyond
        yield IntervalRow(f"planned: {len(experts)} experts", [experts.index(level) for level in levels], None)


def _row_of(term: GuidanceTerm, model: Patcher, levels: Sequence[float]) -> IntervalRow:
    experts, schedule = schedule_of(term.guider), term.schedule.in_sigmas(model)
    return IntervalRow(term.guider.name, [experts.index(level) if experts else None for level in levels],
                       [term.weight * schedule.factor_at(level) for level in levels])
