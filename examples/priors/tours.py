"""Pictures of tours through cities, and tours as points that a picture can be drawn from (Graikos et al. 2022, section 4.4).

A picture is 0 on empty ground, about 1 on the line between two consecutive cities, and -1 on every city. Overlapping lines
add up, so that a picture is linear in the amount of every line.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppap_core.io.files import load_tensors, save_tensors

SIDE = 64               # pixels of a picture
MARGIN = 3.0            # pixels around the unit square of the cities
LINE, DOT = 0.75, 1.75  # half the width of a line and the radius of a city, in pixels
FEWEST, MOST = 10, 50   # cities of the tours that the denoiser is trained on
Solve = Callable[[Tensor], Tensor]
"""cities (V, 2) -> the tour (V,) long: cities in the order of the visit"""


class Pictures(NamedTuple):
    """A batch of pictures."""

    image: Tensor  # (B, 1, SIDE, SIDE)


def cities(seed: int, count: int) -> Tensor:
    """Random cities in the unit square, (count, 2) float64."""
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lines(starts: Tensor, ends: Tensor) -> Tensor:
    """The line from each start (n, 2) to its end (n, 2), both in the unit square, (n, SIDE * SIDE) in [0, 1]."""
    a, b = _to_pixels(starts), _to_pixels(ends)
    pixels, direction = _pixel_centres() - a, b - a
    along = ((pixels * direction).sum(1) / direction.square().sum(1).clamp_min(1e-12)).clamp(0, 1)
    distance = (pixels - along[:, None] * direction).square().sum(1).sqrt()
    return (LINE + 0.5 - distance).clamp(0, 1)  # anti-aliased over one pixel


def dots(places: Tensor) -> Tensor:
    """Coverage of each pixel by cities (V, 2), (SIDE * SIDE,) in [0, 1]."""
    distance = (_pixel_centres() - _to_pixels(places)).square().sum(1).sqrt()
    return (DOT + 0.5 - distance).clamp(0, 1).amax(0)


def _to_pixels(places: Tensor) -> Tensor:
    return MARGIN + (SIDE - 2 * MARGIN) * places[:, :, None].float()


def _pixel_centres() -> Tensor:
    centres = torch.arange(SIDE) + 0.5
    return torch.stack(torch.meshgrid(centres, centres, indexing="xy")).flatten(1)


def picture(places: Tensor, tour: Tensor) -> Tensor:
    """Picture of a tour (V,) through cities (V, 2), (1, SIDE, SIDE)."""
    return _with_dots(lines(places[tour], places[tour.roll(-1)]).sum(0), dots(places)).view(1, SIDE, SIDE)


def _with_dots(drawn: Tensor, covered: Tensor) -> Tensor:
    return drawn * (1 - covered) - covered


def adjacency(point: Tensor, temperature: float) -> Tensor:
    """Amounts of all edges, from any numbers (B, V, V): (B, V, V), symmetric, about 2 in each row's sum.

    Each city divides one whole among the others by a softmax, and an edge has the shares of both its ends; in a tour each
    city gives a half to either neighbour.
    """
    symmetric = (point + point.mT) / 2
    diagonal = torch.eye(point.shape[1], dtype=torch.bool, device=point.device)
    shares = (symmetric / temperature).masked_fill(diagonal, -torch.inf).softmax(2)
    return shares + shares.mT


class TourRenderer:
    """Draws amounts of edges (B, V, V) as pictures (B, 1, SIDE, SIDE), differentiable.

    places: cities (V, 2) of each of the B pictures. Every edge is drawn once, at the start: 20 MB for 50 cities.
    """

    def __init__(self, places: Sequence[Tensor]):
        self.first, self.second = torch.triu_indices(len(places[0]), len(places[0]), 1)  # the ends of every edge
        self.drawn = torch.stack([lines(own[self.first], own[self.second]) for own in places])
        self.covered = torch.stack([dots(own) for own in places])

    def __call__(self, edges: Tensor) -> Tensor:
        amounts = edges[:, self.first, self.second].to(self.drawn)
        drawn = torch.bmm(amounts[:, None], self.drawn)[:, 0]
        return _with_dots(drawn, self.covered).view(-1, 1, SIDE, SIDE).to(edges)


@dataclass(frozen=True)
class PointRenderer:
    """Draws the `adjacency` of points (B, V, V): the `render` of a search under a prior."""

    tours: TourRenderer
    temperature: float

    def __call__(self, point: Tensor) -> Tensor:
        return self.tours(adjacency(point, self.temperature))


def training_count(seed: int) -> int:
    """Number of cities of the training tour of a seed."""
    return FEWEST + int(torch.randint(MOST - FEWEST + 1, (), generator=torch.Generator().manual_seed(seed)))


class SolvedTours:
    """Batches of pictures of short tours by number, (numbers, side) -> Pictures: a source of training examples.

    Number n is tour n modulo `count` in one of its eight mirror images. Tours are solved and drawn once and kept in the
    folder.

    first: seed of the first instance.
    """

    def __init__(self, folder: Path, count: int, first: int, solve: Solve):
        file = folder / f"tours_{count}.state.safetensors"
        if not file.exists():
            drawn = torch.stack([_solved_picture(seed, solve) for seed in range(first, first + count)])
            save_tensors(file, {"image": drawn}, {"count": count})
        self.images = load_tensors(file)[0]["image"]

    def __call__(self, numbers: range, size: int) -> Pictures:
        count = len(self.images)
        return Pictures(torch.stack([mirrored(self.images[number % count].float(), number // count % 8)
                                     for number in numbers]))


def _solved_picture(seed: int, solve: Solve) -> Tensor:
    places = cities(seed, training_count(seed))
    return picture(places, solve(places)).half()


def mirrored(image: Tensor, way: int) -> Tensor:
    """One of the eight mirror images of a square picture (1, H, H): bit 1 of `way` transposes, bits 2 and 4 flip an axis."""
    image = image.mT if way & 1 else image
    return image.flip([axis for axis, bit in ((1, 2), (2, 4)) if way & bit])
