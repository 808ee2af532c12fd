"""The benchmark on the latent tiny world: from which image guiders should judge latents, and depth and segmentation guidance
against the exact scene, with and without experts, beside class conditioning and a ControlNet."""
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from ppap_core import (
    Denoiser,
    DistillConfig,
    ExpertBank,
    ExpertSchedule,
    GuidanceSettings,
    Guider,
    LoraSpec,
    SampleStore,
    Term,
    Trajectories,
    TrajectoryRecorder,
    base_network,
    distill,
    guided,
    with_experts,
)
from ppap_core.guiders.latents import View
from ppap_core.io.files import ensure_manifest
from ppap_core.rng import seeded_noise
from ppap_core.tinyworld.latents import CHANNELS, SIZE, SPACE, depth_hint, scale_hint
from ppap_core.tinyworld.loaders import LABELS, condition
from ppap_core.tinyworld.scenes import Scenes, draw, truth

from . import report
from .costs import ratio_in_turn
from .evaluation import Reference, features, reference, score
from .latent_world import GRID, LatentWorld, flow_sigmas
from .metrics import FeatureStats, frechet_distance
from .report import Column, Report, Row, cached_json

MIDDLE = 0.3  # the weight of methods that are too slow for several
MEASURES = {"class": "right by the judge", "depth": "depth error", "segmentation": "mean IoU"}


@dataclass(frozen=True)
class LatentBench:
    """Everything that a result depends on, besides the weights of the world."""

    images: int = 64
    steps: int = 20
    batch: int = 32
    store: int = 768
    edges: tuple[float, ...] = (0.1, 0.3, 0.8, 2.0, 6.0, 20.0)
    rank: int = 8
    training: DistillConfig = DistillConfig(steps=300, batch=32, lr=2e-3)
    weights: tuple[float, ...] = (0.1, MIDDLE, 0.6)  # of normalized terms
    raw: tuple[float, ...] = (4.0, 32.0, 256.0)   # of raw ones
    scenes: int = 2048  # real scenes for Frechet distances
    repeats: int = 9    # timings of a step


@dataclass(frozen=True)
class Method:
    """How an image for a scene comes about: the guider, if any, and the conditions of the model."""

    guider: Guider | None = None
    conditional: bool = False  # whether the model is given the class
    controlled: bool = False   # whether a ControlNet is given the exact depth
    normalized: bool = True    # whether the guider's weight is
    slow: bool = False         # measured at one weight, on one batch of images

    def weights(self, config: LatentBench) -> tuple[float, ...]:
        """The weights at which it is measured."""
        if self.guider is None:
            return (0.0,)
        if self.slow:
            return (MIDDLE,)
        return config.weights if self.normalized else config.raw

    def denoiser(self, world: LatentWorld, scenes: Scenes, seeds: Sequence[int], weight: float) -> Denoiser:
        """The model, guided and conditioned on scenes, which are those of the seeds."""
        denoise = partial(world.denoise, given=condition(scenes.label) if self.conditional else None,
                          hint=encoded_depth(world, seeds) if self.controlled else None)
        if self.guider is None:
            return denoise
        term = Term(self.guider.aim(truth(scenes, self.guider.task)), weight, normalized=self.normalized)
        return guided(denoise, [term], GuidanceSettings(sigma_data=1.0))


@torch.no_grad()
def encoded_depth(world: LatentWorld, seeds: Sequence[int]) -> Tensor:
    """The exact depth of scenes as the ControlNet expects it."""
    return scale_hint(world.autoencoder.encode(depth_hint(draw(seeds, SIZE).depth.to(world.device))))


@dataclass(frozen=True)
class TaskRun:
    """The benchmark of one task: its methods, and what the folder keeps of them."""

    task: str
    world: LatentWorld
    config: LatentBench
    real: Reference
    folder: Path
    report: Report

    @cached_property
    def store(self) -> SampleStore:
        """Unconditional images and their trajectories, to distil from."""
        steps, count = self.config.steps, self.config.store
        store = SampleStore(self.folder / "samples", {"model": "tinyworld_flow", "sampler": "euler", "steps": steps,
                                                      "seed": 70_000_000})
        store.fill(count, partial(_generate, self.world, steps), lambda have, _: self.report(f"samples: {have} of {count}"))
        return store

    def experts(self, view: View) -> Guider:
        """Experts of one view, each with its stem, distilled on the world's own latents."""
        guider, rank = self.world.guiders[self.task], self.config.rank
        bank = ExpertBank(base_network(guider), ExpertSchedule(self.config.edges), LoraSpec(rank, rank), view, space=SPACE)
        distill(guider, bank.to(self.world.device), self.store, self.config.training,
                self.folder / f"experts_{self.task}_{view}", partial(self._report_step, view))
        return with_experts(guider, bank)

    def _report_step(self, view: View, index: int, step: int, loss: float) -> None:
        if (step + 1) % 100 == 0:
            self.report(f"experts of {self.task}, {view} view: {index + 1} of {len(self.config.edges) - 1}, "
                        f"step {step + 1}, loss {loss:.4f}")

    def methods(self) -> dict[str, Callable[[], Method]]:
        """All rows; experts are made when their row is run."""
        plain = self.world.guiders[self.task]
        in_colors = replace(plain, decode=SPACE.colors)
        methods: dict[str, Callable[[], Method]] = {
            "no guidance": Method,
            "plain, noisy view, colours": lambda: Method(replace(in_colors, view="noisy")),
            "plain, denoised view, colours": lambda: Method(in_colors),
            "plain, denoised view, colours, raw": lambda: Method(in_colors, normalized=False),
            "plain, denoised view, decoder": lambda: Method(replace(plain, decode=self.world.decoder), slow=True),
            "experts, noisy view, stem": lambda: Method(self.experts("noisy")),
            "experts, denoised view, stem": lambda: Method(self.experts("denoised")),
            "told the class": lambda: Method(conditional=True)}
        if self.task != "class":
            methods |= {"told the class, and experts": lambda: Method(self.experts("denoised"), conditional=True),
                        "ControlNet of depth": lambda: Method(controlled=True),
                        "ControlNet of depth, and experts": lambda: Method(self.experts("denoised"), controlled=True)}
        return methods

    def rows(self) -> list[Row]:
        """All rows; finished ones are read from the folder."""
        return [cached_json(self.folder / f"{self.task}_{number}.json", partial(self.row, name, make))
                for number, (name, make) in enumerate(self.methods().items())]

    def row(self, name: str, make: Callable[[], Method]) -> Row:
        """Measure one row at each of its weights."""
        method = make()
        by_weight = {f"{weight:g}": self.measured(method, weight) for weight in method.weights(self.config)}
        self.report(f"{self.task}, {name}: {by_weight}")
        return {"task": self.task, "row": name, "by_weight": by_weight, "step_ratio": self.step_ratio(method)}

    def measured(self, method: Method, weight: float) -> dict[str, float]:
        """Score and Frechet distance of images, one for each scene; nothing was trained on these scenes."""
        config, world, scores = self.config, self.world, []
        stats = FeatureStats(self.real.features.shape[1])
        for start in range(0, config.batch if method.slow else config.images, config.batch):
            seeds = range(1000 + start, 1000 + min(start + config.batch, config.images))
            scenes = draw(seeds, SIZE // 4).to(world.device)
            latents = world.sample(seeds, flow_sigmas(config.steps), method.denoiser(world, scenes, seeds, weight))
            images = world.decode(latents)
            scores.append(score(world.judges[self.task], images, scenes))
            stats.update(features(self.real.judge, images))
        return {"score": float(torch.cat(scores).mean()), "frechet": frechet_distance(stats, self.real.stats)}

    def step_ratio(self, method: Method) -> float:
        """Median ratio of the time of a step of eight images to that of a plain one."""
        seeds, world = range(8), self.world
        x = seeded_noise(seeds, (CHANNELS, GRID, GRID)).to(world.device)
        sigma = x.new_ones(len(x))
        step = method.denoiser(world, draw(seeds, SIZE // 4).to(world.device), seeds, MIDDLE)
        return ratio_in_turn(lambda: step(x, sigma), lambda: world.denoise(x, sigma), self.config.repeats)


def _generate(world: LatentWorld, steps: int, seeds: Sequence[int]) -> tuple[Tensor, Trajectories]:
    recorder = TrajectoryRecorder()
    latents = world.sample(seeds, flow_sigmas(steps), recorder.wrap(world.denoise))
    return torch.cat([world.decode(part) for part in latents.split(16)]), recorder.trajectories(seeds)


def latent_bench(config: LatentBench, folder: Path, report: Report) -> list[Row]:
    """All rows of all tasks, each at all its weights; finished ones are read from the folder."""
    ensure_manifest(folder, asdict(config))
    world = LatentWorld()
    real = reference(world.judges["class"], config.scenes, SIZE // 4, world.device)
    return [row for task in LABELS for row in TaskRun(task, world, config, real, Path(folder), report).rows()]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table for each task, whose cells are weight: score / Fréchet distance."""
    return "\n".join(_task_table(task, [row for row in rows if row["task"] == task]) for task in MEASURES)


def _task_table(task: str, rows: Sequence[Row]) -> str:
    width = max(len(row["by_weight"]) for row in rows)
    columns = [Column(f"{task}: {MEASURES[task]} / Fréchet distance", "{row}", numeric=False),
               *(Column("by weight", f"{{cells[{number}]}}") for number in range(width)),
               Column("times a plain step", "{step_ratio:.2f}")]
    return report.markdown(columns, [row | {"cells": _cells(row, width)} for row in rows])


def _cells(row: Row, width: int) -> list[str]:
    cells = [f"{weight}: {result['score']:.3f} / {result['frechet']:.0f}" for weight, result in row["by_weight"].items()]
    return cells + [""] * (width - len(cells))
