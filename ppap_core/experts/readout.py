"""Readouts: what a guider would say of the finished image, read from the denoiser's own inner features at a noisy state.

After Readout Guidance (Luo et al. 2024), but without labels: small heads learn the plain guider's output from generated
images and the steps that led to them, as experts do. As a guider of the noisy view a readout has its gradient go back
through the part of the denoiser in front of the features. It belongs to the model that it was distilled on.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..guiders.guider import Guider
from ..guiders.preprocess import Preprocess
from ..guiders.tasks import TASKS
from ..io.hashing import fingerprint_network
from ..noise import expand
from ..schedules import ExpertSchedule
from .bank import base_network

WIDTH = 64           # channels of a head
UPSCALE = 4          # sides of a dense output over those of the map of features
SIDE, DENSE_SIDE = 16, 32  # longest side of the map that a head reads; larger ones are averaged down to it

Features = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), sigma (B,)) -> inner features of a denoiser, a map (B, D, h, w) or tokens (B, N, D); differentiable"""


@dataclass(frozen=True)
class ReadoutSpec:
    """What a readout reads and what it says."""

    place: str               # of the features in the denoiser, such as the name of a module
    channels: int            # D of the features
    output: tuple[int, ...]  # shape of the guider's output without the batch; of maps only the first number counts
    dense: bool = False      # whether that is a map, which needs a map of features

    @property
    def side(self) -> int:
        """Longest side of the map that a head reads."""
        return DENSE_SIDE if self.dense else SIDE


class ReadoutHead(nn.Module):
    """Features (B, D, h, w) -> output of a task: (B, *output), or (B, K, UPSCALE h, UPSCALE w) for a dense one.

    mean, std (D,): of each channel in training; they tame the few channels of large values that transformers have.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ReadoutSpec):
        super().__init__()
        self.output, self.dense = spec.output, spec.dense
        self.register_buffer("mean", torch.zeros(spec.channels))
        self.register_buffer("std", torch.ones(spec.channels))
        self.norm = nn.GroupNorm(gcd(8, spec.channels), spec.channels)
        self.conv = nn.Conv2d(spec.channels, WIDTH, 3, padding=1)
        count = UPSCALE**2 * spec.output[0] if spec.dense else torch.Size(spec.output).numel()
        self.out: nn.Module = nn.Conv2d(WIDTH, count, 1) if spec.dense else nn.Linear(WIDTH, count)

    def forward(self, features: Tensor) -> Tensor:
        h = (features.flatten(2) - self.mean[:, None]) / self.std[:, None]
        h = self.norm(h).unflatten(2, features.shape[2:])  # flat: torch crashes in its gradient for maps with channels last
        h = F.silu(self.conv(F.silu(h)))
        if self.dense:
            return F.pixel_shuffle(self.out(h), UPSCALE)
        return self.out(h.mean((2, 3))).unflatten(1, self.output)


class ReadoutNetwork(nn.Module):
    """The network of a guider with a head for each interval of noise levels: net(image, sigma) for images without noise.

    With noise it has nothing to look at but features, which `reading` connects it to.
    plain: the guider's own network, which stays as it is. seed: of the heads' start. ValueError for a dense output that is
    no map.
    """

    def __init__(self, plain: nn.Module, schedule: ExpertSchedule, spec: ReadoutSpec, seed: int = 0):
        super().__init__()
        if spec.dense and len(spec.output) != 3:
            raise ValueError(f"the guider's output has the shape {spec.output}: expected a map of three dimensions")
        self.fingerprint = fingerprint_network(plain)
        self.training_info: dict = {}  # how the heads were made, for people
        self.schedule, self.spec, self.plain = schedule, spec, plain
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % 2**63)
            self.heads = nn.ModuleList(ReadoutHead(spec) for _ in range(len(schedule)))
        self.heads.eval().requires_grad_(False)

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        """Output of the plain network. ValueError for noisy images."""
        if bool(sigma.any()):
            raise ValueError("a readout looks at the inner features of a model while that samples, not at noisy images: use "
                             "the plain guider, or experts, here")
        return self.plain(image)

    def head(self, index: int) -> ReadoutHead:
        """The head of one interval."""
        head = self.heads[index]
        assert isinstance(head, ReadoutHead)
        return head

    def read(self, features: Tensor, sigma: Tensor) -> Tensor:
        """Output read from features, (B, D, h, w) or (B, N, D), at one noise level (B,). ValueError if they do not fit."""
        return self.head(self.schedule.index(float(sigma[0])))(self.as_map(features))

    def as_map(self, features: Tensor) -> Tensor:
        """Features as a map that heads read, (B, D, h, w) in the heads' type; tokens become one of a single column.

        ValueError for features of another width, and for tokens where a map is wanted.
        """
        is_map = features.ndim == 4
        if (channels := features.shape[1 if is_map else 2]) != self.spec.channels:
            raise ValueError(f"this readout was distilled on a model with {self.spec.channels} features at "
                             f"{self.spec.place}, but this one has {channels} there: use it with its own model, or distil "
                             "another one for this model")
        if self.spec.dense and not is_map:
            raise ValueError(f"the features at {self.spec.place} are {features.shape[1]} tokens and no map, which a map of "
                             "the image cannot be read from: use experts, or another model")
        features = (features if is_map else features.mT[..., None]).to(self.head(0).mean)
        longest = self.spec.side if is_map else self.spec.side**2
        height, width = features.shape[-2:]
        return F.adaptive_avg_pool2d(features, (min(height, longest), min(width, longest)))

    def describe(self) -> str:
        """A sentence about what is read."""
        return f"read from {self.spec.channels} features of the model at {self.spec.place}"


@dataclass(frozen=True)
class _Unchanged(Preprocess):
    """States of a model, which its own network preprocesses."""

    def __call__(self, image: Tensor) -> Tensor:
        return image


@dataclass(frozen=True)
class _Reading:
    """The network of a guider that reads features: (noisy state in VP scaling, sigma) -> output."""

    readout: ReadoutNetwork
    features: Features

    def __call__(self, noisy_vp: Tensor, sigma: Tensor) -> Tensor:
        x = noisy_vp * (1 + expand(sigma, noisy_vp) ** 2).sqrt()
        return self.readout.read(self.features(x, sigma), sigma)


def reads_features(guider: Guider) -> bool:
    """Whether a guider is a readout."""
    return isinstance(guider.net, ReadoutNetwork)


def reading(guider: Guider, features: Features) -> Guider:
    """The guider of a readout connected to a denoiser, as a guider of the noisy view of what the denoiser diffuses.

    ValueError for a guider without a readout, or with cut-outs.
    """
    if not isinstance(guider.net, ReadoutNetwork):
        raise ValueError(f"{guider.name} has no readout: expected a guider from with_readout")
    require_whole_image(guider)
    return replace(guider, net=_Reading(guider.net, features), preprocess=_Unchanged((0, 0)), decode=None, view="noisy")


def require_whole_image(guider: Guider) -> None:
    """ValueError for a readout with cut-outs."""
    if guider.cutouts:
        raise ValueError(f"{guider.name} reads features of the whole image, and has none of its parts: use it without "
                         "cut-outs")


def with_readout(guider: Guider, readout: ReadoutNetwork) -> Guider:
    """The guider with a readout in place of its network; aimed and shown images without noise, it is the plain guider."""
    return replace(guider, net=readout, view="noisy", decode=None)


def new_readout(guider: Guider, schedule: ExpertSchedule, place: str, features: Tensor, output: Tensor,
                seed: int = 0) -> ReadoutNetwork:
    """An untrained readout of a plain guider.

    place: of the features, for files and messages. features: an example, (B, D, h, w) or (B, N, D). output: an example of
    the guider's. seed: of the heads' start. ValueError for a guider without a network, or with one that is asked for a text.
    """
    require_readable(guider)
    spec = ReadoutSpec(place, features.shape[1 if features.ndim == 4 else 2], tuple(output.shape[1:]),
                       TASKS[guider.task].dense)
    readout = ReadoutNetwork(base_network(guider), schedule, spec, seed)
    readout.as_map(features)
    return readout


def require_readable(guider: Guider) -> None:
    """ValueError for a guider that no readout can be distilled from."""
    base_network(guider)
    if TASKS[guider.task].has_prompt:
        raise ValueError(f"{guider.name} marks what a text asks for, and a readout learns one answer only: distil experts "
                         "of it, or a readout of another guider")
