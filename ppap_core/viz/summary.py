"""What guidance did, in words."""
from collections.abc import Sequence


def summarize_guidance(names: Sequence[str], records: Sequence, levels: int) -> str:
    """One line for each term: at how many of the `levels` of noise it was at work, its energy at the first and the last of
    them, and the size of its shift, as means over the images.

    names: of the terms; readings: of all terms, in the order of sampling (`ppap_core.guidance.Reading`).
    """
    if not levels:
        return "nothing was sampled"
    return "\n".join(_line(name, [each for each in records if each.term == term], levels)
                     for term, name in enumerate(names))


def _line(name: str, records: list, levels: int) -> str:
    steps = len({each.sigma for each in records})
    if not steps:
        return f"{name}: at work in none of {levels} steps: its weight is 0, or its window or mask is empty"
    before, after = (float(each.energy.mean()) for each in (records[0], records[-1]))
    sizes = [float(each.rms.mean()) for each in records]
    return (f"{name}: at work in {steps} of {levels} steps, energy {before:.4g} at first and {after:.4g} at last, "
            f"shift {sum(sizes) / len(sizes):.3g} on average and {max(sizes):.3g} at most")
