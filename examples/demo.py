"""The demo: distil five experts from generated images alone, then sample unguided, with the plain guider and with them."""
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.evaluation import judge_all, reference
from benchmarks.tiny_world import NOISE, TinyWorld, generate_store, load_world
from ppap_core.experts.bank import ExpertBank, LoraSpec, base_network, with_experts
from ppap_core.experts.checkpoint import save_bank
from ppap_core.experts.distill import DistillConfig, distill, teacher_distance, uses_warm_start
from ppap_core.experts.samples import SampleStore
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import Guider
from ppap_core.io.files import write_json
from ppap_core.schedules import ExpertSchedule
from ppap_core.tinyworld.loaders import SIZE
from ppap_core.tinyworld.scenes import CLASSES
from ppap_core.viz.plots import contact_sheet, line_plot, save_picture

SAMPLES, STEPS, IMAGES = 1024, 16, 128
EXPERTS = 5
TRAINING = DistillConfig(steps=300, lr=2e-3)
WEIGHT, THROUGH = 0.6, 0.3  # of balanced terms, in the prediction and through the model: near the best of the benchmark

Report = Callable[[str], None]


def demo(folder: Path, report: Report) -> None:
    """A few minutes on two cores; writes a contact sheet, two plots, a table and the experts into the folder."""
    folder = Path(folder)
    world = load_world("class")
    report(f"a diffusion model of small scenes, and a classifier of {len(CLASSES)} shapes that has only seen clean ones")
    store = generate_store(world, folder / "samples", SAMPLES, STEPS, report)
    rows: dict[str, Term | None] = {"unguided": None}
    for view in ("noisy", "denoised"):
        plain, experts = replace(world.guider, view=view), distil_view(world, view, store, folder, report)
        rows |= {f"plain guider, {view} view": Term(plain, WEIGHT, normalized=True),
                 f"five experts, {view} view": Term(experts, WEIGHT, normalized=True)}
        plot_disagreement(world, plain, experts, store, folder / f"disagreement_{view}.png")
    rows["five experts, through the model"] = Term(experts, THROUGH, normalized=True, backprop_through_model=True)
    write_results(world, rows, folder, report)


def shares(store: SampleStore, count: int) -> ExpertSchedule:
    """So many equal parts of the steps that led to the samples."""
    levels = store.sigmas.unique().tolist()
    return ExpertSchedule.equal_shares(count, levels[0], levels[-1], levels)


def distil_view(world: TinyWorld, view: str, store: SampleStore, folder: Path, report: Report) -> Guider:
    """Five experts of one view, saved; goes on where an earlier call was stopped."""
    bank = ExpertBank(base_network(world.guider), shares(store, EXPERTS), LoraSpec(rank=2, alpha=2), view).to(world.device)

    def on_step(index: int, step: int, loss: float) -> None:
        if (step + 1) % 100 == 0:
            report(f"{view} view: expert {index + 1} of {EXPERTS}, step {step + 1}, loss {loss:.3f}")

    training = replace(TRAINING, warm_start=uses_warm_start(view))
    distill(world.guider, bank, store, training, folder / f"experts_{view}", on_step)
    save_bank(folder / f"experts_{view}.safetensors", bank, world.guider)
    return with_experts(world.guider, bank)


def plot_disagreement(world: TinyWorld, plain: Guider, experts: Guider, store: SampleStore, path: Path) -> None:
    """How far plain guider and experts are from the answer on the image that it became, by noise level."""
    series = {name: teacher_distance(plain, other, store, shares(store, STEPS), device=world.device)
              for name, other in (("plain guider", plain), ("five experts", experts))}
    save_picture(line_plot(series, f"Distance from the answer on the finished image, {plain.view} view", "noise level sigma",
                           "KL, lower is better", log_x=True), path)


def write_results(world: TinyWorld, rows: dict[str, Term | None], folder: Path, report: Report) -> None:
    """Sample and judge every row; a contact sheet, results.json and results.md."""
    real, sheet, results = reference(world.class_judge, 2048, SIZE, world.device), {}, []

    def sample(term: Term | None, seeds: Sequence[int], wanted: Tensor) -> Tensor:
        return world.sample(seeds, STEPS, [replace(term, guider=term.guider.aim(wanted))] if term else [])

    for name, term in rows.items():
        started = time.monotonic()
        found = judge_all(lambda numbers, scenes, term=term: sample(term, [NOISE + n for n in numbers], scenes.label),
                          range(IMAGES), world.judges, world.guider, real, world.device)
        seconds = (time.monotonic() - started) / IMAGES
        report(f"{name}: the judge sees the wanted shape in {found.score:.0%} of {IMAGES} images")
        results.append({"row": name, **asdict(found), "seconds_per_image": seconds})
        sheet[name] = sample(term, range(len(CLASSES)), torch.arange(len(CLASSES), device=world.device))
    save_picture(contact_sheet(sheet, heads=CLASSES), folder / "contact_sheet.png")  # under each column what was wanted
    write_json(folder / "results.json", results)
    lines = ["| | right by the judge | right by the guider | Fréchet distance | seconds per image |",
             "|---|---:|---:|---:|---:|"]
    lines += [f"| {r['row']} | {r['score']:.0%} | {r['own_score']:.0%} | {r['frechet']:.1f} | {r['seconds_per_image']:.3f} |"
              for r in results]
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report(f"wanted, from left to right: {', '.join(CLASSES)}; pictures and tables are in {folder}")
