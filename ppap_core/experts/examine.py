"""Examines experts: their answers to held-out steps, and to steps that they learned from, beside the plain network's."""
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from ..guiders.tasks import TASKS
from .bank import ExpertBank, with_experts
from .knowledge import Knowledge
from .pairs import Pairs, pairs_at, steps_in
from .samples import SampleStore

BATCH = 16         # images that a network judges at once
LEARNED_FROM = 64  # images that stand in where none are held out


class Agreements(NamedTuple):
    """Agreement with the teacher at some steps, (B,) each."""

    plain: Tensor
    expert: Tensor
    commonest: Tensor
    possible: Tensor | None = None


class Learned(NamedTuple):
    """Agreement of an expert at steps that it learned from, (B,), and the image that each led to."""

    expert: Tensor
    images: Tensor


@torch.no_grad()
def commonest_answer(guider: Guider, store: SampleStore, images: int, device: torch.device | str = "cpu") -> Tensor:
    """The one output that agrees most with a guider's on the first images of a store, (1, ...).

    guider: the plain one. device: of its network.
    """
    total = torch.zeros(())
    for rows in torch.arange(images).split(BATCH):
        image = store.images_at(rows).to(device)
        answers = TASKS[guider.task].answer(guider.predict(image, clean(image)))
        total = total.to(answers.device) + answers.float().sum(0, keepdim=True)
    return total / images


@torch.no_grad()
def agreements(guider: Guider, bank: ExpertBank, pairs: Pairs, commonest: Tensor,
               predictions: Tensor | None = None) -> Agreements:
    """Agreement with the teacher at steps of one interval: of the plain network, the expert, and one answer to everything.

    guider: the plain one, the teacher. commonest: an output (1, ...), see `commonest_answer`. predictions: of the model at
    these steps, (B, C, h, w), which experts of the noisy view do not see; None: what is possible is not measured.
    """
    teacher = guider.predict(pairs.images, clean(pairs.images))
    plain = plain_judge(guider, bank)
    outputs = [_output(plain, pairs), _output(with_experts(guider, bank), pairs), commonest.expand_as(teacher)]
    if predictions is not None:
        outputs.append(_output(plain, pairs._replace(inputs=predictions)))
    return Agreements(*(TASKS[guider.task].agreement(output, teacher).cpu() for output in outputs))


def plain_judge(guider: Guider, bank: ExpertBank) -> Guider:
    """A plain guider that looks at what a bank looks at, and at latents by their linear colours."""
    return replace(guider, view=bank.view, decode=bank.space.colors if bank.space else None)


def _output(judge: Guider, pairs: Pairs) -> Tensor:
    return judge.predict(judge.to_image(pairs.inputs, pairs.sigma), pairs.sigma)


class KnowledgeTest:
    """Measures what single experts know, by the held-out images of a store, or by some that they learned from without any.

    guider: the plain one, the teacher. on_batch: called before every few steps; may raise to stop.
    """

    def __init__(self, guider: Guider, bank: ExpertBank, store: SampleStore, on_batch: Callable[[], None] | None = None):
        held_out = store.held_out
        self.guider, self.bank, self.on_batch = guider, bank, on_batch
        self.store, self.is_held_out = held_out or store, bool(held_out)  # has images
        self.learned_from = store
        self.images = len(self.store) if held_out else min(len(store), LEARNED_FROM)
        self.commonest: Tensor | None = None

    def batches(self, index: int) -> tuple[Tensor, ...]:
        """The steps (n, 2) by which expert `index` is measured, a few at a time; () for an interval without steps."""
        return self._batches_of(self.store, index)

    def count(self, index: int) -> int:
        """Number of batches by which expert `index` is measured, with those of images that it learned from."""
        return len(self.batches(index)) + (len(self._batches_of(self.learned_from, index)) if self.is_held_out else 0)

    def _batches_of(self, store: SampleStore, index: int) -> tuple[Tensor, ...]:
        steps = steps_in(store, self.bank.schedule, index)
        steps = steps[steps[:, 0] < self.images]
        return steps.split(BATCH) if len(steps) else ()

    def measure(self, index: int) -> Knowledge | None:
        """What expert `index` knows; None for an interval without steps."""
        batches = self.batches(index)
        with torch.inference_mode(False):
            parts = [self.agreements_at(batch) for batch in batches]
            learned = self.learned(index) if self.is_held_out else None
        return summarize(joined(parts), torch.cat(batches)[:, 0], self.is_held_out, learned) if parts else None

    @torch.no_grad()
    def learned(self, index: int) -> Learned | None:
        """Agreement of expert `index` on as many images that it learned from; None for an interval without steps."""
        batches, student, found = self._batches_of(self.learned_from, index), with_experts(self.guider, self.bank), []
        for steps in batches:
            if self.on_batch:
                self.on_batch()
            pairs = pairs_at(self.learned_from, steps, self.bank.view).to(next(self.bank.parameters()).device)
            teacher = self.guider.predict(pairs.images, clean(pairs.images))
            found.append(TASKS[self.guider.task].agreement(_output(student, pairs), teacher).cpu())
        return Learned(torch.cat(found), torch.cat(batches)[:, 0]) if found else None

    def agreements_at(self, steps: Tensor) -> Agreements:
        """Agreements at some steps (n, 2) of one interval."""
        if self.commonest is None:
            device = next(self.bank.parameters()).device
            self.commonest = commonest_answer(self.guider, self.store, self.images, device)
        if self.on_batch:
            self.on_batch()
        return _agreements_at(self.guider, self.bank, self.store, steps, self.commonest)


def measure_knowledge(guider: Guider, bank: ExpertBank, store: SampleStore,
                      on_batch: Callable[[], None] | None = None) -> tuple[Knowledge | None, ...]:
    """What each expert knows; the arguments are those of `KnowledgeTest`. None for an interval without steps."""
    test = KnowledgeTest(guider, bank, store, on_batch)
    return tuple(test.measure(index) for index in range(len(bank.schedule)))


def _agreements_at(guider: Guider, bank: ExpertBank, store: SampleStore, steps: Tensor, commonest: Tensor) -> Agreements:
    pairs, device = pairs_at(store, steps, bank.view), commonest.device
    denoised = pairs_at(store, steps, "denoised").inputs.to(device) if bank.view == "noisy" else None
    return agreements(guider, bank, pairs.to(device), commonest, denoised)


def joined(parts: Sequence[Agreements]) -> Agreements:
    """Agreements at the steps of several batches as one."""
    return Agreements(*(torch.cat(part) for part in zip(*parts, strict=True) if part[0] is not None))


def summarize(measured: Agreements, images: Tensor, held_out: bool = True, learned: Learned | None = None) -> Knowledge:
    """Means and standard errors of the agreements at some steps. images: the image that each step led to, (B,) long."""
    plain, expert, commonest = (part.double() for part in measured[:3])
    of_plain, of_expert, of_gain = (_standard_error(difference, images)
                                    for difference in (plain - commonest, expert - commonest, expert - plain))
    known = Knowledge(float(plain.mean()), float(expert.mean()), float(commonest.mean()), of_plain, of_expert, of_gain,
                      len(images.unique()), held_out,
                      None if measured.possible is None else float(measured.possible.double().mean()))
    if learned is None:
        return known
    error = math.hypot(_standard_error(expert, images), _standard_error(learned.expert.double(), learned.images))
    return replace(known, learned=float(learned.expert.double().mean()), learned_error=error)


def _standard_error(values: Tensor, images: Tensor) -> float:
    """Of the mean of values (B,), of which those of one image are not independent."""
    groups = images.unique(return_inverse=True)[1]
    sums = torch.zeros(int(groups.max()) + 1, dtype=values.dtype).index_add(0, groups, values - values.mean())
    return float(sums.square().sum().sqrt() / len(values))
