"""The demo: distil five experts from generated images alone, then sample unguided, with the plain guider and with them."""
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..bank_file import save_bank
from ..distill import DistillConfig, disagreement, distill, view_of
from ..experts import ExpertBank, LoraSpec, base_network, with_experts
from ..files import write_json
from ..guidance import Term
from ..guider import Guider
from ..noise import ExpertSchedule
from ..plots import contact_sheet, line_plot, save_picture
from ..samples import SampleStore
from .scenes import CLASSES
from .world import World, generate_store, load_world, measure, scene_statistics

SAMPLES, STEPS, IMAGES = 768, 20, 128
SCHEDULE = ExpertSchedule((0.05, 0.2, 0.5, 1.0, 2.0, 10.0))
TRAINING = {"noisy": DistillConfig(steps=300, lr=2e-3), "denoised": DistillConfig(steps=120, lr=2e-3)}
WEIGHTS = {"plain": {"noisy": 64.0, "denoised": 8.0}, "experts": {"noisy": 16.0, "denoised": 64.0}}  # best in the benchmark
LEVELS = [0.05 * 1.3**i for i in range(20)]  # noise levels of the plot

Report = Callable[[str], None]


def demo(folder: Path, report: Report) -> None:
    """A few minutes on two cores; writes a contact sheet, two plots, a table and the experts into the folder."""
    folder = Path(folder)
    world = load_world("class")
    report(f"a diffusion model of small scenes, and a classifier of {len(CLASSES)} shapes that has only seen clean ones")
    store = generate_store(world, folder / "samples", SAMPLES, STEPS, report)
    rows: dict[str, tuple[Guider | None, float]] = {"unguided": (None, 0.0)}
    for view in ("noisy", "denoised"):
        plain, experts = replace(world.guider, view=view), distil_view(world, view, store, folder, report)
        rows |= {f"plain guider, {view} view": (plain, WEIGHTS["plain"][view]),
                 f"five experts, {view} view": (experts, WEIGHTS["experts"][view])}
        plot_disagreement(world, plain, experts, store, folder / f"disagreement_{view}.png")
    write_results(world, rows, folder, report)


def distil_view(world: World, view: str, store: SampleStore, folder: Path, report: Report) -> Guider:
    """Five experts of one view, saved; goes on where an earlier call was stopped."""
    bank = ExpertBank(base_network(world.guider), SCHEDULE, LoraSpec(rank=16, alpha=16), view).to(world.device)
    training = TRAINING[view]

    def on_step(index: int, step: int, loss: float) -> None:
        if (step + 1) % 60 == 0:
            report(f"{view} view: expert {index + 1} of {len(SCHEDULE)}, step {step + 1} of {training.steps}, "
                   f"loss {loss:.3f}")

    distill(world.guider, bank, store, world.denoise, training, folder / f"experts_{view}", on_step)
    save_bank(folder / f"experts_{view}.safetensors", bank, world.guider)
    return with_experts(world.guider, bank)


def plot_disagreement(world: World, plain: Guider, experts: Guider, store: SampleStore, path: Path) -> None:
    """How far plain guider and experts are from the answer on the clean image, by noise level."""
    see = view_of(experts.net, world.denoise)
    series = {name: list(zip(LEVELS, disagreement(plain, other, store, see, LEVELS, device=world.device), strict=True))
              for name, other in (("plain guider", plain), ("five experts", experts))}
    save_picture(line_plot(series, f"Distance from the answer on the clean image, {plain.view} view", "noise level sigma",
                           "KL, lower is better", log_x=True), path)


def write_results(world: World, rows: dict[str, tuple[Guider | None, float]], folder: Path, report: Report) -> None:
    """Sample and judge every row; a contact sheet, results.json and results.md."""
    scenes, sheet, results = scene_statistics(world, 2048), {}, []
    for name, (guider, weight) in rows.items():
        started = time.monotonic()
        found = measure(world, guider, weight, range(IMAGES), STEPS, scenes)
        seconds = (time.monotonic() - started) / IMAGES
        report(f"{name}: the judge sees the wanted shape in {found.judge_accuracy:.0%} of {IMAGES} images")
        results.append({"row": name, "weight": weight, **asdict(found), "seconds_per_image": seconds})
        terms = [Term(guider.aim(torch.arange(len(CLASSES), device=world.device)), weight)] if guider else []
        sheet[name] = world.sample(range(len(CLASSES)), STEPS, terms)
    save_picture(contact_sheet(sheet, heads=CLASSES), folder / "contact_sheet.png")  # under each column what was wanted
    write_json(folder / "results.json", results)
    lines = ["| | right by the judge | right by the guider | Fréchet distance | seconds per image |",
             "|---|---:|---:|---:|---:|"]
    lines += [f"| {r['row']} | {r['judge_accuracy']:.0%} | {r['guider_accuracy']:.0%} | {r['frechet']:.1f} | "
              f"{r['seconds_per_image']:.3f} |" for r in results]
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report(f"wanted, from left to right: {', '.join(CLASSES)}; pictures and tables are in {folder}")
