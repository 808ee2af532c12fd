"""Images of ComfyUI and of the core."""
import torch
from torch import Tensor


def image_from_comfy(image: Tensor) -> Tensor:
    """Convert an IMAGE (B, H, W, 3) in [0, 1] to (B, 3, H, W) in [-1, 1], as a tensor that autograd accepts."""
    with torch.inference_mode(False):
        return image.clone()[..., :3].movedim(-1, 1) * 2 - 1


def image_to_comfy(image: Tensor) -> Tensor:
    """Convert (B, 3, H, W) in [-1, 1] to an IMAGE (B, H, W, 3) in [0, 1]."""
    return ((image.movedim(1, -1).float() + 1) / 2).clamp(0, 1).cpu()
