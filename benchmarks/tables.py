"""The benchmark on the tiny world: tables of ways to guide, each at its own best setting, judged by networks that never
guide. A table is a file in tables/: what is sampled, and the rows with what is searched for each."""
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppap_core.guidance.autoguidance import Autoguidance, autoguided
from ppap_core.guidance.prior import PriorConfig, PriorObjective, optimize_images
from ppap_core.guidance.shift import guided
from ppap_core.guidance.terms import Term
from ppap_core.guidance.training_free import METHODS, sample_training_free
from ppap_core.guiders.guider import Guider
from ppap_core.guiders.tasks import TASKS
from ppap_core.io.files import read_json, write_bytes, write_json
from ppap_core.noise import NoiseInterval, expand, to_vp
from ppap_core.sampling import Denoiser, sample_euler
from ppap_core.schedules import Schedule
from ppap_core.tinyworld.loaders import SIZE, condition
from ppap_core.tinyworld.networks.denoiser import TinyDenoiser
from ppap_core.tinyworld.scenes import Scenes, draw, truth
from ppap_core.viz.plots import line_plot, save_picture

from .ablations import ABLATIONS
from .bad_models import Model, bad_version
from .costs import ratio_in_turn
from .evaluation import LESS_IS_BETTER, MEASURES, Reference, judge_all, reference
from .networks import load_conditional_denoiser
from .tiny_world import NOISE, TinyWorld, load_world
from .training import COSTS, Report, Training, changes, config_hash, make_guider

TABLES = Path(__file__).parent / "rows"
SEARCHED, MEASURED = 1000, 100_000  # the first scene whose truth is asked for, in the search and at the setting it finds
LEVELS = tuple(0.05 * 2**i for i in range(9))  # noise levels at which answers are compared


@dataclass(frozen=True)
class Row:
    """One way to guide, and the settings among which the best is searched."""

    row: str
    way: str = "guidance"  # or "nothing"; "prior": plug-and-play; "told": classifier-free guidance; "autoguidance"; or a
    #                        training-free method
    training: Training = Training()
    variant: str = ""      # a change of the guider, a key of VARIANTS
    settings: dict = field(default_factory=dict)   # what is not searched: of a training-free method or PriorConfig; "told",
    #                                                "good", "bad", "level" of a clean-up
    points: tuple[dict, ...] = ({},)               # of a Term; weight, low and high of "told" and "autoguidance"; rho and mu
    steps: int = 0                                 # of the sampler; 0: the table's, which experts learn from in any case
    scenes_from: int = MEASURED                    # the first scene that is measured: others show the spread


@dataclass(frozen=True)
class Table:
    """A table of the benchmark; everything that a result depends on, besides the weights of the world."""

    title: str
    task: str
    rows: tuple[Row, ...]
    images: int = 5000      # of a row at its best setting
    search: int = 256       # images for each point of the grid, for other scenes
    steps: int = 16         # Euler steps
    schedule: str = "karras"  # of their noise levels, or "ddim"
    scenes: int = 20_000    # real scenes that Frechet distances are taken to
    label: int | None = None  # the class of all scenes; None: each has its own
    reference: str = ""     # the row that answers are compared with, noise level by noise level
    choose: str = "score"   # the measure by which the best setting is chosen, or "frechet"


class Pair(NamedTuple):
    """The models of autoguidance; the good one is the world's own where none is given."""

    good: Model | None
    bad: Model


def read_table(name: str) -> Table:
    """A table by its name. ValueError for any other."""
    names = sorted(file.stem for file in TABLES.glob("*.json"))
    if name not in names:
        raise ValueError(f"there is no table '{name}': expected one of {', '.join(names)}")
    about = read_json(TABLES / f"{name}.json")
    points = about.pop("points")  # of rows that bring none of their own

    def row(given: dict) -> Row:
        own = given.get("points", points if given.get("way", "guidance") == "guidance" else [{}])
        return Row(**{**given, "training": Training(**given.get("training", {})), "points": tuple(own)})
    return Table(**{**about, "rows": tuple(map(row, about["rows"]))})


def bench(table: Table, folder: Path, report: Report, only: Sequence[str] = ()) -> list[dict]:
    """The rows, all or some; what the folder holds already is not done again, each point of a search for itself.

    ValueError for a row that the table does not have.
    """
    if unknown := {*only} - {row.row for row in table.rows}:
        names = "; ".join(row.row for row in table.rows)
        raise ValueError(f"the table has no row '{min(unknown)}': expected some of {names}")
    world, folder = load_world(table.task), Path(folder)
    real = reference(world.class_judge, table.scenes, SIZE, world.device, label=table.label)
    rows = []
    for row in table.rows:
        if not only or row.row in only:
            rows.append(run_row(world, table, row, real, folder, lambda line, row=row: report(f"{row.row}: {line}")))
    return rows if only or not table.reference else with_agreement(world, table, rows, folder, report)


def run_row(world: TinyWorld, table: Table, row: Row, real: Reference, folder: Path, report: Report) -> dict:
    """One row: the search, and what is measured at the setting it finds."""
    of_row = {"task": table.task, "steps": table.steps, "scenes": table.scenes, "way": row.way, "variant": row.variant,
              "settings": row.settings, "training": changes(row.training),
              **({} if table.label is None else {"label": table.label}), **({"own_steps": row.steps} if row.steps else {}),
              **({} if table.schedule == "karras" else {"schedule": table.schedule})}

    @cache
    def guider() -> tuple[Guider | Pair, dict]:
        if row.way == "autoguidance":
            of = partial(bad_version, told=row.settings["told"], folder=folder / "siblings", device=world.device)
            good = of(row.settings["good"]) if "good" in row.settings else None
            return Pair(good, of(row.settings["bad"])), dict.fromkeys(COSTS, 0)
        plain, cost = make_guider(world, row.training, table.steps, folder, report)
        return ABLATIONS[row.variant](plain) if row.variant else plain, cost

    def sample(setting: dict) -> Callable[[Sequence[int], Scenes], Tensor]:
        return sampler(world, row, guider()[0], setting, row.steps or table.steps, table.schedule)

    def point(setting: dict, first: int, images: int) -> dict:
        def measure() -> dict:
            found = judge_all(sample(setting), range(first, first + images), world.judges, world.guider, real, world.device,
                              label=table.label)
            report(f"{setting} {found.score:.3f}, Frechet {found.frechet:.1f}, {images} images")
            return {"setting": setting, **asdict(found)}
        return kept(folder / "measured" / f"{config_hash(of_row | setting | {'first': first, 'images': images})}.json", measure)

    searched = [point(setting, SEARCHED, table.search) for setting in row.points] if len(row.points) > 1 else []
    sign = -1 if table.choose == "frechet" or table.task in LESS_IS_BETTER else 1
    best = max(searched, key=lambda found: sign * found[table.choose])["setting"] if searched else row.points[0]
    costs = kept(folder / "costs" / f"{config_hash(of_row | best)}.json",
                 lambda: guider()[1] | cost_of(world, sample(best), table.steps))
    return {"row": row.row, "way": row.way, "training": changes(row.training), **costs,
            **point(best, row.scenes_from, table.images), "searched": searched}


def with_agreement(world: TinyWorld, table: Table, rows: list[dict], folder: Path, report: Report) -> list[dict]:
    """The rows, and for guiders how far they are from the table's reference."""
    wanted = next(each for each in table.rows if each.row == table.reference).training
    best, _ = make_guider(world, wanted, table.steps, folder, report)
    for row, found in zip(table.rows, rows, strict=True):
        if row.way == "guidance" and not row.variant:
            name = config_hash({"task": table.task, "steps": table.steps, "of": changes(row.training), "with": changes(wanted)})
            guider, _ = make_guider(world, row.training, table.steps, folder, report)
            found["agreement"] = kept(folder / "agreement" / f"{name}.json", partial(agreement, world, guider, best))
    return rows


def kept(file: Path, make: Callable[[], dict]) -> dict:
    """What a file holds, made and written if it is not there."""
    if not file.exists():
        write_json(file, make())
    return read_json(file)


def sampler(world: TinyWorld, row: Row, guider: Guider | Pair, setting: dict, steps: int,
            schedule: str = "karras") -> Callable[[Sequence[int], Scenes], Tensor]:
    """How a row makes images for scenes: (their numbers, the scenes) -> (B, 3, 32, 32)."""
    def sample(numbers: Sequence[int], scenes: Scenes) -> Tensor:
        seeds = [NOISE + number for number in numbers]
        x, sigmas = world.start(seeds, steps, schedule)
        if row.way == "nothing":
            return sample_euler(world.denoise, x, sigmas)
        if row.way == "told":
            given = condition(scenes.label)
            of_class, of_any = told(world, given), told(world, torch.zeros_like(given))
            return sample_euler(autoguided(of_class, of_any, interval(**setting)), x, sigmas)
        if row.way == "autoguidance":
            given = [condition(scenes.label)] if row.settings["told"] else []
            good = in_bfloat16(world, guider.good) if guider.good else told(world, *given) if given else world.denoise
            return sample_euler(autoguided(good, in_bfloat16(world, guider.bad, *given), interval(**setting)), x, sigmas)
        aimed = guider.aim(truth(scenes, guider.task))
        if row.way == "prior":
            objective = PriorObjective(world.denoise, [term_of(aimed, **setting)])
            return optimize_images(objective, torch.zeros_like(x), prior_config(**row.settings), seeds)[0]
        if row.way in METHODS:
            method = replace(METHODS[row.way], **row.settings, **setting)
            return sample_training_free(world.denoise, aimed, x, sigmas, method, seeds)
        return sample_euler(guided(world.denoise, [term_of(aimed, **setting)]), x, sigmas)
    return sample


def told(world: TinyWorld, given: Tensor) -> Denoiser:
    """The denoiser's sibling that knows the class. Guided away from itself without the class by `autoguided`, it makes
    classifier-free guidance (Ho & Salimans 2022)."""
    return in_bfloat16(world, conditional_denoiser(world.device), given)


def in_bfloat16(world: TinyWorld, model: Model, *given: Tensor) -> Denoiser:
    """A model with what it is told, in the precision of the world's own."""
    return lambda x, sigma: replace(world, denoiser=model).denoise(x, sigma, *given)


def term_of(guider: Guider, weight: float = 1.0, balanced: bool = False, through: bool = False) -> Term:
    """The term of a point of a table, under the names that tables and results use."""
    return Term(guider, weight, normalized=balanced, backprop_through_model=through)


def prior_config(steps: int = 300, jacobian: bool = False, level: float = 0.0) -> PriorConfig:
    """The search of a row's settings, under the names that tables and results use; level: of the renoising."""
    return PriorConfig(steps, backprop_through_model=jacobian, renoise_sigma=level)


def interval(weight: float, low: float = 0.0, high: float = math.inf) -> Autoguidance:
    """Weight 1: the good model only."""
    return Autoguidance(weight, Schedule(NoiseInterval(low, high)))


@cache
def conditional_denoiser(device: torch.device) -> nn.Module:
    """Read once."""
    return load_conditional_denoiser().to(device)


def cost_of(world: TinyWorld, sample: Callable[[Sequence[int], Scenes], Tensor], steps: int, count: int = 32,
            repeats: int = 3) -> dict:
    """Passes of the denoiser for each image, and seconds over those of plain sampling, in turn."""
    numbers, scenes = range(count), draw(range(count)).to(world.device)
    with_way_back: list[bool] = []

    def count_call(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, TinyDenoiser):
            with_way_back.append(inputs[0].requires_grad)

    hook = nn.modules.module.register_module_forward_pre_hook(count_call)
    try:
        sample(numbers, scenes)
    finally:
        hook.remove()
    ratio = ratio_in_turn(lambda: sample(numbers, scenes), lambda: world.sample(numbers, steps), repeats)
    return {"forwards": len(with_way_back), "backwards": sum(with_way_back), "time_ratio": ratio}


@torch.no_grad()
def agreement(world: TinyWorld, guider: Guider, wanted: Guider, scenes: int = 256) -> dict:
    """Mean distance of a guider's answers from those of a network that was trained on noise, by noise level."""
    image, found = draw(range(scenes)).image.to(world.device), {}
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(world.device)
    for level in LEVELS:
        sigma = image.new_full((scenes,), level)
        x = image + expand(sigma, image) * noise
        answer, best = (each.predict(to_vp(x, sigma) if each.view == "noisy" else world.denoise(x, sigma), sigma)
                        for each in (guider, wanted))
        found[f"{level:g}"] = float(TASKS[guider.task].distance(answer, best).mean())
    return found


COLUMNS = {"second_score": "by the second judge", "own_score": "by the guider", "frechet": "Fréchet",
           "precision": "precision", "recall": "recall", "energy": "energy", "time_ratio": "time, times plain",
           "forwards": "forward passes", "backwards": "backward passes", "trainable_share": "trained share",
           "training_images": "training images", "training_minutes": "training minutes"}


def markdown(table: Table, rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = [f"| {table.title} | {MEASURES[table.task]} | " + " | ".join(COLUMNS.values()) + " | setting |",
             "|---|" + "---:|" * (len(COLUMNS) + 1) + "---|"]
    for found in rows:
        numbers = [f"{found['score']:.3f}", *(f"{found[key]:.3g}" for key in COLUMNS)]
        setting = ", ".join(f"{name} {value:g}" for name, value in found["setting"].items())
        lines.append(f"| {found['row']} | " + " | ".join(numbers) + f" | {setting} |")
    return "\n".join(lines) + "\n"


def write_table(table: Table, rows: list[dict], path: Path) -> None:
    """The rows as JSON, as a Markdown table and as a plot, and a plot of agreements where guiders were compared."""
    write_json(path.with_suffix(".json"), {"table": json.loads(json.dumps(asdict(table))), "rows": rows})
    write_bytes(path.with_suffix(".md"), markdown(table, rows).encode())
    size, best = (640, 1240), {found["row"]: [(found["frechet"], found["score"])] for found in rows}
    save_picture(line_plot(best, table.title, "Frechet distance, less is better", MEASURES[table.task], log_x=True,
                           size=size), path.with_suffix(".png"))
    agreements = {json.dumps(found["training"]): (found["row"], [*found["agreement"].items()])
                  for found in reversed(rows) if "agreement" in found and found["row"] != table.reference}
    if agreements:  # one line for all rows of the same guider
        lines = {name: [(float(level), off) for level, off in line] for name, line in reversed(agreements.values())}
        save_picture(line_plot(lines, f"{table.title}: distance from the answers of '{table.reference}'",
                               "noise level sigma", "less is better", log_x=True, size=size),
                     path.with_name(f"{path.stem}_agreement.png"))
