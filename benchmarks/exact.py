"""Exact rules: tiling, symmetry and a palette by guidance, beside what else makes images tile, and with a ControlNet.

Packs make models of convolutions tile by letting these go on across the border. A transformer has none: it is run on its
latent and on shifted ones instead, and each prediction counts away from its own border.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppap_core import (
    Denoiser,
    GuidanceSettings,
    Guider,
    Term,
    guided,
    image_target,
    rule_guider,
    sample_euler,
)
from ppap_core.guiders.exact import meet, off_by
from ppap_core.guiders.guider import Decode
from ppap_core.rng import seeded_noise
from ppap_core.schedules import falling
from ppap_core.tinyworld.latents import SPACE
from ppap_core.tinyworld.scenes import draw
from ppap_core.viz.colors import palette

from .costs import ratio_in_turn
from .evaluation import score
from .latent import encoded_depth
from .latent_world import CHANNELS, GRID, LatentWorld, flow_sigmas
from .networks import load_judge
from .report import Column, Report, Row, cached_json, markdown
from .tiny_world import NOISE, load_world
from .training import config_hash

PALETTE = "#1d3557:5, #ffd166"
pixel_world, latent_world = cache(load_world), cache(LatentWorld)
RULES = ("seamless tiling", "symmetry left-right", "colours")


@dataclass(frozen=True)
class ExactBench:
    """Everything that a result depends on, besides the weights of the worlds."""

    images: int = 16
    steps: int = 20
    weight: float = 0.7  # of balanced terms that fall
    repeats: int = 3     # timings, on four images


class Way(NamedTuple):
    """A way to make images; sees: what a guider sees, "" without one; controlled: beside a ControlNet of depth."""

    sees: str = ""
    padded: bool = False   # convolutions go on across the border
    shifted: bool = False  # four shifted passes
    controlled: bool = False


PIXEL_WAYS = {"plain": Way(), "circular padding": Way(padded=True), "ours": Way("image")}
LATENT_WAYS = {"plain": Way(), "four shifted passes, circular VAE": Way(padded=True, shifted=True),
               "ours, by linear colours": Way("colours"), "ours, through the VAE": Way("image"),
               "ControlNet alone": Way(controlled=True),
               "ours, by linear colours, and ControlNet": Way("colours", controlled=True),
               "ours, through the VAE, and ControlNet": Way("image", controlled=True)}
ONLY_TILING = ("circular padding", "four shifted passes, circular VAE")


def aimed(name: str) -> Guider:
    """A rule with its target."""
    guider = rule_guider(name)
    return guider.aim(image_target(guider, palette(PALETTE))) if name == "colours" else guider


def pad_circularly(net: nn.Module, circular: bool) -> None:
    """Let all convolutions of a network go on across the border, or not."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = "circular" if circular else "zeros"
            down, across = (int(pixels) for pixels in layer.padding)
            layer._reversed_padding_repeated_twice = [across, across, down, down]


def shifted_passes(denoise: Callable[..., Tensor], x: Tensor, sigma: Tensor) -> Tensor:
    """The prediction of four passes, shifted by half a side along none, one and both, each weighed by its middle."""
    weights = [math.sin(math.pi * (place + 0.5) / x.shape[-1]) ** 2 for place in range(x.shape[-1])]
    middle = x.new_tensor(weights)
    window, half, total = middle[:, None] * middle, x.shape[-1] // 2, torch.zeros_like(x)
    for shift in ((0, 0), (0, half), (half, 0), (half, half)):
        back = (-shift[0], -shift[1])
        total = total + (denoise(x.roll(shift, (2, 3)), sigma) * window).roll(back, (2, 3))
    return total  # sin^2 + cos^2: the windows sum to 1


def term(name: str, bench: ExactBench, sigmas: Tensor, decode: Decode | None) -> Term:
    """The term of a rule as nodes have it by default."""
    return Term(replace(aimed(name), decode=decode), bench.weight, falling(sigmas.tolist()), normalized=True)


def pixel_images(bench: ExactBench, name: str, way: Way, numbers: Sequence[int]) -> Tensor:
    """Images (B, 3, 32, 32) of the pixel world."""
    world = pixel_world()
    assert isinstance(world.denoiser, nn.Module)
    pad_circularly(world.denoiser, way.padded)
    _, sigmas = world.start(numbers, bench.steps)
    return world.sample(numbers, bench.steps, [term(name, bench, sigmas, None)] if way.sees else []).clamp(-1, 1)


def latent_images(bench: ExactBench, name: str, way: Way, numbers: Sequence[int]) -> Tensor:
    """Images (B, 3, 128, 128) of the flow."""
    world, sigmas = latent_world(), flow_sigmas(bench.steps)
    pad_circularly(world.autoencoder, way.padded)
    denoise: Denoiser = partial(world.denoise, hint=encoded_depth(world, numbers)) if way.controlled else world.denoise
    if way.shifted:
        denoise = partial(shifted_passes, denoise)
    if way.sees:
        decode = world.decoder if way.sees == "image" else SPACE.colors
        denoise = guided(denoise, [term(name, bench, sigmas, decode)], GuidanceSettings(sigma_data=1.0))
    noise = seeded_noise([NOISE + number for number in numbers], (CHANNELS, GRID, GRID))
    with torch.no_grad():
        return world.decode(sample_euler(denoise, noise * sigmas[0], sigmas))


WORLDS = {"pixels": (pixel_images, PIXEL_WAYS), "latents": (latent_images, LATENT_WAYS)}


def row(bench: ExactBench, world: str, name: str, way: str) -> Row:
    """How far images are off before and after they are finished, how much that changes, the depth error, and the time."""
    make, ways = WORLDS[world]
    numbers, guider = range(bench.images), aimed(name)
    images = make(bench, name, ways[way], numbers)
    finished = meet(guider, images)
    few = range(4)
    return {"world": world, "rule": name, "way": way, "off": float(off_by(guider, images).mean()),
            "finished": float(off_by(guider, finished).mean()),
            "change": float((finished - images).square().mean().sqrt() / 2),
            "depth": float(score(load_judge("depth"), images, draw(numbers)).mean()) if ways[way].controlled else None,
            "ratio": ratio_in_turn(partial(make, bench, name, ways[way], few), partial(make, bench, name, Way(), few),
                                   bench.repeats)}


def exact_bench(bench: ExactBench, folder: Path, report: Report, only: Sequence[str] = ()) -> list[Row]:
    """A row for each world, rule and way; finished ones are read from the folder. only: worlds; (): all."""
    rows = []
    for world in only or WORLDS:
        for name in RULES:
            for way in WORLDS[world][1]:
                if way in ONLY_TILING and name != "seamless tiling":
                    continue
                file = config_hash({"bench": str(bench), "world": world, "rule": name, "way": way})
                rows.append(cached_json(folder / f"{file}.json", partial(row, bench, world, name, way)))
                report(f"{rows[-1]}")
    return rows


COLUMNS = (Column("world", "{world}", numeric=False), Column("rule", "{rule}", numeric=False),
           Column("way", "{way}", numeric=False), Column("off by", "{off:.2g}"),
           Column("finished, off by", "{finished:.1g}"), Column("changed by that", "{change:.1%}"),
           Column("depth error", "{depth_words}"), Column("time, times plain", "{ratio:.2f}"))


def table(rows: Sequence[Row]) -> str:
    """Rows in Markdown."""
    return markdown(COLUMNS, [row | {"depth_words": "" if row["depth"] is None else f"{row['depth']:.3f}"} for row in rows])
