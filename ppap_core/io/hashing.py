"""Short names of values and networks that are the same in every process.

They stand in manifests, state files and file names, so that saved work is recognised. What is hashed and in which order,
names of dataclass fields included, is therefore a file format: a field or function that is renamed keeps its old name here
by `fingerprint_fields` or `hashed_as`.
"""
import hashlib
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .function_fingerprint import SCALARS, function_fingerprint
from .storage import is_wrapper, named_tensors, stored_tensors

SAMPLE_COUNT = 1024  # values hashed of each tensor of a model, evenly spread
RUN_LENGTH = 512     # bytes hashed at a time of packed weights: blocks with their scales, which are shorter


class Hash(Protocol):
    """The part of hashlib's objects that is used here."""

    def update(self, data: Any, /) -> None:
        """Feed bytes."""


def digest(value: object, sampled: bool = False) -> str:
    """16 hex digits that identify any nest of mappings, dataclasses, sequences, scalars and tensors.

    Dataclasses hash by `fingerprint_fields()` where they have it, else by their fields; functions and other objects by
    `function_fingerprint`. sampled: hash at most about 1024 values of each tensor, for weights, which are too big to hash
    whole; False: every value, because what is painted into a mask would be missed.
    """
    hashed = hashlib.sha256()
    _feed(hashed, value, sampled)
    return hashed.hexdigest()[:16]


def fingerprint_network(net: nn.Module) -> str:
    """16 hex digits that identify all parameters and buffers of a network by name, type and value."""
    return fingerprint_state(named_tensors(net))


def fingerprint_state(state: Mapping[str, Tensor]) -> str:
    """16 hex digits that identify tensors by name, type and value."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for stored in stored_tensors(tensor):
            hashed.update(_bytes(stored))
    return hashed.hexdigest()[:16]


def weight_digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Shape, type and 12 hex digits of the values of each floating tensor, such as "8x3x3x3 float32 0a1b2c3d4e5f".

    They tell networks apart without names, which the next release of a library changes. Integers are counters and indices.
    """
    return {name: f"{'x'.join(map(str, tensor.shape)) or 1} {str(tensor.dtype).removeprefix('torch.')} "
                  f"{hashlib.sha256(_bytes(tensor)).hexdigest()[:12]}"
            for name, tensor in state.items() if tensor.is_floating_point()}


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _feed(hashed: Hash, value: object, sampled: bool) -> None:
    if isinstance(value, Tensor):
        _feed_tensor(hashed, value, sampled)
    elif is_dataclass(value) and not isinstance(value, type):
        fields = getattr(value, "fingerprint_fields", None)
        _feed(hashed, fields() if fields else vars(value), sampled)
    elif isinstance(value, Mapping):
        _feed_mapping(hashed, value, sampled)
    elif isinstance(value, (list, tuple)):
        hashed.update(f"[{len(value)}".encode())
        _feed_all(hashed, value, sampled)
    elif isinstance(value, (set, frozenset)):
        _feed(hashed, sorted(digest(part, sampled) for part in value), sampled)
    elif value is None or isinstance(value, SCALARS):
        hashed.update(f"{value!r};".encode())
    else:
        name, parts = function_fingerprint(value)
        hashed.update(name.encode())
        _feed_all(hashed, parts, sampled)


def _feed_all(hashed: Hash, parts: list | tuple, sampled: bool) -> None:
    for part in parts:
        _feed(hashed, part, sampled)


def _feed_tensor(hashed: Hash, tensor: Tensor, sampled: bool) -> None:
    if is_wrapper(tensor):
        hashed.update(f"{tuple(tensor.shape)} {type(tensor).__qualname__}".encode())
        return _feed_all(hashed, stored_tensors(tensor), sampled)
    hashed.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    flat = tensor.detach().as_subclass(Tensor).reshape(-1)
    hashed.update(_bytes(_sample(flat, len(flat) != math.prod(tensor.shape)) if sampled else flat))


def _sample(flat: Tensor, is_packed: bool) -> Tensor:
    """Evenly spread values; of packed weights whole runs, since single bytes could all be at one place of their blocks."""
    if not is_packed or len(flat) <= SAMPLE_COUNT * 8:
        return flat[:: max(1, len(flat) // SAMPLE_COUNT)]
    return flat[: len(flat) // RUN_LENGTH * RUN_LENGTH].unflatten(0, (-1, RUN_LENGTH))[:: len(flat) // RUN_LENGTH // 16]


def _feed_mapping(hashed: Hash, value: Mapping, sampled: bool) -> None:
    hashed.update(f"{{{len(value)}".encode())
    for key in sorted(value, key=str):
        hashed.update(f"{key}:".encode())
        _feed(hashed, value[key], sampled)
