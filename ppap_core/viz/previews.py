"""Previews: the outputs of networks and rules as pictures (B, 3, h, w) in [-1, 1], one for each image."""
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .colors import label_picture
from .drawing import bar_chart, note_picture

PREVIEW_SIZE = 256  # height and width of previews that are no maps


def class_bars(logits: Tensor, labels: tuple[str, ...], count: int = 8) -> Tensor:
    """The most probable classes as bars; logits (B, K), K labels."""
    return torch.cat([bar_chart(_most_probable(row, labels, count)) for row in logits.softmax(1)])


def tag_bars(logits: Tensor, labels: tuple[str, ...], count: int = 8) -> Tensor:
    """The most probable tags as bars, each with a probability of its own; logits (B, K), K labels."""
    return torch.cat([bar_chart(_most_probable(row, labels, count)) for row in logits.sigmoid()])


def _most_probable(shares: Tensor, labels: tuple[str, ...], count: int) -> dict[str, float]:
    top = shares.topk(min(count, len(shares)))
    return {labels[index]: value for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)}


def label_map(logits: Tensor, labels: tuple[str, ...] = ()) -> Tensor:
    """The most probable class of each pixel, in the colours of `label_picture`; logits (B, K, h, w)."""
    return label_picture(logits.argmax(1))


def mask_picture(logits: Tensor, labels: tuple[str, ...] = ()) -> Tensor:
    """The probability of a mask, 1 is white; logits (B, 1, h, w)."""
    return (2 * logits.sigmoid() - 1).expand(-1, 3, -1, -1)


def number_notes(names: Sequence[str], numbers: Tensor, targets: Tensor | None, count: int = 8) -> Tensor:
    """The first numbers (B, K) in words under K names, with their targets (B, K), NaN where there are none."""
    if targets is None:
        targets = torch.full_like(numbers, math.nan)
    return torch.cat([note_picture(list(_number_lines(names, *rows))[:2 * count])
                      for rows in zip(numbers.tolist(), targets.tolist(), strict=True)])


def _number_lines(names: Sequence[str], numbers: list[float], targets: list[float]) -> Iterator[str]:
    for name, number, target in zip(names, numbers, targets, strict=True):
        yield f"{name}: {number:.4g}"
        if not math.isnan(target):
            yield f"aimed at {target:.4g}"


def target_bars(energies: Tensor, scores: Tensor) -> Tensor:
    """How well each image meets its target: a bar for its score (B,) in [0, 1], with its energy (B,)."""
    return torch.cat([bar_chart({f"energy {energy:.4g}, met to": score})
                      for energy, score in zip(energies.tolist(), scores.tolist(), strict=True)])


def text_note(lines: Sequence[str], count: int) -> Tensor:
    """A note of some sentences, repeated for `count` images."""
    return note_picture(lines).expand(count, -1, -1, -1)


def color_stripes(images: Tensor, colors: Tensor) -> Tensor:
    """The colours of images (B, 3, H, W) from dark to light as stripes, as many as `colors` (B, n, shares) has shares."""
    pixels = images.flatten(2)
    order = pixels.mean(1, keepdim=True).argsort(2).expand(-1, 3, -1)
    stripes = F.adaptive_avg_pool1d(pixels.gather(2, order), colors.shape[2])
    return F.interpolate(stripes[:, :, None].expand(-1, -1, PREVIEW_SIZE, -1), (PREVIEW_SIZE, PREVIEW_SIZE))


def enlarged(images: Tensor, small: Tensor) -> Tensor:
    """A small picture (B, 3, h, w) of each image, in large pixels; the images themselves do not matter."""
    return F.interpolate(small, (PREVIEW_SIZE, PREVIEW_SIZE))
