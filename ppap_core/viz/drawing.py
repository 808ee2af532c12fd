"""Pictures drawn with Pillow, as image tensors (1, 3, H, W) in [-1, 1]. Sizes are (height, width) in pixels."""
import math
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .colors import color

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

INK, PAPER, GRID, BAR = (40, 40, 46), (255, 255, 255), (225, 225, 230), (170, 200, 245)
CAPTION = 40  # height in pixels of two lines below a picture


@cache
def font(size: int) -> "FreeTypeFont | ImageFont":
    """Pillow's own font."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def new_canvas(height: int, width: int) -> "tuple[Image, ImageDraw]":
    """An empty Pillow picture, and what draws on it."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, height), PAPER)
    return picture, ImageDraw.Draw(picture)


def from_pillow(picture: "Image") -> Tensor:
    """A Pillow picture as an image tensor (1, 3, H, W)."""
    data = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    return (data.reshape(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 127.5) - 1


def to_pillow(image: Tensor) -> "Image":
    """An image (3, H, W) in [-1, 1] as a Pillow picture."""
    from PIL import Image

    data = ((image.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(data.permute(1, 2, 0).numpy())


def save_picture(image: Tensor, path: Path | str) -> None:
    """Save the first of a batch of images (B, 3, H, W) in [-1, 1] as a PNG."""
    to_pillow(image[0]).save(path)


def contact_sheet(rows: dict[str, Tensor], scale: int = 3, columns: int = 8, heads: Sequence[str] = ()) -> Tensor:
    """Rows of images, each row under its name.

    rows: images (B, 3, h, w) by name, of which the first `columns` are shown. scale: pixels along one side of a pixel.
    heads: captions below the columns; (): none.
    """
    from PIL.Image import Resampling

    height, width = (side * scale for side in next(iter(rows.values())).shape[-2:])
    bottom = len(rows) * (height + 26) + 4
    picture, draw = new_canvas(bottom + (22 if heads else 0), columns * (width + 4) + 4)
    for column, head in enumerate(heads):
        draw.text((4 + column * (width + 4) + width / 2, bottom + 8), head, INK, font(14), anchor="mm")
    for row, (name, images) in enumerate(rows.items()):
        draw.text((6, row * (height + 26) + 4), name, INK, font(14))
        for column, image in enumerate(images[:columns]):
            tile = to_pillow(image).resize((width, height), Resampling.NEAREST)
            picture.paste(tile, (4 + column * (width + 4), row * (height + 26) + 24))
    return from_pillow(picture)


def captioned_tiles(pictures: "Sequence[tuple[str, Image]]", height: int) -> "Image":
    """Pillow pictures in nearly as many rows as columns, each above its caption of up to two lines.

    height: of each picture, in pixels.
    """
    tiles = [picture.resize((max(1, round(picture.width * height / picture.height)), height)) for _, picture in pictures]
    columns, width = math.ceil(len(tiles) ** 0.5), max(tile.width for tile in tiles)
    canvas, draw = new_canvas(-(-len(tiles) // columns) * (height + CAPTION), columns * width)
    for index, (caption, _) in enumerate(pictures):
        left, top = index % columns * width, index // columns * (height + CAPTION)
        canvas.paste(tiles[index], (left, top))
        lines = [fitting(line, width - 8) for line in caption.splitlines()]
        draw.multiline_text((left + 4, top + height + 3), "\n".join(lines), INK, font(13), spacing=3)
    return canvas


def fitting(text: str, width: int, size: int = 13) -> str:
    """A text, shortened in its middle to fit into a width in pixels at a font size."""
    shown = text
    while font(size).getlength(shown) > width and len(text) > 2:
        middle = len(text) // 2
        text = text[:middle] + text[middle + 1:]
        shown = f"{text[:len(text) // 2]}…{text[len(text) // 2:]}"
    return shown


def scatter_panels(panels: dict[str, Tensor], truth: Tensor, columns: int = 2, side: int = 420) -> Tensor:
    """Points in the plane (n, 2), dark, on those of the true distribution (m, 2), light; each panel under its name.

    side: of a panel, in pixels.
    """
    low, high = truth.amin(0), truth.amax(0)
    center, extent = (low + high) / 2, 2 * 0.6 * float((high - low).max())
    picture, draw = new_canvas(-(-len(panels) // columns) * (side + 24), columns * side)
    for index, (name, points) in enumerate(panels.items()):
        panel, draw_panel = new_canvas(side, side)
        for cloud, ink, radius in ((truth, GRID, 2), (points, color(0), 1)):
            for x, y in ((cloud - center) / extent * side + side / 2).tolist():
                draw_panel.ellipse((x - radius, side - y - radius, x + radius, side - y + radius), ink)
        left, top = index % columns * side, index // columns * (side + 24)
        picture.paste(panel, (left, top + 24))
        draw.text((left + 8, top + 5), name, INK, font(13))
    return from_pillow(picture)


def bar_chart(shares: dict[str, float], size: tuple[int, int] = (256, 256)) -> Tensor:
    """Named shares in [0, 1] as horizontal bars."""
    height, width = size
    picture, draw = new_canvas(height, width)
    row = height / max(len(shares), 1)
    for index, (name, share) in enumerate(shares.items()):
        top = index * row
        draw.rectangle((0, top + 2, max(share * width, 1), top + row - 3), fill=BAR)
        draw.text((6, top + row / 2), f"{name}  {share:.0%}", INK, font(14), anchor="lm")
    return from_pillow(picture)


def note_picture(lines: Sequence[str], size: tuple[int, int] = (256, 256)) -> Tensor:
    """A few sentences, wrapped at the border."""
    height, width = size
    picture, draw = new_canvas(height, width)
    wrapped = [part for line in lines for part in textwrap.wrap(line, width // 9)]
    draw.multiline_text((8, 8), "\n".join(wrapped), INK, font(15), spacing=6)
    return from_pillow(picture)
