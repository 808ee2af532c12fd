"""Restoration in the tiny worlds: scenes of which a grey, small, blurred or torn copy is left, in pixels and in latents.

Each is restored as nodes do it by default, through the model, and without any model, and is finished exactly.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ppap_core import Denoiser, GuidanceSettings, NoiseInterval, Ramp, Schedule, Term, guided, image_target, sample_renewing
from ppap_core.guiders.copies import COPIES, CopyGuider, averages, blurs, copy_guider, without_missing
from ppap_core.guiders.exact import meet
from ppap_core.guiders.guider import Decode, clean
from ppap_core.noise import EVERYWHERE, PIXEL_SIGMA_DATA
from ppap_core.rng import seeded_noise
from ppap_core.schedules import FALLING
from ppap_core.tinyworld import latents
from ppap_core.tinyworld.loaders import SIZE
from ppap_core.tinyworld.scenes import draw

from .latent_world import CHANNELS, GRID, LatentWorld, flow_sigmas
from .networks import load_judge
from .report import Column, Report, Row, cached_json, markdown
from .tiny_world import NOISE, SCHEDULES, load_world
from .training import config_hash

FACTOR, BLUR = 5.3, 0.05  # how much smaller a small copy is; the blur as a share of a side


@dataclass(frozen=True)
class CopiesBench:
    """Everything that a result depends on, besides the weights of the worlds."""

    pixels: int = 32  # images of each world
    latents: int = 8
    steps: int = 20
    batch: int = 16


class Way(NamedTuple):
    """A way to restore: the weight of a balanced term that falls, and where its gradient is taken; 0: without any."""

    weight: float
    through: bool = False
    finish: bool = False


WAYS = {"unguided": Way(0.0), "in the prediction, 0.7": Way(0.7), "through the model, 0.3": Way(0.3, through=True),
        "in the prediction, and finished": Way(0.7, finish=True)}
LEAST = "smallest change of grey"  # the row without a model


class Space(NamedTuple):
    """A world as what a restoration needs of it; start: noise of seeds at the first level."""

    side: int
    sigmas: Tensor
    start: Callable[[Sequence[int]], Tensor]
    denoise: Denoiser  # differentiable
    decode: Decode | None
    sigma_data: float

    def images(self, state: Tensor) -> Tensor:
        """Images in [-1, 1] of what was sampled."""
        with torch.no_grad():
            return (self.decode(state, clean(state)) if self.decode else state).clamp(-1, 1)


def pixel_space(steps: int) -> Space:
    """The pixel world."""
    world, sigmas = load_world(), SCHEDULES["karras"](steps)
    return Space(SIZE, sigmas, lambda seeds: world.start(seeds, steps)[0], world.denoise, None, PIXEL_SIGMA_DATA)


def latent_space(steps: int) -> Space:
    """The flow, seen through its decoder."""
    world, sigmas = LatentWorld(), flow_sigmas(steps)

    def start(seeds: Sequence[int]) -> Tensor:
        return seeded_noise(seeds, (CHANNELS, GRID, GRID)) * sigmas[0]
    return Space(latents.SIZE, sigmas, start, world.predict, world.decoder, 1.0)


SPACES = {"pixels": pixel_space, "latents": latent_space}


def copy_of(kind: str, picture: Tensor) -> CopyGuider:
    """The guider of what is left of pictures (B, 3, H, W): a square hole of a quarter for the known part."""
    side = picture.shape[-1]
    small, matrix = round(side / FACTOR), None
    if kind == "small copy":
        matrix = averages(side, small)
    if kind == "blurred copy":
        matrix = blurs(side, BLUR * side)
    shown = picture if matrix is None else matrix.to(picture) @ picture @ matrix.to(picture).mT
    guider = copy_guider(kind, BLUR * side)
    target = image_target(guider, shown)
    if kind == "known part":
        missing = torch.zeros(1, side, side)
        missing[:, side // 4:3 * side // 4, side // 4:3 * side // 4] = 1
        target = without_missing(guider, target, missing)
    return replace(guider, target=target)


def restored(space: Space, guider: CopyGuider, way: Way, seeds: Sequence[int]) -> Tensor:
    """Images that a way makes of copies, by a sampler that renews all noise."""
    falls = NoiseInterval(float(space.sigmas[-2]), float(space.sigmas[0]))
    term = Term(replace(guider, decode=space.decode), way.weight, Schedule(EVERYWHERE, Ramp(falls, *FALLING)),
                normalized=True, backprop_through_model=way.through)
    denoise = guided(space.denoise, [term], GuidanceSettings(sigma_data=space.sigma_data))
    with torch.no_grad():
        state = sample_renewing(denoise, space.start(seeds), space.sigmas, 1.0, seeds)
    images = space.images(state)
    return meet(guider, images) if way.finish else images


def row(bench: CopiesBench, world: str, kind: str, way: str) -> Row:
    """Scores of one way with copies of a kind: what is known, off by; PSNR; and the share judged to be of the true class."""
    space, judge, parts = SPACES[world](bench.steps), load_judge("class"), []
    count = bench.pixels if world == "pixels" else bench.latents
    for first in range(0, count, bench.batch):
        numbers = range(first, min(first + bench.batch, count))
        scenes = draw([NOISE + number for number in numbers], space.side)
        guider = copy_of(kind, scenes.image)
        images = meet(guider, torch.zeros_like(scenes.image), smallest=True) if way == LEAST \
            else restored(space, guider, WAYS[way], numbers)
        parts.append(_scores(guider, images, scenes.image, judge.predict(images, clean(images)).argmax(1) == scenes.label))
    off, error, right = torch.cat(parts, 1).double().mean(1).tolist()
    return {"world": world, "copy": kind, "way": way, "off": off ** 0.5,
            "psnr": float(10 * torch.log10(torch.tensor(4 / error))), "right": right}


def _scores(guider: CopyGuider, images: Tensor, truth: Tensor, right: Tensor) -> Tensor:
    residual = guider.measurement(images).residual(images)
    return torch.stack([residual.square().flatten(1).mean(1), (images - truth).square().flatten(1).mean(1), right.float()])


def copies_bench(bench: CopiesBench, folder: Path, report: Report, only: Sequence[str] = ()) -> list[Row]:
    """A row for each world, copy and way; finished ones are read from the folder. only: worlds; (): all."""
    rows = []
    for world in only or SPACES:
        for kind in COPIES:
            for way in (LEAST, *WAYS):
                name = config_hash({"bench": str(bench), "world": world, "copy": kind, "way": way})
                rows.append(cached_json(folder / f"{name}.json", partial(row, bench, world, kind, way)))
                report(f"{rows[-1]}")
    return rows


COLUMNS = (Column("world", "{world}", numeric=False), Column("copy", "{copy}", numeric=False),
           Column("way", "{way}", numeric=False), Column("what is known, off by", "{off:.2g}"), Column("PSNR", "{psnr:.1f}"),
           Column("right class", "{right:.0%}"))


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown."""
    return markdown(COLUMNS, rows)
