"""The paper's claim on a real network: a classifier of photographs under noise, plain and with experts.

The experts learn from other photographs, without their labels, which stand for the images that a model would make.
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ppap_core import TASKS, ExpertBank, ExpertSchedule, Guider, LoraSpec, base_network, load_guider, to_vp
from ppap_core.experts.pairs import Pairs
from ppap_core.guiders.guider import clean
from ppap_core.noise import NoiseInterval, expand
from ppap_core.rng import seeded
from ppap_core.training.loop import RunOptions, optimize
from ppap_core.viz.plots import Axes, line_plot

from . import report
from .real import real_folder, real_networks
from .report import Column, Report, Row, cached_json
from .training import Networks, StepReport, config_hash, trainable

LEVELS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.8, 1.2, 2.0, 3.0)
SHOWN = (0.0, 0.2, 0.5, 0.8, 1.2, 2.0)  # of LEVELS, in the table


@dataclass(frozen=True)
class PhotographBench:
    """Everything that a result depends on, besides the networks and the photographs."""

    network: str = "tf_efficientnet_lite0"
    edges: tuple[float, ...] = (0.1, 0.2, 0.4, 0.75, 1.5, 3.0)  # noise levels
    steps: int = 60            # for each interval
    batch: int = 16
    rank: int = 4
    photographs: int = 40      # of each class: half of them to learn from, half to test with


@dataclass(frozen=True)
class Learner:
    """How a network for noisy photographs comes about.

    edges: of the intervals of noise that have a network each; none: the plain network has them all. subjects: of the
    photographs to learn from, a key of `FOLDS`. whole: every weight learns, and not a LoRA. warm_start: an expert starts
    as that of the next lower noise ended, and not as the plain network.
    """

    edges: tuple[float, ...] = ()
    subjects: str = "same"
    whole: bool = False
    warm_start: bool = False


def learners(bench: PhotographBench) -> dict[str, Learner]:
    """The rows of the table."""
    return {"plain network": Learner(), "five experts": Learner(bench.edges, warm_start=True),
            "plain network, halves of the classes": Learner(subjects="other classes"),
            "five experts, halves, each learned from the other": Learner(bench.edges, "other classes", warm_start=True),
            "five experts, learned from flowers": Learner(bench.edges, "others"),
            "five experts, each from the plain network": Learner(bench.edges),
            "one expert of as many steps": Learner((bench.edges[0], bench.edges[-1])),
            "five whole networks": Learner(bench.edges, whole=True)}


@dataclass(frozen=True)
class Photographs:
    """Photographs (n, 3, 224, 224) in [-1, 1] to learn from and to test with, and the classes of both, (n,)."""

    learned: Tensor
    learned_classes: Tensor
    tested: Tensor
    classes: Tensor


def other_classes(photographs: Photographs) -> list[Photographs]:
    """Two halves: each learns from half of the classes, and is tested with the others."""
    kinds = photographs.classes.unique()
    return [_of_classes(photographs, learned, tested) for learned, tested in ((kinds[::2], kinds[1::2]),
                                                                              (kinds[1::2], kinds[::2]))]


def _of_classes(photographs: Photographs, learned: Tensor, tested: Tensor) -> Photographs:
    images = torch.cat([photographs.learned, photographs.tested])
    classes = torch.cat([photographs.learned_classes, photographs.classes])
    is_learned, is_tested = torch.isin(classes, learned), torch.isin(photographs.classes, tested)
    return Photographs(images[is_learned], classes[is_learned],
                       photographs.tested[is_tested], photographs.classes[is_tested])


def flowers(photographs: Photographs) -> list[Photographs]:
    """Flowers to learn from, which are smaller photographs, enlarged; none of them is of a class that is tested."""
    images, kinds = real_networks().flowers()
    images = F.interpolate(images, photographs.tested.shape[-2:], mode="bilinear")
    return [replace(photographs, learned=images, learned_classes=kinds)]


FOLDS: dict[str, Callable[[Photographs], list[Photographs]]] = {
    "same": lambda photographs: [photographs], "other classes": other_classes, "others": flowers}
"""By the subjects to learn from: trainings and tests whose results are averaged."""


def read_photographs(bench: PhotographBench) -> Photographs:
    """Ten classes of ImageNet, every second photograph to test with. ValueError where there are none."""
    images, classes = real_networks().imagenette(each=bench.photographs)
    is_tested = torch.arange(len(images)) % 2 == 0
    return Photographs(images[~is_tested], classes[~is_tested], images[is_tested], classes[is_tested])


@dataclass(frozen=True)
class LearnerRun:
    """The training and the test of one learner; a stopped training resumes."""

    bench: PhotographBench
    learner: Learner
    guider: Guider            # the plain one, the teacher
    photographs: Photographs
    folder: Path
    report: Report

    def row(self) -> Row:
        """Accuracy by noise level, and what it cost."""
        started = time.process_time()
        if self.learner.edges:
            self.train()
        minutes = (time.process_time() - started) / 60
        found = {str(level): self.accuracy(level) for level in LEVELS}
        return {**{key: {level: accuracy[key] for level, accuracy in found.items()} for key in ACCURACIES},
                "trainable_share": self.net.trainable_share() if self.learner.edges else 0, "training_minutes": minutes}

    @cached_property
    def net(self) -> ExpertBank | Networks:
        """The network of every interval."""
        base, schedule = base_network(self.guider), ExpertSchedule(self.learner.edges)
        if self.learner.whole:
            return Networks(base, schedule)
        return ExpertBank(base, schedule, LoraSpec(self.bench.rank, self.bench.rank), "noisy")

    @property
    def bank(self) -> ExpertBank:
        """The network, where it is a bank."""
        assert isinstance(self.net, ExpertBank)
        return self.net

    @cached_property
    def student(self) -> Guider:
        """The guider that looks at noisy photographs."""
        return replace(self.guider, view="noisy", net=self.net if self.learner.edges else self.guider.net)

    def train(self) -> None:
        """Let every interval learn what the plain network says of clean photographs."""
        count = len(self.net.schedule)
        steps, rate = self.bench.steps * (len(self.bench.edges) - 1) // count, 1e-4 if self.learner.whole else 1e-3
        for index in range(count):
            options = RunOptions({"index": index}, self.folder / f"interval_{index}.state.safetensors",
                                 on_step=StepReport(self.report, count, steps).of_interval(index))
            if self.learner.warm_start and index:
                self.bank.load(index, self.bank.weights(index - 1))
            with trainable(self.net, index) as parameters:
                optimize(parameters, partial(self.loss, index), steps, rate, f"interval {index}", options)

    def loss(self, index: int, step: int) -> Tensor:
        """Loss of a training step of an interval, a function of (index, step) alone."""
        generator = seeded(0, index, step)
        images = self.photographs.learned
        images = images[torch.randint(len(images), (self.bench.batch,), generator=generator)]
        pairs = noisy_pairs(images, self.net.schedule[index], generator)
        with torch.no_grad():
            teacher = self.guider.predict(pairs.images, clean(pairs.images))
        return TASKS[self.guider.task].distance(self.student.predict(pairs.inputs, pairs.sigma), teacher).mean()

    @torch.no_grad()
    def accuracy(self, level: float) -> dict[str, float]:
        """Shares of the tested photographs at a noise level, by ACCURACIES."""
        student = self.student if level >= self.bench.edges[0] else self.guider
        logits = []
        for number, images in enumerate(self.photographs.tested.split(25)):
            sigma = torch.full((len(images),), level)
            noise = torch.randn(images.shape, generator=seeded(1, number))
            logits.append(student.predict(to_vp(images + level * noise, sigma), sigma))
        return accuracies(torch.cat(logits), self.photographs.classes)


ACCURACIES = ("top_1", "top_5", "among_tested")


def accuracies(logits: Tensor, classes: Tensor) -> dict[str, float]:
    """Shares of images whose class is found, by ACCURACIES: the likeliest, one of five, the likeliest of those tested.

    logits (n, K); classes (n,). The last does not count what a network gains by knowing which classes there are.
    """
    kinds = classes.unique()
    right = {"top_1": logits.argmax(1) == classes, "top_5": (logits.topk(5).indices == classes[:, None]).any(1),
             "among_tested": kinds[logits[:, kinds].argmax(1)] == classes}
    return {key: float(hits.float().mean()) for key, hits in right.items()}


def mean_row(runs: Sequence[LearnerRun]) -> Row:
    """The results of runs that are tested with as many photographs each: means of what they find, the sum of their time."""
    rows = [run.row() for run in runs]
    means = {key: {level: sum(row[key][level] for row in rows) / len(rows) for level in rows[0][key]} for key in ACCURACIES}
    return {**rows[0], **means, "training_minutes": sum(row["training_minutes"] for row in rows)}


def noisy_pairs(images: Tensor, interval: NoiseInterval, generator: torch.Generator) -> Pairs:
    """Images (B, 3, H, W), half of them mirrored, under noise of an interval, for the noisy view."""
    images = torch.where(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, images.flip(-1), images)
    sigma = interval.sample(len(images), generator)
    noise = torch.randn(images.shape, generator=generator)
    return Pairs(images, to_vp(images + expand(sigma, images) * noise, sigma), sigma)


def photograph_bench(bench: PhotographBench, folder: Path, report: Report) -> list[Row]:
    """A row for each learner; finished ones are read from the folder. ValueError without the real networks."""
    photographs = read_photographs(bench)
    guider = load_guider(Path(real_folder() or "") / "guiders" / bench.network)
    rows = []
    for name, learner in learners(bench).items():
        place = folder / config_hash({"learner": asdict(learner), **asdict(bench)})
        runs = [LearnerRun(bench, learner, guider, fold, place / str(number), partial(_prefixed, report, name))
                for number, fold in enumerate(FOLDS[learner.subjects](photographs))]
        rows.append({"row": name, **cached_json(place / "row.json", partial(mean_row, runs))})
        report(f"{name}: {rows[-1]['top_1']}")
    return rows


def _prefixed(report: Report, name: str, line: str) -> None:
    report(f"{name}: {line}")


COLUMNS = (Column("right, and right among the tested classes, at sigma", "{row}", numeric=False),
           *(Column(f"{level:g}", f"{{top_1[{level}]:.0%}}, {{among_tested[{level}]:.0%}}") for level in SHOWN),
           Column("trained share", "{trainable_share:.1%}"), Column("minutes of a core", "{training_minutes:.0f}"))


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown."""
    return report.markdown(COLUMNS, rows)


def plot(rows: Sequence[Row]) -> Tensor:
    """Top-1 accuracy by noise level, as a picture (1, 3, H, W) in [-1, 1]."""
    lines = {row["row"]: [(float(level), right) for level, right in row["top_1"].items()] for row in rows}
    return line_plot(lines, "Photographs under noise: share whose class is found", Axes("sigma", "share", log_x=True))
