"""The pixel world as one value: the model that the demo and the benchmark sample, guide and judge."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ppap_core import (
    Denoiser,
    Guider,
    SampleStore,
    Term,
    Trajectories,
    TrajectoryRecorder,
    base_network,
    guided,
    karras_sigmas,
    sample_euler,
)
from ppap_core.guiders.guider import clean
from ppap_core.noise import PIXEL_SIGMA_DATA
from ppap_core.rng import seeded_noise
from ppap_core.tinyworld.loaders import SIGMA_MAX, SIGMA_MIN, SIZE, load_denoiser, load_guider
from ppap_core.tinyworld.scenes import Scenes, draw, truth

from .evaluation import Evaluator, reference
from .networks import load_held_out_judge, load_judge
from .ppap_reference import ddim_sigmas
from .report import Report
from .world import World

SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "karras": partial(karras_sigmas, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX), "ddim": ddim_sigmas}
NOISE = 200_000_000  # the noise for scene n has the seed n + this: one generator must not draw both


@dataclass(frozen=True)
class TinyWorld:
    """A denoiser, the guider of one task and the judges that never guide, on one device."""

    denoiser: Callable[..., Tensor]
    guider: Guider
    judges: tuple[Guider, Guider]  # the second is held out: nothing is chosen by it
    class_judge: Guider            # for features of images, whatever the task
    device: torch.device
    name: ClassVar[str] = "tinyworld"
    store_seed: ClassVar[int] = 50_000_000
    sigma_data: ClassVar[float] = PIXEL_SIGMA_DATA

    @property
    def subject(self) -> str:
        """The task of the guider."""
        return self.guider.task

    def denoise(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        """Predict clean images in bfloat16, which is precise enough here; differentiable where x requires a gradient.

        condition: (B, CONDITIONS) for a conditional denoiser, else nothing.
        """
        with torch.set_grad_enabled(x.requires_grad), torch.autocast(self.device.type, torch.bfloat16):
            return self.denoiser(x, sigma, *condition)

    def with_model(self, denoiser: Callable[..., Tensor]) -> "TinyWorld":
        """This world with another denoiser."""
        return replace(self, denoiser=denoiser)

    @torch.no_grad()
    def plain_output(self, images: Tensor) -> Tensor:
        """Output of the plain guider on clean images (B, 3, H, W)."""
        return self.guider.predict(images, clean(images))

    def start(self, seeds: Sequence[int], steps: int, schedule: str = "karras") -> tuple[Tensor, Tensor]:
        """Noise of the given seeds at the first noise level, (len(seeds), 3, 32, 32), and all levels, (steps + 1,)."""
        sigmas = SCHEDULES[schedule](steps)
        return seeded_noise(seeds, (3, SIZE, SIZE)).to(self.device) * sigmas[0], sigmas

    def sample(self, seeds: Sequence[int], steps: int, terms: Sequence[Term] = ()) -> Tensor:
        """Images of the given seeds after Euler steps, (len(seeds), 3, 32, 32)."""
        return self._sample(self.denoise, seeds, steps, terms)

    def sample_recorded(self, seeds: Sequence[int], steps: int, terms: Sequence[Term] = ()) -> tuple[Tensor, Trajectories]:
        """Images as `sample` makes them, and their trajectories, for a `SampleStore`."""
        recorder = TrajectoryRecorder()
        images = self._sample(recorder.wrap(self.denoise), seeds, steps, terms)
        return images, recorder.trajectories(seeds)

    def _sample(self, denoise: Denoiser, seeds: Sequence[int], steps: int, terms: Sequence[Term]) -> Tensor:
        return sample_euler(guided(denoise, terms), *self.start(seeds, steps))

    def wanted(self, numbers: Sequence[int], label: int | None = None) -> Scenes:
        """The scenes of these numbers. label: the class of all of them; None: each has its own."""
        return draw(numbers, label=label).to(self.device)

    def aimed(self, guider: Guider, wanted: Scenes) -> Guider:
        """A guider of this world, aimed at scenes."""
        return guider.aim(truth(wanted, guider.task))

    def evaluator(self, scenes: int, label: int | None = None) -> Evaluator:
        """Judges of this world, with so many real scenes for Frechet distances; label: the class of all scenes, if one."""
        real = reference(self.class_judge, scenes, SIZE, self.device, label=label)
        return Evaluator(self.judges, self.guider, real, self.device, label)


def load_world(task: str = "class") -> TinyWorld:
    """The bundled world with the guider of one task, on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = TinyWorld(load_denoiser().to(device), load_guider(task), (load_judge(task), load_held_out_judge(task)),
                      load_judge("class"), device)
    for guider in (world.guider, *world.judges, world.class_judge):
        base_network(guider).to(device)
    return world


def generate_store(world: World, folder: Path, count: int, steps: int, report: Report,
                   weight: float = 0.0) -> SampleStore:
    """At least `count` images of the world's own model and their trajectories, for distillation.

    steps: of the sampler.
    weight: normalized weight of the plain guider, aimed at random scenes, in whose presence they are made; such images are
        kept in a folder of their own. 0: unguided.
    """
    manifest = {"model": world.name, "sampler": "euler", "steps": steps, "seed": world.store_seed}
    if weight:
        folder, manifest = folder.with_name(f"{folder.name}_guided_{weight:g}"), manifest | {"guided": weight}
    store = SampleStore(folder, manifest)
    store.fill(count, partial(_generate, world, steps, weight), lambda have, _: report(f"samples: {have} of {count}"))
    return store


def hold_out(world: World, store: SampleStore, count: int) -> None:
    """Generate at least `count` unguided images beside those of a store, on which to measure what experts learned."""
    store.hold_out().fill(count, partial(_generate, world, store.manifest["steps"], 0.0))


def _generate(world: World, steps: int, weight: float, seeds: Sequence[int]) -> tuple[Tensor, Trajectories]:
    if not weight:
        return world.sample_recorded(seeds, steps)
    aimed = world.aimed(world.guider, world.wanted([NOISE + seed for seed in seeds]))
    return world.sample_recorded(seeds, steps, [Term(aimed, weight, normalized=True)])
