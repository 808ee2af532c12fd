"""Variants of images, from which experts learn more than from the images alone."""
import pytest
import torch
from helpers import randn

from ppap_core.experts.variants import VARIANTS, Variant, variants_for, vary, vary_each

POSITIONS = torch.arange(16.0 * 32).view(1, 1, 16, 32)


def test_the_first_variant_is_the_image():
    assert torch.equal(vary(POSITIONS, VARIANTS[0]), POSITIONS) and len({*VARIANTS}) == len(VARIANTS)


def test_a_shift_moves_and_mirrors_at_the_border():
    shifted = vary(POSITIONS, Variant(down=1 / 8, right=-1 / 16))
    assert torch.equal(shifted[..., 2:, :-2], POSITIONS[..., :-2, 2:])
    assert torch.equal(shifted[..., 1, :-2], POSITIONS[..., 1, 2:])
    assert torch.equal(shifted[..., 0, :-2], POSITIONS[..., 2, 2:])
    assert torch.equal(shifted[..., 2:, -1], POSITIONS[..., :-2, 29])


def test_a_mirror_is_before_the_shift():
    assert torch.equal(vary(POSITIONS, Variant(True, 0, 1 / 8)), vary(POSITIONS.flip(3), Variant(False, 0, 1 / 8)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_vary_as_their_images_do(variant):
    latents = randn(2, 3, 16, 32)
    images = latents.repeat_interleave(8, 2).repeat_interleave(8, 3)
    inner = (..., slice(16, -16), slice(32, -32))  # borders are mirrored at a pixel, not at eight
    varied = vary(latents, variant).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(vary(images, variant)[inner], varied[inner])


def test_each_image_has_the_variant_chosen_for_it():
    images, chosen = randn(5, 3, 8, 8), torch.tensor([3, 0, 7, 3, 1])
    varied = vary_each(images, VARIANTS, chosen)
    assert all(torch.equal(varied[place], vary(images[place:place + 1], VARIANTS[number])[0])
               for place, number in enumerate(chosen.tolist()))


def test_fewer_images_have_more_variants():
    assert [len(variants_for(images)) for images in (64, 2048, 4096, 8192, 10**6)] == [8, 8, 4, 2, 2]
