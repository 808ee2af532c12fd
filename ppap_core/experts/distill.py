"""Data-free distillation: experts learn to give on noisy images the output that the plain network gives on clean ones.

Knowledge transfer of PPAP (Go et al. 2023). The paper puts fresh noise on finished images; here an expert sees the steps
that the model took on its way to an image, and so learns where a trajectory leads.
"""
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from ..guiders.guider import Guider
from ..io.hashing import fingerprint_state
from ..training.loop import RunOptions
from ..training.state import steps_done
from ..training.team import Team
from .bank import ExpertBank
from .lesson import DistillConfig, Lesson, OnCheck, batch_spec, variants_of
from .pairs import draw_steps
from .processes import SINGLE, Crew, assign
from .samples import SampleStore
from .teacher import TeacherAnswers, answer, kept_answers

log = logging.getLogger(__name__)

OnDistillStep = Callable[[int, int, float], None]
"""(expert, step, loss) after every step; may raise to stop, and the state is saved."""

TIMED = 6     # steps that are timed for an estimate, of which the first warms up
TIMING = 4.0  # seconds after which they are enough


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
            draw_steps(store, bank.schedule, index, batch_spec(config, 0))

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
            return kept_answers(self.guider, self.store, variants_of(self.store, self.config), watch.on_answers)

    def seconds_of_step(self, tick: Callable[[], None]) -> float:
        """Seconds of a training step here and now: the median of a few at a learning rate of zero, which change nothing.

        tick: called after each; may raise to stop.
        """
        config = replace(self.config, steps=TIMED, lr=0.0, patience=0)
        lesson, times = Lesson(self.guider, self.bank, 0, self.store, config), [time.monotonic()]
        steps = draw_steps(self.store, self.bank.schedule, 0, batch_spec(config, 0))
        known = answer(self.guider, self.store.images_at(steps[:, 0]))
        lesson.answers = lambda *_: known
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
        lesson = Lesson(self.guider, self.bank, index, self.store, self.config)
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


def _note_time(times: list[float], tick: Callable[[], None], *_: object) -> None:
    times.append(time.monotonic())
    tick()


def _are_enough(times: list[float], step: int) -> bool:
    return step > 1 and times[-1] - times[1] > TIMING


def _is_late(deadline: float, step: int) -> bool:
    return time.monotonic() >= deadline


def _report(on_step: OnDistillStep, index: int, step: int, loss: float, _: object) -> None:
    on_step(index, step, loss)
