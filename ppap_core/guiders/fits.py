"""Sizes that networks want of an image, by the ways in which they follow from its own."""
import math
from collections.abc import Callable

from .resize import Size


def _exact(image: Size, size: Size, multiple: float) -> Size:
    """Exactly this height and width."""
    return size


def _shortest_edge(image: Size, size: Size, multiple: float) -> Size:
    """The shorter edge becomes size[0], unless the longer one would exceed size[1]; up to the next multiple."""
    short, long = min(image), max(image)
    edge = size[1] * short / long if long / short * size[0] > size[1] else size[0]
    shorter = int(math.ceil(round(edge) / multiple) * multiple)
    longer = int(math.ceil(int(edge * long / short) / multiple) * multiple)
    return (shorter, longer) if image[0] <= image[1] else (longer, shorter)


def _rounded_short(image: Size, size: Size, multiple: float) -> Size:
    """The shorter edge becomes size[0], both edges rounded; up to the next multiple."""
    scale = size[0] / min(image)
    height, width = (math.ceil(round(side * scale) / multiple) * multiple for side in image)
    return int(height), int(width)


def _inside(image: Size, size: Size, multiple: float) -> Size:
    """One scale for both edges, the largest at which neither is above the size."""
    ratio = max(image[0] / size[0], image[1] / size[1])
    return round(image[0] / ratio), round(image[1] / ratio)


def _cover(image: Size, size: Size, multiple: float) -> Size:
    """One scale for both edges, the smallest at which neither is below the size."""
    ratio = min(image[0] / size[0], image[1] / size[1])
    return round(image[0] / ratio), round(image[1] / ratio)


def _contain(image: Size, size: Size, multiple: float) -> Size:
    """One scale for both edges: of the two that reach the size, the one closer to 1; to the nearest multiple."""
    scale = min((size[0] / image[0], size[1] / image[1]), key=lambda scale: abs(1 - scale))
    return max(nearest_multiple(scale * image[0], multiple), 1), max(nearest_multiple(scale * image[1], multiple), 1)


def nearest_multiple(side: float, multiple: float) -> int:
    """A length in pixels, rounded to a multiple."""
    return int(round(side / multiple) * multiple)


def _native(image: Size, size: Size, multiple: float) -> Size:
    """The image's own size, down to a multiple."""
    return int(max(image[0] // multiple, 1) * multiple), int(max(image[1] // multiple, 1) * multiple)


def _max_patches(image: Size, size: Size, multiple: float) -> Size:
    """As large as size[0] patches of `multiple` pixels allow, close to the image's own proportions."""
    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        fits = math.prod(_whole_patches(image, middle, multiple)) <= size[0] * multiple**2
        low, high = (middle, high) if fits else (low, middle)
    return _whole_patches(image, low, multiple)


def _whole_patches(image: Size, scale: float, patch: float) -> Size:
    rows, columns = (max(math.ceil(side * scale / patch), 1) for side in image)
    return int(rows * patch), int(columns * patch)


FITS: dict[str, Callable[[Size, Size, float], Size]] = {
    "stretch": _exact, "shortest": _shortest_edge, "cover": _cover, "least": _contain, "own": _native,
    "patches": _max_patches, "short": _rounded_short, "inside": _inside}
"""How the size follows from that of the image: (image size, the network's size, multiple) -> (height, width).

The keys are part of the format of expert banks.
"""
