"""The guiders of the benchmark: plain, distilled on the model's own images, or trained with the labels of scenes."""
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ppap_core.experts.bank import ExpertBank, LoraSpec, base_network, with_experts
from ppap_core.experts.distill import DistillConfig, distill, distill_loss
from ppap_core.experts.samples import BatchSpec, Pairs, SampleStore, trajectory_pairs
from ppap_core.guiders.guider import Guider
from ppap_core.guiders.tasks import TASKS
from ppap_core.io.files import load_tensors, read_json, save_tensors, write_json
from ppap_core.noise import expand, to_vp
from ppap_core.rng import seeded
from ppap_core.schedules import ExpertSchedule
from ppap_core.tinyworld.scenes import draw, truth

from . import ppap_reference
from .fresh_noise import fresh_pairs
from .tiny_world import TinyWorld, generate_store
from .train_tinyworld import LOSSES

Report = Callable[[str], None]
LABELLED = 500_000_000  # scenes from this number on are for training with labels


COSTS = ("trainable_share", "training_images", "training_minutes")


@dataclass(frozen=True)
class Training:
    """How the guider of a row came to be. Without edges it is the plain one."""

    view: str = "denoised"
    edges: tuple[float, ...] = ()
    labels: bool = False           # of fresh scenes; else the plain network's answers on the model's own images
    whole: bool = False            # all weights, one network for each interval; else LoRA on one frozen network
    rank: int = 2
    ranks: tuple[int, ...] = ()    # of each expert where they differ, none above `rank`
    targets: tuple[str, ...] = ()  # names of the adapted layers; none: the default of LoraSpec
    images: int = 4096             # generated images to distil from
    fresh_noise: bool = False      # the paper's pairs; else the trajectories of the images
    guided: float = 0.0            # balanced weight of the plain guider, aimed at any class, while they are generated
    steps: int = 1000              # for each interval
    batch: int = 64
    lr: float = 2e-3
    temperature: float = 1.0
    jitter: float = 0.0            # noise on what is seen
    warm_start: bool = False       # each expert starts as its neighbour below, not as the plain network
    draws: int = 1                 # of noise for each answer of the teacher, in the noisy view
    features: float = 0.0          # weight of the features before the head in the loss
    original: bool = False         # as the original's code does it; of the above only images, steps, batch and lr count


class Networks(nn.Module):
    """One whole network for each interval: what a bank avoids, here as the upper reference."""

    def __init__(self, net: nn.Module, schedule: ExpertSchedule):
        super().__init__()
        self.nets, self.schedule = nn.ModuleList(deepcopy(net) for _ in range(len(schedule))), schedule

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        return self.nets[self.schedule.index(float(sigma[0]))](image)


def make_guider(world: TinyWorld, training: Training, steps: int, folder: Path, report: Report) -> tuple[Guider, dict]:
    """The world's guider after a training, and what it cost; what the folder holds already is not done again.

    steps: of the sampler that makes the images to distil from.
    """
    if not training.edges and not training.original:
        return replace(world.guider, view=training.view), dict.fromkeys(COSTS, 0)
    schedule = ppap_reference.schedule() if training.original else ExpertSchedule(tuple(training.edges))
    folder = folder / f"{world.guider.task}_{config_hash(changes(training) | {'of': steps})}"
    lora = LoraSpec(ppap_reference.RANK, ppap_reference.ALPHA) if training.original else \
        LoraSpec(training.rank, training.rank, tuple(training.targets))
    net = Networks(base_network(world.guider), schedule) if training.whole else \
        ExpertBank(base_network(world.guider), schedule, lora, "noisy" if training.original else training.view)
    if training.ranks:
        narrow(net, training.ranks)
    net.to(world.device)
    about, on_step = folder / "about.json", progress(schedule, training, report)
    store = None if training.labels else generate_store(
        world, folder.parent / f"samples_{steps}_{training.images}", training.images, steps, report, training.guided)
    started = time.monotonic()
    if store is None:
        learn(net, training, folder, partial(label_loss, world, net, training), on_step)
    else:
        train_experts(world, net, training, store, folder, on_step)
    if not about.exists():
        share = 1.0 if training.whole else net.trainable_share()
        share *= sum(training.ranks) / len(training.ranks) / training.rank if training.ranks else 1
        images = len(store) if store else training.steps * training.batch * len(schedule)
        write_json(about, dict(zip(COSTS, (share, images, (time.monotonic() - started) / 60), strict=True)))
    guider = replace(world.guider, net=net, view=training.view) if training.whole else with_experts(world.guider, net)
    return guider, read_json(about)


def narrow(bank: ExpertBank, ranks: Sequence[int]) -> None:
    """Leave each expert only so much of its rank: rows that start at zero on both sides of an adapter never learn."""
    for index, rank in enumerate(ranks):
        weights = {name: weight.clone() for name, weight in bank.weights(index).items()}
        for name, weight in weights.items():
            if ".lora_A" in name:
                weight[rank:] = 0
        bank.load(index, weights)


def train_experts(world: TinyWorld, bank: ExpertBank, training: Training, store: SampleStore, folder: Path,
           on_step: Callable[[int, int, float], None]) -> None:
    """Distil the experts as the core does, or in one of the ways that are here to be compared with it."""
    if training.original:
        def loss(pairs: Pairs) -> Tensor:
            return distill_loss(world.guider, bank, pairs.to(world.device), ppap_reference.TEMPERATURE)
        return ppap_reference.distill(bank, store, loss, training.steps, training.batch, training.lr,
                                      folder / "bank.safetensors", on_step)
    if training.features or training.jitter or training.draws > 1 or training.fresh_noise:
        loss = features_loss if training.features else jitter_loss if training.jitter else \
            draws_loss if training.draws > 1 else fresh_noise_loss
        return learn(bank, training, folder, partial(loss, world, bank, training, store), on_step)
    config = DistillConfig(training.steps, training.batch, training.lr, temperature=training.temperature,
                           warm_start=training.warm_start)
    distill(world.guider, bank, store, config, folder, on_step)


def learn(net: nn.Module, training: Training, folder: Path, loss: Callable[[int, int], Tensor],
          on_step: Callable[[int, int, float], None]) -> None:
    """Train a network or an adapter for each interval to lower loss(interval, step)."""
    for index in range(len(net.schedule)):
        file = folder / f"weights_{index}.safetensors"
        part = net.nets[index] if training.whole else None
        if not file.exists():
            if training.warm_start and index:
                net.load(index, net.weights(index - 1))
            with torch.enable_grad(), trainable(net, index) as parameters:
                optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=0.0)
                rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
                for step in range(training.steps):
                    value = loss(index, step).mean()
                    optimizer.zero_grad()
                    value.backward()
                    optimizer.step()
                    rates.step()
                    on_step(index, step, value.item())
            save_tensors(file, part.state_dict() if part else net.weights(index), {"interval": index})
        tensors = load_tensors(file)[0]
        part.load_state_dict(tensors) if part else net.load(index, tensors)


def label_loss(world: TinyWorld, net: nn.Module, training: Training, index: int, step: int) -> Tensor:
    """Of the answers for fresh noisy scenes, whose truth is exact, (B,)."""
    first = LABELLED + (index * training.steps + step) * training.batch
    scenes, generator = draw(range(first, first + training.batch)), seeded(LABELLED, index, step)
    sigma = net.schedule[index].sample(training.batch, generator)
    noisy = scenes.image + expand(sigma, scenes.image) * torch.randn(scenes.image.shape, generator=generator)
    noisy, sigma = noisy.to(world.device), sigma.to(world.device)
    seen = to_vp(noisy, sigma) if training.view == "noisy" else world.denoise(noisy, sigma)
    answer = replace(world.guider, net=net).predict(seen, sigma)
    return LOSSES[world.guider.task](answer, truth(scenes, world.guider.task).to(world.device))


def fresh_noise_loss(world: TinyWorld, bank: ExpertBank, training: Training, store: SampleStore, index: int,
                     step: int) -> Tensor:
    """Distillation from the paper's pairs, (B,)."""
    view = to_vp if bank.view == "noisy" else world.denoise
    pairs = fresh_pairs(store, bank.schedule, index, BatchSpec(step, training.batch), view, world.device)
    return distill_loss(world.guider, bank, pairs, training.temperature)


def draws_loss(world: TinyWorld, bank: ExpertBank, training: Training, store: SampleStore, index: int, step: int) -> Tensor:
    """Distillation with several draws of noise for each answer of the teacher, noisy view, (B,)."""
    generator, count = seeded(0, index, step), training.batch // training.draws
    images = store.random_images(BatchSpec(step, count, index * 2**64)).to(world.device)
    sigma = bank.schedule[index].sample(count * training.draws, generator).to(world.device)
    teacher, repeated = (each.repeat_interleave(training.draws, 0) for each in (world.answer(images), images))
    noise = torch.randn(repeated.shape, generator=generator).to(world.device)
    seen = to_vp(repeated + expand(sigma, repeated) * noise, sigma)
    return TASKS[world.guider.task].distance(with_experts(world.guider, bank).predict(seen, sigma), teacher)


def jitter_loss(world: TinyWorld, bank: ExpertBank, training: Training, store: SampleStore, index: int, step: int) -> Tensor:
    """Distillation with noise on what is seen, as large as `jitter` at high noise and less at low, (B,)."""
    pairs = trajectory_pairs(store, bank.schedule, index, BatchSpec(step, training.batch), training.view)
    noise = torch.randn(pairs.inputs.shape, generator=seeded(0, index, step, 1))
    pairs = pairs._replace(inputs=pairs.inputs + training.jitter * to_vp(expand(pairs.sigma, noise) * noise, pairs.sigma))
    return distill_loss(world.guider, bank, pairs.to(world.device))


def features_loss(world: TinyWorld, bank: ExpertBank, training: Training, store: SampleStore, index: int, step: int) -> Tensor:
    """Distillation of the features before the head beside the answers, (B,)."""
    pairs = trajectory_pairs(store, bank.schedule, index, BatchSpec(step, training.batch), training.view).to(world.device)
    prepare, base = world.guider.preprocess, base_network(world.guider)
    with torch.no_grad():
        wanted = base.features(prepare(pairs.images))
    bank.select(index)
    found = bank.net.features(prepare(pairs.inputs))
    off = (found - wanted).square().mean(1) / wanted.square().mean(1)
    return distill_loss(world.guider, bank, pairs) + training.features * off


@contextmanager
def trainable(net: nn.Module, index: int) -> Iterator[list[nn.Parameter]]:
    """The parameters of one interval, with requires_grad on."""
    if isinstance(net, ExpertBank):
        with net.trainable(index) as parameters:
            yield parameters
    else:
        yield list(net.nets[index].requires_grad_(True).parameters())
        net.requires_grad_(False)


def progress(schedule: ExpertSchedule, training: Training, report: Report) -> Callable[[int, int, float], None]:
    """A line now and then."""
    def on_step(index: int, step: int, loss: float) -> None:
        if (step + 1) % 100 == 0:
            report(f"interval {index + 1} of {len(schedule)}, step {step + 1} of {training.steps}, loss {loss:.4f}")
    return on_step


def changes(training: Training) -> dict:
    """What differs from the defaults: the name of a training does not change when it learns a new option."""
    return {each.name: getattr(training, each.name) for each in fields(training)
            if getattr(training, each.name) != each.default}


def config_hash(value: dict) -> str:
    """A short name for plain values, the same in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
