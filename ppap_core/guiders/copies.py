"""Restoration: guiders that ask for the picture of which a grey, small, blurred or torn copy is at hand.

A copy is a linear measurement of the picture (`operators`): its colours may be mixed to grey, it may be blurred and small,
and parts of it may be missing, all at once. The energy is the likelihood of the copy, which knows how far a prediction is
to be trusted at each noise level: with a raw weight of 1 a prediction becomes what is expected given the copy too.
"""
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import PIXEL_SIGMA_DATA
from .guider import Guider
from .operators import UNCHANGED, LinearOperator, Mask, Measurement, Mixed, Partly, Separable, likelihood_guider
from .resize import Size, resize
from .rules import Rule, RuleNet, rule_guider

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, by which pictures are made grey
NOISE = 0.02                  # standard deviation of what no copy tells: rounding to bytes, compression


class Copy(NamedTuple):
    """A kind of copy of a picture."""

    asks: str                 # in a few words, what it asks of an image
    is_grey: bool = False
    is_blurred: bool = False


COPIES: dict[str, Copy] = {
    "grey copy": Copy("made grey, the image equals the one shown", is_grey=True),
    "small copy": Copy("made small, it equals the one shown, of any size"),
    "blurred copy": Copy("blurred, it equals the one shown", is_blurred=True),
    "known part": Copy("it equals the one shown, where that is not missing"),
}
"""Name of a rule of restoration, as saved workflows have it -> the kind of copy that it is shown."""


def luma(image: Tensor) -> Tensor:
    """Brightness of images (B, 3, H, W) as they are made grey, (B, 1, H, W)."""
    return (image * image.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class CopyGuider(Guider):
    """A guider that asks for the picture of which its target is a copy.

    The target (B, C + 1, h, w) holds the copy, of one channel if it is grey, and as the last channel 1 where it is known,
    else 0. A copy smaller than an image is compared with the image made as small; a larger one is itself made smaller.
    """

    kind: str                             # a key of COPIES
    blur: float = 0.0                     # standard deviation of the blur, in pixels of the copy; 0: none
    noise: float = NOISE                  # standard deviation of the noise in the copy, above 0
    sigma_data: float = PIXEL_SIGMA_DATA  # standard deviation of images

    def energy(self, image: Tensor, sigma: Tensor) -> Tensor:
        """-log p(copy | x) up to a constant for predictions (B, 3, H, W) at noise levels (B,), (B,)."""
        return likelihood_guider(self.measurement(image), self.sigma_data).energy(image, sigma)

    def score(self, image: Tensor, sigma: Tensor) -> Tensor:
        """How well images (B, 3, H, W) agree with the copy, (B,) in [0, 1]: 1 / (1 + root mean square difference)."""
        return 1 / (1 + self.measurement(image).residual(image).square().flatten(1).mean(1).sqrt())

    def measurement(self, image: Tensor) -> Measurement:
        """The copy as a measurement of images (B, 3, H, W). ValueError without a copy for each of them or one for all."""
        target = self.target_for(image, image if self.target is None else self.target).to(image)
        own, sampled = target.shape[-2:], image.shape[-2:]
        size = min(own[0], sampled[0]), min(own[1], sampled[1])
        known = resize(target[:, -1:], size)
        values = resize(target[:, :-1] * target[:, -1:], size)
        blur = self.blur * sampled[0] / own[0], self.blur * sampled[1] / own[1]
        operator = _in_space((sampled[0], sampled[1]), size, blur)
        if COPIES[self.kind].is_grey:
            operator = Mixed(operator, LUMA)
        return Measurement(Partly(operator, known), values, self.noise)


def copy_guider(kind: str, blur: float = 0.0) -> CopyGuider:
    """The guider of a kind of copy, a key of COPIES, to be aimed at the copy.

    blur: of the blurred copy, standard deviation in its pixels; 0: none. ValueError for another kind or a negative blur.
    """
    if kind not in COPIES:
        raise ValueError(f"there is no copy '{kind}': expected one of {', '.join(COPIES)}")
    if blur < 0:
        raise ValueError(f"the blur of a copy is a number of pixels, and got {blur}: give 0 for none")
    rule = Rule(_read_grey if COPIES[kind].is_grey else _read, "image", COPIES[kind].asks, _preview)
    return CopyGuider(f"rule/{kind}", RuleNet(rule), UNCHANGED, "features", kind=kind,
                      blur=blur if COPIES[kind].is_blurred else 0.0)


def guider_of_rule(name: str, blur: float = 0.0) -> Guider:
    """The guider of a rule or of a kind of copy, a key of RULES or COPIES. ValueError for another name.

    blur: of the blurred copy, standard deviation in its pixels; 0: none.
    """
    return copy_guider(name, blur) if name in COPIES else rule_guider(name)


def without_missing(guider: Guider, target: Tensor, missing: Tensor) -> Tensor:
    """A target of which a part is not known.

    missing: (B, h, w) in [0, 1], 1 where it is missing; 0 everywhere changes nothing. ValueError for a guider of no copy.
    """
    if not isinstance(guider, CopyGuider):
        raise ValueError(f"{guider.name} looks at whole pictures, and this one is to have missing parts: expected one of "
                         f"{', '.join(COPIES)}; a mask of where to guide belongs to the term")
    known = 1 - resize(missing[:, None].to(target), (target.shape[-2], target.shape[-1]))
    count = max(len(target), len(known))
    target = target.expand(count, -1, -1, -1)
    return torch.cat([target[:, :-1], target[:, -1:] * known], 1)


def _read(image: Tensor) -> Tensor:
    return torch.cat([image, torch.ones_like(image[:, :1])], 1)


def _read_grey(image: Tensor) -> Tensor:
    return torch.cat([luma(image), torch.ones_like(image[:, :1])], 1)


def _preview(images: Tensor, features: Tensor) -> Tensor:
    return features[:, :-1].expand(-1, 3, -1, -1)


@lru_cache(maxsize=16)
def _in_space(size: Size, small: Size, blur: tuple[float, float]) -> LinearOperator:
    """A blur, standard deviations in pixels along both sides, and what makes the image small."""
    with torch.inference_mode(False), torch.no_grad():
        if size == small and blur == (0, 0):
            return Mask(torch.ones(1, 1, 1, 1))
        rows, columns = (averages(*sides) @ blurs(sides[0], std) for *sides, std in zip(size, small, blur, strict=True))
        return Separable(rows, columns)


def averages(side: int, small: int) -> Tensor:
    """Matrix (small, side) of the means over equal parts of a side; a part of a pixel counts as such."""
    edges = torch.arange(small + 1, dtype=torch.float64) * side / small
    pixels = torch.arange(side, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return covered.clamp_min(0) * small / side


def blurs(side: int, std: float) -> Tensor:
    """Matrix (side, side) of a Gaussian blur that takes nothing from beyond the border. std: in pixels; 0: none."""
    pixels = torch.arange(side, dtype=torch.float64)
    weights = (-((pixels - pixels[:, None]) / max(std, 1e-3)).square() / 2).exp()
    return weights / weights.sum(1, keepdim=True)
