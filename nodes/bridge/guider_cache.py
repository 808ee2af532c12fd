"""Guiders by their names in the list; each is read once for as long as it is in use."""
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
from .memory import materialize_on, module_of, pack_data, patcher_of

_loaded: WeakValueDictionary[tuple, torch.nn.Module] = WeakValueDictionary()  # keeps no network alive


def guider_sources() -> dict[str, Callable[[str], Guider]]:
    """Return everything Load Guider can load, the bundled ones first: by name, functions of the output to use."""
    sources: dict[str, Callable[[str], Guider]] = {f"tinyworld/{task}": partial(tinyworld.load_guider, task)
                                                   for task in tinyworld.LABELS}
    for folder in paths.guider_folders():
        sources.setdefault(folder.name, partial(loaders.load_guider, folder, find_backbone=load_backbone))
    return sources


def load_backbone(name: str, output: str) -> Guider:
    """Load the guider that a trained one names as its own. ValueError for a name that no network has."""
    library, _, listed = name.partition("/")
    if library == "tinyworld":
        listed = f"tinyworld/{listed.removeprefix('guider_')}"
    if any(loaders.is_trained(folder) for folder in paths.guider_folders() if folder.name == listed):
        raise ValueError(f"'{listed}' was trained itself: expected a network of timm or transformers")
    return load_guider(listed, output)


def guider_source(name: str) -> Callable[[str], Guider]:
    """Return what loads the guider of a name in the list. ValueError for any other name."""
    return paths.lookup(guider_sources(), name, "guider", "put its folder into models/ppap_guiders")


def load_guider(name: str, output: str = "own") -> Guider:
    """Load a guider by its name in the list, or reuse its network if that is in use. ValueError for any other name."""
    load, key = guider_source(name), (name, output, *paths.guider_stamp(name))
    net = _loaded.get(key)
    if net is not None and (loaded := pack_data(net).guider):
        return replace(loaded, net=net)
    with outside_inference_mode():
        guider = load(output)
    net = _loaded[key] = module_of(guider)
    pack_data(net).guider = replace(guider, net=torch.nn.Identity())
    return guider


def load_to_device(guider: Guider) -> torch.device:
    """Load a guider's network to the device where it can run now, and return the device."""
    net = module_of(guider)
    loaded = patcher_of(net)
    comfy.model_management.load_models_gpu([loaded])
    materialize_on([net], loaded.load_device)
    return loaded.load_device
