"""Plug-and-play priors: a search for images that runs in the place of a sampler, where ComfyUI has loaded the model."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.samplers
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...ppap_core.guidance.prior import PriorConfig, PriorObjective, optimize_images
from ...ppap_core.io.hashing import digest
from ...ppap_core.training.loop import RunOptions
from ...ppap_core.training.state import Losses
from . import latents, noise_levels, paths
from .autograd import GradientPass, for_gradients, make_differentiable, networks_of, outside_inference_mode
from .fingerprint import fingerprint_model, fingerprint_vae
from .foreign import Memory
from .hooks import PRIOR, Hooks, attach
from .latents import Patcher
from .memory import GradientMemory, materialize_on, patcher_of
from .progress import Progress
from .sampler import new_cfg_guider, run_inside_sampler
from .tensors import mask_from_comfy
from .terms import (
    GuidanceTerm,
    active_guiders,
    decoders_for,
    decoders_of_frames,
    fingerprint_terms,
    refuse_readouts,
    to_core_term,
)


@dataclass
class PriorSearch:
    """Search for images that a MODEL finds probable and that meet the targets of terms; resumes where it was cancelled.

    latent: where the search starts, with a mask where it may change. seed: image i uses seed + i. vae: as in guidance.
    ValueError for a model that cannot be searched, or experts of other latents.
    """

    model: Patcher
    positive: list
    negative: list
    cfg: float                          # neutral: 1
    latent: dict
    seed: int
    config: PriorConfig
    terms: Sequence[GuidanceTerm] = ()
    vae: comfy.sd.VAE | None = None

    def __post_init__(self) -> None:
        latents.require_supported(self.model)
        refuse_readouts(self.terms)
        decoders, self.networks = decoders_for(self.terms, self.model, self.vae)
        self.start = {**latents.without_sizes(self.latent), "samples": latents.resize_empty_latent(self.model, self.latent)}
        self.images = self.model.model.process_latent_in(self.start["samples"])
        self.decoders = decoders_of_frames(decoders, latents.frame_count(self.images))
        self.progress = Progress(self.config.steps)

    def run(self) -> tuple[dict, Losses]:
        """Return the LATENT that is found, and [error of the noise, energy of the terms] for every step."""
        through_model = self.config.backprop_through_model
        model = for_gradients(self.model) if through_model else self.model.clone()
        memory = GradientMemory(active_guiders(self.terms, self.decoders), through_model, PRIOR)
        attach(model, PRIOR, Hooks({WrappersMP.PREPARE_SAMPLING: memory.reserve},
                                   additional_models=[patcher_of(net) for net in self.networks]))
        cfg_guider = new_cfg_guider(model, self.positive, self.negative, self.cfg)
        shape = (self.config.particles * len(self.images), *self.images.shape[1:])
        images, losses = run_inside_sampler(cfg_guider, shape, self.seed, partial(self._search, cfg_guider))
        return {**self.start, "samples": self.model.model.process_latent_out(images.cpu())}, losses

    def _search(self, cfg_guider: comfy.samplers.CFGGuider, predict: Any, noise: Tensor,
                extra_args: dict) -> tuple[Tensor, Losses]:
        materialize_on(self.networks, noise.device)
        if self.config.backprop_through_model:
            make_differentiable(cfg_guider, extra_args)
        with outside_inference_mode():
            start = latents.frames_as_images(self.images.to(noise))
            config = replace(self.config, frames=len(start) // len(self.images))
            seeds = range(self.seed, self.seed + config.particles * len(start))
            memory = Memory(cfg_guider.inner_model.diffusion_model, extra_args["model_options"])
            predict = partial(memory.apart, partial(predict, **extra_args))
            denoise = ModelDenoiser(cfg_guider.inner_model.model_sampling, predict, noise, config.backprop_through_model)
            images, losses = optimize_images(self._objective(cfg_guider.model_patcher, denoise, start), start, config, seeds,
                                             self._mask(start), self._run_options(GradientPass(*networks_of(cfg_guider))))
            return latents.images_as_frames(images, self.images), losses

    def _objective(self, model: Patcher, denoise: "ModelDenoiser", start: Tensor) -> PriorObjective:
        terms = [to_core_term(model, term, start.shape, decode)
                 for term, decode in zip(self.terms, self.decoders, strict=True)]
        return PriorObjective(denoise, terms, latents.sigma_data_of(self.model))

    def _mask(self, start: Tensor) -> Tensor | None:
        mask = self.latent.get("noise_mask")
        return None if mask is None else latents.mask_for(mask_from_comfy(mask), start.shape)

    def _run_options(self, gradient_pass: GradientPass) -> RunOptions:
        run_id = {**fingerprint_model(self.model, self.positive, self.negative), "cfg": self.cfg,
                  "vae": fingerprint_vae(self.vae), "terms": fingerprint_terms(self.terms),
                  "start": digest([self.start, self.config.start_noise])}
        state_name = digest([run_id, self.config.identity(), self.seed, self.config.particles])
        return RunOptions(run_id, paths.output_folder("ppap_prior", f"{state_name}.state.safetensors"),
                          on_step=self._on_step, run_step=gradient_pass.run if self.config.backprop_through_model else None)

    def _on_step(self, step: int, loss: list[float], images: Tensor) -> None:
        self.progress(step + 1, latents.preview(self.model, images[:1]))


@dataclass(frozen=True)
class ModelDenoiser:
    """A sampling's model in the core's convention: (x, sigma) -> prediction, with frames as images."""

    sampling: Any                      # model_sampling of the model
    predict: Callable[..., Tensor]     # (x, sigma) -> prediction, as ComfyUI's samplers call the model
    like: Tensor                       # what is sampled, for its shape
    differentiable: bool               # False: runs as ComfyUI runs it, in inference mode

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.differentiable:
            return self._denoise(x, sigma)
        with torch.inference_mode():
            prediction = self._denoise(x.clone(), sigma.clone())
        return prediction.clone()

    def _denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        state = noise_levels.from_ve(self.sampling, latents.images_as_frames(x, self.like), sigma[:len(self.like)])
        return latents.frames_as_images(self.predict(*state))
