"""The demo: distil five experts from generated images alone, and compare them with the plain guider and with no guidance.

A place to start from: `demo` is the whole story in a dozen lines. Everything that is special to the bundled world comes from
`TinyWorld`; with a denoiser and a guider of your own, the calls of `ppap_core` are the same.
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.evaluation import Evaluator
from benchmarks.report import Column, Report, markdown, write_report
from benchmarks.tiny_world import NOISE, TinyWorld, generate_store, hold_out, load_world
from ppap_core import (
    DistillConfig,
    ExpertBank,
    ExpertSchedule,
    Guider,
    LoraSpec,
    NoiseInterval,
    SampleStore,
    Schedule,
    Term,
    base_network,
    distill,
    save_bank,
    teacher_distance,
    with_experts,
)
from ppap_core.experts.examine import measure_knowledge
from ppap_core.experts.knowledge import describe_knowledge, remember
from ppap_core.experts.lesson import uses_warm_start
from ppap_core.experts.presets import with_preset
from ppap_core.experts.samples import held_out_count
from ppap_core.guiders.latents import VIEWS, View
from ppap_core.schedules import FALLING, Ramp
from ppap_core.tinyworld.loaders import SIGMA_MAX, SIGMA_MIN
from ppap_core.tinyworld.scenes import CLASSES, Scenes
from ppap_core.viz.drawing import contact_sheet, save_picture
from ppap_core.viz.plots import Axes, Points, line_plot

SAMPLES, STEPS, IMAGES = 1024, 16, 128
EXPERTS = 5
TRAINING = with_preset(DistillConfig(lr=2e-3), "quick look")
WEIGHT = 0.7          # of normalized terms: near the best of the benchmark
THROUGH_WEIGHT = 0.3  # of those whose gradient goes through the model
FALLS = Schedule(ramp=Ramp(NoiseInterval(SIGMA_MIN, SIGMA_MAX), *FALLING))  # with the noise, as new terms of the nodes do


def demo(folder: Path, report: Report) -> None:
    """Write a contact sheet, two plots, a table and the experts into a folder; takes a few minutes on two cores."""
    folder, world = Path(folder), load_world("class")
    report(f"a diffusion model of small scenes, and a classifier of {len(CLASSES)} shapes that has only seen clean ones")
    store = generate_store(world, folder / "samples", SAMPLES, STEPS, report)
    hold_out(world, store, held_out_count(SAMPLES))
    rows: dict[str, Term | None] = {"unguided": None}
    for view in VIEWS:
        plain = replace(world.guider, view=view)
        experts = distill_experts(world, view, store, folder, report)
        plot_teacher_distance({"plain guider": plain, "five experts": experts}, world, store, folder)
        rows[f"plain guider, {view} view"] = Term(plain, WEIGHT, FALLS, normalized=True)
        rows[f"five experts, {view} view"] = Term(experts, WEIGHT, FALLS, normalized=True)
    rows["five experts, through the model"] = Term(experts, THROUGH_WEIGHT, FALLS, normalized=True,
                                                 backprop_through_model=True)
    compare(world, rows, folder, report)


def distill_experts(world: TinyWorld, view: View, store: SampleStore, folder: Path, report: Report) -> Guider:
    """The guider with five experts of one view, which are saved; an interrupted distillation is resumed.

    What they know is measured on held-out images, and the plain network is used where none is needed.
    """
    bank = ExpertBank(base_network(world.guider), equal_shares(store, EXPERTS), LoraSpec(rank=2, alpha=2), view)
    config = replace(TRAINING, warm_start=uses_warm_start(view))
    distill(world.guider, bank.to(world.device), store, config, folder / f"experts_{view}",
            partial(report_step, report, view))
    remember(bank, measure_knowledge(world.guider, bank, store))
    for line in describe_knowledge(bank).splitlines():
        report(f"{view} view: {line}")
    save_bank(folder / f"experts_{view}.safetensors", bank, world.guider)
    return with_experts(world.guider, bank)


def equal_shares(store: SampleStore, count: int) -> ExpertSchedule:
    """Intervals with equal shares of the steps that led to the samples."""
    levels = store.sigmas.unique().tolist()
    return ExpertSchedule.equal_shares(count, levels[0], levels[-1], levels)


def report_step(report: Report, view: str, index: int, step: int, loss: float) -> None:
    """Report every hundredth step of an expert's training."""
    if (step + 1) % 100 == 0:
        report(f"{view} view: expert {index + 1} of {EXPERTS}, step {step + 1}, loss {loss:.3f}")


def plot_teacher_distance(guiders: dict[str, Guider], world: TinyWorld, store: SampleStore, folder: Path) -> None:
    """Plot how far guiders of one view are, on noisy images, from the plain guider on the images that these became."""
    view = next(iter(guiders.values())).view
    series: dict[str, Points] = {
        name: teacher_distance(world.guider, guider, store, equal_shares(store, STEPS), device=world.device)
        for name, guider in guiders.items()}
    plot = line_plot(series, f"Distance from the answer on the finished image, {view} view",
                     Axes("noise level sigma", "KL, lower is better", log_x=True))
    save_picture(plot, folder / f"teacher_distance_{view}.png")


@dataclass(frozen=True)
class Method:
    """One way to sample: guided by a term, or unguided. Called with the numbers of scenes, it makes an image for each."""

    world: TinyWorld
    term: Term | None

    def __call__(self, numbers: Sequence[int], scenes: Scenes) -> Tensor:
        return self.sample([NOISE + number for number in numbers], scenes.label)

    def sample(self, seeds: Sequence[int], labels: Tensor) -> Tensor:
        """An image (B, 3, 32, 32) of each seed, guided towards the class of its label."""
        terms = [replace(self.term, guider=self.term.guider.aim(labels))] if self.term else []
        return self.world.sample(seeds, STEPS, terms)


def compare(world: TinyWorld, rows: dict[str, Term | None], folder: Path, report: Report) -> None:
    """Sample and judge every row; write results.json, results.md and a contact sheet with an image of each class."""
    evaluator, methods = world.evaluator(2048), {name: Method(world, term) for name, term in rows.items()}
    results = []
    for name, method in methods.items():
        results.append({"row": name, **judged(method, evaluator)})
        report(f"{name}: the judge sees the wanted shape in {results[-1]['score']:.0%} of {IMAGES} images")
    write_report(folder / "results", results, markdown(COLUMNS, results))
    labels = torch.arange(len(CLASSES), device=world.device)
    sheet = {name: method.sample(range(len(CLASSES)), labels) for name, method in methods.items()}
    save_picture(contact_sheet(sheet, heads=CLASSES), folder / "contact_sheet.png")
    report(f"wanted, from left to right: {', '.join(CLASSES)}; pictures and tables are in {folder}")


def judged(method: Callable[[Sequence[int], Scenes], Tensor], evaluator: Evaluator) -> dict[str, float]:
    """Scores of a method, and its seconds per image."""
    started = time.monotonic()
    scores = evaluator.evaluate(method, range(IMAGES))
    return {**asdict(scores), "seconds_per_image": (time.monotonic() - started) / IMAGES}


COLUMNS = (Column("", "{row}", numeric=False), Column("right by the judge", "{score:.0%}"),
           Column("right by the guider", "{own_score:.0%}"), Column("Fréchet distance", "{frechet:.1f}"),
           Column("seconds per image", "{seconds_per_image:.3f}"))
