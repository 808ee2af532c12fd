"""The benchmark on the latent tiny world: what guiders should look at, and depth and segmentation guidance against the
exact scene, with and without experts, beside class conditioning and a ControlNet."""
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ppap_core.experts.bank import ExpertBank, LoraSpec, base_network, with_experts
from ppap_core.experts.distill import DistillConfig, distill
from ppap_core.experts.samples import SampleStore, Trajectories, TrajectoryRecorder
from ppap_core.guidance.shift import GuidanceSettings, guided
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import Guider
from ppap_core.io.files import ensure_manifest, read_json, write_json
from ppap_core.rng import seeded_noise
from ppap_core.sampling import Denoiser
from ppap_core.schedules import ExpertSchedule
from ppap_core.tinyworld.latents import CHANNELS, SIZE, SPACE, depth_hint, scale_hint
from ppap_core.tinyworld.loaders import LABELS, condition
from ppap_core.tinyworld.scenes import Scenes, draw, truth

from .costs import ratio_in_turn
from .evaluation import Reference, features, reference, score
from .latent_world import GRID, LatentWorld, flow_sigmas
from .metrics import FeatureStats, frechet_distance

Report = Callable[[str], None]
MIDDLE = 0.3  # the weight of ways that are too slow for several


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
    weights: tuple[float, ...] = (0.1, MIDDLE, 0.6)  # of balanced terms
    raw: tuple[float, ...] = (4.0, 32.0, 256.0)   # of raw ones
    scenes: int = 2048  # real scenes that Frechet distances are taken to
    repeats: int = 9    # timings of a step


def latent_store(world: LatentWorld, folder: Path, config: LatentBench, report: Report) -> SampleStore:
    """Unconditional images and their trajectories, to distil from."""
    store = SampleStore(folder, {"model": "tinyworld_flow", "sampler": "euler", "steps": config.steps, "seed": 70_000_000})

    def generate(seeds: list[int]) -> tuple[Tensor, Trajectories]:
        recorder = TrajectoryRecorder()
        latents = world.sample(seeds, flow_sigmas(config.steps), recorder.wrap(world.denoise))
        return torch.cat([world.decode(part) for part in latents.split(16)]), recorder.trajectories(seeds)
    store.fill(config.store, generate, lambda have, _: report(f"samples: {have} of {config.store}"))
    return store


def experts(world: LatentWorld, task: str, view: str, config: LatentBench, folder: Path, report: Report) -> Guider:
    """Experts of one task and view, each with its stem, distilled on the world's own latents."""
    store = latent_store(world, folder / "samples", config, report)
    guider = world.guiders[task]
    bank = ExpertBank(base_network(guider), ExpertSchedule(config.edges), LoraSpec(config.rank, config.rank), view,
                      space=SPACE).to(world.device)

    def on_step(index: int, step: int, loss: float) -> None:
        if (step + 1) % 100 == 0:
            report(f"experts of {task}, {view} view: {index + 1} of {len(bank.schedule)}, step {step + 1}, loss {loss:.4f}")
    distill(guider, bank, store, config.training, folder / f"experts_{task}_{view}", on_step)
    return with_experts(guider, bank)


@dataclass(frozen=True)
class Way:
    """One way to meet a scene: what guides, if anything, and what the model is told."""

    guider: Guider | None = None
    told_class: bool = False
    controlled: bool = False
    balanced: bool = True
    slow: bool = False     # measured at one weight, on one batch of images


def measure(world: LatentWorld, task: str, way: Way, weight: float, config: LatentBench, real: Reference) -> dict:
    """Images for scenes that nothing was trained on, one for each."""
    found, stats, judge = [], FeatureStats(real.features.shape[1]), world.judges[task]
    for start in range(0, config.batch if way.slow else config.images, config.batch):
        seeds = range(1000 + start, 1000 + min(start + config.batch, config.images))
        scenes = draw(seeds, SIZE // 4).to(world.device)
        images = world.decode(world.sample(seeds, flow_sigmas(config.steps), denoiser(world, way, scenes, weight, seeds)))
        found.append(score(judge, images, scenes))
        stats.update(features(real.judge, images))
    return {"score": float(torch.cat(found).mean()), "frechet": frechet_distance(stats, real.stats)}


def denoiser(world: LatentWorld, way: Way, scenes: Scenes, weight: float, seeds: Sequence[int]) -> Denoiser:
    """The model on its way to these scenes."""
    given = condition(scenes.label) if way.told_class else None
    hint = encoded_depth(world, seeds) if way.controlled else None
    denoise = partial(world.denoise, given=given, hint=hint)
    if way.guider is None:
        return denoise
    term = Term(way.guider.aim(truth(scenes, way.guider.task)), weight, normalized=way.balanced)
    return guided(denoise, [term], GuidanceSettings(sigma_data=1.0))


def weights_of(way: Way, config: LatentBench) -> tuple[float, ...]:
    """Those that a way is measured at."""
    if way.guider is None:
        return (0.0,)
    if way.slow:
        return (MIDDLE,)
    return config.weights if way.balanced else config.raw


def step_ratio(world: LatentWorld, way: Way, repeats: int) -> float:
    """Seconds of a step of eight images over seconds of a plain one."""
    seeds = range(8)
    scenes = draw(seeds, SIZE // 4).to(world.device)
    x = seeded_noise(seeds, (CHANNELS, GRID, GRID)).to(world.device)
    step = denoiser(world, way, scenes, MIDDLE, seeds)
    return ratio_in_turn(lambda: step(x, x.new_ones(len(x))), lambda: world.denoise(x, x.new_ones(len(x))), repeats)


@torch.no_grad()
def encoded_depth(world: LatentWorld, seeds: range) -> Tensor:
    """The exact depth of scenes as the ControlNet is given it."""
    return scale_hint(world.autoencoder.encode(depth_hint(draw(seeds, SIZE).depth.to(world.device))))


def ways(world: LatentWorld, task: str, distilled: Callable[[str], Guider]) -> dict[str, Callable[[], Way]]:
    """All rows of a task; experts are made when their row comes."""
    plain = world.guiders[task]
    found = {
        "no guidance": Way,
        "plain, noisy view, colours": lambda: Way(replace(plain, view="noisy", decode=SPACE.colors)),
        "plain, denoised view, colours": lambda: Way(replace(plain, decode=SPACE.colors)),
        "plain, denoised view, colours, raw": lambda: Way(replace(plain, decode=SPACE.colors), balanced=False),
        "plain, denoised view, decoder": lambda: Way(replace(plain, decode=world.decoder), slow=True),
        "experts, noisy view, stem": lambda: Way(distilled("noisy")),
        "experts, denoised view, stem": lambda: Way(distilled("denoised")),
        "told the class": lambda: Way(told_class=True)}
    if task != "class":
        found |= {"told the class, and experts": lambda: Way(distilled("denoised"), told_class=True),
                  "ControlNet of depth": lambda: Way(controlled=True),
                  "ControlNet of depth, and experts": lambda: Way(distilled("denoised"), controlled=True)}
    return found


def latent_bench(config: LatentBench, folder: Path, report: Report) -> list[dict]:
    """All tasks, all rows, each at all weights; what the folder holds already is not done again."""
    ensure_manifest(folder, asdict(config))
    world, folder, rows = LatentWorld(), Path(folder), []
    real = reference(world.judges["class"], config.scenes, SIZE // 4, world.device)
    for task in LABELS:
        def distilled(view: str, task=task) -> Guider:
            return experts(world, task, view, config, folder, report)
        for number, (name, make) in enumerate(ways(world, task, distilled).items()):
            file = folder / f"{task}_{number}.json"
            if not file.exists():
                way = make()
                weights = weights_of(way, config)
                found = {f"{weight:g}": measure(world, task, way, weight, config, real) for weight in weights}
                report(f"{task}, {name}: {found}")
                write_json(file, {"task": task, "row": name, "by_weight": found,
                                  "step_ratio": step_ratio(world, way, config.repeats)})
            rows.append(read_json(file))
    return rows


MEASURES = {"class": "right by the judge", "depth": "depth error", "segmentation": "mean IoU"}


def table(rows: list[dict]) -> str:
    """One Markdown table for each task; each cell is weight: score / Fréchet distance."""
    lines = []
    for task, measure_name in MEASURES.items():
        mine = [row for row in rows if row["task"] == task]
        width = max(len(row["by_weight"]) for row in mine)
        lines += [f"| {task}: {measure_name} / Fréchet distance |" + " by weight |" * width + " times a plain step |",
                  "|---|" + "---:|" * (width + 1)]
        for row in mine:
            cells = [f"{weight}: {each['score']:.3f} / {each['frechet']:.0f}" for weight, each in row["by_weight"].items()]
            cells += [""] * (width - len(cells)) + [f"{row['step_ratio']:.2f}"]
            lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)
