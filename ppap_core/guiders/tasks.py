"""What kinds of networks predict and how predictions are compared. Every function returns one number for each image."""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100  # pixels of a label map that no energy counts


class Task(NamedTuple):
    """The three comparisons of one kind of network; all return (B,)."""

    loss: Callable[[Tensor, Tensor], Tensor]      # (output, target): what guidance lowers
    distance: Callable[[Tensor, Tensor], Tensor]  # (student output, teacher output): what distillation lowers
    score: Callable[[Tensor, Tensor], Tensor]     # (output, target) in [0, 1], 1 = condition met
    sum_over_pixels: bool = False                       # the energy counts once for each value of the image


def _full(x: Tensor) -> Tensor:
    """At least float32: energies of half-precision networks are summed in full precision."""
    return x.float() if x.element_size() < 4 else x


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log p(target): logits (B, K), target (B|1,) long -> (B,). Weights of several classes, (B|1, K): -sum w log p."""
    return F.cross_entropy(_full(logits), target.expand(len(logits), *target.shape[1:]), reduction="none")


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) over dimension 1, mean over pixels where there are any: (B, K, ...) -> (B,)."""
    student, teacher = _full(student).log_softmax(1), _full(teacher).log_softmax(1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1, keepdim=True).flatten(1).mean(1)


def probability(logits: Tensor, target: Tensor) -> Tensor:
    """p(target), (B,); of several classes the weighted geometric mean."""
    total = target.clamp_min(0).sum(1).clamp_min(1e-6) if target.ndim > 1 else 1
    return (-cross_entropy(logits, target) / total).exp().clamp_max(1)


def correlation(depth: Tensor, target: Tensor) -> Tensor:
    """Pearson correlation of depth maps (B, 1, h, w) and (B|1, 1, h, w) in [-1, 1], (B,): blind to scale and shift."""
    a, b = _full(depth).flatten(1), _full(target).flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-6)


def depth_difference(depth: Tensor, target: Tensor) -> Tensor:
    """1 - correlation: half the squared error of the two maps once each has mean 0 and spread 1, (B,)."""
    return 1 - correlation(depth, target)


def pixel_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean -log p(label) over the pixels not ignored: (B, K, h, w), (B|1, h, w) long -> (B,)."""
    target = target.expand(len(logits), -1, -1)
    each = F.cross_entropy(_full(logits), target, reduction="none", ignore_index=IGNORE)
    return each.flatten(1).sum(1) / (target != IGNORE).flatten(1).sum(1).clamp_min(1)


def pixel_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the pixels not ignored that get the right label, (B,)."""
    counted = target.expand(len(logits), -1, -1) != IGNORE
    right = (logits.argmax(1) == target) & counted
    return right.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)


def mask_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over pixels: logits (B, 1, h, w) of a mask, target (B|1, 1, h, w) in [0, 1] -> (B,)."""
    logits = _full(logits)
    each = F.binary_cross_entropy_with_logits(logits, target.to(logits).expand_as(logits), reduction="none")
    return each.flatten(1).mean(1)


def mask_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) of the pixels' two outcomes, logits (B, 1, h, w) -> (B,)."""
    wanted = _full(teacher).sigmoid()
    return mask_cross_entropy(student, wanted) - mask_cross_entropy(teacher, wanted)


def mask_agreement(logits: Tensor, target: Tensor) -> Tensor:
    """1 - mean difference of the masks, (B,)."""
    return 1 - (_full(logits).sigmoid() - _full(target)).abs().flatten(1).mean(1)


CLIP_LOGIT_SCALE = 100.0  # of a cosine: the temperature that text-image networks are trained with (CLIP: Radford et al. 2021)


def cosine(embedding: Tensor, target: Tensor) -> Tensor:
    """Cosine of (B, D) and (B|1, D), (B,)."""
    return F.cosine_similarity(_full(embedding), _full(target), dim=1)


def half_mse(output: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared difference, (B, ...) and (B|1, ...) -> (B,)."""
    return (_full(output) - _full(target)).square().flatten(1).mean(1) / 2


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference in units of the teacher's own size, so that its range does not matter, (B,)."""
    return half_mse(student, teacher) / half_mse(teacher, torch.zeros_like(teacher)).clamp_min(1e-6)


def proximity(output: Tensor, target: Tensor) -> Tensor:
    """1 where they are equal, 1/2 where they differ by 1, (B,)."""
    return 1 / (1 + (2 * half_mse(output, target)).sqrt())


TASKS: dict[str, Task] = {
    "class": Task(cross_entropy, kl, probability),
    "depth": Task(depth_difference, depth_difference, lambda output, target: correlation(output, target).clamp_min(0)),
    "segmentation": Task(pixel_cross_entropy, kl, pixel_accuracy),
    "mask": Task(mask_cross_entropy, mask_kl, mask_agreement),
    "embedding": Task(lambda output, target: CLIP_LOGIT_SCALE * (1 - cosine(output, target)),
                      lambda student, teacher: 1 - cosine(student, teacher),
                      lambda output, target: cosine(output, target).clamp_min(0)),
    "number": Task(half_mse, half_mse, proximity, sum_over_pixels=True),
    **dict.fromkeys(("features", "style", "structure"), Task(half_mse, normalized_mse, proximity, sum_over_pixels=True)),
}


def resize_map(target: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (B, 1, h, w) or a label map (B, h, w) long in another size; labels are never mixed."""
    if tuple(target.shape[-2:]) == tuple(size):
        return target
    if target.is_floating_point():
        return F.interpolate(target, size, mode="bilinear", antialias=True)
    return F.interpolate(target[:, None].double(), size, mode="nearest-exact")[:, 0].long()
