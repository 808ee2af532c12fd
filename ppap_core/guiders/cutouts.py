"""Cut-outs: a network judges square parts of an image beside the whole."""
import random

from torch import Tensor


def cut_outs(image: Tensor, count: int, seed: float) -> list[Tensor]:
    """`count` square parts of images (B, C, H, W), in the same places in every image; the places depend on the seed only.

    Their sides are between 0.4 and 1 of the shorter side of the image. They show a guider details that are lost where it
    shrinks the whole image.
    """
    generator = random.Random(seed)  # torch's keeps 32 bits of a seed, which many noise levels have in common
    height, width = image.shape[-2:]
    parts = []
    for _ in range(count):
        edge = max(round(generator.uniform(0.4, 1) * min(height, width)), 1)
        top, left = (round(generator.random() * (side - edge)) for side in (height, width))
        parts.append(image[..., top:top + edge, left:left + edge])
    return parts
