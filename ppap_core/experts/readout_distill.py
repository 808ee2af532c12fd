"""Distillation of a readout: its heads learn to say at noisy states what the plain guider says of the finished image.

The denoiser runs once for each kept step of the samples; the heads are then trained on its features alone.
"""
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..guiders.guider import Guider, clean
from ..guiders.latents import LatentSpace
from ..guiders.tasks import TASKS
from ..noise import expand
from ..rng import seeded
from ..training.loop import RunOptions, optimize
from .distill import OnDistillStep
from .lesson import DistillConfig
from .pairs import Pairs, pairs_at, steps_in
from .readout import Features, ReadoutHead, ReadoutNetwork
from .samples import SampleStore

KEPT = torch.bfloat16  # type of features that wait for the training, which has the range of float32
SMALLEST_STD = 1e-6    # of a channel that is always the same


@dataclass(frozen=True)
class FeatureSamples:
    """Generated images, and the denoiser that made them."""

    store: SampleStore
    features: Features  # of the denoiser; `DistillConfig.batch` states are asked for at once
    model: dict = field(default_factory=dict)  # what the features depend on, as JSON values: the denoiser, its conditioning
    space: LatentSpace | None = None  # of what the denoiser diffuses; None for images


def distill_readout(guider: Guider, readout: ReadoutNetwork, samples: FeatureSamples,
                    config: DistillConfig = DistillConfig(), folder: Path | None = None,
                    on_step: OnDistillStep | None = None) -> list[list[float]]:
    """Train every head of a readout, from the cleanest interval to the noisiest, and return their losses.

    guider: the plain one, the teacher. readout: changed in place. config: of each head; a warm start has no meaning here.
    folder: of the state files, from which a stopped distillation resumes; None: nothing is saved. ValueError, before any is
    trained, if a head has no step to learn from.
    """
    lessons = [_Lesson(guider, readout, index, samples, config) for index in range(len(readout.schedule))]
    losses = [lesson.learn(folder, on_step) for lesson in lessons]
    readout.training_info = {"samples": samples.store.manifest, "images": len(samples.store), **samples.model,
                             **config.fingerprint_fields(), "final_losses": [steps[-1] for steps in losses if steps]}
    return losses


class _Lesson:
    """What one head learns from: the steps of its interval, and the features there, computed when they are first needed."""

    def __init__(self, guider: Guider, readout: ReadoutNetwork, index: int, samples: FeatureSamples, config: DistillConfig):
        self.guider, self.readout, self.index, self.samples, self.config = guider, readout, index, samples, config
        self.head: ReadoutHead = readout.head(index)
        self.store = samples.store
        steps = steps_in(self.store, readout.schedule, index)
        if len(steps) == 0:
            raise ValueError(f"no step of the images lies between sigma {readout.schedule[index].lo:.4g} and "
                             f"{readout.schedule[index].hi:.4g}, where head {index} is to learn: generate samples with more "
                             "steps, or use fewer heads")
        self.steps = steps[self.store.sigmas[tuple(steps.T)].argsort()]  # neighbours in noise are computed together
        self.maps: Tensor | None = None

    def learn(self, folder: Path | None, on_step: OnDistillStep | None) -> list[float]:
        parameters: dict[str, Tensor] = dict(self.head.named_parameters())
        options = RunOptions(self.identity(), folder and Path(folder) / f"head_{self.index}.state.safetensors",
                             on_step=on_step and partial(_report, on_step, self.index),
                             extra_state={"mean": self.head.mean, "std": self.head.std})
        try:
            self.head.requires_grad_(True)
            return optimize(parameters, self.loss, self.config.steps, self.config.lr,
                            f"head {self.index} of {self.guider.name}", options)
        finally:
            self.head.requires_grad_(False)

    def identity(self) -> dict:
        """What the training of this head depends on, as JSON values."""
        spec = {**asdict(self.readout.spec), "output": list(self.readout.spec.output)}
        return {"guider": self.guider.name, "fingerprint": self.readout.fingerprint, "index": self.index,
                "edges": list(self.readout.schedule.edges), "spec": spec, "store": self.store.manifest,
                "images": len(self.store), "config": self.config.fingerprint_fields(), **self.samples.model}

    def loss(self, step: int) -> Tensor:
        """Mean distance between the output of the head and the plain guider's on the finished image, ()."""
        if self.maps is None:
            self.maps = self.compute_features()
        chosen = torch.randint(len(self.steps), (self.config.batch,), generator=seeded(self.config.seed, self.index, step))
        teacher = self.teacher(pairs_at(self.store, self.steps[chosen], "noisy").images.to(self.head.mean.device))
        output = output_like(self.head, self.maps[chosen], teacher)
        return TASKS[self.guider.task].distance(output, teacher).mean()

    @torch.no_grad()
    def teacher(self, images: Tensor) -> Tensor:
        output = self.guider.predict(images, clean(images))
        return output / self.config.temperature if TASKS[self.guider.task].is_logits else output

    @torch.no_grad()
    def compute_features(self) -> Tensor:
        """Maps of features at all steps of the interval, (n, D, h, w); the head keeps the spread of each channel."""
        parts = (pairs_at(self.store, part, "noisy") for part in self.steps.split(self.config.batch))
        maps = torch.cat([maps_at(self.readout, self.samples, pairs).to("cpu", KEPT) for pairs in parts])
        self.head.mean.copy_(maps.float().mean((0, 2, 3)))
        self.head.std.copy_(maps.float().std((0, 2, 3)).clamp_min(SMALLEST_STD))
        return maps


def output_like(head: ReadoutHead, maps: Tensor, teacher: Tensor) -> Tensor:
    """Output of a head for maps of features (B, D, h, w), of the size of the teacher's where it is a map."""
    output = head(maps.to(head.mean))
    return F.interpolate(output, teacher.shape[-2:], mode="bilinear") if head.dense else output


def maps_at(readout: ReadoutNetwork, samples: FeatureSamples, pairs: Pairs) -> Tensor:
    """Features that a readout reads at noisy states of the samples, (B, D, h, w)."""
    x = pairs.inputs * (1 + expand(pairs.sigma, pairs.inputs) ** 2).sqrt()
    return readout.as_map(samples.features(x, pairs.sigma))


def _report(on_step: Callable[[int, int, float], None], index: int, step: int, loss: float, _: object) -> None:
    on_step(index, step, loss)
