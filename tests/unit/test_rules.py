"""Guiders without a network: what they measure is what they say, and they steer."""
import math

import pytest
import torch
from helpers import H, W, images, level, randn, says
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tiny_world import load_world
from ppap_core.experts.bank import base_network
from ppap_core.guidance.terms import Term
from ppap_core.guiders import rules
from ppap_core.guiders.guider import Guider, clean
from ppap_core.guiders.rules import RULES, Rule, rule_guider
from ppap_core.guiders.targets import image_target, number_target
from ppap_core.tinyworld.scenes import draw
from ppap_core.viz.colors import palette

ITSELF = [name for name, rule in RULES.items() if rule.aim == "itself"]
NUMBERS = [name for name, rule in RULES.items() if rule.aim == "number"]
SYMMETRIES = {"symmetry left-right": (3,), "symmetry top-bottom": (2,), "symmetry half turn": (2, 3)}


def aimed(name: str, dtype: torch.dtype = torch.float32) -> Guider:
    """A rule aimed at something that random images are not."""
    guider = rule_guider(name)
    if RULES[name].aim == "itself":
        return guider
    target = image_target(guider, images(1, seed=9, dtype=dtype))
    return guider.aim(more(guider, target) if name in NUMBERS else target)


def more(guider: Guider, measured: Tensor) -> Tensor:
    """A number above those measured, for a rule of any range: a target to reach."""
    return number_target(guider, float(measured.mean()) + 0.1).to(measured)


def energy(guider: Guider, image: Tensor) -> Tensor:
    return guider.energy(image, clean(image))


def gradient(guider: Guider, image: Tensor) -> Tensor:
    point = image.clone().requires_grad_()
    return torch.autograd.grad(energy(guider, point).sum(), point)[0]


def flat(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((1, 3, H, W), value, dtype=dtype)


def smooth(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth images (2, 3, height, width), the same at any size."""
    numbers = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    waves = sum(torch.sin(2 * math.pi * (numbers[..., k, :1, None] * 2 * x + numbers[..., k, 1:2, None] * 2 * y
                                         + numbers[..., k, 2:3, None])) for k in range(4))
    return (waves / 2).tanh()


# Every rule

@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_a_guider_of_images_of_any_size(name):
    guider = rule_guider(name)
    assert guider.name == f"rule/{name}" and guider.task == ("number" if name in NUMBERS else "features")
    assert RULES[name].asks, "say in a few words what the rule asks for"
    assert name not in NUMBERS or guider.predict(images(), clean(images())).shape == (3, 1)
    assert (guider.target is not None) == (name in ITSELF)
    for shape in ((1, 3, 9, 11), (2, 3, 70, 130)):
        image = randn(*shape).tanh()
        assert aimed(name).energy(image, clean(image)).shape == shape[:1]
    assert list(guider.net.parameters()) == []


def test_an_unknown_rule_is_refused():
    with says(ValueError, "'colour'", "colours, layout", "smoothness"):
        rule_guider("colour")


@pytest.mark.parametrize("name", sorted(set(RULES) - set(ITSELF)))
def test_an_image_that_is_its_own_target_has_no_energy(name):
    guider, image = rule_guider(name), images()
    own = guider.aim(image_target(guider, image))
    assert torch.equal(energy(own, image), torch.zeros(3))
    assert bool((energy(own, image.flip(0).clone() * 0.5) > 0).all())
    assert torch.equal(gradient(own, image), torch.zeros_like(image))


@pytest.mark.parametrize("name", RULES)
def test_the_gradient_is_the_finite_difference(name):
    guider, image = aimed(name, torch.float64), images(dtype=torch.float64)
    direction = randn(3, 3, H, W, seed=4, dtype=torch.float64)
    slope = (gradient(guider, image) * direction).flatten(1).sum(1)
    step = 1e-7 * direction  # so small that no two colours change places in their order
    numeric = (energy(guider, image + step) - energy(guider, image - step)) / 2e-7
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_an_energy_does_not_depend_on_the_rest_of_the_batch(name):
    guider, image = aimed(name), images()
    whole = energy(guider, image)
    for i in range(3):
        torch.testing.assert_close(energy(guider, image[i:i + 1]), whole[i:i + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3])
@pytest.mark.parametrize("name", RULES)
def test_flat_images_have_a_finite_gradient(name, value):
    for dtype in (torch.float32, torch.float64):
        found = gradient(aimed(name, dtype), flat(value, dtype))
        assert bool(found.isfinite().all()) and found.abs().max() < 10


@pytest.mark.parametrize("name", sorted(set(RULES) - {"sharpness", "smoothness"}))
def test_the_gradient_of_a_pixel_ignores_the_image_size(name):
    """So that a weight found on small images is right on large ones. Two rules are about neighbouring pixels: not those."""
    guider = rule_guider(name)
    found = []
    for height, width in ((68, 92), (136, 184)):
        image, other = smooth(height, width), smooth(height, width, seed=1)
        guider = guider if name in ITSELF else guider.aim(image_target(guider, other))
        found.append(gradient(guider, image))
    if name == "seamless tiling":  # only the pixels at the border have one
        small, large = (torch.cat([each[..., 0].norm(dim=2), each[..., 0, :].norm(dim=2)]) for each in found)
        small, large = small * 2**0.5, large
    else:
        small, large = found[0], F.avg_pool2d(found[1], 2)
    assert float((small - large).norm() / small.norm()) < 0.2


def test_sharpness_and_smoothness_want_less_of_large_images():
    """A smooth picture has less to sharpen or smooth the larger it is."""
    for name in ("sharpness", "smoothness"):
        guider = rule_guider(name).aim(torch.zeros(1, 1))
        small, large = (gradient(guider, smooth(*size)).square().mean().sqrt() for size in ((68, 92), (136, 184)))
        assert large < 0.7 * small


# Numbers

HUE = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None]  # red


def halves() -> Tensor:
    image = flat(1.0)
    image[..., : W // 2] = -1
    return image


VALUES = [
    ("brightness", flat(-1), 0), ("brightness", flat(1), 1), ("brightness", flat(0), 0.5), ("brightness", flat(0.5), 0.75),
    ("brightness", halves(), 0.5),
    ("contrast", flat(0.3), 0), ("contrast", halves(), 0.5), ("contrast", halves() / 2 + 0.5, 0.25),
    ("saturation", flat(0.3), 0), ("saturation", flat(1) * HUE, 8**0.5 / 3), ("saturation", flat(0.25) * HUE, 8**0.5 / 12),
    ("sharpness", flat(0.7), 0),
]


@pytest.mark.parametrize("name, image, expected", VALUES)
def test_a_rule_measures_what_can_be_computed_by_hand(name, image, expected):
    torch.testing.assert_close(rule_guider(name).predict(image, clean(image)), torch.tensor([[expected]]).float(),
                               rtol=0, atol=1e-5)


def test_every_number_is_checked_by_hand():
    assert {name for name, *_ in VALUES} == set(NUMBERS), "give each rule of a number a row in VALUES in this file"


def test_numbers_without_a_second_dimension_are_taken(monkeypatch):
    monkeypatch.setitem(RULES, "example", Rule(lambda image: image.mean((1, 2, 3)), "number", "0 is grey"))
    guider, image = rule_guider("example"), images()
    assert guider.predict(image, clean(image)).shape == (3, 1)
    assert guider.aim(torch.tensor([[0.5]])).energy(image, clean(image)).shape == (3,)


def test_to_brighten_an_image_tints_nothing():
    found = gradient(aimed("brightness"), images())
    assert torch.equal(found, found[:, :1].expand_as(found)) and bool((found < 0).all())


def test_contrast_ignores_brightness_saturation_ignores_grey():
    image = images() * 0.4
    torch.testing.assert_close(rules.contrast(image + 0.3), rules.contrast(image))
    torch.testing.assert_close(rules.saturation(image + 0.3 * images()[:, :1]), rules.saturation(image))


def test_saturation_of_grey_images_is_0():
    assert rules.saturation(images()[:, :1].expand(-1, 3, -1, -1)).max() < 1e-5


def test_sharpness_falls_with_blur_and_is_0_for_flat_images():
    image = images()
    found = [rules.sharpness(image)]
    for _ in range(4):
        image = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        found.append(rules.sharpness(image))
    assert all(bool((after < before).all()) for before, after in zip(found, found[1:], strict=False))
    assert rules.sharpness(flat(0.7)).max() < 1e-5


def test_photographs_are_as_sharp_as_it_says():
    data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    for name in ("astronaut", "chelsea", "coffee"):
        image = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        assert 0.05 < rules.sharpness(image) < 0.1


# Colours, layout, edges

def test_colours_do_not_depend_on_their_places():
    image = images()
    shuffled = image.flatten(2)[..., torch.randperm(H * W, generator=torch.Generator().manual_seed(0))].reshape(image.shape)
    torch.testing.assert_close(rules.colors(shuffled), rules.colors(image), rtol=0, atol=1e-5)
    assert not torch.allclose(rules.layout(shuffled), rules.layout(image), atol=0.1)


def test_a_palette_is_met_by_its_own_stripes_only():
    """A palette is met by its own stripes in any order, and by no other colours."""
    words = "#1d3557, #e63946:2, #f1faee"
    guider = rule_guider("colours")
    guider = guider.aim(image_target(guider, palette(words)))
    stripes = palette("#f1faee, #e63946:2, #1d3557", size=48)
    scale = 1 / stripes[0].numel()
    assert energy(guider, stripes) * scale < 1e-6 and energy(guider, stripes.mT.contiguous()) * scale < 1e-6
    assert energy(guider, palette("#1d3557, #e63946, #f1faee", size=48)) * scale > 0.01


def test_the_distance_of_grey_images_is_wasserstein():
    """Squared distance of one-dimensional distributions: the mean squared difference of their sorted values."""
    a, b = (torch.rand(1, 1, 8, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    fine_a, fine_b = (rules.colors(x.expand(-1, 3, -1, -1), shares=128)[0, 3] / 3**0.5 for x in (a, b))
    expected = (a.flatten().sort().values - b.flatten().sort().values).square().mean()
    torch.testing.assert_close((fine_a - fine_b).square().mean(), expected)


def test_layout_is_the_image_in_cells_that_fade_into_one_another():
    image = images()[..., :16, :24]
    found = rules.layout(image)
    means = image.reshape(3, 3, 8, 2, 8, 3).mean((3, 5))
    assert found.shape == (3, 3, 8, 8) and (found - means).abs().mean() < 0.15
    torch.testing.assert_close(rules.layout(flat(0.3)), torch.full((1, 3, 8, 8), 0.3))
    ramp = torch.linspace(-1, 1, W).expand(1, 3, H, W)
    slope = rules.layout(ramp)[..., 1:-1].diff(dim=3)
    torch.testing.assert_close(slope, torch.full_like(slope, 2 * W / 8 / (W - 1)), rtol=0.05, atol=0)
    steps = gradient(aimed("layout"), F.interpolate(image, (160, 240)))
    assert steps.diff(dim=3).abs().max() < 0.2 * steps.abs().max()  # no edges of cells


def test_large_images_are_laid_out_as_small_ones_are():
    """On CUDA torch refuses to shrink by more than 94 at once."""
    photo = torch.nn.functional.interpolate(images(2, seed=3), (1100, 700), mode="bicubic")
    at_once = torch.nn.functional.interpolate(photo, (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(rules.layout(photo), at_once, rtol=0, atol=1e-6)
    small = photo[..., :320, :300]
    assert torch.equal(rules.layout(small), torch.nn.functional.interpolate(small, (8, 8), mode="bilinear", antialias=True))


def test_edges_are_where_brightness_changes_whatever_its_sign():
    image = flat(-0.5)
    image[..., W // 2:] = 0.5
    found = rules.edges(image)
    assert found.shape == (1, 1, 64, 64)
    strongest = found[0, 0].mean(0).topk(2).indices
    assert bool(((strongest - 31.5).abs() < 3).all()) and found[..., :20].max() < 0.01
    torch.testing.assert_close(rules.edges(-image), found)
    torch.testing.assert_close(rules.edges(image.mT.contiguous()), found.mT)


# Rules that need no target

@pytest.mark.parametrize("name", SYMMETRIES)
def test_a_symmetric_image_has_no_energy_and_no_gradient(name):
    image = images()
    symmetric = (image + image.flip(SYMMETRIES[name])) / 2
    assert torch.equal(energy(aimed(name), symmetric), torch.zeros(3))
    assert torch.equal(gradient(aimed(name), symmetric), torch.zeros_like(image))
    assert bool((energy(aimed(name), image) > 10).all())


@pytest.mark.parametrize("name", SYMMETRIES)
def test_half_a_gradient_step_makes_an_image_symmetric(name):
    image = images()
    step = image - gradient(aimed(name), image) / 2
    torch.testing.assert_close(step, (image + image.flip(SYMMETRIES[name])) / 2)


def test_a_periodic_image_tiles_and_a_ramp_does_not():
    """A periodic image tiles without a seam."""
    y, x = torch.meshgrid(2 * math.pi * torch.arange(60) / 60, 2 * math.pi * torch.arange(84) / 84, indexing="ij")
    periodic = torch.stack([torch.sin(x + y), torch.cos(2 * x), torch.sin(y + 1)])[None]
    ramp = torch.linspace(-1, 1, 84).expand(1, 3, 60, 84)
    tile = aimed("seamless tiling")
    assert energy(tile, periodic) < 1e-3 * energy(tile, ramp)
    assert energy(tile, periodic.roll((17, 23), dims=(2, 3))) < 1e-3 * energy(tile, ramp)
    assert energy(tile, flat(0.4)) == 0


def test_a_seam_counts_its_values_at_the_border_once():
    image = flat(0.0)
    image[..., : W // 2] = 1  # a step of 1 between the right and the left border, in each row and colour
    torch.testing.assert_close(energy(aimed("seamless tiling"), image), torch.tensor([3 * H / 2]))


def test_smoothness_is_a_quarter_of_the_total_variation():
    image = flat(0.0)
    image[..., W // 2:] = 0.8
    torch.testing.assert_close(energy(aimed("smoothness"), image) - energy(aimed("smoothness"), flat(0.0)),
                               torch.tensor([3 * H * 0.8 / 4]), rtol=2e-3, atol=0)


def test_a_flat_image_is_the_smoothest():
    assert energy(aimed("smoothness"), flat(0.3)) < 1e-3 * energy(aimed("smoothness"), images(1)) + 1
    assert gradient(aimed("smoothness"), flat(0.3)).abs().max() == 0


# Steering

STEPS, SEEDS, WEIGHT = 12, (11, 12, 13), 4.0


@pytest.fixture(scope="module")
def world():
    world = load_world("class")
    return world, world.sample(SEEDS, STEPS)


@pytest.mark.parametrize("name", RULES)
def test_one_weight_is_right_for_every_rule(world, name):
    """The weight that nodes offer: it lowers the energy of each of them clearly, and leaves images that the model knows."""
    world, plain = world
    guider = rule_guider(name)
    if name in NUMBERS:
        guider = guider.aim(more(guider, image_target(guider, plain)))
    elif name not in ITSELF:
        guider = guider.aim(image_target(guider, draw([1003]).image))
    guider = guider if guider.target is None else guider.aim(guider.target.to(world.device))
    steered = world.sample(SEEDS, STEPS, [Term(guider, WEIGHT)])
    assert (energy(guider, steered) / energy(guider, plain)).mean() < 0.7
    noise = randn(3, 3, 32, 32, seed=5).to(world.device)
    known = world.denoise(steered + 0.3 * noise, level(0.3, steered))
    assert (known - steered).square().mean().sqrt() < 0.1 and steered.abs().max() < 1.5


def test_a_rule_has_no_network_for_experts():
    with says(ValueError, "rule/colours", "no network", "without experts"):
        base_network(rule_guider("colours"))


def test_a_target_whose_shape_no_answer_has_is_told_in_words():
    guider = rule_guider("symmetry left-right")
    image = images()
    with says(ValueError, "symmetry", f"(3, {H}, {W})", "(3, 9, 14)", "size that is sampled"):
        guider.aim(image_target(guider, image[..., :9, :14])).energy(image, clean(image))
