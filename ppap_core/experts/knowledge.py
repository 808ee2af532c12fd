"""What experts know: how often they give, on held-out steps, the answer of the plain network on the finished image."""
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from ..io.values import is_number, is_whole
from .bank import ExpertBank
from .readout import ReadoutNetwork
from .samples import HELD_OUT_SHARE, SHARD_SIZE

CLEAR, HINTED = 2.0, 1.0  # standard errors by which an agreement is clearly greater, or may be
HIGH = 0.95             # agreement of a plain network that is as good as needed
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
    learned: float | None = None   # of the expert, on as many images that it learned from
    learned_error: float = 0.0     # of learned - expert

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

    @property
    def is_learned_by_heart(self) -> bool:
        """Whether the expert clearly knows the images that it learned from better than others: more would help."""
        return self.learned is not None and self.learned - self.expert > CLEAR * self.learned_error


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
            and (known.possible is None or is_number(known.possible))
            and (known.learned is None or is_number(known.learned)) and is_number(known.learned_error))


def describe_knowledge(bank: ExpertBank | ReadoutNetwork) -> str:
    """A line for each interval, a sentence on what they come to, and one on how it was measured; "" if it was not."""
    known = knowledge_of(bank)
    measured = [each for each in known if each]
    if not measured:
        return ""
    lines = [f"sigma {interval.lo:.3g} to {interval.hi:.3g}: {_in_words(each)}"
             for interval, each in zip(bank.schedule, known, strict=True)]
    text = "\n".join(filter(None, (*lines, _conclusion(measured), _advice(measured), _basis(measured))))
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


def _advice(measured: Sequence[Knowledge]) -> str:
    """Whether more images would help; "" where that was not measured."""
    compared = [(each.learned, each) for each in measured if each.learned is not None]
    by_heart = [(learned - each.expert, learned, each.expert) for learned, each in compared if each.is_learned_by_heart]
    if not compared:
        return ""
    if not by_heart:
        return ("Experts know others as well as the images that they learned from: longer training comes before more "
                "images would help.")
    _, learned, others = max(by_heart)
    return (f"More images would help in {len(by_heart)} of {len(compared)}: experts know those that they learned from "
            f"better than others, {learned:.0%} and {others:.0%} where most so.")


def _basis(measured: Sequence[Knowledge]) -> str:
    images = max(each.images for each in measured)
    basis = f"Measured as agreement with the plain network's answer on the finished image, for {images} images that "
    basis += ("the experts did not learn from." if measured[0].held_out else
              "the experts learned from, so that they look better than they are; of samples begun anew, some are kept "
              f"apart from {HELD_OUT_SHARE * SHARD_SIZE} images on.")
    has_possible = any(each.possible is not None for each in measured)
    return basis + (" Possible is what the plain network knows in the denoised view." if has_possible else "")
