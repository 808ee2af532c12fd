"""The best of several images by terms: of an IMAGE, and of what a MODEL samples; nothing here needs a gradient."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.sd
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ...ppap_core.experts.readout import reads_features
from ...ppap_core.guidance.choice import best_first, judge_images, standings
from ...ppap_core.guidance.gradients import energy_alone, slice_guider
from ...ppap_core.guidance.terms import Term
from ...ppap_core.guiders.guider import Decode, Guider, clean
from ...ppap_core.guiders.variety import VarietyGuider
from . import latents
from .guider_cache import load_to_device
from .latents import Patcher
from .memory import materialize_on, patcher_of
from .progress import Progress
from .tensors import image_from_comfy
from .terms import GuidanceTerm, decoders_for, decoders_of_frames, watch_frames

PART = 16  # images that are judged between two looks at the cancel button
PER_IMAGE = ("samples", "noise_mask", "batch_index")  # parts of a LATENT that may have one value for each of its images


@dataclass(frozen=True)
class Ranking:
    """Images in the order of how well they meet the targets of terms."""

    order: Tensor              # indices (N,), the best first
    standing: Tensor           # (N,), of each image; see `standings`
    energies: Tensor           # (T, N)
    scores: list[Tensor | None]  # of each term (N,) in [0, 1], 1: its target is met; None for variety, which has no target
    names: tuple[str, ...]     # of the guiders

    def describe(self, what: str = "image", most: int | None = None) -> str:
        """Return a line for each image, the best first, with its number from 1 on.

        what: they are called. most: how many of them to tell; None: all.
        """
        if not self.names:
            return "every term has the weight 0, so that nothing says what is better: the order is kept"
        return "\n".join(self._line(what, place, index) for place, index in enumerate(self.order[:most].tolist(), 1))

    def _line(self, what: str, place: int, index: int) -> str:
        terms = [f"{name} {_share(score, index)}energy {float(energy[index]):.4g}"
                 for name, score, energy in zip(self.names, self.scores, self.energies, strict=True)]
        return "; ".join([f"{place}. {what} {index + 1}: {float(self.standing[index]):+.2f}", *terms])


def _share(score: Tensor | None, index: int) -> str:
    return "" if score is None else f"met to {float(score[index]):.0%}, "


def rank_images(image: Tensor, terms: Sequence[GuidanceTerm]) -> Ranking:
    """Rank the images of an IMAGE by the terms whose weight is not 0."""
    chosen = [called(term) for term in terms if term.weight]
    images = image_from_comfy(image)
    progress = Progress(len(chosen) * len(images))
    judged = [_judge(term.guider, images, progress, index * len(images)) for index, term in enumerate(chosen)]
    return ranking_of(chosen, _stacked([energy for energy, _ in judged], len(images)), [score for _, score in judged])


def _stacked(energies: Sequence[Tensor], count: int) -> Tensor:
    """Energies of terms for so many images as (T, count), also of no term."""
    return torch.stack([*energies]) if energies else torch.zeros(0, count)


def ranking_of(terms: Sequence[GuidanceTerm], energies: Tensor, scores: list[Tensor | None]) -> Ranking:
    """Rank by energies (T, N) and scores of terms."""
    standing = standings(energies, [term.weight for term in terms])
    return Ranking(best_first(standing), standing, energies, scores, tuple(term.guider.name for term in terms))


def _judge(guider: Guider, images: Tensor, progress: Progress, done: int) -> tuple[Tensor, Tensor | None]:
    """Energy and score of all images, in parts, but for a guider that compares them with each other."""
    images = images.to(load_to_device(guider))
    if isinstance(guider, VarietyGuider):
        return judge_images(guider, images).cpu(), None
    energies, scores = [], []
    for start in range(0, len(images), PART):
        part = images[start:start + PART]
        judge = slice_guider(guider, slice(start, start + PART), len(images))
        energies.append(judge_images(judge, part).cpu())
        with torch.no_grad():
            scores.append(judge.score(part, clean(part)).cpu())
        progress(done + start + len(part))
    return torch.cat(energies), torch.cat(scores)


def pick_images(image: Tensor, order: Tensor) -> Tensor:
    """Return the images of an IMAGE in an order, which may leave out some."""
    return image[order.to(image.device)]


def mask_of(image: Tensor, chosen: Tensor) -> Tensor:
    """Return a MASK (N, H, W) of the images of an IMAGE: 1 all over for those of the indices, 0 for the others."""
    mask = torch.zeros(image.shape[:3])
    mask[chosen] = 1
    return mask


def pick_latent(latent: dict, order: Tensor, count: int) -> dict:
    """Return the latents of a LATENT in an order. count: of the images that stand for it.

    ValueError for a LATENT of another number of images.
    """
    if len(latent["samples"]) != count:
        raise ValueError(f"the latent holds {len(latent['samples'])} images, but {count} are ranked: connect the latent "
                         "that they were decoded from")
    return {name: _picked(value, order, count) if name in PER_IMAGE else value for name, value in latent.items()}


def _picked(values: Tensor | list, order: Tensor, count: int) -> Tensor | list:
    if isinstance(values, Tensor):
        return values[order.to(values.device)] if len(values) == count else values
    return [values[index] for index in order.tolist()]


def blocked(name: str) -> ExecutionBlocker:
    """Return an output that stops what is behind it, with a sentence. name: of the input that is missing."""
    return ExecutionBlocker(f"this output needs the input {name}: connect it")


@dataclass(frozen=True)
class LatentJudge:
    """Judges what a MODEL diffuses by terms, as these look at it in guidance."""

    terms: Sequence[GuidanceTerm]       # without those of weight 0
    decoders: Sequence[Decode | None]   # of each term
    networks: Sequence[torch.nn.Module]

    @classmethod
    def for_model(cls, model: Patcher, terms: Sequence[GuidanceTerm], vae: comfy.sd.VAE | None) -> "LatentJudge":
        """Judge by the terms whose weight is not 0. vae: as in guidance. ValueError for a term that cannot choose."""
        latents.require_supported(model)
        weighed = [called(term) for term in terms if term.weight]
        for term in weighed:
            require_alone(term.guider)
        return cls(weighed, *decoders_for(weighed, model, vae))

    def load(self) -> None:
        """Load the networks where they can run now."""
        patchers = [patcher_of(net) for net in self.networks]
        comfy.model_management.load_models_gpu(patchers)
        for net, loaded in zip(self.networks, patchers, strict=True):
            materialize_on([net], loaded.load_device)

    def energies(self, x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
        """Return the energy of each term for each image, (T, B), as the mean over the frames of a video.

        x, denoised: (B, C, h, w) or (B, C, T, h, w), the noisy state of the core, and the prediction. sigma: VE level.
        """
        count = latents.frame_count(denoised)
        states, images = latents.frames_as_images(x), latents.frames_as_images(denoised)
        guiders = [replace(term.guider, decode=decode) for term, decode
                   in zip(self.terms, decoders_of_frames(self.decoders, count), strict=True)]
        watch_frames([Term(guider) for guider in guiders], images, count)
        level = images.new_full((len(images),), sigma)
        energies = [energy_alone(guider, states if guider.view == "noisy" else images, level) for guider in guiders]
        return _stacked(energies, len(images)).unflatten(1, (-1, count)).mean(2)

    def standing(self, energies: Tensor) -> Tensor:
        """Return the standing (..., N) of candidates among each other. energies: (T, ..., N)."""
        return standings(energies, [term.weight for term in self.terms])


class Called(torch.nn.Module):
    """A function that judges images, as a module, which ComfyUI can load."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def called(term: GuidanceTerm) -> GuidanceTerm:
    """Return the term with a network that ComfyUI can load, where it is any function that answers."""
    net = term.guider.net
    return term if isinstance(net, torch.nn.Module) else replace(term, guider=replace(term.guider, net=Called(net)))


def can_choose(guider: Guider) -> bool:
    """Tell whether a guider says of one image alone how good it is."""
    return not (reads_features(guider) or isinstance(guider, VarietyGuider))


def require_alone(guider: Guider) -> None:
    """ValueError for a guider that cannot say of one image alone how good it is."""
    if reads_features(guider):
        raise ValueError(f"the readout of {guider.name} reads features of a model while that is sampled, and here images "
                         "are compared: use the plain guider, or experts")
    if isinstance(guider, VarietyGuider):
        raise ValueError(f"{guider.name} compares the images of a batch with each other, and does not say which of them is "
                         "better: choose by another term")
