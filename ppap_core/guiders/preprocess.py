"""What happens to an image before a network reads it: one differentiable object, built from the network's own numbers."""
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]


def _exact(image: Size, size: Size, multiple: float) -> Size:
    """Exactly this height and width."""
    return size


def _shortest_edge(image: Size, size: Size, multiple: float) -> Size:
    """The shorter edge becomes size[0], unless the longer would exceed size[1]; up to the next multiple."""
    short, long = min(image), max(image)
    edge = size[1] * short / long if long / short * size[0] > size[1] else size[0]
    sides = (round(edge), int(edge * long / short))
    sides = sides if image[0] <= image[1] else sides[::-1]
    return tuple(math.ceil(side / multiple) * multiple for side in sides)


def _cover(image: Size, size: Size, multiple: float) -> Size:
    """One scale for both edges, the smallest at which neither is below the size."""
    ratio = min(side / wanted for side, wanted in zip(image, size, strict=True))
    return tuple(round(side / ratio) for side in image)


def _contain(image: Size, size: Size, multiple: float) -> Size:
    """One scale for both edges, of the two that reach the size the one closer to 1; to the nearest multiple."""
    scale = min((wanted / side for wanted, side in zip(size, image, strict=True)), key=lambda s: abs(1 - s))
    return tuple(max(int(round(scale * side / multiple) * multiple), 1) for side in image)


def _native(image: Size, size: Size, multiple: float) -> Size:
    """The image's own size, down to the next multiple."""
    return tuple(max(side // multiple, 1) * multiple for side in image)


def _max_patches(image: Size, size: Size, multiple: float) -> Size:
    """As large as size[0] patches of `multiple` pixels allow, close to the image's own proportions."""
    def at(scale: float) -> Size:
        return tuple(max(math.ceil(side * scale / multiple), 1) * multiple for side in image)

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(at(middle)) <= size[0] * multiple**2 else (low, middle)
    return at(low)


FITS: dict[str, Callable[[Size, Size, float], Size]] = {
    "stretch": _exact, "shortest": _shortest_edge, "cover": _cover, "least": _contain, "own": _native, "patches": _max_patches}
"""How a size follows from that of the image: (image size, the network's size, multiple) -> (height, width)."""


@dataclass(frozen=True)
class Preprocess:
    """Image (B, 3, H, W) in [-1, 1] -> resized, cropped, with the mean and spread that a network was trained on."""

    size: Size                                          # (height, width), or what the fit makes of it
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of images in [0, 1]
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bilinear"                     # or "bicubic", "nearest-exact"
    fit: str = "stretch"                                # a key of FITS
    multiple: float = 1                                 # of pixels, for the fits that round
    crop: Size | None = None                            # the middle of the resized image that is read, black beyond it
    crop_rounds: bool = False                           # it begins at the nearest pixel, not at the one before
    antialias: bool = True
    align_corners: bool = False                         # the middles of the corner pixels stay in their places
    bgr: bool = False                                   # blue first

    def __call__(self, image: Tensor) -> Tensor:
        image = self.frame(image)
        mean, std = (torch.tensor(values).to(image)[:, None, None] for values in (self.mean, self.std))
        image = ((image + 1) / 2 - mean) / std
        return image.flip(1) if self.bgr else image

    def frame(self, image: Tensor, interpolation: str = "") -> Tensor:
        """Only the geometry, for images and for maps that belong to them: (B, C, H, W) -> (B, C, h, w)."""
        size, mode = FITS[self.fit](tuple(image.shape[-2:]), self.size, self.multiple), interpolation or self.interpolation
        if tuple(image.shape[-2:]) != size:
            smooth = {"antialias": self.antialias, "align_corners": self.align_corners} if mode != "nearest-exact" else {}
            image = F.interpolate(image, size, mode=mode, **smooth)
        return self._middle(image) if self.crop else image

    def _middle(self, image: Tensor) -> Tensor:
        spare = [side - crop for side, crop in zip(image.shape[-2:], self.crop, strict=True)]
        top, left = (round(each / 2) if self.crop_rounds else int(each / 2) for each in spare)
        return F.pad(image, (-left, left - spare[1], -top, top - spare[0]), value=-1.0)

    def about(self) -> dict:
        """The numbers as JSON has them, for files; what is left at its default is not mentioned."""
        first = ("size", "mean", "std", "interpolation")
        return {field.name: list(value) if isinstance(value := getattr(self, field.name), tuple) else value
                for field in fields(self) if field.name in first or getattr(self, field.name) != field.default}


INTERPOLATIONS = {0: "nearest-exact", 1: "bicubic", 2: "bilinear", 3: "bicubic"}  # PIL's numbers; lanczos is nearly bicubic

SHORTER_EDGE = ("CLIP", "ChineseCLIP", "Bit", "ConvNext", "Levit", "MobileNet", "MobileViT", "PoolFormer", "MaskFormer",
                "Mask2Former", "OneFormer", "Eomt")
"""Kinds of processors in transformers that read a size of one number as the length of the shorter edge."""


def processor_preprocess(config: dict) -> Preprocess:
    """Preprocess from a preprocessor_config.json of transformers. ValueError for a size or a mean it does not say."""
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    mean, std = _normalisation(config)
    size, fit, multiple, crop = _size_of(config, kind)
    zoe = kind.startswith("ZoeDepth")
    return Preprocess(size, mean, std, INTERPOLATIONS.get(config.get("resample", 2), "bilinear"), fit, multiple, crop,
                      antialias=not (zoe or kind.startswith("DepthPro")), align_corners=zoe,
                      bgr=bool(config.get("do_flip_channel_order")))


def _normalisation(config: dict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std. Files of processors that never normalise do not say `do_normalize`."""
    if not config.get("do_normalize", "image_mean" in config and "do_flip_channel_order" not in config):
        return (0.0,) * 3, (1.0,) * 3
    for key in ("image_mean", "image_std"):
        if not isinstance(config.get(key), list) or len(config[key]) != 3:
            raise ValueError(f"preprocessor_config.json has the {key} {config.get(key)!r}: expected three numbers, or "
                             "do_normalize false; copy the file again from the network's own page")
    return tuple(config["image_mean"]), tuple(config["image_std"])


def _height_and_width(size: int | list | dict) -> Size:
    if isinstance(size, dict):
        return size["height"], size["width"]
    return (size, size) if isinstance(size, int) else tuple(size)


def _size_of(config: dict, kind: str) -> tuple[Size, str, float, Size | None]:
    """Size, fit, multiple and crop of a preprocessor_config.json."""
    size, crop = config.get("size") or {}, None
    if config.get("do_center_crop") and config.get("crop_size"):
        crop = _height_and_width(config["crop_size"])
    if isinstance(size, int) and kind.startswith(SHORTER_EDGE):
        size = {"shortest_edge": size, "longest_edge": config.get("max_size")}
    if not config.get("do_resize", True):
        return (1, 1), "own", 1, crop
    if "max_num_patches" in config:
        return (config["max_num_patches"],) * 2, "patches", config.get("patch_size", 16), None
    if isinstance(size, dict) and size.get("shortest_edge"):
        return _shorter_edge(config, kind, size["shortest_edge"], size.get("longest_edge"), crop)
    if isinstance(size, (int, list)) or size.get("height"):
        return _both_edges(config, _height_and_width(size), crop)
    if "size_divisor" in config:
        return (1, 1), "own", config["size_divisor"], None
    raise ValueError(f"preprocessor_config.json has the size {size!r}: expected height and width, or shortest_edge; copy "
                     "the file again from the network's own page")


NO_LIMIT = 10**6  # an edge that no image reaches


def _shorter_edge(config: dict, kind: str, edge: int, longest: int | None,
                  crop: Size | None) -> tuple[Size, str, float, Size | None]:
    share = config.get("crop_pct") or (0.875 if kind.startswith(("ConvNext", "Levit")) else None)
    if share and edge < 384:
        return (int(edge / share), NO_LIMIT), "shortest", 1, (edge, edge)
    if share or "do_split_image" in config:  # large ConvNeXt stretch; EoMT reads squares
        return (edge, edge), "stretch", 1, None
    return (edge, longest or NO_LIMIT), "shortest", config.get("size_divisor") or 1, crop


def _both_edges(config: dict, size: Size, crop: Size | None) -> tuple[Size, str, float, Size | None]:
    multiple = config.get("ensure_multiple_of") or 1
    if config.get("keep_aspect_ratio"):
        return size, "least", multiple, crop
    return tuple(int(round(side / multiple) * multiple) for side in size), "stretch", 1, crop


def timm_preprocess(data: dict) -> Preprocess:
    """Preprocess from what `timm.data.resolve_data_config` returns."""
    size = tuple(data["input_size"][1:])
    mode = data["interpolation"] if data["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    numbers = {"mean": tuple(data["mean"]), "std": tuple(data["std"]), "interpolation": mode, "crop_rounds": True}
    resized = tuple(int(side / data["crop_pct"]) for side in size)
    if data.get("crop_mode") == "squash":
        return Preprocess(resized, **numbers, crop=size)
    if size[0] == size[1]:
        return Preprocess((resized[0], NO_LIMIT), **numbers, fit="shortest", crop=size)
    return Preprocess(resized, **numbers, fit="cover", crop=size)
