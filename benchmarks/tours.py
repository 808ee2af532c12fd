"""The benchmark of tours: how much longer than the shortest are tours found by a prior of pictures, and those of rules."""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from examples.priors.networks import load_tour_prior
from examples.priors.salesman import distances, insert_edges, length, nearest_neighbour, solve, two_opt
from examples.priors.tours import PointRenderer, TourRenderer, adjacency, cities
from ppap_core import Denoiser, PriorConfig, PriorObjective
from ppap_core.guidance.prior import run_prior
from ppap_core.rng import seeded_noise

from . import report
from .report import Column, Report, Row


@dataclass(frozen=True)
class Search:
    """How a tour is found under the prior. It needs no constraint: every point is drawn as edges between the cities."""

    prior: PriorConfig = PriorConfig(steps=80, learning_rate=0.2, sigma_max=2.0, sigma_min=0.2)
    temperature: float = 0.5  # of the softmax over each city's neighbours
    start_std: float = 0.1    # of the first point, in which all edges are nearly alike


@dataclass(frozen=True)
class TourBench:
    """Everything that a result depends on, besides the weights."""

    counts: tuple[int, ...] = (20, 50)
    instances: int = 64
    first: int = 1000      # the seed of the first instance; none of these is trained on
    batch: int = 16        # instances that are searched for at once
    particles: int = 2     # searches of which the shortest tour is kept
    search: Search = Search()
    seconds: float = 0.1   # that the solver may take


class Tours(NamedTuple):
    """A tour of every instance, and the seconds for one."""

    tours: list[Tensor]
    seconds: float


def find_edges(denoise: Denoiser, places: Sequence[Tensor], seeds: Sequence[int], search: Search) -> Tensor:
    """The amounts of edges (B, V, V) that the prior prefers, for cities (V, 2) of B instances; i depends on seeds[i]."""
    count = len(places[0])
    start = search.start_std * seeded_noise(seeds, (count, count))
    render = PointRenderer(TourRenderer(places), search.temperature)
    points, _ = run_prior(PriorObjective(denoise), start, search.prior, seeds, render)
    return adjacency(points, search.temperature)


def prior_tour(places: Tensor, edges: Tensor) -> Tensor:
    """The tour of the edges (V, V) that the prior prefers most, relative to their length."""
    return insert_edges(edges.double() / distances(places).clamp_min(1e-9))


def greedy_tour(places: Tensor) -> Tensor:
    """The tour of the shortest edges."""
    return insert_edges(-distances(places))


def random_tour(count: int, seed: int) -> Tensor:
    """The cities in random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def best_restart(places: Tensor, seed: int, count: int) -> Tensor:
    """The shortest tour that 2-opt makes of so many random ones."""
    return shortest(places, [two_opt(places, random_tour(len(places), 1000 * seed + start)) for start in range(count)])


def shortest(places: Tensor, tours: Sequence[Tensor]) -> Tensor:
    """The shortest tour, the first of equals."""
    return min(tours, key=lambda tour: length(places, tour))


Rule = Callable[[Tensor, int], Tensor]
"""(cities (V, 2), seed of the instance) -> tour (V,)"""

RULES: dict[str, Rule] = {
    "random tour, 2-opt": lambda places, seed: best_restart(places, seed, 1),
    "best of 4 random tours, 2-opt": lambda places, seed: best_restart(places, seed, 4),
    "nearest neighbours, 2-opt": lambda places, seed: two_opt(places, nearest_neighbour(places)),
    "shortest edges": lambda places, seed: greedy_tour(places),
    "shortest edges, 2-opt": lambda places, seed: two_opt(places, greedy_tour(places)),
}


def by_rule(instances: dict[int, Tensor], rule: Rule) -> Tours:
    """Tours of all instances, by their seeds, that a rule finds."""
    started = time.perf_counter()
    tours = [rule(places, seed) for seed, places in instances.items()]
    return Tours(tours, (time.perf_counter() - started) / len(instances))


def by_prior(denoise: Denoiser, instances: dict[int, Tensor], config: TourBench, report: Report, particle: int = 0) -> Tours:
    """Tours that the prior finds, without 2-opt. particle: another one starts elsewhere and meets other noise."""
    tours: list[Tensor] = []
    seeds, started = list(instances), time.perf_counter()
    for start in range(0, len(seeds), config.batch):
        part = seeds[start:start + config.batch]
        places = [instances[seed] for seed in part]
        edges = find_edges(denoise, places, [1000 * seed + particle for seed in part], config.search)
        tours += map(prior_tour, places, edges)
        report(f"prior: particle {particle + 1}, {len(tours)} of {len(seeds)} instances of {len(places[0])} cities")
    return Tours(tours, (time.perf_counter() - started) / len(instances))


def all_tours(denoise: Denoiser, instances: dict[int, Tensor], config: TourBench, report: Report) -> dict[str, Tours]:
    """Tours of all instances by every way to find them; the solver's come first."""
    places = list(instances.values())
    improved = partial(_improved, places)
    tours = {"solver": by_rule(instances, lambda cities, _: solve(cities, config.seconds))}
    tours |= {name: by_rule(instances, rule) for name, rule in RULES.items()}
    particles = [by_prior(denoise, instances, config, report, particle) for particle in range(config.particles)]
    best = list(map(shortest, places, zip(*(improved(result).tours for result in particles), strict=True)))
    tours |= {"prior": particles[0], "prior, 2-opt": improved(particles[0]),
              f"best of {config.particles} by the prior, 2-opt": Tours(best, sum(result.seconds for result in particles))}
    prior = replace(config.search.prior, backprop_through_model=True)
    through = by_prior(denoise, instances, replace(config, search=replace(config.search, prior=prior)), report)
    return tours | {"prior, through the model": through, "prior, through the model, 2-opt": improved(through)}


def _improved(places: Sequence[Tensor], result: Tours) -> Tours:
    return result._replace(tours=list(map(two_opt, places, result.tours)))


def measured(way: str, places: Sequence[Tensor], result: Tours, best: Sequence[Tensor]) -> Row:
    """A row: the mean gap to the best tours with its standard error, and the share of instances without a gap."""
    gaps = torch.tensor([length(cities, tour) / length(cities, least) - 1
                         for cities, tour, least in zip(places, result.tours, best, strict=True)], dtype=torch.float64)
    return {"cities": len(places[0]), "way": way, "gap": float(gaps.mean()), "seconds": result.seconds,
            "error": float(gaps.std() / len(gaps) ** 0.5), "shortest": float((gaps < 1e-6).double().mean())}


def tour_bench(config: TourBench, report: Report) -> list[Row]:
    """A row for each number of cities and each way. ImportError without the solver."""
    denoise, rows = load_tour_prior(), []
    for count in config.counts:
        instances = {seed: cities(seed, count) for seed in range(config.first, config.first + config.instances)}
        tours = all_tours(denoise, instances, config, report)
        for way, result in tours.items():
            rows.append(measured(way, list(instances.values()), result, tours["solver"].tours))
            report(f"{count} cities, {way}: gap {rows[-1]['gap']:.2%}")
    return rows


COLUMNS = (Column("cities", "{cities}", numeric=False), Column("way", "{way}", numeric=False),
           Column("gap to the shortest", "{gap:.2%} ± {error:.2%}", numeric=False),
           Column("shortest found", "{shortest:.0%}", numeric=False), Column("seconds", "{seconds:.3g}", numeric=False))


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown; gaps to the solver's tours with their standard error."""
    return report.markdown(COLUMNS, rows)
