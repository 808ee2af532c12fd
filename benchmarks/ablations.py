"""Ablations: changes of a guider that need no training."""
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ppap_core import ExpertBank, Guider

from .ppap_reference import lower_on_edges


class Softplus(TorchFunctionMode):
    """Context manager: computes a softplus in place of every ReLU, so that gradients do not jump."""

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.relu, torch.relu):
            return F.softplus(args[0], self.beta)
        return function(*args, **(kwargs or {}))


class Smooth(nn.Module):
    """A network with softplus in place of ReLU."""

    def __init__(self, net: Callable[..., Tensor], beta: float):
        super().__init__()
        self.net, self.beta = net, beta

    def forward(self, *args: Tensor) -> Tensor:
        with Softplus(self.beta):
            return self.net(*args)


def softplus(guider: Guider, beta: float = 3.0) -> Guider:
    """The guider with softplus in place of ReLU (Ma et al. 2023, section 3.2)."""
    return replace(guider, net=Smooth(guider.net, beta))


@dataclass(frozen=True)
class JointOverMarginal(Guider):
    """-log (exp(joint f_y) / sum_k exp(marginal f_k)): temperatures of EluCD (Ma et al. 2023, section 3.3)."""

    joint: float = 1.0
    marginal: float = 0.5

    def energy(self, image: Tensor, sigma: Tensor) -> Tensor:
        logits = self.predict(image, sigma)
        target = logits.gather(1, self.target_for(image, logits).expand(len(logits))[:, None])[:, 0]
        return (self.marginal * logits).logsumexp(1) - self.joint * target


def elucd(guider: Guider) -> Guider:
    """The guider with the settings of EluCD (Ma et al. 2023), without its sine schedule: the weight is searched instead."""
    smooth = softplus(guider)
    return JointOverMarginal(**{field.name: getattr(smooth, field.name) for field in fields(Guider)})


class BlendedBank(nn.Module):
    """A bank that mixes the outputs of neighbours near an edge: half and half on it, unmixed beyond `width` in log sigma."""

    def __init__(self, bank: ExpertBank, width: float = math.log(1.25)):
        super().__init__()
        self.bank, self.width = bank, width

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        output, level = self.bank(image, sigma), math.log(float(sigma[0]))
        for index, edge in enumerate(self.bank.schedule.edges[1:-1]):
            distance = level - math.log(edge)
            if abs(distance) < self.width:
                self.bank.select(index if distance >= 0 else index + 1)
                return output.lerp(self.bank.net(image), 0.5 * (1 - abs(distance) / self.width))
        return output


class AveragedNetwork(nn.Module):
    """A network averaged over noisy copies of its input: a smoother energy at `copies` times the cost. std 0: unchanged."""

    def __init__(self, net: Callable[..., Tensor], copies: int = 4, std: float = 0.1):
        super().__init__()
        self.net, self.copies, self.std = net, copies, std

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        noise = torch.randn(self.copies, *image.shape, generator=torch.Generator().manual_seed(0)).to(image)
        return torch.stack([self.net(image + self.std * part, sigma) for part in noise]).mean(0)


def blended(guider: Guider) -> Guider:
    """The guider with experts blended near the edges."""
    return replace(guider, net=BlendedBank(cast(ExpertBank, guider.net)))


def averaged(guider: Guider) -> Guider:
    """The guider with its output averaged over small noise."""
    return replace(guider, net=AveragedNetwork(guider.net))


ABLATIONS: dict[str, Callable[[Guider], Guider]] = {"softplus": softplus, "elucd": elucd, "blended": blended,
                                                   "averaged": averaged, "lower on edges": lower_on_edges}
"""By a row's "variant" in rows/*.json."""
