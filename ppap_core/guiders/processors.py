"""Image processors of transformers themselves: what their files leave out, and what they make of an image.

A class does more than the fields of its file say, and only the class can tell.
"""
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .resize import Size

PROBES: tuple[Size, ...] = ((256, 256), (300, 451), (90, 60), (900, 1100))
"""Sizes of the images that are compared: square or not, small, and larger than what is cut into parts; square first."""
TOLERANCE = 0.02  # of the range of values: rounding to 8 bits and other filters on a smooth image stay below a quarter of it
DOWNLOADED = ("repo_path", "class_info_file")  # what making a processor would fetch; no pixel depends on it
AS_THE_CLASS_SAYS = ("does more with an image than its preprocessor_config.json says: expected one that resizes, crops and "
                     "normalizes; take a network with such a processor")

Probe = tuple[Tensor, Tensor]
"""(image (3, H, W) in [0, 1], what the library makes of it (1, 3, h, w))"""


class Reads(Protocol):
    """The part of `Preprocess` that is compared."""

    @property
    def std(self) -> tuple[float, float, float]:
        """What images in [0, 1] are divided by."""

    def __call__(self, image: Tensor) -> Tensor:
        """The input of the network for images (B, 3, H, W) in [-1, 1]."""

    def resized(self, image: Tensor) -> Size:
        """(height, width) that an image is resized to."""


def library_processors(config: Mapping[str, Any]) -> list[Any]:
    """The processors of transformers of the kind that a preprocessor_config.json names; none where it has no such class.

    It has up to two of a kind, which differ by a pixel here and there.
    """
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    name = str(kind).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    options = {key: value for key, value in config.items() if key not in DOWNLOADED}
    made = (_make(candidate, options) for candidate in (name, f"{name}{_other_kind()}"))
    return [processor for processor in made if processor is not None]


def _other_kind() -> str:
    """How the name of the second processor of a kind ends: transformers 5 warns of the names of 4."""
    try:
        from transformers import __version__
    except ImportError:
        return ""
    return "Fast" if int(__version__.split(".")[0]) < 5 else "Pil"


def _make(name: str, options: Mapping[str, Any]) -> Any | None:
    try:
        import transformers
        from transformers.image_processing_utils import BaseImageProcessor

        found: Any = getattr(transformers, name, None)
        known = inspect.isclass(found) and issubclass(found, BaseImageProcessor)
        return found.from_dict(dict(options)) if known else None
    except Exception:  # of any kind: the library checks files in many ways, and may lack a package
        return None


def settings(processor: Any) -> dict[str, Any]:
    """All fields of a processor as its file would say them, with what its class has for those that were left out."""
    return json.loads(processor.to_json_string())


def read_probes(processors: Sequence[Any], squares: bool) -> list[list[Probe]]:
    """Images without detail, with what each processor makes of them; squares: square ones only.

    ValueError if no processor makes one picture of one image.
    """
    probes, problem = [], None
    for processor in processors:
        read = []
        for size in PROBES[:1 if squares else None]:
            image = _smooth_image(size)
            try:
                read.append((image, _pixel_values(processor, image)))
            except Exception as error:  # of any kind: too small an image, pairs of images, missing boxes, a missing package
                problem = error
        probes += [read] if read else []
    if not probes:
        raise ValueError(f"{type(processors[0]).__name__} makes no picture of an image alone "
                         f"({' '.join(str(problem).split())[:150]}): it {AS_THE_CLASS_SAYS}") from problem
    return probes


def agrees(preprocess: Reads, probes: Sequence[Probe]) -> bool:
    """Whether a preprocessing makes of all images what the library makes of them."""
    return all(_equal(preprocess, image, expected) for image, expected in probes)


def _equal(preprocess: Reads, image: Tensor, expected: Tensor) -> bool:
    if math.prod(preprocess.resized(image)) > 4 * (expected.numel() + image.numel()):
        return False  # a count of pixels, say, read as a length
    found = preprocess(image[None] * 2 - 1)
    if found.shape != expected.shape:
        return False
    spread, two_bytes = float(expected.max() - expected.min()), 2 / 255 / min(preprocess.std)
    return bool((found - expected).abs().max() <= max(TOLERANCE * spread, two_bytes))


def _smooth_image(size: Size) -> Tensor:
    down, right = torch.meshgrid(*(torch.linspace(0, 1, side) for side in size), indexing="ij")
    blue = 0.5 + 0.3 * torch.sin(3 * right + 2 * down)
    return (torch.stack([0.1 + 0.5 * right + 0.3 * down, 0.9 - 0.6 * right * down, blue]) * 255).round() / 255


def _pixel_values(processor: Any, image: Tensor) -> Tensor:
    task = {"task_inputs": ["semantic"]} if "task_inputs" in inspect.signature(processor.preprocess).parameters else {}
    picture = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    output = processor(images=[picture], return_tensors="pt", **task)
    values = output["pixel_values"]
    if "spatial_shapes" in output:
        return _from_patches(values[0], output["spatial_shapes"][0].tolist())
    return torch.as_tensor(values if isinstance(values, Tensor) else values[0]).float()


def _from_patches(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """(N, edge * edge * 3) -> (1, 3, H, W)"""
    edge = math.isqrt(patches.shape[-1] // 3)
    rows, columns = grid
    parts = patches[:rows * columns].reshape(rows, columns, edge, edge, 3).float()
    return parts.permute(4, 0, 2, 1, 3).reshape(1, 3, rows * edge, columns * edge)
