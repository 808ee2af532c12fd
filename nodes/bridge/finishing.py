"""Finished images that meet exactly what a guider asks, and what that took."""
from torch import Tensor

from ...ppap_core.guiders.exact import meet, off_by
from ...ppap_core.guiders.guider import Guider
from . import tensors
from .autograd import outside_inference_mode


def finish(guider: Guider, image: Tensor, strength: float, smallest: bool) -> tuple[Tensor, str]:
    """Return an IMAGE that meets what an aimed guider asks, and in words how far it was off; a strength of 0 changes no bit.

    ValueError for a guider without a target, and for one that cannot be met exactly.
    """
    with outside_inference_mode():
        before = tensors.image_from_comfy(image)
        after = meet(guider, before, strength, smallest)
        if strength == 0:
            return image, f"{guider.name}: not changed"
        largest, left = (float(off_by(guider, each).max()) for each in (before, after))
    made = tensors.image_to_comfy(after)
    change = float((after - before).square().mean().sqrt()) / 2
    return made, f"{guider.name}: off by {largest:.2g}, now by {left:.1g}. Colours changed by {change:.2g} of 1 (rms)."
