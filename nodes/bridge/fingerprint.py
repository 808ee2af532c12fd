"""Fingerprints of a MODEL and its conditioning: they tell what was made with them from what was made with others."""
from typing import Any

import comfy.controlnet
import comfy.hooks
import comfy.sd
import torch

from ...ppap_core.experts.bank import ExpertBank
from ...ppap_core.io.hashing import digest
from .hooks import AUTOGUIDANCE, GUIDANCE, features_of
from .latents import Patcher

BORROWED = ("x_embedder.", "orig_y_embedder.")  # from the model, by ControlNets of SD 3.5


def fingerprint_model(model: Patcher, *conditioning: list) -> dict:
    """Hash a model with all that is applied to it, and every CONDITIONING."""
    sampling = model.get_model_object("model_sampling")
    guidances = [feature.fingerprint() for feature in features_of(model, GUIDANCE)]
    autoguidances = [feature.fingerprint() for feature in features_of(model, AUTOGUIDANCE)]
    return {"model": digest([fingerprint_weights(model.get_key_patches()), model.model_options,
                             type(sampling).__mro__[1:3], sampling.sigmas, guidances, *autoguidances]),
            "conditioning": digest([[(tensor, {name: hashable_conditioning(value) for name, value in extra.items()})
                                     for tensor, extra in entries] for entries in conditioning])}


def fingerprint_network(net: Any) -> str | None:
    """Hash the weights of a guider's network, or of every expert of a bank; None for a rule, which has none."""
    if isinstance(net, ExpertBank):  # its state also says which expert is active, which must not count
        experts = [net.weights(index) for index in range(len(net.schedule))]
        return fingerprint_weights([net.fingerprint, net.schedule.edges, experts])
    return fingerprint_weights(net.state_dict()) if isinstance(net, torch.nn.Module) else None


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
    return fingerprint_weights({name: weight for name, weight in net.state_dict().items() if not name.startswith(BORROWED)})


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
