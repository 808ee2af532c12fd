"""The last step: images that meet a rule exactly, by the smallest change where that is defined."""
import pytest
import torch
from helpers import B, H, W, images, says
from torch import Tensor

from ppap_core.guiders import rules
from ppap_core.guiders.copies import COPIES, CopyGuider, averages, blurs, copy_guider, luma, without_missing
from ppap_core.guiders.exact import WAYS, filled_in, meet, off_by, periodic_part
from ppap_core.guiders.guider import Guider
from ppap_core.guiders.rules import RULES, rule_guider
from ppap_core.guiders.targets import image_target
from ppap_core.tinyworld.scenes import draw
from ppap_core.viz.colors import palette

NUMBERS = {"brightness": 0.6, "contrast": 0.2, "saturation": 0.1}
SYMMETRIES = [name for name in RULES if name.startswith("symmetry")]
LINEAR = ["seamless tiling", *SYMMETRIES, "grey copy", "small copy", "known part"]


def torn() -> Tensor:
    missing = torch.zeros(1, H, W)
    missing[:, 5:12, 8:20] = 1
    return missing


def aimed(name: str, dtype: torch.dtype = torch.float32, side: int = W) -> Guider:
    """A rule aimed at another image, which is small, blurred or torn for such copies. side: columns and rows at most."""
    if name in NUMBERS:
        return rule_guider(name).aim(torch.full((1, 1), NUMBERS[name], dtype=dtype))
    if name in COPIES:
        picture = images(1, seed=9, dtype=dtype)[..., :side, :side] * 0.5
        if name == "small copy":
            picture = by_lines(picture, averages(picture.shape[2], 7), averages(picture.shape[3], 9))
        if name == "blurred copy":
            picture = by_lines(picture, blurs(picture.shape[2], 1.5), blurs(picture.shape[3], 1.5))
        guider = copy_guider(name, 1.5)
        target = image_target(guider, picture)
        return guider.aim(without_missing(guider, target, torn()[:, :side, :side]) if name == "known part" else target)
    guider = rule_guider(name)
    return guider if guider.target is not None else guider.aim(image_target(guider, images(1, seed=9, dtype=dtype)))


def by_lines(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return rows.to(image) @ image @ columns.to(image).mT


def every_rule() -> list[str]:
    return [name.removeprefix("rule/") for name in WAYS]


@pytest.mark.parametrize("smallest", [False, True], ids=["spread", "smallest"])
@pytest.mark.parametrize("name", every_rule())
def test_a_rule_is_met_exactly_and_within_the_range(name: str, smallest: bool):
    guider, before = aimed(name), images()
    after = meet(guider, before, smallest=smallest)
    assert after.shape == before.shape and after.dtype == before.dtype and float(after.abs().max()) <= 1
    limit = {"colours": 0.005, "blurred copy": 0.02}.get(name, 1e-6)  # what is not in closed form
    assert float(off_by(guider, after).max()) < limit < 0.03 < float(off_by(guider, before).min())


@pytest.mark.parametrize("name", every_rule())
def test_a_strength_of_0_leaves_every_bit(name: str):
    before = images()
    assert torch.equal(meet(aimed(name), before, strength=0.0), before)
    half, whole = (meet(aimed(name), before, strength=strength) for strength in (0.5, 1.0))
    assert torch.allclose(half, (before + whole) / 2, atol=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_the_smallest_change_is_the_projection(name: str):
    """Against a dense least-squares solution of all that the rule asks, where no colour leaves its range."""
    guider, small = aimed(name, torch.float64, 12), images(1, dtype=torch.float64)[..., :12, :12] * 0.3
    after = meet(guider, small, smallest=True)
    basis = torch.eye(small[0].numel(), dtype=torch.float64).view(-1, *small.shape[1:])

    def asks(each: Tensor) -> Tensor:
        if isinstance(guider, CopyGuider):
            return -guider.measurement(each).residual(each).flatten(1)
        return guider.predict(each, torch.zeros(len(each))).flatten(1)
    offset = asks(torch.zeros_like(small))
    matrix = torch.cat([asks(part) for part in basis.split(256)]) - offset
    expected = small.flatten(1) - torch.linalg.lstsq(matrix.mT, asks(small).mT, driver="gelsd").solution.mT
    assert torch.allclose(after.flatten(1), expected, atol=1e-6)


def test_a_spread_change_is_not_seen():
    """No tint, no blocks, no edge around what is missing, no line at the border."""
    image = draw([5], size=64).image
    grey = copy_guider("grey copy")
    grey = grey.aim(image_target(grey, image * 0.8))
    spread, smallest = (meet(grey, image, smallest=each) - image for each in (False, True))
    assert float((spread - luma(spread)).abs().max()) < 1e-5 < float((smallest - luma(smallest)).abs().max())
    small = copy_guider("small copy")
    small = small.aim(image_target(small, torch.nn.functional.avg_pool2d(draw([6], size=64).image, 16)))
    spread, smallest = (meet(small, image, smallest=each) - image for each in (False, True))
    assert float(spread.diff(dim=3).abs().max()) < 0.6 * float(smallest.diff(dim=3).abs().max())
    tile = rule_guider("seamless tiling")
    ramp = torch.linspace(-0.8, 0.8, 64).expand(1, 3, 64, 64)
    spread, smallest = (meet(tile, ramp, smallest=each).diff(dim=3).abs().max() for each in (False, True))
    assert float(spread) < 0.3 * float(smallest)


def test_the_periodic_part_keeps_mean_and_periodic_images():
    y, x = torch.meshgrid(torch.arange(60) / 60, torch.arange(84) / 84, indexing="ij")
    wave = torch.stack([(6.28318530718 * (x + y)).sin(), (6.28318530718 * 2 * x).cos(), x * 0])[None].double()
    assert torch.allclose(periodic_part(wave), wave, atol=0.01)
    image = images(dtype=torch.float64)
    part = periodic_part(image)
    assert torch.allclose(part.mean((2, 3)), image.mean((2, 3)))
    inside = [torch.nn.functional.conv2d(each[:, :1], each.new_tensor([[[[0, 1, 0], [1, -4, 1], [0, 1, 0]]]]))
              for each in (image, part)]
    assert torch.allclose(inside[0][..., 2:-2, 2:-2], inside[1][..., 2:-2, 2:-2], atol=0.05), "it is as sharp inside"


def test_what_is_not_known_is_taken_from_around_it():
    known = 1 - torn()[:, None]
    values = torch.full((B, 2, H, W), 0.7) * known
    assert torch.allclose(filled_in(values, known), torch.full((B, 2, H, W), 0.7), atol=1e-6)
    assert torch.equal(filled_in(values, torch.ones_like(known)), values)
    assert torch.equal(filled_in(values * 0, known * 0), values * 0), "nothing is known anywhere"


def test_a_palette_is_taken_over():
    guider, image = rule_guider("colours"), draw([3], size=48).image
    guider = guider.aim(image_target(guider, palette("#1d3557:5, #ffd166", size=64)))
    after = meet(guider, image)
    assert float(off_by(guider, after)) < 0.1 * float(off_by(guider, image))
    assert float(torch.corrcoef(torch.stack([rules.grey(image).flatten(), rules.grey(after).flatten()]))[0, 1].abs()) > 0.3


def test_a_guider_that_is_no_rule_is_told_in_words():
    with says(ValueError, "rule/layout", "only approached by guidance", "grey copy"):
        meet(aimed("layout"), images())
