"""Linear measurements of images, and guiders that ask for an image whose measurement is the one at hand.

A measurement is y = A z + noise: a part of an image, a smaller image, a blurred one. All that restoration needs of A is a
function of the eigenvalues of A A^T, which each operator here knows in closed form:

    proximal step     argmin |y - A z'|^2 + rho |z' - z|^2  =  z + A^T (A A^T + rho)^-1 (y - A z)
    pseudo-inverse    A^T (A A^T)^+ y
    likelihood        y ~ N(A D, r^2 A A^T + noise^2)   where the image is N(D, r^2), as behind a noisy state
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..noise import PIXEL_SIGMA_DATA, expand
from .guider import Guider
from .preprocess import Preprocess

Spectral = Callable[[Tensor], Tensor]
"""Eigenvalues of A A^T, any shape -> the factors that take their place."""


class LinearOperator(Protocol):
    """A linear map of images (B, C, H, W) to measurements (B, C, h, w)."""

    def apply(self, image: Tensor) -> Tensor:
        """A z of images z (B, C, H, W)."""

    def adjoint(self, values: Tensor) -> Tensor:
        """A^T y of measurements y (B, C, h, w)."""

    def on_gram(self, values: Tensor, function: Spectral) -> Tensor:
        """f(A A^T) y of measurements y (B, C, h, w)."""


@dataclass(frozen=True)
class Mask:
    """The pixels that are kept, the others as 0."""

    kept: Tensor  # (1, 1, H, W), 1 where a pixel is kept, else 0

    def apply(self, image: Tensor) -> Tensor:
        return image * self.kept.to(image)

    adjoint = apply

    def on_gram(self, values: Tensor, function: Spectral) -> Tensor:
        return values * function(self.kept.to(values))


@dataclass(frozen=True)
class Downscale:
    """Means of squares of `factor` times `factor` pixels. It must divide both sides of the image."""

    factor: int

    def apply(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(image, self.factor)

    def adjoint(self, values: Tensor) -> Tensor:
        return F.interpolate(values, scale_factor=self.factor) / self.factor**2

    def on_gram(self, values: Tensor, function: Spectral) -> Tensor:
        return values * function(values.new_tensor(self.factor**-2))


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur across the border, as if the image were laid beside itself."""

    std: float  # of the Gaussian, in pixels; 0 changes nothing

    def apply(self, image: Tensor) -> Tensor:
        return self._filtered(image, self._response(image))

    adjoint = apply

    def on_gram(self, values: Tensor, function: Spectral) -> Tensor:
        return self._filtered(values, function(self._response(values).square()))

    def _response(self, image: Tensor) -> Tensor:
        rows, columns = (torch.fft.fftfreq(size, device=image.device, dtype=image.dtype) for size in image.shape[-2:])
        return (-2 * (torch.pi * self.std) ** 2 * (rows[:, None].square() + columns.square())).exp()

    @staticmethod
    def _filtered(image: Tensor, response: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(image) * response).real


@dataclass(frozen=True, eq=False)
class Separable:
    """A linear map of rows and of columns, each by a matrix: any resizing or blur, whatever it does at the border."""

    rows: Tensor     # (h, H)
    columns: Tensor  # (w, W)

    def apply(self, image: Tensor) -> Tensor:
        return self.rows.to(image) @ image @ self.columns.to(image).mT

    def adjoint(self, values: Tensor) -> Tensor:
        return self.rows.to(values).mT @ values @ self.columns.to(values)

    def on_gram(self, values: Tensor, function: Spectral) -> Tensor:
        (high, down), (wide, across) = ([part.to(values) for part in parts] for parts in self._spectra)
        inside = down.mT @ values @ across
        return down @ (inside * function(high[:, None] * wide)) @ across.mT

    @cached_property
    def _spectra(self) -> list[tuple[Tensor, Tensor]]:
        """Eigenvalues and eigenvectors of the matrices times their transposed."""
        with torch.inference_mode(False), torch.no_grad():
            return [(values.clamp_min(0), vectors) for values, vectors in
                    (torch.linalg.eigh(matrix @ matrix.mT) for matrix in (self.rows, self.columns))]


@dataclass(frozen=True)
class Mixed:
    """One weighted sum of the channels, of which a part is measured."""

    operator: LinearOperator     # of each channel alone
    weights: tuple[float, ...]   # of the channels

    def apply(self, image: Tensor) -> Tensor:
        return self.operator.apply((image * self._weights(image)).sum(1, keepdim=True))

    def adjoint(self, values: Tensor) -> Tensor:
        return self.operator.adjoint(values) * self._weights(values)

    def on_gram(self, values: Tensor, function: Spectral) -> Tensor:
        return self.operator.on_gram(values, lambda value: function(value * sum(weight**2 for weight in self.weights)))

    def _weights(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.weights)[:, None, None]


@dataclass(frozen=True, eq=False)
class Partly:
    """A measurement of which some values are not known, and count as 0.

    Functions of A A^T are exact where no two values measure the same pixel, else an approximation.
    """

    operator: LinearOperator
    known: Tensor  # (B|1, 1, h, w), 1 where a value is known, else 0

    def apply(self, image: Tensor) -> Tensor:
        return self.operator.apply(image) * self.known

    def adjoint(self, values: Tensor) -> Tensor:
        return self.operator.adjoint(values * self.known)

    def on_gram(self, values: Tensor, function: Spectral) -> Tensor:
        return self.operator.on_gram(values, function) * self.known


@dataclass(frozen=True)
class Measurement:
    """What was measured of images, y = A z + noise."""

    operator: LinearOperator
    values: Tensor  # y, (B, C, h, w)
    noise: float    # standard deviation of the noise in y, above 0

    def __post_init__(self):
        if not self.noise > 0:
            raise ValueError(f"the noise of a measurement must be above 0, got {self.noise}: for an exact one give less "
                             "than what can be seen, such as 0.001")

    def residual(self, image: Tensor) -> Tensor:
        """y - A z of images z (B, C, H, W)."""
        return self.values - self.operator.apply(image)

    def proximal(self, image: Tensor, rho: float) -> Tensor:
        """argmin |y - A z|^2 + rho |z - image|^2, (B, C, H, W): infinite rho leaves the image as it is."""
        return image + self.operator.adjoint(self.operator.on_gram(self.residual(image), lambda value: 1 / (value + rho)))

    def pseudo_inverse(self, values: Tensor, cut: float = 1e-3) -> Tensor:
        """A^T (A A^T)^+ of measurements (B, C, h, w): the smallest image that has them.

        cut: share of the largest eigenvalue of A A^T below which a direction counts as not measured.
        """
        def inverse(value: Tensor) -> Tensor:
            least = cut * value.max()
            return torch.where(value >= least, 1 / value.clamp_min(least), 0)
        return self.operator.adjoint(self.operator.on_gram(values, inverse))


@dataclass(frozen=True, kw_only=True)
class SquaredErrorGuider(Guider):
    """A guider that asks a prediction D for a measurement: half the mean of |y - A D|^2, times the values of the image."""

    operator: LinearOperator

    def residual(self, image: Tensor) -> Tensor:
        """y - A D of predictions D (B, C, H, W). ValueError for measurements of another number or size of images."""
        measured = self.operator.apply(image)
        return self.target_for(image, measured) - measured

    def energy(self, image: Tensor, sigma: Tensor) -> Tensor:
        """The energy of predictions (B, C, H, W), (B,); the noise levels do not matter."""
        return self.residual(image).square().flatten(1).mean(1) * (image[0].numel() / 2)


@dataclass(frozen=True, kw_only=True)
class LikelihoodGuider(SquaredErrorGuider):
    """A guider whose energy knows how far a prediction is to be trusted at each noise level.

    The energy of a prediction D is -log p(y | x) where the image behind x is N(D, r^2), r the posterior standard deviation.
    A term of weight 1 moves D to E[image | x, y], in the prediction by DiffPIR's proximal step (Zhu et al. 2023) with
    rho = noise^2 / r^2, and through the model as pseudo-inverse guidance does (Song et al. 2023).
    """

    noise: float
    sigma_data: float = PIXEL_SIGMA_DATA

    def energy(self, image: Tensor, sigma: Tensor) -> Tensor:
        """-log p(y | x) up to a constant for predictions (B, C, H, W) at noise levels (B,), (B,)."""
        variance = expand(1 / (1 / sigma.square() + 1 / self.sigma_data**2), image)
        residual = self.residual(image)
        weighed = self.operator.on_gram(residual, lambda value: 1 / (variance * value + self.noise**2))
        return (residual * weighed).flatten(1).sum(1) / 2


UNCHANGED = Preprocess((1, 1), fit="own")


def squared_error_guider(measurement: Measurement) -> SquaredErrorGuider:
    """The guider whose energy is the squared error of a measurement."""
    operator = measurement.operator
    return SquaredErrorGuider("measurement/squared error", operator.apply, UNCHANGED, "features", target=measurement.values,
                              operator=operator)


def likelihood_guider(measurement: Measurement, sigma_data: float = PIXEL_SIGMA_DATA) -> LikelihoodGuider:
    """The guider whose energy is the likelihood of a measurement.

    sigma_data: standard deviation of images, 0.5 for pixels in [-1, 1].
    """
    operator = measurement.operator
    return LikelihoodGuider("measurement/likelihood", operator.apply, UNCHANGED, "features", target=measurement.values,
                            operator=operator, noise=measurement.noise, sigma_data=sigma_data)
