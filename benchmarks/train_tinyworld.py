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
from torch.nn import functional as F

from examples.priors.label_maps import to_points
from examples.priors.networks import WEIGHTS as PRIORS
from examples.priors.networks import label_map_denoiser, tour_denoiser
from examples.priors.salesman import solve
from examples.priors.tours import SolvedTours
from ppap_core import Denoiser, to_vp
from ppap_core.guiders.tasks import TASKS, cross_entropy, pixel_cross_entropy
from ppap_core.io.files import load_tensors, save_tensors, without_prefix
from ppap_core.noise import PIXEL_SIGMA_DATA, expand
from ppap_core.tinyworld.latents import (
    SCALE,
    SIZE,
    SPACE,
    Encoded,
    TinyEps,
    depth_hint,
    load_autoencoder,
    load_flow,
    scale_hint,
    scale_latent,
    timestep_sigmas,
)
from ppap_core.tinyworld.loaders import CONDITIONS, LABELS, WEIGHTS, condition, load_denoiser
from ppap_core.tinyworld.networks.autoencoder import SHRINK, TinyAutoencoder
from ppap_core.tinyworld.networks.classifiers import tiny_resnet
from ppap_core.tinyworld.networks.denoiser import TinyDenoiser
from ppap_core.tinyworld.networks.flow import TinyControl, TinyFlow, to_diffusers
from ppap_core.tinyworld.scenes import Scenes, draw, truth
from ppap_core.training.loop import AdamW, RunOptions, optimize

from .judges import TinyTransformer, augment, tiny_convnext
from .networks import WEIGHTS as JUDGES

TRAINING_SEEDS = 10_000_000  # scenes below this number are never trained on


Loss = Callable[[Any, Any, torch.Generator], Tensor]
"""(network, a batch of its source, generator) -> losses (B,)"""

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


def conditional_loss(net: nn.Module, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """`denoiser_loss` with the class as a condition, dropped for some scenes, (B,)."""
    given = label_dropout(scenes.label, generator)
    return denoiser_loss(lambda x, sigma: net(x, sigma, given), scenes, generator)


def denoiser_loss(net: Denoiser, scenes: Scenes, generator: torch.Generator, p_mean: float = -0.5) -> Tensor:
    """EDM's loss (Karras et al. 2022, eq. 8), by default with more weight where a scene's shape is decided, (B,).

    p_mean: mean of log sigma.
    """
    image = scenes.image
    sigma = (torch.randn(len(image), generator=generator) * 1.2 + p_mean).exp().to(image.device)
    noise = torch.randn(image.shape, generator=generator).to(image.device)
    error = net(image + sigma[:, None, None, None] * noise, sigma).float() - image
    weight = (sigma**2 + PIXEL_SIGMA_DATA**2) / (sigma * PIXEL_SIGMA_DATA) ** 2
    return weight * error.square().mean(dim=(1, 2, 3))


def label_map_loss(net: Denoiser, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """`denoiser_loss` on one-hot label maps, P_mean 0.9: their shape is decided at more noise, (B,)."""
    return denoiser_loss(net, scenes._replace(image=to_points(scenes.segmentation)), generator, p_mean=0.9)


def absolute_error(depth: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of depth maps (B, 1, h, w), (B,)."""
    return (depth.float() - wanted).abs().flatten(1).mean(1)


LOSSES = {"class": cross_entropy, "depth": absolute_error, "segmentation": pixel_cross_entropy}  # (output, truth) -> (B,)


def task_loss(task: str, net: nn.Module, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Loss of a network's outputs on scenes, augmented as in the training of real networks, (B,)."""
    return LOSSES[task](net(augment(scenes.image, generator)), truth(scenes, task))


CROP = 64  # side of what an autoencoder is trained on: its convolutions are the same everywhere


def autoencoder_loss(net: TinyAutoencoder, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Error of the image decoded from a slightly noisy latent, and of the latent's linear colours, (B,)."""
    top, left = torch.randint((SIZE - CROP) // SHRINK + 1, (2,), generator=generator).tolist()
    image = scenes.image[..., SHRINK * top:SHRINK * top + CROP, SHRINK * left:SHRINK * left + CROP]
    latent = net.encode(image.contiguous(memory_format=torch.channels_last)).float()
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    error = net.decode(latent + 0.1 / SCALE * noise).float() - image
    color_error = SPACE.colors(scale_latent(latent)) - F.avg_pool2d(image, SHRINK)
    parts = (error.abs(), error.square(), 0.25 * color_error.square(), 0.01 * scale_latent(latent).square())
    return torch.stack([part.flatten(1).mean(1) for part in parts]).sum(0)


def flow_loss(net: nn.Module, scenes: Encoded, generator: torch.Generator) -> Tensor:
    """Error of the velocity at logit-normal times (Esser et al. 2024, section 3.1), (B,)."""
    given = label_dropout(scenes.label, generator)
    x, t, target = flow_state(scenes.latent, generator)
    return (net(x, t, given[:, None], given).float() - target).square().flatten(1).mean(1)


def flow_state(latent: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A noisy state, its time (B,), and the velocity there."""
    t = (torch.randn(len(latent), generator=generator) + 0.5).sigmoid().to(latent)
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    return (1 - expand(t, latent)) * latent + expand(t, latent) * noise, t, noise - latent


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


def control_loss(net: nn.Module, scenes: Encoded, generator: torch.Generator) -> Tensor:
    """Error of the flow model's velocity with the ControlNet, (B,)."""
    x, t, target = flow_state(scenes.latent, generator)
    velocity = net(x, t, label_dropout(scenes.label, generator, 0.5), scenes.hint)
    return (velocity.float() - target).square().flatten(1).mean(1)


def eps_loss(net: nn.Module, scenes: Encoded, generator: torch.Generator) -> Tensor:
    """Error of the noise at timesteps drawn evenly (Ho et al. 2020, eq. 14), (B,)."""
    latent, given = scenes.latent, label_dropout(scenes.label, generator)
    timestep = torch.randint(1000, (len(latent),), generator=generator)
    sigma = timestep_sigmas()[timestep].to(latent)
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    output = net(to_vp(latent + expand(sigma, latent) * noise, sigma), timestep.to(latent), given)
    return (output.float() - noise).square().flatten(1).mean(1)


def label_dropout(label: Tensor, generator: torch.Generator, share: float = 1 / 7) -> Tensor:
    """The condition of each scene, (B, CONDITIONS), and none for a share of them, so that the model learns to do without."""
    without = torch.rand(len(label), generator=generator) < share
    return condition(label.masked_fill(without.to(label.device), -1))


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
    save_tensors(folder / f"{name}.safetensors", net.to_file(weights) if isinstance(net, Controlled) else weights, about)
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
