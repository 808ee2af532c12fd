"""Line plots, as image tensors (1, 3, H, W) in [-1, 1]."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from .colors import color
from .drawing import GRID, INK, font, from_pillow, new_canvas

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Points = Sequence[tuple[float, float]]

MAX_INLINE_LABELS, MAX_LABEL_LENGTH = 4, 40  # more labels, or longer ones, stand beside the plot
SMALL = 12  # size of the font of ticks and labels


class Record(Protocol):
    """Effect of one term at one step, such as `guidance.terms.TermRecord`."""

    @property
    def term(self) -> int:
        """Number of the term."""

    @property
    def sigma(self) -> float:
        """Noise level of the step."""

    @property
    def energy(self) -> Tensor:
        """Energy of each image, (B,)."""

    @property
    def rms(self) -> Tensor:
        """Size of the shift of each image, root mean square, (B,)."""

    @property
    def unguided(self) -> int:
        """Number of images without a finite gradient."""

    @property
    def fallback(self) -> torch.dtype | None:
        """Number type that the network took instead of the one that it was asked for; None: it did not."""


@dataclass(frozen=True)
class Axes:
    """Labels and scales of a plot's axes. A logarithmic axis leaves out points that are not positive."""

    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False


class _Frame(NamedTuple):
    """Edges of the plot in pixels."""

    left: float
    top: float
    right: float
    bottom: float


class _Scale(NamedTuple):
    """An axis: values from `low` to `high` go to pixels from `start` to `end`."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def pixel(self, value: float) -> float:
        scale = math.log if self.log else float
        return self.start + (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1)] or [self.low, self.high]
        span = self.high - self.low
        step = 10 ** math.floor(math.log10(max(span, 1e-12)))
        step *= next(factor for factor in (0.1, 0.2, 0.5, 1, 2) if span / (step * factor) <= 7)
        return [step * index for index in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def _scale_for(values: Sequence[float], log: bool, start: float, end: float) -> _Scale:
    low, high = min(values), max(values)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    return _Scale(low, high, log, start, end)


class _Legend:
    """Labels of the lines, inside the plot or beside it; many single points are numbered."""

    def __init__(self, lines: dict[str, Points]):
        self.numbered = len(lines) > MAX_INLINE_LABELS and all(len(line) == 1 for line in lines.values())
        self.labels = [f"{index}  {name}" if self.numbered else name for index, name in enumerate(lines, 1)]
        self.width = int(max(map(font(SMALL).getlength, self.labels), default=0))
        is_beside = len(lines) > MAX_INLINE_LABELS or max(map(len, lines), default=0) > MAX_LABEL_LENGTH
        self.margin = self.width + 38 if is_beside else 0
        self.offset = 38 if is_beside else -12 - self.width  # of the labels from the right edge of the plot

    def draw(self, draw: "ImageDraw", frame: _Frame, index: int) -> None:
        x, y = frame.right + self.offset, frame.top + 14 + 16 * index
        draw.line([(x - 26, y), (x - 6, y)], color(index), 3)
        draw.text((x, y), self.labels[index], INK, font(SMALL), anchor="lm")


def line_plot(series: Mapping[str, Points], title: str, axes: Axes, size: tuple[int, int] = (420, 720)) -> Tensor:
    """Lines with a legend. Many or long names stand beside the plot; many single points are numbered.

    series: points (x, y) of each line by name; those that are not finite are left out. size: (height, width) in pixels.
    """
    height, width = size
    picture, draw = new_canvas(height, width)
    lines = {name: _drawable(points, axes) for name, points in series.items()}
    legend = _Legend(lines)
    frame = _Frame(70, 44, width - 20 - legend.margin, height - 52)
    draw.text((frame.left, 14), title, INK, font(16))
    xs, ys = ([point[axis] for line in lines.values() for point in line] for axis in (0, 1))
    if not xs:
        draw.text((frame.left, height // 2), "nothing to show: no finite value", INK, font(SMALL))
        return from_pillow(picture)
    x, y = _scale_for(xs, axes.log_x, frame.left, frame.right), _scale_for(ys, axes.log_y, frame.bottom, frame.top)
    _draw_axes(draw, frame, axes, x, y)
    for index, line in enumerate(lines.values()):
        _draw_line(draw, [(x.pixel(px), y.pixel(py)) for px, py in line], index, legend.numbered)
        legend.draw(draw, frame, index)
    return from_pillow(picture)


def _drawable(points: Points, axes: Axes) -> Points:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)
            and (x > 0 or not axes.log_x) and (y > 0 or not axes.log_y)]


def _draw_axes(draw: "ImageDraw", frame: _Frame, axes: Axes, x: _Scale, y: _Scale) -> None:
    for tick in x.ticks():
        draw.line([(x.pixel(tick), frame.top), (x.pixel(tick), frame.bottom)], GRID)
        draw.text((x.pixel(tick), frame.bottom + 6), f"{tick:.4g}", INK, font(SMALL), anchor="mt")
    for tick in y.ticks():
        draw.line([(frame.left, y.pixel(tick)), (frame.right, y.pixel(tick))], GRID)
        draw.text((frame.left - 6, y.pixel(tick)), f"{tick:.4g}", INK, font(SMALL), anchor="rm")
    draw.rectangle(frame, outline=INK)
    draw.text(((frame.left + frame.right) / 2, frame.bottom + 30), axes.x_label, INK, font(SMALL), anchor="mm")
    draw.text((8, frame.top - 16), axes.y_label, INK, font(SMALL))


def _draw_line(draw: "ImageDraw", path: Sequence[tuple[float, float]], index: int, numbered: bool) -> None:
    if len(path) == 1:
        x, y = path[0]
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color(index))
        if numbered:
            draw.text((x + 5, y), str(index + 1), INK, font(SMALL), anchor="lm")
    draw.line(path, color(index), 2)


def loss_plot(losses: Mapping[str, Sequence[float]],
              title: str = "Distillation: distance from the plain network's output on the clean image",
              points: int = 60, size: tuple[int, int] = (420, 720)) -> Tensor:
    """The losses of trainings over their steps, by name, each as about `points` means over neighbouring steps.

    size: (height, width) in pixels.
    """
    return line_plot({name: _smooth(values, points) for name, values in losses.items()}, title,
                     Axes("step", "loss", log_y=True), size)


def agreement_plot(plain: Mapping[float, float], experts: Mapping[float, float]) -> Tensor:
    """How often the plain network and the experts give the answer on the finished image, by noise level, as it was measured.

    Values are in [0, 1], by the noise level in the middle of each interval.
    """
    lines = {"plain": sorted(plain.items()), "experts": sorted(experts.items())}
    return line_plot(lines, "Agreement with the plain network's answer on the finished image",
                     Axes("noise level", "agreement, on images held out", log_x=True), (300, 720))


def _smooth(values: Sequence[float], points: int) -> Points:
    width = max(1, len(values) // points)
    windows = ((start, values[start:start + width]) for start in range(0, len(values), width))
    return [(start + width / 2, sum(window) / len(window)) for start, window in windows]


def guidance_plot(names: Sequence[str], records: Sequence[Record]) -> Tensor:
    """Energy and size of the shift of every term, step by step, as means over the images.

    names: of the terms. records: of one run. A step is a noise level, because some samplers ask twice at one level.
    """
    steps = {sigma: step for step, sigma in enumerate(sorted({record.sigma for record in records}, reverse=True))}
    energies: dict[str, dict[int, float]] = {name: {} for name in names}
    sizes: dict[str, dict[int, float]] = {name: {} for name in names}
    for record in records:
        energies[names[record.term]][steps[record.sigma]] = record.energy.mean().item()
        sizes[names[record.term]][steps[record.sigma]] = record.rms.mean().item()
    return torch.cat([_step_plot(energies, "Energy (lower is closer to the target)", "energy"),
                      _step_plot(sizes, "Size of the shift (root mean square)", "rms")], dim=2)


def _step_plot(lines: dict[str, dict[int, float]], title: str, label: str) -> Tensor:
    points = {name: [(float(step), value) for step, value in sorted(line.items())] for name, line in lines.items()}
    return line_plot(points, title, Axes("step", label), (300, 720))
