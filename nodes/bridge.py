"""Between ComfyUI and the core: tensors, progress, guiders by name."""
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..ppap_core import loaders, tinyworld
from ..ppap_core.guider import Guider
from ..ppap_core.plots import loss_plot
from . import folders
from .memory import patcher_of, settle

SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS


# Images and tensors

def image_from_comfy(image: Tensor) -> Tensor:
    """IMAGE (B, H, W, 3) in [0, 1] -> (B, 3, H, W) in [-1, 1], as a tensor that autograd accepts."""
    with torch.inference_mode(False):
        return image.clone()[..., :3].movedim(-1, 1) * 2 - 1


def image_to_comfy(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> IMAGE (B, H, W, 3) in [0, 1]."""
    return ((image.movedim(1, -1).float() + 1) / 2).clamp(0, 1).cpu()


@contextmanager
def autograd():
    """Leave ComfyUI's inference mode: networks and targets made in it could never be differentiated through."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def empty_conditioning() -> list:
    """The CONDITIONING of a model that takes none."""
    return [[torch.zeros(1, 1, 1), {}]]


def empty_pixels(batch: int, size: int) -> dict:
    """The LATENT of a pixel model."""
    return {"samples": torch.zeros(batch, 3, size, size)}


# Progress and words

def progress(total: int) -> Callable[[int, Tensor | None], None]:
    """Report(steps done, preview (1, 3, H, W) or None): moves the node's bar, and raises when the user pressed cancel."""
    bar = comfy.utils.ProgressBar(total)

    def report(done: int, preview: Tensor | None = None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        picture = None if preview is None else latent_preview.preview_to_image(preview[0].movedim(0, -1))
        bar.update_absolute(done, total, picture and ("JPEG", picture, 512))
    return report


def progress_in_shares() -> Callable[[int, int], None]:
    """Report(done, all) for work whose size is only known once it has begun."""
    report = progress(1000)
    return lambda done, total: report(1000 * done // max(total, 1))


def progress_with_plot(total: int) -> Callable[[int, dict[str, Sequence[float]]], None]:
    """Report(steps done, losses by name) of a training: a plot of them is shown, drawn once in a second."""
    report, shown = progress(total), 0.0

    def plotted(done: int, losses: dict[str, Sequence[float]]) -> None:
        nonlocal shown
        fresh = time.monotonic() - shown > 1
        shown = time.monotonic() if fresh else shown
        report(done, loss_plot(losses) if fresh else None)
    return plotted


def show_text(node: Any, text: str) -> dict[str, list[str]]:
    """Show a text in the node of the page that asked; the same for the history, where programs read it."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    asked_by = getattr(node.hidden, "unique_id", None)
    if asked_by and getattr(server, "instance", None):
        server.instance.send_progress_text(text, asked_by)
    return {"text": [text]}


# Guiders

_loaded: WeakValueDictionary[tuple, torch.nn.Module] = WeakValueDictionary()  # keeps no network alive


def guider_sources() -> dict[str, Callable[[str], Guider]]:
    """Everything Load Guider can load, by name, as functions of what is read of it: the bundled ones first."""
    sources = {f"tinyworld/{task}": partial(loaders.load_tinyworld, task) for task in tinyworld.TASKS}
    for folder in folders.guider_folders():
        sources.setdefault(folder.name, partial(loaders.load_guider, folder))
    return sources


def guider_source(name: str) -> Callable[[str], Guider]:
    """What loads the guider of a name in the list. ValueError for any other name."""
    return folders.choose(guider_sources(), name, "guider", "put its folder into models/ppap_guiders")


def load_guider(name: str, answer: str = "own") -> Guider:
    """A guider by the name in the list; read once for as long as its network is in use. ValueError for any other name."""
    load = guider_source(name)
    key = (name, answer, *folders.guider_state(name))
    net = _loaded.get(key)
    if net is None:
        with autograd():
            guider = load(answer)
        net = _loaded[key] = guider.net
        net.loaded_as = replace(guider, net=None)  # without the network, which would then hold itself
    return replace(net.loaded_as, net=net)


def ready(guider: Guider) -> torch.device:
    """Load a guider's network to look through it right now; returns where it is."""
    loaded = patcher_of(guider.net)
    comfy.model_management.load_models_gpu([loaded])
    settle([guider.net], loaded.load_device)
    return loaded.load_device
