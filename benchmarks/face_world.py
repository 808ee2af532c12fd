"""The world of real faces as one value: a diffusion model of grey faces and the networks of others that guide and judge it.

Kadkhodaie et al. (2023) trained the model, of 40 x 40 pixels. `real` says where these networks come from.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from ppap_core import (
    Denoiser,
    Guider,
    IgnoreSigma,
    Preprocess,
    Term,
    Trajectories,
    TrajectoryRecorder,
    guided,
    karras_sigmas,
    sample_euler,
)
from ppap_core.guiders.guider import clean
from ppap_core.noise import PIXEL_SIGMA_DATA
from ppap_core.rng import seeded_noise

from .real import real_networks

SHAPE = (1, 40, 40)
SIGMA_MIN, SIGMA_MAX = 0.1, 10.0
STEPS = 25  # of Euler's sampler: faces at 50 are the same to the eye
PERSON_SEED = 310_000_000
PEOPLE = 4    # who are aimed at
CLIPPED = 0.02  # share of the darkest and of the brightest pixels that count for nothing, as for `face_view`
NETWORKS = {"expression": ("class", "EXPRESSIONS"), "emotion": ("class", "EMOTIONS"), "age": ("class", "AGES"),
            "identity": ("embedding", "")}
"""Networks for faces: the task of each, and the name of its labels in `real`."""


class FaceView(nn.Module):
    """A network for faces behind the view that it wants of a generated one: exposed and cropped to the face.

    It reads the first channel of images (B, 1|3, H, W).
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        view = real_networks().face_view(image[:, :1])
        return self.net(view.contiguous(memory_format=torch.channels_last))  # faster on a CPU


@cache
def face_guider(name: str) -> Guider:
    """The guider of one of NETWORKS. ValueError without the folder of real networks."""
    task, labels = NETWORKS[name]
    net = FaceView(getattr(real_networks(), name)().to(memory_format=torch.channels_last))
    # these networks resize and normalise by themselves
    untouched = Preprocess((1, 1), fit="own")
    return Guider(f"real/{name}", IgnoreSigma(net), untouched, task, getattr(real_networks(), labels) if labels else ())


@dataclass(frozen=True)
class FaceWorld:
    """The denoiser of faces and the guider of one subject, on the CPU."""

    denoiser: nn.Module  # predicts the noise of images in [0, 1], in bfloat16
    guider: Guider
    subject: str = "expression"  # the guider's name in NETWORKS
    device: torch.device = torch.device("cpu")
    name: ClassVar[str] = "faces"
    store_seed: ClassVar[int] = 500_000
    sigma_data: ClassVar[float] = PIXEL_SIGMA_DATA

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Predict clean faces (B, 1, 40, 40), the state in float32; differentiable where x requires a gradient.

        The network is blind to sigma, and three times as fast in bfloat16 as in float32.
        """
        with torch.set_grad_enabled(x.requires_grad):
            scaled = ((x + 1) / 2).to(torch.bfloat16, memory_format=torch.channels_last)
            return x - 2 * self.denoiser(scaled).to(x)

    @torch.no_grad()
    def plain_output(self, images: Tensor) -> Tensor:
        """Output of the plain guider on clean images (B, 1, 40, 40)."""
        return self.guider.predict(images, clean(images))

    def start(self, seeds: Sequence[int], steps: int = STEPS, schedule: str = "karras") -> tuple[Tensor, Tensor]:
        """Noise of the given seeds at the first noise level, (len(seeds), 1, 40, 40), and all levels, (steps + 1,).

        schedule: only "karras".
        """
        sigmas = karras_sigmas(steps, SIGMA_MIN, SIGMA_MAX)
        return seeded_noise(seeds, SHAPE) * sigmas[0], sigmas

    def sample(self, seeds: Sequence[int], steps: int = STEPS, terms: Sequence[Term] = ()) -> Tensor:
        """Faces of the given seeds after Euler steps, (len(seeds), 1, 40, 40)."""
        return self._sample(self.denoise, seeds, steps, terms)

    def sample_recorded(self, seeds: Sequence[int], steps: int = STEPS,
                        terms: Sequence[Term] = ()) -> tuple[Tensor, Trajectories]:
        """Faces as `sample` makes them, within [-1, 1], and their trajectories, for a `SampleStore`."""
        recorder = TrajectoryRecorder()
        images = self._sample(recorder.wrap(self.denoise), seeds, steps, terms)
        return within_range(images), recorder.trajectories(seeds)

    def wanted(self, numbers: Sequence[int], label: int | None = None) -> Tensor:
        """Classes, or for identity one of PEOPLE persons, for the faces of these numbers, (B,).

        label: the same for all of them; None: each has its own.
        """
        choices = len(self.guider.labels) or PEOPLE
        return torch.tensor([number % choices if label is None else label for number in numbers])

    def aimed(self, guider: Guider, wanted: Tensor) -> Guider:
        """A guider of this world, plain or with experts, aimed at classes or persons (B,)."""
        return guider.aim(wanted if guider.labels else self.embeddings[wanted])

    @cached_property
    def persons(self) -> Tensor:
        """Unguided faces (64, 1, 40, 40): the first PEOPLE are aimed at, all are candidates for whom a face shows."""
        return self.sample(range(PERSON_SEED, PERSON_SEED + 64))

    @cached_property
    def embeddings(self) -> Tensor:
        """Outputs of the plain guider for the persons, (64, D)."""
        return self.plain_output(self.persons)

    def _sample(self, denoise: Denoiser, seeds: Sequence[int], steps: int, terms: Sequence[Term]) -> Tensor:
        # the last level is 0, so that the last step is a prediction of the clean face
        return sample_euler(guided(denoise, terms), *self.start(seeds, steps))


def within_range(images: Tensor) -> Tensor:
    """Faces (B, 1, H, W) in [-1, 1], darker or with less contrast where they left it, as nothing fixes their brightness.

    Networks behind a `FaceView` see no difference; of faces that are merely clamped, one in eight is called by another name.
    """
    dark, bright = (images.flatten(1).quantile(share, 1).reshape(-1, 1, 1, 1) for share in (CLIPPED, 1 - CLIPPED))
    dark, bright = dark.clamp_max(-1), bright.clamp_min(1)
    return (2 * (images - dark) / (bright - dark) - 1).clamp(-1, 1)


def load_face_world(guider: str = "expression") -> FaceWorld:
    """The world with a guider of NETWORKS. ValueError without the folder of real networks."""
    denoiser = real_networks().faces().noise.to(torch.bfloat16).to(memory_format=torch.channels_last)
    return FaceWorld(denoiser, face_guider(guider), guider)
