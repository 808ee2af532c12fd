"""Terms of guidance in the units of ComfyUI, and how their guiders see what a MODEL diffuses."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import comfy.sd
import torch
from torch import Tensor

from ...ppap_core.experts.bank import ExpertBank
from ...ppap_core.experts.readout import ReadoutNetwork, reading, reads_features, require_whole_image
from ...ppap_core.guidance.terms import Term
from ...ppap_core.guiders.guider import Decode, Guider
from ...ppap_core.guiders.latents import View
from ...ppap_core.guiders.variety import VarietyGuider
from ...ppap_core.io.hashing import digest
from ...ppap_core.schedules import ExpertSchedule
from . import latents
from .features import layer_at
from .fingerprint import fingerprint_network
from .frames import FrameDecoder
from .latents import Patcher
from .memory import module_of
from .noise_levels import PercentSchedule, starts_from_picture


@dataclass(frozen=True)
class GuidanceTerm:
    """One guider's part in guidance, in the units of ComfyUI; a model turns it into a core `Term`."""

    guider: Guider
    weight: float                                 # neutral: 0
    schedule: PercentSchedule = PercentSchedule()
    mask: Tensor | None = None                    # MASK (B|1, H, W) in [0, 1]; None: everywhere
    normalized: bool = True                       # whether only the direction of the gradient counts; else its size too
    backprop_through_model: bool = False          # whether the gradient in the prediction goes back through the model
    substeps: int = 1                             # parts of each shift; neutral: 1

    def __post_init__(self) -> None:
        if self.weight and self.guider.target is None:
            raise ValueError(f"the guider {self.guider.name} has no target: put an Aim node that fits it between the two "
                             f"(it judges {self.guider.task})")

    def fingerprint_fields(self) -> dict:
        """Return the fields under the names by which saved work of version 0.1.0 is recognised."""
        schedule = self.schedule
        return {"guider": self.guider, "weight": self.weight, "start": schedule.start, "end": schedule.end,
                "factor_at_start": schedule.factor_at_start, "factor_at_end": schedule.factor_at_end, "mask": self.mask,
                "balanced": self.normalized, "through": self.backprop_through_model,
                **({"substeps": self.substeps} if self.substeps > 1 else {})}


def fingerprint_terms(terms: Sequence[GuidanceTerm]) -> str:
    """Hash terms with the weights of their networks."""
    return digest([(term, fingerprint_network(term.guider.net)) for term in terms])


def to_core_term(model: Patcher, term: GuidanceTerm, shape: tuple[int, ...], decode: Decode | None) -> Term:
    """Convert a term to the units of a model's noise and the grid of what is sampled.

    shape: (B, C, h, w) of what is sampled. decode: makes images of that for its guider; None for pixels.
    """
    mask = None if term.mask is None else latents.mask_for(term.mask, shape)
    return Term(replace(term.guider, decode=decode), term.weight, term.schedule.in_sigmas(model), mask, term.normalized,
                term.backprop_through_model, term.substeps)


def on_grid(term: Term, shape: tuple[int, ...]) -> Term:
    """Resize the mask of a term to (B, C, h, w) where that is no longer what it was made for: some samplers enlarge."""
    if term.mask is None or term.mask.shape[-2:] == shape[-2:]:
        return term
    return replace(term, mask=latents.mask_for(term.mask[:, 0], shape))


def connected(term: Term, features: Callable[[str, Tensor, Tensor], Tensor]) -> Term:
    """Return the term of a readout that reads from a model. features: (name of a module, x, sigma) -> its features."""
    readout = term.guider.net
    assert isinstance(readout, ReadoutNetwork)
    return replace(term, guider=reading(term.guider, partial(features, readout.spec.place)))


def require_same_space(guider: Guider, model: Patcher) -> None:
    """ValueError if a guider's experts read other latents than a model diffuses, or its readout features it has not."""
    kind = latents.space_name(model)
    if isinstance(guider.net, ReadoutNetwork):
        layer_at(model.model.diffusion_model, guider.net.spec.place)
        require_whole_image(guider)
    if isinstance(guider.net, ExpertBank) and guider.net.space_name != kind:
        raise ValueError(f"the experts of {guider.name} were distilled for {guider.net.space_name} models, but this model's "
                         f"kind is {kind}: use experts that were distilled for a model of this kind, or the plain guider")


def with_view(guider: Guider, view: View | Literal["own"]) -> Guider:
    """Return the guider with another view; "own" keeps its own. ValueError for experts, which know one view only."""
    if view == "own" or view == guider.view:
        return guider
    if isinstance(guider.net, ExpertBank):
        raise ValueError(f"the experts of {guider.name} were distilled for the {guider.view} view, not the {view} one: "
                         "choose 'own', or distil experts for that view")
    if isinstance(guider.net, ReadoutNetwork):
        raise ValueError(f"the readout of {guider.name} reads the model's features at the noisy image, and has no other "
                         "view: choose 'own'")
    return replace(guider, view=view)


def decoders_for(terms: Sequence[GuidanceTerm], model: Patcher,
                 vae: comfy.sd.VAE | None) -> tuple[list[Decode | None], list[torch.nn.Module]]:
    """Return how each term's guider decodes what a model diffuses, and every network that takes part.

    ValueError for experts of other latents.
    """
    for term in terms:
        require_same_space(term.guider, model)
    vae_decoder = None
    if vae is not None and any(_uses_vae(term.guider, model) for term in terms):
        vae_decoder = latents.Decoder(vae, model)
    networks = {id(net): net for net in (_judging(term.guider) for term in terms)}
    decoders = [_decoder_of(term.guider, model, vae, vae_decoder) for term in terms]
    return decoders, [*networks.values(), *([vae_decoder] if vae_decoder else [])]


def decoders_of_frames(decoders: Sequence[Decode | None], count: int) -> list[Decode | None]:
    """Return the decoders for videos of so many frames, of which each is judged as an image; 1: for images."""
    return [decode.of_frames(count) if isinstance(decode, latents.Decoder) else decode for decode in decoders]


def watch_frames(terms: Sequence[Term], frames: Tensor, count: int) -> None:
    """Let the decoders of terms know whole videos, (B count, C, h, w), before they decode each frame."""
    for term in terms:
        if isinstance(term.guider.decode, FrameDecoder):
            term.guider.decode.watch(frames, count)


def require_one_frame(terms: Sequence[GuidanceTerm], count: int) -> None:
    """ValueError if a guider cannot judge videos frame by frame: a readout, and variety, which would keep frames apart."""
    for term in terms:
        if count > 1 and isinstance(term.guider, VarietyGuider):
            raise ValueError(f"{term.guider.name} keeps images unlike each other, and would do so with the {count} frames "
                             "of this latent: use a latent of one frame")
        if count > 1 and reads_features(term.guider):
            raise ValueError(f"the readout of {term.guider.name} knows single images, but this latent has {count} frames: "
                             "use the plain guider, which judges frame by frame, or a latent of one frame")


def _judging(guider: Guider) -> torch.nn.Module:
    """The network that runs while a model is sampled; of a readout its heads alone."""
    return guider.net.heads if isinstance(guider.net, ReadoutNetwork) else module_of(guider)


def describe_seen(term: GuidanceTerm, decode: Decode | None, model: Patcher, count: int) -> str:
    """Return what is worth knowing of how a term's guider sees what a MODEL diffuses, of so many frames; "" for most."""
    said = []
    if isinstance(decode, latents.Decoder):
        said += ["the VAE showed it each frame behind the one before it"] if decode.of_frames(count) is not decode else []
    elif not (latents.knows_colors(model) or term.guider.decode or reads_features(term.guider)):
        said.append("it saw colours that were read off the VAE, because ComfyUI does not know those of these latents")
    if starts_from_picture(model.get_model_object("model_sampling")):
        said.append("this model is given a picture instead of noise, " + (
            "and of that the noisy view sees next to nothing: use the denoised view" if term.guider.view == "noisy" else
            "and what it makes of that is guided, with the gradient in the prediction"))
    return "; ".join(said)


def _uses_vae(guider: Guider, model: Patcher) -> bool:
    return guider.decode is None and guider.view == "denoised" and not latents.diffuses_pixels(model)


def _decoder_of(guider: Guider, model: Patcher, vae: comfy.sd.VAE | None, vae_decoder: Decode | None) -> Decode | None:
    if guider.decode or latents.is_pixel(model) or reads_features(guider):
        return guider.decode
    return vae_decoder if vae_decoder and _uses_vae(guider, model) else latents.latent_space(model, vae).colors


def schedule_of(guider: Guider) -> ExpertSchedule | None:
    """Return the intervals of a guider's experts or heads; None for a guider without them."""
    return guider.net.schedule if isinstance(guider.net, ExpertBank | ReadoutNetwork) else None


def active_guiders(terms: Sequence[GuidanceTerm], decoders: Sequence[Decode | None]) -> list[Guider]:
    """Return the guiders of images whose weight is not 0, with their decoders."""
    return [replace(term.guider, decode=decode) for term, decode in zip(terms, decoders, strict=True)
            if term.weight and not reads_features(term.guider)]


def refuse_readouts(terms: Sequence[GuidanceTerm]) -> None:
    """ValueError if a term's guider reads features of a model that is sampled, where none is."""
    for term in terms:
        if reads_features(term.guider):
            raise ValueError(f"the readout of {term.guider.name} reads features of a model while that is sampled, and here "
                             "images are searched for: use the plain guider, or experts")
