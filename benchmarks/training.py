"""How a guider of the benchmark came to be: plain, distilled on the model's own images, or trained with exact labels.

One class per way to train. Its fields are the options of a row's "training" in rows/*.json; what differs from their defaults
names the training's folder, so that an option that is added later renames none.
"""
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from ppap_core import (
    TASKS,
    DistillConfig,
    ExpertBank,
    ExpertSchedule,
    Guider,
    LoraSpec,
    base_network,
    distill,
    to_vp,
    with_experts,
)
from ppap_core.experts.distill import distill_loss
from ppap_core.experts.samples import BatchSpec, Pairs, SampleStore, trajectory_pairs
from ppap_core.guiders.latents import View
from ppap_core.noise import expand
from ppap_core.rng import seeded
from ppap_core.tinyworld.scenes import draw, truth
from ppap_core.training.loop import RunOptions, optimize

from . import ppap_reference
from .evaluation import hidden_features
from .fresh_noise import fresh_pairs
from .report import Report, cached_json
from .tiny_world import TinyWorld, generate_store
from .train_tinyworld import LOSSES

LABELLED = 500_000_000  # scenes from this number on are for training with labels
COSTS = ("trainable_share", "training_images", "training_minutes")
FREE = dict.fromkeys(COSTS, 0)


class Workspace(NamedTuple):
    """Where guiders are made."""

    world: TinyWorld
    folder: Path  # of finished parts
    steps: int    # of the sampler, for images to learn from
    report: Report


class Trained(NamedTuple):
    """A guider, and what its training cost, by COSTS."""

    guider: Guider
    costs: Mapping[str, float]


class Training(Protocol):
    """A way to come by a guider. marks: options that tell this class from the others in rows/*.json."""

    marks: ClassVar[dict[str, Any]]

    def make(self, workspace: Workspace) -> Trained:
        """Train the guider of the workspace's world, or read it where its folder is complete."""


@dataclass(frozen=True)
class Plain:
    """The world's own guider as it is."""

    marks: ClassVar[dict[str, Any]] = {}
    view: View = "denoised"

    def make(self, workspace: Workspace) -> Trained:
        return Trained(replace(workspace.world.guider, view=self.view), FREE)


class Run(NamedTuple):
    """A training at work."""

    world: TinyWorld
    net: "ExpertBank | Networks"
    store: SampleStore | None  # generated images, where it learns from such
    folder: Path
    report: Report

    @property
    def bank(self) -> ExpertBank:
        """The network, where it is a bank."""
        assert isinstance(self.net, ExpertBank)
        return self.net

    @property
    def images(self) -> SampleStore:
        """The generated images, where it learns from such."""
        assert self.store is not None
        return self.store


@dataclass(frozen=True)
class IntervalTraining(ABC):
    """A LoRA expert for each interval of noise levels, trained by AdamW with a rate that falls to zero like a cosine."""

    marks: ClassVar[dict[str, Any]] = {}
    view: View = "denoised"
    edges: tuple[float, ...] = ()
    rank: int = 2
    targets: tuple[str, ...] = ()  # names of the adapted layers; none: the default of LoraSpec
    steps: int = 1000              # for each interval
    batch: int = 64
    lr: float = 2e-3
    warm_start: bool = False       # each expert starts as its neighbour of less noise ended

    def make(self, workspace: Workspace) -> Trained:
        world = workspace.world
        folder = workspace.folder / f"{world.guider.task}_{config_hash(options(self) | {'of': workspace.steps})}"
        run = Run(world, self.network(base_network(world.guider)).to(world.device), self.store(workspace), folder,
                  workspace.report)
        started = time.monotonic()
        self.fit(run)
        minutes = (time.monotonic() - started) / 60
        costs = cached_json(folder / "about.json", lambda: dict(zip(COSTS, (
            self.trainable_share(run.net), self.image_count(run), minutes), strict=True)))
        return Trained(self.guider(run), costs)

    @property
    def schedule(self) -> ExpertSchedule:
        """The intervals."""
        return ExpertSchedule(self.edges)

    def network(self, base: nn.Module) -> "ExpertBank | Networks":
        """The network before its training."""
        return ExpertBank(base, self.schedule, LoraSpec(self.rank, self.rank, self.targets), self.view)

    def store(self, workspace: Workspace) -> SampleStore | None:
        """The generated images to learn from, if any."""
        return None

    def fit(self, run: Run) -> None:
        """Train all intervals, one after another."""
        for index in range(len(self.schedule)):
            self.initialize(run, index)
            with trainable(run.net, index) as parameters:
                optimize(parameters, partial(self.mean_loss, run, index), self.steps, self.lr, f"interval {index}",
                         self.run_options(run, index))

    def initialize(self, run: Run, index: int) -> None:
        """Set the weights from which an interval's training starts: those of the neighbour, if it shall start warm."""
        if self.warm_start and index:
            run.bank.load(index, run.bank.weights(index - 1))

    def run_options(self, run: Run, index: int) -> RunOptions:
        """How the training of an interval is saved and reported."""
        return RunOptions({"training": options(self), "index": index}, run.folder / f"interval_{index}.state.safetensors",
                          on_step=partial(report_step, run.report, index, len(self.schedule), self.steps))

    def mean_loss(self, run: Run, index: int, step: int) -> Tensor:
        """The scalar that one step lowers."""
        return self.loss(run, index, step).mean()

    @abstractmethod
    def loss(self, run: Run, index: int, step: int) -> Tensor:
        """Losses (B,) of a training step of an interval: a function of (index, step) alone."""

    def image_count(self, run: Run) -> int:
        """How many images the training looks at."""
        return len(run.store) if run.store else self.steps * self.batch * len(self.schedule)

    def trainable_share(self, net: "ExpertBank | Networks") -> float:
        """Trained weights of one interval over those of the frozen network."""
        return net.trainable_share()

    def guider(self, run: Run) -> Guider:
        """The world's guider with the trained network."""
        return with_experts(run.world.guider, run.bank)


@dataclass(frozen=True)
class Distillation(IntervalTraining):
    """Experts that learn the plain network's outputs on generated images from the steps that led to them."""

    images: int = 4096           # generated images to learn from
    guided: float = 0.0          # normalized weight of the plain guider, aimed at random scenes, while they are generated
    ranks: tuple[int, ...] = ()  # of each expert where they differ, none above `rank`
    temperature: float = 1.0     # of the teacher's classes

    def store(self, workspace: Workspace) -> SampleStore:
        folder = workspace.folder / f"samples_{workspace.steps}_{self.images}"
        return generate_store(workspace.world, folder, self.images, workspace.steps, workspace.report, self.guided)

    def network(self, base: nn.Module) -> ExpertBank:
        bank = ExpertBank(base, self.schedule, LoraSpec(self.rank, self.rank, self.targets), self.view)
        for index, rank in enumerate(self.ranks):
            limit_rank(bank, index, rank)
        return bank

    def trainable_share(self, net: "ExpertBank | Networks") -> float:
        share = net.trainable_share()
        return share * sum(self.ranks) / len(self.ranks) / self.rank if self.ranks else share

    def fit(self, run: Run) -> None:
        config = DistillConfig(self.steps, self.batch, self.lr, temperature=self.temperature, warm_start=self.warm_start)
        distill(run.world.guider, run.bank, run.images, config, run.folder,
                partial(report_interval, run.report, len(self.schedule), self.steps))

    def pairs(self, run: Run, index: int, step: int) -> Pairs:
        """A batch of trajectory steps, as the core's distillation draws it."""
        return trajectory_pairs(run.images, self.schedule, index, BatchSpec(step, self.batch), self.view)

    def loss(self, run: Run, index: int, step: int) -> Tensor:
        return distill_loss(run.world.guider, run.bank, self.pairs(run, index, step).to(run.world.device), self.temperature)


@dataclass(frozen=True)
class DistillationVariant(Distillation):
    """Distillation whose loss or batches are others than the core's, to be compared with it."""

    def fit(self, run: Run) -> None:
        IntervalTraining.fit(self, run)


@dataclass(frozen=True)
class FreshNoise(DistillationVariant):
    """The paper's pairs (Go et al. 2023): images, some mirrored, under noise that is drawn anew."""

    marks: ClassVar[dict[str, Any]] = {"fresh_noise": True}

    def pairs(self, run: Run, index: int, step: int) -> Pairs:
        view = to_vp if self.view == "noisy" else run.world.denoise
        return fresh_pairs(run.images, self.schedule, index, BatchSpec(step, self.batch), view, run.world.device)


@dataclass(frozen=True)
class RepeatedNoise(DistillationVariant):
    """Several draws of fresh noise for each output of the teacher, in the noisy view."""

    draws: int = 1

    def loss(self, run: Run, index: int, step: int) -> Tensor:
        world, generator, count = run.world, seeded(0, index, step), self.batch // self.draws
        images = run.images.random_images(BatchSpec(step, count, index * 2**64)).to(world.device)
        sigma = self.schedule[index].sample(count * self.draws, generator).to(world.device)
        teacher = world.plain_output(images).repeat_interleave(self.draws, 0)
        images = images.repeat_interleave(self.draws, 0)
        noise = torch.randn(images.shape, generator=generator).to(world.device)
        student = with_experts(world.guider, run.bank).predict(to_vp(images + expand(sigma, images) * noise, sigma), sigma)
        return TASKS[world.guider.task].distance(student, teacher)


@dataclass(frozen=True)
class Jitter(DistillationVariant):
    """Noise on the experts' inputs, of std `jitter` at high noise levels and less at low ones."""

    jitter: float = 0.0

    def pairs(self, run: Run, index: int, step: int) -> Pairs:
        pairs = super().pairs(run, index, step)
        noise = torch.randn(pairs.inputs.shape, generator=seeded(0, index, step, 1))
        return pairs._replace(inputs=pairs.inputs + self.jitter * to_vp(expand(pairs.sigma, noise) * noise, pairs.sigma))


@dataclass(frozen=True)
class FeatureDistillation(DistillationVariant):
    """Features before the head are distilled too. features: weight of their error in the loss; 0: the outputs alone."""

    features: float = 0.0

    def loss(self, run: Run, index: int, step: int) -> Tensor:
        pairs = self.pairs(run, index, step).to(run.world.device)
        preprocess, base = run.world.guider.preprocess, base_network(run.world.guider)
        with torch.no_grad():
            teacher = hidden_features(base, preprocess(pairs.images))
        run.bank.select(index)
        student = hidden_features(run.bank.net, preprocess(pairs.inputs))
        error = (student - teacher).square().mean(1) / teacher.square().mean(1)
        return distill_loss(run.world.guider, run.bank, pairs) + self.features * error


@dataclass(frozen=True)
class LabelledExperts(IntervalTraining):
    """Experts trained with the exact labels of fresh noisy scenes."""

    marks: ClassVar[dict[str, Any]] = {"labels": True}

    def loss(self, run: Run, index: int, step: int) -> Tensor:
        world, generator = run.world, seeded(LABELLED, index, step)
        first = LABELLED + (index * self.steps + step) * self.batch
        scenes = draw(range(first, first + self.batch))
        sigma = self.schedule[index].sample(self.batch, generator)
        noisy = scenes.image + expand(sigma, scenes.image) * torch.randn(scenes.image.shape, generator=generator)
        noisy, sigma = noisy.to(world.device), sigma.to(world.device)
        output = replace(world.guider, net=run.net).predict(viewed(world, self.view, noisy, sigma), sigma)
        return LOSSES[world.guider.task](output, truth(scenes, world.guider.task).to(world.device))


@dataclass(frozen=True)
class LabelledNetworks(LabelledExperts):
    """One whole network for each interval, trained with exact labels: the upper reference."""

    marks: ClassVar[dict[str, Any]] = {"labels": True, "whole": True}

    def network(self, base: nn.Module) -> "Networks":
        return Networks(base, self.schedule)

    def guider(self, run: Run) -> Guider:
        return replace(run.world.guider, net=run.net, view=self.view)


@dataclass(frozen=True)
class PpapReference(Distillation):
    """Distillation as the released code of PPAP does it, see `ppap_reference`."""

    marks: ClassVar[dict[str, Any]] = {"original": True}

    @property
    def schedule(self) -> ExpertSchedule:
        return ppap_reference.schedule()

    def network(self, base: nn.Module) -> ExpertBank:
        return ExpertBank(base, self.schedule, LoraSpec(ppap_reference.RANK, ppap_reference.ALPHA), "noisy")

    def fit(self, run: Run) -> None:
        options_of_run = RunOptions({"training": options(self)}, run.folder / "bank.state.safetensors", on_step=partial(
            report_step, run.report, 0, 1, self.steps * len(self.schedule)))
        ppap_reference.train(base_network(run.world.guider), run.bank, partial(self._loss_of, run), self.steps, self.lr,
                             options_of_run)

    def _loss_of(self, run: Run, net: ExpertBank, index: int, step: int) -> Tensor:
        return self.mean_loss(run._replace(net=net), index, step)

    def pairs(self, run: Run, index: int, step: int) -> Pairs:
        return ppap_reference.pairs(run.images, len(self.schedule), index, step, self.batch)

    def loss(self, run: Run, index: int, step: int) -> Tensor:
        return distill_loss(run.world.guider, run.bank, self.pairs(run, index, step).to(run.world.device),
                            ppap_reference.TEMPERATURE)


TRAININGS: dict[str, type[Training]] = {
    "original": PpapReference, "whole": LabelledNetworks, "labels": LabelledExperts, "features": FeatureDistillation,
    "jitter": Jitter, "draws": RepeatedNoise, "fresh_noise": FreshNoise, "edges": Distillation}
"""By the option that asks for one; the first that a row has counts."""


def read_training(given: Mapping[str, Any]) -> Training:
    """The training that a row's options describe; without any of the names of TRAININGS the plain guider."""
    kind = next((TRAININGS[name] for name in TRAININGS if name in given), Plain)
    return kind(**{name: tuple(value) if isinstance(value, list) else value
                   for name, value in given.items() if name not in kind.marks})


def options(training: Training) -> dict[str, Any]:
    """Options of a training as a row has them: its marks, and what differs from the defaults."""
    changed = {field.name: getattr(training, field.name) for field in fields(cast(Any, training))
               if getattr(training, field.name) != field.default}
    return training.marks | {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def config_hash(value: Mapping[str, Any]) -> str:
    """A short name for JSON values, the same in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


class Networks(nn.Module):
    """One whole network for each interval, where a bank has one network and an adapter for each."""

    def __init__(self, net: nn.Module, schedule: ExpertSchedule):
        super().__init__()
        self.nets, self.schedule = nn.ModuleList(deepcopy(net) for _ in range(len(schedule))), schedule

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        return self.nets[self.schedule.index(float(sigma[0]))](image)

    def trainable_share(self) -> float:
        """All of them."""
        return 1.0


@contextmanager
def trainable(net: ExpertBank | Networks, index: int) -> Iterator[dict[str, Tensor]]:
    """The parameters of one interval by name, with requires_grad on; off again on exit."""
    if isinstance(net, ExpertBank):
        with net.trainable(index) as parameters:
            yield dict(zip(net.weights(index), parameters, strict=True))
    else:
        yield dict(net.nets[index].requires_grad_(True).named_parameters())
        net.requires_grad_(False)


def limit_rank(bank: ExpertBank, index: int, rank: int) -> None:
    """Leave an expert only this rank: rows of an adapter that are zero on both sides never learn."""
    weights = {name: weight.clone() for name, weight in bank.weights(index).items()}
    for name, weight in weights.items():
        if ".lora_A" in name:
            weight[rank:] = 0
    bank.load(index, weights)


def viewed(world: TinyWorld, view: View, x: Tensor, sigma: Tensor) -> Tensor:
    """The input of a guider of this view for noisy states x (B, 3, H, W) at noise levels (B,)."""
    return to_vp(x, sigma) if view == "noisy" else world.denoise(x, sigma)


def report_step(report: Report, index: int, count: int, steps: int, step: int, loss: float, _: object) -> None:
    """Report every hundredth step of an interval's training."""
    report_interval(report, count, steps, index, step, loss)


def report_interval(report: Report, count: int, steps: int, index: int, step: int, loss: float) -> None:
    """Report every hundredth step, called as `distill` calls its on_step."""
    if (step + 1) % 100 == 0:
        report(f"interval {index + 1} of {count}, step {step + 1} of {steps}, loss {loss:.4f}")
