"""Tours found without a model: insertion of edges, nearest neighbours, 2-opt, and a solver to compare with.

places: (V, 2) float64. A tour is (V,) long, the cities in the order in which they are visited, back to the first at the end.
"""
import math

import torch
from torch import Tensor


def distances(places: Tensor) -> Tensor:
    """(V, 2) -> (V, V), exact on the diagonal too."""
    return (places[:, None] - places).square().sum(2).sqrt()


def length(places: Tensor, tour: Tensor) -> float:
    """Of the whole round."""
    visited = places[tour]
    return float((visited - visited.roll(-1, 0)).square().sum(1).sqrt().sum())


def insert_edges(score: Tensor) -> Tensor:
    """The tour of the edges of greatest score (V, V), taken in turn where they neither fork nor close the round early."""
    count = len(score)
    first, second = torch.triu_indices(count, count, 1)
    order = ((score + score.T)[first, second]).argsort(descending=True, stable=True)
    part, follows = list(range(count)), [[] for _ in range(count)]
    left = count - 1
    for a, b in zip(first[order].tolist(), second[order].tolist(), strict=True):
        if len(follows[a]) < 2 and len(follows[b]) < 2 and part[a] != part[b]:
            follows[a].append(b)
            follows[b].append(a)
            old, new = part[b], part[a]
            part = [new if each == old else each for each in part]
            left -= 1
            if left == 0:
                break
    return _walk(follows)


def _walk(follows: list[list[int]]) -> Tensor:
    """The cities of a path that visits all, from one of its ends."""
    here = next(city for city, others in enumerate(follows) if len(others) < 2)
    tour, before = [here], None
    while len(tour) < len(follows):
        here, before = next(city for city in follows[here] if city != before), here
        tour.append(here)
    return torch.tensor(tour)


def nearest_neighbour(places: Tensor) -> Tensor:
    """Always on to the nearest city that was not visited yet, from the first."""
    apart, tour = distances(places), [0]
    apart[:, 0] = math.inf
    while len(tour) < len(places):
        tour.append(int(apart[tour[-1]].argmin()))
        apart[:, tour[-1]] = math.inf
    return torch.tensor(tour)


def two_opt(places: Tensor, tour: Tensor) -> Tensor:
    """Turn round the stretch that shortens the tour most, until none does."""
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
    """A tour that is near the shortest, and up to 20 cities the shortest, by fast_tsp: only to train and to compare with."""
    try:
        import fast_tsp
    except ImportError as error:
        raise ImportError("the tours are compared with and trained on those of a solver: pip install fast-tsp") from error

    whole = (distances(places) * 40_000).round().long().tolist()  # it takes whole numbers up to 65,535
    return torch.tensor(fast_tsp.find_tour(whole, duration_seconds=seconds))
