"""The course of a distillation, as the node shows it: how long it takes, what the experts know by now, and its end."""
import math
import time
from collections.abc import Sequence

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from ...ppap_core.experts.distill import Distillation, Watch
from ...ppap_core.experts.estimate import describe_seconds, estimate_distillation
from ...ppap_core.experts.examine import KnowledgeTest
from ...ppap_core.experts.knowledge import Knowledge
from ...ppap_core.schedules import ExpertSchedule
from ...ppap_core.viz.plots import agreement_plot, loss_plot
from .progress import Progress, note

TITLE = "Distillation: distance from the plain network's output on the clean image"
SHOWN_EVERY = 1.0  # seconds between two pictures and texts


class Losses:
    """The losses of a distillation by interval, with a progress bar and a plot of them."""

    def __init__(self, schedule: ExpertSchedule, steps: int):
        self.names, self.steps = [f"sigma {interval.lo:.3g} to {interval.hi:.3g}" for interval in schedule], steps
        self.losses: dict[str, list[float]] = {name: [] for name in self.names}
        self.progress, self.shown = Progress(len(self.names) * steps), -math.inf

    def on_step(self, index: int, step: int, loss: float) -> None:
        """Keep a loss, and show what there is, once in a second."""
        self.losses[self.names[index]].append(loss)
        is_due = time.monotonic() - self.shown > SHOWN_EVERY
        if is_due:
            self.shown = time.monotonic()
        self.progress(index * self.steps + step + 1, self.picture() if is_due else None)

    def picture(self) -> Tensor:
        """Return the plot."""
        return loss_plot(self.losses, TITLE)


class Course(Losses):
    """Watches a distillation: times it, measures what each expert knows once it is trained, and ends it in time.

    test: of what the experts know. minutes: after which it ends with what is reached; 0: never.
    """

    def __init__(self, distillation: Distillation, test: KnowledgeTest, minutes: float = 0.0):
        super().__init__(distillation.bank.schedule, distillation.config.steps)
        self.distillation, self.test, self.is_late = distillation, test, False
        self.deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        self.plain: dict[float, float] = {}   # agreement by noise level, as far as it is known
        self.expert: dict[float, float] = {}
        self.knowledge: list[Knowledge | None] = []
        note("Timing a few steps ...")
        self.estimate = estimate_distillation(distillation, test, throw_exception_if_processing_interrupted)
        self.show_time("")

    def watch(self) -> Watch:
        """Return what the core tells of the distillation, and asks."""
        in_time = self.seconds_for if self.deadline < math.inf else None
        return Watch(self.on_step, self.on_check, self.on_expert, self.on_answers, in_time)

    def on_step(self, index: int, step: int, loss: float) -> None:
        """Show a step, and how long the rest takes."""
        self.estimate.done("step")
        shown = self.shown
        super().on_step(index, step, loss)
        if self.shown > shown:
            self.show_time(f"expert {index + 1} of {len(self.names)}, step {step + 1} of {self.limit}{self.steps}")

    @property
    def limit(self) -> str:
        """Return the words before a number that may not be reached."""
        return "at most " if self.distillation.config.patience else ""

    def show_time(self, place: str) -> None:
        """Show in the node how long the rest takes."""
        if seconds := min(self.estimate.remaining(), self.deadline - time.monotonic()):
            note("; ".join(filter(None, (f"{self.limit}about {describe_seconds(seconds)} left", place))))

    def on_answers(self) -> None:
        """Note that the plain network has answered for a file of images."""
        self.estimate.done("answers")
        self.show_time("the plain network answers")
        throw_exception_if_processing_interrupted()

    def on_check(self, index: int, plain: float, expert: float) -> None:
        """Note what an expert knows in the midst of its training."""
        self.estimate.done("check")
        self.note_agreement(index, plain, expert)
        throw_exception_if_processing_interrupted()

    def note_agreement(self, index: int, plain: float, expert: float) -> None:
        """Keep a point of the plot."""
        interval = self.distillation.bank.schedule[index]
        level = math.sqrt(interval.lo * interval.hi)
        self.plain[level], self.expert[level] = plain, expert
        self.shown = -math.inf  # the next step shows it

    def on_expert(self, index: int) -> None:
        """Measure what an expert knows that is trained."""
        self.is_late = self.is_late or time.monotonic() >= self.deadline
        self.estimate.left["step"] = self.distillation.steps_left(index + 1)
        self.estimate.done("test", 0)
        known = self.test.measure(index)
        self.estimate.done("test", self.test.count(index))
        self.knowledge.append(known)
        if known:
            self.note_agreement(index, known.plain, known.expert)
        if known and self.estimate.at_start:
            self.progress((index + 1) * self.steps, self.picture())

    def picture(self) -> Tensor:
        """Return the plot of the losses, and below it that of what the experts know, once there is any."""
        if not self.plain:
            return super().picture()
        return torch.cat([loss_plot(self.losses, TITLE, size=(300, 720)), agreement_plot(self.plain, self.expert)], 2)

    def seconds_for(self, index: int) -> float:
        """Return an equal share of the time that is left, without what is done besides training."""
        left = self.deadline - time.monotonic() - self.estimate.remaining("step", "check")
        return left / (len(self.names) - index)

    def describe(self, losses: Sequence[Sequence[float]]) -> str:
        """Return in words how far the training went, and how long it took; "" where it took all its steps as set."""
        config = self.distillation.config
        if not config.fast and self.deadline == math.inf:
            return ""
        steps = ", ".join(str(len(each)) for each in losses)
        text = f"Trained {steps} of {self.limit}{self.steps} steps in {describe_seconds(self.estimate.spent())}"
        if self.estimate.at_start:
            text += f"; {self.limit}{describe_seconds(self.estimate.at_start)} were estimated at the start"
        more = "The time was up before the last step: queue again with more minutes to go on from there."
        return f"{text}.\n{more}" if self.is_late and any(len(each) < self.steps for each in losses) else f"{text}."
