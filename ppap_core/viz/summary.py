"""Guidance in words."""
from collections.abc import Collection, Sequence

from .plots import Record

Note = tuple[int, str]
"""Index of a term, and what else there is to say of it."""


def summarize_guidance(names: Sequence[str], records: Sequence[Record], levels: int, notes: Sequence[Note] = ()) -> str:
    """One line per term: steps at work, energy at the first and last of them, and size of the shift, as means over images.

    Behind it stands what went another way: steps without a gradient, another number type, and the notes.
    names: of the terms. records: of all terms in the order of sampling. levels: number of noise levels sampled at.
    """
    if not levels:
        return "nothing was sampled"
    return "\n".join("; ".join([_line(name, of_term, levels), *_failures(of_term), *_fallback(of_term), *said])
                     for name, of_term, said in _by_term(names, records, notes))


def guidance_warnings(names: Sequence[str], records: Sequence[Record], levels: int, notes: Sequence[Note] = (),
                      off: Collection[int] = ()) -> str:
    """One line for each term that did nothing, or not in all steps in which it was at work; "" where all is well.

    The other arguments are those of `summarize_guidance`. off: indices of terms that were switched off, which is no fault.
    """
    lines = []
    for index, (name, of_term, said) in enumerate(_by_term(names, records, notes)):
        idle = [] if of_term or index in off else [f"at work in none of {levels} steps"]
        if warnings := [*idle, *_failures(of_term), *said]:
            lines.append(f"warning: {name}: {'; '.join(warnings)}")
    return "\n".join(lines) if levels else ""


def _by_term(names: Sequence[str], records: Sequence[Record],
             notes: Sequence[Note]) -> list[tuple[str, list[Record], list[str]]]:
    return [(name, [record for record in records if record.term == term], [note for of, note in notes if of == term])
            for term, name in enumerate(names)]


def _line(name: str, records: Sequence[Record], levels: int) -> str:
    steps = _levels(records)
    if not steps:
        return f"{name}: at work in none of {levels} steps: its weight is 0, or its window or mask is empty"
    first, last = (float(record.energy.mean()) for record in (records[0], records[-1]))
    sizes = [float(record.rms.mean()) for record in records]
    return (f"{name}: at work in {steps} of {levels} steps, energy {first:.4g} at first and {last:.4g} at last, "
            f"shift {sum(sizes) / len(sizes):.3g} on average and {max(sizes):.3g} at most")


def _levels(records: Sequence[Record]) -> int:
    """Number of steps; some samplers ask twice at one noise level."""
    return len({record.sigma for record in records})


def _failures(records: Sequence[Record]) -> list[str]:
    """Steps in which a term moved no image, or not all of them because a gradient was not finite."""
    still = _levels([record for record in records if not bool(record.rms.any())])
    broken = _levels([record for record in records if record.unguided])
    if records and still == _levels(records):
        reason = ("its gradient is not finite: look at what it judges, and at its weights" if broken else
                  "its gradient is zero: its target is met already, or the network cannot tell the way to it")
        return [f"it moved nothing, because {reason}"]
    without = max(still, broken)
    return [f"without a gradient in {without} of them ({broken} not finite)"] if without else []


def _fallback(records: Sequence[Record]) -> list[str]:
    """The number type that a term took where the model's was too narrow."""
    fallen = [record for record in records if record.fallback]
    if not fallen:
        return []
    dtype = str(fallen[-1].fallback).removeprefix("torch.")
    return [f"computed in {dtype} in {_levels(fallen)} of them, because its numbers do not fit into the model's type"]
