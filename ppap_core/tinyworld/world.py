"""The tiny world as one value: what the demo and the benchmark sample, guide and judge with."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..experts import base_network
from ..guidance import Term, guided
from ..guider import Guider, clean
from ..metrics import FeatureStats, frechet_distance
from ..samples import SampleStore
from ..sampling import karras_sigmas, sample_euler, seeded_noise
from . import SIGMA_MAX, SIGMA_MIN, SIZE, load_denoiser, load_guider, load_judge
from .scenes import CLASSES, draw

FEATURES = 128  # width of the judge's features


@dataclass(frozen=True)
class World:
    """A denoiser, the guider of one task and the judge that never guides, on one device."""

    denoiser: nn.Module
    guider: Guider
    judge: Guider
    device: torch.device

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser, in the half precision that is enough for it."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            return self.denoiser(x, sigma)

    def sample(self, seeds: Sequence[int], steps: int, terms: Sequence[Term] = ()) -> Tensor:
        """Images of the given seeds after so many Euler steps, (len(seeds), 3, 32, 32)."""
        sigmas = karras_sigmas(steps, SIGMA_MIN, SIGMA_MAX)
        noise = seeded_noise(seeds, (3, SIZE, SIZE)).to(self.device)
        return sample_euler(guided(self.denoise, terms), noise * sigmas[0], sigmas)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The judge's features, (B, FEATURES)."""
        return base_network(self.judge).features(self.judge.preprocess(images))

    @torch.no_grad()
    def classes(self, guider: Guider, images: Tensor) -> Tensor:
        """The most likely class of each image, (B,)."""
        return guider.predict(images, clean(images)).argmax(1)


def load_world(task: str = "class") -> World:
    """The bundled world, on a GPU when there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(load_denoiser().to(device), load_guider(task), load_judge(task), device)
    for guider in (world.guider, world.judge):
        base_network(guider).to(device)
    return world


def generate_store(world: World, folder, count: int, steps: int, report) -> SampleStore:
    """At least `count` images of the world's own model, for distillation."""
    store = SampleStore(folder, {"model": "tinyworld", "sampler": "euler", "steps": steps, "seed": 50_000_000})
    store.fill(count, lambda seeds: world.sample(seeds, steps), lambda have, _: report(f"samples: {have} of {count}"))
    return store


def scene_statistics(world: World, count: int) -> FeatureStats:
    """The judge's features of real scenes that nothing was trained on."""
    stats = FeatureStats(FEATURES)
    for start in range(0, count, 256):
        stats.update(world.features(draw(range(start, min(start + 256, count))).image.to(world.device)))
    return stats


@dataclass(frozen=True)
class Measurement:
    """How well images meet their classes, and how far they are from scenes."""

    judge_accuracy: float   # share that the judge takes for the wanted class
    guider_accuracy: float  # the same by the plain guider: the gap is what only the guider sees
    frechet: float          # Frechet distance on the judge's features


def measure(world: World, guider: Guider | None, weight: float, seeds: range, steps: int, scenes: FeatureStats,
            batch: int = 64) -> Measurement:
    """Sample one image for each seed, guided to the classes in turn, and judge them."""
    stats, judged, own = FeatureStats(FEATURES), 0, 0
    for start in range(0, len(seeds), batch):
        part = seeds[start:start + batch]
        wanted = torch.tensor(part, device=world.device) % len(CLASSES)
        images = world.sample(part, steps, [Term(guider.aim(wanted), weight)] if guider else [])
        judged += int((world.classes(world.judge, images) == wanted).sum())
        own += int((world.classes(world.guider, images) == wanted).sum())
        stats.update(world.features(images))
    return Measurement(judged / len(seeds), own / len(seeds), frechet_distance(stats, scenes))
