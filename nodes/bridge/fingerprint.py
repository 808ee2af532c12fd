"""What tells a MODEL and what it is asked for from others: the recipes of what is made with them."""
from collections.abc import Sequence
from typing import Any

import comfy.controlnet
import comfy.hooks
import comfy.sd
import torch

from ...ppap_core.experts.bank import ExpertBank
from ...ppap_core.io.hashing import digest
from . import autoguidance, guidance
from .guidance import GuidanceTerm
from .latents import Patcher

BORROWED = ("x_embedder.", "orig_y_embedder.")  # by ControlNets of SD 3.5


def fingerprint_model(model: Patcher, *conditioning: list) -> dict:
    """A model with all that is applied to it, and its conditioning."""
    sampling = model.get_model_object("model_sampling")
    guided = [(fingerprint_terms(terms), max_rms, fingerprint_vae(vae)) for terms, max_rms, vae, _ in guidance.applied(model)]
    bad = [(*settings, fingerprint_weights(each.get_key_patches())) for *settings, each in autoguidance.applied(model)]
    return {"model": digest([fingerprint_weights(model.get_key_patches()), model.model_options, type(sampling).__mro__[1:3],
                             sampling.sigmas, guided, *bad]),
            "conditioning": digest([[(tensor, {name: counted(value) for name, value in more.items()})
                                     for tensor, more in each] for each in conditioning])}


def fingerprint_terms(terms: Sequence[GuidanceTerm]) -> str:
    """What guides, with the weights of its networks."""
    return digest([(term, fingerprint_network(term.guider.net)) for term in terms])


def fingerprint_network(net: Any) -> str | None:
    """The weights of a guider's network, of which a rule has none. Those of a bank also hold the expert that is active."""
    if isinstance(net, ExpertBank):
        experts = [net.weights(index) for index in range(len(net.schedule))]
        return fingerprint_weights([net.fingerprint, net.schedule.edges, experts])
    return fingerprint_weights(net.state_dict()) if isinstance(net, torch.nn.Module) else None


def fingerprint_vae(vae: comfy.sd.VAE | None) -> str | None:
    """A VAE, if there is one: its layers' weights, for what is small may change its type when it is loaded."""
    if vae is None:
        return None
    return fingerprint_weights({name: weight for name, weight in vae.first_stage_model.named_parameters() if weight.ndim > 1})


def fingerprint_weights(weights: Any) -> str:
    """Too many to hash all."""
    return digest(weights, sampled=True)


def fingerprint_control(control: comfy.controlnet.ControlBase) -> str | None:
    """The weights of a ControlNet or T2I-Adapter, without those that it borrows from the model while it is at work."""
    if isinstance(control, comfy.controlnet.ControlLora):
        return fingerprint_weights(control.control_weights)
    net = getattr(control, "control_model", None) or getattr(control, "t2i_model", None)
    if net is None:
        return None
    return fingerprint_weights({name: weight for name, weight in net.state_dict().items() if not name.startswith(BORROWED)})


def counted(value: Any) -> Any:
    """What counts of one value of a conditioning: ControlNets and hooks are objects that change while they are at work."""
    if isinstance(value, comfy.controlnet.ControlBase):
        return (type(value).__qualname__, value.strength, value.timestep_percent_range, value.cond_hint_original,
                value.extra_concat_orig, {name: each for name, each in value.extra_args.items() if name != "base_model"},
                fingerprint_vae(value.vae), fingerprint_control(value), counted(value.previous_controlnet))
    if isinstance(value, comfy.hooks.HookGroup):
        return [(type(hook).__qualname__, getattr(hook, "_strength_model", None),
                 fingerprint_weights(getattr(hook, "weights", None)),
                 [(each.strength, each.start_percent) for each in hook.hook_keyframe.keyframes]) for hook in value.hooks]
    return value
