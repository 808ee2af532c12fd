"""A world in which guidance is measured: a model, a guider, and what its images are to show."""
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ppap_core import Guider, Term, Trajectories

Wanted = Any
"""What images of a world are to show, one item for each: scenes, or targets of a guider."""


class World(Protocol):
    """A model that is sampled, the guider of one subject, and the device of both. States are (B, C, H, W)."""

    @property
    def name(self) -> str:
        """Name of the model, for the manifest of its images."""

    @property
    def store_seed(self) -> int:
        """Seed of the first image that experts learn from."""

    @property
    def sigma_data(self) -> float:
        """Standard deviation of what the model samples."""

    @property
    def subject(self) -> str:
        """Name of what the guider judges, for the folders of its trainings."""

    @property
    def denoiser(self) -> Callable[..., Tensor]:
        """The model's network."""

    @property
    def guider(self) -> Guider:
        """The plain guider."""

    @property
    def device(self) -> torch.device:
        """Device of the networks."""

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Predict clean images; differentiable where x requires a gradient."""

    def plain_output(self, images: Tensor) -> Tensor:
        """Output of the plain guider on clean images."""

    def start(self, seeds: Sequence[int], steps: int, schedule: str = "karras") -> tuple[Tensor, Tensor]:
        """Noise of the given seeds at the first noise level, and all levels, (steps + 1,)."""

    def sample(self, seeds: Sequence[int], steps: int, terms: Sequence[Term] = ()) -> Tensor:
        """Images of the given seeds after Euler steps."""

    def sample_recorded(self, seeds: Sequence[int], steps: int, terms: Sequence[Term] = ()) -> tuple[Tensor, Trajectories]:
        """Images as `sample` makes them, within [-1, 1], and their trajectories, for a `SampleStore`."""

    def wanted(self, numbers: Sequence[int], label: int | None = None) -> Wanted:
        """What images of these numbers are to show. label: a class for all of them; None: each has its own."""

    def aimed(self, guider: Guider, wanted: Wanted) -> Guider:
        """A guider of this world, plain or with experts, aimed at what images are to show."""
