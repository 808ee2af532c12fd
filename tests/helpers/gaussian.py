"""A small Gaussian mixture, exact in float64: the oracle of the tests, with the interface of real models."""
import torch
from torch import Tensor

from ppap_core.guiders.guider import Guider
from ppap_core.noise import expand


class GaussianMixture:
    """K isotropic Gaussians of one width, one class each, over tensors of any shape.

    means (K, C, H, W); width: standard deviation of each; all classes are equally likely.
    """

    def __init__(self, means: Tensor, width: float):
        self.means, self.width = means.double(), width

    @classmethod
    def of_shape(cls, shape: tuple[int, ...], classes: int = 4, width: float = 0.3, seed: int = 0) -> "GaussianMixture":
        """Random means of unit size."""
        return cls(torch.randn(classes, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), width)

    def log_likelihood(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p(x | class) up to one constant for all classes: x (B, C, H, W), sigma (B,) -> (B, K)."""
        distance = (x.double()[:, None] - self.means).flatten(2).square().sum(2)
        return -distance / (2 * (self.width**2 + sigma.double() ** 2))[:, None]

    def denoise_class(self, x: Tensor, sigma: Tensor, label: int) -> Tensor:
        """E[image | x, class]: the exact conditional denoiser."""
        share = expand(self.width**2 / (self.width**2 + sigma.double() ** 2), x.double())
        return share * x.double() + (1 - share) * self.means[label]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[image | x]: the exact unconditional Denoiser."""
        weights = self.log_likelihood(x, sigma).softmax(1)
        conditional = torch.stack([self.denoise_class(x, sigma, k) for k in range(len(self.means))], dim=1)
        return (weights.reshape(*weights.shape, *(1,) * (x.ndim - 1)) * conditional).sum(1)

    def guider(self) -> Guider:
        """The exact noise-aware classifier p(class | x), as a guider of the noisy view.

        It undoes `to_vp`; its preprocessing changes nothing, because its images are not pictures.
        """
        def net(seen: Tensor, sigma: Tensor) -> Tensor:
            return self.log_likelihood(seen * (1 + expand(sigma, seen) ** 2).sqrt(), sigma)
        labels = tuple(str(k) for k in range(len(self.means)))
        return Guider("tinyworld/gaussian", net, lambda image: image, "class", labels, view="noisy")
