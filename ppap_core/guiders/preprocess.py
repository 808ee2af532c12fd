"""Preprocessing of images for a network: one differentiable object, built from the network's own files."""
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..io.values import is_number, is_whole, shown
from .fits import FITS
from .resize import Size, resize

Color = tuple[float, float, float]


LATER_FIELDS = ("square", "fill", "mirror", "pad_multiple")
"""Fields of `Preprocess` that came after version 0.1.0."""


@dataclass(frozen=True)
class Preprocess:
    """Image (B, 3, H, W) in [-1, 1] -> resized, cropped, and normalised as in the training of a network."""

    size: Size                        # (height, width), or what the fit makes of it
    mean: Color = (0.5, 0.5, 0.5)     # of images in [0, 1]
    std: Color = (0.5, 0.5, 0.5)
    interpolation: str = "bilinear"   # or "bicubic", "nearest-exact"
    fit: str = "stretch"              # a key of FITS
    multiple: float = 1               # pixels, for the fits that round; some files say 1/32
    crop: Size | None = None          # the middle of the resized image that is read, black beyond it
    crop_rounds: bool = False         # it begins at the nearest pixel, not at the one before
    antialias: bool = True
    align_corners: bool = False       # the centres of the corner pixels stay in their places
    bgr: bool = False                 # blue first
    square: bool = False              # made square before it is resized, in the middle of `fill`
    fill: Color = (0.0, 0.0, 0.0)     # colour in [0, 1] around an image that is padded or is smaller than the crop
    mirror: bool = False              # before it is resized, bordered by its own mirror image, as ZoeDepth wants it
    pad_multiple: int = 1             # pixels; in the end padded to the next multiple, in the middle of `fill`

    def __call__(self, image: Tensor) -> Tensor:
        fill, mean, std = (torch.tensor(values).to(image)[:, None, None] for values in (self.fill, self.mean, self.std))
        image = self.frame(image, beyond=fill * 2 - 1)
        image = ((image + 1) / 2 - mean) / std
        return image.flip(1) if self.bgr else image

    def frame(self, image: Tensor, interpolation: str = "", beyond: float | Tensor = -1.0) -> Tensor:
        """Pad, resize and crop only, for images and for maps that belong to them: (B, C, H, W) -> (B, C, h, w).

        interpolation: "": that of the network. beyond: the value around an image, for all channels or (C, 1, 1): -1 is black
        for images in [-1, 1]; maps and masks in [0, 1] take 0.
        """
        if self.square:
            edge = max(image.shape[-2:])
            image = _crop_middle(image, (edge, edge), False, beyond)
        if self.mirror:
            image = _with_mirrored_border(image)
        image = resize(image, self.resized(image), interpolation or self.interpolation, self.antialias, self.align_corners)
        if self.crop:
            image = _crop_middle(image, self.crop, self.crop_rounds, beyond)
        if self.pad_multiple > 1:
            height, width = (math.ceil(side / self.pad_multiple) * self.pad_multiple for side in image.shape[-2:])
            image = _crop_middle(image, (height, width), False, beyond)
        return image

    def resized(self, image: Tensor) -> Size:
        """(height, width) that an image (..., H, W) is resized to, before it is cropped."""
        height, width = image.shape[-2:]
        return FITS[self.fit]((height, width), self.size, self.multiple)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, for files; beyond the first four only those that differ from their defaults."""
        always = ("size", "mean", "std", "interpolation")
        return {field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
                for field in fields(self) if field.name in always or getattr(self, field.name) != field.default}

    def fingerprint_fields(self) -> dict[str, object]:
        """Fields for `digest`: all that version 0.1.0 had, of the later ones those that differ from their defaults."""
        neutral = {field.name: field.default for field in fields(self) if field.name in LATER_FIELDS}
        return {name: value for name, value in vars(self).items() if name not in neutral or value != neutral[name]}


CHANNELS: dict[str, dict[str, Any]] = {"own": {}, "red first": {"bgr": False}, "blue first": {"bgr": True}}
"""Order of an image's colours, as saved workflows have it -> fields; "own" is that of the network's files."""
PADDINGS: dict[str, dict[str, Any]] = {
    "own": {}, "none": {"square": False}, "black": {"square": True, "fill": (0.0, 0.0, 0.0)},
    "white": {"square": True, "fill": (1.0, 1.0, 1.0)}}
"""What is around an image that is made square, as saved workflows have it -> fields; "none": it is not made square."""


def _crop_middle(image: Tensor, crop: Size, rounds: bool, beyond: float | Tensor) -> Tensor:
    """The middle (height, width) of images, padded where they are smaller; rounds: cut at the nearest pixel."""
    spare = [side - wanted for side, wanted in zip(image.shape[-2:], crop, strict=True)]
    top, left = (round(pixels / 2) if rounds and pixels > 0 else int(pixels / 2) for pixels in spare)
    edges = (-left, left - spare[1], -top, top - spare[0])
    inside = F.pad(image.new_ones(1, 1, *image.shape[-2:]), edges) > 0
    return torch.where(inside, F.pad(image, edges), beyond)


def _with_mirrored_border(image: Tensor) -> Tensor:
    """Images with a border on each side of three times the root of half of their height or width."""
    top, left = (min(int(math.sqrt(side / 2) * 3), side - 1) for side in image.shape[-2:])
    return F.pad(image, (left, left, top, top), mode="reflect")


NO_LIMIT = 10**6  # an edge that no image reaches
LARGEST = 1e6     # number to normalize by
MAX_EDGE = 4096   # pixels of what a network reads: beyond all that there are

OF_ANOTHER_KIND = (TypeError, KeyError, AttributeError, IndexError, ArithmeticError)
"""Errors of files that hold something else than they should."""


def require_sound(preprocess: Preprocess, file: str) -> Preprocess:
    """The preprocessing, if what it asks for can be done. ValueError naming the file that it was read from."""
    numbers = *preprocess.mean, *preprocess.std, *preprocess.fill
    if not (all(is_number(value) and abs(value) <= LARGEST for value in numbers)
            and all(abs(value) >= 1 / LARGEST for value in preprocess.std)
            and is_number(preprocess.multiple) and 1e-4 <= preprocess.multiple <= MAX_EDGE
            and is_whole(preprocess.pad_multiple, 1, MAX_EDGE) and _has_sound_size(preprocess)):
        raise ValueError(f"{file} makes of images {shown(preprocess.to_dict())}: expected sides from 1 to {MAX_EDGE}, and "
                         "finite numbers to normalize by; copy the file again from the network's own page")
    return preprocess


def _has_sound_size(preprocess: Preprocess) -> bool:
    first, second = preprocess.size
    if preprocess.fit == "patches":
        return is_whole(first, 1, MAX_EDGE**2) and first * preprocess.multiple**2 <= MAX_EDGE**2
    longest = NO_LIMIT if preprocess.fit == "shortest" else MAX_EDGE
    return is_whole(first, 1, MAX_EDGE) and is_number(second) and 1 <= second <= longest and all(
        is_whole(side, 1, MAX_EDGE) for side in preprocess.crop or ())


TIMM_FITS = {"squash": "stretch", "border": "inside", "center": "cover"}
"""How timm calls the ways to make an image fit -> key of FITS."""


def timm_preprocess(data: Mapping[str, Any]) -> Preprocess:
    """Preprocess from the result of `timm.data.resolve_data_config`.

    ValueError for other than three channels, and for what cannot be done.
    """
    try:
        return require_sound(_timm_preprocess(data), "config.json")
    except OF_ANOTHER_KIND as error:
        raise ValueError(f"config.json says of images what cannot be read ({type(error).__name__}: {str(error)[:150]}): "
                         "copy the file again from the network's own page") from error


def _timm_preprocess(data: Mapping[str, Any]) -> Preprocess:
    channels, height, width = data["input_size"]
    mean, std = tuple(data["mean"]), tuple(data["std"])
    if (channels, len(mean), len(std)) != (3, 3, 3):
        raise ValueError(f"the network wants images of {channels} channels, with {len(mean)} means and {len(std)} "
                         "deviations: expected three, red, green and blue; take a network of colour images")
    mode = {"bilinear": "bilinear", "nearest": "nearest-exact"}.get(data["interpolation"], "bicubic")
    resized = int(height / data["crop_pct"]), int(width / data["crop_pct"])
    mode_of_crop = data.get("crop_mode") or "center"
    preprocess = Preprocess(resized, mean, std, mode, TIMM_FITS.get(mode_of_crop, "cover"), crop=(height, width),
                            crop_rounds=True)
    if mode_of_crop == "border":
        return replace(preprocess, fill=tuple(round(255 * value) / 255 for value in mean))
    if preprocess.fit == "cover" and height == width:
        return replace(preprocess, size=(resized[0], NO_LIMIT), fit="shortest")
    return preprocess
