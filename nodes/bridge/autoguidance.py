"""A bad version of a MODEL, asked beside the good one while that is sampled: autoguidance in ComfyUI."""
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ...ppap_core.guidance.autoguidance import autoguidance_delta
from ...ppap_core.training.lora import Adapters, LoraUpdate, with_adapters
from . import latents, noise_levels
from .latents import Patcher
from .memory import compute_type

KEY = "ppap_autoguidance"
DIFFUSION_MODEL_PREFIX = "diffusion_model."
Ask = Callable[[dict], Tensor]  # the arguments of a post-CFG function -> what the bad model predicts there


def apply_autoguidance(model: Patcher, bad: Patcher, weight: float, *place: float) -> Patcher:
    """A MODEL that is guided away from a bad version of itself, in every sampler; beside CFG it is eq. 6 of the paper.

    place: as models.autoguidance_for has it.

    A bad model with weights of its own is loaded beside the good one. One that is the same MODEL with other LoRAs costs no
    memory but theirs: what the two differ by works beside the weights.
    """
    require_siblings(model, bad)
    guided, runs, shared = model.clone(), [], bad.is_clone(model)

    def sample(executor, guider, *args: Any, **kwargs: Any) -> Tensor:
        with (shared_weights_model if shared else separate_model)(bad, guider, *args) as ask:
            runs.append((noise_levels.autoguidance_for(guider.model_patcher, weight, *place), ask))
            try:
                return executor(guider, *args, **kwargs)
            finally:
                runs.pop()

    def guide(args: dict) -> Tensor:
        settings, ask = runs[-1]
        now = settings.weight_at(noise_levels.ve_level(args["model"].model_sampling, args["sigma"][0]))
        return args["denoised"] if now == 1 else args["denoised"] + autoguidance_delta(args["cond_denoised"], ask(args), now)

    guided.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, sample)
    guided.set_model_sampler_post_cfg_function(guide)
    if not shared:
        guided.set_additional_models(KEY, [*guided.get_additional_models_with_key(KEY), bad])
    guided.set_attachments(KEY, (*applied(model), (weight, *place, bad)))
    return guided


def applied(model: Patcher) -> tuple:
    """(weight, place, bad model) of every autoguidance that was applied to a model."""
    return model.get_attachment(KEY) or ()


def require_siblings(model: Patcher, bad: Patcher) -> None:
    """ValueError for models that do not see the same noisy image in the same way."""
    latents.require_supported(model)
    latents.require_supported(bad)
    flows = [noise_levels.is_flow(each.get_model_object("model_sampling")) for each in (model, bad)]
    kinds = [f"{latents.space_name(each)}, {'flow' if flow else 'diffusion'}"
             for each, flow in zip((model, bad), flows, strict=True)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the bad model is of another kind ({kinds[1]}) than the model ({kinds[0]}): expected a weaker "
                         "version of the same model")


@contextmanager
def separate_model(bad: Patcher, guider: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor,
               latent_image: Tensor, denoise_mask: Tensor | None, *more: Any) -> Iterator[Ask]:
    """The bad model as a network of its own, on the good one's conditioning; weight hooks belong to the good one alone."""
    conds = {"positive": [{key: value for key, value in each.items() if key != "hooks"}
                          for each in guider.original_conds["positive"]]}
    bad.pre_run()
    try:
        comfy.samplers.process_conds(bad.model, noise, conds, noise.device, latent_image, denoise_mask,
                                     extra_args.get("seed"))
        for each in guider.conds.values():  # ControlNets are shared, and were last prepared for the bad model
            comfy.samplers.pre_run_control(guider.inner_model, each)
        yield lambda args: predict(bad, bad.model, conds["positive"], args)
    finally:
        bad.cleanup()


@contextmanager
def shared_weights_model(bad: Patcher, guider: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor,
                *more: Any) -> Iterator[Ask]:
    """The good model's network with the LoRAs of the bad one."""
    good = guider.model_patcher
    changes = difference(good, bad, noise.device, compute_type(good))

    def ask(args: dict) -> Tensor:
        with with_adapters(args["model"].diffusion_model, changes):
            return predict(bad, args["model"], args["cond"], args)
    yield ask


def predict(bad: Patcher, network: Any, cond: list, args: dict) -> Tensor:
    """What a network predicts for one conditioning, with the bad model's patches of its attention and the like."""
    options = comfy.model_patcher.create_model_options_clone(bad.model_options)
    given = args["model_options"].get("transformer_options", {})
    options.setdefault("transformer_options", {})["sample_sigmas"] = given.get("sample_sigmas")
    return comfy.samplers.calc_cond_batch(network, [cond], args["input"], args["sigma"], options)[0]


def difference(good: Patcher, bad: Patcher, device: torch.device, dtype: torch.dtype) -> Adapters:
    """What turns the good model's weights into the bad one's. ValueError if that is nothing, or more than LoRAs."""
    strengths: dict[tuple, float] = defaultdict(float)
    patches: dict[tuple, tuple] = {}
    for sign, patcher in ((-1.0, good), (1.0, bad)):
        for key, entries in patcher.patches.items():
            for strength, *patch in entries:
                value, _, offset, _ = patch
                strengths[key, id(value), offset] += sign * strength
                patches[key, id(value), offset] = patch
    changes: dict[str, list[LoraUpdate]] = defaultdict(list)
    for place, strength in strengths.items():
        if strength:
            changes[place[0].removeprefix(DIFFUSION_MODEL_PREFIX).removesuffix(".weight")].append(
                lora_update(good, place[0], strength, *patches[place], device, dtype))
    if not changes:
        raise ValueError("the bad model is the model itself: connect a weaker one, such as an earlier checkpoint, or the "
                         "same model with another LoRA or another strength of it")
    return dict(changes)


def lora_update(good: Patcher, key: str, strength: float, value: Any, of_model: float, offset: tuple[int, int, int] | None,
             function: Any, device: torch.device, dtype: torch.dtype) -> LoraUpdate:
    """A patch of ComfyUI's as a change beside the weight. ValueError for anything but a plain LoRA."""
    plain = isinstance(value, LoRAAdapter) and not any(part is not None for part in value.weights[3:])
    if not plain or of_model != 1 or function is not None or (offset and offset[0] != 0) or not key.endswith(".weight"):
        kind = getattr(value, "name", None) or (value[0] if isinstance(value, tuple) else type(value).__name__)
        raise ValueError(f"the bad model is the same MODEL with another patch of {key}, and that is no plain LoRA ({kind}): "
                         "load the bad model from a file of its own")
    up, down, alpha = value.weights[:3]
    scale = strength * (1.0 if alpha is None else float(alpha) / len(down))
    down = down.reshape(len(down), *good.get_model_object(key).shape[1:])
    return LoraUpdate(up.flatten(1).to(device, dtype), down.to(device, dtype), scale, offset and (offset[1], offset[2]))
