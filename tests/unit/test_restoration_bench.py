"""The benchmark of restored faces in miniature, with the real networks where there are any."""
from pathlib import Path

import pytest
import torch
from helpers.real import networks

from benchmarks import restoration
from benchmarks.perceptual import compare
from benchmarks.restoration import OPERATORS, Restoration, RestorationBench, hole, restoration_bench, sheet, table
from benchmarks.restorers import METHODS

SCORE = {"psnr": 21.04, "perceptual": 0.5, "setting": {"weight": 1.5}, "searched": []}


def test_a_hole_is_a_quarter_of_the_face():
    assert float(hole().mean()) == 0.75


def test_a_table_shows_every_operator():
    text = table([{"row": "ours", "measured": dict.fromkeys(OPERATORS, SCORE), "time_ratio": 1.0}])
    assert text.count("| 21.0 | 0.50 ") == text.count("weight 1.5") == 3


@pytest.mark.real
def test_nearer_images_score_better():
    networks()
    truth = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0)) - 0.5
    near, far = (compare(truth + size * truth.flip(3), truth) for size in (0.05, 0.5))
    assert (near[0] > far[0]).all() and (near[1] < far[1]).all()
    assert torch.allclose(near[0] - far[0], torch.tensor(20.0), atol=0.01)


@pytest.mark.real
@pytest.mark.slow
def test_every_method_restores_faces_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    networks()
    methods = {name: method._replace(points=method.points[:2]) for name, method in METHODS.items()}
    monkeypatch.setattr(restoration, "METHODS", methods)
    monkeypatch.setattr(restoration, "SHOWN", 1)
    bench = RestorationBench(images=2, searched=1, steps=3)
    first = restoration_bench(bench, tmp_path, lambda line: None)
    assert [row["row"] for row in first] == [*METHODS]
    assert all(5 < score["psnr"] < 40 and score["perceptual"] > 0 for row in first for score in row["measured"].values())
    assert sheet(first).shape[:2] == (1, 3)
    monkeypatch.setattr(Restoration, "_measure", lambda *inputs: pytest.fail("a finished part is only read"))
    assert restoration_bench(bench, tmp_path, lambda line: None) == first
