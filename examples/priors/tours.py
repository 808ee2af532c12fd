"""Pictures of tours through cities, and tours as points that a picture can be drawn from (Graikos et al. 2022, section 4.4).

A picture is 0 where nothing is, about 1 on the line between two cities that follow one another, and -1 on every city. Lines
that overlap add up, so that a picture is linear in how much there is of each line, and whole and half lines are drawn alike.
"""
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppap_core.guidance.prior import Render
from ppap_core.io.files import load_tensors, save_tensors

SIDE = 64               # pixels of a picture
MARGIN = 3.0            # pixels around the unit square of the cities
LINE, DOT = 0.75, 1.75  # half the width of a line and the radius of a city, in pixels
FEWEST, MOST = 10, 50   # cities of the tours that the denoiser is trained on
Solve = Callable[[Tensor], Tensor]
"""(cities (V, 2)) -> the tour (V,) long: cities in the order in which they are visited."""


class Pictures(NamedTuple):
    """A batch of pictures."""

    image: Tensor  # (B, 1, SIDE, SIDE)


def cities(seed: int, count: int) -> Tensor:
    """Places in the unit square, (count, 2) float64."""
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lines(starts: Tensor, ends: Tensor) -> Tensor:
    """The line between each pair of places, (n, 2) and (n, 2) in the unit square -> (n, SIDE * SIDE) in [0, 1]."""
    a, b = (MARGIN + (SIDE - 2 * MARGIN) * place[:, :, None].float() for place in (starts, ends))
    pixels, way = _pixels() - a, b - a
    along = ((pixels * way).sum(1) / way.square().sum(1).clamp_min(1e-12)).clamp(0, 1)
    off = (pixels - along[:, None] * way).square().sum(1).sqrt()
    return (LINE + 0.5 - off).clamp(0, 1)  # anti-aliased over one pixel


def dots(places: Tensor) -> Tensor:
    """How much of each pixel is covered by cities, (V, 2) -> (SIDE * SIDE,) in [0, 1]."""
    centres = MARGIN + (SIDE - 2 * MARGIN) * places[:, :, None].float()
    off = (_pixels() - centres).square().sum(1).sqrt()
    return (DOT + 0.5 - off).clamp(0, 1).amax(0)


def _pixels() -> Tensor:
    """The centres of the pixels, (2, SIDE * SIDE)."""
    centres = torch.arange(SIDE) + 0.5
    return torch.stack(torch.meshgrid(centres, centres, indexing="xy")).flatten(1)


def picture(places: Tensor, tour: Tensor) -> Tensor:
    """A tour (V,) through cities (V, 2), (1, SIDE, SIDE)."""
    return _with_dots(lines(places[tour], places[tour.roll(-1)]).sum(0), dots(places)).view(1, SIDE, SIDE)


def _with_dots(drawn: Tensor, covered: Tensor) -> Tensor:
    return drawn * (1 - covered) - covered


def adjacency(point: Tensor, temperature: float) -> Tensor:
    """How much there is of each edge, (B, V, V) of any numbers -> (B, V, V), symmetric, each row about 2 in sum.

    Each city shares a whole among the others by a softmax, and an edge has what its two ends give it; a half from both for
    each of the two neighbours makes a tour.
    """
    even = (point + point.mT) / 2
    alone = torch.eye(point.shape[1], dtype=torch.bool, device=point.device)
    shares = (even / temperature).masked_fill(alone, -torch.inf).softmax(2)
    return shares + shares.mT


def drawer(places: Sequence[Tensor]) -> Render:
    """How tours through these cities are drawn: how much there is of each edge (B, V, V) -> (B, 1, SIDE, SIDE).

    places: (V, 2) for each of the B pictures. Every edge is drawn once, here: 20 MB for 50 cities.
    """
    first, second = torch.triu_indices(len(places[0]), len(places[0]), 1)  # the ends of every edge
    drawn = torch.stack([lines(each[first], each[second]) for each in places])
    covered = torch.stack([dots(each) for each in places])

    def draw(edges: Tensor) -> Tensor:
        amounts = edges[:, first, second].to(drawn)
        return _with_dots(torch.bmm(amounts[:, None], drawn)[:, 0], covered).view(-1, 1, SIDE, SIDE).to(edges)
    return draw


def renderer(places: Sequence[Tensor], temperature: float) -> Render:
    """`drawer` of the `adjacency` of a point: a render for `run_prior`, differentiable."""
    draw = drawer(places)
    return lambda point: draw(adjacency(point, temperature))


def training_count(seed: int) -> int:
    """How many cities the training tour of a seed has."""
    return FEWEST + int(torch.randint(MOST - FEWEST + 1, (), generator=torch.Generator().manual_seed(seed)))


def solved_tours(folder: Path, count: int, first: int, solve: Solve) -> Callable[[range, int], Pictures]:
    """Pictures of the best tours by number; solved and drawn once and kept in the folder, as states are.

    Number n is picture n of `count`, in one of its eight mirror images. first: the seed of the first instance.
    """
    file = folder / f"tours_{count}.state.safetensors"
    if not file.exists():
        drawn = []
        for seed in range(first, first + count):
            places = cities(seed, training_count(seed))
            drawn.append(picture(places, solve(places)).half())
        save_tensors(file, {"image": torch.stack(drawn)}, {"count": count})
    kept = load_tensors(file)[0]["image"]

    def take(numbers: range, size: int) -> Pictures:
        return Pictures(torch.stack([mirrored(kept[number % count].float(), number // count % 8) for number in numbers]))
    return take


def mirrored(image: Tensor, way: int) -> Tensor:
    """One of the eight mirror images of a square picture (1, H, H)."""
    image = image.mT if way & 1 else image
    return image.flip([axis for axis, bit in ((1, 2), (2, 4)) if way & bit])
