"""What experts know: how often they give, on held-out steps, the answer of the plain network on the finished image."""
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..guiders.guider import Guider, clean
from ..guiders.tasks import TASKS
from ..io.values import is_number, is_whole
from .bank import ExpertBank, with_experts
from .readout import ReadoutNetwork
from .samples import HELD_OUT_SHARE, SHARD_SIZE, Pairs, SampleStore, pairs_at, steps_in

BATCH = 16              # images that a network judges at once
CLEAR, HINTED = 2.0, 1.0  # standard errors by which an agreement is clearly greater, or may be
HIGH = 0.95             # agreement of a plain network that is as good as needed
LEARNED_FROM = 64       # images that stand in where none are held out
USED = ", so the plain network is used"
KEY = "knowledge"       # of the training info of a bank

Verdict = Literal["worth it", "not needed", "train longer"]


@dataclass(frozen=True)
class Knowledge:
    """Mean agreement with the teacher's answer on the finished image, in [0, 1], on the steps of one interval.

    Errors are standard errors of differences between answers to the same steps, over images.
    """

    plain: float            # of the plain network on the same inputs
    expert: float
    commonest: float        # of giving always the same answer, the commonest
    plain_error: float      # of plain - commonest
    expert_error: float     # of expert - commonest
    gain_error: float       # of expert - plain
    images: int             # number of images
    held_out: bool          # whether the expert did not learn from them
    possible: float | None = None  # at least, in the noisy view: the plain network's on the model's prediction

    @property
    def verdict(self) -> Verdict:
        """Worth it: clearly ahead of the plain network and of the commonest answer. Not needed: plain knows as much."""
        gain, knows_more = self.expert - self.plain, self.expert - self.commonest > CLEAR * self.expert_error
        if gain > CLEAR * self.gain_error and knows_more:
            return "worth it"
        plain_knows = self.plain - self.commonest > CLEAR * self.plain_error
        is_as_good = plain_knows and gain <= HINTED * self.gain_error
        return "not needed" if is_as_good or self.plain >= HIGH else "train longer"

    @property
    def uses_plain(self) -> bool:
        """Whether the plain network is to answer: an expert is not needed, by images that it did not learn from."""
        return self.held_out and self.verdict == "not needed"


class Agreements(NamedTuple):
    """Agreement with the teacher at some steps, (B,) each."""

    plain: Tensor
    expert: Tensor
    commonest: Tensor
    possible: Tensor | None = None


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
        self.images = len(self.store) if held_out else min(len(store), LEARNED_FROM)
        self.commonest: Tensor | None = None

    def batches(self, index: int) -> tuple[Tensor, ...]:
        """The steps (n, 2) by which expert `index` is measured, a few at a time; () for an interval without steps."""
        steps = steps_in(self.store, self.bank.schedule, index)
        steps = steps[steps[:, 0] < self.images]
        return steps.split(BATCH) if len(steps) else ()

    def measure(self, index: int) -> Knowledge | None:
        """What expert `index` knows; None for an interval without steps."""
        batches = self.batches(index)
        with torch.inference_mode(False):
            parts = [self.agreements_at(batch) for batch in batches]
        return summarize(joined(parts), torch.cat(batches)[:, 0], self.is_held_out) if parts else None

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


def summarize(measured: Agreements, images: Tensor, held_out: bool = True) -> Knowledge:
    """Means and standard errors of the agreements at some steps. images: the image that each step led to, (B,) long."""
    plain, expert, commonest = (part.double() for part in measured[:3])
    of_plain, of_expert, of_gain = (_standard_error(difference, images)
                                    for difference in (plain - commonest, expert - commonest, expert - plain))
    return Knowledge(float(plain.mean()), float(expert.mean()), float(commonest.mean()), of_plain, of_expert, of_gain,
                     len(images.unique()), held_out,
                     None if measured.possible is None else float(measured.possible.double().mean()))


def _standard_error(values: Tensor, images: Tensor) -> float:
    """Of the mean of values (B,), of which those of one image are not independent."""
    groups = images.unique(return_inverse=True)[1]
    sums = torch.zeros(int(groups.max()) + 1, dtype=values.dtype).index_add(0, groups, values - values.mean())
    return float(sums.square().sum().sqrt() / len(values))


def remember(bank: ExpertBank | ReadoutNetwork, knowledge: Sequence[Knowledge | None]) -> None:
    """Keep in a bank or readout, and so in its file, what it knows; a bank uses the plain network where that is enough."""
    bank.training_info = {**bank.training_info, KEY: [each and asdict(each) for each in knowledge]}
    for index, each in enumerate(knowledge):
        if each and each.uses_plain and isinstance(bank, ExpertBank):
            bank.make_plain(index)


def knowledge_of(bank: ExpertBank | ReadoutNetwork) -> tuple[Knowledge | None, ...]:
    """What each expert of a bank or head of a readout knows, as far as that was measured; one for each interval."""
    try:
        known = tuple(each and Knowledge(**each) for each in bank.training_info[KEY])
    except (KeyError, TypeError):  # a bank of an earlier version, or of a later one
        known = ()
    is_sound = len(known) == len(bank.schedule) and all(each is None or _is_sound(each) for each in known)
    return known if is_sound else (None,) * len(bank.schedule)


def _is_sound(known: object) -> bool:
    """Whether what a file says is of the types that it should be."""
    if not isinstance(known, Knowledge):
        return False
    numbers = known.plain, known.expert, known.commonest, known.plain_error, known.expert_error, known.gain_error
    return (all(map(is_number, numbers)) and is_whole(known.images, 0, 1e12) and isinstance(known.held_out, bool)
            and (known.possible is None or is_number(known.possible)))


def describe_knowledge(bank: ExpertBank | ReadoutNetwork) -> str:
    """A line for each interval, a sentence on what they come to, and one on how it was measured; "" if it was not."""
    known = knowledge_of(bank)
    measured = [each for each in known if each]
    if not measured:
        return ""
    lines = [f"sigma {interval.lo:.3g} to {interval.hi:.3g}: {_in_words(each)}"
             for interval, each in zip(bank.schedule, known, strict=True)]
    text = "\n".join([*lines, _conclusion(measured), _basis(measured)])
    if isinstance(bank, ExpertBank):
        return text
    return text.replace(USED, "").replace("expert", "head") + " Plain is the plain network on the model's prediction."


def _in_words(known: Knowledge | None) -> str:
    if known is None:
        return "not measured, as no step lies there"
    possible = "" if known.possible is None else f"possible at least {known.possible:.0%}, "
    return (f"plain {known.plain:.0%}, expert {known.expert:.0%}, {possible}commonest answer {known.commonest:.0%}: "
            f"{known.verdict}" + (USED if known.uses_plain else ""))


REASONS: dict[Verdict, str] = {
    "worth it": "where the expert is ahead of the plain network",
    "not needed": "where the plain network answers as well",
    "train longer": "where the expert is not clearly ahead of the plain network and of the commonest answer, unless its "
                    "loss falls no more"}


def _conclusion(measured: Sequence[Knowledge]) -> str:
    counts = {verdict: sum(each.verdict == verdict for each in measured) for verdict in REASONS}
    said = "; ".join(f"{verdict} in {count} of {len(measured)}, {REASONS[verdict]}"
                     for verdict, count in counts.items() if count)
    return f"Of the ranges of noise: {said}."


def _basis(measured: Sequence[Knowledge]) -> str:
    images = max(each.images for each in measured)
    basis = f"Measured as agreement with the plain network's answer on the finished image, for {images} images that "
    basis += ("the experts did not learn from." if measured[0].held_out else
              "the experts learned from, so that they look better than they are; of samples begun anew, some are kept "
              f"apart from {HELD_OUT_SHARE * SHARD_SIZE} images on.")
    has_possible = any(each.possible is not None for each in measured)
    return basis + (" Possible is what the plain network knows in the denoised view." if has_possible else "")
