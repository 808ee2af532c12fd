"""The benchmark of real faces in miniature, with the real networks where there are any."""
from pathlib import Path

import pytest
import torch
from helpers import says
from helpers.real import networks

from benchmarks import face_sheet, faces
from benchmarks.distillations import Distillation, NeededExperts
from benchmarks.face_evaluation import named_expression, recognized
from benchmarks.face_readout import FaceReadout
from benchmarks.face_world import load_face_world
from benchmarks.faces import FaceBench, face_bench, plot, table, tables
from benchmarks.methods import METHODS
from benchmarks.runs import RowRun

RESULT = {"score": 0.75, "own_score": 1.0, "frechet": 9.0, "precision": 0.5, "recall": 0.5, "time_ratio": 2.0,
          "setting": {"weight": 0.3}, "wanted_frechet": 8.0}
LEARNING = {"edges": (0.1, 1.0, 10.0), "steps": 1, "batch": 2, "images": 64, "rank": 1}


def test_every_row_has_a_method_and_up_to_three_strengths():
    for each in tables(FaceBench()):
        assert len(each.by_name) == len(each.rows)
        for row in each.rows:
            assert row.method in METHODS
            assert 1 <= len(row.points) <= (1 if row.method in ("nothing", "particles") else 3)


def test_each_aim_has_a_table_of_its_own_and_the_first_a_plot():
    rows = [{"aim": aim, "row": name, **RESULT} for aim in ("happy", "sad") for name in "ab"]
    rows[3] |= {"wanted_frechet": None}
    assert table(rows).count("| faces: ") == 2
    assert table(rows).count("| 75% | 100% | 9.0 | 8.0 |") == 3 and table(rows).count("| 75% | 100% | 9.0 |  |") == 1
    assert torch.equal(plot(rows), plot(rows[:2]))


def test_an_unknown_row_is_refused(tmp_path: Path):
    with says(ValueError, "'happy: mpdg'", "happy: MPGD"):
        face_bench(FaceBench(), tmp_path, lambda line: None, ["happy: mpdg"])


@pytest.mark.real
def test_a_judge_of_another_author_agrees_on_a_smile():
    smile = networks().photographs("astronaut")[..., 30:240, 130:340].mean(1, keepdim=True)
    happy, sad = (torch.tensor([networks().EXPRESSIONS.index(name)]) for name in ("happy", "sad"))
    assert named_expression(load_face_world(), smile, happy) == (1, 1)
    assert named_expression(load_face_world(), smile, sad) == (0, 0)


@pytest.mark.real
def test_persons_are_recognized_in_the_mirror():
    networks()
    world = load_face_world("identity")
    vars(world)["persons"] = faces = world.sample(range(6), steps=6)
    wanted = torch.arange(6)
    assert all(right.all() for right in recognized(world, faces.flip(-1), wanted))
    assert not any(right.any() for right in recognized(world, faces.flip(-1), wanted.roll(1)))
    assert torch.equal(world.aimed(world.guider, wanted).target, world.plain_output(faces))


@pytest.mark.real
@pytest.mark.slow  # faces are sampled, and experts trained on them
def test_rows_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    networks()
    bench = FaceBench(images=6, search=5, unguided=8, noisy=Distillation("noisy", **LEARNING),
                      denoised=NeededExperts("denoised", **LEARNING),
                      readout=FaceReadout("noisy", **{**LEARNING, "rank": 2}))
    monkeypatch.setattr(faces, "STEPS", 3)
    names = ["happy: unguided", "happy: five experts, noisy view, trajectories",
             "happy: five experts where needed, denoised view",
             "happy: plain guider, renewed noise, through the model", "happy: readout head", "sad: MPGD"]
    first = face_bench(bench, tmp_path, lambda line: None, names)
    assert [f"{row['aim']}: {row['row']}" for row in first] == names
    assert all(row["images"] == 6 and 0 <= row["score"] <= 1 and row["frechet"] > 0 for row in first)
    assert first[1]["forwards"] == 3 and 0 < first[1]["trainable_share"] < 0.1
    monkeypatch.setattr(RowRun, "_measure", lambda *_: pytest.fail("a finished row is only read"))
    assert face_bench(bench, tmp_path, lambda line: None, names) == first


@pytest.mark.real
@pytest.mark.slow  # trains experts, and refines faces to 160 pixels
def test_the_picture_shows_one_seed_in_each_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    networks()
    monkeypatch.setattr(face_sheet, "STEPS", 3)
    monkeypatch.setattr(face_sheet, "TABLE_STEPS", 3)
    monkeypatch.setattr(face_sheet, "SEEDS", range(2))
    bench = FaceBench(denoised=NeededExperts("denoised", **LEARNING))
    picture = face_sheet.face_sheet(bench, tmp_path, lambda line: None)
    assert picture.shape == (1, 3, 3 * (160 + 26) + 4, 8 * (160 + 4) + 4)
