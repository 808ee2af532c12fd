"""Seeds that lead to the best images, found by short samplings from the noise that the full ones will start with."""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.sample
import comfy.sd
import torch
from torch import Tensor

from ...ppap_core.viz.drawing import captioned_tiles, from_pillow, to_pillow
from . import latents
from .choosing import LatentJudge, Ranking, pick_latent, ranking_of
from .latents import Patcher
from .progress import Progress
from .sampler import SamplerSettings
from .tensors import image_from_comfy, image_to_comfy
from .terms import GuidanceTerm

TILE = 192  # pixels of the shorter side of a candidate in the picture of all


@dataclass
class SeedSearch:
    """Samples candidates in a few steps, and ranks them by terms.

    The candidates are the noises of one seed, counted as ComfyUI counts the images of a batch. latent: the first of its
    images is where all start; so many as it holds are sampled at once. settings: of the short samplings. vae: as in
    guidance.
    ValueError for a model or terms that cannot be used.
    """

    model: Patcher
    terms: Sequence[GuidanceTerm]
    latent: dict
    settings: SamplerSettings
    vae: comfy.sd.VAE | None = None

    def __post_init__(self) -> None:
        self.judge = LatentJudge.for_model(self.model, self.terms, self.vae)
        self.start = latents.resize_empty_latent(self.model, self.latent)

    def rank(self, count: int) -> tuple[Ranking, Tensor | None]:
        """Return the ranking of so many candidates, and their images (N, H, W, 3) in order of their numbers.

        None in place of images of latents whose colours nobody knows.
        """
        progress, batch = Progress(count * self.settings.steps), len(self.start)
        parts = [range(first, min(first + batch, count)) for first in range(0, count, batch)]
        samples = torch.cat([self._sample(part, progress) for part in parts])
        self.judge.load()
        energies = torch.cat([self._energies(samples[part.start:part.stop]) for part in parts], 1)
        return ranking_of(self.judge.terms, energies, [None] * len(energies)), self._images(samples)

    def _sample(self, numbers: range, progress: Progress) -> Tensor:
        settings, first = self.settings, pick_latent(self.latent | {"samples": self.start}, torch.zeros(len(numbers)).long(),
                                                     len(self.start))
        noise = comfy.sample.prepare_noise(first["samples"], settings.seed, [*numbers])
        return comfy.sample.sample(
            self.model, noise, settings.steps, settings.cfg, settings.sampler_name, settings.scheduler, settings.positive,
            settings.negative, first["samples"], denoise=settings.denoise, noise_mask=first.get("noise_mask"),
            callback=partial(self._on_step, numbers, progress), disable_pbar=True, seed=settings.seed)

    def _on_step(self, numbers: range, progress: Progress, step: int, denoised: Tensor, *unused: Any) -> None:
        done = numbers.start * self.settings.steps + (step + 1) * len(numbers)
        progress(done, latents.preview(self.model, denoised[:1]))

    def _energies(self, samples: Tensor) -> Tensor:
        device = self.model.load_device
        diffused = self.model.model.process_latent_in(samples.to(device))
        return self.judge.energies(diffused, 0.0, diffused).cpu()

    def _images(self, samples: Tensor) -> Tensor | None:
        if self.vae is not None:
            return latents.decode_images(self.vae, samples[:, :, :1] if samples.ndim == 5 else samples)
        shown = latents.preview(self.model, self.model.model.process_latent_in(samples))
        return None if shown is None else image_to_comfy(shown[::latents.frame_count(samples)])

    def chosen(self, ranking: Ranking, count: int) -> dict:
        """Return the LATENT of the best candidates, from which a sampler with the same seed starts with their noise."""
        numbers = ranking.order[:count].tolist()
        first = pick_latent(self.latent, torch.zeros(len(numbers)).long(), len(self.start))
        return {**first, "batch_index": numbers}


def draw_candidates(ranking: Ranking, images: Tensor) -> Tensor:
    """Draw the candidates as an IMAGE, the best first, each above its number and standing. images: in order of numbers."""
    pictures = image_from_comfy(images)
    tiles = [(f"{place}. seed {index + 1}: {float(ranking.standing[index]):+.2f}", to_pillow(pictures[index]))
             for place, index in enumerate(ranking.order.tolist(), 1)]
    return image_to_comfy(from_pillow(captioned_tiles(tiles, TILE)))
