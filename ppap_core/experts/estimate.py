"""How long a distillation takes on this machine: parts that were timed, times how often each is still to be done."""
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from .check import HeldOutCheck
from .distill import Distillation
from .examine import KnowledgeTest
from .lesson import CHECK_EVERY, variants_of
from .samples import SHARD_SIZE
from .teacher import BATCH, TeacherAnswers, answer

SMOOTHING = 0.02  # share of the last duration in the mean of a part's, once that is a mean of many
FEW = 12          # steps that are made sooner than they are timed
SETTLED = 5       # times that a part is done before its own durations take the place of the first measurement


def nothing() -> None:
    """Do nothing."""


class Estimate:
    """Seconds that are left of some work, corrected while it is done.

    left: how often each part is still to be done. seconds: how long each takes, as it was timed at the start.
    All time between two calls of `done` is that of the part that is done.
    """

    def __init__(self, left: Mapping[str, float], seconds: Mapping[str, float], clock: Callable[[], float] = time.monotonic):
        self.left, self.seconds, self.clock = dict(left), dict(seconds), clock
        self.counts = dict.fromkeys(left, 0)
        self.started = self.marked = clock()
        self.at_start = self.remaining()

    def done(self, part: str, times: int = 1) -> None:
        """Note that a part was done since the last call, once or several times, and how long it took."""
        if times:
            now = self.clock()
            self.left[part] = max(self.left[part] - times, 0)
            self.counts[part] += times
            weight = max(times / (self.counts[part] + SETTLED), SMOOTHING) if self.seconds[part] else 1.0
            self.seconds[part] += weight * ((now - self.marked) / times - self.seconds[part])
            self.marked = now

    def remaining(self, *without: str) -> float:
        """Seconds that are left. without: parts that do not count."""
        return sum(count * self.seconds[part] for part, count in self.left.items() if part not in without)

    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started


def describe_seconds(seconds: float) -> str:
    """A duration in words, with as many digits as anybody needs."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def estimate_distillation(distillation: Distillation, test: KnowledgeTest, tick: Callable[[], None] = nothing) -> Estimate:
    """Count what is left of a distillation by what lies in its folder, and time each part here and now.

    Parts: "step" of a training, "check" of held-out agreement, "answers" for a file of images, "test" of a few steps at the
    end. What is finished, or as good as finished, is not timed. tick: called between the parts; may raise to stop.
    """
    experts = range(len(distillation.bank.schedule))
    batches = [batch for index in experts for batch in test.batches(index)]
    steps, config = distillation.steps_left(), distillation.config
    left = {"answers": 0.0, "step": steps, "check": steps / CHECK_EVERY if config.patience else 0.0,
            "test": sum(map(test.count, experts))}
    if steps <= FEW:
        return Estimate(left, dict.fromkeys(left, 0.0))
    guider, store = distillation.guider, distillation.store
    with torch.inference_mode(False):
        if config.fast:
            left["answers"] = TeacherAnswers(guider, store, variants_of(store, config)).count_missing()
        timed = {"answers": SHARD_SIZE / BATCH * _seconds_of(lambda: answer(guider, store.images_at(range(BATCH))).cpu()),
                 "step": distillation.seconds_of_step(tick),
                 "check": _seconds_of(HeldOutCheck(guider, distillation.bank, 0, store)) if config.patience else 0.0,
                 "test": _seconds_of(partial(test.agreements_at, batches[0])) if batches else 0.0}
    return Estimate(left, timed)


def _seconds_of(work: Callable[[], object]) -> float:
    """Seconds of the second of two calls, of which the first warms up."""
    work()
    started = time.monotonic()
    work()
    return time.monotonic() - started
