"""Shared parts of all trainings of the benchmark's guiders: where they run, how they are named, and the loop over intervals.

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

from torch import Tensor, nn

from ppap_core import ExpertBank, ExpertSchedule, Guider, LoraSpec, SampleStore, base_network, to_vp, with_experts
from ppap_core.guiders.latents import View
from ppap_core.training.loop import OnStep, RunOptions, optimize

from .report import Report, cached_json
from .world import World

COSTS = ("trainable_share", "training_images", "training_minutes")
FREE = dict.fromkeys(COSTS, 0)


class Workspace(NamedTuple):
    """Where guiders are made."""

    world: World
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

    world: World
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
        folder = workspace.folder / f"{world.subject}_{config_hash(options(self) | {'of': workspace.steps})}"
        run = Run(world, self.network_for(world).to(world.device), self.store(workspace), folder, workspace.report)
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

    def network_for(self, world: World) -> "ExpertBank | Networks":
        """The network before its training, for a world."""
        return self.network(base_network(world.guider))

    def network(self, base: nn.Module) -> "ExpertBank | Networks":
        """The network before its training, made of the guider's."""
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
        """Set the weights from which an interval's training starts: its neighbour's for a warm start, else its own."""
        if self.warm_start and index:
            run.bank.load(index, run.bank.weights(index - 1))

    def run_options(self, run: Run, index: int) -> RunOptions:
        """How the training of an interval is saved and reported."""
        return RunOptions({"training": options(self), "index": index}, run.folder / f"interval_{index}.state.safetensors",
                          on_step=StepReport(run.report, len(self.schedule), self.steps).of_interval(index))

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


class Networks(nn.Module):
    """One whole network for each interval, where a bank has one network and an adapter for each."""

    def __init__(self, net: nn.Module, schedule: ExpertSchedule):
        super().__init__()
        self.nets, self.schedule = nn.ModuleList(deepcopy(net) for _ in range(len(schedule))), schedule

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        return self.nets[self.schedule.index(float(sigma[0]))](image)

    def trainable_share(self) -> float:
        """1: every weight is trained."""
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


def viewed(world: World, view: View, x: Tensor, sigma: Tensor) -> Tensor:
    """The input of a guider of this view for noisy states x (B, 3, H, W) at noise levels (B,)."""
    return to_vp(x, sigma) if view == "noisy" else world.denoise(x, sigma)


@dataclass(frozen=True)
class StepReport:
    """Reports every hundredth step of a training: the on_step of `distill`, (interval, step, loss)."""

    report: Report
    intervals: int
    steps: int

    def __call__(self, index: int, step: int, loss: float) -> None:
        if (step + 1) % 100 == 0:
            self.report(f"interval {index + 1} of {self.intervals}, step {step + 1} of {self.steps}, loss {loss:.4f}")

    def of_interval(self, index: int) -> OnStep:
        """The on_step of `optimize` for one interval."""
        return lambda step, loss, _: self(index, step, loss)


def options(training: Training) -> dict[str, Any]:
    """Options of a training as a row has them: its marks, and what differs from the defaults."""
    changed = {field.name: getattr(training, field.name) for field in fields(cast(Any, training))
               if getattr(training, field.name) != field.default}
    return training.marks | {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def config_hash(value: Mapping[str, Any]) -> str:
    """A short name for JSON values, the same in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
