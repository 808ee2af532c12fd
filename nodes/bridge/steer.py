"""One choice in place of a chain of nodes: the guider that it stands for, with its target, and the term that weighs it."""
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ...ppap_core.guiders.copies import copy_guider
from ...ppap_core.guiders.guider import Guider
from ...ppap_core.guiders.rules import rule_guider
from ...ppap_core.guiders.targets import aim_at_text, class_target, image_target, number_target
from ...ppap_core.schedules import FALLING
from ...ppap_core.viz.colors import palette
from . import guider_cache, paths, tensors
from .autograd import outside_inference_mode
from .noise_levels import PercentSchedule
from .targets import aim_at_image, aim_at_variety
from .terms import GuidanceTerm

STRENGTHS = {"soft": 0.3, "medium": 0.7, "strong": 1.0}
"""Shares of a choice's weight, by their names in saved workflows."""
NETWORKS = ("classifier", "text_network", "map_network")
AXES = ("left-right", "top-bottom", "half turn")


def _colors_of(palette_words: str) -> Guider:
    return _like_image("colours", tensors.image_to_comfy(palette(palette_words)))


def _like_image(rule: str, image: Tensor) -> Guider:
    return aim_at_image(rule_guider(rule), image, image_target)


def _whole_of(kind: str, image: Tensor) -> Guider:
    return aim_at_image(copy_guider(kind), image, image_target)


def _number(rule: str, number: float) -> Guider:
    guider = rule_guider(rule)
    return guider.aim(number_target(guider, number))


def _class(network: str, classes: str) -> Guider:
    guider = guider_cache.load_guider(network)
    return guider.aim(class_target(guider, classes))


def _text(network: str, text: str) -> Guider:
    aimed = aim_at_text(guider_cache.load_guider(network), text)
    if aimed.target is None:
        raise ValueError(f"{aimed.name} marks where something is, and does not say what an image shows: choose CLIP, SigLIP "
                         "or another text-image network, or use Aim at Text and Aim at Mask")
    return aimed


def _seen_by(network: str, image: Tensor) -> Guider:
    return aim_at_image(guider_cache.load_guider(network), image, image_target)


class Choice(NamedTuple):
    """What one can steer towards: the ids of the inputs that it asks for, and the guider that these make."""

    inputs: tuple[str, ...]
    guider: Callable[..., Guider]  # of the values of the inputs, in their order
    weight: float = 1.0            # of its term at strong


CHOICES: dict[str, Choice] = {
    "colours of a palette": Choice(("palette",), _colors_of),
    "colours of an image": Choice(("image",), partial(_like_image, "colours")),
    "layout of an image": Choice(("image",), partial(_like_image, "layout")),
    "edges of an image": Choice(("image",), partial(_like_image, "edges")),
    "brightness": Choice(("brightness",), partial(_number, "brightness")),
    "contrast": Choice(("contrast",), partial(_number, "contrast")),
    "saturation": Choice(("saturation",), partial(_number, "saturation")),
    "sharpness": Choice(("sharpness",), partial(_number, "sharpness")),
    "symmetry": Choice(("axis",), lambda axis: rule_guider(f"symmetry {axis}")),
    "seamless tiling": Choice((), partial(rule_guider, "seamless tiling")),
    "smoothness": Choice((), partial(rule_guider, "smoothness")),
    "a class": Choice(("classifier", "classes"), _class),
    "a text": Choice(("text_network", "text"), _text),
    "depth or regions of an image": Choice(("map_network", "image"), _seen_by),
    "unlike each other": Choice((), partial(aim_at_variety, None, None), weight=0.3),
    "colours for a grey image": Choice(("image",), partial(_whole_of, "grey copy")),
    "detail for a small image": Choice(("image",), partial(_whole_of, "small copy")),
}
"""Name of a choice, as saved workflows have it -> what it means. New ones stand at the end."""


def chosen(towards: Any, others: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name of a choice and the values of its inputs by their ids, None for what is not connected.

    towards: where ComfyUI has inputs that follow a choice, both; else the name, and all inputs are among the others, with
    "towards." before their ids. ValueError for an unknown name.
    """
    values = towards if isinstance(towards, Mapping) else {"towards": towards} | {
        name.removeprefix("towards."): value for name, value in others.items()}
    name = values["towards"]
    choice = paths.lookup(CHOICES, name, "choice", "choose one in the node")
    return name, {slot: values.get(slot) for slot in choice.inputs}


def guider_of(name: str, values: Mapping[str, Any]) -> Guider:
    """Make the guider of a choice. ValueError where an image is missing, and for what no guider can be aimed at."""
    if "image" in values and values["image"] is None:
        raise ValueError(f"'{name}' was chosen, but no image is connected: connect one, such as Load Image, or choose "
                         "something else to steer towards")
    with outside_inference_mode():
        return CHOICES[name].guider(*values.values())


def term_of(name: str, values: Mapping[str, Any], strength: str, factor: float, mask: Tensor | None) -> GuidanceTerm:
    """Weigh the guider of a choice as a new Guidance Term does. strength: a key of STRENGTHS. factor: of it, neutral: 0."""
    weight = factor * paths.lookup(STRENGTHS, strength, "strength", "choose one in the node") * CHOICES[name].weight
    return GuidanceTerm(guider_of(name, values), weight, PercentSchedule(0.0, 1.0, *FALLING),
                        None if mask is None else tensors.mask_from_comfy(mask))


def network_stamp(towards: Any, others: Mapping[str, Any]) -> list[str]:
    """Return texts that change when the files of the chosen network do."""
    _, values = chosen(towards, others)
    return [stamp for slot in NETWORKS if values.get(slot) for stamp in paths.guider_stamp(values[slot])]
