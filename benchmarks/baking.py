"""Guidance baked into a LoRA, in both tiny worlds: how much of it remains, at what cost, and by which training."""
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppap_core import (
    Guider,
    SampleStore,
    Term,
    Trajectories,
    TrajectoryRecorder,
    guided,
    rule_guider,
    sample_euler,
)
from ppap_core.experts.bake import Learned, Student, bake, guided_error, held_out_of
from ppap_core.guiders.guider import clean
from ppap_core.schedules import falling
from ppap_core.tinyworld.latents import SPACE
from ppap_core.tinyworld.scenes import CLASSES, draw
from ppap_core.training.finetune import FineTune
from ppap_core.training.loop import RunOptions
from ppap_core.training.lora import LoraUpdate, named_layers, with_adapters

from .costs import ratio_in_turn
from .evaluation import Evaluator
from .few_steps import load_few_step_world
from .report import Column, Report, cached_json, markdown
from .report import Row as Result
from .rules import deviation
from .tiny_world import NOISE, load_world
from .training import config_hash

STAR = CLASSES.index("star")
PALETTE_OF = 11_000_000  # number of the scene whose colours are wanted
WORLDS: dict[str, Callable[[], Any]] = {"pixels": load_world, "latents": partial(load_few_step_world, "flow")}
AIMS = ("star", "palette", "symmetry")
TOGETHER = ("star", "palette")  # aims whose LoRAs are added to one model
BOTH = "pixels: both"
TIMED = 16  # images whose sampling is timed
WHOLE, SHORT, SMALL, LARGE = FineTune(600, 16, 16), FineTune(150, 16, 16), FineTune(600, 2, 16), FineTune(1500, 64, 16)
FURTHER = {"pixels: star": (SHORT, SMALL), "pixels: symmetry": (LARGE,), "latents: symmetry": (LARGE,)}


@dataclass(frozen=True)
class BakingBench:
    """Everything that a result depends on, besides the weights of the worlds."""

    images: int = 128
    scenes: int = 5000   # real scenes for Frechet distances
    samples: int = 512   # images of the guided model to learn from
    steps: int = 16      # of the sampler
    batch: int = 64      # images that are sampled at once
    training: FineTune = WHOLE
    further: dict[str, tuple[FineTune, ...]] = field(default_factory=lambda: FURTHER)  # of some cases, at full strength


@dataclass(frozen=True)
class Case:
    """One aim in one world."""

    bench: BakingBench
    world: Any
    name: str  # of the world
    aim: str
    folder: Path

    @property
    def rule(self) -> Guider:
        """What a rule's images are measured by, in pixels."""
        if self.aim == "symmetry":
            return rule_guider("symmetry left-right")
        colors = rule_guider("colours")
        return colors.aim(colors.predict(wanted := draw([PALETTE_OF]).image, clean(wanted)))

    @property
    def term(self) -> Term:
        """What guides."""
        levels = self.world.start([NOISE], self.bench.steps)[1]
        schedule = falling(levels.tolist())
        if self.aim == "star":
            return Term(self.world.guider.aim(torch.tensor([STAR])), 0.3, schedule, normalized=True,
                        backprop_through_model=True)
        decode = SPACE.colors if self.name == "latents" else None
        return Term(replace(self.rule, decode=decode), 0.5, schedule, normalized=True)

    @property
    def evaluator(self) -> Evaluator:
        """Judges stars as such, and other images by their distance from real scenes alone."""
        return replace(self.world.evaluator(self.bench.scenes), label=STAR if self.aim == "star" else None)

    def store(self, report: Report) -> SampleStore:
        """Images of the guided model, and others held out."""
        store = SampleStore(self.folder / "samples", {"model": self.world.name, "aim": self.aim, "steps": self.bench.steps,
                                                      "seed": self.world.store_seed})
        for part, count in ((store, self.bench.samples), (store.hold_out(), 64)):
            part.fill(count, self._generate, lambda have, _: report(f"samples: {have}"))
        return store

    def _generate(self, seeds: Sequence[int]) -> tuple[Tensor, Trajectories]:
        """Images of some seeds, with what the guided model predicted on the way."""
        recorder = TrajectoryRecorder()
        denoise = recorder.wrap(guided(self.world.denoise, [self.term]))
        samples = sample_euler(denoise, *self.world.start(seeds, self.bench.steps))
        decode = getattr(self.world, "decode", nn.Identity())
        return decode(samples).clamp(-1, 1), recorder.trajectories(seeds)

    def measure(self, samples: Tensor, evaluator: Evaluator) -> dict[str, float]:
        """How far samples are where they should be, and their Frechet distance."""
        scores = evaluator.evaluate(lambda numbers, _: samples[numbers[0]:numbers[-1] + 1], range(len(samples)))
        if self.aim == "star":
            return {"score": scores.score, "frechet": scores.frechet}
        images = getattr(self.world, "decode", nn.Identity())(samples)
        return {"score": float(deviation(self.rule, images).mean()), "frechet": scores.frechet}

    def samples(self, terms: Sequence[Term] = ()) -> Tensor:
        """What the world samples, (n, C, H, W)."""
        seeds = [NOISE + number for number in range(self.bench.images)]
        return torch.cat([self.world.sample(seeds[start:start + self.bench.batch], self.bench.steps, terms)
                          for start in range(0, len(seeds), self.bench.batch)])

    def time_ratio(self, other: "Case", terms: Sequence[Term] = ()) -> float:
        """The time of sampling, over that of another case without terms."""
        seeds, steps = range(NOISE, NOISE + TIMED), self.bench.steps
        return ratio_in_turn(partial(self.world.sample, seeds, steps, terms), partial(other.world.sample, seeds, steps), 3)


def train(case: Case, config: FineTune, report: Report) -> tuple[dict[str, LoraUpdate], dict[str, float]]:
    """The baked LoRA of a case, and how much of the guidance it learned; read from the folder where it is finished."""
    folder, store = case.folder / config_hash(asdict(config)), case.store(report)

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        return case.world.denoise(x.requires_grad_(torch.is_grad_enabled()), sigma)  # autograd is on where x asks for it

    def on_step(step: int, loss: float, _: Any) -> None:
        if (step + 1) % 50 == 0:
            report(f"step {step + 1}: {loss:.4f}")

    student = Student(case.world.denoiser, predict, case.world.sigma_data, case.world.device)
    measure = partial(guided_error, student, held_out_of(store), config.batch)
    started, without = time.monotonic(), measure()
    updates, _ = bake(student, store, config, RunOptions({"case": case.aim}, folder / "state.safetensors", on_step=on_step))
    minutes = (time.monotonic() - started) / 60
    with with_adapters(student.net, {name: [update] for name, update in updates.items()}):
        learned = Learned(without, measure())
    return updates, cached_json(folder / "learned.json", lambda: {"learned": learned.share, "minutes": minutes})


def merged(case: Case, updates: dict[str, LoraUpdate], strength: float) -> Case:
    """A case whose model has a LoRA in its weights, at a strength."""
    net = deepcopy(case.world.denoiser)
    layers = named_layers(net)
    for name, update in updates.items():
        weight = layers[name].weight
        weight.data += strength * (update.up @ update.down.flatten(1)).view_as(weight)
    return replace(case, world=replace(case.world, denoiser=net))


def _prefixed(report: Report, name: str, line: str) -> None:
    report(f"{name}: {line}")


def rows_of(case: Case, report: Report) -> dict[str, list[Result]]:
    """A row for each way: unguided, guided, and baked at two strengths and by further trainings."""
    evaluator = case.evaluator
    rows = [{"way": "unguided", "ratio": 1.0, **case.measure(case.samples(), evaluator)},
            {"way": "guided", "ratio": case.time_ratio(case, [case.term]),
             **case.measure(case.samples([case.term]), evaluator)}]
    for config in (case.bench.training, *case.bench.further.get(f"{case.name}: {case.aim}", ())):
        updates, learned = train(case, config, report)
        for strength in (1.0, 0.5) if config == case.bench.training else (1.0,):
            baked = merged(case, updates, strength)
            way = f"baked, {config.steps} steps, rank {config.rank}, strength {strength:g}"
            rows.append({"way": way, "ratio": baked.time_ratio(case), **case.measure(baked.samples(), evaluator), **learned})
            report(f"{rows[-1]}")
    return {"rows": [{"world": case.name, "aim": case.aim, **row} for row in rows]}


def rows_of_both(bench: BakingBench, folder: Path, report: Report) -> dict[str, list[Result]]:
    """Stars and a palette by two baked LoRAs beside each other: a row for each aim."""
    cases = [Case(bench, load_world(), "pixels", aim, folder / f"pixels_{aim}") for aim in TOGETHER]
    together = reduce(lambda case, other: merged(case, train(other, bench.training, report)[0], 1.0), cases, cases[0])
    rows = []
    for case in cases:
        both = replace(case, world=together.world)
        rows.append({"world": "pixels", "aim": case.aim, "way": "baked, stars and a palette beside each other",
                     "ratio": both.time_ratio(case), **case.measure(both.samples(), case.evaluator)})
    return {"rows": rows}


def baking_bench(bench: BakingBench, folder: Path, report: Report, only: Sequence[str] = ()) -> list[Result]:
    """Rows of all aims in both worlds, or of those named "world: aim"; finished ones are read from the folder.

    ValueError for a name that no case has.
    """
    names = [*(f"{world}: {aim}" for world in WORLDS for aim in AIMS), BOTH]
    if unknown := {*only} - {*names}:
        raise ValueError(f"there is no case '{min(unknown)}': expected some of {'; '.join(names)}")
    rows = []
    for name in (name for name in names if not only or name in only):
        key, told = config_hash(asdict(bench)), partial(_prefixed, report, name)
        if name == BOTH:
            rows += cached_json(folder / f"both_{key}.json", partial(rows_of_both, bench, folder, told))["rows"]
            continue
        world, aim = name.split(": ")
        case = Case(bench, WORLDS[world](), world, aim, folder / f"{world}_{aim}")
        rows += cached_json(case.folder / f"rows_{key}.json", partial(rows_of, case, told))["rows"]
    return rows


COLUMNS = (Column("world", "{world}", numeric=False), Column("aim", "{aim}", numeric=False),
           Column("way", "{way}", numeric=False), Column("stars, or off by", "{score:.3g}"),
           Column("Fréchet", "{frechet:.3g}"), Column("time, times plain", "{ratio:.2f}"),
           Column("learned on held-out steps", "{learned_text}"))


def table(rows: Sequence[Result]) -> str:
    """Rows in Markdown."""
    return markdown(COLUMNS, [row | {"learned_text": f"{row['learned']:.0%}" if "learned" in row else ""} for row in rows])
