"""Targets: what people say or show, as what a guider can be aimed at. Everything is checked here, once."""
import difflib
import math
from dataclasses import replace

import torch
from torch import Tensor

from ..viz.plots import labels_of_picture
from .guider import Guider, clean, has_network, require_prompt
from .tasks import IGNORE


def _require(guider: Guider, what: str, *tasks: str) -> None:
    if guider.task not in tasks:
        raise ValueError(f"{guider.name} predicts {guider.task}, and cannot be aimed at {what}: expected a guider for "
                         f"{' or '.join(tasks)}; use another Aim node")


def label_index(guider: Guider, name: str) -> int:
    """The number of a class by its name or number. ValueError names the close or the first choices."""
    known = {label.lower(): index for index, label in enumerate(guider.labels)}
    if name.lower() in known:
        return known[name.lower()]
    if name.isdecimal() and int(name) < len(guider.labels):
        return int(name)
    close = [label for label in known if name and name.lower() in label][:8] \
        or difflib.get_close_matches(name.lower(), known, n=5) or list(known)[:8]
    raise ValueError(f"{guider.name} has no class '{name}': expected a number below {len(guider.labels)} "
                     f"or a name such as {', '.join(close)}")


def class_target(guider: Guider, words: str) -> Tensor:
    """Classes by name or number -> (n,) long, or (n, K) weights where one image shall be several.

    A comma begins the next image's: 'star, disk'. A plus adds a class to the same image, with its weight after a colon:
    'star + ring:0.5', or 'star + ring:-1' to stay away from the other.
    """
    _require(guider, "a class", "class")
    images = [part.strip() for part in words.split(",") if part.strip()]
    if not images:
        raise ValueError(f"no class was given: expected one or more names of {guider.name}, separated by commas")
    mixed = [_weighted(guider, image) for image in images]
    if all(list(weights.values()) == [1.0] for weights in mixed):
        return torch.tensor([next(iter(weights)) for weights in mixed])
    target = torch.zeros(len(mixed), len(guider.labels))
    for row, weights in zip(target, mixed, strict=True):
        row[list(weights)] = torch.tensor(list(weights.values()))
    return target


def _weighted(guider: Guider, words: str) -> dict[int, float]:
    """{class: weight} from 'star + ring:0.5'. A name that holds a plus or a colon itself stays whole."""
    if words.lower() in map(str.lower, guider.labels):
        return {label_index(guider, words): 1.0}
    weights: dict[int, float] = {}
    for part in words.split("+"):
        name, colon, weight = part.strip().rpartition(":")
        try:
            factor = float(weight) if colon else 1.0
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise ValueError(f"'{weight}' in '{part.strip()}' is no weight: expected a number after the colon, such as "
                             "star:0.5")
        index = label_index(guider, (name if colon else weight).strip())
        weights[index] = weights.get(index, 0.0) + factor
    return weights


def aim_at_text(guider: Guider, text: str) -> Guider:
    """The guider aimed at a text: CLIP and its kind at what it says; a text-prompted mask network is asked for it.

    Each line is for one image of the batch; a single line is for all.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if guider.read_text is None:
        raise ValueError(f"{guider.name} knows no texts: expected a text-image network such as CLIP, SigLIP or CLIPSeg")
    if not lines:
        raise ValueError("no text was given: expected what the image shall show")
    words = torch.cat([guider.read_text(line) for line in lines])
    return replace(guider, prompt=words) if guider.task == "mask" else guider.aim(words)


@torch.no_grad()
def image_target(guider: Guider, picture: Tensor) -> Tensor:
    """What the guider reads in pictures (B, 3, H, W) in [-1, 1], for others to have the same."""
    output = guider.predict(picture, clean(picture))
    if guider.task == "mask":
        return output.sigmoid()
    return output.argmax(1) if guider.task in ("class", "segmentation") else output


def map_target(guider: Guider, picture: Tensor) -> Tensor:
    """A drawn map (B, 3, H, W) in [-1, 1] as a target, in the frame of what the network sees.

    depth: grey, near is white -> (B, 1, h, w); segmentation: the colours of `label_picture` -> (B, h, w) long;
    mask: white where the thing shall be -> (B, 1, h, w) in [0, 1].
    """
    _require(guider, "a drawn map", "depth", "segmentation", "mask")
    if guider.task == "segmentation":
        return labels_of_picture(guider.preprocess.frame(picture, "nearest-exact"), len(guider.labels))
    grey = guider.preprocess.frame(picture.mean(1, keepdim=True), "bilinear")
    return grey if guider.task == "depth" else ((grey + 1) / 2).clamp(0, 1)


def mask_target(guider: Guider, mask: Tensor, name: str) -> Tensor:
    """A mask (B, H, W) in [0, 1] as a target.

    segmentation: the class of this name inside, anything outside -> (B, h, w) long; mask: the mask itself, (B, 1, h, w),
    and the name is not used.
    """
    _require(guider, "a mask", "segmentation", "mask")
    mask = mask[:, None].float()
    if guider.task == "mask":
        require_prompt(guider)
        return guider.preprocess.frame(mask, "bilinear").clamp(0, 1)
    inside = guider.preprocess.frame(mask, "nearest-exact")[:, 0] > 0.5
    if not bool(inside.flatten(1).any(1).all()):
        raise ValueError("the mask is empty in at least one image: paint white where the class shall be")
    return torch.where(inside, label_index(guider, name.strip()), IGNORE)


def number_target(guider: Guider, number: float) -> Tensor:
    """A number for a guider that measures one: brightness, sharpness, an aesthetic score -> (1, 1)."""
    _require(guider, "a number", "number")
    return torch.tensor([[float(number)]])


PARTS = ("class", "embedding", "number", "style")  # what a part of an image has as much as the whole


def with_cutouts(guider: Guider, count: int) -> Guider:
    """The guider judging `count` square parts beside the whole image; 0 changes nothing.

    ValueError for guiders that parts of an image tell nothing.
    """
    network = has_network(guider)
    if count and not (network and guider.task in PARTS):
        what = f"predicts {guider.task}" if network else "is a rule"
        raise ValueError(f"{guider.name} {what}, which parts of an image cannot tell: expected a network for "
                         f"{', '.join(PARTS)}; connect this guider without Cut-outs")
    return replace(guider, cutouts=count)
