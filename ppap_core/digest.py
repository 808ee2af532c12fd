"""A short name for a value, the same in every process: what a recipe says about a model that is too big to hash whole."""
import hashlib
from collections.abc import Mapping
from dataclasses import is_dataclass

import torch
from torch import Tensor

SAMPLED = 1024  # values of each tensor that count, evenly spread


def digest(value: object) -> str:
    """16 hex digits of any nest of mappings, dataclasses, sequences, scalars and tensors; of all else the type counts."""
    hashed = hashlib.sha256()
    _feed(hashed, value)
    return hashed.hexdigest()[:16]


def _feed(hashed, value: object) -> None:
    if isinstance(value, Tensor):
        hashed.update(f"{tuple(value.shape)} {value.dtype}".encode())
        hashed.update(_spread(value).cpu().contiguous().view(torch.uint8).numpy())
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(hashed, vars(value))
    elif isinstance(value, Mapping):
        hashed.update(f"{{{len(value)}".encode())
        for key in sorted(value, key=str):
            hashed.update(f"{key}:".encode())
            _feed(hashed, value[key])
    elif isinstance(value, (list, tuple)):
        hashed.update(f"[{len(value)}".encode())
        for part in value:
            _feed(hashed, part)
    elif isinstance(value, (set, frozenset)):
        _feed(hashed, sorted(map(digest, value)))
    elif value is None or isinstance(value, (str, int, float)):
        hashed.update(f"{value!r};".encode())
    else:
        hashed.update(getattr(value, "__qualname__", type(value).__qualname__).encode())
        _feed(hashed, getattr(value, "weights", None))  # adapters of a LoRA keep their tensors there


def _spread(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED)]
