"""What one expert learns: to give on noisy images the output that the plain network gives on the clean ones they led to."""
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from ..guiders.tasks import TASKS
from ..rng import seeded
from ..training.loop import AdamW, RunOptions, cosine, optimize
from ..training.plateau import Plateau, PlateauRule
from ..training.team import Team
from .bank import ExpertBank, with_experts
from .check import HeldOutCheck
from .fast import fast_output
from .pairs import Pairs, draw_steps, inputs_at, trajectory_pairs
from .read_ahead import ReadAhead
from .samples import BatchSpec, SampleStore
from .teacher import Answers, kept_answers, soften
from .variants import VARIANTS, Variant, variants_for, vary_each

OnCheck = Callable[[int, float, float], None]
"""(expert, agreement of the plain network with the teacher's answers, agreement of the expert) after a check"""

VARIED = 7        # key of the draw of variants among those of a seed
CHECK_EVERY = 50  # steps between two looks at held-out agreement


@dataclass(frozen=True)
class DistillConfig:
    """The training of one expert."""

    steps: int = 1000         # optimiser steps
    batch: int = 32           # images in a step
    lr: float = 1e-3          # first learning rate of AdamW; falls to zero along a cosine
    seed: int = 0
    temperature: float = 1.0  # divides the teacher's logits; 1 changes nothing, below 1 sharpens (the paper: 0.25)
    warm_start: bool = False  # start as the neighbour of less noise ended; else as the plain network
    patience: int = 0         # checks whose mean held-out distance has to fall, or the end comes early; 0: all steps
    fast: bool = False        # the teacher answers once for each image, and in bfloat16 where that is fast; rounds otherwise
    varied: bool = False      # each image also in a mirror and shifted, with what led to it, see `variants_for`

    def fingerprint_fields(self) -> dict[str, object]:
        """Fields for files and `digest`, with the constants by which version 0.1.0 recognises saved work."""
        return {"steps": self.steps, "batch": self.batch, "lr": self.lr, "seed": self.seed, "save_every": 100,
                "temperature": self.temperature, "fresh_noise": False, "warm_start": self.warm_start,
                **({"patience": self.patience} if self.patience else {}),
                **{name: True for name in ("fast", "varied") if getattr(self, name)}}


def uses_warm_start(view: str) -> bool:
    """Whether experts of a view gain from a warm start, as measured in docs/benchmark.md under "improvements"."""
    return view == "noisy"


def distill_loss(guider: Guider, bank: ExpertBank, pairs: Pairs, temperature: float = 1.0) -> Tensor:
    """Distance between the expert's output on its inputs and the plain network's on the clean images, (B,).

    guider: the plain one, the teacher. temperature: divides the teacher's logits, where the task has any; neutral: 1.
    """
    with torch.no_grad():
        teacher = soften(guider, guider.predict(pairs.images, clean(pairs.images)), temperature)
    student = with_experts(guider, bank)
    output = student.predict(student.to_image(pairs.inputs, pairs.sigma), pairs.sigma)
    return TASKS[guider.task].distance(output, teacher)


def sample_batch(bank: ExpertBank, index: int, store: SampleStore, step: int, config: DistillConfig,
                 part: tuple[int, int] = (0, 1)) -> Pairs:
    """The batch of one training step: a pure function of its arguments, so that a resumed run equals one without a stop.

    part: which of how many parts of it, for processes that train together; neutral: (0, 1), the whole.
    """
    batch = batch_spec(config, step, part)
    pairs = trajectory_pairs(store, bank.schedule, index, batch, bank.view)
    variants = variants_of(store, config)
    chosen = draw_variants(variants, index, batch)
    return Pairs(vary_each(pairs.images, variants, chosen), vary_each(pairs.inputs, variants, chosen), pairs.sigma)


def variants_of(store: SampleStore, config: DistillConfig) -> tuple[Variant, ...]:
    """Variants in which an expert sees each image of a store; the first is the image itself."""
    return variants_for(len(store)) if config.varied else VARIANTS[:1]


def draw_variants(variants: Sequence[Variant], index: int, batch: BatchSpec) -> Tensor:
    """Numbers of the variants in which expert `index` sees a batch, (B,) long: a pure function of the arguments."""
    first, parts = batch.part
    generator = seeded(batch.seed, index, batch.step, VARIED)
    return torch.randint(len(variants), (batch.size,), generator=generator)[first::parts]


def distill_expert(guider: Guider, bank: ExpertBank, index: int, store: SampleStore,
                   config: DistillConfig = DistillConfig(), options: RunOptions = RunOptions()) -> list[float]:
    """Train one expert on generated images and return the loss of every step.

    guider: the plain one, the teacher. bank: its expert `index` is changed in place.
    options: run_id is completed by all that the result depends on; on_step gets the weights of the expert by name.
    ValueError if no step of the store lies in the expert's interval.
    """
    return Lesson(guider, bank, index, store, config).learn(options)


class FastBatch(NamedTuple):
    """A batch for one expert, without the images that its inputs led to."""

    numbers: Tensor   # (B,) of the images
    variants: Tensor  # (B,) numbers of the variants of them that the inputs led to
    inputs: Tensor    # (B, C, h, w)
    sigma: Tensor     # (B,), all in the interval of the expert


class Lesson:
    """The training of one expert. answers: the teacher's by number of the image, where they are kept."""

    def __init__(self, guider: Guider, bank: ExpertBank, index: int, store: SampleStore, config: DistillConfig):
        self.guider, self.bank, self.index, self.store, self.config = guider, bank, index, store, config
        self.answers: Answers | None = None
        self.on_check: OnCheck | None = None

    def learn(self, options: RunOptions) -> list[float]:
        """Train the expert and return the loss of every step; the arguments are those of `distill_expert`."""
        config, rate = self.config, AdamW(partial(cosine, self.config.lr, self.config.steps))
        options = options.identified(_run_id(self.guider, self.bank, self.index, self.store, config))
        if config.fast and self.answers is None:
            self.answers = kept_answers(self.guider, self.store, variants_of(self.store, config))
        read = partial(self.read_fast if config.fast else self.read, options.team.part)
        with (torch.inference_mode(False), self.bank.trainable(self.index) as parameters,
              ReadAhead(read, config.steps) as batches):
            weights: dict[str, Tensor] = dict(zip(self.bank.weights(self.index), parameters, strict=True))
            if config.patience:
                plateau = Plateau(PlateauRule(config.steps, CHECK_EVERY, config.patience), config.lr,
                                  partial(options.team.of_first, self.check()), weights)
                rate, options = AdamW(plateau.rate), plateau.added_to(options)
            return optimize(weights, partial(self.mean_loss, options.team, batches), config.steps, rate,
                            f"expert {self.index} of {self.guider.name}", options)

    def mean_loss(self, team: Team, batches: ReadAhead, step: int) -> Tensor:
        """Mean loss of a step over the processes of a team."""
        return team.mean((self.fast_loss if self.config.fast else self.loss)(batches(step)), step)

    def read(self, part: tuple[int, int], step: int) -> Pairs:
        """Part of the batch of a step."""
        return sample_batch(self.bank, self.index, self.store, step, self.config, part)

    def read_fast(self, part: tuple[int, int], step: int) -> "FastBatch":
        """Part of the batch of a step."""
        batch = batch_spec(self.config, step, part)
        steps = draw_steps(self.store, self.bank.schedule, self.index, batch)
        inputs, sigma = inputs_at(self.store, steps, self.bank.view)
        variants = variants_of(self.store, self.config)
        chosen = draw_variants(variants, self.index, batch)
        return FastBatch(steps[:, 0], chosen, vary_each(inputs, variants, chosen), sigma)

    def loss(self, pairs: Pairs) -> Tensor:
        """Losses (B,) on a batch, to which the plain network answers anew."""
        return distill_loss(self.guider, self.bank, pairs.to(self.device), self.config.temperature)

    def fast_loss(self, batch: "FastBatch") -> Tensor:
        """Losses (B,) on a batch, by the kept answers."""
        assert self.answers
        inputs, sigma = batch.inputs.to(self.device), batch.sigma.to(self.device)
        teacher = soften(self.guider, self.answers(batch.numbers, batch.variants), self.config.temperature)
        student = with_experts(self.guider, self.bank)
        return TASKS[self.guider.task].distance(fast_output(student, student.to_image(inputs, sigma), sigma), teacher)

    @property
    def device(self) -> torch.device:
        """The device of the experts."""
        return next(self.bank.parameters()).device

    def check(self) -> Callable[[], float]:
        """Measures how near held-out answers are, higher is better, and tells `on_check` how often they agree."""
        check = HeldOutCheck(self.guider, self.bank, self.index, self.store, self.config.temperature)
        return partial(_checked, check, self.index, self.on_check)


def _checked(check: HeldOutCheck, index: int, on_check: OnCheck | None) -> float:
    expert = check()
    if on_check:
        on_check(index, check.plain().agreement, expert.agreement)
    return -expert.distance


def batch_spec(config: DistillConfig, step: int, part: tuple[int, int] = (0, 1)) -> BatchSpec:
    """Which random batch a training step learns from. part: which of how many parts of it; neutral: (0, 1), the whole."""
    return BatchSpec(step, config.batch, config.seed, part)


def _run_id(guider: Guider, bank: ExpertBank, index: int, store: SampleStore, config: DistillConfig) -> dict:
    settings = {key: value for key, value in config.fingerprint_fields().items() if key not in ("save_every", "warm_start")}
    return {"guider": guider.name, "fingerprint": bank.fingerprint, "index": index, "edges": list(bank.schedule.edges),
            "view": bank.view, "space": bank.space_name, "lora": {**asdict(bank.lora), "targets": list(bank.lora.targets)},
            "store": store.manifest, "images": len(store), "config": settings,
            **({"start": "neighbour"} if config.warm_start and index else {})}
