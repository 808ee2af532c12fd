"""Distillation of a readout in the place of a sampler, where ComfyUI has loaded the model whose features it reads."""
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.samplers
import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from torch import Tensor

from ...ppap_core.experts.knowledge import remember
from ...ppap_core.experts.lesson import DistillConfig
from ...ppap_core.experts.pairs import Pairs, trajectory_pairs
from ...ppap_core.experts.readout import ReadoutNetwork, new_readout, require_readable, with_readout
from ...ppap_core.experts.readout_distill import FeatureSamples, distill_readout
from ...ppap_core.experts.readout_knowledge import measure_readout
from ...ppap_core.experts.samples import BatchSpec
from ...ppap_core.guiders.guider import Guider, clean
from ...ppap_core.guiders.latents import PIXELS
from ...ppap_core.guiders.tasks import TASKS
from ...ppap_core.io.hashing import digest
from ...ppap_core.noise import expand
from ...ppap_core.schedules import ExpertSchedule
from . import latents, paths
from .autograd import outside_inference_mode
from .course import Losses
from .distillation import Samples, schedule_for
from .features import InnerFeatures
from .fingerprint import fingerprint_model
from .foreign import Memory
from .hooks import SAMPLES, Hooks, attach
from .latents import Patcher
from .memory import materialize_on, module_of, patcher_of
from .sampler import new_cfg_guider, run_inside_sampler


@dataclass(frozen=True)
class _Reader:
    """Reads features of a loaded model, as ComfyUI runs it: in inference mode."""

    inner: InnerFeatures
    memory: Memory  # of other packs' patches, which must remember nothing of these passes
    device: torch.device

    def read(self, place: str, x: Tensor, sigma: Tensor) -> Tensor:
        throw_exception_if_processing_interrupted()
        with torch.inference_mode(), self.memory.kept():
            features = self.inner.read(place, x.to(self.device), sigma.to(self.device))
        return features.clone()

    def find(self, x: Tensor, sigma: Tensor, as_map: bool) -> tuple[str, Tensor]:
        with torch.inference_mode(), self.memory.kept():
            place, features = self.inner.find(x.to(self.device), sigma.to(self.device), as_map)
        return place, features.clone()


def require_samples_of(model: Patcher, samples: Samples) -> None:
    """ValueError for samples of other latents than a model diffuses."""
    kind, made = latents.space_name(model), samples.space.name if samples.space else PIXELS
    if kind != made:
        raise ValueError(f"the samples are of {made} models, but this model's kind is {kind}: connect the model that they "
                         "were made with")


def describe_prompts(positive: list) -> str:
    """Return a sentence about several prompts, of which each state is read under one; "" for a single prompt."""
    count = sum(len(cond) for cond, _ in positive)
    return "" if count < 2 else (
        f"The positive conditioning holds {count} prompts: each state is read under one of them, not always the one that it "
        "was made with. Distil with a single prompt where that matters.")


class ReadoutDistillation:
    """Distillation of a guider's readout from a MODEL, which resumes where it was cancelled.

    samples: made with that MODEL. positive: that of the samples, under which features are read. heads: their number, one for
    each range of noise. ValueError for a model or a guider that no readout can be distilled of.
    """

    def __init__(self, model: Patcher, samples: Samples, guider: Guider, positive: list, heads: int, config: DistillConfig):
        latents.require_supported(model)
        require_readable(guider)
        require_samples_of(model, samples)
        self.model, self.samples, self.guider, self.positive, self.config = model, samples, guider, positive, config
        self.schedule: ExpertSchedule = schedule_for(samples, heads, 0.0, 0.0)
        self.report = Losses(self.schedule, config.steps)

    def run(self) -> tuple[Guider, dict[str, list[float]]]:
        """Return the guider with its readout, and the losses by interval."""
        model = self.model.clone()
        attach(model, SAMPLES, Hooks(additional_models=[patcher_of(module_of(self.guider))]))
        cfg_guider = new_cfg_guider(model, self.positive, self.positive, 1.0)
        sampled = self._examples().inputs
        shape = latents.with_axes(sampled, model.get_model_object("latent_format").latent_dimensions).shape
        return run_inside_sampler(cfg_guider, tuple(shape), self.config.seed, partial(self._distill, cfg_guider))

    def _distill(self, cfg_guider: comfy.samplers.CFGGuider, predict: Any, noise: Tensor,
                 extra_args: dict) -> tuple[Guider, dict[str, list[float]]]:
        materialize_on([module_of(self.guider)], noise.device)
        inner = InnerFeatures(cfg_guider.inner_model, extra_args["model_options"], cfg_guider.conds["positive"])
        reader = _Reader(inner, Memory(cfg_guider.inner_model.diffusion_model, extra_args["model_options"]), noise.device)
        with outside_inference_mode():
            readout = self.new_readout(reader)
            model = fingerprint_model(self.model, self.positive)
            samples = FeatureSamples(self.samples.store, partial(reader.read, readout.spec.place), model, self.samples.space)
            losses = distill_readout(self.guider, readout, samples, self.config, self._folder(readout, model),
                                     self.report.on_step)
            remember(readout, measure_readout(self.guider, readout, samples))
        return with_readout(self.guider, readout), dict(zip(self.report.losses, losses, strict=True))

    def _examples(self) -> Pairs:
        return trajectory_pairs(self.samples.store, self.schedule, 0, BatchSpec(0, self.config.batch), "noisy")

    def new_readout(self, reader: "_Reader") -> ReadoutNetwork:
        """Find where the features of the model are, and return an untrained readout of them on its device."""
        pairs = self._examples()
        with torch.no_grad():
            images = pairs.images.to(reader.device)
            output = self.guider.predict(images, clean(images))
        x = pairs.inputs * (1 + expand(pairs.sigma, pairs.inputs) ** 2).sqrt()
        place, features = reader.find(x, pairs.sigma, TASKS[self.guider.task].dense)
        readout = new_readout(self.guider, self.schedule, place, features, output, self.config.seed)
        readout.heads.to(reader.device)
        return readout

    def _folder(self, readout: ReadoutNetwork, model: dict) -> Path:
        store = self.samples.store
        identity = [store.manifest, len(store), self.guider.name, readout.fingerprint, readout.spec, readout.schedule.edges,
                    model, self.config]
        return paths.output_folder("ppap_distillation", digest(identity))
