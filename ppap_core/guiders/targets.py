"""Targets from class names, texts, pictures, maps, masks and numbers. All user input is checked here, once."""
import difflib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from .guider import Guider, clean, fold_name, has_network, require_prompt
from .tasks import TASKS


def _wrong_task(guider: Guider, target: str, tasks: Iterable[str]) -> ValueError:
    return ValueError(f"{guider.name} predicts {guider.task}, and cannot be aimed at {target}: expected a guider for "
                      f"{' or '.join(tasks)}; give it another kind of target")


def label_index(guider: Guider, name: str) -> int:
    """Index of a class by its name, in any case, or its number. ValueError with similar names, else the first ones.

    Spaces and underscores are the same where no two names differ by them alone.
    """
    index = _named(guider, name)
    if index is not None:
        return index
    if name.isdecimal() and int(name) < len(guider.labels):
        return int(name)
    raise ValueError(f"{guider.name} has no class '{name}': expected {_choices(guider, name)}")


def _named(guider: Guider, name: str) -> int | None:
    """Index of the class that has this name itself."""
    for fold in (fold_name, _without_underscores):
        indices = {fold(label): index for index, label in reversed(list(enumerate(guider.labels)))}
        if fold(name) in indices:
            return indices[fold(name)]
    return None


def _without_underscores(name: str) -> str:
    return fold_name(name).replace("_", " ")


def _choices(guider: Guider, name: str) -> str:
    labels = [fold_name(label) for label in guider.labels]
    number = f"a number below {len(labels)}"
    if all(label.isdecimal() for label in labels):
        return f"{number}, because its classes have no other names"
    close = [label for label in labels if name and fold_name(name) in label][:8] \
        or difflib.get_close_matches(fold_name(name), labels, n=5) or labels[:8]
    return f"{number} or a name such as {', '.join(close)}"


def class_target(guider: Guider, words: str) -> Tensor:
    """Classes by name or number as a target for n images: (n,) long, or (n, K) weights where an image has several.

    A comma separates images: 'star, disk'. A plus adds a class to the same image, with its weight after a colon: in
    'star + ring:0.5' the ring counts half, in 'star + ring:-1' it is avoided. ValueError for an unknown class or a weight
    that is no number, and for guiders whose task names no classes.
    """
    if not TASKS[guider.task].names_classes:
        raise _wrong_task(guider, "a class", (name for name, task in TASKS.items() if task.names_classes))
    images = [part.strip() for part in words.split(",") if part.strip()]
    if not images:
        raise ValueError(f"no class was given: expected one or more names of {guider.name}, separated by commas")
    weights_of_images = [_class_weights(guider, image) for image in images]
    if all(list(weights.values()) == [1.0] for weights in weights_of_images):
        return torch.tensor([next(iter(weights)) for weights in weights_of_images])
    target = torch.zeros(len(images), len(guider.labels))
    for row, weights in zip(target, weights_of_images, strict=True):
        row[list(weights)] = torch.tensor(list(weights.values()))
    return target


def _class_weights(guider: Guider, words: str) -> dict[int, float]:
    whole = _named(guider, words)  # a name may hold a plus or a colon itself
    if whole is not None:
        return {whole: 1.0}
    weights: dict[int, float] = {}
    for part in _parts(guider, words):
        name, colon, weight = part.rpartition(":")
        if not colon or _named(guider, part) is not None:
            name, weight = part, "1"
        factor = _finite(weight)
        if factor is None:
            raise ValueError(f"'{weight}' in '{part}' is no weight: expected a number after the colon, such as star:0.5")
        index = label_index(guider, name.strip())
        weights[index] = weights.get(index, 0.0) + factor
    return weights


def _parts(guider: Guider, words: str) -> Iterator[str]:
    """What stands between the pluses, of which those with spaces around them count first: a name may hold one itself."""
    for part in map(str.strip, re.split(r"\s\+\s", words)):
        name = part if _named(guider, part) is not None else part.rpartition(":")[0].strip()
        yield from [part] if _named(guider, name) is not None else map(str.strip, part.split("+"))


def _finite(number: str) -> float | None:
    with suppress(ValueError):
        if math.isfinite(value := float(number)):
            return value
    return None


def aim_at_text(guider: Guider, text: str) -> Guider:
    """The guider aimed at a text: the target of CLIP and its kind; what a text-prompted mask network is asked for.

    Each line is for one image of the batch; a single line is for all. ValueError without a text, and for a guider whose
    network knows none.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if guider.read_text is None:
        raise ValueError(f"{guider.name} knows no texts: expected a text-image network such as CLIP, SigLIP or CLIPSeg")
    if not lines:
        raise ValueError("no text was given: expected what the image shall show")
    words = torch.cat([guider.read_text(line) for line in lines])
    return replace(guider, prompt=words) if TASKS[guider.task].has_prompt else guider.aim(words)


@torch.no_grad()
def image_target(guider: Guider, picture: Tensor) -> Tensor:
    """The target that pictures (B, 3, H, W) in [-1, 1] meet: for other images to get the same output."""
    return TASKS[guider.task].target_of(guider.predict(picture, clean(picture)))


def map_target(guider: Guider, picture: Tensor) -> Tensor:
    """A drawn map (B, 3, H, W) in [-1, 1] as a target, resized and cropped as the network's image.

    How it is drawn, and what it becomes, is up to the guider's task (`Task.drawn_as`, `Task.from_map`). ValueError for
    tasks that take no drawn map.
    """
    from_map = TASKS[guider.task].from_map
    if from_map is None:
        raise _wrong_task(guider, "a drawn map", (name for name, task in TASKS.items() if task.from_map))
    return from_map(picture, guider.preprocess, len(guider.labels))


def mask_target(guider: Guider, mask: Tensor, name: str) -> Tensor:
    """A mask (B, H, W) in [0, 1] as a target.

    name: the class that is wanted inside, by name or number; not used by guiders without labels. What the mask becomes is up
    to the guider's task (`Task.from_mask`). ValueError for tasks that take no mask, an unknown name or an empty mask.
    """
    from_mask = TASKS[guider.task].from_mask
    if from_mask is None:
        raise _wrong_task(guider, "a mask", (name for name, task in TASKS.items() if task.from_mask))
    require_prompt(guider)
    label = label_index(guider, name.strip()) if guider.labels else 0
    return from_mask(mask[:, None].float(), guider.preprocess, label)


def number_target(guider: Guider, number: float, name: str = "") -> Tensor:
    """A number as a target (1, 1), such as a brightness or an aesthetic score; (1, K) where the network gives K of them.

    name: which of several numbers, by name or index; all others stay free (NaN). "": the only one. ValueError for guiders of
    other tasks, and where the name is missing or unknown.
    """
    if guider.task != "number":
        raise _wrong_task(guider, "a number", ["number"])
    if len(guider.labels) < 2:
        return torch.tensor([[float(number)]])
    if not name.strip():
        raise ValueError(f"{guider.name} gives {len(guider.labels)} numbers: expected the name of one, such as "
                         f"{', '.join(guider.labels[:8])}")
    target = torch.full((1, len(guider.labels)), math.nan)
    target[0, label_index(guider, name.strip())] = float(number)
    return target


def with_cutouts(guider: Guider, count: int) -> Guider:
    """The guider judging `count` square parts of each image beside the whole; 0 changes nothing.

    ValueError for rules, and for tasks that parts of an image say nothing about.
    """
    if count and not (has_network(guider) and TASKS[guider.task].croppable):
        reason = f"predicts {guider.task}" if has_network(guider) else "is a rule"
        croppable = ", ".join(name for name, task in TASKS.items() if task.croppable)
        raise ValueError(f"{guider.name} {reason}, which parts of an image cannot tell: expected a network for {croppable}; "
                         "use this guider without cut-outs")
    return replace(guider, cutouts=count)
