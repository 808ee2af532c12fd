"""Guidance at 4, 8 and 16 steps: the flow of the latent tiny world, and its student that is made for few steps."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppap_core import (
    Denoiser,
    Guider,
    LoraSpec,
    SampleStore,
    Term,
    Trajectories,
    TrajectoryRecorder,
    base_network,
    guided,
    sample_euler,
)
from ppap_core.experts.bank import ExpertBank
from ppap_core.guiders.guider import clean
from ppap_core.noise import expand
from ppap_core.rng import seeded_noise
from ppap_core.tinyworld.latents import CHANNELS, SIZE, SPACE, load_autoencoder, load_flow, unscale_latent
from ppap_core.tinyworld.loaders import CONDITIONS, load_guider
from ppap_core.tinyworld.networks.autoencoder import TinyAutoencoder
from ppap_core.tinyworld.networks.flow import TinyFlow
from ppap_core.tinyworld.scenes import Scenes, draw

from .distillations import Distillation
from .evaluation import Evaluator, Sampler, reference
from .latent_world import GRID
from .networks import load_held_out_judge, load_judge
from .report import Column, Report, markdown
from .report import Row as Result
from .runs import run_rows
from .tables import Row, Table
from .tiny_world import generate_store
from .training import Plain, Training, Workspace
from .turbo import load_turbo, shifted
from .world import World

NETWORKS: dict[str, Callable[[], TinyFlow]] = {"flow": load_flow, "turbo": load_turbo}
FIRST_TIME = 0.999  # of a sampling: 1 is pure noise, of no finite noise level here
EDGES = (0.1, 0.6, 1.7, 5.2, 13.7, 1000.0)  # between the noise levels of few steps


def few_sigmas(steps: int) -> Tensor:
    """Noise levels of a flow's even times, shifted, descending to 0, (steps + 1,), as stock schedulers give them."""
    t = shifted(torch.linspace(1, 0, steps + 1)).clamp_max(FIRST_TIME)
    return t / (1 - t)


@dataclass(frozen=True)
class FewStepWorld:
    """A flow of latents and the guider of classes, which sees latents through their linear colours."""

    denoiser: TinyFlow
    guider: Guider
    autoencoder: TinyAutoencoder
    name: str
    subject: str = "class"
    device: torch.device = torch.device("cpu")
    store_seed: ClassVar[int] = 60_000_000
    sigma_data: ClassVar[float] = 1.0

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Predict latents without a class in bfloat16; differentiable where x requires a gradient."""
        t, given = sigma / (1 + sigma), x.new_zeros(len(x), CONDITIONS)
        state = (1 - expand(t, x)) * x
        with torch.set_grad_enabled(x.requires_grad), torch.autocast(self.device.type, torch.bfloat16):
            velocity = self.denoiser(state, t, given[:, None], given)
        return state - expand(t, x) * velocity.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, 8h, 8w) in [-1, 1]."""
        with torch.autocast(self.device.type, torch.bfloat16):
            parts = [self.autoencoder.decode(unscale_latent(part)).float() for part in latents.split(16)]
        return torch.cat(parts).clamp(-1, 1)

    @torch.no_grad()
    def plain_output(self, images: Tensor) -> Tensor:
        """Output of the plain guider on images (B, 3, H, W)."""
        return self.guider.predict(images, clean(images))

    def start(self, seeds: Sequence[int], steps: int, schedule: str = "karras") -> tuple[Tensor, Tensor]:
        """Noise of the given seeds at the first noise level, (len(seeds), 16, 16, 16), and all levels, (steps + 1,).

        schedule: without effect; flows have one of their own.
        """
        sigmas = few_sigmas(steps)
        return seeded_noise(seeds, (CHANNELS, GRID, GRID)) * sigmas[0], sigmas

    def sample(self, seeds: Sequence[int], steps: int, terms: Sequence[Term] = ()) -> Tensor:
        """Latents of the given seeds after Euler steps."""
        return self._sample(self.denoise, seeds, steps, terms)

    def sample_recorded(self, seeds: Sequence[int], steps: int, terms: Sequence[Term] = ()) -> tuple[Tensor, Trajectories]:
        """Images of the given seeds and the trajectories of their latents, for a `SampleStore`."""
        recorder = TrajectoryRecorder()
        latents = self._sample(recorder.wrap(self.denoise), seeds, steps, terms)
        return self.decode(latents), recorder.trajectories(seeds)

    def _sample(self, denoise: Denoiser, seeds: Sequence[int], steps: int, terms: Sequence[Term]) -> Tensor:
        return sample_euler(guided(denoise, terms), *self.start(seeds, steps))

    def wanted(self, numbers: Sequence[int], label: int | None = None) -> Scenes:
        """The scenes of these numbers. label: the class of all of them; None: each has its own."""
        return draw(numbers, label=label)

    def aimed(self, guider: Guider, wanted: Scenes) -> Guider:
        """A guider of this world, plain or with experts, aimed at the classes of scenes."""
        return guider.aim(wanted.label)

    def evaluator(self, scenes: int) -> "DecodedEvaluator":
        """Judges of this world, with so many real scenes for Frechet distances."""
        judges = load_judge("class"), load_held_out_judge("class")
        real = reference(judges[0], scenes, SIZE // 4, self.device)
        return DecodedEvaluator(judges, load_guider("class"), real, self.device, decode=self.decode)


@dataclass(frozen=True)
class DecodedEvaluator(Evaluator):
    """Judges the images of sampled latents."""

    decode: Callable[[Tensor], Tensor] = torch.nn.Identity()

    def _judge(self, sample: Sampler, numbers: range) -> tuple[Tensor, Tensor]:
        return super()._judge(partial(self._images, sample), numbers)

    def _images(self, sample: Sampler, numbers: Sequence[int], scenes: Scenes) -> Tensor:
        return self.decode(sample(numbers, scenes))


def load_few_step_world(name: str) -> FewStepWorld:
    """The world of one of NETWORKS, on the CPU."""
    guider = replace(load_guider("class"), decode=SPACE.colors)
    return FewStepWorld(NETWORKS[name](), guider, load_autoencoder(), f"tinyworld_{name}")


@dataclass(frozen=True)
class LatentDistillation(Distillation):
    """The core's distillation on latents, each expert with its stem, from images of `own_steps` steps."""

    marks: ClassVar[dict[str, Any]] = {"latents": True}
    edges: tuple[float, ...] = EDGES
    rank: int = 8
    steps: int = 300
    batch: int = 32
    images: int = 768
    own_steps: int = 8

    def network_for(self, world: World) -> ExpertBank:
        return ExpertBank(base_network(world.guider), self.schedule, LoraSpec(self.rank, self.rank, self.targets), self.view,
                           space=SPACE)

    def store(self, workspace: Workspace) -> SampleStore:
        folder = workspace.folder / f"samples_{workspace.world.name}_{self.own_steps}"
        return generate_store(workspace.world, folder, self.images, self.own_steps, workspace.report)


@dataclass(frozen=True)
class FewStepBench:
    """Everything that a result depends on, besides the weights of the world."""

    images: int = 192
    scenes: int = 2048  # real scenes for Frechet distances
    counts: tuple[int, ...] = (4, 8, 16)  # of steps
    looks: int = 16     # of the guider at each image, with sub-steps: in so many steps it has none
    prediction: dict[str, Any] = field(default_factory=lambda: {"weight": 0.7, "balanced": True})
    through: dict[str, Any] = field(default_factory=lambda: {"weight": 0.3, "balanced": True, "through": True})
    experts: Training = LatentDistillation()
    own: LatentDistillation = LatentDistillation(own_steps=4)  # experts of images in so many steps, measured in as many


def rows(bench: FewStepBench, steps: int) -> list[Row]:
    """Every way to guide in so many steps."""
    guided_rows = [Row(f"{name}, {place}", training=training, points=(setting,), steps=steps)
                   for place, setting in (("in the prediction", bench.prediction), ("through the model", bench.through))
                   for name, training in (("plain", Plain()), ("experts", bench.experts))]
    parts = bench.looks // steps
    more = [replace(row, name=f"{row.name}, sub-steps", points=({**row.points[0], "substeps": parts},))
            for row in guided_rows] if parts > 1 else []
    own = [replace(row, name=f"of {steps}-step images: {row.name}", training=bench.own)
           for row in more if row.training == bench.experts and steps == bench.own.own_steps]
    return [Row("unguided", "nothing", steps=steps), *guided_rows, *more, *own]


def few_step_bench(bench: FewStepBench, folder: Path, report: Report, only: Sequence[str] = ()) -> list[Result]:
    """Results of both models at every number of steps; finished parts are read from the folder.

    only: the rows to run, such as "flow, 4 steps: unguided"; (): all. ValueError for a name that no row has.
    """
    wanted = [(name, steps, row) for name in NETWORKS for steps in bench.counts for row in rows(bench, steps)
              if not only or title(name, steps, row) in only]
    if unknown := {*only} - {title(*each) for each in wanted}:
        raise ValueError(f"there is no row '{min(unknown)}': expected some such as '{title('flow', 4, rows(bench, 4)[0])}'")
    return [result for name in NETWORKS if (mine := [each for each in wanted if each[0] == name])
            for result in _run(bench, name, [row for *_, row in mine], folder / name, report)]


def title(model: str, steps: int, row: Row) -> str:
    """A name of a row among those of all models and numbers of steps."""
    return f"{model}, {steps} steps: {row.name}"


def _run(bench: FewStepBench, name: str, wanted: Sequence[Row], folder: Path, report: Report) -> list[Result]:
    world = load_few_step_world(name)
    workspace = Workspace(world, folder, bench.looks, lambda line: report(f"{name}, {line}"))
    table = Table("few steps", "class", tuple(wanted), bench.images, 0, bench.looks, scenes=bench.scenes, cost_images=2)
    results = run_rows(table, world.evaluator(bench.scenes), workspace)
    return [{"model": name, "steps": row.steps, **result} for row, result in zip(wanted, results, strict=True)]


def table(results: Sequence[Result]) -> str:
    """A Markdown table whose cells are the share of right classes and the Frechet distance, by the number of steps."""
    cells = {(result["model"], result["row"], result["steps"]): f"{result['score']:.0%} / {result['frechet']:.0f}"
             for result in results}
    counts = sorted({count for *_, count in cells})
    columns = [Column("model", "{model}", numeric=False), Column("right class / Fréchet distance", "{row}", numeric=False),
               *(Column(f"{count} steps", f"{{at_{count}}}") for count in counts)]
    return markdown(columns, [{"model": model, "row": row} | {f"at_{count}": cells.get((model, row, count), "")
                                                              for count in counts}
                              for model, row in dict.fromkeys((model, row) for model, row, _ in cells)])
