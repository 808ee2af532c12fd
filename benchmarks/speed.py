"""The cost that guidance adds to a sampling step of full-size networks: operations on any machine, seconds on a GPU.

All weights are random: the cost does not depend on them.
"""
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ppap_core import (
    Denoiser,
    GuidanceSettings,
    Guider,
    Prediction,
    Term,
    guidance_shift,
)
from ppap_core.guidance.gradients import energy_at, energy_gradient
from ppap_core.noise import expand

from . import report
from .costs import seconds_of_call
from .full_size import classifiers, denoiser
from .report import Column, Report, Row

SIZES = {"SD 1.5": 512, "SDXL": 1024}  # pixels
TARGETS = {"SD 1.5": 1.10, "SDXL": 1.05}
REDUCED = ("SD 1.5", 256)              # a step of which takes two cores seconds; the guider keeps its size
BUDGET = 75.0                          # seconds to measure one network, without making it
ROUNDS = 25                            # at most
SIGMA = 1.0
ROWS = {
    "plain": "plain step with classifier-free guidance",
    "colours": "guided, latent seen through linear colours",
    "stem": "guided, latent seen through a trained stem",
    "taesd": "guided, latent seen through a TAESD decoder",
    "vae": "guided, latent seen through the whole VAE decoder",
    "through": "gradient back through the denoiser, linear colours",
}

Step = Callable[[], Tensor]


def speed(report: Report) -> list[Row]:
    """One column of results for each network and way to measure. ImportError naming a missing package."""
    columns = []
    for column in measurements():
        columns.append(column())
        report(title(columns[-1]))
    return columns


def measurements() -> list[Callable[[], Row]]:
    """Operations at full size; seconds at full size on a GPU, else at a reduced size, where the whole VAE takes too long."""
    full: list[Callable[[], Row]] = [partial(count_flops, name, pixels) for name, pixels in SIZES.items()]
    if torch.cuda.is_available():
        return [*full, *(partial(timed, name, pixels, "cuda", best_half()) for name, pixels in SIZES.items())]
    return [*full, partial(count_flops, *REDUCED), partial(timed, *REDUCED, ways=[way for way in ROWS if way != "vae"])]


def best_half() -> torch.dtype:
    """The 16-bit type that the GPU computes fast and that overflows least."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def count_flops(name: str, pixels: int) -> Row:
    """Operations of one step in every way, counted on the meta device: shapes without numbers, so without delay."""
    costs = {way: float(operations(step)) for way, step in steps(name, pixels, "meta").items()}
    return {"network": name, "pixels": pixels, "measure": "operations", "plain": costs["plain"],
            "ratios": {way: cost / costs["plain"] for way, cost in costs.items()}}


def timed(name: str, pixels: int, device: str = "cpu", dtype: torch.dtype = torch.float32, budget: float = BUDGET,
          ways: Collection[str] = tuple(ROWS)) -> Row:
    """Seconds of one step in these ways, as median ratios to a plain step, alternated; None if out of memory.

    budget: seconds for all rounds.
    """
    rounds = in_turn({way: step for way, step in steps(name, pixels, device, dtype).items() if way in ways}, budget)
    place = torch.cuda.get_device_name() if device == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    return {"network": name, "pixels": pixels, "measure": "seconds", "place": place, "dtype": str(dtype).split(".")[-1],
            "rounds": len(rounds), "plain": _median(costs["plain"] for costs in rounds),
            "ratios": {way: _median(costs[way] / costs["plain"] for costs in rounds) for way in rounds[0]}}


def _median(values: Iterable[float]) -> float | None:
    median = statistics.median(values)
    return None if math.isnan(median) else median


def operations(function: Callable[[], object]) -> int:
    """Floating point operations of the convolutions and matrix products in a call; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def in_turn(functions: dict[str, Callable[[], object]], budget: float, most: int = ROUNDS) -> list[dict[str, float]]:
    """Seconds of each function in alternating rounds within a budget in seconds.

    most: number of rounds, at most. The first round is a warm-up, and counts only where there is no other.
    """
    seconds_of(next(iter(functions.values())))  # so that it does not pay for work that the others share
    rounds: list[dict[str, float]] = []
    started = time.perf_counter()
    while len(rounds) <= most:
        rounds.append({name: seconds_of(function) for name, function in functions.items()})
        spent = time.perf_counter() - started
        if spent * (len(rounds) + 1) / len(rounds) > budget:
            break
    return rounds[1:] or rounds


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of a call; NaN if out of memory."""
    try:
        return seconds_of_call(function)
    except torch.OutOfMemoryError:
        return math.nan


def steps(name: str, pixels: int, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Step]:
    """A step of one image in every way, on a network of NETWORKS with weights of this type."""
    x = torch.zeros(1, 4, pixels // 8, pixels // 8, device=device)
    sigma = torch.full((1,), SIGMA, device="cpu" if device == "meta" else device)  # guidance reads its value: meta has none
    denoise, guiders = denoiser(name, device, dtype), classifiers(device, dtype)
    return {"plain": partial(plain_step, denoise, x, sigma),
            **{way: partial(guided_step, denoise, guider, x, sigma, dtype) for way, guider in guiders.items()},
            "through": partial(through_step, denoise, guiders["colours"], x, sigma, dtype)}


@torch.no_grad()
def plain_step(denoise: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    """The prediction (B, C, h, w)."""
    return denoise(x, sigma)


def guided_step(denoise: Denoiser, guider: Guider, x: Tensor, sigma: Tensor, compute: torch.dtype | None = None) -> Tensor:
    """The guided prediction (B, C, h, w), as a sampler gets it."""
    denoised = plain_step(denoise, x, sigma)
    if x.is_meta:  # guidance_shift reads whether the gradient is finite; beyond the gradient it has no matrix products
        return denoised - energy_gradient(guider, x if guider.view == "noisy" else denoised, sigma, compute)[1]
    settings = GuidanceSettings(sigma_data=1.0, compute_dtype=compute)
    guidance = guidance_shift([Term(guider)], Prediction(x, sigma, denoised), settings)
    return denoised if guidance is None else denoised + guidance.delta


def through_step(denoise: Denoiser, guider: Guider, x: Tensor, sigma: Tensor, compute: torch.dtype | None = None) -> Tensor:
    """The prediction moved along -sigma^2 times the gradient in x of its energy, as training-free guidance does."""
    with torch.enable_grad():
        point = x.clone().requires_grad_(True)
        denoised = denoise(point, sigma)
        gradient = torch.autograd.grad(energy_at(guider, denoised, sigma, compute).sum(), point)[0]
    return denoised.detach() - expand(sigma, x) ** 2 * gradient


def title(column: Row) -> str:
    """Title of a column of results."""
    size = f"{column['network']} at {column['pixels']} pixels"
    if column["measure"] == "operations":
        return f"{size}, operations"
    return f"{size}, seconds ({column['place']}; {column['dtype']}; median of {column['rounds']})"


def table(columns: Sequence[Row]) -> str:
    """Columns of results in Markdown: the cost of a plain step, and all others as its multiples."""
    rows = [{"way": words, "cells": [_cell(column, way) for column in columns]} for way, words in ROWS.items()]
    rows.append({"way": "target for a guided step, at most", "cells": [_target(column) for column in columns]})
    return report.markdown([Column("one step of one image", "{way}", numeric=False),
                            *(Column(title(column), f"{{cells[{index}]}}") for index, column in enumerate(columns))], rows)


def _target(column: Row) -> str:
    return f"{TARGETS[column['network']]:.2f}" if SIZES[column["network"]] == column["pixels"] else ""


def _cell(column: Row, way: str) -> str:
    if way not in column["ratios"]:
        return "not measured"
    if column["ratios"][way] is None:
        return "out of memory"
    if way != "plain":
        return f"{column['ratios'][way]:.3f}"
    return f"{column['plain'] / 1e12:.3g} · 10¹²" if column["measure"] == "operations" else f"{column['plain']:.3g} s"
