"""A short name for a value, the same in every process: what a recipe says about what it was made from."""
import dis
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass

import torch
from torch import Tensor

SAMPLED = 1024  # values of each tensor of a model that count, evenly spread
SCALARS = (str, bytes, int, float, torch.dtype)


def digest(value: object, sampled: bool = False) -> str:
    """16 hex digits of any nest of mappings, dataclasses, sequences, scalars and tensors.

    Of a function its name counts and what scalars it closes over and does not change, of all else the type.
    sampled: for weights, which are too big to hash whole: of each tensor some values count. They would miss what is
    painted into a mask.
    """
    hashed = hashlib.sha256()
    _feed(hashed, value, sampled)
    return hashed.hexdigest()[:16]


def _feed(hashed, value: object, sampled: bool) -> None:
    if isinstance(value, Tensor):
        hashed.update(f"{tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().reshape(-1)
        counted = flat[:: max(1, len(flat) // SAMPLED)] if sampled else flat
        hashed.update(counted.cpu().contiguous().view(torch.uint8).numpy())
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(hashed, vars(value), sampled)
    elif isinstance(value, Mapping):
        hashed.update(f"{{{len(value)}".encode())
        for key in sorted(value, key=str):
            hashed.update(f"{key}:".encode())
            _feed(hashed, value[key], sampled)
    elif isinstance(value, (list, tuple)):
        hashed.update(f"[{len(value)}".encode())
        for part in value:
            _feed(hashed, part, sampled)
    elif isinstance(value, (set, frozenset)):
        _feed(hashed, sorted(digest(part, sampled) for part in value), sampled)
    elif value is None or isinstance(value, SCALARS):
        hashed.update(f"{value!r};".encode())
    else:
        hashed.update(getattr(value, "__qualname__", type(value).__qualname__).encode())
        for part in _inside(value):
            _feed(hashed, part, sampled)


def _inside(value: object) -> Iterator[object]:
    """What tells objects of a type apart: the tensors of a LoRA's adapter, the settings of a patch that is a function."""
    yield getattr(value, "weights", None)
    if inspect.isfunction(value):
        rebound = {each.argval for each in dis.get_instructions(value) if each.opname == "STORE_DEREF"}  # its memory
        held = [*(value.__defaults__ or ())]
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with suppress(ValueError):  # a cell that is empty yet
                held += [cell.cell_contents] if name not in rebound else []
        yield from (part for part in held if isinstance(part, SCALARS))
