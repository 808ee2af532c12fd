"""The node's progress bar, previews and text."""
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
from torch import Tensor

from ...ppap_core.viz.plots import loss_plot


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
