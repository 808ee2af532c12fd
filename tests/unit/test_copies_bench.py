"""The benchmarks of copies and of exact rules in miniature."""
from pathlib import Path

import pytest
import torch
from helpers import randn
from torch import nn

from benchmarks import copies, exact
from benchmarks.copies import LEAST, WAYS, CopiesBench, copies_bench, copy_of
from benchmarks.exact import PIXEL_WAYS, ExactBench, exact_bench, pad_circularly, shifted_passes
from ppap_core.guiders.copies import COPIES
from ppap_core.tinyworld.scenes import draw


def quiet(line: str) -> None:
    pass


@pytest.mark.wide
def test_every_copy_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench = CopiesBench(pixels=2, latents=1, steps=3)
    rows = copies_bench(bench, tmp_path, quiet, ["pixels"])
    assert [(row["copy"], row["way"]) for row in rows] == [(kind, way) for kind in COPIES for way in (LEAST, *WAYS)]
    text = copies.table(rows)
    assert text.count("| pixels |") == len(rows) and all(10 < row["psnr"] < 45 and 0 <= row["right"] <= 1 for row in rows)
    finished = [row["off"] for row in rows if row["way"] == "in the prediction, and finished"]
    assert max(finished) < 1e-3
    monkeypatch.setattr(copies, "row", lambda *inputs: pytest.fail("a finished part is only read"))
    assert copies_bench(bench, tmp_path, quiet, ["pixels"]) == rows


def test_copies_are_damaged_pictures():
    picture = draw([3]).image
    sizes = {kind: tuple(copy_of(kind, picture).target.shape[1:]) for kind in COPIES}
    assert sizes == {"grey copy": (2, 32, 32), "small copy": (4, 6, 6), "blurred copy": (4, 32, 32),
                     "known part": (4, 32, 32)}
    assert float(copy_of("known part", picture).target[:, -1].mean()) == 0.75


@pytest.mark.wide
def test_exact_rules_are_measured_in_pixels(tmp_path: Path):
    rows = exact_bench(ExactBench(images=4, steps=2, repeats=1), tmp_path, quiet, ["pixels"])
    assert [row["way"] for row in rows] == [*PIXEL_WAYS, "plain", "ours", "plain", "ours"]
    assert all(row["finished"] < 1e-6 for row in rows if row["rule"] != "colours")
    assert "| pixels | colours |" in exact.table(rows)


def test_padding_makes_convolutions_tile_and_is_taken_back():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    image = randn(1, 3, 8, 10)
    with torch.no_grad():
        before = net(image)
        pad_circularly(net, True)
        assert torch.allclose(net(image.roll((3, 4), (2, 3))), net(image).roll((3, 4), (2, 3)), atol=1e-6)
        pad_circularly(net, False)
        assert torch.equal(net(image), before)


def test_shifted_passes_weigh_to_1_and_hide_the_border():
    x, sigma = randn(2, 3, 8, 8), torch.ones(2)
    assert torch.allclose(shifted_passes(lambda x, sigma: x, x, sigma), x, atol=1e-6)
    border = torch.zeros(8, 8)
    border[0], border[:, 0] = 1, 1
    seen = shifted_passes(lambda x, sigma: border.expand_as(x), x, sigma)
    assert float(seen[..., 0, 0].max()) < 0.1 and float(seen[..., 4, 4].max()) < 0.1
