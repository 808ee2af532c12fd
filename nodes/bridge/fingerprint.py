"""Fingerprints of a MODEL and its conditioning: they tell what was made with them from what was made with others."""
from pathlib import PureWindowsPath
from types import CellType, FunctionType
from typing import Any

import comfy.controlnet
import comfy.hooks
import comfy.sd
import torch
from torch import Tensor

from ...ppap_core.experts.bank import ExpertBank
from ...ppap_core.experts.origin import Origin
from ...ppap_core.experts.readout import ReadoutNetwork
from ...ppap_core.io.function_fingerprint import closed_over, function_fingerprint
from ...ppap_core.io.hashing import digest
from ...ppap_core.io.storage import is_wrapper, named_tensors
from .foreign import held_by, read
from .hooks import AUTOGUIDANCE, GUIDANCE, LORA, PRIOR, features_of
from .latents import Patcher, sigma_data_of
from .noise_levels import sigma_range
from .shared_weights import injections_of, layers_of, without_layers

VALUES = (str, int, float, bytes)
UNCOUNTED = (GUIDANCE, AUTOGUIDANCE, PRIOR, LORA, "torch.compile")  # keys of wrappers: counted elsewhere, or without effect
BORROWED = ("x_embedder.", "orig_y_embedder.")  # from the model, by ControlNets of SD 3.5


def fingerprint_model(model: Patcher, *conditioning: list) -> dict:
    """Hash a model with all that is applied to it, and every CONDITIONING."""
    sampling = model.get_model_object("model_sampling")
    guidances = [feature.fingerprint() for feature in features_of(model, GUIDANCE)]
    autoguidances = [feature.fingerprint() for feature in features_of(model, AUTOGUIDANCE)]
    return {"model": digest([fingerprint_weights(weights_of(model)), model.model_options, type(sampling).__mro__[1:3],
                             sampling.sigmas, guidances, *autoguidances, *fingerprint_foreign(model)]),
            "conditioning": digest([[(tensor, {name: hashable_conditioning(value) for name, value in extra.items()})
                                     for tensor, extra in entries] for entries in conditioning])}


def origin_of(model: Patcher) -> Origin:
    """Return what a file of experts says of a model: its kind, and its weights' file where the loader left its name."""
    loaded_by = getattr(model, "cached_patcher_init", None) or (None, ())  # ComfyUI 0.3 does not keep it
    paths = [each for each in loaded_by[1] if isinstance(each, str)]
    return Origin(type(model.model.model_config).__name__, PureWindowsPath(paths[0]).name if paths else "",
                  sigma_data_of(model), *sigma_range(model))


def weights_of(model: Patcher) -> dict:
    """Return the weights of a MODEL by name, each with its patches, whatever is in the place of its layers."""
    with without_layers(model):
        return {name.replace("_orig_mod.", ""): patches for name, patches in _weights_with_patches(model).items()}


def _weights_with_patches(model: Patcher) -> dict[str, list]:
    try:
        return model.get_key_patches()
    except AttributeError:  # quantised layers save parts of their weights under names that are no attributes
        return _quantized_weights_with_patches(model)


def _quantized_weights_with_patches(model: Patcher) -> dict[str, list]:
    """Weights by their values: a quantised one has its scales with it, and those that stand beside it are left out."""
    tensors = (*model.model.named_parameters(remove_duplicate=False), *model.model.named_buffers(remove_duplicate=False))
    held: dict[str, Any] = dict(tensors)
    replaced = {key: backup.weight for key, backup in model.backup.items()}
    replaced |= {key: backup[0] for key, backup in model.hook_backup.items()}
    layers = {_layer_of(key) for key, tensor in held.items() if is_wrapper(tensor)}
    weights = {key: replaced.get(key, held.get(key, saved)) for key, saved in model.model_state_dict().items()
               if key in held or _layer_of(key) not in layers}
    return {key: [weight, *model.patches.get(key, [])] for key, weight in weights.items()}


def _layer_of(key: str) -> str:
    return key.rpartition(".")[0]


def fingerprint_foreign(model: Patcher) -> list[str]:
    """Hash what other packs put on a MODEL besides patches and options; empty where there is nothing of that."""
    found = {"injections": [identity_of(model, part.inject, part.eject) for part in injections_of(model)],
             "layers": [(path, identity_of(model, layer)) for path, layer in layers_of(model).items()],
             "weight wrappers": {name: identity_of(model, *functions)
                                 for name, functions in model.weight_wrapper_patches.items()},
             "wrappers": _functions_of(model.wrappers), "callbacks": _functions_of(model.callbacks)}
    return [digest([name, value], sampled=True) for name, value in found.items() if value]


def _functions_of(kinds: dict[str, dict]) -> list:
    return [(kind, functions) for kind, by_key in kinds.items() for key, functions in by_key.items()
            if functions and key not in UNCOUNTED]


def identity_of(model: Patcher, *roots: Any) -> list:
    """Return the classes and plain values of all that some functions or objects on a MODEL hold.

    Tensors count in the type of the model, which ComfyUI gives to those that it injects.
    """
    with without_layers(model):
        names = {id(layer): name for name, layer in model.model.named_modules()}
    dtype = model.model_dtype()
    dtype = dtype if dtype in (torch.float32, torch.float16) else torch.bfloat16
    return [names.get(id(part)) or (_kind(part), _values(part, dtype)) for part in held_by(*roots)]


def _kind(part: Any) -> str:
    return function_fingerprint(part)[0] if callable(part) else type(part).__qualname__


def _values(part: Any, dtype: torch.dtype) -> list:
    if isinstance(part, FunctionType):
        return [_plain_value(value, dtype) for value in closed_over(part) if isinstance(value, (Tensor, *VALUES))]
    if isinstance(part, CellType):
        return []  # its value counts with the function, unless that changes it
    held = part.state_dict() if isinstance(part, torch.nn.Module) else read(part)
    pairs = [(key, _plain_value(value, dtype)) for key, value in held.items() if isinstance(value, (Tensor, *VALUES))]
    return sorted(pairs, key=str) if isinstance(part, set) else pairs


def _plain_value(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def fingerprint_network(net: Any) -> str | None:
    """Hash the weights of a guider's network, or of every expert of a bank; None for a rule, which has none."""
    if isinstance(net, ExpertBank):  # its state also says which expert is active, which must not count
        experts = [net.weights(index) for index in range(len(net.schedule))]
        return fingerprint_weights([net.fingerprint, net.schedule.edges, experts])
    if isinstance(net, ReadoutNetwork):
        return fingerprint_weights([net.fingerprint, net.schedule.edges, net.spec, named_tensors(net.heads)])
    return fingerprint_weights(named_tensors(net)) if isinstance(net, torch.nn.Module) else None


def fingerprint_vae(vae: comfy.sd.VAE | None) -> str | None:
    """Hash the layers' weights of a VAE, if there is one; small tensors may change their type when it is loaded."""
    if vae is None:
        return None
    weights = vae.first_stage_model.named_parameters()
    return fingerprint_weights({name: weight for name, weight in weights if weight.ndim > 1})


def fingerprint_weights(weights: Any) -> str:
    """Hash some values of each weight: there are too many to hash them all."""
    return digest(weights, sampled=True)


def fingerprint_control(control: comfy.controlnet.ControlBase) -> str | None:
    """Hash the weights of a ControlNet or T2I-Adapter, without those that it borrows from the model while it runs."""
    if isinstance(control, comfy.controlnet.ControlLora):
        return fingerprint_weights(control.control_weights)
    net = getattr(control, "control_model", None) or getattr(control, "t2i_model", None)
    if net is None:
        return None
    weights = named_tensors(net)
    return fingerprint_weights({name: weight for name, weight in weights.items() if not name.startswith(BORROWED)})


def hashable_conditioning(value: Any) -> Any:
    """Reduce one value of a CONDITIONING to what identifies it: ControlNets and hooks change as they run."""
    if isinstance(value, comfy.controlnet.ControlBase):
        return (type(value).__qualname__, value.strength, value.timestep_percent_range, value.cond_hint_original,
                value.extra_concat_orig, {name: extra for name, extra in value.extra_args.items() if name != "base_model"},
                fingerprint_vae(value.vae), fingerprint_control(value), hashable_conditioning(value.previous_controlnet))
    if isinstance(value, comfy.hooks.HookGroup):
        return [(type(hook).__qualname__, getattr(hook, "_strength_model", None),
                 fingerprint_weights(getattr(hook, "weights", None)),
                 [(keyframe.strength, keyframe.start_percent) for keyframe in hook.hook_keyframe.keyframes])
                for hook in value.hooks]
    return value
