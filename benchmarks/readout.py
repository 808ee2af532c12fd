"""A readout head: what a guider would say, read from the denoiser's own inner features at the noisy state.

After Readout Guidance (Luo et al. 2024), but without labels: the head is distilled from generated images, as experts are.
As a guider its gradient goes back through the denoiser's first half; without one it is a cheap judge of unfinished images.
"""
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppap_core import TASKS, ExpertSchedule, Guider, base_network
from ppap_core.guiders.latents import View
from ppap_core.noise import expand
from ppap_core.tinyworld.loaders import SIGMA_MIN

from .distillations import SampledTraining
from .training import Networks, Run
from .world import World

WIDTH = 64  # channels of the head
FINE, COARSE = 64, 128  # channels of the tiny denoiser's two levels


class ReadoutHead(nn.Module):
    """(coarse (B, 128, h, w), fine (B, 64, 2h, 2w)) -> output of a task, (B, outputs) or (B, outputs, 4h, 4w) when dense."""

    def __init__(self, outputs: int, dense: bool):
        super().__init__()
        self.dense = dense
        self.coarse = _layer(COARSE)
        if dense:
            self.fine = _layer(FINE)
        self.out: nn.Module = nn.Conv2d(WIDTH, 4 * outputs, 1) if dense else nn.Linear(WIDTH, outputs)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        h = self.coarse(coarse)
        if not self.dense:
            return self.out(F.silu(h).mean((2, 3)))
        h = F.silu(F.interpolate(h, scale_factor=2) + self.fine(fine))
        return F.pixel_shuffle(self.out(h), 2)


def _layer(channels: int) -> nn.Module:
    return nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, WIDTH, 3, padding=1))


class ReadoutNetworks(Networks):
    """A head for each interval of noise levels, as a network of the noisy view: (to_vp(x), sigma) -> output.

    guider: the plain one, whose outputs are to be read. denoiser: a `TinyDenoiser`, no part of the trained weights.
    """

    def __init__(self, guider: Guider, denoiser: Any, schedule: ExpertSchedule):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(ReadoutHead(max(len(guider.labels), 1), TASKS[guider.task].dense), schedule)
        self.encode, self.share = denoiser.encode, _weights(self.nets[0]) / _weights(base_network(guider))
        self.requires_grad_(False)

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.clamp_min(SIGMA_MIN)  # of finished images, where the denoiser has no features for 0
        with torch.autocast(image.device.type, torch.bfloat16):
            features = self.encode(image * (1 + expand(sigma, image) ** 2).sqrt(), sigma)
        return self.nets[self.schedule.index(float(sigma[0]))](*(part.float() for part in features))

    def trainable_share(self) -> float:
        """Weights of one head over those of the guider's network."""
        return self.share


def _weights(net: nn.Module) -> int:
    return sum(weight.numel() for weight in net.parameters())


@dataclass(frozen=True)
class Readout(SampledTraining):
    """Heads that learn the plain network's outputs on generated images from the denoiser's features on the way to them."""

    marks: ClassVar[dict[str, Any]] = {"readout": True}
    view: View = "noisy"

    def network_for(self, world: World) -> ReadoutNetworks:
        return ReadoutNetworks(world.guider, world.denoiser, self.schedule)

    def loss(self, run: Run, index: int, step: int) -> Tensor:
        pairs = self.pairs(run, index, step).to(run.world.device)
        output = self.guider(run).predict(pairs.inputs, pairs.sigma)
        return TASKS[run.world.guider.task].distance(output, run.world.plain_output(pairs.images))

    def guider(self, run: Run) -> Guider:
        return replace(run.world.guider, net=run.net, view="noisy")
