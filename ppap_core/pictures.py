"""Pictures as targets, and answers as pictures."""
import torch
from torch import Tensor
from torch.nn import functional as F

from .guider import Guider, clean, reading
from .plots import bar_picture, depth_picture, label_picture, labels_of_picture


def map_target(guider: Guider, picture: Tensor) -> Tensor:
    """A drawn map (B, 3, H, W) in [-1, 1] as a target of the size the guider answers in.

    depth: grey, near is white -> (B, 1, h, w); segmentation: the colours of `label_picture` -> (B, h, w) long.
    """
    if guider.task == "class":
        raise ValueError(f"{guider.name} predicts classes, and there is no map of classes: aim it at a class, or say that "
                         "the image is a picture")
    size = reading(guider, picture[:1]).shape[-2:]
    if guider.task == "depth":
        return F.interpolate(picture.mean(1, keepdim=True), size, mode="bilinear", antialias=True)
    return labels_of_picture(F.interpolate(picture, size, mode="nearest-exact"), len(guider.labels))


@torch.no_grad()
def look_through(guider: Guider, images: Tensor) -> Tensor:
    """What the guider sees in clean images (B, 3, H, W), as pictures: a depth map, coloured labels, or class bars."""
    output = guider.predict(images, clean(images))
    if guider.task == "depth":
        return depth_picture(output)
    if guider.task == "segmentation":
        return label_picture(output.argmax(1))
    return torch.cat([bar_picture(_best(row, guider.labels)) for row in output.softmax(1)])


def _best(shares: Tensor, labels: tuple[str, ...], count: int = 8) -> dict[str, float]:
    top = shares.topk(min(count, len(shares)))
    return {labels[index]: value for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)}
