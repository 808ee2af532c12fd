"""The same sampling with several guidances, and the images of it in one grid."""
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ...ppap_core.viz.grid import image_grid
from .tensors import image_from_comfy, image_to_comfy
from .terms import GuidanceTerm

Terms = tuple[GuidanceTerm, ...]


def compare_terms(choices: Sequence[Terms], factors_text: str) -> tuple[list[Terms], str, str]:
    """Return each choice of terms at each factor of its weights, then lines that name the choices and the factors.

    factors_text: numbers, separated by commas; 0 is no guidance, 1 changes nothing. ValueError for others.
    """
    factors = _read_factors(factors_text)
    terms = [_weighted(choice, factor) for choice in choices for factor in factors]
    names = [" + ".join(term.guider.name for term in choice) for choice in choices]
    return terms, "\n".join(names), "\n".join(f"x {factor:g}" for factor in factors)


def _weighted(terms: Terms, factor: float) -> Terms:
    return tuple(replace(term, weight=factor * term.weight) for term in terms)


def _read_factors(text: str) -> list[float]:
    try:
        factors = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        factors = []
    if not factors or not all(map(math.isfinite, factors)):
        raise ValueError(f"'{text}' are no factors: expected numbers, separated by commas, such as 0, 0.5, 1, 2")
    return factors


def grid_of(batches: Sequence[Tensor], row_labels: str, column_labels: str) -> Tensor:
    """Draw a grid of IMAGEs, each a cell; of a single one each image is a cell. Labels: a line each; empty: none."""
    cells = [image_from_comfy(batch) for batch in batches]
    if len(cells) == 1:
        cells = list(cells[0].split(1))
    return image_to_comfy(image_grid(cells, _lines(row_labels), _lines(column_labels)))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
