"""A guider: a network that judges images, with its preprocessing, its task and what it is aimed at."""
import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tasks import TASKS


@dataclass(frozen=True)
class Preprocess:
    """Image (B, 3, H, W) in [-1, 1] -> resized, with the mean and spread that a network was trained on. Differentiable."""

    size: tuple[int, int]                               # (height, width)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of images in [0, 1]
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    interpolation: str = "bilinear"

    def __call__(self, image: Tensor) -> Tensor:
        if tuple(image.shape[-2:]) != tuple(self.size):
            image = F.interpolate(image, self.size, mode=self.interpolation, antialias=True)
        mean, std = (torch.tensor(values).to(image)[:, None, None] for values in (self.mean, self.std))
        return ((image + 1) / 2 - mean) / std

    def about(self) -> dict:
        """The numbers as JSON has them, for files."""
        return {"size": list(self.size), "mean": list(self.mean), "std": list(self.std),
                "interpolation": self.interpolation}


@dataclass(frozen=True)
class Guider:
    """A differentiable judge of images.

    image (B, 3, H, W) in [-1, 1] -> preprocess -> net(image, sigma) -> output -> task loss against the target -> (B,)

    An off-the-shelf network ignores sigma (`IgnoreSigma`); an `ExpertBank` in its place uses it.
    """

    name: str                                # such as "tinyworld/class"; goes into the files of its experts
    net: Callable[[Tensor, Tensor], Tensor]
    preprocess: Preprocess
    task: str                                # a key of TASKS
    labels: tuple[str, ...] = ()             # names of the classes, if it has any
    view: str = "denoised"                   # what it looks at: "noisy" state or "denoised" prediction
    target: Tensor | None = None             # class (B|1,) long; depth (B|1, 1, h, w); segmentation (B|1, h, w) long

    def aim(self, target: Tensor) -> "Guider":
        """The same guider with a target."""
        return replace(self, target=target)

    def predict(self, image: Tensor, sigma: Tensor) -> Tensor:
        """The network's output for images at noise levels (B,)."""
        return self.net(self.preprocess(image), sigma)

    def energy(self, image: Tensor, sigma: Tensor) -> Tensor:
        """How far each image is from the target, (B,), lower is better. ValueError without a target that fits."""
        output = self.predict(image, sigma)
        return TASKS[self.task].loss(output, self.target_for(image, output))

    def score(self, image: Tensor, sigma: Tensor) -> Tensor:
        """How well each image meets the target, (B,) in [0, 1]. Judge with a network that did not guide."""
        output = self.predict(image, sigma)
        return TASKS[self.task].score(output, self.target_for(image, output))

    def target_for(self, image: Tensor, output: Tensor) -> Tensor:
        """The target, in the place of the images. ValueError without one, or with one for another batch."""
        if self.target is None:
            raise ValueError(f"the guider {self.name} has no target: aim it at a {self.task} first")
        if len(self.target) not in (1, len(image)):
            raise ValueError(f"the target of {self.name} is for {len(self.target)} images but {len(image)} are "
                             "sampled: give one target for all, or one for each")
        if self.target.ndim > 1 and self.target.shape[-2:] != output.shape[-2:]:
            raise ValueError(f"the target of {self.name} is {tuple(self.target.shape[-2:])} but its answers are "
                             f"{tuple(output.shape[-2:])} (height, width): resize the target")
        target = self.target.to(image.device)
        return target.clone() if target.is_inference() else target


class IgnoreSigma(nn.Module):
    """An off-the-shelf network as net(image, sigma)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.eval().requires_grad_(False)

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        return self.net(image)


def clean(images: Tensor) -> Tensor:
    """The noise level of images without noise: zeros (B,)."""
    return images.new_zeros(len(images))


def class_target(guider: Guider, names: str) -> Tensor:
    """Classes by name or number, separated by commas -> (n,) long. ValueError names the close or the first choices."""
    if guider.task != "class":
        raise ValueError(f"{guider.name} predicts {guider.task}, not classes: give it an image as its target")
    known = {label.lower(): index for index, label in enumerate(guider.labels)}
    chosen = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name.lower() in known:
            chosen.append(known[name.lower()])
        elif name.isdecimal() and int(name) < len(guider.labels):
            chosen.append(int(name))
        else:
            close = difflib.get_close_matches(name.lower(), known, n=5) or list(known)[:8]
            raise ValueError(f"{guider.name} has no class '{name}': expected a number below {len(guider.labels)} "
                             f"or a name such as {', '.join(close)}")
    if not chosen:
        raise ValueError(f"no class was given: expected one or more names of {guider.name}, separated by commas")
    return torch.tensor(chosen)


@torch.no_grad()
def reading(guider: Guider, image: Tensor) -> Tensor:
    """What the guider reads in clean images, as a target for others to have the same: image (B, 3, H, W) -> target."""
    output = guider.predict(image, clean(image))
    return output if guider.task == "depth" else output.argmax(1)
