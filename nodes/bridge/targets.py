"""Targets from what ComfyUI hands over."""
from collections.abc import Callable

from torch import Tensor

from ...ppap_core.guiders.copies import without_missing
from ...ppap_core.guiders.guider import Guider
from ...ppap_core.guiders.rules import rule_guider
from ...ppap_core.guiders.variety import unlike
from . import guider_cache, tensors
from .autograd import outside_inference_mode


def aim_at_image(guider: Guider, image: Tensor, target_of: Callable[[Guider, Tensor], Tensor],
                 missing: Tensor | None = None) -> Guider:
    """Aim a guider at an IMAGE, on the device where its network can run.

    target_of: what the image becomes as a target, such as `image_target`, or `map_target` for a drawn map.
    missing: MASK of what is missing of the image; None: nothing. ValueError for it where whole pictures count.
    """
    picture = tensors.image_from_comfy(image).to(guider_cache.load_to_device(guider))
    with outside_inference_mode():
        target = target_of(guider, picture)
        return guider.aim(target if missing is None else without_missing(guider, target, tensors.mask_from_comfy(missing)))


def aim_at_variety(guider: Guider | None, images: Tensor | None) -> Guider:
    """Return a guider that keeps the images of a batch unlike each other, and unlike further ones, in what another sees.

    guider: None for light, dark and colour at the same places. images: IMAGE; None: only each other.
    """
    guider = guider or rule_guider("layout")
    pictures = None if images is None else tensors.image_from_comfy(images).to(guider_cache.load_to_device(guider))
    with outside_inference_mode():
        return unlike(guider, pictures)
