"""Adam's moments of a guidance gradient: each value of it divided by the root of its own recent squares.

Adam (Kingma & Ba 2015) on the gradient of guidance is due to arXiv 2603.16797. The memory makes values that are large in
every step as small as the others; a normalized term divides each image by one number instead, and remembers nothing.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-8


@dataclass(frozen=True)
class Moments:
    """Shares of the past in the averages of a gradient (beta1) and of its squares (beta2); 0 and 0: the gradient's sign."""

    beta1: float = 0.0
    beta2: float = 0.817  # as tuned in the paper for classes of CIFAR-10

    def __post_init__(self):
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"moments need 0 <= beta < 1, got beta1 {self.beta1} and beta2 {self.beta2}")


@dataclass
class MomentState:
    """Moments of one gradient during one run."""

    moments: Moments
    mean: Tensor | float = 0.0
    square: Tensor | float = 0.0
    count: int = 0

    def direction(self, gradient: Tensor) -> Tensor:
        """The mean gradient over the root of the mean square, both corrected for their start at zero: values of about 1.

        gradient (B, ...): finite, of the same images in each call; zeros give zeros where beta1 is 0.
        """
        beta1, beta2 = self.moments.beta1, self.moments.beta2
        self.count += 1
        self.mean = beta1 * self.mean + (1 - beta1) * gradient
        self.square = beta2 * self.square + (1 - beta2) * gradient.square()
        root = torch.sqrt(self.square / (1 - beta2**self.count))
        return self.mean / (1 - beta1**self.count) / (root + EPSILON)
