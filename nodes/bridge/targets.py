"""Targets from what ComfyUI hands over."""
from collections.abc import Callable

from torch import Tensor

from ...ppap_core.guiders.guider import Guider
from . import guider_cache, tensors
from .autograd import outside_inference_mode


def aim_at_image(guider: Guider, image: Tensor, target_of: Callable[[Guider, Tensor], Tensor]) -> Guider:
    """Aim a guider at an IMAGE, on the device where its network can run.

    target_of: what the image becomes as a target, such as `image_target`, or `map_target` for a drawn map.
    """
    picture = tensors.image_from_comfy(image).to(guider_cache.load_to_device(guider))
    with outside_inference_mode():
        return guider.aim(target_of(guider, picture))
