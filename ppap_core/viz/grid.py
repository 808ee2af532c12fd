"""Images in rows and columns with labels, as an image tensor (1, 3, H, W) in [-1, 1]."""
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .drawing import INK, fitting, font, from_pillow, new_canvas, to_pillow

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

READABLE = 128    # height in pixels, below which images are enlarged by a whole factor
GAP, INSIDE = 8, 2  # pixels between cells, and between the images of one
LONGEST = 2       # widest label of a row, in heights of a cell


class _Layout(NamedTuple):
    """Sizes in pixels: of a cell, of the font, and of the space before the first cell."""

    width: int
    height: int
    font: int
    left: int
    top: int

    def corner(self, row: int, column: int) -> tuple[int, int]:
        return self.left + column * (self.width + GAP), self.top + row * (self.height + GAP)


def image_grid(cells: Sequence[Tensor], row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()) -> Tensor:
    """Cells in rows, filled from left to right, with a label before each row and above each column.

    cells: batches (B, 3, h, w) in [-1, 1], whose images stand beside each other, pixel for pixel; those lower than 128
    pixels are enlarged by a whole factor. row_labels: one for each row; (): none. column_labels: as many as there are
    columns; (): one column. ValueError for no cells, and for another number of labels than of rows.
    """
    columns = max(1, len(column_labels))
    rows = -(-len(cells) // columns)
    if not cells or len(row_labels) not in (0, rows):
        raise ValueError(f"{len(cells)} cells in {columns} columns make {rows} rows, but there are {len(row_labels)} row "
                         "labels: give at least one cell, and a label for each row, or none")
    pictures = [_beside([to_pillow(image) for image in cell]) for cell in cells]
    layout = _layout(pictures, row_labels, column_labels)
    right, bottom = layout.corner(rows, columns)
    canvas, draw = new_canvas(bottom, right)
    _draw_labels(draw, layout, row_labels, column_labels)
    for index, picture in enumerate(pictures):
        canvas.paste(picture, layout.corner(*divmod(index, columns)))
    return from_pillow(canvas)


def _layout(pictures: "Sequence[Image]", row_labels: Sequence[str], column_labels: Sequence[str]) -> _Layout:
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    size = max(14, height // 20)
    widest = round(min(max((font(size).getlength(label) for label in row_labels), default=-GAP), LONGEST * height))
    return _Layout(width, height, size, widest + 2 * GAP, 2 * size if column_labels else GAP)


def _draw_labels(draw: "ImageDraw", layout: _Layout, row_labels: Sequence[str], column_labels: Sequence[str]) -> None:
    size = layout.font
    for column, label in enumerate(column_labels):
        middle = layout.corner(0, column)[0] + layout.width / 2, size
        draw.text(middle, fitting(label, layout.width, size), INK, font(size), anchor="mm")
    for row, label in enumerate(row_labels):
        start = GAP, layout.corner(row, 0)[1] + layout.height / 2
        draw.text(start, fitting(label, layout.left - 2 * GAP, size), INK, font(size), anchor="lm")


def _beside(images: "Sequence[Image]") -> "Image":
    from PIL.Image import Resampling

    factor = max(1, -(-READABLE // images[0].height))
    width, height = (side * factor for side in images[0].size)
    row, _ = new_canvas(height, len(images) * (width + INSIDE) - INSIDE)
    for index, image in enumerate(images):
        row.paste(image.resize((width, height), Resampling.NEAREST), (index * (width + INSIDE), 0))
    return row
