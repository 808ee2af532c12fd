"""Tasks: the kinds of predictions, with everything that depends on them. A new task is one value in `TASKS`."""
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..viz.colors import depth_picture, labels_of_picture
from ..viz.previews import class_bars, label_map, mask_picture, tag_bars
from .preprocess import Preprocess
from .resize import resize, resize_labels

IGNORE = -100  # label of the pixels that no energy counts

Compare = Callable[[Tensor, Tensor], Tensor]
"""(output, target or another output) -> (B,)"""
FromMap = Callable[[Tensor, Preprocess, int], Tensor]
"""(drawn map (B, 3, H, W) in [-1, 1], preprocessing of the image, number of labels) -> target"""
FromMask = Callable[[Tensor, Preprocess, int], Tensor]
"""(mask (B, 1, H, W) in [0, 1], preprocessing of the image, index of the label that is wanted inside) -> target"""


def _itself(output: Tensor) -> Tensor:
    return output


def _full(x: Tensor) -> Tensor:  # energies of half-precision networks are summed in at least float32
    return x.float() if x.element_size() < 4 else x


def half_mse(output: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared difference, (B, ...) and (B|1, ...) -> (B,)."""
    return (_full(output) - _full(target)).square().flatten(1).mean(1) / 2


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference over the teacher's mean square, (B,): blind to the range of the output."""
    return half_mse(student, teacher) / half_mse(teacher, torch.zeros_like(teacher)).clamp_min(1e-6)


def explained(output: Tensor, teacher: Tensor) -> Tensor:
    """1 - squared difference over the teacher's mean square, or 0 where that is negative, (B,)."""
    return (1 - normalized_mse(output, teacher)).clamp_min(0)


@dataclass(frozen=True)
class Task:
    """A kind of prediction: how it is compared, aimed and shown. Losses, distances and scores are (B,).

    `dense`: for maps (B, C, h, w) that follow the image place by place, whose targets may have another height and width.
    `croppable`: where a part of an image has the same output as the whole, as a class or a style; not where the output says
    at which places things are. `sum_over_pixels`: for squared differences of features or numbers, so that a weight means the
    same at every size of image; not for cross-entropies and correlations, which mean the same anyway. `is_logits`: for
    outputs that become probabilities by a softmax or sigmoid. `has_prompt`: for networks that mark what a text asks for.
    `names_classes`: for outputs (B, K) whose classes are chosen by name, one or several with weights.
    `distance`: `normalized_mse` for features of any range, else the loss or a divergence. `agreement`: whether two outputs
    give the same answer, which is what an expert is for; `answer`: an output reduced to that, of which a mean over images is
    again an output, the commonest.
    """

    loss: Compare                        # (output, target): the energy, which guidance lowers
    distance: Compare                    # (student's output, teacher's output): what distillation lowers
    score: Compare                       # (output, target) in [0, 1], 1 = the image meets the target
    target_of: Callable[[Tensor], Tensor] = _itself  # output -> the target that it meets
    from_map: FromMap | None = None      # None: takes no drawn map
    drawn_as: str = ""                   # in a few words, how such a map is drawn
    from_mask: FromMask | None = None    # None: takes no mask
    preview: Callable[[Tensor, tuple[str, ...]], Tensor] | None = None  # (output, labels) -> pictures; None: told in words
    dense: bool = False                  # maps (B, C, h, w): targets are resized to the output
    is_logits: bool = False              # a distillation temperature divides the teacher's output
    has_prompt: bool = False             # a text is what the network is asked for, not its target
    croppable: bool = False              # parts of an image have it as much as the whole: cut-outs help
    sum_over_pixels: bool = False        # the energy is the loss times the number of values of the image
    names_classes: bool = False          # targets are classes of the whole image: (B,) long, or weights (B, K)
    agreement: Compare = explained       # (output, teacher's output) in [0, 1], 1 = the same answer
    answer: Callable[[Tensor], Tensor] = _itself  # output -> output of the same answer; its mean: the commonest


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log p(target): logits (B, K), target (B|1,) long -> (B,). With weights of several classes, (B|1, K): -sum w log p."""
    return F.cross_entropy(_full(logits), target.expand(len(logits), *target.shape[1:]), reduction="none")


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) over dimension 1, mean over pixels where there are any: (B, K, ...) -> (B,)."""
    student, teacher = _full(student).log_softmax(1), _full(teacher).log_softmax(1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1, keepdim=True).flatten(1).mean(1)


def probability(logits: Tensor, target: Tensor) -> Tensor:
    """p(target), (B,); for several classes their weighted geometric mean."""
    total = target.clamp_min(0).sum(1).clamp_min(1e-6) if target.ndim > 1 else 1
    return (-cross_entropy(logits, target) / total).exp().clamp_max(1)


def tag_weights(logits: Tensor, target: Tensor) -> Tensor:
    """Weights (B|1, K) of a target of tags for logits (B, K): those given, or 1 for the tag that a (B|1,) long names."""
    return F.one_hot(target, logits.shape[1]).to(logits) if target.ndim == 1 else target.to(logits)


def tag_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """-log p of each tag aimed at, by a sigmoid of its own: logits (B, K), target (B|1,) long or weights (B|1, K) -> (B,).

    A weight above 0 wants the tag, one below 0 wants it absent, -log(1 - p); with 0 the tag is free.
    """
    logits = _full(logits)
    weights = tag_weights(logits, target)
    return (weights.abs() * F.softplus(-logits * weights.sign())).sum(1)


def tag_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of independent tags, summed over them: logits (B, K) -> (B,)."""
    student, teacher = _full(student), _full(teacher)
    probability = teacher.sigmoid()
    present, absent = F.logsigmoid(teacher) - F.logsigmoid(student), F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return (probability * present + (1 - probability) * absent).sum(1)


def tag_probability(logits: Tensor, target: Tensor) -> Tensor:
    """p(tag), or 1 - p of an avoided one, (B,); for several tags their weighted geometric mean."""
    total = tag_weights(_full(logits), target).abs().sum(1).clamp_min(1e-6)
    return (-tag_cross_entropy(logits, target) / total).exp()


def tags_present(logits: Tensor) -> Tensor:
    """Weights of the tags of an image, (B, K): 1 for the probable ones, -1 for the others."""
    return torch.where(logits > 0, 1.0, -1.0)


def correlation(depth: Tensor, target: Tensor) -> Tensor:
    """Pearson correlation of depth maps (B, 1, h, w) and (B|1, 1, h, w) in [-1, 1], (B,): blind to scale and shift."""
    a, b = _full(depth).flatten(1), _full(target).flatten(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-6)


def depth_difference(depth: Tensor, target: Tensor) -> Tensor:
    """1 - correlation, (B,): half the mean squared error of two maps of mean 0 and std 1."""
    return 1 - correlation(depth, target)


def pixel_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean -log p(label) over the labelled pixels: logits (B, K, h, w), target (B|1, h, w) long -> (B,)."""
    target = target.expand(len(logits), -1, -1)
    losses = F.cross_entropy(_full(logits), target, reduction="none", ignore_index=IGNORE)
    return losses.flatten(1).sum(1) / (target != IGNORE).flatten(1).sum(1).clamp_min(1)


def pixel_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the labelled pixels that get the right label, (B,): logits (B, K, h, w), target (B|1, h, w) long."""
    labelled = target.expand(len(logits), -1, -1) != IGNORE
    right = (logits.argmax(1) == target) & labelled
    return right.flatten(1).sum(1) / labelled.flatten(1).sum(1).clamp_min(1)


def mask_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, mean over pixels: logits (B, 1, h, w), target (B|1, 1, h, w) in [0, 1] -> (B,)."""
    logits = _full(logits)
    losses = F.binary_cross_entropy_with_logits(logits, target.to(logits).expand_as(logits), reduction="none")
    return losses.flatten(1).mean(1)


def mask_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of binary outcomes, mean over pixels: logits (B, 1, h, w) -> (B,)."""
    probability = _full(teacher).sigmoid()
    return mask_cross_entropy(student, probability) - mask_cross_entropy(teacher, probability)


def mask_agreement(logits: Tensor, target: Tensor) -> Tensor:
    """1 - mean absolute difference of probabilities, (B,): logits (B, 1, h, w), target (B|1, 1, h, w) in [0, 1]."""
    return 1 - (_full(logits).sigmoid() - _full(target)).abs().flatten(1).mean(1)


CLIP_LOGIT_SCALE = 100.0  # factor of a cosine in the training of text-image networks (CLIP: Radford et al. 2021)


def cosine(embedding: Tensor, target: Tensor) -> Tensor:
    """Cosine similarity of (B, D) and (B|1, D), (B,)."""
    return F.cosine_similarity(_full(embedding), _full(target), dim=1)


def aimed_half_mse(numbers: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared difference of numbers (B, K) from those of a target (B|1, K) that are not NaN, (B,)."""
    free = target.isnan()
    difference = half_mse(numbers, torch.where(free, _full(numbers.detach()), _full(target)))
    return difference * (free.shape[1] / (~free).sum(1).clamp_min(1))


def proximity(output: Tensor, target: Tensor) -> Tensor:
    """1 / (1 + root mean square difference), (B,): 1 where output and target are equal, 1/2 where they differ by 1."""
    return 1 / (1 + (2 * half_mse(output, target)).sqrt())


def aimed_proximity(numbers: Tensor, target: Tensor) -> Tensor:
    """1 / (1 + root mean square difference) of numbers (B, K) from those of a target (B|1, K) that are not NaN, (B,)."""
    return 1 / (1 + (2 * aimed_half_mse(numbers, target)).sqrt())


def _positive_correlation(depth: Tensor, target: Tensor) -> Tensor:
    return correlation(depth, target).clamp_min(0)


def cosine_energy(embedding: Tensor, target: Tensor) -> Tensor:
    """CLIP_LOGIT_SCALE (1 - cosine), (B,)."""
    return CLIP_LOGIT_SCALE * cosine_distance(embedding, target)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine, (B,)."""
    return 1 - cosine(student, teacher)


def _positive_cosine(embedding: Tensor, target: Tensor) -> Tensor:
    return cosine(embedding, target).clamp_min(0)


def same_top(output: Tensor, teacher: Tensor) -> Tensor:
    """Share of places with the same most probable class: (B, K, ...) twice -> (B,)."""
    return (output.argmax(1, keepdim=True) == teacher.argmax(1, keepdim=True)).flatten(1).float().mean(1)


def only_top(logits: Tensor) -> Tensor:
    """1 for the most probable class and 0 for the others: (B, K, ...) -> the same shape."""
    return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1)


def overlap(logits: Tensor, teacher: Tensor) -> Tensor:
    """Intersection over union of what is probable, logits above 0, (B,); 1 where nothing is."""
    a, b = (logits > 0).flatten(1), (teacher > 0).flatten(1)
    return torch.where((a | b).any(1), (a & b).sum(1) / (a | b).sum(1).clamp_min(1), 1.0)


def most_probable(logits: Tensor) -> Tensor:
    """Class of the highest probability: logits (B, K, ...) -> (B, ...) long."""
    return logits.argmax(1)


def _depth_from_map(picture: Tensor, preprocess: Preprocess, labels: int) -> Tensor:
    return preprocess.frame(picture.mean(1, keepdim=True), "bilinear")  # near is white


def _mask_from_map(picture: Tensor, preprocess: Preprocess, labels: int) -> Tensor:
    return ((_depth_from_map(picture, preprocess, labels) + 1) / 2).clamp(0, 1)  # black beyond the picture: outside


def _labels_from_map(picture: Tensor, preprocess: Preprocess, labels: int) -> Tensor:
    return labels_of_picture(preprocess.frame(picture, "nearest-exact"), labels)


def _mask_from_mask(mask: Tensor, preprocess: Preprocess, label: int) -> Tensor:
    return preprocess.frame(mask, "bilinear", beyond=0).clamp(0, 1)


def _labels_from_mask(mask: Tensor, preprocess: Preprocess, label: int) -> Tensor:
    inside = preprocess.frame(mask, "nearest-exact", beyond=0)[:, 0] > 0.5
    if not bool(inside.flatten(1).any(1).all()):
        raise ValueError("the mask is empty in at least one image: paint white where the class shall be")
    return torch.where(inside, label, IGNORE)


def _depth_preview(depth: Tensor, labels: tuple[str, ...]) -> Tensor:
    return depth_picture(depth)


_FEATURES = Task(half_mse, normalized_mse, proximity, sum_over_pixels=True)
TASKS: dict[str, Task] = {
    "class": Task(cross_entropy, kl, probability, most_probable, preview=class_bars, is_logits=True, croppable=True,
                  names_classes=True, agreement=same_top, answer=only_top),
    "tags": Task(tag_cross_entropy, tag_kl, tag_probability, tags_present, preview=tag_bars, is_logits=True, croppable=True,
                 names_classes=True, agreement=overlap, answer=tags_present),
    "depth": Task(depth_difference, depth_difference, _positive_correlation, from_map=_depth_from_map,
                  drawn_as="grey, near is white", preview=_depth_preview, dense=True, agreement=_positive_correlation),
    "segmentation": Task(pixel_cross_entropy, kl, pixel_accuracy, most_probable, _labels_from_map,
                         "in the colours of its preview", _labels_from_mask, label_map, dense=True, is_logits=True,
                         agreement=same_top, answer=only_top),
    "mask": Task(mask_cross_entropy, mask_kl, mask_agreement, torch.sigmoid, _mask_from_map,
                 "white where the thing should be", _mask_from_mask, mask_picture, dense=True, is_logits=True,
                 has_prompt=True, agreement=overlap, answer=tags_present),
    "embedding": Task(cosine_energy, cosine_distance, _positive_cosine, croppable=True, agreement=_positive_cosine),
    "number": Task(aimed_half_mse, half_mse, aimed_proximity, croppable=True, sum_over_pixels=True),
    "features": _FEATURES,
    "style": replace(_FEATURES, croppable=True),
    "structure": _FEATURES,
}
"""Name of a task, as files and guiders have it -> the task."""


def resize_map(target: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (B, C, h, w) or a label map (B, h, w) long at another (height, width); labels are never mixed."""
    return resize(target, size) if target.is_floating_point() else resize_labels(target, size)
