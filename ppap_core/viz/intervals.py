"""Which expert works at which step, and how strongly, as an image tensor (1, 3, H, W) in [-1, 1]."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from torch import Tensor

from .colors import color
from .drawing import BAR, GRID, INK, fitting, font, from_pillow, new_canvas

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

MARGIN, HEAD, BAND, GAP, FOOT = 12, 22, 56, 14, 52  # in pixels; a row is a line of text, a band and a gap
TINT = 0.45  # share of a colour in its band, on which text must be readable


@dataclass(frozen=True)
class IntervalRow:
    """One row of `interval_plot`: what works at each step."""

    name: str
    experts: Sequence[int | None]    # at each step the number of the expert, from 0; None: a network without experts
    weights: Sequence[float] | None  # at each step, 0: at rest; None: no curve is drawn, and none is at rest


def interval_plot(sigmas: Sequence[float], rows: Sequence[IntervalRow], width: int = 720) -> Tensor:
    """Coloured bands over the steps of a sampling, first step left, with the weight at each step as a line.

    sigmas: noise level of each step. rows: all with as many values. width: in pixels.
    """
    height = 2 * MARGIN + len(rows) * (HEAD + BAND + GAP) + FOOT
    picture, draw = new_canvas(height, width)
    edges = [MARGIN + step * (width - 2 * MARGIN) / len(sigmas) for step in range(len(sigmas) + 1)]
    for index, row in enumerate(rows):
        top = MARGIN + index * (HEAD + BAND + GAP)
        draw.text((MARGIN, top), fitting(f"{row.name}{_weights_in_words(row)}", width - 2 * MARGIN), INK, font(13))
        _draw_bands(draw, row, edges, top + HEAD)
        _draw_curve(draw, row, edges, top + HEAD)
    _draw_steps(draw, sigmas, edges, height - FOOT)
    return from_pillow(picture)


def _weights_in_words(row: IntervalRow) -> str:
    weights = [weight for weight in row.weights or () if weight]
    if row.weights is None:
        return ""
    return f": weight {weights[0]:.3g} at first, {weights[-1]:.3g} at last" if weights else ": at rest in every step"


def _runs(row: IntervalRow) -> Iterator[tuple[int, int, int | None]]:
    """First step, step after the last, and expert of each part of a row in which one of them is at work."""
    at_work = row.weights or [1.0] * len(row.experts)
    states = [(bool(weight), expert) for weight, expert in zip(at_work, row.experts, strict=True)]
    for (works, expert), steps in groupby(range(len(states)), key=states.__getitem__):
        first, *others = steps
        if works:
            yield first, first + 1 + len(others), expert


def _draw_bands(draw: "ImageDraw", row: IntervalRow, edges: Sequence[float], top: int) -> None:
    draw.rectangle((edges[0], top, edges[-1], top + BAND), outline=GRID)
    for first, after, expert in _runs(row):
        left, right = edges[first], edges[after]
        draw.rectangle((left, top, right, top + BAND), BAR if expert is None else _tinted(expert), GRID)
        words = ["no experts", ""] if expert is None else [f"expert {expert + 1}", str(expert + 1), ""]
        fits = next(text for text in words if font(13).getlength(text) < right - left - 4 or not text)
        draw.text(((left + right) / 2, top + BAND - 9), fits, INK, font(13), anchor="mm")


def _tinted(expert: int) -> tuple[int, int, int]:
    red, green, blue = (round(255 + TINT * (value - 255)) for value in color(expert))
    return red, green, blue


def _draw_curve(draw: "ImageDraw", row: IntervalRow, edges: Sequence[float], top: int) -> None:
    """Weights by their size where they are not 0, the largest at the top of the band."""
    weights = row.weights or []
    largest = max(map(abs, weights), default=0)
    for first, after, _ in _runs(row) if largest else ():
        heights = [top + 4 + (BAND - 22) * (1 - abs(weight) / largest) for weight in weights[first:after]]
        middles = [(edges[step] + edges[step + 1]) / 2 for step in range(first, after)]
        draw.line([(edges[first], heights[0]), *zip(middles, heights, strict=True), (edges[after], heights[-1])], INK, 2)


def _draw_steps(draw: "ImageDraw", sigmas: Sequence[float], edges: Sequence[float], top: int) -> None:
    every = max(1, round(len(sigmas) / 12))
    for step in range(0, len(sigmas), every):
        middle = (edges[step] + edges[step + 1]) / 2
        draw.text((middle, top), str(step + 1), INK, font(12), anchor="mt")
        draw.text((middle, top + 16), f"{sigmas[step]:.3g}", INK, font(12), anchor="mt")
    draw.text(((edges[0] + edges[-1]) / 2, top + 34), "step, and its noise level (sigma)", INK, font(12), anchor="mt")
