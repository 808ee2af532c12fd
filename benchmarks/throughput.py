"""Images a second that distillation learns from: the core's loop and PPAP's own, beside passes of the student alone."""
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ppap_core import DistillConfig, ExpertBank, Guider, LoraSpec, SampleStore, Trajectories, base_network, with_experts
from ppap_core.experts.fast import fast_output
from ppap_core.experts.lesson import distill_expert, distill_loss
from ppap_core.experts.teacher import TeacherAnswers
from ppap_core.rng import seeded

from . import ppap_reference, report
from .full_size import classifier
from .report import Column, Report, Row
from .speed import in_turn

RANK, STEPS = 8, 4  # size of our adapters; steps of one timed call
ROWS = {
    "original": "PPAP's own loop: rank 16, fresh noise, the teacher in each step",
    "as set": "ours, as set",
    "fast": "ours, fast: the teacher once, bfloat16 where the device has it, channels last",
    "floor": "the student's passes alone, as fast",
}


@dataclass(frozen=True)
class ThroughputBench:
    """A classifier at full size. batch: images of a step. budget: seconds for all rounds."""

    pixels: int = 224
    batch: int = 8
    budget: float = 240.0
    sigma: float = 1.5  # noise level of all steps that are learned from


def throughput_bench(bench: ThroughputBench, folder: Path, report: Report) -> list[Row]:
    """Images a second in every way, alternated, with its ratio to PPAP's own loop and the share of the floor."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = loops(bench, classifier(device), made_up_store(bench, folder / f"images_{bench.pixels}"))
    rounds = in_turn(ways, bench.budget)
    report(f"{len(rounds)} rounds of {STEPS} steps of {bench.batch} images")
    return [{"way": name, "words": words, "device": device, "rounds": len(rounds),
             "images_a_second": bench.batch * STEPS / statistics.median(costs[name] for costs in rounds),
             "to_original": statistics.median(costs["original"] / costs[name] for costs in rounds),
             "of_floor": statistics.median(costs["floor"] / costs[name] for costs in rounds)}
            for name, words in ROWS.items()]


def made_up_store(bench: ThroughputBench, folder: Path) -> SampleStore:
    """Images of noise, each with one step that led to it."""
    store = SampleStore(folder, {"pixels": bench.pixels, "sigma": bench.sigma})
    store.fill(2 * 64, partial(_images, bench))
    return store


def _images(bench: ThroughputBench, seeds: Sequence[int]) -> tuple[Tensor, Trajectories]:
    images = torch.rand(len(seeds), 3, bench.pixels, bench.pixels, generator=seeded(seeds[0])) * 2 - 1
    return images, Trajectories(torch.full((len(seeds), 1), bench.sigma), images[:, None].half(), images[:, None].half())


def loops(bench: ThroughputBench, guider: Guider, store: SampleStore) -> dict[str, Callable[[], object]]:
    """Ways to train one expert for `STEPS` steps."""
    base, schedule = base_network(guider), ppap_reference.schedule()
    device = next(base.parameters()).device
    bank = ExpertBank(base, schedule, LoraSpec(RANK, float(RANK)), "noisy").to(device)
    theirs = ExpertBank(base, schedule, LoraSpec(ppap_reference.RANK, ppap_reference.ALPHA), "noisy").to(device)
    index, config = schedule.index(bench.sigma), DistillConfig(STEPS, bench.batch)
    TeacherAnswers(guider, store).fill()
    pairs = ppap_reference.pairs(store, len(schedule), index, 0, bench.batch).to(device)
    single = ExpertBank(base, type(schedule)((schedule.edges[0], schedule.edges[-1])), theirs.lora, "noisy").to(device)
    return {"original": partial(original, guider, single, store, bench.batch, index),
            "as set": partial(distill_expert, guider, bank, index, store, config),
            "fast": partial(distill_expert, guider, bank, index, store, DistillConfig(STEPS, bench.batch, fast=True)),
            "floor": partial(passes, with_experts(guider, bank), bank, index, pairs.inputs, pairs.sigma)}


def original(guider: Guider, single: ExpertBank, store: SampleStore, batch: int, index: int) -> None:
    """Steps of PPAP's loop in one interval, whose single adapter they change."""
    experts, device = len(ppap_reference.schedule()), next(single.parameters()).device
    with single.trainable(0) as parameters:
        optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=ppap_reference.WEIGHT_DECAY)
        for step in range(STEPS):
            optimizer.zero_grad()
            pairs = ppap_reference.pairs(store, experts, index, step, batch).to(device)
            loss = distill_loss(guider, single, pairs, ppap_reference.TEMPERATURE).mean()
            loss.backward()
            optimizer.step()
            loss.item()


def passes(student: Guider, bank: ExpertBank, index: int, inputs: Tensor, sigma: Tensor) -> None:
    """Forward and backward passes of an expert, and nothing else."""
    with bank.trainable(index) as parameters:
        for _ in range(STEPS):
            torch.autograd.grad(fast_output(student, inputs, sigma).square().mean(), parameters)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    return report.markdown([Column("loop", "{words}", numeric=False), Column("images a second", "{images_a_second:.2f}"),
                            Column("times PPAP's own", "{to_original:.2f}"), Column("of the floor", "{of_floor:.0%}")], rows)
