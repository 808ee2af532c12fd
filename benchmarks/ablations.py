"""Changes of a guider at the time of guidance, for the benchmark: none needs training."""
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ppap_core.experts.bank import ExpertBank
from ppap_core.guiders.guider import Guider

from .ppap_reference import lower_on_edges


class Softplus(TorchFunctionMode):
    """In here every ReLU is a softplus, whose gradient does not jump."""

    def __init__(self, beta: float):
        super().__init__()
        self.beta = beta

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.relu, torch.relu):
            return F.softplus(args[0], self.beta)
        return function(*args, **(kwargs or {}))


class Smooth(nn.Module):
    """A network whose ReLUs are softplus."""

    def __init__(self, net: nn.Module, beta: float):
        super().__init__()
        self.net, self.beta = net, beta

    def forward(self, *args: Tensor) -> Tensor:
        with Softplus(self.beta):
            return self.net(*args)


def softplus(guider: Guider, beta: float = 3.0) -> Guider:
    """Softplus in the place of ReLU (Ma et al. 2023, section 3.2)."""
    return replace(guider, net=Smooth(guider.net, beta))


@dataclass(frozen=True)
class JointOverMarginal(Guider):
    """-log (exp(joint f_y) / sum_k exp(marginal f_k)): temperatures of EluCD (Ma et al. 2023, section 3.3)."""

    joint: float = 1.0
    marginal: float = 0.5

    def energy(self, image: Tensor, sigma: Tensor) -> Tensor:
        logits = self.predict(image, sigma)
        wanted = logits.gather(1, self.target.expand(len(logits))[:, None])[:, 0]
        return (self.marginal * logits).logsumexp(1) - self.joint * wanted


def elucd(guider: Guider) -> Guider:
    """The published settings of EluCD, but for its schedule in the form of a sine; strength is searched instead."""
    smooth = softplus(guider)
    return JointOverMarginal(**{each.name: getattr(smooth, each.name) for each in fields(Guider)})


class Blended(nn.Module):
    """A bank whose neighbours share the work near an edge: on it half and half, a factor of 1.25 away from it none."""

    def __init__(self, bank: ExpertBank, width: float = math.log(1.25)):
        super().__init__()
        self.bank, self.width = bank, width

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        answer, level = self.bank(image, sigma), math.log(float(sigma[0]))
        for index, edge in enumerate(self.bank.schedule.edges[1:-1]):
            away = level - math.log(edge)
            if abs(away) < self.width:
                self.bank.select(index if away >= 0 else index + 1)
                return answer.lerp(self.bank.net(image), 0.5 * (1 - abs(away) / self.width))
        return answer


class Averaged(nn.Module):
    """The mean answer for a few slightly noisy copies of the image: a smoother energy, at as many times the cost."""

    def __init__(self, net: nn.Module, copies: int = 4, std: float = 0.1):
        super().__init__()
        self.net, self.copies, self.std = net, copies, std

    def forward(self, image: Tensor, sigma: Tensor) -> Tensor:
        noise = torch.randn(self.copies, *image.shape, generator=torch.Generator().manual_seed(0)).to(image)
        return sum(self.net(image + self.std * each, sigma) for each in noise) / self.copies


def blended(guider: Guider) -> Guider:
    """Experts that share the work near the edges."""
    return replace(guider, net=Blended(guider.net))


def averaged(guider: Guider) -> Guider:
    """The energy smoothed over small noise."""
    return replace(guider, net=Averaged(guider.net))


ABLATIONS: dict[str, Callable[[Guider], Guider]] = {"softplus": softplus, "elucd": elucd, "blended": blended,
                                                   "averaged": averaged, "lower on edges": lower_on_edges}
