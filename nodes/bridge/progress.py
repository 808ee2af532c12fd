"""The progress bar, previews, text and errors of a node."""
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ...ppap_core.viz.plots import loss_plot


class Progress:
    """A node's progress bar over `total` steps. Calls raise ComfyUI's own exception when the user has pressed cancel."""

    def __init__(self, total: int):
        self.total, self.bar = total, comfy.utils.ProgressBar(total)

    def __call__(self, done: int, preview: Tensor | None = None) -> None:
        """Show the steps that are done, and an image (1, 3, H, W) in [-1, 1]; None keeps the one that is shown."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        picture = None if preview is None else latent_preview.preview_to_image(preview[0].movedim(0, -1))
        self.bar.update_absolute(done, self.total, picture and ("JPEG", picture, 512))


class ShareProgress:
    """A progress bar for work whose size is known only once it has begun."""

    def __init__(self) -> None:
        self.progress = Progress(1000)

    def __call__(self, done: int, total: int) -> None:
        """Show the share that is done."""
        self.progress(self.progress.total * done // max(total, 1))


class LossProgress:
    """A progress bar over `total` training steps, with a plot of the losses that is drawn once a second."""

    def __init__(self, total: int):
        self.progress, self.drawn = Progress(total), 0.0

    def __call__(self, done: int, losses: Mapping[str, Sequence[float]]) -> None:
        """Show the steps that are done, and the losses by name."""
        is_due = time.monotonic() - self.drawn > 1
        if is_due:
            self.drawn = time.monotonic()
        self.progress(done, loss_plot(losses) if is_due else None)


SamplerPreview = tuple[str, Any, int | None]
"""Of a sampler, as ComfyUI sends it: (file format, Pillow picture, limit of its sides in pixels or None)"""
Change = Callable[[SamplerPreview], SamplerPreview | None]


@contextmanager
def previews_changed(change: Change) -> Iterator[None]:
    """Change the previews that samplers send in here; where ComfyUI sends none, there is none to change.

    change: a preview -> the preview to send, or None to leave the one on the page as it is.
    """
    send = comfy.utils.ProgressBar.update_absolute
    comfy.utils.ProgressBar.update_absolute = partialmethod(_send_changed, send, change)
    try:
        yield
    finally:
        comfy.utils.ProgressBar.update_absolute = send


def _send_changed(bar: Any, send: Any, change: Change, value: int, total: int | None = None,
                  preview: SamplerPreview | None = None) -> None:
    send(bar, value, total, preview and change(preview))


def show_text(node: Any, text: str) -> dict[str, list[str]]:
    """Show a text in a node, and return it for the history, where programs read it."""
    _send_text(text, getattr(node.hidden, "unique_id", None))
    return {"text": [text]}


failed: set[str] = set()  # nodes that show an error


@contextmanager
def errors_on_node() -> Iterator[None]:
    """Show what this pack refuses on the node that is running, too: the page says only that a node failed.

    A later success takes the sentence away.
    """
    node_id = _running_node()
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if node_id:
            failed.add(node_id)
        _send_text(str(error), node_id)
        raise
    if node_id in failed:
        failed.discard(node_id)
        _send_text(" ", node_id)  # the page leaves a text as it is where the new one is empty


def show_note(text: str) -> dict[str, list[str]] | None:
    """Show a text in the node that is running, of which no schema need know; "" shows nothing."""
    if not text:
        return None
    _send_text(text, _running_node())
    return {"text": [text]}


def note(text: str) -> None:
    """Show a text in the node that is running, until the next one."""
    _send_text(text, _running_node())


def _running_node() -> str | None:
    context = get_executing_context()
    return context.node_id if context else None


def _send_text(text: str, node_id: str | None) -> None:
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if node_id and server:
        server.send_progress_text(text, node_id)
