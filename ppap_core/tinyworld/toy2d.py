"""Autoguidance on points of the plane, after the toy of Karras et al. (2024, section 3): seen at a glance, in a minute.

A class is a tree: each branch a row of small Gaussians, each fork shorter and thinner than the one before. Its density is
exact, so that points outside it and branches that are missed can be counted.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..guidance.autoguidance import Autoguidance, autoguided
from ..noise import NoiseInterval
from ..sampling import Denoiser, karras_sigmas, sample_heun
from ..schedules import Schedule
from ..viz.drawing import scatter_panels

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 5.0
ROW, DEPTH = 8, 4  # Gaussians in a branch; forks above the stem


@dataclass(frozen=True)
class Tree:
    """A mixture of isotropic Gaussians in the plane: means (n, 2), stds (n,), weights (n,) that sum to 1, branch (n,)."""

    means: Tensor
    stds: Tensor
    weights: Tensor
    branch: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` points of the mixture, (count, 2)."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return self.means[component] + self.stds[component, None] * torch.randn(count, 2, generator=generator)

    def log_density(self, x: Tensor) -> Tensor:
        """Log density at points, (B, 2) -> (B,)."""
        variance = self.stds.square()
        return (self.weights.log() - torch.log(2 * math.pi * variance)
                - torch.cdist(x, self.means).square() / (2 * variance)).logsumexp(1)

    def nearest(self, x: Tensor) -> Tensor:
        """The branch that a point most likely came from, (B, 2) -> (B,)."""
        variance = self.stds.square()
        score = self.weights.log() - variance.log() - torch.cdist(x, self.means).square() / (2 * variance)
        return self.branch[score.argmax(1)]


@dataclass(frozen=True)
class Branch:
    """A row of Gaussians from a point towards an angle in radians, with its share of the tree's probability."""

    start: Tensor
    angle: float
    length: float
    share: float

    @property
    def end(self) -> Tensor:
        """Where it forks, (2,)."""
        return self.start + self.length * torch.tensor([math.cos(self.angle), math.sin(self.angle)])

    def forks(self, lean: float) -> "Iterator[Branch]":
        """Two thinner branches that open by `lean` radians to either side."""
        for side, shrink in ((1, 0.68), (-1, 0.6)):
            yield Branch(self.end, self.angle + side * lean, shrink * self.length, self.share / 2)


def tree(angle: float, lean: float) -> Tree:
    """A tree that grows from the origin towards an angle, each fork opening by `lean`, both in radians."""
    level = [Branch(torch.zeros(2), angle, 0.55, 1.0)]
    branches = [*level]
    for depth in range(DEPTH):
        level = [fork for branch in level for fork in branch.forks(lean * (1 if depth % 2 else 0.7))]
        branches += level
    along = (torch.arange(ROW) + 0.5) / ROW
    means = [branch.start + along[:, None] * (branch.end - branch.start) for branch in branches]
    stds = torch.tensor([0.08 * branch.length for branch in branches]).repeat_interleave(ROW)
    weights = torch.tensor([branch.share / ROW for branch in branches]).repeat_interleave(ROW)
    return Tree(torch.cat(means), stds, weights / weights.sum(), torch.arange(len(branches)).repeat_interleave(ROW))


WANTED, OTHER = tree(math.radians(60), 0.55), tree(math.radians(115), 0.55)


class Points(nn.Module):
    """A denoiser of points with EDM preconditioning: x (B, 2), sigma (B,) -> (B, 2)."""

    def __init__(self, width: int, layers: int = 4):
        super().__init__()
        sizes = [3, *[width] * layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(width, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma[:, None]
        total = (s**2 + SIGMA_DATA**2).sqrt()
        h = torch.cat([x / total, s.log() / 4], dim=1)
        for layer in self.layers:
            h = F.silu(layer(h))
        return SIGMA_DATA**2 / total**2 * x + s * SIGMA_DATA / total * self.head(h)


def fit(width: int, steps: int, trees: tuple[Tree, ...], seed: int, on_step: Callable[[], None] | None = None,
        batch: int = 2048) -> Points:
    """A denoiser trained on points of the trees: the averaged weights of about the last tenth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, average = Points(width), Points(width)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    average.load_state_dict(net.state_dict())
    with torch.inference_mode(False), torch.enable_grad():
        for step in range(steps):
            points = torch.cat([tree.draw(batch // len(trees), generator) for tree in trees])
            optimizer.param_groups[0]["lr"] = 0.01 / math.sqrt(max(step / 512, 1))
            loss = _denoising_loss(net, points, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for mean, now in zip(average.parameters(), net.parameters(), strict=True):
                mean.data.lerp_(now.data, max(10 / (step + 10), 10 / steps))
            if on_step:
                on_step()
    return average.requires_grad_(False)


def _denoising_loss(net: Points, points: Tensor, generator: torch.Generator) -> Tensor:
    sigma = (torch.randn(len(points), generator=generator) * 1.5 - 2.3).exp()
    noisy = points + sigma[:, None] * torch.randn(points.shape, generator=generator)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return (weight * (net(noisy, sigma) - points).square().mean(1)).mean()


@dataclass(frozen=True)
class Panel:
    """Points (n, 2) sampled with one kind of guidance, and how good they are."""

    points: Tensor
    outliers: float  # fraction below the 0.1 % quantile of the true log density
    overlap: float   # of their distribution over branches with that of the tree: 1 = none is missing, 0 = none is met


def panel(points: Tensor) -> Panel:
    """Points (n, 2) judged by the exact density of the wanted tree."""
    real = WANTED.draw(20_000, torch.Generator().manual_seed(1))
    inside = WANTED.log_density(points) >= WANTED.log_density(real).quantile(0.001)
    count = int(WANTED.branch.max()) + 1
    wanted = torch.bincount(WANTED.branch, WANTED.weights, minlength=count)
    met = torch.bincount(WANTED.nearest(points[inside]), minlength=count) / len(points)
    return Panel(points, 1 - float(inside.float().mean()), float(torch.minimum(met, wanted).sum()))


class Progress:
    """Counts the steps of several trainings and tells `on_step(done, total)`, which may raise to stop."""

    def __init__(self, total: int, on_step: Callable[[int, int], None] | None):
        self.done, self.total, self.on_step = 0, total, on_step

    def __call__(self) -> None:
        self.done += 1
        if self.on_step:
            self.on_step(self.done, self.total)


def panels(steps: int = 2048, count: int = 4000, on_step: Callable[[int, int], None] | None = None) -> dict[str, Panel]:
    """The wanted tree without guidance, by classifier-free guidance, by that in an interval, and by autoguidance.

    Trains the model of the wanted tree and that of both for `steps` each, and the bad model, half as wide, for an eighth of
    them, then samples `count` points. on_step(done, total) may raise to stop.
    """
    progress = Progress(2 * steps + steps // 8, on_step)
    with torch.inference_mode(False):
        good, both = fit(64, steps, (WANTED,), 0, progress), fit(64, steps, (WANTED, OTHER), 1, progress)
        bad = fit(32, steps // 8, (WANTED,), 2, progress)
    methods: dict[str, Denoiser] = {
        "no guidance": good,
        "classifier-free, weight 4": autoguided(good, both, Autoguidance(4.0)),
        "classifier-free, in an interval": autoguided(good, both, Autoguidance(4.0, Schedule(NoiseInterval(0.05, 0.5)))),
        "autoguidance, weight 3": autoguided(good, bad, Autoguidance(3.0))}
    noise = SIGMA_MAX * torch.randn(count, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return {name: panel(sample_heun(denoise, noise, karras_sigmas(32, SIGMA_MIN, SIGMA_MAX)))
                for name, denoise in methods.items()}


def picture(panels: dict[str, Panel]) -> Tensor:
    """The panels side by side under their names, (1, 3, H, W) in [-1, 1]."""
    truth = WANTED.draw(6000, torch.Generator().manual_seed(2))
    return scatter_panels({f"{name}: {panel.outliers:.1%} outside, {panel.overlap:.0%} met": panel.points
                           for name, panel in panels.items()}, truth)
