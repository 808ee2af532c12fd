"""The benchmark of tours: how much longer than the shortest are those that a prior of pictures finds, and those of rules."""
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from examples.priors.networks import load_tour_prior
from examples.priors.salesman import distances, insert_edges, length, nearest_neighbour, solve, two_opt
from examples.priors.tours import adjacency, cities, renderer
from ppap_core.guidance.prior import PriorConfig, PriorObjective, run_prior
from ppap_core.rng import seeded_noise
from ppap_core.sampling import Denoiser

Report = Callable[[str], None]


@dataclass(frozen=True)
class Search:
    """How a tour is found under the prior. No constraint is needed: every point is drawn as edges between the cities."""

    prior: PriorConfig = PriorConfig(steps=80, learning_rate=0.2, sigma_max=2.0, sigma_min=0.2)
    temperature: float = 0.5  # of the softmax over each city's neighbours
    spread: float = 0.1       # of the point at first, which is nearly every edge alike


@dataclass(frozen=True)
class TourBench:
    """Everything that a result depends on, besides the weights."""

    counts: tuple[int, ...] = (20, 50)
    instances: int = 64
    first: int = 1000      # the seed of the first instance; none of these is trained on
    batch: int = 16        # instances that are searched for at once
    particles: int = 2     # searches of which the shortest tour is kept
    search: Search = Search()
    seconds: float = 0.1   # that the solver has


def find_edges(denoise: Denoiser, places: list[Tensor], seeds: list[int], search: Search) -> Tensor:
    """How much of each edge the prior wants, (B, V, V), for cities (V, 2) of B instances; i depends on seeds[i] only."""
    count = len(places[0])
    start = search.spread * seeded_noise(seeds, (count, count))
    points, _ = run_prior(PriorObjective(denoise), start, search.prior, seeds,
                          renderer(places, search.temperature))
    return adjacency(points, search.temperature)


def prior_tour(places: Tensor, edges: Tensor) -> Tensor:
    """The tour of the edges (V, V) that the prior wants most for their length."""
    return insert_edges(edges.double() / distances(places).clamp_min(1e-9))


def greedy_tour(places: Tensor) -> Tensor:
    """The tour of the shortest edges."""
    return insert_edges(-distances(places))


def random_tour(count: int, seed: int) -> Tensor:
    """Any order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def restarts(places: Tensor, seed: int, count: int) -> Tensor:
    """The shortest that 2-opt makes of so many random tours."""
    return shortest(places, [two_opt(places, random_tour(len(places), 1000 * seed + k)) for k in range(count)])


def shortest(places: Tensor, tours: list[Tensor]) -> Tensor:
    """The first of the shortest."""
    return min(tours, key=lambda tour: length(places, tour))


RULES: dict[str, Callable[[Tensor, int], Tensor]] = {  # (cities (V, 2), seed of the instance) -> tour
    "random tour, 2-opt": lambda places, seed: restarts(places, seed, 1),
    "best of 4 random tours, 2-opt": lambda places, seed: restarts(places, seed, 4),
    "nearest neighbours, 2-opt": lambda places, seed: two_opt(places, nearest_neighbour(places)),
    "shortest edges": lambda places, seed: greedy_tour(places),
    "shortest edges, 2-opt": lambda places, seed: two_opt(places, greedy_tour(places)),
}


def by_rule(instances: dict[int, Tensor], rule: Callable[[Tensor, int], Tensor]) -> tuple[list[Tensor], float]:
    """The tour of every instance, and the seconds of one."""
    started = time.perf_counter()
    tours = [rule(places, seed) for seed, places in instances.items()]
    return tours, (time.perf_counter() - started) / len(instances)


def by_prior(denoise: Denoiser, instances: dict[int, Tensor], search: Search, batch: int, particle: int,
             report: Report) -> tuple[list[Tensor], float]:
    """The same by the prior, without 2-opt; another particle starts elsewhere and meets other noise."""
    tours, seeds, started = [], list(instances), time.perf_counter()
    for start in range(0, len(seeds), batch):
        part = seeds[start:start + batch]
        places = [instances[seed] for seed in part]
        edges = find_edges(denoise, places, [1000 * seed + particle for seed in part], search)
        tours += [prior_tour(each, wanted) for each, wanted in zip(places, edges, strict=True)]
        report(f"prior: particle {particle + 1}, {len(tours)} of {len(seeds)} instances of {len(places[0])} cities")
    return tours, (time.perf_counter() - started) / len(instances)


def tour_bench(config: TourBench, report: Report) -> list[dict]:
    """A row for each number of cities and each way. ImportError without the solver."""
    denoise = load_tour_prior()
    rows = []
    for count in config.counts:
        instances = {seed: cities(seed, count) for seed in range(config.first, config.first + config.instances)}
        places = list(instances.values())
        best, seconds = by_rule(instances, lambda each, _: solve(each, config.seconds))

        def row(way: str, tours: list[Tensor], seconds: float, count=count, places=places, best=best) -> None:
            gaps = torch.tensor([length(each, tour) / length(each, least) - 1
                                 for each, tour, least in zip(places, tours, best, strict=True)], dtype=torch.float64)
            rows.append({"cities": count, "way": way, "gap": float(gaps.mean()), "seconds": seconds,
                         "error": float(gaps.std() / len(gaps) ** 0.5), "shortest": float((gaps < 1e-6).double().mean())})
            report(f"{count} cities, {way}: gap {gaps.mean():.2%}")
        row("solver", best, seconds)
        for name, rule in RULES.items():
            row(name, *by_rule(instances, rule))
        improve = partial(map, two_opt, places)
        found = [by_prior(denoise, instances, config.search, config.batch, particle, report)
                 for particle in range(config.particles)]
        improved = [list(improve(tours)) for tours, _ in found]
        row("prior", *found[0])
        row("prior, 2-opt", improved[0], found[0][1])
        row(f"best of {config.particles} by the prior, 2-opt",
            [shortest(each, list(tours)) for each, *tours in zip(places, *improved, strict=True)],
            sum(seconds for _, seconds in found))
        through = replace(config.search, prior=replace(config.search.prior, backprop_through_model=True))
        tours, seconds = by_prior(denoise, instances, through, config.batch, 0, report)
        row("prior, through the model", tours, seconds)
        row("prior, through the model, 2-opt", list(improve(tours)), seconds)
    return rows


def table(rows: list[dict]) -> str:
    """As Markdown; gaps to the solver's tours with their standard error."""
    lines = ["| cities | way | gap to the shortest | shortest found | seconds |", "|---|---|---|---|---|"]
    lines += [f"| {row['cities']} | {row['way']} | {row['gap']:.2%} ± {row['error']:.2%} | {row['shortest']:.0%} | "
              f"{row['seconds']:.3g} |" for row in rows]
    return "\n".join(lines) + "\n"
