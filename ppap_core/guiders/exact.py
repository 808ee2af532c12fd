"""The last step: finished images changed until they meet a rule exactly, where that can be done.

Guidance brings images near to what a guider asks, and what decodes latents takes them off again. Of some rules the images
that meet them are known in closed form, and so is the way there: by the smallest change, or by one that nobody sees.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from . import rules
from .copies import COPIES, CopyGuider
from .guider import Guider, clean
from .operators import Partly

ROUNDS = 100      # at most, where colours that are cut to their range must be mended again
SETTLED = 1e-10   # a change that ends the rounds
BEYOND = 1e-7     # colours may leave their range by so much
SWEEPS = 30       # over all directions of colours
NEAR = 20         # rounds that spread a correction before the rest of it is made by the smallest change

Change = Callable[[Tensor], Tensor]


def meet(guider: Guider, image: Tensor, strength: float = 1.0, smallest: bool = False) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] that meet what an aimed guider asks.

    strength: share of the way there; 0 leaves the images as they are, 1 goes all the way.
    smallest: make the smallest change where that is known, instead of one that is spread so that it is not seen.
    ValueError for a guider that cannot be met so.
    """
    if guider.name not in WAYS:
        raise ValueError(f"{guider.name} cannot be met exactly, only approached by guidance: expected one of "
                         f"{', '.join(name.removeprefix('rule/') for name in WAYS)}")
    if strength == 0:
        return image
    with torch.no_grad():
        change = WAYS[guider.name](guider, smallest)
        return torch.lerp(image, _within_range(change, image.double()).to(image), strength)


def off_by(guider: Guider, image: Tensor) -> Tensor:
    """How far images (B, 3, H, W) are from what a rule asks, (B,): root mean square, in its own units."""
    with torch.no_grad():
        return 1 / guider.score(image, clean(image)) - 1


def _within_range(change: Change, image: Tensor) -> Tensor:
    for _ in range(ROUNDS):
        image = change(image.clamp(-1, 1))
        if float(image.abs().max()) <= 1 + BEYOND:
            break
    return image.clamp(-1, 1)


# Symmetry and tiling

def _mirrored(sides: tuple[int, ...], guider: Guider, smallest: bool) -> Change:
    return lambda image: (image + image.flip(sides)) / 2


def _tiled(guider: Guider, smallest: bool) -> Change:
    return _without_seams if smallest else lambda image: _without_seams(periodic_part(image))


def periodic_part(image: Tensor) -> Tensor:
    """Images (B, C, H, W) less the smoothest image with their seams: the periodic component of Moisan (2011).

    What jumps here is a seam as the rule sees it, the jump less the slope, so that images without seams stay as they are.
    """
    across, down = (2 * torch.cos(2 * torch.pi * torch.fft.fftfreq(size, dtype=image.dtype, device=image.device))
                    for size in (image.shape[3], image.shape[2]))
    curvature = down[:, None] + across - 4
    curvature[0, 0] = -1
    smooth = torch.fft.fft2(_jumps(image) + _jumps(image.mT).mT) / curvature
    smooth[..., 0, 0] = 0  # the mean stays
    return image - torch.fft.ifft2(smooth).real


def _jumps(image: Tensor) -> Tensor:
    """Seams between the last and the first column, as sources at these two columns and 0 elsewhere."""
    seam = _seam_of(image)[..., None]
    return torch.cat([-seam, image.new_zeros(image[..., 2:].shape), seam], 3)


SEAM = (1.5, -0.5, 0.5, -1.5)  # what a seam is of the first two and the last two pixels of a line: jump less slope


def _seam_of(image: Tensor) -> Tensor:
    return torch.cat([image[..., :2], image[..., -2:]], 3) @ image.new_tensor(SEAM)


def _without_seams(image: Tensor) -> Tensor:
    """The nearest images without seams: projections by turns, which end in the nearest that both allow."""
    if min(image.shape[-2:]) < 4:
        return image.mean((2, 3), keepdim=True).expand_as(image)
    image, weights = image.clone(), image.new_tensor(SEAM) / sum(weight**2 for weight in SEAM)
    for _ in range(ROUNDS):
        worst = 0.0
        for view in (image, image.mT):
            change = _seam_of(view)[..., None] * weights
            view[..., :2] -= change[..., :2]
            view[..., -2:] -= change[..., 2:]
            worst = max(worst, float(change.abs().max()))
        if worst < SETTLED:
            break
    return image


# Colours and numbers

def _in_colors(guider: Guider, smallest: bool) -> Change:
    def moved(image: Tensor) -> Tensor:
        wanted = guider.target_for(image, rules.colors(image)).to(image)
        for _ in range(SWEEPS):
            image = _one_sweep(image, wanted).clamp(-1, 1)
        return image
    return moved


def _one_sweep(image: Tensor, wanted: Tensor) -> Tensor:
    """Images whose colours have the wanted quantiles (B|1, 8, shares) along each direction, one after the other."""
    points = image.flatten(2)
    for direction, shares in zip(F.normalize(image.new_tensor(rules.DIRECTIONS), dim=1), wanted.unbind(1), strict=True):
        ranked, order = (direction @ points).sort(dim=1)
        off = shares - F.adaptive_avg_pool1d(ranked, shares.shape[1])
        moves = F.interpolate(off[:, None], points.shape[2], mode="linear")[:, 0]
        points = points + direction[:, None] * torch.zeros_like(moves).scatter_(1, order, moves)[:, None]
    return points.view_as(image)


def _with_number(read: Callable[[Tensor], Tensor], move: Callable[[Tensor, Tensor, Tensor], Tensor], guider: Guider,
                 smallest: bool) -> Change:
    def moved(image: Tensor) -> Tensor:
        now = read(image)
        wanted = guider.target_for(image, now).to(image).expand_as(now)
        return move(image, now[..., None, None], wanted[..., None, None])
    return moved


def _shifted(image: Tensor, now: Tensor, wanted: Tensor) -> Tensor:
    return image + 2 * (wanted - now)


def _scaled(image: Tensor, now: Tensor, wanted: Tensor) -> Tensor:
    middle = rules.grey(image).mean((2, 3), keepdim=True)
    return middle + (image - middle) * wanted / now.clamp_min(1e-5)


def _colored(image: Tensor, now: Tensor, wanted: Tensor) -> Tensor:
    grey = rules.grey(image)
    return grey + (image - grey) * wanted / now.clamp_min(1e-5)


# Copies

def _as_copied(guider: Guider, smallest: bool) -> Change:
    assert isinstance(guider, CopyGuider)
    return partial(_nearest if smallest or guider.blur else _spread, guider)


def _nearest(guider: CopyGuider, image: Tensor) -> Tensor:
    measurement = guider.measurement(image)
    if guider.blur:  # what a blur has all but removed cannot be brought back
        return measurement.proximal(image, guider.noise**2)
    return image + measurement.pseudo_inverse(measurement.residual(image))


def _spread(guider: CopyGuider, image: Tensor) -> Tensor:
    """Images that agree with a copy by a change without tint, without blocks, and without an edge around missing parts."""
    measurement = guider.measurement(image)
    assert isinstance(measurement.operator, Partly)
    for _ in range(NEAR):
        lacking = filled_in(measurement.residual(image), measurement.operator.known)
        image = image + F.interpolate(lacking, image.shape[-2:], mode="bilinear").expand_as(image)
    return _nearest(guider, image)


def filled_in(values: Tensor, known: Tensor) -> Tensor:
    """Values (B, C, h, w), 0 where they are not known, and what is not known from ever wider surroundings.

    known: (B|1, 1, h, w), 1 where a value is known, else 0; where all are, nothing changes.
    """
    if bool((known >= 1).all()) or max(values.shape[-2:]) == 1:
        return values
    total, share = (F.avg_pool2d(each, 2, ceil_mode=True) for each in (values, known))
    wider = filled_in(total / share.clamp_min(1e-9), (share > 0).to(values))
    return values + (1 - known) * F.interpolate(wider, values.shape[-2:], mode="bilinear")


WAYS: dict[str, Callable[[Guider, bool], Change]] = {
    "rule/seamless tiling": _tiled,
    "rule/symmetry left-right": partial(_mirrored, (3,)),
    "rule/symmetry top-bottom": partial(_mirrored, (2,)),
    "rule/symmetry half turn": partial(_mirrored, (2, 3)),
    "rule/colours": _in_colors,
    "rule/brightness": partial(_with_number, rules.brightness, _shifted),
    "rule/contrast": partial(_with_number, rules.contrast, _scaled),
    "rule/saturation": partial(_with_number, rules.saturation, _colored),
    **{f"rule/{kind}": _as_copied for kind in COPIES},
}
"""Name of a guider that can be met -> (guider, whether the smallest change is wanted) -> the change of images."""
