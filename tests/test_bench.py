"""The benchmark in miniature: its rows, its numbers' ranges, and that finished parts are not done again."""
import json

import pytest

from ppap_core.cli import main
from ppap_core.distill import DistillConfig
from ppap_core.tinyworld import bench as module
from ppap_core.tinyworld.bench import BenchConfig, bench, table

SMALL = BenchConfig(search=8, images=12, scenes=256, grid=(1, 4), steps=2, store=64, rank=2, supervised=2, repeats=1,
                    noisy=DistillConfig(steps=2, batch=3), denoised=DistillConfig(steps=2, batch=3))
ROWS = ["unguided", "plain_noisy", "plain_denoised", "one_expert", "experts_noisy", "experts_denoised", "supervised"]
KEYS = {"row", "judge_accuracy", "frechet", "step_ratio", "trainable_share"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return folder, bench(SMALL, folder, lambda line: None)


def test_every_way_to_guide_has_its_row(finished):
    _, rows = finished
    assert [row["row"] for row in rows] == ROWS
    for row in rows:
        assert KEYS <= row.keys()
        assert 0 <= row["judge_accuracy"] <= 1 and row["frechet"] > 0 and row["step_ratio"] > 0


def test_the_trainable_share_is_that_of_one_expert(finished):
    share = {row["row"]: row["trainable_share"] for row in finished[1]}
    assert share["unguided"] == share["plain_noisy"] == share["plain_denoised"] == 0 and share["supervised"] == 1
    assert 0 < share["experts_noisy"] == share["experts_denoised"] == share["one_expert"] < 0.2


def test_what_is_finished_is_not_done_again(finished):
    folder, rows = finished
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert bench(SMALL, folder, lambda line: None) == rows
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_the_command_prints_the_table_and_writes_the_rows(finished, monkeypatch, capsys, tmp_path):
    folder, rows = finished
    monkeypatch.setattr(module, "QUICK", SMALL)
    main(["bench", "--quick", "--folder", str(folder), "--json", str(tmp_path / "rows.json")])
    assert table(rows) in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text()) == rows


def test_a_file_that_is_not_there_is_one_sentence_and_no_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["inspect", str(tmp_path / "none.safetensors")])
    assert error.value.code == 1 and "there is no file" in capsys.readouterr().err
