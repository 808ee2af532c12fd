"""Identity of functions and methods across processes."""
import dis
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch

SCALARS = (str, bytes, int, float, torch.dtype)

Named = TypeVar("Named", bound=Callable)


def hashed_as(name: str, *attributes: str) -> Callable[[Named], Named]:
    """Decorator for a function, method or class that is renamed: `digest` keeps calling it `name`.

    attributes: of the object a method is bound to, whose values count as if the method closed over them.
    """
    def mark(target: Named) -> Named:
        target._hashed_as = (name, attributes)  # type: ignore[attr-defined]
        return target
    return mark


def function_fingerprint(value: Any) -> tuple[str, list[object]]:
    """Qualified name of a function, method, class or object, and the values that tell it from others of that name.

    Patches of a model are functions: what they do is fixed by their code, hence their name, and by the settings they close
    over. Those count, if they are scalars; variables that a function rebinds are its memory and change from call to call,
    and other objects have no value that is the same in every process. An object counts by its class and, if it has one,
    its attribute `weights`: the tensors of a LoRA adapter.
    """
    name, attributes = getattr(value, "_hashed_as", ("", ()))
    parts = [getattr(value, "weights", None)]
    parts += [part for part in closed_over(value) if isinstance(part, SCALARS)]
    parts += [getattr(value.__self__, attribute) for attribute in attributes]
    return name or getattr(value, "__qualname__", type(value).__qualname__), parts


def closed_over(value: Any) -> Iterator[object]:
    """Yield what a function closes over and its defaults, but for variables that it rebinds; nothing for other objects."""
    if not inspect.isfunction(value):
        return
    yield from value.__defaults__ or ()
    rebound = {instruction.argval for instruction in dis.get_instructions(value) if instruction.opname == "STORE_DEREF"}
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        if name not in rebound:
            with suppress(ValueError):  # a cell that is still empty
                yield cell.cell_contents
