"""What guidance did in each sampling, found again by the LATENT that came out of it."""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...ppap_core.experts.bank import ExpertBank
from ...ppap_core.experts.origin import describe_transfer
from ...ppap_core.experts.readout import ReadoutNetwork
from ...ppap_core.guidance.terms import TermRecord
from ...ppap_core.io.hashing import digest
from ...ppap_core.viz.summary import Note, guidance_warnings, summarize_guidance
from .fingerprint import origin_of
from .hooks import GUIDANCE, features_of
from .latents import Patcher, frame_count
from .terms import GuidanceTerm, describe_seen

SAMPLED_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the LATENTs that samplers may make of what was sampled


@dataclass(frozen=True)
class Report:
    """Record of guidance in one sampling."""

    names: tuple[str, ...]            # of the terms
    records: tuple[TermRecord, ...]
    levels: int                       # number of noise levels at which the model ran
    notes: tuple[Note, ...] = ()      # what else there is to warn of, by the index of a term
    remarks: tuple[Note, ...] = ()    # what is worth knowing of a term, but no fault
    off: tuple[int, ...] = ()         # indices of terms of weight 0
    particles: str = ""               # what became of the particles of each image, in words; "": there was one

    def summary(self) -> str:
        """Return what each term did, in words."""
        guidance = summarize_guidance(self.names, self.records, self.levels, (*self.remarks, *self.notes))
        return "\n".join(filter(None, (guidance, self.particles)))

    def warnings(self) -> str:
        """Return a line for each term that did nothing although its weight is not 0, or less than it should; "" for none."""
        return guidance_warnings(self.names, self.records, self.levels, self.notes, self.off)


class FinishedRun(NamedTuple):
    """The little that is kept of a sampling for its report, for as long as the guided MODEL lives."""

    records: list[TermRecord]
    sigmas: set[float]
    notes: list[Note]


def samples_key(samples: Tensor, dtype: torch.dtype) -> str:
    """Digest samples as a LATENT of a type holds them, also where they are not a number."""
    return digest(samples.to(dtype).nan_to_num())


def samples_keys(samples: Tensor) -> list[str]:
    """Digest samples for every type that a LATENT made of them may have."""
    return [samples_key(samples, dtype) for dtype in SAMPLED_TYPES]


def report_of(model: Patcher, latent: dict) -> Report:
    """Return what guidance did while this LATENT was sampled. ValueError if it was not sampled with this MODEL."""
    names: list[str] = []
    records: list[TermRecord] = []
    sigmas: set[float] = set()
    notes: list[Note] = []
    remarks: list[Note] = []
    off: list[int] = []
    key = samples_key(latent["samples"], latent["samples"].dtype)
    for guided in features_of(model, GUIDANCE):
        run = guided.finished.get(key)
        if run:
            records += [record._replace(term=record.term + len(names)) for record in run.records]
            sigmas |= run.sigmas
            notes += [(term + len(names), note) for term, note in run.notes]
            frames = frame_count(latent["samples"])
            for index, (term, decode) in enumerate(zip(guided.terms, guided.decoders, strict=True), len(names)):
                said = (*_remarks(term, model), describe_seen(term, decode, model, frames))
                remarks += [(index, text) for text in said if text]
            off += [index for index, term in enumerate(guided.terms, len(names)) if not term.weight]
            names += [f"{len(names) + i}: {term.guider.name}" for i, term in enumerate(guided.terms, 1)]
    if not names:
        raise ValueError("this latent was not sampled with this guided model: connect the model that comes out of Apply "
                         "Guidance and the latent that a sampler made with it")
    return Report(tuple(names), tuple(records), len(sigmas), tuple(notes), tuple(remarks), tuple(off))


def _remarks(term: GuidanceTerm, model: Patcher) -> list[str]:
    net = term.guider.net
    if isinstance(net, ReadoutNetwork):
        return [net.describe()]
    return [describe_transfer(net, origin_of(model)), net.describe_left_out()] if isinstance(net, ExpertBank) else []
