"""The description in a file of experts, checked field by field before anything is made of it: files come from strangers."""
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..guiders.latents import VIEWS
from ..io.files import header_bytes, load_tensors
from ..io.values import is_name, is_number, is_whole, shown
from .adapters import MAX_EXPERTS

MAX_BYTES = 16 * 2**20  # of the names and the description; ten thousand layers take two
MAX_LAYERS = 100_000
MAX_CHANNELS = 2**16    # of features, and sides of an output
MAX_OUTPUT = 2**20      # numbers in an output
MAX_FACTOR = 1e6        # of alpha

class Field(NamedTuple):
    """What a field must be, as a test and in words."""

    fits: Callable[[Any], bool]
    words: str
    optional: bool = False


def _are_edges(value: object) -> bool:
    return isinstance(value, list) and 2 <= len(value) <= MAX_EXPERTS + 1 and all(map(is_number, value))


def _are_layers(value: object) -> bool:
    return (isinstance(value, list) and 1 <= len(value) <= MAX_LAYERS and all(map(is_name, value))
            and len(set(value)) == len(value))


def _are_digests(value: object) -> bool:
    return isinstance(value, dict) and all(is_name(name) and is_name(each) and each.strip() for name, each in value.items())


COMMON: dict[str, Field] = {
    "recipe": Field(lambda value: isinstance(value, dict), "an object", optional=True),
    "weights": Field(_are_digests, "a digest of each weight", optional=True)}
FIELDS: dict[str, Field] = {
    "edges": Field(_are_edges, f"from 2 to {MAX_EXPERTS + 1} noise levels"),
    "rank": Field(lambda value: is_whole(value, 1, math.inf), "a whole number from 1 on"),
    "alpha": Field(lambda value: is_number(value) and abs(value) <= MAX_FACTOR, "a number"),
    "targets": Field(_are_layers, "names of layers, each of them once"),
    "view": Field(lambda value: is_name(value) and value in VIEWS, f"one of {', '.join(VIEWS)}"),
    "space": Field(lambda value: is_name(value) and bool(value), "the name of what is diffused"),
    "shuffle": Field(lambda value: is_whole(value, 1, 8), "a whole number from 1 to 8", optional=True),
    **COMMON}
"""Name of a field of a bank -> what it must be. Others are compared with what the guider requires, or are for people."""

READOUT_FIELDS: dict[str, Field] = {
    "edges": FIELDS["edges"],
    "place": Field(is_name, "the name of a place in a model"),
    "channels": Field(lambda value: is_whole(value, 1, MAX_CHANNELS), f"a whole number from 1 to {MAX_CHANNELS}"),
    "output": Field(lambda value: isinstance(value, list) and 1 <= len(value) <= 4 and all(
        is_whole(side, 1, MAX_CHANNELS) for side in value) and math.prod(value) <= MAX_OUTPUT, "the shape of an output"),
    "dense": Field(lambda value: isinstance(value, bool), "true or false"),
    **COMMON}
"""Name of a field of a readout -> what it must be."""


def read_expert_file(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and description of a file of experts. FileNotFoundError, or ValueError for one that is none or too long."""
    if (length := header_bytes(path)) > MAX_BYTES:
        raise ValueError(f"{Path(path).name} cannot be read (its description would have {length:,} bytes): expected a file "
                         f"of experts, with at most {MAX_BYTES:,}; copy or make it again")
    return load_tensors(path)


def check_fields(header: dict, fields: Mapping[str, Field]) -> None:
    """ValueError naming the first field that is missing or cannot be what it says."""
    for name, field in fields.items():
        if name not in header and not field.optional:
            raise ValueError(f"it has no {name}, expected {field.words}")
        if name in header and not field.fits(header[name]):
            raise ValueError(f"its {name} is {shown(header[name])}, expected {field.words}")
    edges = header["edges"] if "edges" in fields else [1.0]
    if edges[0] <= 0 or not all(low < high for low, high in pairwise(edges)):
        raise ValueError(f"its edges are {shown(edges)}, expected ascending and positive noise levels")


def check_count(tensors: dict[str, Tensor], part: str, count: int) -> None:
    """ValueError unless a file holds weights of so many parts, "expert" or "head", and nothing else but a space."""
    held = {name.partition(".")[0] for name in tensors} - {"space"}
    expected = {f"{part}_{index}" for index in range(count)}
    for each in sorted(expected - held, key=lambda name: (len(name), name)):
        raise ValueError(f"{each.replace('_', ' ')} misses its weights, as the edges describe {count}")
    for each in sorted(held - expected):
        raise ValueError(f"it has weights of {shown(each)}, but its edges describe {count} of {part}")
