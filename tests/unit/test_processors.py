"""Preprocessing against all image processors of the installed transformers: equal, or refused in one sentence."""
import importlib
import inspect
import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import says
from torch import Tensor

from ppap_core.guiders.processor_config import processor_preprocess
from ppap_core.guiders.resize import Size

pytestmark = pytest.mark.slow  # all together take several seconds of the fast tests' minute

SIZES: tuple[Size, ...] = ((320, 490), (333, 222), (200, 200), (800, 1000))  # height, width
READ = ("beit", "bit", "blip", "chmv2", "clip", "convnext", "deit", "depth_pro", "dinov3_vit", "dpt",
        "efficientnet", "eomt", "glpn", "levit", "maskformer", "mask2former", "mobilenet_v1", "mobilenet_v2", "mobilevit",
        "poolformer", "pp_lcnet", "prompt_depth_anything", "pvt", "segformer", "siglip", "siglip2", "vit", "zoedepth")
"""Folders of processors of networks that can guide: none of these may be refused."""
UNREADABLE = {"oneformer": "its file names another file, with the names of the classes",
              "timm_wrapper": "it is made of a timm network's own configuration"}
"""Folders whose processors cannot be made of their defaults."""


def folders() -> list[str]:
    """Folders of transformers that hold image processors."""
    found = find_spec("transformers")
    files = sorted(Path(found.origin).parent.glob("models/*/image_processing_*.py")) if found and found.origin else []
    return sorted({file.parent.name for file in files} - {"auto"})


def processor_classes(folder: str) -> Iterator[Any]:
    from transformers.image_processing_utils import BaseImageProcessor

    package = Path(importlib.import_module("transformers").__file__).parent / "models" / folder
    for file in sorted(package.glob("image_processing_*.py")):
        module = importlib.import_module(f"transformers.models.{folder}.{file.stem}")
        for name, kind in vars(module).items():
            own = inspect.isclass(kind) and issubclass(kind, BaseImageProcessor) and kind.__module__ == module.__name__
            if own and "ImageProcessor" in name and hasattr(importlib.import_module("transformers"), name):
                yield kind


def smooth(size: Size) -> Tensor:
    """An image (3, H, W) in [0, 1] in which every place and channel is another, and filters hardly matter."""
    down, right = torch.meshgrid(*(torch.linspace(0, 1, side) for side in size), indexing="ij")
    blue = 0.4 + 0.4 * torch.cos(2 * right + down)
    return (torch.stack([0.9 - 0.5 * right - 0.2 * down * down, 0.1 + 0.7 * right * down, blue]) * 255).round() / 255


def theirs(processor: Any, image: Tensor) -> Tensor:
    out = processor(images=[(image * 255).to(torch.uint8).permute(1, 2, 0).numpy()], return_tensors="pt")
    values = out["pixel_values"]
    if "spatial_shapes" in out:
        rows, columns = out["spatial_shapes"][0].tolist()
        edge = math.isqrt(values.shape[-1] // 3)
        values = values[0, :rows * columns].reshape(rows, columns, edge, edge, 3).permute(4, 0, 2, 1, 3)
        values = values.reshape(1, 3, rows * edge, columns * edge)
    return values if isinstance(values, Tensor) else values[0]


def assert_equal_or_refused(processor: Any, sizes: tuple[Size, ...] = SIZES, loose: float = 0.01) -> bool:
    """Whether the processor's own file is read; then every image is as the processor makes it, to 1 % of the range.

    Rounding to 8 bits after each of two passes takes half of that, and no other mistake is so small: another filter, place,
    mean or order of channels shows in every smooth image.
    """
    name = type(processor).__name__
    try:
        preprocess = processor_preprocess(json.loads(processor.to_json_string()))
    except ValueError as refusal:
        message = str(refusal)
        assert "\n" not in message and len(message) < 500 and (name in message or "preprocessor_config.json" in message)
        return False
    for size in sizes:
        image = smooth(size)
        try:
            expected = theirs(processor, image)
        except KeyError:
            continue  # of two classes of a kind one may be broken: ChineseCLIP's of 4.57
        found = preprocess(image[None] * 2 - 1)
        assert found.shape == expected.shape, f"{name} of an image of {size}"
        spread = max(float(expected.max() - expected.min()), 0.5 / min(preprocess.std))  # of a crop it is small
        difference = (found - expected).abs().max() / spread
        assert difference < loose, f"{name} of an image of {size}: {difference:.3f} of the range"
    return True


def make(kind: Any, **settings: Any) -> Any | None:
    """A processor, or None where this release cannot make it without a file or a package."""
    try:
        return kind(**settings)
    except (ImportError, TypeError, ValueError, OSError, AttributeError):
        return None


def named(kind: str, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{kind}ImageProcessor"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}ImageProcessor")
    return getattr(transformers, f"{kind}ImageProcessor")(**settings)


@pytest.mark.wide  # 90 s for the two hundred of transformers 5
@pytest.mark.parametrize("folder", folders())
def test_every_processor_is_equal_or_refused(folder):
    processors = [processor for kind in processor_classes(folder) if (processor := make(kind))]
    if not processors:
        pytest.skip(UNREADABLE.get(folder, "no processor of this folder can be made of its defaults here"))
    read = [assert_equal_or_refused(processor) for processor in processors]
    assert all(read) or folder not in READ


SQUARE = {"height": 96, "width": 96}
NORMAL = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}
STEPS = {  # name of the case -> (kind, settings), one step that is unlike the defaults of the kind
    "EfficientNet": ("EfficientNet", {}),
    "EfficientNet, once": ("EfficientNet", {"include_top": False}),
    "EfficientNet, offset": ("EfficientNet", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
    "EfficientNet, offset alone": ("EfficientNet", {"rescale_offset": True, "do_normalize": False, "include_top": False}),
    "EfficientNet, top alone": ("EfficientNet", {"do_normalize": False, "include_top": True}),
    "EfficientNet, crop": ("EfficientNet", {"do_center_crop": True, "crop_size": SQUARE}),
    "ViT, bytes": ("ViT", {"size": SQUARE, "do_rescale": False, "image_mean": [127.5] * 3, "image_std": [60.0] * 3}),
    "ViT, bytes unnormalised": ("ViT", {"size": SQUARE, "do_rescale": False, "do_normalize": False}),
    "ViT, other factor": ("ViT", {"size": SQUARE, "rescale_factor": 1 / 127.5, **NORMAL}),
    "ViT, factor alone": ("ViT", {"size": SQUARE, "rescale_factor": 0.01, "do_normalize": False}),
    "ViT, nearest": ("ViT", {"size": SQUARE, "resample": 0}),
    "PPLCNet": ("PPLCNet", {}),
    "PPLCNet, steps": ("PPLCNet", {"resize_short": 100, "size_divisor": 32, "do_center_crop": False}),
    "PPLCNet, short only": ("PPLCNet", {"resize_short": 333, "do_center_crop": False}),
    "CHMv2": ("CHMv2", {}),
    "CHMv2, resized": ("CHMv2", {"do_resize": True, "size_divisor": 48}),
    "CHMv2, not padded": ("CHMv2", {"do_pad": False}),
    "DPT, padded": ("DPT", {"size": {"height": 90, "width": 70}, "do_pad": True, "size_divisor": 32}),
    "DPT, padded proportions": ("DPT", {"size": SQUARE, "do_pad": True, "size_divisor": 28, "keep_aspect_ratio": True}),
    "ZoeDepth": ("ZoeDepth", {}),
    "ZoeDepth, stretched": ("ZoeDepth", {"keep_aspect_ratio": False, "size": SQUARE}),
    "ZoeDepth, padded only": ("ZoeDepth", {"do_resize": False}),
    "CLIP, larger crop": ("CLIP", {"size": {"shortest_edge": 64}, "crop_size": {"height": 80, "width": 100}}),
    "CLIP, stretched": ("CLIP", {"size": SQUARE, "do_center_crop": False}),
    "LeViT, whole": ("Levit", {"do_center_crop": False}),
    "LeViT, other crop": ("Levit", {"size": {"shortest_edge": 90}, "crop_size": {"height": 90, "width": 102}}),
    "PoolFormer, whole": ("PoolFormer", {"do_center_crop": False}),
    "PoolFormer, other crop": ("PoolFormer", {"size": {"shortest_edge": 90}, "crop_size": SQUARE}),
    "Segformer, labels": ("Segformer", {"size": SQUARE, "do_reduce_labels": True}),
    "MobileViT, not flipped": ("MobileViT", {"do_flip_channel_order": False}),
    "EoMT, whole": ("Eomt", {"size": {"shortest_edge": 96, "longest_edge": 150}}),
}


@pytest.mark.parametrize("kind, settings", STEPS.values(), ids=STEPS)
def test_every_step_of_a_file_is_done(kind, settings):
    assert assert_equal_or_refused(named(kind, **settings), SIZES[:3])


REFUSED = {  # name of the case -> (kind, settings): steps that need more than a picture
    "gray": ("SuperPoint", {"do_grayscale": True}),
    "white margins": ("Nougat", {}),
    "turned": ("Donut", {"do_align_long_axis": True}),
    "tiles": ("LlavaNext", {}),
    "pairs": ("SuperGlue", {}),
    "palette": ("ImageGPT", {}),
    "patches": ("Qwen2VL", {}),
    "padded to a square": ("Owlv2", {}),
    "longest edge": ("Sam", {}),
    "cropped first": ("Perceiver", {}),
    "frames": ("VideoMAE", {}),
}


@pytest.mark.parametrize("kind, settings", REFUSED.values(), ids=REFUSED)
def test_what_is_more_than_a_picture_is_refused(kind, settings):
    assert not assert_equal_or_refused(named(kind, **settings))


def test_a_step_that_nobody_knows_is_refused_by_name():
    config = {"image_processor_type": "UnheardOfImageProcessor", "size": SQUARE, "do_sharpen": True, **NORMAL}
    with says(ValueError, "do_sharpen", "do_resize", "preprocessor_config.json"):
        processor_preprocess(config)
    assert processor_preprocess(config | {"do_sharpen": False}).size == (96, 96)


@pytest.mark.parametrize("name, value", [
    ("crop_size", {"shortest_edge": 96}), ("crop_size", [96]), ("size", {"height": 96}), ("size", [3, 96, 96]),
    ("size", "large"), ("size", {"height": "96", "width": 96}), ("size", {"height": 0, "width": 96}), ("size", True)])
def test_a_size_that_is_no_size_is_refused(name, value):
    config = {"do_center_crop": True, "size": SQUARE, "crop_size": SQUARE, **NORMAL}
    with says(ValueError, "preprocessor_config.json", name, "height and width"):
        processor_preprocess(config | {name: value})


def test_what_a_file_leaves_out_is_as_its_class_has_it():
    """Old files leave out what their class does by default."""
    pytest.importorskip("transformers")
    config = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 96}
    preprocess = processor_preprocess(config)
    assert preprocess.crop == (224, 224) and preprocess.interpolation == "bicubic" and preprocess.mean != (0.5,) * 3


def test_a_class_cannot_be_anything_but_a_processor():
    """The file names a class of transformers; functions and other classes are not called."""
    for name in ("pipeline", "AutoModel", "PreTrainedModel", "logging", "__doc__", ""):
        assert processor_preprocess({"image_processor_type": name, "size": SQUARE, **NORMAL}).size == (96, 96)
