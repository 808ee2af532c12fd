"""Pictures of numbers, drawn with Pillow: image tensors (1, 3, H, W) in [-1, 1]."""
import colorsys
import math
import textwrap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def palette(words: str, size: int = 64) -> Tensor:
    """Colours such as '#1d3557, #e63946:2' as a picture of stripes, (1, 3, size, size) in [-1, 1].

    A number after a colon says how wide a stripe is. Aimed at by a rule of colour, it is a palette.
    """
    colours, widths = [], []
    for part in filter(None, (part.strip() for part in words.split(","))):
        code, _, width = part.partition(":")
        try:
            colours.append(list(bytes.fromhex(code.strip().removeprefix("#"))))
            widths.append(float(width or 1))
        except ValueError:
            colours.append([])
        if len(colours[-1]) != 3 or not 0 < widths[-1] < float("inf"):
            raise ValueError(f"'{part}' is no colour: expected six hexadecimal digits and, if you like, a colon and a width "
                             "above 0, such as #e63946:2")
    if not colours:
        raise ValueError("no colour was given: expected some, such as #1d3557, #e63946, #f1faee")
    edges = torch.tensor(widths).cumsum(0) / sum(widths)
    places = torch.searchsorted(edges, (torch.arange(size) + 0.5) / size).clamp_max(len(colours) - 1)
    row = torch.tensor(colours)[places].float() / 127.5 - 1
    return row.T[None, :, None].expand(1, 3, size, size).clone()


INK, PAPER, GRID = (40, 40, 46), (255, 255, 255), (225, 225, 230)
Points = Sequence[tuple[float, float]]
MAX_INLINE_LABELS, MAX_LABEL_LENGTH = 4, 40  # names of lines that find room among the lines, and the length of one that finds none


def colour(index: int) -> tuple[int, int, int]:
    """The index-th of an endless row of well separated colours."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + index * 0.618) % 1, 0.75, 0.8 - 0.25 * (index % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _image(picture) -> Tensor:
    data = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return (data.reshape(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 127.5) - 1


def _picture(image: Tensor):
    """(3, H, W) in [-1, 1] -> Pillow image."""
    from PIL import Image

    data = ((image.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(data.permute(1, 2, 0).numpy())


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        return [10.0**power for power in range(first, last + 1)] or [low, high]
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12)))
    step *= next(factor for factor in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * factor) <= 7)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _axis(values: list[float], log: bool, start: int, end: int) -> tuple[Callable[[float], float], list[float]]:
    """The pixel of each value between those where the axis starts and ends, and its ticks."""
    low, high = min(values), max(values)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
    scale = math.log if log else float
    def place(value: float) -> float:
        return start + (scale(value) - scale(low)) / (scale(high) - scale(low)) * (end - start)
    return place, _ticks(low, high, log)


def line_plot(series: dict[str, Points], title: str, x_label: str, y_label: str, *, log_x: bool = False,
              log_y: bool = False, size: tuple[int, int] = (420, 720)) -> Tensor:
    """Lines with a legend; size is (height, width) in pixels. Points that a logarithmic axis cannot show are left out.

    Many or long names stand beside the plot; many single points are numbered there.
    """
    from PIL import Image, ImageDraw

    height, width = size
    picture = Image.new("RGB", (width, height), PAPER)
    draw, small = ImageDraw.Draw(picture), _font(12)
    shown = {name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)
                    and (x > 0 or not log_x) and (y > 0 or not log_y)] for name, points in series.items()}
    numbered = len(shown) > MAX_INLINE_LABELS and all(len(line) == 1 for line in shown.values())
    beside = len(shown) > MAX_INLINE_LABELS or max(map(len, shown), default=0) > MAX_LABEL_LENGTH
    labels = [f"{index}  {name}" if numbered else name for index, name in enumerate(shown, 1)]
    widest = int(max(map(small.getlength, labels), default=0))
    left, right, top, bottom = 70, width - 20 - (widest + 38 if beside else 0), 44, height - 52
    draw.text((left, 14), title, INK, _font(16))
    points = [point for line in shown.values() for point in line]
    if not points:
        draw.text((left, height // 2), "nothing to show: no finite value", INK, small)
        return _image(picture)

    place_x, ticks_x = _axis([x for x, _ in points], log_x, left, right)
    place_y, ticks_y = _axis([y for _, y in points], log_y, bottom, top)
    for tick in ticks_x:
        draw.line([(place_x(tick), top), (place_x(tick), bottom)], GRID)
        draw.text((place_x(tick), bottom + 6), f"{tick:.4g}", INK, small, anchor="mt")
    for tick in ticks_y:
        draw.line([(left, place_y(tick)), (right, place_y(tick))], GRID)
        draw.text((left - 6, place_y(tick)), f"{tick:.4g}", INK, small, anchor="rm")
    draw.rectangle([left, top, right, bottom], outline=INK)
    draw.text(((left + right) / 2, height - 22), x_label, INK, small, anchor="mm")
    draw.text((8, top - 16), y_label, INK, small)
    legend = right + 38 if beside else right - 12 - widest
    for index, (label, line) in enumerate(zip(labels, shown.values(), strict=True)):
        path = [(place_x(x), place_y(y)) for x, y in line]
        if len(path) == 1:
            x, y = path[0]
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour(index))
            if numbered:
                draw.text((x + 5, y), str(index + 1), INK, small, anchor="lm")
        draw.line(path, colour(index), 2)
        draw.line([(legend - 26, top + 14 + 16 * index), (legend - 6, top + 14 + 16 * index)], colour(index), 3)
        draw.text((legend, top + 14 + 16 * index), label, INK, small, anchor="lm")
    return _image(picture)


def contact_sheet(rows: dict[str, Tensor], scale: int = 3, columns: int = 8, heads: Sequence[str] = ()) -> Tensor:
    """The first images (B, 3, h, w) of each row beside one another, each row under its name, columns above their heads."""
    from PIL import Image, ImageDraw

    height, width = (side * scale for side in next(iter(rows.values())).shape[-2:])
    bottom = len(rows) * (height + 26) + 4
    picture = Image.new("RGB", (columns * (width + 4) + 4, bottom + (22 if heads else 0)), PAPER)
    draw = ImageDraw.Draw(picture)
    for c, head in enumerate(heads):
        draw.text((4 + c * (width + 4) + width / 2, bottom + 8), head, INK, _font(14), anchor="mm")
    for r, (name, images) in enumerate(rows.items()):
        draw.text((6, r * (height + 26) + 4), name, INK, _font(14))
        for c, image in enumerate(images[:columns]):
            tile = _picture(image).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (4 + c * (width + 4), r * (height + 26) + 24))
    return _image(picture)


def scatter_panels(panels: dict[str, Tensor], truth: Tensor, columns: int = 2, side: int = 420) -> Tensor:
    """Points in the plane (n, 2), dark, on those that they should lie among, light; each panel under its name."""
    from PIL import Image, ImageDraw

    low, high = truth.amin(0), truth.amax(0)
    centre, reach = (low + high) / 2, 0.6 * float((high - low).max())
    rows = -(-len(panels) // columns)
    picture = Image.new("RGB", (columns * side, rows * (side + 24)), PAPER)
    for index, (name, points) in enumerate(panels.items()):
        panel = Image.new("RGB", (side, side), PAPER)
        draw = ImageDraw.Draw(panel)
        for cloud, ink, size in ((truth, GRID, 2), (points, colour(0), 1)):
            place = (cloud - centre) / (2 * reach) * side + side / 2
            for x, y in place.tolist():
                draw.ellipse([x - size, side - y - size, x + size, side - y + size], ink)
        left, top = index % columns * side, index // columns * (side + 24)
        picture.paste(panel, (left, top + 24))
        ImageDraw.Draw(picture).text((left + 8, top + 5), name, INK, _font(13))
    return _image(picture)


def save_picture(image: Tensor, path) -> None:
    """The first of a batch of images (B, 3, H, W) in [-1, 1] as a PNG."""
    _picture(image[0]).save(path)


def depth_picture(depth: Tensor) -> Tensor:
    """Depth maps (B, 1, H, W) in any unit -> grey pictures (B, 3, H, W), the nearest white."""
    flat = depth.float().flatten(1)
    low, high = flat.amin(1)[:, None, None, None], flat.amax(1)[:, None, None, None]
    return ((depth.float() - low) / (high - low).clamp_min(1e-6) * 2 - 1).expand(-1, 3, -1, -1)


def label_picture(labels: Tensor) -> Tensor:
    """Label maps (B, H, W) -> coloured pictures (B, 3, H, W); label k has `colour(k)`, and labels above 255 none."""
    palette = torch.tensor([colour(index) for index in range(256)], device=labels.device)
    return (palette[labels.clamp(0, 255)].permute(0, 3, 1, 2).float() / 127.5) - 1


def labels_of_picture(picture: Tensor, count: int) -> Tensor:
    """The inverse of `label_picture` for the first `count` colours: each pixel gets the label of the nearest, (B, H, W)."""
    palette = torch.tensor([colour(index) for index in range(count)], device=picture.device).float() / 127.5 - 1
    return (picture.permute(0, 2, 3, 1)[..., None, :] - palette).square().sum(-1).argmin(-1)


def loss_plot(losses: dict[str, Sequence[float]], title: str = "Distillation: distance from the plain network's answer on "
              "the clean image", points: int = 60) -> Tensor:
    """The loss of each training over its steps, every point a mean over neighbouring steps."""
    def smooth(values: Sequence[float]) -> Points:
        width = max(1, len(values) // points)
        return [(start + width / 2, sum(values[start:start + width]) / len(values[start:start + width]))
                for start in range(0, len(values), width)]
    return line_plot({name: smooth(values) for name, values in losses.items()}, title, "step", "loss", log_y=True)


def guidance_plot(names: Sequence[str], records: Sequence) -> Tensor:
    """Energy and size of the shift of every term, step by step.

    readings: `guidance.Reading`s of one run. A step is a noise level, because some samplers ask twice at one level.
    """
    steps = {sigma: step for step, sigma in enumerate(sorted({each.sigma for each in records}, reverse=True))}
    energy: dict[str, dict[int, float]] = {name: {} for name in names}
    size: dict[str, dict[int, float]] = {name: {} for name in names}
    for each in records:
        energy[names[each.term]][steps[each.sigma]] = each.energy.mean().item()
        size[names[each.term]][steps[each.sigma]] = each.rms.mean().item()
    return torch.cat([
        line_plot({name: sorted(line.items()) for name, line in lines.items()}, title, "step", label, size=(300, 720))
        for lines, title, label in ((energy, "Energy (lower is closer to the target)", "energy"),
                                    (size, "Size of the shift (root mean square)", "rms"))], dim=2)


def bar_chart(shares: dict[str, float], size: tuple[int, int] = (256, 256)) -> Tensor:
    """Named shares in [0, 1] as horizontal bars; size is (height, width) in pixels."""
    from PIL import Image, ImageDraw

    height, width = size
    picture = Image.new("RGB", (width, height), PAPER)
    draw, row = ImageDraw.Draw(picture), height / max(len(shares), 1)
    for index, (name, share) in enumerate(shares.items()):
        top = index * row
        draw.rectangle([0, top + 2, max(share * width, 1), top + row - 3], fill=(170, 200, 245))
        draw.text((6, top + row / 2), f"{name}  {share:.0%}", INK, _font(14), anchor="lm")
    return _image(picture)


def note_picture(lines: Sequence[str], size: tuple[int, int] = (256, 256)) -> Tensor:
    """A few sentences, broken where they reach the border; size is (height, width) in pixels."""
    from PIL import Image, ImageDraw

    height, width = size
    picture = Image.new("RGB", (width, height), PAPER)
    broken = [part for line in lines for part in textwrap.wrap(line, width // 9)]
    ImageDraw.Draw(picture).multiline_text((8, 8), "\n".join(broken), INK, _font(15), spacing=6)
    return _image(picture)
