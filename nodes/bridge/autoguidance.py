"""Autoguidance of a MODEL: a bad version of it runs beside the good one while that is sampled."""
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ...ppap_core.guidance.autoguidance import Autoguidance, autoguidance_delta
from ...ppap_core.io.function_fingerprint import hashed_as
from ...ppap_core.training.lora import Adapters, LoraUpdate
from . import latents, noise_levels
from .fingerprint import fingerprint_foreign, fingerprint_weights, weights_of
from .foreign import Memory, SeparateMemory
from .hooks import AUTOGUIDANCE, Feature, Hooks, RunStack, attach
from .latents import Patcher
from .memory import compute_type, log
from .noise_levels import PercentSchedule
from .shared_weights import (
    acts_on_samplings_only,
    adapted,
    as_other,
    differs,
    is_left_out,
    make_injections_differentiable,
    options_of,
    without_layers,
)

DIFFUSION_MODEL_PREFIX = "diffusion_model."
PredictBad = Callable[[dict], Tensor]
"""(arguments of a post-CFG function) -> the bad model's prediction there"""


class SamplerCall(NamedTuple):
    """The arguments of ComfyUI's SAMPLER_SAMPLE wrappers that follow the guider."""

    sigmas: Tensor
    extra_args: dict
    callback: Any
    noise: Tensor
    latent_image: Tensor | None = None
    denoise_mask: Tensor | None = None
    disable_pbar: bool = False


class AutoguidanceRun(NamedTuple):
    """State of one sampling."""

    settings: Autoguidance
    predict_bad: PredictBad


class AutoguidedModel(Feature):
    """Autoguidance that is attached to a MODEL; beside CFG it is eq. 6 of the paper.

    bad: a weaker version of the model. With weights of its own it is loaded beside the good one; the same MODEL with other
    LoRAs costs no memory but theirs, because their difference works beside the weights. weight: neutral at 1.
    ValueError for models of different kinds.
    """

    def __init__(self, model: Patcher, bad: Patcher, weight: float, schedule: PercentSchedule):
        require_siblings(model, bad)
        self.bad, self.weight, self.schedule = bad, weight, schedule
        self.shares_weights = bad.is_clone(model)
        self.runs: RunStack[AutoguidanceRun] = RunStack()

    def attach(self, model: Patcher) -> Patcher:
        """Clone a MODEL with this autoguidance on it; samplers and other patches work as before."""
        guided = model.clone()
        attach(guided, AUTOGUIDANCE, Hooks({WrappersMP.SAMPLER_SAMPLE: self.on_sample}, self.post_cfg,
                                           [] if self.shares_weights else [self.bad], self))
        return guided

    def on_sample(self, executor: Any, cfg_guider: comfy.samplers.CFGGuider, *args: Any, **kwargs: Any) -> Tensor:
        """Run one sampling beside the bad model."""
        beside = shared_weights_model if self.shares_weights else separate_model
        model = cfg_guider.model_patcher
        settings = Autoguidance(self.weight, self.schedule.in_sigmas(model))
        with beside(self.bad, cfg_guider, SamplerCall(*args[:len(SamplerCall._fields)])) as predict_bad:
            with self.runs.running(AutoguidanceRun(settings, predict_bad)):
                return executor(cfg_guider, *args, **kwargs)

    @hashed_as("apply_autoguidance.<locals>.guide")
    def post_cfg(self, args: dict) -> Tensor:
        """Guide the denoised prediction away from that of the bad model."""
        run = self.runs.current
        weight = run.settings.weight_at(noise_levels.ve_level(args["model"].model_sampling, float(args["sigma"][0])))
        if weight == 1:
            return args["denoised"]
        return args["denoised"] + autoguidance_delta(args["cond_denoised"], run.predict_bad(args), weight)

    def fingerprint(self) -> tuple:
        """Return what tells this autoguidance from another."""
        schedule = self.schedule
        return (self.weight, schedule.start, schedule.end, schedule.factor_at_start, schedule.factor_at_end,
                fingerprint_weights(weights_of(self.bad)), *fingerprint_foreign(self.bad))


def apply_autoguidance(model: Patcher, bad: Patcher, weight: float, schedule: PercentSchedule) -> Patcher:
    """Clone a MODEL with autoguidance on it, see `AutoguidedModel`; at weight 1 return the MODEL itself."""
    return model if weight == 1 else AutoguidedModel(model, bad, weight, schedule).attach(model)


def require_siblings(model: Patcher, bad: Patcher) -> None:
    """ValueError for models that do not see one noisy image in one way."""
    kinds = []
    for patcher in (model, bad):
        latents.require_supported(patcher)
        flow = noise_levels.is_flow(patcher.get_model_object("model_sampling"))
        kinds.append(f"{latents.space_name(patcher)}, {'flow' if flow else 'diffusion'}")
    if kinds[0] != kinds[1]:
        raise ValueError(f"the bad model is of another kind ({kinds[1]}) than the model ({kinds[0]}): expected a weaker "
                         "version of the same model")


@contextmanager
def separate_model(bad: Patcher, cfg_guider: comfy.samplers.CFGGuider, call: SamplerCall) -> Iterator[PredictBad]:
    """Prepare a bad model with weights of its own, on the good one's conditioning.

    Weight hooks in the conditioning belong to the good model alone.
    """
    conds = {"positive": [{key: value for key, value in cond.items() if key != "hooks"}
                          for cond in cfg_guider.original_conds["positive"]]}
    bad.pre_run()
    memory = Memory(bad.model.diffusion_model, bad.model_options)
    before = memory.save()
    try:
        comfy.samplers.process_conds(bad.model, call.noise, conds, call.noise.device, call.latent_image, call.denoise_mask,
                                     call.extra_args.get("seed"))
        for good_conds in cfg_guider.conds.values():  # ControlNets are shared, and were last prepared for the bad model
            comfy.samplers.pre_run_control(cfg_guider.inner_model, good_conds)
        yield partial(_predict_separately, bad, memory, conds["positive"])
    finally:
        memory.restore(before)
        bad.cleanup()


@contextmanager
def shared_weights_model(bad: Patcher, cfg_guider: comfy.samplers.CFGGuider, call: SamplerCall) -> Iterator[PredictBad]:
    """Prepare a bad model that is the good model's network with other LoRAs, injections or patches.

    ValueError for the good model itself, and for one that differs by what cannot be exchanged.
    """
    good = cfg_guider.model_patcher
    with without_layers(good):
        adapters = difference(good, bad, call.noise.device, compute_type(good))
    if not differs(good, bad) and not adapters:
        same = ("differs from the model only by functions that act on whole samplings or after CFG, and predicts as it "
                "does" if acts_on_samplings_only(good, bad) else "is the model itself")
        raise ValueError(f"the bad model {same}: connect a weaker one, such as an earlier checkpoint, or the same model "
                         "with another LoRA or another strength of it")
    network = good.model.diffusion_model
    if hasattr(network, "clear_kv_cache"):  # keys and values of the prompt, of whatever layers made them last
        network.clear_kv_cache()
    memory = SeparateMemory(Memory(network, call.extra_args["model_options"], bad.model_options))
    yield partial(_predict_sharing, SharingModels(good, bad, adapters, memory))


class SharingModels(NamedTuple):
    """Two models on one network: the updates of its layers that make the bad one, and what its patches remember."""

    good: Patcher
    bad: Patcher
    adapters: Adapters
    memory: SeparateMemory


def _predict_separately(bad: Patcher, memory: Memory, cond: list, args: dict) -> Tensor:
    try:
        return predict(bad, bad.model, cond, args)
    finally:
        memory.detach()


def _predict_sharing(models: SharingModels, args: dict) -> Tensor:
    with models.memory.active(), as_other(models.good, models.bad):
        if torch.is_grad_enabled():
            make_injections_differentiable(models.bad)
        with adapted(models.good, models.adapters):
            return predict(models.bad, args["model"], args["cond"], args, models.good)


def predict(bad: Patcher, network: Any, cond: list, args: dict, good: Patcher | None = None) -> Tensor:
    """Predict for one conditioning, with the bad model's own patches of its attention, wrappers and the like.

    args: of a post-CFG function. good: the model whose network it is; what patches have made ready for this sampling serves
    both.
    """
    options, good_options = options_of(bad), args["model_options"].get("transformer_options", {})
    inner, original = options["transformer_options"], good.model_options["transformer_options"] if good else {}
    ready = {key: good_options[key] for key in inner if key in good_options and inner[key] is original.get(key)}
    inner.update(ready, sample_sigmas=good_options.get("sample_sigmas"))
    return comfy.samplers.calc_cond_batch(network, [cond], args["input"], args["sigma"], options)[0]


class _Patch(NamedTuple):
    """One patch of one weight, as ComfyUI keeps it after its strength."""

    value: Any
    strength_of_model: float
    offset: tuple[int, int, int] | None
    function: Any

    @property
    def is_plain_lora(self) -> bool:
        """Whether it adds up @ down to rows of the weight, and does nothing else."""
        plain = isinstance(self.value, LoRAAdapter) and not any(part is not None for part in self.value.weights[3:])
        return plain and self.strength_of_model == 1 and self.function is None and not (self.offset and self.offset[0])

    @property
    def kind(self) -> str:
        value = self.value
        return getattr(value, "name", None) or (value[0] if isinstance(value, tuple) else type(value).__name__)


def difference(good: Patcher, bad: Patcher, device: torch.device, dtype: torch.dtype) -> Adapters:
    """Return the LoRAs that turn the good model's weights into the bad one's; none for equal weights.

    ValueError if the weights differ by more than LoRAs.
    """
    strengths: dict[tuple, float] = defaultdict(float)
    patches: dict[tuple, _Patch] = {}
    left_out = {key for key in good.patches if is_left_out(good, key)}
    if left_out:
        log.warning("ComfyUI does not apply the model's LoRA to %d weights inside of compiled layers, or of layers that "
                    "another pack has put in their place: load the LoRA by bypass", len(left_out))
    for sign, patcher in ((-1.0, good), (1.0, bad)):
        for key, entries in patcher.patches.items():
            if patcher is good and key in left_out:
                continue
            for strength, *fields in entries:
                patch = _Patch(*fields)
                place = (key, id(patch.value), patch.offset)
                strengths[place] += sign * strength
                patches[place] = patch
    adapters: dict[str, list[LoraUpdate]] = defaultdict(list)
    for place, strength in strengths.items():
        if strength:
            layer = place[0].removeprefix(DIFFUSION_MODEL_PREFIX).removesuffix(".weight").replace("_orig_mod.", "")
            adapters[layer].append(lora_update(good, place[0], patches[place], strength, device, dtype))
    return dict(adapters)


def lora_update(good: Patcher, key: str, patch: _Patch, strength: float, device: torch.device,
                dtype: torch.dtype) -> LoraUpdate:
    """Convert a patch of the weight of a key to an update beside it. ValueError for anything but a plain LoRA."""
    if not patch.is_plain_lora or not key.endswith(".weight"):
        raise ValueError(f"the bad model is the same MODEL with another patch of {key}, and that is no plain LoRA "
                         f"({patch.kind}): load the bad model from a file of its own")
    up, down, alpha = patch.value.weights[:3]
    scale = strength * (1.0 if alpha is None else float(alpha) / len(down))
    down = down.reshape(len(down), *good.get_model_object(key).shape[1:])
    rows = patch.offset and (patch.offset[1], patch.offset[2])
    with torch.inference_mode(False):  # loaders make LoRAs in inference mode, and autograd accepts no tensors made in it
        up, down = (part.to(device, dtype, copy=True) for part in (up.flatten(1), down))
    return LoraUpdate(up, down, scale, rows)
