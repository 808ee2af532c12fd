"""Tours found without a model: insertion of edges, nearest neighbours, 2-opt, and a solver to compare with.

places: cities (V, 2) float64. A tour is (V,) long: the cities in the order of the visit, then back to the first.
"""
import math

import torch
from torch import Tensor

from ppap_core.io.packages import importing


def distances(places: Tensor) -> Tensor:
    """Distances between all cities, (V, V), exactly 0 on the diagonal."""
    return (places[:, None] - places).square().sum(2).sqrt()


def length(places: Tensor, tour: Tensor) -> float:
    """Length of the whole round."""
    visited = places[tour]
    return float((visited - visited.roll(-1, 0)).square().sum(1).sqrt().sum())


def insert_edges(score: Tensor) -> Tensor:
    """The tour of the edges of greatest score (V, V), taken greedily unless they fork or close the round early."""
    count = len(score)
    first, second = torch.triu_indices(count, count, 1)
    order = ((score + score.T)[first, second]).argsort(descending=True, stable=True)
    paths = list(range(count))  # of each city the number of the path that it belongs to
    neighbours: list[list[int]] = [[] for _ in range(count)]
    missing = count - 1
    for a, b in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if len(neighbours[a]) < 2 and len(neighbours[b]) < 2 and paths[a] != paths[b]:
            neighbours[a].append(b)
            neighbours[b].append(a)
            joined, into = paths[b], paths[a]
            paths = [into if path == joined else path for path in paths]
            missing -= 1
            if missing == 0:
                break
    return _walk(neighbours)


def _walk(neighbours: list[list[int]]) -> Tensor:
    here = next(city for city, others in enumerate(neighbours) if len(others) < 2)
    tour, before = [here], -1
    while len(tour) < len(neighbours):
        here, before = next(city for city in neighbours[here] if city != before), here
        tour.append(here)
    return torch.tensor(tour)


def nearest_neighbour(places: Tensor) -> Tensor:
    """The tour from the first city always on to the nearest one that was not visited yet."""
    remaining, tour = distances(places), [0]
    remaining[:, 0] = math.inf
    while len(tour) < len(places):
        tour.append(int(remaining[tour[-1]].argmin()))
        remaining[:, tour[-1]] = math.inf
    return torch.tensor(tour)


def two_opt(places: Tensor, tour: Tensor) -> Tensor:
    """2-opt (Croes 1958): reverse the stretch that shortens the tour most, until none does."""
    apart, count = distances(places), len(tour)
    possible = torch.ones(count, count, dtype=torch.bool).triu(2)
    while True:
        ahead = tour.roll(-1)
        edge = apart[tour, ahead]
        gain = edge[:, None] + edge - apart[tour][:, tour] - apart[ahead][:, ahead]
        best = int(gain.where(possible, -math.inf).argmax())
        i, j = divmod(best, count)
        if gain[i, j] < 1e-12:
            return tour
        tour = torch.cat([tour[:i + 1], tour[i + 1:j + 1].flip(0), tour[j + 1:]])


def solve(places: Tensor, seconds: float = 0.03) -> Tensor:
    """A tour near the shortest, and up to 20 cities the shortest, by fast_tsp: for training and for comparison.

    seconds: that the solver may take. ImportError without fast_tsp.
    """
    with importing("fast_tsp", "tours are compared with those of a solver, which needs", "fast-tsp"):
        import fast_tsp
    whole = (distances(places) * 40_000).round().long().tolist()  # whole numbers up to 65,535
    return torch.tensor(fast_tsp.find_tour(whole, duration_seconds=seconds))
