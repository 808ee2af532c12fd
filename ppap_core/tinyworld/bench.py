"""The benchmark on the tiny world: every way to guide by class, each at its own best weight, judged by a network that
never guides."""
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..costs import ratio_in_turn
from ..distill import DistillConfig, distill
from ..experts import ExpertBank, LoraSpec, base_network, with_experts
from ..files import claim, load_tensors, read_json, save_tensors, write_json
from ..guidance import Term, guided
from ..guider import Guider
from ..noise import ExpertSchedule, NoiseInterval, as_seen, expand
from ..sampling import seeded_noise
from ..tasks import cross_entropy
from . import SIZE
from .scenes import draw
from .world import World, generate_store, load_world, measure, scene_statistics

Report = Callable[[str], None]


@dataclass(frozen=True)
class BenchConfig:
    """Everything that a result depends on, besides the weights of the world."""

    search: int = 128           # images for each weight of the grid
    images: int = 512           # images of a row at its best weight, from other noise
    scenes: int = 4096          # real scenes that Frechet distances are taken to
    grid: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 64)
    steps: int = 24             # Euler steps
    store: int = 4096           # generated images to distil from
    edges: tuple[float, ...] = (0.05, 0.2, 0.5, 1.0, 2.0, 10.0)
    rank: int = 16
    noisy: DistillConfig = DistillConfig(steps=1000, batch=64, lr=2e-3)
    denoised: DistillConfig = DistillConfig(steps=400, batch=64, lr=2e-3)
    supervised: int = 1000      # steps of each network trained with labels
    repeats: int = 15           # timings of a step


QUICK = BenchConfig()
FULL = BenchConfig(search=512, images=5000, scenes=20_000, grid=(0.5, 1, 2, 4, 8, 16, 32, 64), steps=32, store=20_000,
                   noisy=DistillConfig(steps=5000, batch=64, lr=2e-3), denoised=DistillConfig(steps=2000, batch=64, lr=2e-3),
                   supervised=5000)


class Networks(nn.Module):
    """One whole network for each interval: what a bank avoids, here as the upper reference."""

    def __init__(self, nets: Sequence[nn.Module], schedule: ExpertSchedule):
        super().__init__()
        self.nets, self.schedule = nn.ModuleList(nets), schedule

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        return self.nets[self.schedule.index(float(sigma[0]))](image)


def distilled(world: World, name: str, edges: Sequence[float], view: str, config: DistillConfig, bench: BenchConfig,
              folder: Path, report: Report) -> Guider:
    """The world's guider with experts distilled on the world's own images."""
    store = generate_store(world, folder / "samples", bench.store, bench.steps, report)
    bank = ExpertBank(base_network(world.guider), ExpertSchedule(tuple(edges)), LoraSpec(bench.rank, bench.rank), view)

    def on_step(index: int, step: int, loss: float) -> None:
        if (step + 1) % 100 == 0:
            report(f"{name}: expert {index + 1} of {len(bank.schedule)}, step {step + 1} of {config.steps}, loss {loss:.4f}")

    distill(world.guider, bank.to(world.device), store, world.denoise, config, folder / name, on_step)
    return with_experts(world.guider, bank)


def supervised(world: World, bench: BenchConfig, folder: Path, report: Report) -> Guider:
    """Five whole networks, trained with labels on noisy scenes."""
    schedule, nets = ExpertSchedule(bench.edges), []
    for index in range(len(schedule)):
        file = folder / f"supervised_{index}.safetensors"
        net = deepcopy(base_network(world.guider))
        if not file.exists():
            report(f"supervised: network {index + 1} of {len(schedule)}, {bench.supervised} steps")
            fit_noisy(world, net, schedule[index], bench.supervised, first_seed=500_000_000 + index * 10_000_000)
            save_tensors(file, net.state_dict(), {"interval": index})
        net.load_state_dict(load_tensors(file)[0])
        nets.append(net)
    return replace(world.guider, net=Networks(nets, schedule), view="noisy")


def fit_noisy(world: World, net: nn.Module, interval: NoiseInterval, steps: int, first_seed: int, batch: int = 64) -> None:
    """Train all weights of a classifier on labelled noisy scenes of one interval."""
    optimizer = torch.optim.AdamW(net.requires_grad_(True).parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        scenes = draw(range(first_seed + step * batch, first_seed + (step + 1) * batch))
        generator = torch.Generator().manual_seed(first_seed + step)
        sigma = interval.sample(batch, generator)
        noisy = scenes.image + expand(sigma, scenes.image) * torch.randn(scenes.image.shape, generator=generator)
        seen = world.guider.preprocess(as_seen(noisy, sigma)).to(world.device)
        loss = cross_entropy(net(seen), scenes.label.to(world.device)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False)


def step_ratio(world: World, guider: Guider | None, repeats: int) -> float:
    """Seconds of a guided step of 32 images over seconds of a plain one."""
    if guider is None:
        return 1.0
    x = seeded_noise(range(32), (3, SIZE, SIZE)).to(world.device)
    sigma = x.new_full((len(x),), 0.7)
    step = guided(world.denoise, [Term(guider.aim(torch.tensor([0])))])
    return ratio_in_turn(lambda: step(x, sigma), lambda: world.denoise(x, sigma), repeats)


def row(world: World, name: str, guider: Guider | None, share: float, bench: BenchConfig, scenes, report: Report) -> dict:
    """Search the grid of weights by the judge's accuracy, then measure at the best one on other noise."""
    searched = {}
    for weight in bench.grid if guider else (0.0,):
        found = searched[weight] = measure(world, guider, weight, range(1000, 1000 + bench.search), bench.steps, scenes)
        report(f"{name}: weight {weight:g}, judge {found.judge_accuracy:.3f}, guider {found.guider_accuracy:.3f}, "
               f"Frechet {found.frechet:.2f}")
    best = max(searched, key=lambda weight: searched[weight].judge_accuracy)
    final = measure(world, guider, best, range(100_000, 100_000 + bench.images), bench.steps, scenes)
    return {"row": name, **asdict(final), "step_ratio": step_ratio(world, guider, bench.repeats), "trainable_share": share,
            "weight": best, "searched": {f"{weight:g}": asdict(found) for weight, found in searched.items()}}


def bench(config: BenchConfig, folder: Path, report: Report) -> list[dict]:
    """All rows; what the folder holds already is not done again."""
    claim(folder, asdict(config))
    world, folder = load_world("class"), Path(folder)
    scenes = scene_statistics(world, config.scenes)
    plain = world.guider
    five = len(config.edges) - 1

    def experts(name: str, edges: Sequence[float], view: str, training: DistillConfig) -> Guider:
        return distilled(world, name, edges, view, training, config, folder, report)

    rows: dict[str, Callable[[], Guider | None]] = {
        "unguided": lambda: None,
        "plain_noisy": lambda: replace(plain, view="noisy"),
        "plain_denoised": lambda: plain,
        "one_expert": lambda: experts("one_expert", (config.edges[0], config.edges[-1]), "noisy",
                                      replace(config.noisy, steps=five * config.noisy.steps)),
        "experts_noisy": lambda: experts("experts_noisy", config.edges, "noisy", config.noisy),
        "experts_denoised": lambda: experts("experts_denoised", config.edges, "denoised", config.denoised),
        "supervised": lambda: supervised(world, config, folder, report),
    }
    results = []
    for name, make in rows.items():
        file = folder / f"{name}.json"
        if not file.exists():
            guider = make()
            write_json(file, row(world, name, guider, trainable_share(guider), config, scenes, report))
        results.append(read_json(file))
    return results


def trainable_share(guider: Guider | None) -> float:
    """Trained weights of one expert over the weights of the plain network: 0 without training, 1 where all are trained."""
    net = guider.net if guider else None
    return net.trainable_share() if isinstance(net, ExpertBank) else float(isinstance(net, Networks))


COLUMNS = {"row": "row", "judge_accuracy": "accuracy by the judge", "guider_accuracy": "by the guider", "frechet": "Fréchet",
           "step_ratio": "guided / plain step", "trainable_share": "trainable share", "weight": "best weight"}


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    for found in rows:
        cells = [found[key] if isinstance(found[key], str) else f"{found[key]:.4g}" for key in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
