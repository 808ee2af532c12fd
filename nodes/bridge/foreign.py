"""The work of other packs on a MODEL: objects that their functions hold, and what those remember from call to call.

Patches are functions, and what they know lies in closures, in attributes of objects and of the network's layers, and in
globals of their modules. A cache of another pack, say, remembers the last prediction there to answer the next call.
"""
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from operator import is_
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import comfy.controlnet
import comfy.hooks
import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import torch
from torch import Tensor, nn

from .hooks import Feature

Content = tuple[Any, Any]
"""(place, a shallow copy of what it holds)"""

SCALARS = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
CONTAINERS = (dict, list, tuple, set, deque, partial, FunctionType, MethodType, CellType, ContextVar)
CLOSED = (Tensor, type, ModuleType, Feature, comfy.model_patcher.ModelPatcher, comfy.model_base.BaseModel,
          comfy.samplers.CFGGuider, comfy.controlnet.ControlBase, comfy.hooks.Hook, comfy.hooks.HookGroup, comfy.sd.VAE,
          comfy.sd.CLIP)  # what belongs to ComfyUI, or to this pack, and is no memory of another
OF_COMFYUI = ("server", "execution", "nodes", "comfy_execution", "torch")
OWN_OF_LAYERS = frozenset(vars(nn.Module())) | {"weight_function", "bias_function", "forward", "current_patcher"}
STREAMING = ("comfy_", "_comfy_", "prev_comfy_", "_v", "_prefetch", "_pin", "dynamic_", "_ppap", "_full_precision")


def is_function(value: Any) -> bool:
    """Tell whether a value is a function or a method: it does something, and what it knows lies elsewhere."""
    return isinstance(value, (FunctionType, MethodType))


def held_by(*roots: Any, with_globals: bool = False) -> list[Any]:
    """Return the objects that can be reached from some roots, each once and in a fixed order.

    They are containers, closures and instances of other packs' classes; neither plain values nor what is ComfyUI's own.
    with_globals: also through the globals of their modules that functions name.
    """
    found: dict[int, Any] = {}
    todo = list(reversed(roots))
    while todo:
        value = todo.pop()
        if id(value) not in found and _is_open(value):
            found[id(value)] = value
            todo += reversed(list(_parts(value)))
            if with_globals and isinstance(value, FunctionType):
                todo += globals_of(value).values()
    return list(found.values())


def _is_open(value: Any) -> bool:
    if isinstance(value, CONTAINERS):
        return True
    module = type(value).__module__.split(".")[0]
    if isinstance(value, (*SCALARS, *CLOSED)) or module in sys.stdlib_module_names or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, nn.Module) or module not in OF_COMFYUI


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, FunctionType):
        return [*(value.__closure__ or ()), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(),
                vars(value)]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, ContextVar):
        return [value.get(None)]
    if isinstance(value, (CellType, Mapping)):
        return read(value).values()
    if isinstance(value, (list, tuple, set, deque)):
        return value
    return [each for each in read(value).values() if not is_function(each)]


def globals_of(function: FunctionType) -> dict[str, Any]:
    """Return the globals of its module that a function names, but for classes, modules and functions of other modules."""
    if function.__module__.split(".")[0] in ("comfy", *OF_COMFYUI):
        return {}
    spaces = function.__globals__
    named = {name: spaces[name] for name in _names_in(function.__code__) if name in spaces}
    return {name: value for name, value in named.items()
            if not isinstance(value, (type, ModuleType))
            and not (is_function(value) and getattr(value, "__globals__", None) is not spaces)}


def _names_in(code: Any) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names_in(constant)


def read(place: Any) -> dict:
    """Return a shallow copy of what a place holds, by key: an object's attributes, a container's items, a cell's content."""
    if isinstance(place, CellType):
        try:
            return {0: place.cell_contents}
        except ValueError:  # it is still empty
            return {}
    if isinstance(place, FunctionType):
        return {name: value for name, value in globals_of(place).items() if not is_function(value)}
    if isinstance(place, Mapping):
        return dict(place)
    if isinstance(place, (list, tuple, deque, set)):
        return dict(enumerate(place))
    if isinstance(place, nn.Module):
        return {name: value for name, value in vars(place).items() if _is_of_another_pack(name, value)}
    return dict(getattr(place, "__dict__", {}))


def _is_of_another_pack(name: str, value: Any) -> bool:
    return name not in OWN_OF_LAYERS and not name.startswith(STREAMING) and not is_function(value)


def write(place: Any, content: dict) -> None:
    """Make a place hold what `read` returned."""
    before = read(place)
    if before.keys() == content.keys() and all(before[key] is content[key] for key in content):
        return
    if isinstance(place, CellType):
        if content:
            place.cell_contents = content[0]
        else:
            del place.cell_contents
    elif isinstance(place, (list, deque)):
        place.clear()
        place.extend(content.values())
    elif isinstance(place, set):
        place.clear()
        place.update(content.values())
    elif not isinstance(place, tuple):
        spaces = place if isinstance(place, dict) else place.__globals__ if isinstance(place, FunctionType) else vars(place)
        for key in before.keys() - content.keys():
            del spaces[key]
        spaces.update(content)


class Memory:
    """What other packs' patches of a model remember from call to call, on its layers and in their own objects.

    network: the model's. options: its model_options, as they are while it is sampled.
    """

    def __init__(self, network: nn.Module, *options: Mapping):
        self.options = options
        layers = [layer for layer in network.modules() if layer._modules]  # single operations remember nothing
        self._remembering = [layer for layer in layers if any(map(_is_changeable, read(layer).values()))]
        noticed = set(map(id, self._remembering))
        self._quiet = [(layer, dict(vars(layer))) for layer in layers if id(layer) not in noticed]
        self._before: dict[int, dict] = {}  # what layers held before they began to remember

    def save(self) -> list[Content]:
        """Return what is remembered now."""
        self._notice()
        return self._save()

    def _save(self) -> list[Content]:
        return [(place, read(place)) for place in self._places()]

    def _notice(self) -> None:
        """Find the layers that have begun to remember something; a look at all attributes each time would take too long."""
        quiet = []
        for layer, before in self._quiet:
            now = vars(layer)
            if len(now) == len(before) and all(map(is_, now.values(), before.values())):
                quiet.append((layer, before))
            else:
                self._remembering.append(layer)
                self._before[id(layer)] = {name: value for name, value in before.items() if _is_of_another_pack(name, value)}
        self._quiet = quiet

    def _places(self) -> list[Any]:
        return held_by(*self._remembering, *self.options, with_globals=True)

    def restore(self, contents: list[Content]) -> None:
        """Remember what `save` returned, and forget what came after."""
        self._notice()
        self._restore(contents)

    def _restore(self, contents: list[Content]) -> None:
        known = {id(place) for place, _ in contents}
        for layer in self._remembering:
            if id(layer) not in known:
                write(layer, self._before[id(layer)])
        for place, content in contents:
            write(place, content)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context manager: nothing that is remembered in it is remembered after it."""
        before = self.save()
        try:
            yield
        finally:
            self.restore(before)

    def apart(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Call a function whose calls are no steps of a sampling: none is answered from what another one left behind."""
        with self.kept():
            return function(*args, **kwargs)

    def detach(self) -> None:
        """Let go of the graph of a gradient in everything that is remembered, with all the memory that it takes."""
        self._notice()
        replace_tensors(self._places(), _detached)


class SeparateMemory:
    """The memory of another model that runs on the same network with the same patches.

    It begins with copies of what they remember when it is made.
    """

    def __init__(self, memory: Memory):
        self.memory = memory
        self.contents = [(place, {key: _copied(value) for key, value in content.items()})
                         for place, content in memory.save()]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context manager: the patches remember what they did in here before, and nothing else."""
        memory = self.memory
        before = memory.save()
        memory._restore(self.contents)
        try:
            yield
        finally:
            memory.detach()
            self.contents = memory._save()
            memory._restore(before)


def _is_changeable(value: Any) -> bool:
    """Whether a value can change while it stays the same object."""
    return _is_open(value) and not isinstance(value, tuple)


def replace_tensors(places: Iterable[Any], change: Callable[[Tensor], Tensor]) -> None:
    """Put change(tensor) in the place of each tensor that some places hold."""
    for place in places:
        content = read(place)
        changed = {key: _changed(value, change) for key, value in content.items()}
        if any(changed[key] is not content[key] for key in content):
            write(place, changed)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is tuple and any(isinstance(each, Tensor) for each in value):
        return tuple(_changed(each, change) for each in value)
    return value


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.grad_fn is not None else tensor


def _copied(value: Any) -> Any:
    return _changed(value, lambda tensor: tensor.detach().clone())
