"""Restoration by copies: what is asked of an image, and that a model fills in the rest."""
from dataclasses import replace

import pytest
import torch
from helpers import B, H, W, gaussian_denoise, images, level, randn, says
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tiny_world import load_world
from ppap_core.guidance.shift import guided
from ppap_core.guidance.terms import Term
from ppap_core.guiders.copies import (
    COPIES,
    CopyGuider,
    averages,
    blurs,
    copy_guider,
    guider_of_rule,
    luma,
    without_missing,
)
from ppap_core.guiders.guider import Guider, clean
from ppap_core.guiders.operators import Downscale
from ppap_core.guiders.rules import rule_guider
from ppap_core.guiders.targets import image_target, with_cutouts
from ppap_core.guiders.visualize import visualize
from ppap_core.io.hashing import digest
from ppap_core.sampling import sample_renewing
from ppap_core.tinyworld.scenes import draw

SMALL = (7, 9)


def aimed(kind: str, picture: Tensor, blur: float = 0.0, missing: Tensor | None = None) -> CopyGuider:
    guider = copy_guider(kind, blur)
    target = image_target(guider, picture)
    return guider.aim(target if missing is None else without_missing(guider, target, missing))


def energy(guider: Guider, image: Tensor, sigma: float = 0.0) -> Tensor:
    return guider.energy(image, level(sigma, image))


def made_small(picture: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = (averages(*sides).to(picture) for sides in zip(picture.shape[-2:], size, strict=True))
    return rows @ picture @ columns.mT


def blurred(picture: Tensor, std: float) -> Tensor:
    return blurs(picture.shape[-2], std).to(picture) @ picture @ blurs(picture.shape[-1], std).to(picture).mT


@pytest.mark.parametrize("kind", COPIES)
def test_a_picture_meets_its_own_copy_and_no_other_does(kind: str):
    picture = images()
    guider = aimed(kind, picture)
    own, other = energy(guider, picture), energy(guider, picture.flip(0).clone())
    assert float(own.max()) < 1e-6 and float(other[::2].min()) > 10
    assert float(guider.score(picture, clean(picture)).min()) > 0.999
    assert float(guider.score(-picture, clean(picture)).max()) < 0.8
    assert guider.name == f"rule/{kind}" and guider.task == "features" and COPIES[kind].asks


def test_each_kind_asks_for_what_it_says():
    """A grey copy leaves colours free, a small one detail, a blurred one what the blur removed."""
    picture, noise = images(dtype=torch.float64), randn(B, 3, H, W, seed=3, dtype=torch.float64)
    grey = aimed("grey copy", luma(picture).expand(-1, 3, -1, -1))
    tint = noise - luma(noise)  # whose luma is 0
    small = aimed("small copy", made_small(picture, SMALL))
    rows, columns = averages(H, SMALL[0]), averages(W, SMALL[1])
    detail = noise - torch.linalg.pinv(rows) @ made_small(noise, SMALL) @ torch.linalg.pinv(columns).mT
    sharp = aimed("blurred copy", blurred(picture, 1.5), blur=1.5)
    for guider, free in ((grey, tint), (small, detail)):
        assert float(energy(guider, picture + free).max()) < 1e-12 < float(energy(guider, picture + noise).min())
    assert float(energy(sharp, picture).max()) < 1e-12
    assert bool((energy(aimed("blurred copy", picture, blur=1.5), picture) > 1).all()), "it is sharper than that"


def test_parts_of_a_side_are_exact_means():
    picture = images()
    assert torch.allclose(made_small(picture, (5, 7)), Downscale(4).apply(picture), atol=1e-6)
    assert torch.allclose(averages(5, 2), torch.tensor([[2, 2, 1, 0, 0], [0, 0, 1, 2, 2]]).double() / 5)
    for size in ((19, 27), SMALL, (1, 1), (H, W)):
        assert torch.allclose(made_small(torch.ones(1, 1, H, W), size), torch.ones(1, 1, *size))


def test_a_blur_keeps_flat_images_and_is_a_gaussian_inside():
    assert torch.allclose(blurs(31, 2.0).sum(1), torch.ones(31).double())
    assert torch.equal(blurs(9, 0.0), torch.eye(9).double())
    spike = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    spike[..., 15, 15] = 1
    column = blurred(spike, 2.0)[0, 0].sum(1)
    place = torch.arange(31) - 15.0
    assert abs(float((column * place.square()).sum()) - 4) < 0.01


def test_what_is_missing_does_not_count():
    picture, missing = images(), torch.zeros(1, H, W)
    missing[:, 4:9, 5:20] = 1
    torn = torch.where(missing[:, None] > 0, -1.0, picture)
    for kind in COPIES:
        guider = aimed(kind, torn, missing=missing)
        assert float(energy(guider, picture).max()) < 1e-6, kind
        assert bool((energy(aimed(kind, torn), picture) > 1).all())
    none = aimed("known part", picture, missing=torch.zeros(1, 64, 64))
    assert torch.equal(none.target, aimed("known part", picture).target), "an empty mask of any size changes nothing"


def test_a_small_grey_and_torn_copy_is_all_at_once():
    picture, missing = images(dtype=torch.float64), torch.zeros(1, *SMALL)
    missing[:, 2:5, 3:6] = 1
    copy = made_small(picture, SMALL)
    guider = aimed("grey copy", copy, missing=missing)
    assert guider.target.shape == (B, 2, *SMALL)
    assert float(energy(guider, picture).max()) < 1e-12 < 1 < float(energy(guider, -picture).min())


def test_a_copy_larger_than_the_image_is_made_smaller():
    """As behind linear colours, which show a latent of an eighth of the size."""
    picture, missing = images(), torch.zeros(1, H, W)
    missing[:, :, : W // 2] = 1
    small = F.interpolate(picture, SMALL, mode="bilinear", antialias=True)
    for kind in COPIES:
        assert float(energy(aimed(kind, picture), small).max()) < 1e-6
        assert bool((energy(aimed(kind, picture, missing=missing), small.flip(3)) > 1).all())
    wide = aimed("blurred copy", blurred(picture, 4.0), blur=4.0)
    assert bool((energy(wide, small) < 0.2 * energy(aimed("blurred copy", blurred(picture, 4.0)), small)).all()), \
        "its blur is made smaller too"


@pytest.mark.parametrize("kind", COPIES)
def test_the_gradient_of_a_copy_is_the_finite_difference(kind: str):
    guider = aimed(kind, images(seed=4, dtype=torch.float64), blur=1.2)
    point, along = images(dtype=torch.float64).requires_grad_(), randn(B, 3, H, W, seed=5, dtype=torch.float64)
    slope = torch.autograd.grad(energy(guider, point, 0.7).sum(), point)[0]
    numeric = energy(guider, point + 1e-6 * along, 0.7) - energy(guider, point - 1e-6 * along, 0.7)
    assert torch.allclose((slope * along).flatten(1).sum(1), numeric / 2e-6, rtol=1e-6)


def test_a_raw_weight_of_1_is_the_posterior_of_gaussian_pixels():
    x, picture = images(dtype=torch.float64) * 2, images(seed=6, dtype=torch.float64)
    guider = replace(aimed("known part", picture), noise=0.2)
    given = guided(gaussian_denoise, [Term(guider)])(x, level(1.0, x))
    precisions = 1.0, 1 / 0.25, 1 / 0.2**2  # of the state, the prior and the copy
    assert torch.allclose(given, (x * precisions[0] + picture * precisions[2]) / sum(precisions))


def test_each_image_of_a_batch_has_its_own_copy():
    pictures, others = images(), images(seed=8)
    missing = torch.zeros(B, H, W)
    missing[1] = 1
    guider = aimed("known part", pictures, missing=missing)
    whole = energy(guider, others)
    assert whole[1] == 0 and bool((whole[[0, 2]] > 1).all())
    one = aimed("known part", pictures[:1], missing=missing)
    assert torch.allclose(energy(one, others)[0], whole[0]), "one picture, and a mask for each image"
    with says(ValueError, "for 3 images but 2 are sampled"):
        energy(guider, others[:2])


def test_copies_tell_what_they_cannot_do():
    with says(ValueError, "'red copy'", "grey copy, small copy"):
        copy_guider("red copy")
    with says(ValueError, "-1", "0 for none"):
        copy_guider("blurred copy", -1)
    with says(ValueError, "rule/layout", "missing parts", "known part"):
        without_missing(rule_guider("layout"), torch.zeros(1, 3, 8, 8), torch.zeros(1, H, W))
    with says(ValueError, "no target"):
        energy(copy_guider("grey copy"), images())
    with says(ValueError, "is a rule"):
        with_cutouts(copy_guider("grey copy"), 2)


def test_a_blur_belongs_to_the_blurred_copy_alone():
    made = [digest(guider_of_rule(kind, blur)) for kind in COPIES for blur in (0.0, 2.0)]
    assert len(set(made)) == len(COPIES) + 1
    assert guider_of_rule("colours", 2.0).name == "rule/colours"


def test_a_copy_is_shown_as_the_picture_that_it_is_of():
    assert torch.allclose(visualize(copy_guider("grey copy"), images()), luma(images()).expand(-1, 3, -1, -1), atol=1e-6)
    assert torch.allclose(visualize(aimed("small copy", images()), images()), images(), atol=1e-6)


@pytest.mark.parametrize("kind", COPIES)
def test_the_model_fills_in_what_a_copy_leaves_open(kind: str):
    """By the weight that new terms have, the picture comes nearer to the truth than any image of least change."""
    world, truth, seeds = load_world(), draw(range(5000, 5004)).image, range(4)
    missing = torch.zeros(1, 32, 32)
    missing[:, 8:22, 10:26] = 1
    shown = {"small copy": made_small(truth, (11, 13)), "blurred copy": blurred(truth, 1.5)}.get(kind, truth)
    guider = aimed(kind, shown, blur=1.5, missing=missing if kind == "known part" else None)
    x, sigmas = world.start(seeds, 12)
    plain, restored = (sample_renewing(guided(world.denoise, terms), x, sigmas, 1.0, seeds)
                       for terms in ([], [Term(guider, 0.7, normalized=True)]))
    measurement = guider.measurement(truth)
    smallest = measurement.pseudo_inverse(measurement.values, 0.05)
    off, before = (measurement.residual(each).square().mean().sqrt() for each in (restored, plain))
    assert off < 0.02 < 0.2 < before
    nearer = (restored - truth).square().mean() < 0.7 * (smallest - truth).square().mean()
    assert nearer or kind == "grey copy" and saturation(restored) > 0.5 * saturation(truth)


def saturation(image: Tensor) -> float:
    return float((image - luma(image)).square().mean().sqrt())
