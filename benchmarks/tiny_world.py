"""The tiny world as one value: what the demo and the benchmark sample, guide and judge with."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ppap_core.experts.bank import base_network
from ppap_core.experts.samples import SampleStore, Trajectories, TrajectoryRecorder
from ppap_core.guidance.shift import guided
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import Guider, clean
from ppap_core.rng import seeded_noise
from ppap_core.sampling import karras_sigmas, sample_euler
from ppap_core.tinyworld.loaders import SIGMA_MAX, SIGMA_MIN, SIZE, load_denoiser, load_guider
from ppap_core.tinyworld.scenes import draw, truth

from .networks import load_held_out_judge, load_judge
from .ppap_reference import ddim_sigmas

SCHEDULES = {"karras": partial(karras_sigmas, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX), "ddim": ddim_sigmas}
NOISE = 200_000_000  # the noise for a scene is that of its number + this: one generator must not draw both


@dataclass(frozen=True)
class TinyWorld:
    """A denoiser, the guider of one task and the judges that never guide, on one device."""

    denoiser: nn.Module
    guider: Guider
    judges: tuple[Guider, Guider]  # the second one chooses nothing
    class_judge: Guider            # for features of images, whatever the task
    device: torch.device

    def denoise(self, x: Tensor, sigma: Tensor, *given: Tensor) -> Tensor:
        """The denoiser, in the half precision that is enough for it; gradients pass where x asks for them."""
        with torch.set_grad_enabled(x.requires_grad), torch.autocast(self.device.type, torch.bfloat16):
            return self.denoiser(x, sigma, *given)

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """What the plain guider says of clean images."""
        return self.guider.predict(images, clean(images))

    def start(self, seeds: Sequence[int], steps: int, schedule: str = "karras") -> tuple[Tensor, Tensor]:
        """Pure noise of the given seeds (len(seeds), 3, 32, 32), and the noise levels of so many steps."""
        sigmas = SCHEDULES[schedule](steps)
        return seeded_noise(seeds, (3, SIZE, SIZE)).to(self.device) * sigmas[0], sigmas

    def sample(self, seeds: Sequence[int], steps: int, terms: Sequence[Term] = ()) -> Tensor:
        """Images of the given seeds after so many Euler steps, (len(seeds), 3, 32, 32)."""
        return sample_euler(guided(self.denoise, terms), *self.start(seeds, steps))

    def sample_recorded(self, seeds: Sequence[int], steps: int, terms: Sequence[Term] = ()) -> tuple[Tensor, Trajectories]:
        """Images and how they came about, for a store."""
        recorder = TrajectoryRecorder()
        images = sample_euler(guided(recorder.wrap(self.denoise), terms), *self.start(seeds, steps))
        return images, recorder.trajectories(seeds)


def load_world(task: str = "class") -> TinyWorld:
    """The bundled world, on a GPU when there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = TinyWorld(load_denoiser().to(device), load_guider(task), (load_judge(task), load_held_out_judge(task)),
                  load_judge("class"), device)
    for guider in (world.guider, *world.judges, world.class_judge):
        base_network(guider).to(device)
    return world


def generate_store(world: TinyWorld, folder: Path, count: int, steps: int, report: Callable[[str], None],
                   weight: float = 0.0) -> SampleStore:
    """At least `count` images of the world's own model, for distillation.

    weight: balanced, of the plain guider in the view of the prediction, aimed at other scenes; they are then kept in another
    folder.
    """
    recipe = {"model": "tinyworld", "sampler": "euler", "steps": steps, "seed": 50_000_000}
    if weight:
        folder, recipe = folder.with_name(f"{folder.name}_guided_{weight:g}"), recipe | {"guided": weight}

    def generate(seeds: Sequence[int]) -> tuple[Tensor, Trajectories]:
        if not weight:
            return world.sample_recorded(seeds, steps)
        scenes = draw([NOISE + seed for seed in seeds])
        aimed = world.guider.aim(truth(scenes, world.guider.task).to(world.device))
        return world.sample_recorded(seeds, steps, [Term(aimed, weight, normalized=True)])

    store = SampleStore(folder, recipe)
    store.fill(count, generate, lambda have, _: report(f"samples: {have} of {count}"))
    return store
