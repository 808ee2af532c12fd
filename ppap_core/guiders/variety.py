"""Images of a batch that are to be unlike each other, and unlike others: particle guidance (Corso et al. 2024).

Every other guider judges each image alone. Here what an image should be depends on the rest of its batch.
"""
import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .guider import Guider, clean


@dataclass(frozen=True)
class VarietyGuider(Guider):
    """A guider whose energy is how close an image is to the others of its batch, in the outputs of its network.

    E_i = log mean_j exp(-|f_i - f_j|^2 / h) over the batch and `others`, where h is the median squared distance over the
    logarithm of their number, and only f_i moves. An image without others has no gradient. ValueError with cut-outs.
    """

    others: Tensor | None = None  # (K, d) outputs of further images to be unlike, such as those of earlier batches
    batch: Tensor | None = None   # (B, d) outputs of the whole batch, where only a part of it is asked for; None: all is

    def __post_init__(self) -> None:
        if self.cutouts:
            raise ValueError(f"{self.name} compares whole images with each other, and got {self.cutouts} cut-outs: take the "
                             "guider without them")

    def energy(self, image: Tensor, sigma: Tensor) -> Tensor:
        output = _flat(self.predict(image, sigma))
        return closeness(output, self._crowd(output.detach()))

    def _crowd(self, output: Tensor) -> Tensor:
        batch = output if self.batch is None else self.batch
        return batch if self.others is None else torch.cat([batch, self.others.to(batch)])

    def among(self, outputs: Tensor) -> "VarietyGuider":
        """The guider for parts of a batch, which changes no result. outputs: of its network for the whole batch."""
        return replace(self, batch=_flat(outputs))


def unlike(guider: Guider, images: Tensor | None = None) -> VarietyGuider:
    """A guider that keeps the images of a batch apart in the outputs of another one, of any task; it needs no target.

    images: further images (K, 3, H, W) in [-1, 1] to be unlike; None: only each other.
    ValueError for a network that waits for a text.
    """
    values = {field.name: getattr(guider, field.name) for field in fields(Guider)}
    made = VarietyGuider(**values | {"name": f"variety of {guider.name}", "target": torch.zeros(1, 1)})  # aimed at itself
    if images is None:
        return made
    with torch.no_grad():
        return replace(made, others=_flat(made.predict(images, clean(images))))


def closeness(output: Tensor, crowd: Tensor) -> Tensor:
    """How close outputs (B, d) are to a crowd (N, d) that they may be part of, (B,): 0 if all are one, else below."""
    distances = torch.cdist(crowd, crowd).square()
    apart = distances[~torch.eye(len(crowd), dtype=torch.bool, device=crowd.device)]
    width = apart.median() / math.log(len(crowd) + 1) if len(apart) else distances.new_ones(())
    squares = (output[:, None] - crowd).square().sum(-1)
    return (-squares / width.clamp_min(1e-12)).logsumexp(1) - math.log(len(crowd))


def _flat(output: Tensor) -> Tensor:
    return output.float().flatten(1)
