"""What kinds of networks predict and how predictions are compared. Every function returns one number for each image."""
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

IGNORE = 255  # pixels of a label map that no energy counts


class Task(NamedTuple):
    """The three comparisons of one kind of network; all return (B,)."""

    loss: Callable[[Tensor, Tensor], Tensor]      # (output, target): what guidance lowers
    distance: Callable[[Tensor, Tensor], Tensor]  # (student output, teacher output): what distillation lowers
    score: Callable[[Tensor, Tensor], Tensor]     # (output, target) in [0, 1], 1 = condition met


def _full(x: Tensor) -> Tensor:
    """At least float32: energies of half-precision networks are summed in full precision."""
    return x.float() if x.element_size() < 4 else x


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log p(target): logits (B, K), target (B|1,) long -> (B,)."""
    return F.cross_entropy(_full(logits), target.expand(len(logits)), reduction="none")


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) over dimension 1, mean over pixels where there are any: (B, K, ...) -> (B,)."""
    student, teacher = _full(student).log_softmax(1), _full(teacher).log_softmax(1)
    return (teacher.exp() * (teacher - student)).sum(1).flatten(1).mean(1) if student.ndim > 2 \
        else (teacher.exp() * (teacher - student)).sum(1)


def probability(logits: Tensor, target: Tensor) -> Tensor:
    """p(target), (B,)."""
    return (-cross_entropy(logits, target)).exp()


def correlation(depth: Tensor, target: Tensor) -> Tensor:
    """Pearson correlation of depth maps (B, 1, h, w) and (B|1, 1, h, w) in [-1, 1], (B,): blind to scale and shift."""
    a, b = _full(depth).flatten(1), _full(target).flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-6)


def depth_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error in units of the teacher's own spread, so that its range does not matter, (B,)."""
    student, teacher = _full(student).flatten(1), _full(teacher).flatten(1)
    return (student - teacher).square().mean(1) / teacher.var(1).clamp_min(1e-6)


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


TASKS: dict[str, Task] = {
    "class": Task(cross_entropy, kl, probability),
    "depth": Task(lambda output, target: 1 - correlation(output, target), depth_distance,
                  lambda output, target: correlation(output, target).clamp_min(0)),
    "segmentation": Task(pixel_cross_entropy, kl, pixel_accuracy),
}
