"""Guiders from a few pictures: a linear head on what a network sees, as a classifier of the pictures' kinds."""
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..viz.drawing import captioned_tiles, from_pillow, note_picture, to_pillow
from .guider import Guider, IgnoreSigma, clean, fold_name, has_network
from .ridge import LinearFit, fit_linear

BATCH = 8                # pictures that the network sees at once
SMALLEST_CROP = 0.7      # side of an altered copy, in sides of the picture
MAX_FEATURES = 16_384    # numbers in an embedding
MOST_CLASSES = 1000
MOST_SHOWN, TILE = 16, 160  # pictures that a head got wrong, and their height in pixels
GUESSED, CERTAIN = 1.0, 2.0  # standard errors above chance up to which a head guesses, and from which on it tells apart

OnBatch = Callable[[int, int], None]
"""(pictures seen, pictures to see), called after each batch; copies count as pictures"""


@dataclass(frozen=True)
class TrainedGuider:
    """A guider of the task "class", with what it said of each picture that was left out of its training."""

    guider: Guider
    labels: Tensor          # (n,) long, the class of each picture
    probabilities: Tensor   # (n, K), by heads that had not seen the picture
    refused_copies: bool    # whether altered copies made it worse, so that it learned without them

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Of each class the pictures that were recognised, and all."""
        right = self.probabilities.argmax(1) == self.labels
        return [(int((right & (self.labels == index)).sum()), int((self.labels == index).sum()))
                for index in range(len(self.guider.labels))]

    @property
    def accuracy(self) -> float:
        """Share of pictures that were recognised, as the mean over classes."""
        return sum(right / count for right, count in self.counts) / len(self.counts)

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / len(self.counts)

    @property
    def error(self) -> float:
        """Standard error of the accuracy, from the numbers of pictures."""
        shares = [((right + 1) / (count + 2), count) for right, count in self.counts]
        return math.sqrt(sum(share * (1 - share) / count for share, count in shares)) / len(shares)

    @property
    def certainty(self) -> float:
        """How far the accuracy is above chance, in standard errors of guessing."""
        by_guessing = self.chance * (1 - self.chance) * sum(1 / count for _, count in self.counts)
        return (self.accuracy - self.chance) * len(self.counts) / math.sqrt(by_guessing)

    @property
    def tells_apart(self) -> bool:
        """Whether the accuracy is above chance by more than guessing would explain."""
        return self.certainty > CERTAIN

    def describe(self) -> str:
        """Say in sentences how well the classes are told apart."""
        counts = ", ".join(f"{name} {right} of {count}"
                           for name, (right, count) in zip(self.guider.labels, self.counts, strict=True))
        said = (f"Pictures recognised by a head that had not seen them: {counts}. That is {self.accuracy:.0%}, give or take "
                f"{self.error:.0%}; guessing reaches {self.chance:.0%}.")
        if GUESSED < self.certainty <= CERTAIN:
            return f"{said} With so few pictures that may be luck: take more to be certain."
        if not self.tells_apart:
            return (f"{said} It cannot tell them apart: take more pictures, pictures that differ in nothing else, or "
                    "another backbone.")
        return f"{said} Altered copies made it no better and were left out." if self.refused_copies else said

    def wrong(self, images: Mapping[str, Tensor]) -> Tensor:
        """Draw the pictures that were not recognised, the surest errors first, (1, 3, H, W) in [-1, 1].

        images: those of the training, by class.
        """
        pictures = [image for batch in images.values() for image in batch]
        seen, sure = self.probabilities.argmax(1), self.probabilities.amax(1)
        errors = [index for index in sure.argsort(descending=True).tolist() if seen[index] != self.labels[index]]
        if not errors:
            return note_picture([f"All {len(pictures)} pictures were recognised by heads that had not seen them."])
        names = self.guider.labels
        captions = [f"{names[self.labels[index]]}, seen as\n{names[seen[index]]} {sure[index]:.0%}" for index in errors]
        tiles = [(caption, to_pillow(pictures[index])) for caption, index in zip(captions, errors, strict=True)]
        return from_pillow(captioned_tiles(tiles[:MOST_SHOWN], TILE))


def train_guider(backbone: Guider, images: Mapping[str, Tensor], copies: int = 4, seed: int = 0, name: str = "unsaved",
                 on_batch: OnBatch | None = None) -> TrainedGuider:
    """Train a linear head on the output of a network, which stays as it is, to name the class of an image.

    backbone: a plain network whose output is one vector, such as an embedding; needs no target. images: by the name of
    their class two or more (n, 3, H, W) in [-1, 1], of any size. copies: altered ones of each picture, cut out of it and
    every other one mirrored; 0: none. seed: of the places that they show. name: of the guider.
    ValueError for fewer than two classes or images of a class, and for a network with another output.
    """
    require_backbone(backbone)
    labels = class_names(list(images))
    for label, batch in images.items():
        if len(batch) < 2:
            raise ValueError(f"there is {len(batch) or 'no'} picture of '{label}': expected at least two, so that one can "
                             "be left out; some twenty are good")
    features = embed(backbone, images, copies, seed, on_batch)
    numbers = torch.arange(len(labels)).repeat_interleave(torch.tensor([len(batch) for batch in images.values()]))
    fit, used_copies = best_fit(features, numbers)
    guider = with_head(backbone, fit.weight, fit.bias, labels, name)
    return TrainedGuider(guider, numbers, fit.probabilities, copies > 0 and not used_copies)


def best_fit(features: Tensor, labels: Tensor) -> tuple[LinearFit, bool]:
    """Fit a classifier with altered copies and without, and return the one that names what was left out better.

    features: (n, 1 + copies, D). labels: (n,) long. Returns the fit, and whether it learned from copies.
    """
    fits = [fit_linear(features[:, :views], labels) for views in sorted({1, features.shape[1]})]
    best = min(fits, key=lambda fit: fit.loss)
    return best, best is not fits[0]


def require_backbone(guider: Guider) -> None:
    """ValueError unless a guider is a plain network, on which a head can be trained."""
    if not has_network(guider) or not isinstance(guider.net, IgnoreSigma):
        raise ValueError(f"{guider.name} is no plain network: expected one without experts, such as the embedding of a "
                         "network from a folder")
    if isinstance(guider.net.net, WithHead):
        raise ValueError(f"{guider.name} was trained itself: expected the network that it was trained on")


def class_names(names: list[str]) -> tuple[str, ...]:
    """Names of classes as labels. ValueError for fewer than two, for two that are alike, empty ones and commas."""
    labels = tuple(name.strip() for name in names)
    if not 2 <= len(labels) <= MOST_CLASSES:
        raise ValueError(f"there is {len(labels) or 'no'} class: expected at least two, such as like and unlike")
    if not all(labels) or "," in "".join(labels) or len(set(map(fold_name, labels))) < len(labels):
        raise ValueError(f"the names of the classes are {', '.join(map(repr, labels))}: expected a different one for each, "
                         "without commas")
    return labels


@torch.no_grad()
def embed(backbone: Guider, images: Mapping[str, Tensor], copies: int = 0, seed: int = 0,
          on_batch: OnBatch | None = None) -> Tensor:
    """Outputs of a network for all images and their altered copies, (n, 1 + copies, D), on the CPU.

    Arguments and errors are those of `train_guider`.
    """
    batches = [part for batch in images.values() for part in batch.split(BATCH)]
    total, done, rows = (1 + copies) * sum(map(len, batches)), 0, []
    for batch in batches:
        seen = []
        for image in [batch, *altered(batch, copies, seed)]:
            seen.append(_embedding(backbone, image))
            done += len(image)
            if on_batch:
                on_batch(done, total)
        rows.append(torch.stack(seen, 1))
    return torch.cat(rows)


def _embedding(backbone: Guider, image: Tensor) -> Tensor:
    output = backbone.predict(image, clean(image)).float().cpu()
    if output.ndim != 2 or not 1 < output.shape[1] <= MAX_FEATURES:
        raise ValueError(f"{backbone.name} answers with {backbone.task} of the shape {tuple(output.shape[1:])}: expected "
                         f"one vector of up to {MAX_FEATURES:,} numbers for an image, such as its embedding")
    if not output.isfinite().all():
        raise ValueError(f"{backbone.name} answers with values that are not numbers for some of the pictures: expected "
                         "pictures that it can read; look at them, or take another network")
    return output


def altered(images: Tensor, copies: int, seed: int) -> list[Tensor]:
    """Copies of images (B, C, H, W) that show most of them, every other one mirrored; the places depend on the seed only."""
    generator, (height, width), parts = random.Random(seed), images.shape[-2:], []
    for index in range(copies):
        share = generator.uniform(SMALLEST_CROP, 1)
        rows, columns = (max(round(share * side), 1) for side in (height, width))
        top, left = (round(generator.random() * spare) for spare in (height - rows, width - columns))
        part = images[..., top:top + rows, left:left + columns]
        parts.append(part if index % 2 else part.flip(-1))
    return parts


class WithHead(nn.Module):
    """A network whose output a linear layer reads: image -> logits (B, K)."""

    def __init__(self, net: nn.Module, head: nn.Linear):
        super().__init__()
        self.net, self.head = net, head

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.net(image).float())


def with_head(backbone: Guider, weight: Tensor, bias: Tensor, labels: tuple[str, ...], name: str) -> Guider:
    """A classifier of a plain network and a linear head; the network is shared with the backbone.

    weight: (K, D). bias: (K,). labels: K names. name: of the guider, behind "trained/".
    """
    require_backbone(backbone)
    device = next(backbone.net.parameters()).device  # type: ignore[attr-defined]
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    net = IgnoreSigma(WithHead(backbone.net.net, head.to(device)))  # type: ignore[attr-defined]
    return Guider(f"trained/{name}", net, backbone.preprocess, "class", labels)
