"""Guiders by the name in the list, read once for as long as they are in use."""
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from weakref import WeakValueDictionary

import comfy.model_management
import torch

from ...ppap_core.guiders import loaders
from ...ppap_core.guiders.guider import Guider
from ...ppap_core.tinyworld import loaders as tinyworld
from . import paths
from .autograd import outside_inference_mode
from .memory import materialize_on, pack_data, patcher_of

_loaded: WeakValueDictionary[tuple, torch.nn.Module] = WeakValueDictionary()  # keeps no network alive


def guider_sources() -> dict[str, Callable[[str], Guider]]:
    """Everything Load Guider can load, by name, as functions of what is read of it: the bundled ones first."""
    sources = {f"tinyworld/{task}": partial(tinyworld.load_guider, task) for task in tinyworld.LABELS}
    for folder in paths.guider_folders():
        sources.setdefault(folder.name, partial(loaders.load_guider, folder))
    return sources


def guider_source(name: str) -> Callable[[str], Guider]:
    """What loads the guider of a name in the list. ValueError for any other name."""
    return paths.lookup(guider_sources(), name, "guider", "put its folder into models/ppap_guiders")


def load_guider(name: str, answer: str = "own") -> Guider:
    """A guider by the name in the list; read once for as long as its network is in use. ValueError for any other name."""
    load = guider_source(name)
    key = (name, answer, *paths.guider_stamp(name))
    net = _loaded.get(key)
    if net is None:
        with outside_inference_mode():
            guider = load(answer)
        net = _loaded[key] = guider.net
        pack_data(net).guider = replace(guider, net=None)
    return replace(pack_data(net).guider, net=net)


def load_to_device(guider: Guider) -> torch.device:
    """Load a guider's network to look through it right now; returns where it is."""
    loaded = patcher_of(guider.net)
    comfy.model_management.load_models_gpu([loaded])
    materialize_on([guider.net], loaded.load_device)
    return loaded.load_device
