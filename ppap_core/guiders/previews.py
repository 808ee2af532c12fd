"""Answers of guiders as pictures."""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..viz.plots import bar_chart, depth_picture, label_picture, note_picture
from .guider import Guider, clean

SIDE = 256  # of pictures that are not maps


@torch.no_grad()
def visualize(guider: Guider, images: Tensor) -> Tensor:
    """What the guider sees in clean images (B, 3, H, W), as pictures (B, 3, h, w).

    Maps as maps, classes as bars, numbers in words, what rules read as small pictures; of all else, such as an embedding,
    how close it is to the target.
    """
    output = guider.predict(images, clean(images))
    draw = PICTURES.get(guider.name) or PICTURES.get(guider.task, _closeness)
    return draw(guider, images, output).clamp(-1, 1)


def _classes(guider: Guider, images: Tensor, output: Tensor) -> Tensor:
    return torch.cat([bar_chart(_best(row, guider.labels)) for row in output.softmax(1)])


def _best(shares: Tensor, labels: tuple[str, ...], count: int = 8) -> dict[str, float]:
    top = shares.topk(min(count, len(shares)))
    return {labels[index]: value for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)}


def _numbers(guider: Guider, images: Tensor, output: Tensor) -> Tensor:
    lines = [[f"{guider.name}: {number:.4g}"] for number in output.flatten().tolist()]
    if guider.target is not None:
        for line, wanted in zip(lines, guider.target_for(images, output).expand(len(images), 1).flatten(), strict=True):
            line.append(f"aimed at {wanted:.4g}")
    return torch.cat([note_picture(line) for line in lines])


def _closeness(guider: Guider, images: Tensor, output: Tensor) -> Tensor:
    if guider.target is None:
        note = note_picture([f"{guider.name} answers with {guider.task}, which is no picture.",
                             "Aim it, and how close an image is to the target is shown here."])
        return note.expand(len(images), -1, -1, -1)
    energies, scores = guider.energy(images, clean(images)), guider.score(images, clean(images))
    return torch.cat([bar_chart({f"energy {energy:.4g}, met to": score})
                      for energy, score in zip(energies.tolist(), scores.tolist(), strict=True)])


def _stripes(guider: Guider, images: Tensor, output: Tensor) -> Tensor:
    """The colours of the images from dark to light, each as wide as its share."""
    pixels = images.flatten(2)
    order = pixels.mean(1, keepdim=True).argsort(2).expand(-1, 3, -1)
    shares = F.adaptive_avg_pool1d(pixels.gather(2, order), output.shape[2])
    return F.interpolate(shares[:, :, None].expand(-1, -1, SIDE, -1), (SIDE, SIDE))


PICTURES: dict[str, Callable[[Guider, Tensor, Tensor], Tensor]] = {  # by the name of a rule, or by task
    "class": _classes, "number": _numbers,
    "depth": lambda guider, images, output: depth_picture(output),
    "segmentation": lambda guider, images, output: label_picture(output.argmax(1)),
    "mask": lambda guider, images, output: (2 * output.sigmoid() - 1).expand(-1, 3, -1, -1),
    "rule/colours": _stripes,
    "rule/layout": lambda guider, images, output: F.interpolate(output, (SIDE, SIDE)),
    "rule/edges": lambda guider, images, output: depth_picture(output),
}
