"""The output of a guider as pictures."""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..viz.previews import number_notes, target_bars, text_note
from .guider import Guider, clean
from .rules import RuleNet
from .tasks import TASKS


@torch.no_grad()
def visualize(guider: Guider, images: Tensor) -> Tensor:
    """Output of a guider for clean images (B, 3, H, W) in [-1, 1], as pictures (B, 3, h, w) in [-1, 1].

    Maps are drawn as maps, classes as bars and numbers in words; for anything else, such as an embedding, a bar shows how
    well the image meets the target. ValueError for a guider that waits for a text.
    """
    output = guider.predict(images, clean(images))
    return draw_output(guider, images, output, partial(guider.energy, images, clean(images)))


@torch.no_grad()
def draw_output(guider: Guider, images: Tensor, output: Tensor, energy: Callable[[], Tensor]) -> Tensor:
    """An output of a guider for images (B, 3, H, W) as pictures (B, 3, h, w) in [-1, 1]; no network runs.

    energy: returns the energies (B,); called only where they are shown.
    """
    return _draw(guider, images, output, energy).clamp(-1, 1)


def _draw(guider: Guider, images: Tensor, output: Tensor, energy: Callable[[], Tensor]) -> Tensor:
    if isinstance(guider.net, RuleNet) and guider.net.rule.preview:
        return guider.net.rule.preview(images, output)
    if draw := TASKS[guider.task].preview:
        return draw(output, guider.labels)
    if guider.task == "number" or output[0].numel() == 1:
        output = output.flatten(1)
        targets = guider.target_for(images, output).expand(output.shape) if guider.target is not None else None
        return number_notes(guider.labels or (guider.name,), output, targets)
    if guider.target is None:
        return text_note([f"{guider.name} answers with {guider.task}, which is no picture.",
                          "Aim it, and how close an image is to the target is shown here."], len(images))
    return target_bars(energy(), TASKS[guider.task].score(output, guider.target_for(images, output)))
