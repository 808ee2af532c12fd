"""Guiders and strengths side by side: lists of terms, and a grid of the images that come of them."""
from typing import Any

import pytest
import torch
from helpers import says
from helpers.worlds import PixelWorld

GAP, INSIDE = 8, 2


def compared(comfy, terms: tuple, factors: str, **others: Any) -> tuple:
    return comfy("PPAPCompareTerms", terms=terms, factors=factors, **others)


def grid(comfy, images: list[torch.Tensor], rows: str = "", columns: str = "", **others: Any) -> torch.Tensor:
    """A grid as ComfyUI asks for it: each input is a list."""
    return comfy("PPAPImageGrid", images=images, row_labels=[rows], column_labels=[columns], **others)[0]


def picture(shade: float, count: int = 1, height: int = 128, width: int = 96) -> torch.Tensor:
    return torch.full((count, height, width, 3), shade)


def test_each_set_of_terms_is_weighed_by_each_factor(comfy, pixels: PixelWorld):
    first, second = pixels.term(weight=2.0), pixels.term(weight=-1.0, terms=pixels.term(weight=4.0))
    terms, rows, columns = compared(comfy, first, "0, 0.5,1", terms_2=None, terms_3=second)
    assert [[term.weight for term in each] for each in terms] == [[0.0], [1.0], [2.0], [0.0, 0.0], [2.0, -0.5], [4.0, -1.0]]
    assert terms[2] == first and terms[5] == second and columns.splitlines() == ["x 0", "x 0.5", "x 1"]
    assert rows.splitlines() == ["tinyworld/guider_class", "tinyworld/guider_class + tinyworld/guider_class"]


@pytest.mark.parametrize("factors", ["", "some", "1, nan"])
def test_what_is_no_factor_is_refused(comfy, pixels: PixelWorld, factors: str):
    with says(ValueError, "no factors", "0, 0.5, 1, 2"):
        compared(comfy, pixels.term(), factors)


def test_cells_stand_in_rows_and_columns(comfy):
    """Three batches of two in two columns: pixels are kept, and the space of a fourth is white."""
    shades = (0.0, 0.2, 0.4)
    laid = grid(comfy, [picture(shade, 2) for shade in shades], columns="a\nb")[0]
    width, top = 2 * 96 + INSIDE, 28
    for index, shade in enumerate((*shades, 1.0)):
        row, column = divmod(index, 2)
        x, y = GAP + column * (width + GAP), top + row * (128 + GAP)
        left, right = laid[y:y + 128, x:x + 96], laid[y:y + 128, x + 96 + INSIDE:x + width]
        assert (left - shade).abs().max() < 0.01 and (right - shade).abs().max() < 0.01
    assert laid.shape == (top + 2 * (128 + GAP), GAP + 2 * (width + GAP), 3)


def test_several_sockets_are_cells_and_a_single_batch_is_split(comfy):
    one, other = picture(0.1), picture(0.6)
    alike = [grid(comfy, [one, other]), grid(comfy, [one], images_2=[other], images_3=None),
             grid(comfy, [torch.cat([one, other])])]
    assert all(torch.equal(alike[0], each) for each in alike)


def test_labels_take_space_and_small_images_are_enlarged(comfy):
    plain, labelled = grid(comfy, [picture(0.0, 1, 32, 40)] * 2), grid(comfy, [picture(0.0, 1, 32, 40)] * 2, "off\nstrong")
    assert plain.shape[1:3] == (GAP + 2 * (128 + GAP), GAP + 160 + GAP) and labelled.shape[1] == plain.shape[1]
    assert labelled.shape[2] > plain.shape[2] + 20 and float(labelled[..., :30, :].min()) < 0.5
    with says(ValueError, "2 cells in 1 columns make 2 rows", "3 row labels"):
        grid(comfy, [picture(0.0)] * 2, "a\nb\nc")
