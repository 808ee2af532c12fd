"""Tours are drawn exactly, searched for without breaking them, and short when the prior of pictures wants them."""
import math
import sys
from itertools import permutations

import pytest
import torch
from helpers import randn, says

from benchmarks import tours as tours_bench
from benchmarks.tours import Search, TourBench, find_edges, greedy_tour, prior_tour, random_tour, table
from examples.priors.networks import load_tour_prior
from examples.priors.salesman import distances, insert_edges, length, nearest_neighbour, solve, two_opt
from examples.priors.tours import (
    SIDE,
    PointRenderer,
    SolvedTours,
    TourRenderer,
    adjacency,
    cities,
    mirrored,
    picture,
    training_count,
)
from ppap_core.guidance.prior import PriorConfig


def whole_edges(tour: torch.Tensor) -> torch.Tensor:
    """The adjacency matrix of a tour, (1, V, V)."""
    edges = torch.zeros(1, len(tour), len(tour))
    edges[0, tour, tour.roll(-1)] = 1
    return edges + edges.mT


def visits_all(tour: torch.Tensor, count: int) -> bool:
    return tour.sort().values.tolist() == list(range(count))


# Pictures

def test_a_whole_tour_is_drawn_as_its_picture():
    places, tour = cities(3, 11), random_tour(11, 5)
    assert torch.allclose(TourRenderer([places])(whole_edges(tour))[0], picture(places, tour), atol=1e-6)


def test_a_certain_tour_is_drawn_as_its_picture():
    places, tour = cities(3, 11), random_tour(11, 5)
    # each city halves itself between its two neighbours
    sure = PointRenderer(TourRenderer([places]), 0.01)(whole_edges(tour))
    assert torch.allclose(sure[0], picture(places, tour), atol=1e-4)


def test_lines_and_cities_lie_where_they_should():
    places = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    image = picture(places, torch.arange(3))[0]
    assert image.shape == (SIDE, SIDE)
    assert image[2:4, 2:4].max() == -1  # a city in the corner, three pixels from the border
    assert image[2:4, 32].min() > 0.5   # from the first to the second along x
    assert image[32, 60:62].min() > 0.5
    assert image[32, 32] > 0.9          # back along the diagonal
    assert image[10:50, 2:4].abs().max() == 0


def test_each_picture_is_of_its_own_cities():
    places, points = [cities(seed, 7) for seed in (1, 2, 3)], randn(3, 7, 7)
    together = PointRenderer(TourRenderer(places), 0.5)(points)
    for i in range(3):
        alone = PointRenderer(TourRenderer(places[i:i + 1]), 0.5)(points[i:i + 1])
        assert torch.allclose(together[i:i + 1], alone, atol=1e-6)


def test_the_gradient_of_the_picture_equals_finite_differences():
    places, point, step = [cities(4, 6)], randn(1, 6, 6, dtype=torch.float64), 1e-3
    weights = randn(1, 1, SIDE, SIDE, seed=1, dtype=torch.float64)
    draw = PointRenderer(TourRenderer(places), 0.7)

    def value(at: torch.Tensor) -> torch.Tensor:
        return (weights * draw(at)).sum()
    where = point.clone().requires_grad_(True)
    value(where).backward()
    for way in (randn(1, 6, 6, seed=seed, dtype=torch.float64) for seed in (2, 3)):
        slope = (value(point + step * way) - value(point - step * way)).item() / (2 * step)
        assert math.isclose(slope, (where.grad * way).sum().item(), rel_tol=1e-2, abs_tol=1e-2)


def test_edges_are_symmetric_and_none_is_a_loop():
    edges = adjacency(randn(2, 9, 9), 0.3)
    assert torch.equal(edges, edges.mT)
    assert edges.diagonal(dim1=1, dim2=2).abs().max() == 0
    assert torch.allclose(edges.sum((1, 2)), torch.full((2,), 18.0))


def test_training_pictures_are_kept_and_come_back_mirrored(tmp_path):
    solved = []

    def any_tour(places: torch.Tensor) -> torch.Tensor:
        solved.append(len(places))
        return torch.arange(len(places))
    first = SolvedTours(tmp_path, 3, 500, any_tour)(range(0, 6), SIDE).image
    again = SolvedTours(tmp_path, 3, 500, any_tour)(range(3, 6), SIDE).image
    assert solved == [training_count(seed) for seed in (500, 501, 502)]
    assert torch.equal(first[3:], again)
    assert torch.equal(again[1], mirrored(first[1], 1))
    assert len({tuple(mirrored(first[0], way).flatten().tolist()) for way in range(8)}) == 8


# Rules

@pytest.mark.parametrize("seed", range(5))
def test_inserted_edges_always_make_one_round_through_all_cities(seed):
    assert visits_all(insert_edges(randn(17, 17, seed=seed)), 17)
    assert visits_all(insert_edges(torch.zeros(17, 17)), 17)
    assert visits_all(nearest_neighbour(cities(seed, 17)), 17)


def test_inserted_edges_are_those_of_a_tour_that_is_asked_for():
    tour = random_tour(13, 2)
    assert torch.equal(whole_edges(insert_edges(whole_edges(tour)[0])), whole_edges(tour))


@pytest.mark.parametrize("seed", range(3))
def test_two_opt_ends_at_a_local_minimum(seed):
    """It never lengthens a tour."""
    places, tour = cities(seed, 15), random_tour(15, seed)
    improved = two_opt(places, tour)
    assert visits_all(improved, 15)
    assert length(places, improved) <= length(places, tour)
    for i in range(15):
        for j in range(i + 1, 15):
            turned = torch.cat([improved[:i], improved[i:j + 1].flip(0), improved[j + 1:]])
            assert length(places, turned) >= length(places, improved) - 1e-9


def test_on_a_circle_two_opt_finds_the_round_from_anywhere():
    angle = 2 * math.pi * torch.arange(12, dtype=torch.float64) / 12
    places = 0.5 + 0.4 * torch.stack([angle.cos(), angle.sin()], dim=1)
    shortest = 12 * 2 * 0.4 * math.sin(math.pi / 12)
    for tour in (two_opt(places, random_tour(12, 1)), two_opt(places, greedy_tour(places)), greedy_tour(places)):
        assert math.isclose(length(places, tour), shortest)


def test_the_solver_finds_the_shortest_of_all_tours():
    pytest.importorskip("fast_tsp")
    places = cities(8, 7)
    shortest = min(length(places, torch.tensor([0, *rest])) for rest in permutations(range(1, 7)))
    assert math.isclose(length(places, solve(places)), shortest, rel_tol=1e-9)


def test_a_missing_solver_is_told_in_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_tsp", None)
    with says(ImportError, "fast-tsp", "install"):
        solve(cities(8, 7))


# The prior

QUICK = Search(PriorConfig(steps=40, learning_rate=0.4, sigma_max=2.0, sigma_min=0.2))


@pytest.mark.slow
@pytest.mark.parametrize("jacobian", [False, True])
def test_a_prior_that_knows_the_picture_finds_its_tour(jacobian):
    places, tours = [cities(seed, 20) for seed in range(4)], [random_tour(20, seed) for seed in range(4)]
    known = torch.stack([picture(each, tour) for each, tour in zip(places, tours, strict=True)])
    search = Search(PriorConfig(60, 1.0, 2.0, 0.2, backprop_through_model=jacobian), 0.5)
    found = find_edges(lambda x, sigma: known + 0 * x, places, list(range(4)), search)
    for wanted, tour in zip(found, tours, strict=True):
        assert torch.equal(whole_edges(insert_edges(wanted)), whole_edges(tour))


def test_a_search_does_not_depend_on_the_others():
    places, search = [cities(seed, 9) for seed in range(3)], Search(PriorConfig(steps=4))
    together = find_edges(load_tour_prior(), places, [4, 5, 6], search)
    alone = find_edges(load_tour_prior(), places[1:2], [5], search)
    assert torch.allclose(together[1:2], alone, atol=1e-3)


@pytest.mark.slow
def test_the_prior_finds_much_shorter_tours_than_chance():
    places = [cities(seed, 15) for seed in range(6)]
    edges = find_edges(load_tour_prior(), places, list(range(6)), QUICK)
    ratios = [length(each, insert_edges(wanted)) / length(each, two_opt(each, greedy_tour(each)))
              for each, wanted in zip(places, edges, strict=True)]
    chance = [length(each, random_tour(15, seed)) / length(each, two_opt(each, greedy_tour(each)))
              for seed, each in enumerate(places)]
    assert sum(ratios) / 6 < 1.3   # by what the prior wants alone, without a look at lengths
    assert sum(chance) / 6 > 1.7
    assert all(visits_all(prior_tour(each, wanted), 15) for each, wanted in zip(places, edges, strict=True))


def test_the_bench_measures_every_way_and_never_beats_the_solver(monkeypatch):
    def best(places: torch.Tensor, seconds: float) -> torch.Tensor:  # of five cities after the first
        return min((torch.tensor([0, *rest]) for rest in permutations(range(1, 6))), key=lambda tour: length(places, tour))
    monkeypatch.setattr(tours_bench, "solve", best)
    small = TourBench(counts=(6,), instances=3, batch=2, particles=2, search=Search(PriorConfig(steps=2)))
    rows = tours_bench.tour_bench(small, lambda line: None)
    assert len(rows) == 1 + len(tours_bench.RULES) + 5
    assert all(row["gap"] > -1e-9 for row in rows)
    assert rows[0]["gap"] == 0
    assert table(rows).count("\n") == len(rows) + 2
    assert (distances(cities(1, 6)).diagonal() == 0).all()
