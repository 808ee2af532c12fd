"""Methods of the benchmark that guide every step by a guider, which may be trained and changed first."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ppap_core import (
    Denoiser,
    GuidanceSettings,
    Guider,
    NoiseInterval,
    Schedule,
    Term,
    guided,
    sample_euler,
)
from ppap_core.schedules import ALWAYS, FALLING, Ramp

from .ablations import ABLATIONS
from .particles import Particles, Steering, energy_of, repeat_guider, sample_particles
from .steps import STEPS, Damping, sample_repeating
from .tables import Row
from .training import Trained, Workspace
from .world import Wanted, World

Setting = Mapping[str, Any]


class Batch(NamedTuple):
    """Scenes, or what else images are to show, and where the sampling of an image for each starts."""

    scenes: Wanted
    seeds: Sequence[int]  # of the noise
    noise: Tensor         # (B, C, H, W) at the first noise level
    sigmas: Tensor        # noise levels of the sampler, descending to 0


class Method(Protocol):
    """A way to make images for scenes. What it needs is trained or loaded when it is first used."""

    @property
    def costs(self) -> Mapping[str, float]:
        """Costs of its training, by the names in COSTS."""

    def sample(self, batch: Batch, setting: Setting) -> Tensor:
        """An image (B, 3, H, W) for each scene."""


@dataclass(frozen=True)
class GuidedSampling:
    """Guidance of every step by a guider, which may be trained and changed first."""

    row: Row
    workspace: Workspace

    @property
    def world(self) -> World:
        return self.workspace.world

    @cached_property
    def trained(self) -> Trained:
        guider, costs = self.row.training.make(self.workspace)
        return Trained(ABLATIONS[self.row.ablation](guider) if self.row.ablation else guider, costs)

    @property
    def costs(self) -> Mapping[str, float]:
        return self.trained.costs

    def aimed(self, batch: Batch) -> Guider:
        """The guider, aimed at the scenes."""
        return self.world.aimed(self.trained.guider, batch.scenes)

    def sample(self, batch: Batch, setting: Setting) -> Tensor:
        return sample_euler(self.denoiser(self.aimed(batch), setting), batch.noise, batch.sigmas)

    def denoiser(self, guider: Guider, setting: Setting) -> Denoiser:
        """The world's denoiser, guided by an aimed guider."""
        return guided(self.world.denoise, [term(guider, **setting)], self.settings)

    @property
    def settings(self) -> GuidanceSettings:
        """What all terms share."""
        return GuidanceSettings(self.world.sigma_data)


@dataclass(frozen=True)
class ChangedGuidance(GuidedSampling):
    """Guidance by another step, by its name in STEPS. The row's settings are its options."""

    def denoiser(self, guider: Guider, setting: Setting) -> Denoiser:
        return STEPS[self.row.method](self.world.denoise, term(guider, **setting), self.settings, **self.row.settings)


@dataclass(frozen=True)
class RepeatedGuidance(GuidedSampling):
    """Guidance whose steps between two noise levels, "low" and "high", are done "rounds" times."""

    def sample(self, batch: Batch, setting: Setting) -> Tensor:
        place, given = split(setting, ("low", "high"))
        repeat = NoiseInterval(place["low"], place["high"]), self.row.settings["rounds"]
        return sample_repeating(self.denoiser(self.aimed(batch), given), batch.noise, batch.sigmas, repeat, batch.seeds)


@dataclass(frozen=True)
class ParticleSampling(GuidedSampling):
    """The best of several images, chosen by the guider, which also guides all of them unless its weight is 0."""

    def sample(self, batch: Batch, setting: Setting) -> Tensor:
        own, given = split({**self.row.settings, **setting}, [field.name for field in fields(Particles)])
        if "resample" in own:
            own["resample"] = NoiseInterval(*own["resample"])
        steering = partial(self._steering, self.aimed(batch), given)
        return sample_particles(steering, batch.noise, batch.sigmas, Particles(**own), batch.seeds)

    def _steering(self, guider: Guider, setting: Setting, count: int) -> Steering:
        guider = repeat_guider(guider, count)
        return Steering(self.denoiser(guider, setting), partial(energy_of, guider))


def split(options: Setting, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of these names, and the others."""
    return ({name: value for name, value in options.items() if name in names},
            {name: value for name, value in options.items() if name not in names})


def term(guider: Guider, weight: float, balanced: bool = False, through: bool = False, substeps: int = 1,
         **schedule: float) -> Term:
    """A term from a setting. balanced: normalized; through: differentiated through the model; schedule: of `schedule_of`."""
    return Term(guider, weight, schedule_of(**schedule), None, balanced, through, substeps)


def schedule_of(damping: float = 0.0, falls_from: float = 0.0, falls_to: float = 0.0) -> Schedule:
    """How a weight changes: damped, or falling from twice its value to zero between two noise levels; 0: neither."""
    if falls_from:
        return Schedule(ramp=Ramp(NoiseInterval(falls_to, falls_from), *FALLING))
    return Schedule(ramp=Damping(damping)) if damping else ALWAYS
