"""Procedural scenes from seeds, with exact class, depth and segmentation.

A scene is one solid object in front of a tilted wall. Everything is a formula in continuous coordinates,
so a scene can be drawn at any size, and class, depth and segmentation are exact at every pixel centre.
"""
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TAU = 2 * math.pi


class Scenes(NamedTuple):
    """A batch of scenes. Segmentation is 0 for the wall and 1 + label inside the object."""

    image: Tensor         # (B, 3, H, W) in [-1, 1]
    label: Tensor         # (B,) long, index into CLASSES
    depth: Tensor         # (B, 1, H, W) in [0, 1], 1 is nearest, as depth networks and depth pictures have it
    segmentation: Tensor  # (B, H, W) long

    def to(self, device: torch.device | str) -> "Scenes":
        """A copy on another device."""
        return Scenes(*(part.to(device) for part in self))


def _disk(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.9


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.75


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(-y, 0.866 * x.abs() + 0.5 * y) - 0.55


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: fold the plane into one half sector, then one straight edge."""
    outer, inner, half = 1.1, 0.45, math.pi / 5
    angle = (torch.atan2(x, y) + half) % (2 * half) - half
    radius = torch.hypot(x, y)
    along, across = radius * angle.cos(), radius * angle.sin().abs()
    edge = (inner * math.sin(half), outer - inner * math.cos(half))  # normal of the edge
    length = math.hypot(*edge)
    return ((along - outer) * edge[0] + across * edge[1]) / length


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 1.0, y - 0.32), torch.maximum(x - 0.32, y - 1.0))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.72).abs() - 0.22


def _moon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.95, 0.8 - torch.hypot(x - 0.55, y))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """A diamond with a disk on each of its upper edges."""
    x, y, size = x.abs(), y + 0.05, 0.82
    diamond = (x + y.abs() - size) / math.sqrt(2)
    lobe = torch.hypot(x - size / 2, y - size / 2) - size / math.sqrt(2)
    return torch.minimum(diamond, lobe)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disk": _disk, "square": _square, "triangle": _triangle, "star": _star,
    "cross": _cross, "ring": _ring, "moon": _moon, "heart": _heart,
}
CLASSES = tuple(SHAPES)


def _distance(label: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the outline of each scene's shape, (B, H, W), in units of the object's radius; negative inside."""
    out = torch.empty_like(x)
    for index, shape in enumerate(SHAPES.values()):
        chosen = label == index
        if chosen.any():
            out[chosen] = shape(x[chosen], y[chosen])
    return out


def _bulge(distance: Tensor) -> Tensor:
    """Height of a pillow over its outline, 0 outside to 1 well inside."""
    inside = (-distance / 0.45).clamp(0, 1)
    return (1 - (1 - inside) ** 2).clamp_min(0).sqrt()


def _hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """(B,) each -> (B, 3) in [0, 1]."""
    offset = torch.tensor([5.0, 3.0, 1.0], device=hue.device)
    k = (offset + 6 * hue[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


# One row of uniform numbers makes one scene; the order is part of the format of the world.
_PARAMETERS = ("label", "x", "y", "radius", "turn", "hue", "contrast", "saturation", "value", "wall_saturation",
               "wall_value", "tilt", "tilt_direction", "light_direction", "light")


def _parameters(seeds: Sequence[int]) -> dict[str, Tensor]:
    rows = [torch.rand(len(_PARAMETERS), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return dict(zip(_PARAMETERS, torch.stack(rows).T, strict=True))


def draw(seeds: Sequence[int], size: int | tuple[int, int] = 32, label: int | None = None) -> Scenes:
    """Scenes of the given seeds: row i depends on seeds[i] only. `label` fixes the class of all of them.

    size: side in pixels, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    p = {name: value[:, None, None] for name, value in _parameters(seeds).items()}
    labels = (p["label"].flatten() * len(CLASSES)).long() if label is None else torch.full((len(seeds),), label)
    x, y = _pixel_centres(height, width, len(seeds))
    u, v, radius = _object_frame(p, x, y)

    distance = _distance(labels, u, v)
    inside = distance < 0
    coverage = (0.5 - distance * radius * min(height, width) / 2).clamp(0, 1)  # anti-aliased over one pixel
    bulge = _bulge(distance)
    tilt = TAU * p["tilt_direction"]
    ramp = (tilt.cos() * x + tilt.sin() * y) * (0.1 + 0.25 * p["tilt"])

    near, far = _object_color(p) * _shade(p, labels, u, v, bulge)[:, None], _wall_color(p) * (1 + 1.2 * ramp[:, None])
    image = (coverage[:, None] * near + (1 - coverage[:, None]) * far).clamp(0, 1)
    wall_depth = (0.15 + 0.15 * p["wall_value"] + 0.4 * ramp).clamp(0, 1)        # a near wall is lighter
    object_depth = 0.5 + 0.15 * p["radius"] + 0.35 * bulge * radius / 0.7         # a near object is larger
    depth = torch.where(inside, object_depth, wall_depth)
    return Scenes(image * 2 - 1, labels, depth[:, None], torch.where(inside, labels[:, None, None] + 1, 0))


def _pixel_centres(height: int, width: int, count: int) -> tuple[Tensor, Tensor]:
    """x to the right and y upwards, (count, H, W) each; the short side spans [-1, 1]."""
    short = min(height, width)
    rows = (2 * torch.arange(height) + 1 - height) / short
    columns = (2 * torch.arange(width) + 1 - width) / short
    y, x = torch.meshgrid(-rows, columns, indexing="ij")
    return x.expand(count, -1, -1), y.expand(count, -1, -1)


def _object_frame(p: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates in the turned frame of the object, in units of its radius, and that radius."""
    radius = 0.45 + 0.25 * p["radius"]
    turn = TAU * p["turn"]
    dx, dy = x - 0.5 * (p["x"] - 0.5), y - 0.5 * (p["y"] - 0.5)
    return (turn.cos() * dx + turn.sin() * dy) / radius, (turn.cos() * dy - turn.sin() * dx) / radius, radius


def _shade(p: dict[str, Tensor], labels: Tensor, u: Tensor, v: Tensor, bulge: Tensor) -> Tensor:
    """Brightness of the object's surface under one light, (B, H, W)."""
    step = 0.02  # in radii: normals of the surface by forward differences, the same at any image size
    slope_u = (_bulge(_distance(labels, u + step, v)) - bulge) / step
    slope_v = (_bulge(_distance(labels, u, v + step)) - bulge) / step
    light = TAU * p["light_direction"] + TAU * p["turn"]
    facing = (1 - 0.6 * (slope_u * light.cos() - slope_v * light.sin())) / (1 + slope_u**2 + slope_v**2).sqrt()
    return (0.62 + (0.25 + 0.2 * p["light"]) * facing).clamp(0.3, 1.1)


def _object_color(p: dict[str, Tensor]) -> Tensor:
    """(B, 3, 1, 1) in [0, 1]."""
    hue, saturation, value = (p[name].flatten() for name in ("hue", "saturation", "value"))
    return _hsv(hue, 0.6 + 0.4 * saturation, 0.75 + 0.25 * value)[:, :, None, None]


def _wall_color(p: dict[str, Tensor]) -> Tensor:
    """(B, 3, 1, 1) in [0, 1], of another hue than the object."""
    hue, contrast, saturation, value = (p[name].flatten() for name in ("hue", "contrast", "wall_saturation", "wall_value"))
    return _hsv((hue + 0.25 + 0.5 * contrast) % 1, 0.2 + 0.5 * saturation, 0.2 + 0.3 * value)[:, :, None, None]


def truth(scenes: Scenes, task: str) -> Tensor:
    """The true target of scenes for a guider of a task: "class", "depth" or "segmentation"."""
    return {"class": scenes.label, "depth": scenes.depth, "segmentation": scenes.segmentation}[task]
