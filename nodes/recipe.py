"""What tells a MODEL and what it is asked for from others: the recipes of what is made with them."""
from collections.abc import Sequence
from typing import Any

import comfy.controlnet
import comfy.hooks
import comfy.sd
import torch

from ..ppap_core.digest import digest
from . import bad_model, guidance
from .models import Patcher
from .types import GuidanceTerm


def about_model(model: Patcher, *conditioning: list) -> dict:
    """A model with all that is applied to it, and its conditioning."""
    sampling = model.get_model_object("model_sampling")
    guided = [(about_terms(terms), max_rms, about_vae(vae)) for terms, max_rms, vae, _ in guidance.applied(model)]
    bad = [(*settings, about_weights(each.get_key_patches())) for *settings, each in bad_model.applied(model)]
    return {"model": digest([about_weights(model.get_key_patches()), model.model_options, type(sampling).__mro__[1:3],
                             sampling.sigmas, guided, *bad]),
            "conditioning": digest([[(tensor, {name: counted(value) for name, value in more.items()})
                                     for tensor, more in each] for each in conditioning])}


def about_terms(terms: Sequence[GuidanceTerm]) -> str:
    """What guides, with the weights of its networks."""
    return digest([(term, of_networks({"net": term.guider.net})) for term in terms])


def about_vae(vae: comfy.sd.VAE | None) -> str | None:
    """A VAE, if there is one."""
    return None if vae is None else about_weights(vae.first_stage_model.state_dict())


def about_weights(weights: Any) -> str:
    """Too many to hash all."""
    return digest(weights, sampled=True)


def of_networks(parts: dict[str, Any]) -> list[str]:
    """The weights of the networks among named values."""
    return [about_weights(part.state_dict()) for _, part in sorted(parts.items()) if isinstance(part, torch.nn.Module)]


def counted(value: Any) -> Any:
    """What counts of one value of a conditioning: ControlNets and hooks are objects that change while they are at work."""
    if isinstance(value, comfy.controlnet.ControlBase):
        return (type(value).__qualname__, value.strength, value.timestep_percent_range, value.cond_hint_original,
                value.extra_concat_orig, about_vae(value.vae), of_networks(vars(value)), counted(value.previous_controlnet))
    if isinstance(value, comfy.hooks.HookGroup):
        return [(type(hook).__qualname__, getattr(hook, "_strength_model", None),
                 about_weights(getattr(hook, "weights", None)),
                 [(each.strength, each.start_percent) for each in hook.hook_keyframe.keyframes]) for hook in value.hooks]
    return value
