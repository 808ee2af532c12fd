"""Autoguidance on points of the plane, after the toy of Karras et al. (2024, section 3): seen at a glance, in a minute.

A class is a tree: each branch a row of small Gaussians, each fork shorter and thinner than the one before. Its density is
exact, so that what lies outside and what is missing can be counted.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..guidance.autoguidance import Autoguidance, autoguided
from ..noise import NoiseInterval
from ..sampling import Denoiser, karras_sigmas, sample_heun
from ..schedules import Schedule
from ..viz.plots import scatter_panels

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
        """(count, 2)"""
        of = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return self.means[of] + self.stds[of, None] * torch.randn(count, 2, generator=generator)

    def log_density(self, x: Tensor) -> Tensor:
        """(B, 2) -> (B,)"""
        variance = self.stds.square()
        return (self.weights.log() - torch.log(2 * math.pi * variance)
                - torch.cdist(x, self.means).square() / (2 * variance)).logsumexp(1)

    def nearest(self, x: Tensor) -> Tensor:
        """The branch that a point most likely came from, (B, 2) -> (B,)."""
        variance = self.stds.square()
        score = self.weights.log() - variance.log() - torch.cdist(x, self.means).square() / (2 * variance)
        return self.branch[score.argmax(1)]


def tree(angle: float, lean: float) -> Tree:
    """A tree that grows from the origin towards an angle, each fork opening by `lean`, both in radians."""
    means, stds, weights, numbers = [], [], [], []
    branches = [(torch.zeros(2), angle, 0.55, 1.0)]  # start, direction, length, share
    for depth in range(DEPTH + 1):
        following = []
        for start, direction, length, share in branches:
            end = start + length * torch.tensor([math.cos(direction), math.sin(direction)])
            along = (torch.arange(ROW) + 0.5) / ROW
            means.append(start + along[:, None] * (end - start))
            stds.append(torch.full((ROW,), 0.08 * length))
            weights.append(torch.full((ROW,), share / ROW))
            numbers.append(torch.full((ROW,), len(numbers)))
            for side, shrink in ((1, 0.68), (-1, 0.6)):
                following.append((end, direction + side * lean * (1 if depth % 2 else 0.7), shrink * length, share / 2))
        branches = following
    weights = torch.cat(weights)
    return Tree(torch.cat(means), torch.cat(stds), weights / weights.sum(), torch.cat(numbers))


WANTED, OTHER = tree(math.radians(60), 0.55), tree(math.radians(115), 0.55)


class Points(nn.Module):
    """A denoiser of points with EDM preconditioning. x (B, 2), sigma (B,) -> (B, 2)"""

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
    """A denoiser trained on points of the trees; the averaged weights of the last tenth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, average = Points(width), Points(width)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    average.load_state_dict(net.state_dict())
    with torch.inference_mode(False), torch.enable_grad():
        for step in range(steps):
            points = torch.cat([each.draw(batch // len(trees), generator) for each in trees])
            sigma = (torch.randn(len(points), generator=generator) * 1.5 - 2.3).exp()
            noisy = points + sigma[:, None] * torch.randn(points.shape, generator=generator)
            weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
            loss = (weight * (net(noisy, sigma) - points).square().mean(1)).mean()
            optimizer.param_groups[0]["lr"] = 0.01 / math.sqrt(max(step / 512, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for mean, now in zip(average.parameters(), net.parameters(), strict=True):
                mean.data.lerp_(now.data, max(10 / (step + 10), 10 / steps))
            if on_step:
                on_step()
    return average.requires_grad_(False)


@dataclass(frozen=True)
class Panel:
    """Points (n, 2) that one way of guidance made, and how good they are."""

    points: Tensor
    outliers: float  # share of them where fewer than one in a thousand points of the tree are as unlikely
    overlap: float   # of their distribution over branches with that of the tree: 1 none is missing, 0 none is met


def panel(points: Tensor) -> Panel:
    """Judged by the exact density."""
    real = WANTED.draw(20_000, torch.Generator().manual_seed(1))
    inside = WANTED.log_density(points) >= WANTED.log_density(real).quantile(0.001)
    count = int(WANTED.branch.max()) + 1
    wanted = torch.bincount(WANTED.branch, WANTED.weights, minlength=count)
    found = torch.bincount(WANTED.nearest(points[inside]), minlength=count) / len(points)
    return Panel(points, 1 - float(inside.float().mean()), float(torch.minimum(found, wanted).sum()))


def panels(steps: int = 2048, count: int = 4000, on_step: Callable[[int, int], None] | None = None) -> dict[str, Panel]:
    """The wanted tree without guidance, by classifier-free guidance, by that in an interval, and by autoguidance.

    Trains the model of the wanted tree and that of both for `steps`, and the bad model, half as wide, for an eighth of them.
    on_step(done, all) may raise to stop.
    """
    done, everything = iter(range(1, 2 * steps + steps // 8 + 1)), 2 * steps + steps // 8
    note = on_step and (lambda: on_step(next(done), everything))
    with torch.inference_mode(False):
        good, both = fit(64, steps, (WANTED,), 0, note), fit(64, steps, (WANTED, OTHER), 1, note)
        bad = fit(32, steps // 8, (WANTED,), 2, note)
    ways: dict[str, Denoiser] = {
        "no guidance": good,
        "classifier-free, weight 4": autoguided(good, both, Autoguidance(4.0)),
        "classifier-free, in an interval": autoguided(good, both, Autoguidance(4.0, Schedule(NoiseInterval(0.05, 0.5)))),
        "autoguidance, weight 3": autoguided(good, bad, Autoguidance(3.0))}
    noise = SIGMA_MAX * torch.randn(count, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return {name: panel(sample_heun(denoise, noise, karras_sigmas(32, SIGMA_MIN, SIGMA_MAX)))
                for name, denoise in ways.items()}


def picture(found: dict[str, Panel]) -> Tensor:
    """The four panels side by side, (1, 3, H, W) in [-1, 1]."""
    truth = WANTED.draw(6000, torch.Generator().manual_seed(2))
    return scatter_panels({f"{name}: {each.outliers:.1%} outside, {each.overlap:.0%} met": each.points
                           for name, each in found.items()}, truth)
