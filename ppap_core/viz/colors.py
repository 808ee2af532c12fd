"""Colours: an endless row of them for lines and labels, palettes, and maps as coloured pictures."""
import colorsys

import torch
from torch import Tensor


def color(index: int) -> tuple[int, int, int]:
    """Red, green and blue in 0 ... 255 of the index-th of an endless row of well separated colours."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + index * 0.618) % 1, 0.75, 0.8 - 0.25 * (index % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def palette(text: str, size: int = 64) -> Tensor:
    """Colours such as '#1d3557, #e63946:2' as a picture of stripes, (1, 3, size, size) in [-1, 1].

    text: six hexadecimal digits each; a number after a colon is the width of a stripe (1 without it).
    ValueError for text without colours.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError("no colour was given: expected some, such as #1d3557, #e63946, #f1faee")
    colors, widths = zip(*(_stripe(part) for part in parts), strict=True)
    edges = torch.tensor(widths).cumsum(0) / sum(widths)
    stripes = torch.searchsorted(edges, (torch.arange(size) + 0.5) / size).clamp_max(len(colors) - 1)
    row = torch.tensor(colors)[stripes].float() / 127.5 - 1
    return row.T[None, :, None].expand(1, 3, size, size).clone()


def _stripe(text: str) -> tuple[list[int], float]:
    code, _, width_text = text.partition(":")
    try:
        rgb, width = list(bytes.fromhex(code.strip().removeprefix("#"))), float(width_text or 1)
    except ValueError:
        rgb, width = [], 0.0
    if len(rgb) != 3 or not 0 < width < float("inf"):
        raise ValueError(f"'{text}' is no colour: expected six hexadecimal digits and, if you like, a colon and a width "
                         "above 0, such as #e63946:2")
    return rgb, width


def depth_picture(depth: Tensor) -> Tensor:
    """Depth maps (B, 1, H, W) in any unit as grey pictures (B, 3, H, W) in [-1, 1], the nearest (largest) white."""
    flat = depth.float().flatten(1)
    low, high = flat.amin(1)[:, None, None, None], flat.amax(1)[:, None, None, None]
    return ((depth.float() - low) / (high - low).clamp_min(1e-6) * 2 - 1).expand(-1, 3, -1, -1)


def label_picture(labels: Tensor) -> Tensor:
    """Label maps (B, H, W) as pictures (B, 3, H, W) in [-1, 1]: label k in `color(k)`, those above 255 in that of 255."""
    colors = torch.tensor([color(index) for index in range(256)], device=labels.device)
    return (colors[labels.clamp(0, 255)].permute(0, 3, 1, 2).float() / 127.5) - 1


def labels_of_picture(picture: Tensor, count: int) -> Tensor:
    """Label maps (B, H, W) read from pictures (B, 3, H, W): of the first `count` labels the one of the nearest colour."""
    colors = torch.tensor([color(index) for index in range(count)], device=picture.device).float() / 127.5 - 1
    return (picture.permute(0, 2, 3, 1)[..., None, :] - colors).square().sum(-1).argmin(-1)
