"""Train every weight of the tiny world from fixed seeds: python -m benchmarks.train_tinyworld [name ...]

Runs on a GPU when there is one and on the CPU when not, and goes on where it was stopped.
"""
import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.priors.label_maps import as_points
from examples.priors.networks import WEIGHTS as PRIORS
from examples.priors.networks import label_map_denoiser, tour_denoiser
from examples.priors.salesman import solve
from examples.priors.tours import solved_tours
from ppap_core.guiders.tasks import TASKS, cross_entropy, pixel_cross_entropy
from ppap_core.io.files import (
    load_tensors,
    optimizer_tensors,
    restore_optimizer,
    save_tensors,
    with_prefix,
    without_prefix,
)
from ppap_core.noise import PIXEL_SIGMA_DATA, expand, to_vp
from ppap_core.sampling import Denoiser
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

from .judges import TinyTransformer, augment, tiny_convnext
from .networks import WEIGHTS as JUDGES

TRAINING_SEEDS = 10_000_000  # scenes below this number are never trained on


@dataclass(frozen=True)
class Recipe:
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


def conditional_denoiser() -> TinyDenoiser:
    """A denoiser that can be told the class. It starts as the bundled one, which was told nothing."""
    net = TinyDenoiser(conditions=CONDITIONS)
    net.load_state_dict(load_denoiser().state_dict(), strict=False)
    nn.init.zeros_(net.net.condition.weight)
    nn.init.zeros_(net.net.condition.bias)
    return net


def conditional_loss(net: nn.Module, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """The denoiser's loss with the class told or not, (B,)."""
    given = label_dropout(scenes.label, generator)
    return denoiser_loss(lambda x, sigma: net(x, sigma, given), scenes, generator)


def denoiser_loss(net: Denoiser, scenes: Scenes, generator: torch.Generator, middle: float = -0.5) -> Tensor:
    """EDM's loss (Karras et al. 2022, eq. 8) with more weight where a scene's shape is decided, (B,)."""
    image = scenes.image
    sigma = (torch.randn(len(image), generator=generator) * 1.2 + middle).exp().to(image.device)
    noise = torch.randn(image.shape, generator=generator).to(image.device)
    error = net(image + sigma[:, None, None, None] * noise, sigma).float() - image
    weight = (sigma**2 + PIXEL_SIGMA_DATA**2) / (sigma * PIXEL_SIGMA_DATA) ** 2
    return weight * error.square().mean(dim=(1, 2, 3))


def label_map_loss(net: Denoiser, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """The same of label maps without their images; which shape it is, is decided at more noise, (B,)."""
    return denoiser_loss(net, scenes._replace(image=as_points(scenes.segmentation)), generator, middle=0.9)


def absolute_error(depth: Tensor, wanted: Tensor) -> Tensor:
    """(B, 1, h, w) and the same -> (B,)."""
    return (depth.float() - wanted).abs().flatten(1).mean(1)


LOSSES = {"class": cross_entropy, "depth": absolute_error, "segmentation": pixel_cross_entropy}  # (answer, truth) -> (B,)


def answer_loss(task: str, net: nn.Module, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Of a network's answers on scenes, seen as real networks see them in training, (B,)."""
    return LOSSES[task](net(augment(scenes.image, generator)), truth(scenes, task))


CROP = 64  # side of what an autoencoder is trained on: its convolutions know no place


def autoencoder_loss(net: nn.Module, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """Error of the image after a slight noise on its latent, and of the latent's colours, (B,)."""
    top, left = torch.randint((SIZE - CROP) // SHRINK + 1, (2,), generator=generator).tolist()
    image = scenes.image[..., SHRINK * top:SHRINK * top + CROP, SHRINK * left:SHRINK * left + CROP]
    latent = net.encode(image.contiguous(memory_format=torch.channels_last)).float()
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    error = net.decode(latent + 0.1 / SCALE * noise).float() - image
    off = SPACE.colors(scale_latent(latent)) - F.avg_pool2d(image, SHRINK)
    parts = (error.abs(), error.square(), 0.25 * off.square(), 0.01 * scale_latent(latent).square())
    return sum(part.flatten(1).mean(1) for part in parts)


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
    """The ControlNet in training beside the bundled flow model, which stays as it is."""

    def __init__(self):
        super().__init__()
        self.control, flow = TinyControl(), load_flow()
        self.control.load_state_dict(flow.state_dict(), strict=False)
        self.flow = (flow,)  # no part of what is trained and saved

    def forward(self, x: Tensor, t: Tensor, given: Tensor, hint: Tensor) -> Tensor:
        flow = self.flow[0].to(x.device)
        return flow(x, t, given[:, None], given, self.control(x, t, given[:, None], hint))

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights as stock loaders know them."""
        return to_diffusers(without_prefix("control", tensors))


def control_loss(net: nn.Module, scenes: Encoded, generator: torch.Generator) -> Tensor:
    """The flow model's error under control, (B,)."""
    x, t, target = flow_state(scenes.latent, generator)
    velocity = net(x, t, label_dropout(scenes.label, generator, 0.5), scenes.hint)
    return (velocity.float() - target).square().flatten(1).mean(1)


def eps_loss(net: nn.Module, scenes: Encoded, generator: torch.Generator) -> Tensor:
    """Error of the noise at timesteps drawn evenly (Ho et al. 2020, eq. 14), (B,)."""
    latent, given = scenes.latent, label_dropout(scenes.label, generator)
    timestep = torch.randint(1000, (len(latent),), generator=generator)
    sigma = timestep_sigmas()[timestep].to(latent)
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    found = net(to_vp(latent + expand(sigma, latent) * noise, sigma), timestep.to(latent), given)
    return (found.float() - noise).square().flatten(1).mean(1)


def label_dropout(label: Tensor, generator: torch.Generator, share: float = 1 / 7) -> Tensor:
    """The condition of each scene, for a share of them none: the model learns to do without, (B, CONDITIONS)."""
    without = torch.rand(len(label), generator=generator) < share
    return condition(label.masked_fill(without.to(label.device), -1))


def encoded_scenes(folder: Path, count: int) -> Callable[[range, int], Encoded]:
    """Scenes as latents, by number; encoded once and kept in the folder, as states are."""
    file = folder / f"encoded_{count}.state.safetensors"
    if not file.exists():
        net = load_autoencoder(folder)
        save_tensors(file, _encode(net, count), {"count": count})
    tensors, _ = load_tensors(file)
    tensors = [tensors[name] for name in Encoded._fields]

    def take(seeds: range, size: int) -> Encoded:
        latent, label, hint = (tensor[torch.tensor(seeds) % count] for tensor in tensors)
        return Encoded(latent.float(), label, hint.float())
    return take


@torch.no_grad()
def _encode(net: nn.Module, count: int, batch: int = 16) -> dict[str, Tensor]:
    found, first = [], TRAINING_SEEDS * 100

    def encode(image: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net.encode(image.contiguous(memory_format=torch.channels_last)).float()
    for start in range(first, first + count, batch):
        scenes = draw(range(start, start + batch), SIZE)
        found.append(Encoded(scale_latent(encode(scenes.image)).half(), scenes.label,
                             scale_hint(encode(depth_hint(scenes.depth))).half()))
    return {name: torch.cat(parts) for name, parts in zip(Encoded._fields, zip(*found, strict=True), strict=True)}


def rate(step: int, recipe: Recipe) -> float:
    """Learning rate of a step."""
    return recipe.lr * min((step + 1) / 200, 1) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def train_step(net: nn.Module, loss: Callable, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int,
               source: Callable[[range, int], NamedTuple], device: torch.device) -> float:
    """One step on the next scenes of a source: a function of (recipe, step); returns the loss."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    start = TRAINING_SEEDS * (1 + recipe.seed) + step * recipe.batch
    scenes = source(range(start, start + recipe.batch), recipe.size)
    scenes = type(scenes)(*(part.to(device) for part in scenes))
    optimizer.param_groups[0]["lr"] = rate(step, recipe)
    with torch.autocast(device.type, torch.bfloat16):
        value = loss(net, scenes, generator).mean()
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()


def update_average(average: dict[str, Tensor], net: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the present ones."""
    for name, current in net.state_dict().items():
        if current.is_floating_point():
            average[name].lerp_(current, 1 - decay)
        else:
            average[name].copy_(current)  # counters of batch norm


def resume(state_file: Path, net: nn.Module, average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put back what an interrupted training left; returns the next step."""
    if not state_file.exists():
        return 0
    tensors, about = load_tensors(state_file)
    net.load_state_dict(without_prefix("net", tensors))
    for name, value in without_prefix("average", tensors).items():
        average[name].copy_(value)
    restore_optimizer(optimizer, without_prefix("optimizer", tensors))
    return about["step"]


def fit(name: str, net: nn.Module, loss: Callable, recipe: Recipe, folder: Path, device: torch.device,
        save_every: int = 250) -> None:
    """Train a network on fresh scenes and write `folder/name.safetensors`; goes on from its state file."""
    state_file = folder / f"{name}.state.safetensors"
    net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=0.01)
    average = {key: value.detach().clone() for key, value in net.state_dict().items()}
    first = resume(state_file, net, average, optimizer)
    source = encoded_scenes(folder, recipe.latents) if recipe.latents else draw
    if recipe.tours:
        source = solved_tours(folder, recipe.tours, TRAINING_SEEDS * 300, solve)
    started, losses = time.monotonic(), []
    for step in range(first, recipe.steps):
        losses.append(train_step(net, loss, optimizer, recipe, step, source, device))
        update_average(average, net, min(recipe.ema, (1 + step) / (10 + step)))
        if (step + 1) % save_every == 0:
            pace = (time.monotonic() - started) / len(losses)
            print(f"{name}: step {step + 1} of {recipe.steps}, loss {sum(losses[-save_every:]) / save_every:.4f}, "
                  f"{pace * (recipe.steps - step - 1) / 60:.0f} min to go", flush=True)
            save_tensors(state_file, with_prefix("net", net.state_dict()) | with_prefix("average", average)
                         | with_prefix("optimizer", optimizer_tensors(optimizer)), {"step": step + 1})
    if recipe.half:
        average = {key: value.half() for key, value in average.items()}
    if isinstance(net, Controlled):
        average = net.to_file(average)
    save_tensors(folder / f"{name}.safetensors", average, {"name": name, "recipe": asdict(recipe)})
    state_file.unlink(missing_ok=True)


OUTPUTS = {task: (max(len(labels), 1), TASKS[task].dense) for task, labels in LABELS.items()}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable, Recipe]] = {
    "denoiser": (TinyDenoiser, denoiser_loss, Recipe(steps=11_000, ema=0.9995)),
    "conditional_denoiser": (conditional_denoiser, conditional_loss, Recipe(steps=2500, lr=5e-4, ema=0.998, seed=7,
                                                                            half=True)),
    "sibling": (partial(TinyDenoiser, width=32), denoiser_loss, Recipe(steps=690, ema=0.99, half=True)),
    "conditional_sibling": (partial(TinyDenoiser, width=32, conditions=CONDITIONS), conditional_loss,
                            Recipe(steps=840, ema=0.99, half=True)),
    "labelmaps": (label_map_denoiser, label_map_loss, Recipe(steps=2400, batch=32, ema=0.998, seed=9, half=True)),
    "vae/tinyworld_vae": (TinyAutoencoder, autoencoder_loss, Recipe(steps=2000, batch=16, size=SIZE, seed=3, half=True)),
    "diffusion_models/tinyworld_flow": (TinyFlow, flow_loss, Recipe(steps=12_000, batch=128, ema=0.9995, seed=4,
                                                                    latents=16_384, half=True)),
    "controlnet/tinyworld_depth": (Controlled, control_loss, Recipe(steps=2500, ema=0.998, seed=6, latents=4096,
                                                                    half=True)),
    "tinyworld_eps": (TinyEps, eps_loss, Recipe(steps=5000, ema=0.999, seed=5, latents=16_384, half=True)),
    "tours": (tour_denoiser, partial(denoiser_loss, middle=0.0),
              Recipe(steps=6000, batch=16, size=64, ema=0.998, seed=10, half=True, tours=4096)),
    **{f"guider_{task}": (partial(tiny_resnet, *OUTPUTS[task]), partial(answer_loss, task), Recipe(steps=3000, seed=1))
       for task in LABELS},
    **{f"judge_{task}": (partial(tiny_convnext, *OUTPUTS[task]), partial(answer_loss, task), Recipe(steps=2000, seed=2))
       for task in LABELS},
    **{f"second_judge_{task}": (partial(TinyTransformer, *OUTPUTS[task]), partial(answer_loss, task),
                               Recipe(steps=4000 if task == "class" else 2000, seed=8, half=True))
       for task in LABELS},
}


def home_of(name: str) -> Path:
    """The folder in which a bundled file is kept."""
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
        make, loss, recipe = NETWORKS[name]
        torch.manual_seed(recipe.seed)
        fit(name, make(), loss, recipe, arguments.folder or home_of(name), device)


if __name__ == "__main__":
    main()
