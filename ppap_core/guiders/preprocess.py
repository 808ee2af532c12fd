"""Preprocessing of images for a network: one differentiable object, built from the network's own files."""
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .resize import Size, resize

Color = tuple[float, float, float]


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


def _cover(image: Size, size: Size, multiple: float) -> Size:
    """One scale for both edges, the smallest at which neither is below the size."""
    ratio = min(image[0] / size[0], image[1] / size[1])
    return round(image[0] / ratio), round(image[1] / ratio)


def _contain(image: Size, size: Size, multiple: float) -> Size:
    """One scale for both edges: of the two that reach the size, the one closer to 1; to the nearest multiple."""
    scale = min((size[0] / image[0], size[1] / image[1]), key=lambda scale: abs(1 - scale))
    return max(_nearest(scale * image[0], multiple), 1), max(_nearest(scale * image[1], multiple), 1)


def _nearest(side: float, multiple: float) -> int:
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
    "patches": _max_patches}
"""How the size follows from that of the image: (image size, the network's size, multiple) -> (height, width).

The keys are part of the format of expert banks.
"""


LATER_FIELDS = ("square", "fill")
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
    fill: Color = (0.0, 0.0, 0.0)     # colour in [0, 1] around an image that is made square or is smaller than the crop

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
        height, width = image.shape[-2:]
        size, mode = FITS[self.fit]((height, width), self.size, self.multiple), interpolation or self.interpolation
        image = resize(image, size, mode, self.antialias, self.align_corners)
        return _crop_middle(image, self.crop, self.crop_rounds, beyond) if self.crop else image

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
    """The middle (height, width) of images, padded where they are smaller."""
    spare = [side - wanted for side, wanted in zip(image.shape[-2:], crop, strict=True)]
    top, left = (round(pixels / 2) if rounds else int(pixels / 2) for pixels in spare)
    edges = (-left, left - spare[1], -top, top - spare[0])
    inside = F.pad(image.new_ones(1, 1, *image.shape[-2:]), edges) > 0
    return torch.where(inside, F.pad(image, edges), beyond)


INTERPOLATIONS = {0: "nearest-exact", 1: "bicubic", 2: "bilinear", 3: "bicubic"}  # PIL's numbers; lanczos is nearly bicubic

SHORTER_EDGE = ("CLIP", "ChineseCLIP", "Bit", "ConvNext", "Levit", "MobileNet", "MobileViT", "PoolFormer", "MaskFormer",
                "Mask2Former", "OneFormer", "Eomt")
"""Kinds of processors in transformers that read a size of one number as the length of the shorter edge."""


def processor_preprocess(config: Mapping[str, Any]) -> Preprocess:
    """Preprocess from a preprocessor_config.json of transformers. ValueError for a size or a mean it does not say."""
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    mean, std = _normalization(config)
    zoe = kind.startswith("ZoeDepth")
    preprocess = Preprocess((1, 1), mean, std, INTERPOLATIONS.get(config.get("resample", 2), "bilinear"),
                            antialias=not (zoe or kind.startswith("DepthPro")), align_corners=zoe,
                            bgr=bool(config.get("do_flip_channel_order")))
    return _with_size(preprocess, config, kind)


def _normalization(config: Mapping[str, Any]) -> tuple[Color, Color]:
    # files of processors that never normalise do not say `do_normalize`
    if not config.get("do_normalize", "image_mean" in config and "do_flip_channel_order" not in config):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for key in ("image_mean", "image_std"):
        if not isinstance(config.get(key), list) or len(config[key]) != 3:
            raise ValueError(f"preprocessor_config.json has the {key} {config.get(key)!r}: expected three numbers, or "
                             "do_normalize false; copy the file again from the network's own page")
    return tuple(config["image_mean"]), tuple(config["image_std"])


def _height_and_width(size: int | list[int] | dict[str, int]) -> Size:
    if isinstance(size, dict):
        return size["height"], size["width"]
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _with_size(preprocess: Preprocess, config: Mapping[str, Any], kind: str) -> Preprocess:
    size = config.get("size") or {}
    if isinstance(size, int) and kind.startswith(SHORTER_EDGE):
        size = {"shortest_edge": size, "longest_edge": config.get("max_size")}
    cropped = preprocess
    if config.get("do_center_crop") and config.get("crop_size"):
        cropped = replace(preprocess, crop=_height_and_width(config["crop_size"]))
    if not config.get("do_resize", True):
        return replace(cropped, fit="own")
    if "max_num_patches" in config:
        patches = config["max_num_patches"]
        return replace(preprocess, size=(patches, patches), fit="patches", multiple=config.get("patch_size", 16))
    if isinstance(size, dict) and size.get("shortest_edge"):
        return _with_shorter_edge(cropped, config, kind, size["shortest_edge"], size.get("longest_edge"))
    if isinstance(size, (int, list)) or size.get("height"):
        return _with_both_edges(cropped, config, _height_and_width(size))
    if "size_divisor" in config:
        return replace(preprocess, fit="own", multiple=config["size_divisor"])
    raise ValueError(f"preprocessor_config.json has the size {size!r}: expected height and width, or shortest_edge; copy "
                     "the file again from the network's own page")


NO_LIMIT = 10**6  # an edge that no image reaches


def _with_shorter_edge(preprocess: Preprocess, config: Mapping[str, Any], kind: str, edge: int,
                       longest: int | None) -> Preprocess:
    share = config.get("crop_pct") or (0.875 if kind.startswith(("ConvNext", "Levit")) else None)
    if share and edge < 384:
        return replace(preprocess, size=(int(edge / share), NO_LIMIT), fit="shortest", crop=(edge, edge))
    if share or "do_split_image" in config:  # large ConvNeXt stretch; EoMT reads squares
        return replace(preprocess, size=(edge, edge), fit="stretch", crop=None)
    return replace(preprocess, size=(edge, longest or NO_LIMIT), fit="shortest", multiple=config.get("size_divisor") or 1)


def _with_both_edges(preprocess: Preprocess, config: Mapping[str, Any], size: Size) -> Preprocess:
    multiple = config.get("ensure_multiple_of") or 1
    if config.get("keep_aspect_ratio"):
        return replace(preprocess, size=size, fit="least", multiple=multiple)
    return replace(preprocess, size=(_nearest(size[0], multiple), _nearest(size[1], multiple)))


def timm_preprocess(data: Mapping[str, Any]) -> Preprocess:
    """Preprocess from the result of `timm.data.resolve_data_config`."""
    height, width = data["input_size"][1:]
    mode = data["interpolation"] if data["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    resized = int(height / data["crop_pct"]), int(width / data["crop_pct"])
    stretched = Preprocess(resized, tuple(data["mean"]), tuple(data["std"]), mode, crop=(height, width), crop_rounds=True)
    if data.get("crop_mode") == "squash":
        return stretched
    if height == width:
        return replace(stretched, size=(resized[0], NO_LIMIT), fit="shortest")
    return replace(stretched, fit="cover")
