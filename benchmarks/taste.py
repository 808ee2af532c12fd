"""Guiders trained on a few pictures: flowers told apart by a real network, and tiny scenes led to small or large objects.

The flowers are real photographs, seen by EfficientNet-Lite0, which learned ImageNet; a head is judged by the photographs
that it was not trained on. Small and large objects are nothing that the tiny networks were trained to name; how large an
object is in a generated image is told by a judge of regions, which never guides.
"""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from itertools import chain, combinations
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ppap_core import Guider, Term, TrainedGuider, class_target, load_guider, train_guider
from ppap_core.guiders.guider import clean
from ppap_core.guiders.train import best_fit, embed
from ppap_core.schedules import falling
from ppap_core.tinyworld import loaders as tinyworld
from ppap_core.tinyworld.scenes import Scenes, draw

from .evaluation import features
from .metrics import FeatureStats, frechet_distance
from .networks import load_held_out_judge
from .real import real_folder, real_networks
from .report import Column, Report, cached_json, markdown
from .report import Row as Result
from .tiny_world import NOISE, TinyWorld, load_world
from .training import config_hash

SIZES = ("small", "large")
SHARE = 4  # the smallest and the largest quarter of objects are called so
SCENES = 300_000_000  # the first scene that heads are trained on
OTHERS = 310_000_000  # the first scene that they are judged by


@dataclass(frozen=True)
class Way:
    """A head, and how it guides."""

    task: str               # of the tiny network that it reads
    count: int              # scenes of each size in its training
    weight: float           # of its term, normalized and falling
    through: bool = False   # whether the gradient goes back through the model

    @property
    def name(self) -> str:
        """The way in words."""
        return (f"head on the network for {self.task}, {self.count} scenes of each"
                f"{', through the model' if self.through else ''}")


@dataclass(frozen=True)
class TasteBench:
    """Everything that a result depends on, besides the networks and the photographs."""

    counts: tuple[int, ...] = (4, 10, 20, 40)  # photographs of each class in the training
    classes: tuple[int, ...] = (2, 5)
    splits: int = 5
    copies: int = 4         # altered ones of each scene
    flower_copies: int = 1  # of each photograph, for which the network takes longer
    ways: tuple[Way, ...] = (
        Way("depth", 10, 0.1), Way("depth", 10, 0.2), Way("depth", 10, 0.7), Way("depth", 10, 0.1, True),
        Way("depth", 10, 0.2, True), Way("depth", 20, 0.7), Way("segmentation", 20, 0.7), Way("class", 20, 0.7))
    images: int = 256
    steps: int = 16
    scenes: int = 5000


# Photographs

@dataclass(frozen=True)
class Flowers:
    """Embeddings of all photographs, (n, 1 + copies, D), and their classes (n,)."""

    embeddings: Tensor
    labels: Tensor

    def measured(self, bench: TasteBench, classes: int, count: int) -> Result:
        """Accuracies as means over splits and over all choices of so many classes."""
        heads = [self._head(bench, chosen, count, split) for split in range(bench.splits)
                 for chosen in combinations(range(5), classes)]
        others, left_out, seconds, copies, off = torch.tensor(heads, dtype=torch.float64).mean(0).tolist()
        return {"kind": "flowers", "classes": classes, "count": count, "others": others, "left_out": left_out,
                "seconds": seconds, "copies": copies, "off": off, "heads": len(heads)}

    def _head(self, bench: TasteBench, chosen: tuple[int, ...], count: int, split: int) -> tuple[float, ...]:
        order = torch.randperm(len(self.labels) // 5, generator=torch.Generator().manual_seed(split))
        rows = [(self.labels == label).nonzero()[:, 0][order] for label in chosen]
        shown, others = (torch.cat([row[part] for row in rows]) for part in (slice(count), slice(count, None)))
        labels = torch.arange(len(chosen)).repeat_interleave(count)
        began = perf_counter()
        fit, uses_copies = best_fit(self.embeddings[shown], labels)
        seconds = perf_counter() - began
        named = fit.logits(self.embeddings[others, 0]).argmax(1)
        right = (named == torch.arange(len(chosen)).repeat_interleave(len(others) // len(chosen))).double().mean()
        left_out = (fit.probabilities.argmax(1) == labels).double().mean()
        return float(right), float(left_out), seconds, float(uses_copies), float((left_out - right).abs())


def load_flowers(bench: TasteBench) -> Flowers:
    """Photographs of five flowers, as EfficientNet-Lite0 sees them. ValueError where there are none."""
    images, labels = real_networks().flowers()
    folder = real_folder()
    assert folder
    backbone = load_guider(folder / "guiders" / "tf_efficientnet_lite0", "embedding")
    batches = {str(index): images[labels == index] for index in range(5)}
    return Flowers(embed(backbone, batches, bench.flower_copies), labels.sort(stable=True).values)


# Scenes

def radii(numbers: Sequence[int]) -> Tensor:
    """Radius of the object of each scene as a share of its range, (n,)."""
    return torch.stack([torch.rand(15, generator=torch.Generator().manual_seed(number))[3] for number in numbers])


def sized_scenes(size: str, count: int, first: int) -> Scenes:
    """So many scenes with a small or a large object, from a number on."""
    numbers = range(first, first + 3 * SHARE * count)
    radius = radii(numbers)
    chosen = radius < 1 / SHARE if size == "small" else radius > 1 - 1 / SHARE
    return draw([number for number, fits in zip(numbers, chosen.tolist(), strict=True) if fits][:count])


@torch.no_grad()
def areas_of(images: Tensor) -> Tensor:
    """Share of each image (B, 3, H, W) that its object covers by a judge of regions, (B,)."""
    judge = load_held_out_judge("segmentation")
    parts = [judge.predict(part, clean(part)).argmax(1) > 0 for part in images.split(64)]
    return torch.cat(parts).float().mean((1, 2))


@dataclass(frozen=True)
class SizeBench:
    """The pixel world and the heads that were trained on scenes of small and large objects."""

    bench: TasteBench
    world: TinyWorld

    @cached_property
    def median(self) -> float:
        """The area that half of all scenes are below."""
        return float(areas_of(draw(range(OTHERS, OTHERS + 1000)).image).median())

    def head(self, task: str, count: int) -> TrainedGuider:
        """A guider that tells small from large by so many scenes of each, in what the tiny network of a task sees."""
        backbone = tinyworld.load_guider(task, "embedding")
        return train_guider(backbone, {size: sized_scenes(size, count, SCENES).image for size in SIZES}, self.bench.copies)

    def accuracy(self, guider: Guider) -> float:
        """Share of other small and large scenes that a guider names right."""
        scenes = [sized_scenes(size, 200, OTHERS).image for size in SIZES]
        return sum(float((guider.predict(image, clean(image)).argmax(1) == index).float().mean())
                   for index, image in enumerate(scenes)) / len(SIZES)

    def sampled(self, terms: Sequence[Term]) -> Tensor:
        """Images by the guided model."""
        numbers = range(NOISE, NOISE + self.bench.images)
        return torch.cat([self.world.sample(numbers[start:start + 64], self.bench.steps, terms)
                          for start in range(0, len(numbers), 64)])

    def row(self, way: Way, wanted: str) -> Result:
        """Measurements of images that are led to a size by a head."""
        trained = self.head(way.task, way.count)
        aimed = trained.guider.aim(class_target(trained.guider, wanted))
        schedule = falling(self.world.start([NOISE], self.bench.steps)[1].tolist())
        images = self.sampled([Term(aimed, way.weight, schedule, normalized=True, backprop_through_model=way.through)])
        return {"kind": "guided", "wanted": wanted, **asdict(way),
                "others": self.accuracy(trained.guider), "left_out": trained.accuracy, **self.judged(images, wanted)}

    def judged(self, images: Tensor, wanted: str) -> Result:
        """Areas, and how far images are from scenes with all sizes."""
        areas = areas_of(images)
        smaller = float((areas < self.median).float().mean())
        reference, judge = self.world.evaluator(self.bench.scenes).reference, self.world.class_judge
        found = torch.cat([features(judge, part) for part in images.split(64)])
        return {"area": float(areas.mean()), "met": smaller if wanted == "small" else 1 - smaller,
                "frechet": frechet_distance(FeatureStats(found.shape[1]).update(found), reference.stats)}

    def without(self, wanted: str) -> Result:
        """Measurements of images without guidance."""
        return {"kind": "unguided", "wanted": wanted, **self.judged(self.sampled([]), wanted)}

    def real(self, wanted: str) -> Result:
        """Measurements of scenes that are of the size."""
        scenes = sized_scenes(wanted, self.bench.images, OTHERS)
        return {"kind": "scenes", "wanted": wanted, **self.judged(scenes.image, wanted)}


Identity = dict[str, Any]


def _flower_rows(bench: TasteBench) -> Iterator[tuple[Identity, Callable[[], Result]]]:
    flowers = cache(partial(load_flowers, bench))
    for classes in bench.classes:
        for count in bench.counts:
            identity = {"flowers": classes, "count": count, "splits": bench.splits, "copies": bench.flower_copies}
            yield identity, partial(_measure_flowers, flowers, bench, classes, count)


def _measure_flowers(flowers: Callable[[], Flowers], bench: TasteBench, classes: int, count: int) -> Result:
    return flowers().measured(bench, classes, count)


def _size_rows(bench: TasteBench) -> Iterator[tuple[Identity, Callable[[], Result]]]:
    world = SizeBench(bench, load_world())
    same = {"images": bench.images, "steps": bench.steps, "scenes": bench.scenes, "copies": bench.copies}
    for wanted in SIZES:
        yield same | {"scenes of": wanted}, partial(world.real, wanted)
        yield same | {"unguided": wanted}, partial(world.without, wanted)
        for way in bench.ways:
            identity = {name: value for name, value in asdict(way).items() if value is not False}
            yield same | identity | {"wanted": wanted}, partial(world.row, way, wanted)


def taste_bench(bench: TasteBench, folder: Path, report: Report) -> list[Result]:
    """A row for each training on photographs, where there are any, and for each way to a size; finished ones are read."""
    rows = []
    for identity, make in chain(_flower_rows(bench) if real_folder() else (), _size_rows(bench)):
        rows.append(cached_json(folder / f"{config_hash(identity)}.json", make))
        report(f"{rows[-1]}")
    return rows


FLOWERS = (Column("classes", "{classes}"), Column("photographs of each", "{count}"),
           Column("right on the others", "{others:.1%}"), Column("right when left out", "{left_out:.1%}"),
           Column("apart, in one head", "{off:.0%}"),
           Column("seconds to fit", "{seconds:.2f}"), Column("heads", "{heads}"))
GUIDED = (Column("wanted", "{wanted}", numeric=False), Column("how", "{how}", numeric=False),
          Column("weight", "{weight}"), Column("head: right on other scenes", "{others}"),
          Column("on that side of the median", "{met:.0%}"), Column("area of the object", "{area:.1%}"),
          Column("Fréchet", "{frechet:.3g}"))
NAMES = {"scenes": "exact scenes of that size", "unguided": "without guidance"}


def table(rows: Sequence[Result]) -> str:
    """Rows in Markdown: the photographs, then the sizes."""
    flowers = [row for row in rows if row["kind"] == "flowers"]
    sizes = [_told(row) for row in rows if row["kind"] != "flowers"]
    return "\n".join(markdown(*each) for each in ((FLOWERS, flowers), (GUIDED, sizes)) if each[1])


def _told(row: Result) -> Result:
    """A row of sizes with its way in words."""
    if row["kind"] != "guided":
        return {**row, "how": NAMES[row["kind"]], "weight": "", "others": ""}
    way = Way(row["task"], row["count"], row["weight"], row.get("through", False))
    return {**row, "how": way.name, "others": f"{row['others']:.1%}"}
