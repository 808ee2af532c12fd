"""A readout head for faces: what a guider would say, read from the denoiser's own inner features at the noisy state."""
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ppap_core import ExpertSchedule, Guider, base_network
from ppap_core.noise import expand

from .readout import Readout
from .training import Networks
from .world import World

WIDTH = 64  # channels of the denoiser, and of the head
TAPPED = (18, 36)  # layers of the denoiser's chain after which it is read: in its middle, and before the last


class FaceReadoutHead(nn.Module):
    """Maps (B, 64, 40, 40) after each of TAPPED -> output of a task without a map, (B, outputs)."""

    def __init__(self, outputs: int):
        super().__init__()
        self.read = nn.ModuleList(nn.Sequential(nn.GroupNorm(8, WIDTH), _halved()) for _ in TAPPED)
        self.body = nn.Sequential(nn.SiLU(), _halved(), nn.SiLU(), _halved(), nn.SiLU())
        self.out = nn.Linear(WIDTH, outputs)

    def forward(self, *maps: Tensor) -> Tensor:
        hidden = torch.stack([read(part) for read, part in zip(self.read, maps, strict=True)]).sum(0)
        return self.out(self.body(hidden).mean((2, 3)))


def _halved() -> nn.Module:
    return nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)


class FaceReadoutNetworks(Networks):
    """A head for each interval of noise levels, as a network of the noisy view: (to_vp(x), sigma) -> output.

    guider: the plain one, of classes. denoiser: the blind chain of the faces' model, no part of the trained weights.
    """

    def __init__(self, guider: Guider, denoiser: nn.Module, schedule: ExpertSchedule):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(FaceReadoutHead(len(guider.labels)), schedule)
        own, whole = (sum(weight.numel() for weight in net.parameters()) for net in (self.nets[0], base_network(guider)))
        self.layers, self.share = tuple(cast(nn.Sequential, denoiser)), own / whole
        self.requires_grad_(False)

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        x = (image * (1 + expand(sigma, image) ** 2).sqrt())[:, :1]
        head = self.nets[self.schedule.index(float(sigma[0]))]
        return head(*(part.float().contiguous() for part in self._maps(((x + 1) / 2).to(torch.bfloat16))))

    def _maps(self, hidden: Tensor) -> list[Tensor]:
        hidden, maps = hidden.contiguous(memory_format=torch.channels_last), []
        for index, layer in enumerate(self.layers[:TAPPED[-1] + 1]):
            hidden = layer(hidden)
            if index in TAPPED:
                maps.append(hidden)
        return maps

    def trainable_share(self) -> float:
        """Weights of one head over those of the guider's network."""
        return self.share


@dataclass(frozen=True)
class FaceReadout(Readout):
    """Heads that learn the plain network's outputs on generated faces from the denoiser's features on the way to them."""

    marks: ClassVar[dict[str, Any]] = {"readout": "faces"}

    def network_for(self, world: World) -> Any:
        return FaceReadoutNetworks(world.guider, cast(nn.Module, world.denoiser), self.schedule)
