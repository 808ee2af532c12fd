"""A few-step student of the latent tiny world's flow, as a LoRA: what it learns from, its training and its loss.

It learns straight ways from noise to the flow's own images (rectified flow: Liu et al. 2023, section 2.2), so that few
steps are enough. Half of the ways begin in pure noise, as for Euler's steps; the other half in images under noise drawn
anew, where samplers that renew noise (`lcm`) ask the model.
"""
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppap_core.io.files import load_tensors, save_tensors
from ppap_core.noise import expand
from ppap_core.rng import seeded
from ppap_core.tinyworld.latents import SIZE, load_flow
from ppap_core.tinyworld.loaders import WEIGHTS, condition
from ppap_core.tinyworld.networks.autoencoder import CHANNELS, SHRINK
from ppap_core.tinyworld.networks.flow import TinyFlow
from ppap_core.tinyworld.scenes import CLASSES
from ppap_core.training.finetune import as_lora, initial_updates
from ppap_core.training.lora import LoraUpdate, named_layers, supports_lora, with_adapters

from .latent_world import TIME_SHIFT

RANK = 8
STEPS = 16          # of the teacher from noise to image
GUIDANCE = 2.0      # classifier-free guidance of the teacher where it is told the class; the student learns its outcome
LATEST, EARLIEST = 0.98, 0.3  # times at which images are put under noise again
PREFIX = "diffusion_model."   # of layers in a LoRA file
FIRST_SEED = 90_000_000


class Ways(NamedTuple):
    """Straight ways from noise to the teacher's latents."""

    noise: Tensor   # (B, 16, 16, 16): x = (1 - t) latent + t noise
    latent: Tensor  # (B, 16, 16, 16)
    label: Tensor   # (B,), -1 for no class
    start: Tensor   # (B,) time at which the teacher's way began


class TeachersWays:
    """Ways by number modulo `count`; made once and kept in the folder beside the states."""

    def __init__(self, folder: Path, count: int):
        file = folder / f"ways_{count}.state.safetensors"
        if not file.exists():
            save_tensors(file, _make_ways(load_flow(), count), {"count": count})
        self.count, self.ways = count, Ways(**load_tensors(file)[0])

    def __call__(self, numbers: range, size: int) -> Ways:
        noise, latent, label, start = (tensor[torch.tensor(numbers) % self.count] for tensor in self.ways)
        return Ways(noise.float(), latent.float(), label, start)


def _make_ways(flow: TinyFlow, count: int, batch: int = 64) -> dict[str, Tensor]:
    parts = [ways for first in range(FIRST_SEED, FIRST_SEED + count // 2, batch)
             for ways in _ways_of_batch(flow, first, batch)]
    halved = Ways(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))._asdict()
    return {name: tensor.half() if name in ("noise", "latent") else tensor for name, tensor in halved.items()}


def _ways_of_batch(flow: TinyFlow, first: int, batch: int) -> list[Ways]:
    """Ways that begin in pure noise, and as many that begin in their images under other noise."""
    generator = seeded(first)
    fresh, again = torch.randn(2, batch, CHANNELS, SIZE // SHRINK, SIZE // SHRINK, generator=generator)
    label = torch.randint(-1, len(CLASSES), (batch,), generator=generator)
    label[::2] = -1
    start = EARLIEST + (LATEST - EARLIEST) * torch.rand(batch, generator=generator)
    latent = follow(flow, fresh, torch.ones(batch), label)
    state = (1 - expand(start, latent)) * latent + expand(start, latent) * again
    renewed = follow(flow, state, start, label)
    ahead = (state - (1 - expand(start, state)) * renewed) / expand(start, state)
    return [Ways(fresh, latent, label, torch.ones(batch)), Ways(ahead, renewed, label, start)]


def shifted(ramp: Tensor) -> Tensor:
    """Times by which a flow is sampled, for even numbers in [0, 1]: most of them late."""
    return TIME_SHIFT * ramp / (1 + (TIME_SHIFT - 1) * ramp)


@torch.no_grad()
def follow(flow: TinyFlow, x: Tensor, start: Tensor, label: Tensor) -> Tensor:
    """The teacher's latents from states x (B, 16, h, w) at times `start` (B,) for labels (B,), by Euler's steps."""
    given, nothing = condition(label), condition(torch.full_like(label, -1))
    with torch.autocast("cpu", torch.bfloat16):
        for t, after in pairwise(start * shifted(torch.linspace(1, 0, STEPS + 1))[:, None]):
            told, untold = (flow(x, t, part[:, None], part).float() for part in (given, nothing))
            x = x + expand(after - t, x) * (untold + GUIDANCE * (told - untold))
    return x


class Turbo(nn.Module):
    """The student in training: the bundled flow, which stays frozen, with a low-rank update of every layer."""

    def __init__(self) -> None:
        super().__init__()
        flow = load_flow()
        updates = initial_updates(flow, RANK, 0, torch.device("cpu"))
        self.flow = (flow,)  # in a tuple, so that it is neither trained nor saved
        self.layers = tuple(updates)
        self.up, self.down = (nn.ParameterList(getattr(update, part) for update in updates.values())
                              for part in ("up", "down"))

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        adapters = {layer: [LoraUpdate(up, down)] for layer, up, down in zip(self.layers, self.up, self.down, strict=True)}
        flow = self.flow[0].to(x.device)
        with with_adapters(flow, adapters):
            return flow(x, t, context, pooled)

    def to_file(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under the names that stock loaders of LoRAs expect."""
        return as_lora({layer: LoraUpdate(tensors[f"up.{index}"], tensors[f"down.{index}"])
                        for index, layer in enumerate(self.layers)}, PREFIX)


def turbo_loss(net: nn.Module, ways: Ways, generator: torch.Generator) -> Tensor:
    """Error of the velocity along straight ways, at times as a sampler asks for them, (B,)."""
    t = ways.start * shifted(torch.rand(len(ways.start), generator=generator)).to(ways.start)
    given, time = condition(ways.label), expand(t, ways.latent)
    velocity = net((1 - time) * ways.latent + time * ways.noise, t, given[:, None], given)
    return (velocity.float() - (ways.noise - ways.latent)).square().flatten(1).mean(1)


def load_turbo(folder: Path = WEIGHTS) -> TinyFlow:
    """The trained student: the flow with the LoRA in its weights."""
    flow, tensors = load_flow(), load_tensors(folder / "loras/tinyworld_turbo.safetensors")[0]
    for name, layer in named_layers(flow).items():
        if supports_lora(layer):
            up, down = (tensors[f"{PREFIX}{name}.lora_{part}.weight"].flatten(1).float() for part in ("up", "down"))
            layer.weight.data += (up @ down).view_as(layer.weight)
    return flow
