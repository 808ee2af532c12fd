"""Preprocessing of images for a network: one differentiable object, built from the network's own files."""
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .fits import FITS, nearest_multiple
from .processors import AS_THE_CLASS_SAYS, agrees, library_processors, read_probes, settings
from .resize import Size, resize

log = logging.getLogger(__name__)

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


INTERPOLATIONS = {0: "nearest-exact", 1: "bicubic", 2: "bilinear", 3: "bicubic"}  # PIL's numbers; lanczos is nearly bicubic

SHORTER_EDGE = ("CLIP", "ChineseCLIP", "Bit", "ConvNext", "Levit", "MobileNet", "MobileViT", "PoolFormer", "MaskFormer",
                "Mask2Former", "OneFormer", "Eomt")
"""Kinds of processors in transformers that read a size of one number as the length of the shorter edge."""


KNOWN_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_flip_channel_order", "do_convert_rgb",
               "do_reduce_labels", "do_pad", "do_split_image")
"""Steps that a preprocessor_config.json may ask for; all others are refused where transformers does not know the class."""


def processor_preprocess(config: Mapping[str, Any]) -> Preprocess:
    """Preprocess from a preprocessor_config.json of transformers, equal to what its own processor does.

    What the file leaves out is as the class of transformers has it, and the result is compared with that class on a few
    images. ValueError where they differ, and for a size, a mean or a step that cannot be read.
    """
    processors = library_processors(config)
    if not processors:
        _refuse_unknown_steps(config)
        return _read_config(config)
    config = {**config, **settings(processors[0])}
    preprocess = _read_config(config)
    squares = _reads_squares(config) and preprocess.fit == "stretch"
    if squares:
        log.warning("%s cuts or pads images that are not square; here they are stretched to squares", _kind(config))
    other_order = replace(preprocess, bgr=not preprocess.bgr)  # a class may turn blue first without a word in its file
    for probes in read_probes(processors, squares):
        for candidate in (preprocess, other_order):
            if agrees(candidate, probes):
                return candidate
    raise ValueError(f"{_kind(config)} {AS_THE_CLASS_SAYS}")


def _refuse_unknown_steps(config: Mapping[str, Any]) -> None:
    unknown = [name for name, value in config.items() if name.startswith("do_") and value and name not in KNOWN_STEPS]
    if unknown:
        raise ValueError(f"preprocessor_config.json asks for {unknown[0]}, which is not known here: expected some of "
                         f"{', '.join(KNOWN_STEPS)}; take a network that reads its images without it")


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")


def _read_config(config: Mapping[str, Any]) -> Preprocess:
    kind = _kind(config)
    mean, std = _normalization(config)
    zoe = kind.startswith("ZoeDepth")
    preprocess = Preprocess((1, 1), mean, std, INTERPOLATIONS.get(config.get("resample", 2), "bilinear"),
                            antialias=not (zoe or kind.startswith("DepthPro")), align_corners=zoe,
                            bgr=bool(config.get("do_flip_channel_order")))
    return _with_size(_with_padding(preprocess, config, kind), config, kind)


def _normalization(config: Mapping[str, Any]) -> tuple[Color, Color]:
    """Mean and std of images in [0, 1], of all steps that only multiply and add."""
    mean, std = _mean_and_std(config)
    scale, offset = _rescaling(config)
    if (scale, offset) != (1, 0):  # (image * scale - offset - mean) / std
        mean, std = _color((value + offset) / scale for value in mean), _color(value / scale for value in std)
    if config.get("include_top"):  # EfficientNet divides once more
        std = _color(value * again for value, again in zip(std, _three_numbers(config, "image_std"), strict=True))
    return mean, std


def _color(values: Iterable[float]) -> Color:
    red, green, blue = values
    return red, green, blue


def _mean_and_std(config: Mapping[str, Any]) -> tuple[Color, Color]:
    # files of processors that never normalise do not say `do_normalize`
    if not config.get("do_normalize", "image_mean" in config and "do_flip_channel_order" not in config):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return _three_numbers(config, "image_mean"), _three_numbers(config, "image_std")


def _rescaling(config: Mapping[str, Any]) -> tuple[float, float]:
    """What images in [0, 1] are multiplied by, and what is taken away then."""
    if not config.get("do_rescale", True):
        return 255, 0
    scale = 255 * config.get("rescale_factor", 1 / 255)
    return 1 if abs(scale - 1) < 1e-6 else scale, 1 if config.get("rescale_offset") else 0


def _three_numbers(config: Mapping[str, Any], key: str) -> Color:
    if not isinstance(config.get(key), list) or len(config[key]) != 3:
        raise ValueError(f"preprocessor_config.json has the {key} {config.get(key)!r}: expected three numbers, or "
                         "do_normalize false; copy the file again from the network's own page")
    return tuple(config[key])


def _with_padding(preprocess: Preprocess, config: Mapping[str, Any], kind: str) -> Preprocess:
    if not config.get("do_pad"):
        return preprocess
    if kind.startswith("ZoeDepth"):
        return replace(preprocess, mirror=True)
    if config.get("size_divisor") and "keep_aspect_ratio" in config:  # others resize to multiples of it
        return replace(preprocess, pad_multiple=config["size_divisor"], fill=preprocess.mean)
    return preprocess  # to the largest image of a batch


def _height_and_width(size: Any, name: str = "size") -> Size:
    height, width = (size, size)
    if isinstance(size, dict):
        height, width = size.get("height"), size.get("width")
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        height, width = size
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise ValueError(f"preprocessor_config.json has the {name} {size!r}: expected height and width, or shortest_edge; "
                         "copy the file again from the network's own page")
    return height, width


def _with_size(preprocess: Preprocess, config: Mapping[str, Any], kind: str) -> Preprocess:
    size = config.get("size") or {}
    if isinstance(size, int) and kind.startswith(SHORTER_EDGE):
        size = {"shortest_edge": size, "longest_edge": config.get("max_size")}
    cropped = preprocess
    if config.get("do_center_crop") and config.get("crop_size"):
        cropped = replace(preprocess, crop=_height_and_width(config["crop_size"], "crop_size"))
    if not config.get("do_resize", True):
        return replace(cropped, fit="own")
    if "max_num_patches" in config:
        patches = config["max_num_patches"]
        return replace(preprocess, size=(patches, patches), fit="patches", multiple=config.get("patch_size", 16))
    if config.get("resize_short"):
        edge = config["resize_short"]
        return replace(cropped, size=(edge, edge), fit="short", multiple=config.get("size_divisor") or 1)
    if isinstance(size, dict) and size.get("shortest_edge"):
        return _with_shorter_edge(cropped, config, kind, size["shortest_edge"], size.get("longest_edge"))
    if not size and "size_divisor" in config:
        return replace(preprocess, fit="own", multiple=config["size_divisor"])
    return _with_both_edges(cropped, config, _height_and_width(size or None))


NO_LIMIT = 10**6  # an edge that no image reaches


def _with_shorter_edge(preprocess: Preprocess, config: Mapping[str, Any], kind: str, edge: int,
                       longest: int | None) -> Preprocess:
    levit = kind.startswith("Levit")
    share = config.get("crop_pct") or (0.875 if levit or kind.startswith("ConvNext") else None)
    if share and (levit or edge < 384 or kind.startswith("PoolFormer")):
        # ConvNeXt always crops what it reads, the others where their files say so
        whole = "do_center_crop" not in config or kind.startswith("ConvNext")
        return replace(preprocess, size=(int(edge / share), NO_LIMIT), fit="shortest",
                       crop=(edge, edge) if whole else preprocess.crop)
    if share or _reads_squares(config):  # large ConvNeXt stretch
        return replace(preprocess, size=(edge, edge), fit="stretch", crop=None)
    return replace(preprocess, size=(edge, longest or NO_LIMIT), fit="shortest", multiple=config.get("size_divisor") or 1)


def _reads_squares(config: Mapping[str, Any]) -> bool:
    """Whether a network reads squares that its processor cuts out of an image or pads it to: EoMT."""
    return bool(config.get("do_split_image") or ("do_split_image" in config and config.get("do_pad")))


def _with_both_edges(preprocess: Preprocess, config: Mapping[str, Any], size: Size) -> Preprocess:
    multiple = config.get("ensure_multiple_of") or 1
    if config.get("keep_aspect_ratio"):
        return replace(preprocess, size=size, fit="least", multiple=multiple)
    return replace(preprocess, size=(nearest_multiple(size[0], multiple), nearest_multiple(size[1], multiple)))


TIMM_FITS = {"squash": "stretch", "border": "inside", "center": "cover"}
"""How timm calls the ways to make an image fit -> key of FITS."""


def timm_preprocess(data: Mapping[str, Any]) -> Preprocess:
    """Preprocess from the result of `timm.data.resolve_data_config`. ValueError for other than three channels."""
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
