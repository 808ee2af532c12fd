"""Train every weight of the tiny world from fixed seeds: python -m benchmarks.train_tinyworld [name ...]

Runs on a GPU where there is one, else on the CPU; an interrupted training is resumed.
"""
import argparse
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from examples.priors.networks import WEIGHTS as PRIORS
from examples.priors.networks import label_map_denoiser, tour_denoiser
from examples.priors.salesman import solve
from examples.priors.tours import SolvedTours
from ppap_core.guiders.tasks import TASKS
from ppap_core.io.files import load_tensors, save_tensors, without_prefix
from ppap_core.tinyworld.latents import (
    SIZE,
    Encoded,
    TinyEps,
    depth_hint,
    load_autoencoder,
    load_flow,
    scale_hint,
    scale_latent,
)
from ppap_core.tinyworld.loaders import CONDITIONS, LABELS, WEIGHTS, load_denoiser
from ppap_core.tinyworld.networks.autoencoder import TinyAutoencoder
from ppap_core.tinyworld.networks.classifiers import tiny_resnet
from ppap_core.tinyworld.networks.denoiser import TinyDenoiser
from ppap_core.tinyworld.networks.flow import TinyControl, TinyFlow, to_diffusers
from ppap_core.tinyworld.scenes import Scenes, draw
from ppap_core.training.loop import AdamW, RunOptions, optimize

from .judges import TinyTransformer, tiny_convnext
from .losses import (
    Loss,
    autoencoder_loss,
    conditional_loss,
    control_loss,
    denoiser_loss,
    eps_loss,
    flow_loss,
    label_map_loss,
    task_loss,
)
from .networks import WEIGHTS as JUDGES
from .turbo import TeachersWays, Turbo, turbo_loss

TRAINING_SEEDS = 10_000_000  # scenes below this number are never trained on


Source = Callable[[range, int], Any]
"""(numbers of examples, side of scenes) -> a batch, as a NamedTuple of tensors"""


@dataclass(frozen=True)
class TrainConfig:
    """How one network is trained; goes into its file."""

    steps: int
    batch: int = 64
    size: int = 32         # side of the scenes
    lr: float = 1e-3       # AdamW, 200 steps of warm-up, cosine to zero
    ema: float = 0.999     # the averaged weights are what is saved
    seed: int = 0
    latents: int = 0       # so many scenes of 128 pixels are encoded and used again and again; 0: fresh scenes, as pixels
    half: bool = False     # saved as float16
    tours: int = 0         # instead of scenes, so many tours, solved once and used again and again
    ways: int = 0          # instead of scenes, so many ways of the flow from noise to latent, used again and again


class Network(NamedTuple):
    """A network before its training, its loss and its training."""

    make: Callable[[], nn.Module]
    loss: Loss
    config: TrainConfig


def conditional_denoiser() -> TinyDenoiser:
    """A denoiser that takes the class as a condition, starting as the bundled unconditional one."""
    net = TinyDenoiser(conditions=CONDITIONS)
    net.load_state_dict(load_denoiser().state_dict(), strict=False)
    for parameter in cast(nn.Linear, net.net.condition).parameters():
        nn.init.zeros_(parameter)
    return net


class Controlled(nn.Module):
    """A ControlNet in training beside the bundled flow model, which stays frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.control, flow = TinyControl(), load_flow()
        self.control.load_state_dict(flow.state_dict(), strict=False)
        self.flow = (flow,)  # in a tuple, so that it is neither trained nor saved

    def forward(self, x: Tensor, t: Tensor, given: Tensor, hint: Tensor) -> Tensor:
        flow = self.flow[0].to(x.device)
        return flow(x, t, given[:, None], given, self.control(x, t, given[:, None], hint))

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights under the names that stock loaders expect."""
        return to_diffusers(without_prefix("control", tensors))


class EncodedScenes:
    """Scenes as latents, by number modulo `count`; encoded once and kept in the folder beside the states."""

    def __init__(self, folder: Path, count: int):
        file = folder / f"encoded_{count}.state.safetensors"
        if not file.exists():
            save_tensors(file, _encode(load_autoencoder(folder), count), {"count": count})
        self.count, self.encoded = count, Encoded(**load_tensors(file)[0])

    def __call__(self, numbers: range, size: int) -> Encoded:
        latent, label, hint = (tensor[torch.tensor(numbers) % self.count] for tensor in self.encoded)
        return Encoded(latent.float(), label, hint.float())


@torch.no_grad()
def _encode(net: TinyAutoencoder, count: int, batch: int = 16) -> dict[str, Tensor]:
    first = TRAINING_SEEDS * 100
    parts = [_encode_scenes(net, draw(range(start, start + batch), SIZE)) for start in range(first, first + count, batch)]
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in Encoded._fields}


def _encode_scenes(net: TinyAutoencoder, scenes: Scenes) -> Encoded:
    with torch.autocast("cpu", torch.bfloat16):
        latent, hint = (net.encode(image.contiguous(memory_format=torch.channels_last)).float()
                        for image in (scenes.image, depth_hint(scenes.depth)))
    return Encoded(scale_latent(latent).half(), scenes.label, scale_hint(hint).half())


def source_of(config: TrainConfig, folder: Path) -> Source:
    """Where a training's examples come from."""
    if config.latents:
        return EncodedScenes(folder, config.latents)
    if config.tours:
        return SolvedTours(folder, config.tours, TRAINING_SEEDS * 300, solve)
    if config.ways:
        return TeachersWays(folder, config.ways)
    return draw


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of a step: 200 steps of warm-up, then along a cosine to zero."""
    return config.lr * min((step + 1) / 200, 1) * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def batch_loss(net: nn.Module, loss: Loss, config: TrainConfig, source: Source, device: torch.device, step: int) -> Tensor:
    """Mean loss on the examples of a step, computed in bfloat16: a function of the step alone."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    start = TRAINING_SEEDS * (1 + config.seed) + step * config.batch
    batch = source(range(start, start + config.batch), config.size)
    batch = type(batch)(*(part.to(device) for part in batch))
    with torch.autocast(device.type, torch.bfloat16):
        return loss(net, batch, generator).mean()


class MovingAverage:
    """Averaged weights of a network, and a line of progress now and then; called after every step."""

    def __init__(self, name: str, net: nn.Module, config: TrainConfig, report_every: int):
        self.name, self.config, self.report_every = name, config, report_every
        self.weights = {key: value.detach().clone() for key, value in net.state_dict().items()}
        self.losses: deque[float] = deque(maxlen=report_every)
        self.started, self.done = time.monotonic(), 0

    def __call__(self, step: int, loss: float, parameters: Mapping[str, Tensor]) -> None:
        decay = min(self.config.ema, (1 + step) / (10 + step))
        for name, parameter in parameters.items():
            self.weights[name].lerp_(parameter.detach(), 1 - decay)
        self.losses.append(loss)
        self.done += 1
        if (step + 1) % self.report_every == 0:
            minutes = (time.monotonic() - self.started) / self.done * (self.config.steps - step - 1) / 60
            print(f"{self.name}: step {step + 1} of {self.config.steps}, loss {sum(self.losses) / len(self.losses):.4f}, "
                  f"{minutes:.0f} min to go", flush=True)


def fit(name: str, network: Network, folder: Path, device: torch.device, save_every: int = 250) -> None:
    """Train a network from its config's seed and write the averaged weights to `folder/name.safetensors`.

    An interrupted training resumes from the state file beside it. save_every: steps between states.
    """
    config, state_file = network.config, folder / f"{name}.state.safetensors"
    torch.manual_seed(config.seed)
    net = network.make().to(device).train()
    average = MovingAverage(name, net, config, save_every)
    loss = partial(batch_loss, net, network.loss, config, source_of(config, folder), device)
    about = {"name": name, "recipe": asdict(config)}
    optimize(dict(net.named_parameters()), loss, config.steps, AdamW(partial(learning_rate, config), weight_decay=0.01),
             name, RunOptions(about, state_file, save_every, on_step=average, extra_state=average.weights))
    weights = {key: value.half() for key, value in average.weights.items()} if config.half else average.weights
    save_tensors(folder / f"{name}.safetensors",
                 net.to_file(weights) if isinstance(net, (Controlled, Turbo)) else weights, about)
    state_file.unlink(missing_ok=True)


OUTPUTS = {task: (max(len(labels), 1), TASKS[task].dense) for task, labels in LABELS.items()}
NETWORKS: dict[str, Network] = {
    "denoiser": Network(TinyDenoiser, denoiser_loss, TrainConfig(steps=11_000, ema=0.9995)),
    "conditional_denoiser": Network(conditional_denoiser, conditional_loss,
                                    TrainConfig(steps=2500, lr=5e-4, ema=0.998, seed=7, half=True)),
    "sibling": Network(partial(TinyDenoiser, width=32), denoiser_loss, TrainConfig(steps=690, ema=0.99, half=True)),
    "conditional_sibling": Network(partial(TinyDenoiser, width=32, conditions=CONDITIONS), conditional_loss,
                                   TrainConfig(steps=840, ema=0.99, half=True)),
    "labelmaps": Network(label_map_denoiser, label_map_loss,
                         TrainConfig(steps=2400, batch=32, ema=0.998, seed=9, half=True)),
    "vae/tinyworld_vae": Network(TinyAutoencoder, autoencoder_loss,
                                 TrainConfig(steps=2000, batch=16, size=SIZE, seed=3, half=True)),
    "diffusion_models/tinyworld_flow": Network(TinyFlow, flow_loss, TrainConfig(steps=12_000, batch=128, ema=0.9995, seed=4,
                                                                                latents=16_384, half=True)),
    "controlnet/tinyworld_depth": Network(Controlled, control_loss,
                                          TrainConfig(steps=2500, ema=0.998, seed=6, latents=4096, half=True)),
    "tinyworld_eps": Network(TinyEps, eps_loss, TrainConfig(steps=5000, ema=0.999, seed=5, latents=16_384, half=True)),
    "loras/tinyworld_turbo": Network(Turbo, turbo_loss, TrainConfig(steps=1500, lr=2e-3, ema=0.995, seed=11, half=True,
                                                                    ways=4096)),
    "tours": Network(tour_denoiser, partial(denoiser_loss, p_mean=0.0),
                     TrainConfig(steps=6000, batch=16, size=64, ema=0.998, seed=10, half=True, tours=4096)),
    **{f"guider_{task}": Network(partial(tiny_resnet, *OUTPUTS[task]), partial(task_loss, task),
                                 TrainConfig(steps=3000, seed=1)) for task in LABELS},
    **{f"judge_{task}": Network(partial(tiny_convnext, *OUTPUTS[task]), partial(task_loss, task),
                                TrainConfig(steps=2000, seed=2)) for task in LABELS},
    **{f"second_judge_{task}": Network(partial(TinyTransformer, *OUTPUTS[task]), partial(task_loss, task),
                                       TrainConfig(steps=4000 if task == "class" else 2000, seed=8, half=True))
       for task in LABELS},
}


def home_of(name: str) -> Path:
    """The folder of a bundled file."""
    if name in ("labelmaps", "tours"):
        return PRIORS
    return JUDGES if name.startswith(("judge", "second_judge", "conditional")) else WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which networks, of {', '.join(NETWORKS)}; without any, all")
    parser.add_argument("--folder", type=Path, help="where weights go and are looked for; without it, where they are kept")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in arguments.names or NETWORKS:
        fit(name, NETWORKS[name], arguments.folder or home_of(name), device)


if __name__ == "__main__":
    main()
