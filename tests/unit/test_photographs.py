"""The benchmark of photographs under noise in miniature, with a real network where there is one."""
from pathlib import Path

import pytest
import torch
from helpers.real import networks

from benchmarks import photographs
from benchmarks.photographs import (
    LEVELS,
    PhotographBench,
    Photographs,
    accuracies,
    learners,
    noisy_pairs,
    other_classes,
    photograph_bench,
    plot,
    table,
)
from ppap_core.noise import NoiseInterval

LINE = {str(level): 0.5 for level in LEVELS}


def test_photographs_are_under_noise_of_their_interval():
    images = torch.linspace(-1, 1, 4 * 3 * 5 * 7).reshape(4, 3, 5, 7)
    pairs = noisy_pairs(images, NoiseInterval(0.5, 1.0), torch.Generator().manual_seed(0))
    assert all(0.5 <= sigma < 1 for sigma in pairs.sigma)
    clean = pairs.inputs * (1 + pairs.sigma**2).sqrt().reshape(-1, 1, 1, 1)
    noise = (clean - pairs.images).flatten(1).std(1)
    assert torch.allclose(noise, pairs.sigma, rtol=0.3)
    assert all(any(torch.equal(image, other) for other in (own, own.flip(-1)))
               for image, own in zip(pairs.images, images, strict=True))


def test_no_class_is_learned_and_tested_in_one_half():
    classes = torch.tensor([3, 3, 5, 7, 7, 9])
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 3, 2, 2)
    halves = other_classes(Photographs(images, classes, images + 10, classes))
    assert all(not {*half.learned_classes.tolist()} & {*half.classes.tolist()} for half in halves)
    assert sorted(half.tested[i, 0, 0, 0] for half in halves for i in range(len(half.tested))) == list(range(10, 16))
    assert [len(half.learned) for half in halves] == [8, 4], "all photographs of the learned classes"


def test_a_class_counts_among_all_and_among_the_tested_ones():
    logits = torch.tensor([[9.0, 1, 5, 0, 0, 0, 0, 0], [0, 9, 8, 7, 6, 5, 4, 3], [0, 9, 8, 7, 6, 5, 4, 3]])
    found = accuracies(logits, torch.tensor([2, 3, 7]))
    assert found == pytest.approx({"top_1": 0.0, "top_5": 2 / 3, "among_tested": 1 / 3})


def test_a_table_and_a_plot_show_every_row():
    rows = [{"row": name, "top_1": LINE, "top_5": LINE, "among_tested": LINE, "trainable_share": 0.02,
             "training_minutes": 3.0} for name in "ab"]
    assert table(rows).count("50%, 50%") == 12 and plot(rows).shape[:2] == (1, 3)


@pytest.mark.real
@pytest.mark.slow
def test_learners_are_trained_once_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    networks()
    bench = PhotographBench(edges=(0.1, 0.5, 1.0), steps=1, batch=2, photographs=2)
    rows = {name: learner for name, learner in learners(bench).items() if not learner.whole}
    monkeypatch.setattr(photographs, "LEVELS", (0.0, 0.5))
    monkeypatch.setattr(photographs, "learners", lambda bench: rows)
    first = photograph_bench(bench, tmp_path, lambda line: None)
    assert [row["row"] for row in first] == [*rows] and all(0 <= row["top_1"]["0.5"] <= 1 for row in first)
    assert first[1]["trainable_share"] < 0.05 and first[0]["trainable_share"] == 0
    monkeypatch.setattr(photographs.LearnerRun, "train", lambda self: pytest.fail("a finished row is only read"))
    assert photograph_bench(bench, tmp_path, lambda line: None) == first
