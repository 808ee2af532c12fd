"""Preprocessing from a preprocessor_config.json of transformers."""
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..io.values import is_number, shown
from .fits import nearest_multiple
from .preprocess import NO_LIMIT, OF_ANOTHER_KIND, Color, Preprocess, require_sound
from .processors import AS_THE_CLASS_SAYS, agrees, library_processors, read_probes, settings
from .resize import Size

log = logging.getLogger(__name__)

FILE = "preprocessor_config.json"
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
        raise ValueError(f"preprocessor_config.json asks for {shown(unknown[0])}, which is not known here: expected some of "
                         f"{', '.join(KNOWN_STEPS)}; take a network that reads its images without it")


def _kind(config: Mapping[str, Any]) -> str:
    return str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")


def _read_config(config: Mapping[str, Any]) -> Preprocess:
    try:
        return require_sound(_read(config), FILE)
    except OF_ANOTHER_KIND as error:
        raise ValueError(f"{FILE} says of images what cannot be read ({type(error).__name__}: {str(error)[:150]}): copy the "
                         "file again from the network's own page") from error


def _read(config: Mapping[str, Any]) -> Preprocess:
    if infinite := [name for name, value in config.items() if isinstance(value, float) and not is_number(value)]:
        raise ValueError(f"{FILE} has the {shown(infinite[0])} {config[infinite[0]]}: expected a finite number; copy the "
                         "file again from the network's own page")
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
        raise ValueError(f"preprocessor_config.json has the {key} {shown(config.get(key))}: expected three numbers, or "
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
        raise ValueError(f"{FILE} has the {name} {shown(size)}: expected height and width, or shortest_edge; "
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
