"""Training of a guider on a few IMAGEs, with a loaded guider as its backbone."""
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ...ppap_core.guiders.guider import Guider
from ...ppap_core.guiders.loaders.trained import save_trained
from ...ppap_core.guiders.train import class_names, require_backbone, train_guider
from . import guider_cache, paths
from .autograd import outside_inference_mode
from .progress import ShareProgress
from .tensors import image_from_comfy, image_to_comfy

MOST_CLASSES = 8
OUTCOMES = {"saved": "Saved as {name} in models/ppap_guiders: press R and choose it in Load Guider.",
            "replaced": "Saved as {name} in models/ppap_guiders, in place of the trained guider of that name.",
            "unchanged": "{name} in models/ppap_guiders is this very guider."}


class TrainedOnImages(NamedTuple):
    """What the training of a guider gives."""

    guider: Guider
    report: str
    wrong: Tensor  # IMAGE of the pictures that were not recognised


def train_on_images(backbone: Guider, batches: Mapping[str, Tensor], name: str, copies: int, seed: int) -> TrainedOnImages:
    """Train a guider on IMAGEs by the name of their class, and save it in models/ppap_guiders.

    name: of the folder; "" saves nothing. ValueError in words for what cannot be trained on, or saved under this name.
    """
    folder = paths.new_guider_folder(name) if name else None
    require_backbone(backbone)
    images = {label: _pictures(label, batch) for label, batch in batches.items()}
    device = guider_cache.load_to_device(backbone)
    with outside_inference_mode():
        trained = train_guider(backbone, {label: batch.to(device) for label, batch in images.items()}, copies, seed,
                               name or "unsaved", ShareProgress())
        outcome = save_trained(folder, trained, backbone) if folder else ""
    report = "\n".join(filter(None, (trained.describe(), outcome and OUTCOMES[outcome].format(name=name))))
    return TrainedOnImages(trained.guider, report, image_to_comfy(trained.wrong(images)))


def _pictures(label: str, batch: Tensor) -> Tensor:
    try:
        return image_from_comfy(batch)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def named_batches(names: str, batches: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Return the IMAGEs that are connected by the names of their classes, in order.

    names: separated by commas; where there are fewer, the number of the class is its name. ValueError for more names than
    batches, and for names that are empty or alike.
    """
    connected = {f"class {number}": batch for number, batch in enumerate(batches, 1) if batch is not None}
    given = read_names(names)
    if len(given) > len(connected):
        raise ValueError(f"{len(given)} classes are named ({', '.join(given)}), but images of {len(connected)} are "
                         "connected: connect images for each name")
    labels = class_names([*given, *list(connected)[len(given):]])
    return dict(zip(labels, connected.values(), strict=True))


def read_names(names: str) -> list[str]:
    """Return names that are separated by commas. ValueError for too many or for two that are alike."""
    given = [name.strip() for name in names.split(",") if name.strip()]
    if len(given) > MOST_CLASSES:
        raise ValueError(f"{len(given)} classes are named: expected at most {MOST_CLASSES}")
    return list(class_names(given)) if len(given) > 1 else given
