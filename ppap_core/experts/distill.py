"""Data-free distillation: experts learn to give on noisy images the output that the plain network gives on clean ones.

Knowledge transfer of PPAP (Go et al. 2023). The paper puts fresh noise on finished images; here an expert sees the steps
that the model took on its way to an image, and so learns where a trajectory leads.
"""
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from ..guiders.tasks import TASKS
from ..io.hashing import fingerprint_state
from ..training.loop import AdamW, RunOptions, cosine, optimize
from ..training.plateau import Plateau, PlateauRule
from ..training.state import steps_done
from ..training.team import Team
from .bank import ExpertBank, with_experts
from .check import AgreementCheck
from .fast import fast_output
from .processes import SINGLE, Crew, assign
from .samples import BatchSpec, Pairs, SampleStore, draw_steps, inputs_at, trajectory_pairs
from .teacher import TeacherAnswers, answer, kept_answers

log = logging.getLogger(__name__)

OnDistillStep = Callable[[int, int, float], None]
"""(expert, step, loss) after every step; may raise to stop, and the state is saved."""

OnCheck = Callable[[int, float, float], None]
"""(expert, agreement of the plain network with the teacher's answers, agreement of the expert) after a check"""

CHECK_EVERY = 50   # steps between two looks at held-out agreement
TIMED = 6          # steps that are timed for an estimate, of which the first warms up
TIMING = 4.0       # seconds after which they are enough


@dataclass(frozen=True)
class DistillConfig:
    """The training of one expert."""

    steps: int = 1000         # optimiser steps
    batch: int = 32           # images in a step
    lr: float = 1e-3          # first learning rate of AdamW; falls to zero along a cosine
    seed: int = 0
    temperature: float = 1.0  # divides the teacher's logits; 1 changes nothing, below 1 sharpens (the paper: 0.25)
    warm_start: bool = False  # start as the neighbour of less noise ended; else as the plain network
    patience: int = 0         # checks whose mean held-out agreement has to rise, or the end comes early; 0: all steps
    fast: bool = False        # the teacher answers once for each image, and in bfloat16 where that is fast; rounds otherwise

    def fingerprint_fields(self) -> dict[str, object]:
        """Fields for files and `digest`, with the constants by which version 0.1.0 recognises saved work."""
        return {"steps": self.steps, "batch": self.batch, "lr": self.lr, "seed": self.seed, "save_every": 100,
                "temperature": self.temperature, "fresh_noise": False, "warm_start": self.warm_start,
                **({"patience": self.patience} if self.patience else {}), **({"fast": True} if self.fast else {})}


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


def soften(guider: Guider, output: Tensor, temperature: float) -> Tensor:
    """The teacher's output (B, ...) over a temperature, where the task has any; neutral: 1."""
    return output / temperature if TASKS[guider.task].is_logits else output


def sample_batch(bank: ExpertBank, index: int, store: SampleStore, step: int, config: DistillConfig,
                 part: tuple[int, int] = (0, 1)) -> Pairs:
    """The batch of one training step: a pure function of its arguments, so that a resumed run equals one without a stop.

    part: which of how many parts of it, for processes that train together; neutral: (0, 1), the whole.
    """
    return trajectory_pairs(store, bank.schedule, index, _batch_spec(config, step, part), bank.view)


def distill_expert(guider: Guider, bank: ExpertBank, index: int, store: SampleStore,
                   config: DistillConfig = DistillConfig(), options: RunOptions = RunOptions()) -> list[float]:
    """Train one expert on generated images and return the loss of every step.

    guider: the plain one, the teacher. bank: its expert `index` is changed in place.
    options: run_id is completed by all that the result depends on; on_step gets the weights of the expert by name.
    ValueError if no step of the store lies in the expert's interval.
    """
    return _Lesson(guider, bank, index, store, config).learn(options)


class _Lesson:
    """The training of one expert. answers: the teacher's by number of the image, where they are kept."""

    def __init__(self, guider: Guider, bank: ExpertBank, index: int, store: SampleStore, config: DistillConfig):
        self.guider, self.bank, self.index, self.store, self.config = guider, bank, index, store, config
        self.answers: Callable[[Tensor], Tensor] | None = None
        self.on_check: OnCheck | None = None

    def learn(self, options: RunOptions) -> list[float]:
        config, rate = self.config, AdamW(partial(cosine, self.config.lr, self.config.steps))
        options = options.identified(_run_id(self.guider, self.bank, self.index, self.store, config))
        if config.fast and self.answers is None:
            self.answers = kept_answers(self.guider, self.store)
        with torch.inference_mode(False), self.bank.trainable(self.index) as parameters:
            if config.patience:
                plateau = Plateau(PlateauRule(config.steps, CHECK_EVERY, config.patience), config.lr,
                                  partial(options.team.of_first, self.check()))
                rate, options = AdamW(plateau.rate), plateau.added_to(options)
            weights: dict[str, Tensor] = dict(zip(self.bank.weights(self.index), parameters, strict=True))
            return optimize(weights, partial(self.mean_loss, options.team), config.steps, rate,
                            f"expert {self.index} of {self.guider.name}", options)

    def mean_loss(self, team: Team, step: int) -> Tensor:
        return team.mean((self.fast_loss if self.config.fast else self.loss)(step, team.part), step)

    def loss(self, step: int, part: tuple[int, int]) -> Tensor:
        pairs = sample_batch(self.bank, self.index, self.store, step, self.config, part)
        return distill_loss(self.guider, self.bank, pairs.to(next(self.bank.parameters()).device), self.config.temperature)

    def fast_loss(self, step: int, part: tuple[int, int]) -> Tensor:
        assert self.answers
        steps = draw_steps(self.store, self.bank.schedule, self.index, _batch_spec(self.config, step, part))
        inputs, sigma = (part.to(next(self.bank.parameters()).device)
                         for part in inputs_at(self.store, steps, self.bank.view))
        teacher = soften(self.guider, self.answers(steps[:, 0]), self.config.temperature)
        student = with_experts(self.guider, self.bank)
        return TASKS[self.guider.task].distance(fast_output(student, student.to_image(inputs, sigma), sigma), teacher)

    def check(self) -> Callable[[], float]:
        return partial(_checked, AgreementCheck(self.guider, self.bank, self.index, self.store), self.index, self.on_check)


def _checked(check: AgreementCheck, index: int, on_check: OnCheck | None) -> float:
    agreement = check()
    if on_check:
        on_check(index, check.plain(), agreement)
    return agreement


def _batch_spec(config: DistillConfig, step: int, part: tuple[int, int] = (0, 1)) -> BatchSpec:
    return BatchSpec(step, config.batch, config.seed, part)


@dataclass(frozen=True)
class Watch:
    """Who is told of a distillation, and how long it may take. None of them: nobody, and as long as it takes.

    All may raise to stop, and what is reached is saved.
    """

    on_step: OnDistillStep | None = None
    on_check: OnCheck | None = None                    # see `DistillConfig.patience`
    on_expert: Callable[[int], None] | None = None     # (expert) once it is trained
    on_answers: Callable[[], None] | None = None       # after each file of the teacher's answers, see `DistillConfig.fast`
    seconds_for: Callable[[int], float] | None = None  # (expert) -> how long it may be trained, from then on


class Distillation:
    """The training of all experts of a bank, from the cleanest to the noisiest.

    guider: the plain one, the teacher. bank: changed in place. folder: of the state files, from which a stopped distillation
    resumes; None: nothing is saved. ValueError, before any is trained, if an expert has no step to learn from.
    """

    def __init__(self, guider: Guider, bank: ExpertBank, store: SampleStore, config: DistillConfig = DistillConfig(),
                 folder: Path | None = None):
        self.guider, self.bank, self.store, self.config, self.folder = guider, bank, store, config, folder
        self.former: ExpertBank | None = None
        for index in range(len(bank.schedule)):
            draw_steps(store, bank.schedule, index, _batch_spec(config, 0))

    def begin_with(self, former: ExpertBank) -> None:
        """Start each expert as that of other experts, of the same network, which serves the middle of its interval.

        ValueError for experts that see something else. Those of another rank are refused when an expert begins.
        """
        for name in ("fingerprint", "view", "space_name"):
            if getattr(former, name) != getattr(self.bank, name):
                raise ValueError(f"the experts to go on from have another {name.split('_')[0]} ({getattr(former, name)}, "
                                 f"expected {getattr(self.bank, name)}): distil anew, or choose as they were made")
        self.former = former

    def run(self, watch: Watch = Watch(), crew: Crew = SINGLE) -> list[list[float]]:
        """Train every expert and return their losses; of those that are trained already they are read.

        crew: processes that share the work and get all experts; neutral: `SINGLE`.
        """
        if self.bank.left_out:
            log.warning("%s: %s", self.guider.name, self.bank.describe_left_out())
        answers = self.answers(watch) if self.config.fast else None
        assignments = assign(len(self.bank.schedule), crew.size, self.config.batch, self.config.warm_start)
        by_expert: dict[int, list[float]] = {}
        for index, team in crew.teams(assignments):
            by_expert[index] = self._train(index, answers, watch, team)
            if watch.on_expert:
                watch.on_expert(index)
        crew.exchange(self.bank, by_expert, assignments)
        losses = [by_expert[index] for index in range(len(self.bank.schedule))]
        self.bank.training_info = {"samples": self.store.manifest, "images": len(self.store),
                                   **self.config.fingerprint_fields(),
                                   "final_losses": [steps[-1] for steps in losses if steps]}
        return losses

    def answers(self, watch: Watch) -> TeacherAnswers:
        """The teacher's answers for all images, made where they are not there yet."""
        with torch.inference_mode(False):
            return kept_answers(self.guider, self.store, watch.on_answers)

    def seconds_of_step(self, tick: Callable[[], None]) -> float:
        """Seconds of a training step here and now: the median of a few at a learning rate of zero, which change nothing.

        tick: called after each; may raise to stop.
        """
        config = replace(self.config, steps=TIMED, lr=0.0, patience=0)
        lesson, times = _Lesson(self.guider, self.bank, 0, self.store, config), [time.monotonic()]
        steps = draw_steps(self.store, self.bank.schedule, 0, _batch_spec(config, 0))
        lesson.answers = partial(_known, answer(self.guider, self.store.images_at(steps[:, 0])))
        lesson.learn(RunOptions(on_step=partial(_note_time, times, tick), is_enough=partial(_are_enough, times)))
        return median(after - before for before, after in pairwise(times[1:]))

    def steps_left(self, first: int = 0) -> int:
        """Steps that are still to be made at most by expert `first` and those after it, by the states in the folder."""
        done = (steps_done(self.state_file(index)) for index in range(first, len(self.bank.schedule)))
        return sum(max(self.config.steps - steps, 0) for steps in done)

    def state_file(self, index: int) -> Path | None:
        """File of the state of an expert."""
        return self.folder and Path(self.folder) / f"expert_{index}.state.safetensors"

    def _train(self, index: int, answers: TeacherAnswers | None, watch: Watch, team: Team) -> list[float]:
        lesson = _Lesson(self.guider, self.bank, index, self.store, self.config)
        lesson.answers, lesson.on_check = answers, watch.on_check
        options = RunOptions(self._start(index), self.state_file(index),
                             on_step=watch.on_step and partial(_report, watch.on_step, index), team=team)
        if watch.seconds_for:
            options = replace(options, is_enough=partial(_is_late, time.monotonic() + watch.seconds_for(index)))
        return lesson.learn(options)

    def _start(self, index: int) -> dict:
        """Give an expert its first weights; returns what tells those of others from them."""
        if self.former:
            interval = self.bank.schedule[index]
            weights = self.former.weights(self.former.schedule.index((interval.lo * interval.hi) ** 0.5))
            self.bank.load(index, weights)
            return {"former": fingerprint_state(weights)}
        if self.config.warm_start and index:
            self.bank.load(index, self.bank.weights(index - 1))
        return {}


def distill(guider: Guider, bank: ExpertBank, store: SampleStore, config: DistillConfig = DistillConfig(),
            folder: Path | None = None, on_step: OnDistillStep | None = None, crew: Crew = SINGLE) -> list[list[float]]:
    """Train every expert of a bank, from the cleanest to the noisiest, and return their losses.

    The arguments are those of `Distillation`. on_step: told of every step. crew: processes that share the work and get all
    experts; neutral: `SINGLE`. ValueError, before any is trained, if an expert has no step to learn from.
    """
    return Distillation(guider, bank, store, config, folder).run(Watch(on_step), crew)


def _known(answers: Tensor, rows: Tensor) -> Tensor:
    return answers


def _note_time(times: list[float], tick: Callable[[], None], *_: object) -> None:
    times.append(time.monotonic())
    tick()


def _are_enough(times: list[float], step: int) -> bool:
    return step > 1 and times[-1] - times[1] > TIMING


def _is_late(deadline: float, step: int) -> bool:
    return time.monotonic() >= deadline


def _report(on_step: OnDistillStep, index: int, step: int, loss: float, _: object) -> None:
    on_step(index, step, loss)


def _run_id(guider: Guider, bank: ExpertBank, index: int, store: SampleStore, config: DistillConfig) -> dict:
    settings = {key: value for key, value in config.fingerprint_fields().items() if key not in ("save_every", "warm_start")}
    return {"guider": guider.name, "fingerprint": bank.fingerprint, "index": index, "edges": list(bank.schedule.edges),
            "view": bank.view, "space": bank.space_name, "lora": {**asdict(bank.lora), "targets": list(bank.lora.targets)},
            "store": store.manifest, "images": len(store), "config": settings,
            **({"start": "neighbour"} if config.warm_start and index else {})}
