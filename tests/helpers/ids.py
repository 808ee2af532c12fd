"""Names of parametrized cases that a reader understands."""
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path

import torch

LONGEST = 60


def case_id(value: object, argument: str) -> str | None:
    """A short text for values of which pytest would show a number only; None leaves the name to pytest."""
    if value is None or isinstance(value, str | bytes | int | float | complex):
        return None
    text = _text(value) or argument
    return text if len(text) <= LONGEST else argument


def _text(value: object) -> str:
    """Text that is the same in every process: no address in memory, and sets in order."""
    if isinstance(value, torch.Tensor):
        return "x".join(map(str, value.shape)) or "scalar"
    if isinstance(value, torch.nn.Module):
        return type(value).__name__
    if isinstance(value, Mapping):
        return ", ".join(f"{_text(key)} {_text(item)}" for key, item in value.items()) or "nothing"
    if isinstance(value, set | frozenset):
        return ", ".join(sorted(map(_text, value))) or "nothing"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "nothing"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__} {_text(list(vars(value).values()))}"
    if isinstance(value, str | int | float | Path | torch.dtype | None):
        return str(value).removeprefix("torch.")
    return getattr(value, "__name__", type(value).__name__).removeprefix("<lambda>")
