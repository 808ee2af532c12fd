"""The methods that the benchmark compares: each makes images for scenes, at a setting that may be searched.

A setting is one of a row's "points" in rows/*.json, by the names that the file uses.
"""
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from ppap_core import (
    Autoguidance,
    Denoiser,
    NoiseInterval,
    PriorConfig,
    PriorObjective,
    Schedule,
    autoguided,
    optimize_images,
    sample_euler,
    sample_renewing,
    sample_training_free,
)
from ppap_core.guidance.training_free import METHODS as TRAINING_FREE
from ppap_core.tinyworld.loaders import condition

from .bad_models import Model, load_bad_model
from .guided import Batch, ChangedGuidance, GuidedSampling, Method, ParticleSampling, RepeatedGuidance, Setting, term
from .networks import load_conditional_denoiser
from .steps import STEPS
from .tables import Row
from .tiny_world import TinyWorld
from .training import FREE, Workspace
from .world import World


class Untrained:
    """A method without training."""

    costs: Mapping[str, float] = FREE


@dataclass(frozen=True)
class Unguided(Untrained):
    """Plain sampling, whatever the scenes are."""

    world: World

    def sample(self, batch: Batch, setting: Setting) -> Tensor:
        return sample_euler(self.world.denoise, batch.noise, batch.sigmas)


@dataclass(frozen=True)
class ClassifierFree(Untrained):
    """Classifier-free guidance (Ho & Salimans 2022) of the conditional denoiser; weight 1: that denoiser alone."""

    world: TinyWorld

    def sample(self, batch: Batch, setting: Setting) -> Tensor:
        given = condition(batch.scenes.label)
        conditional, unconditional = (conditional_denoiser(self.world, part) for part in (given, torch.zeros_like(given)))
        return sample_euler(autoguided(conditional, unconditional, autoguidance(**setting)), batch.noise, batch.sigmas)


@dataclass(frozen=True)
class AutoguidedSampling(Untrained):
    """Autoguidance (Karras et al. 2024) away from a bad model of `bad_models`.

    bad: its kind.
    conditional: whether both models are given the class.
    good: the kind of the guided model; None: the world's own.
    folder: keeps bad models that have to be trained.
    """

    world: TinyWorld
    bad: str
    conditional: bool
    folder: Path
    good: str | None = None

    @cached_property
    def bad_model(self) -> Model:
        return load_bad_model(self.bad, self.conditional, self.folder, self.world.device)

    @cached_property
    def good_model(self) -> Model:
        if self.good:
            return load_bad_model(self.good, self.conditional, self.folder, self.world.device)
        return load_conditional(self.world.device) if self.conditional else self.world.denoiser

    def sample(self, batch: Batch, setting: Setting) -> Tensor:
        given = [condition(batch.scenes.label)] if self.conditional else []
        good, bad = (in_bfloat16(self.world, model, *given) for model in (self.good_model, self.bad_model))
        return sample_euler(autoguided(good, bad, autoguidance(**setting)), batch.noise, batch.sigmas)


@dataclass(frozen=True)
class PriorSearch(GuidedSampling):
    """Optimisation of images under the diffusion prior (Graikos et al. 2022), from noise of the same seeds."""

    def sample(self, batch: Batch, setting: Setting) -> Tensor:
        objective = PriorObjective(self.world.denoise, [term(self.aimed(batch), **setting)])
        return optimize_images(objective, torch.zeros_like(batch.noise), prior_config(**self.row.settings), batch.seeds)[0]


@dataclass(frozen=True)
class RenewedGuidance(GuidedSampling):
    """Guidance in a sampler that draws a "share" of the noise anew in each step."""

    def sample(self, batch: Batch, setting: Setting) -> Tensor:
        return sample_renewing(self.denoiser(self.aimed(batch), setting), batch.noise, batch.sigmas,
                               self.row.settings["share"], batch.seeds)


@dataclass(frozen=True)
class TrainingFreeSampling(GuidedSampling):
    """A method of the training-free family, by its name in the core's METHODS."""

    def sample(self, batch: Batch, setting: Setting) -> Tensor:
        method = replace(TRAINING_FREE[self.row.method], **self.row.settings, **setting)
        return sample_training_free(self.world.denoise, self.aimed(batch), batch.noise, batch.sigmas, method, batch.seeds)


def tiny_world(workspace: Workspace) -> TinyWorld:
    """The world of a workspace, for methods that need its other models. ValueError for any but the tiny world."""
    if not isinstance(workspace.world, TinyWorld):
        raise ValueError(f"there is no second model in the world {workspace.world.name}: this method is for the tiny world")
    return workspace.world


def autoguided_sampling(row: Row, workspace: Workspace) -> AutoguidedSampling:
    """The method of a row whose settings name the models."""
    world, settings = tiny_world(workspace), row.settings
    return AutoguidedSampling(world, settings["bad"], settings["told"], workspace.folder / "siblings", settings.get("good"))


METHODS: dict[str, Callable[[Row, Workspace], Method]] = {
    "guidance": GuidedSampling,
    "nothing": lambda row, workspace: Unguided(workspace.world),
    "told": lambda row, workspace: ClassifierFree(tiny_world(workspace)),
    "autoguidance": autoguided_sampling,
    "prior": PriorSearch,
    "time travel": RepeatedGuidance,
    "renewed noise": RenewedGuidance,
    "particles": ParticleSampling,
    **dict.fromkeys(STEPS, ChangedGuidance),
    **dict.fromkeys(TRAINING_FREE, TrainingFreeSampling),
}
"""By a row's "way" in rows/*.json."""


def prior_config(steps: int = 300, jacobian: bool = False, level: float = 0.0) -> PriorConfig:
    """A search from a row's settings. jacobian: differentiated through the model; level: noise level of the renoising."""
    return PriorConfig(steps, backprop_through_model=jacobian, renoise_sigma=level)


def autoguidance(weight: float, low: float = 0.0, high: float = math.inf) -> Autoguidance:
    """Autoguidance from a setting, between two noise levels. weight 1: the good model only."""
    return Autoguidance(weight, Schedule(NoiseInterval(low, high)))


def in_bfloat16(world: TinyWorld, model: Model, *given: Tensor) -> Denoiser:
    """A model with its condition, if it takes one, in the precision of the world's own."""
    other = world.with_model(model)
    return lambda x, sigma: other.denoise(x, sigma, *given)


def conditional_denoiser(world: TinyWorld, given: Tensor) -> Denoiser:
    """The conditional denoiser under a condition (B, CONDITIONS); zeros: unconditional."""
    return in_bfloat16(world, load_conditional(world.device), given)


@cache
def load_conditional(device: torch.device) -> Model:
    """The conditional denoiser, loaded once."""
    return load_conditional_denoiser().to(device)
