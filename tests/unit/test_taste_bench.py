"""The benchmark of guiders trained on a few pictures, in miniature, with the real network where there is one."""
from pathlib import Path

import pytest
import torch
from helpers import randn
from helpers.real import guider_folder, networks

from benchmarks import taste
from benchmarks.taste import Flowers, SizeBench, TasteBench, Way, areas_of, sized_scenes, table, taste_bench
from benchmarks.tiny_world import load_world
from ppap_core import class_target, load_guider, save_trained, train_guider
from ppap_core.guiders.guider import clean

TINY = TasteBench(counts=(3,), splits=1, copies=0, ways=(Way("depth", 4, 0.5),), images=2, steps=2, scenes=64)


def test_small_scenes_have_small_objects():
    small, large = (areas_of(sized_scenes(size, 24, 0).image) for size in ("small", "large"))
    assert small.mean() < 0.7 * large.mean() and len(small) == 24


def test_embeddings_that_tell_are_told_apart():
    labels = torch.arange(5).repeat_interleave(8)
    clear = Flowers(torch.eye(5)[labels][:, None] + 0.02 * randn(40, 1, 5), labels)
    row = clear.measured(TINY, 2, 3)
    assert row["others"] == row["left_out"] == 1.0 and row["heads"] == 10


@pytest.mark.wide
def test_a_row_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(taste, "real_folder", lambda: None)
    lines: list[str] = []
    rows = taste_bench(TINY, tmp_path, lines.append)
    assert rows == taste_bench(TINY, tmp_path, lines.append) and len(list(tmp_path.iterdir())) == len(rows) == 6
    assert "head on the network for depth, 4 scenes of each" in table(rows)


@pytest.mark.wide
def test_the_head_learns_the_size():
    world = SizeBench(TINY, load_world())
    assert world.accuracy(world.head("depth", 6).guider) > 0.8


@pytest.mark.real
def test_a_real_network_tells_flowers_apart(tmp_path: Path):
    images, labels = networks().flowers(30)
    backbone = load_guider(guider_folder("tf_efficientnet_lite0"), "embedding")
    names = {networks().FLOWERS[index]: images[labels == index] for index in (0, 3)}
    trained = train_guider(backbone, {name: batch[:10] for name, batch in names.items()}, copies=0)
    save_trained(tmp_path / "flowers", trained, backbone)
    guider = load_guider(tmp_path / "flowers", find_backbone=lambda *_: backbone)
    right = [guider.predict(batch[10:], clean(batch[10:])).argmax(1) == index for index, batch in enumerate(names.values())]
    assert torch.cat(right).float().mean() > 0.75
    image = names[guider.labels[0]][:1].requires_grad_()
    aimed = guider.aim(class_target(guider, guider.labels[1]))
    assert torch.autograd.grad(aimed.energy(image, clean(image)).sum(), image)[0].abs().sum() > 0
