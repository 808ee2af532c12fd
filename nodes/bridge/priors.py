"""The search for images under a MODEL's prior, as a sampler: ComfyUI loads the model and prepares its conditioning as for
any other."""
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...ppap_core.guidance.prior import PriorConfig, PriorObjective, optimize_images
from ...ppap_core.io.hashing import digest
from ...ppap_core.sampling import Denoiser
from ...ppap_core.training.loop import Losses, RunOptions
from . import latents, noise_levels, paths
from .autograd import GradientPass, for_gradients, make_differentiable, outside_inference_mode
from .fingerprint import fingerprint_model, fingerprint_vae
from .guidance import GuidanceTerm, active_guiders, decoders_for, fingerprint_terms, to_core_term
from .latents import Patcher
from .memory import GradientMemory, materialize_on, patcher_of
from .progress import Progress
from .sampler import new_cfg_guider, run_inside_sampler

KEY = "ppap_prior"


def search(model: Patcher, terms: Sequence[GuidanceTerm], positive: list, negative: list, cfg: float, latent: dict,
           seed: int, config: PriorConfig, vae: comfy.sd.VAE | None) -> tuple[dict, Losses]:
    """The LATENT that was found, and of every step the error of the noise and the energy."""
    latents.require_supported(model)
    decoders, networks = decoders_for(terms, model, vae)
    through = config.backprop_through_model
    searched = for_gradients(model) if through else model.clone()
    memory = GradientMemory(active_guiders(terms, decoders), through, KEY)
    searched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, memory.reserve)
    searched.set_additional_models(KEY, searched.get_additional_models_with_key(KEY) + [patcher_of(net) for net in networks])
    given = {**latents.without_sizes(latent), "samples": latents.resize_empty_latent(model, latent)}
    known = model.model.process_latent_in(given["samples"])
    about = {**fingerprint_model(model, positive, negative), "cfg": cfg, "vae": fingerprint_vae(vae),
             "terms": fingerprint_terms(terms), "start": digest([given, config.start_noise])}
    name = digest([about, config.identity(), seed, config.particles])
    state = paths.output_folder("ppap_prior", f"{name}.state.safetensors")
    report = Progress(config.steps)

    def look(predict: Any, noise: Tensor, extra_args: dict) -> tuple[Tensor, Losses]:
        materialize_on(networks, noise.device)
        if through:
            make_differentiable(guider)
        with outside_inference_mode():
            start = latents.frames_as_images(known.to(noise))
            seeds = range(seed, seed + config.particles * len(start))
            mask = latents.mask_for(latent["noise_mask"], start.shape) if latent.get("noise_mask") is not None else None
            core = [to_core_term(searched, term, start.shape, decode) for term, decode in zip(terms, decoders, strict=True)]
            denoise = denoiser(guider.inner_model.model_sampling, predict, extra_args, noise, through)
            options = RunOptions(about, state,
                                 on_step=lambda step, _, points: report(step + 1, latents.preview(model, points[:1])),
                                 run_step=GradientPass(guider.inner_model).run if through else None)
            images, losses = optimize_images(PriorObjective(denoise, core, latents.sigma_data_of(model)), start,
                                             replace(config, frames=len(start) // len(known)), seeds, mask, options)
            return latents.images_as_frames(images, known), losses

    guider = new_cfg_guider(searched, positive, negative, cfg)
    images, losses = run_inside_sampler(guider, (config.particles * len(known), *known.shape[1:]), seed, look)
    return {**given, "samples": model.model.process_latent_out(images.cpu())}, losses


def denoiser(sampling: Any, predict: Any, extra_args: dict, like: Tensor, differentiable: bool) -> Denoiser:
    """A sampling's model in the core's convention; without gradients it runs as ComfyUI runs it, in inference mode."""
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        state = noise_levels.from_ve(sampling, latents.images_as_frames(x, like), sigma[:len(like)])
        return latents.frames_as_images(predict(*state, **extra_args))

    def alone(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.inference_mode():
            found = denoise(x.clone(), sigma.clone())
        return found.clone()
    return denoise if differentiable else alone
