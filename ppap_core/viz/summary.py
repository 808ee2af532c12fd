"""Guidance in words."""
from collections.abc import Sequence

from .plots import Record


def summarize_guidance(names: Sequence[str], records: Sequence[Record], levels: int) -> str:
    """One line per term: steps at work, energy at the first and last of them, and size of the shift, as means over images.

    names: of the terms. records: of all terms in the order of sampling. levels: number of noise levels sampled at.
    """
    if not levels:
        return "nothing was sampled"
    return "\n".join(_line(name, [record for record in records if record.term == term], levels)
                     for term, name in enumerate(names))


def _line(name: str, records: Sequence[Record], levels: int) -> str:
    steps = len({record.sigma for record in records})
    if not steps:
        return f"{name}: at work in none of {levels} steps: its weight is 0, or its window or mask is empty"
    first, last = (float(record.energy.mean()) for record in (records[0], records[-1]))
    sizes = [float(record.rms.mean()) for record in records]
    return (f"{name}: at work in {steps} of {levels} steps, energy {first:.4g} at first and {last:.4g} at last, "
            f"shift {sum(sizes) / len(sizes):.3g} on average and {max(sizes):.3g} at most")
