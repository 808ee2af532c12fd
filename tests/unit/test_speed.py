"""Costs of a guided step: the counting against a hand count, and the table on networks of a few weights."""
import json
import sys

import pytest
import torch
from torch import nn

from benchmarks import full_size, throughput
from benchmarks import speed as module
from benchmarks.costs import gradient_of
from benchmarks.full_size import NETWORKS
from benchmarks.speed import ROWS, guided_step, in_turn, operations, plain_step, speed, table, through_step, timed
from ppap_core.cli import main
from ppap_core.guiders.guider import Guider, IgnoreSigma
from ppap_core.guiders.preprocess import Preprocess

TINY = {"block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 4,
        "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
TINY_XL = TINY | {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                  "projection_class_embeddings_input_dim": 1328}
TINY_VAE = {"block_out_channels": (16,) * 4, "norm_num_groups": 8}
PLACES = 20 * 28


@pytest.fixture(scope="module")
def tiny():
    """Networks of a few weights in the places of those of full size, and no GPU."""
    for package in ("diffusers", "timm"):
        pytest.importorskip(package, reason=f"needs the package {package}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"SIZES": {"SD 1.5": 256, "SDXL": 512}, "REDUCED": ("SD 1.5", 64), "BUDGET": 0.0}.items():
            patch.setattr(module, name, value)
        for name, value in {"NETWORKS": {"SD 1.5": TINY, "SDXL": TINY_XL}, "VAE": full_size.VAE | TINY_VAE,
                            "CLASSIFIER": "test_resnet"}.items():
            patch.setattr(full_size, name, value)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def columns(tiny):
    return speed(lambda line: None)


def by_hand(device: str):
    """(denoiser, guider, x, sigma) of convolutions only, and what one call of each network costs."""
    conv = nn.Conv2d(4, 4, 3, padding=1).to(device).requires_grad_(False)
    judge = nn.Sequential(nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(device)
    guider = Guider("tests/conv", IgnoreSigma(judge), Preprocess((20, 28), (0.5,) * 4, (0.5,) * 4), "class",
                    target=torch.tensor([3], device=device), decode=lambda latent, sigma: latent.view_as(latent))
    x, sigma = torch.ones(1, 4, 20, 28, device=device), torch.ones(1)
    return (lambda x, sigma: conv(x.view_as(x)), guider, x, sigma), (2 * 4 * 4 * 9 * PLACES, 2 * 4 * 5 * PLACES)


def test_operations_are_those_counted_by_hand():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).requires_grad_(False)
    image, expected = torch.ones(2, 3, 20, 28), 2 * 2 * PLACES * (3 * 8 * 9 + 8 * 4)
    assert operations(lambda: net(image)) == expected
    assert operations(lambda: gradient_of(lambda x: net(x.view_as(x)), image)) == 2 * expected  # the weights are frozen


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_which_networks_each_method_goes_through(device: str):
    """Guidance the guider; the other method the denoiser too."""
    parts, (denoiser, guider) = by_hand(device)
    denoise, _, x, sigma = parts
    assert operations(lambda: plain_step(denoise, x, sigma)) == denoiser
    assert operations(lambda: guided_step(*parts)) == denoiser + 2 * guider
    assert operations(lambda: through_step(*parts)) == 2 * denoiser + 2 * guider


def test_both_ways_move_the_prediction():
    parts, _ = by_hand("cpu")
    plain = plain_step(parts[0], *parts[2:])
    for step in (guided_step, through_step):
        moved = step(*parts)
        assert moved.shape == plain.shape and not torch.equal(moved, plain) and not moved.requires_grad


def test_all_take_their_turns_and_the_first_round_does_not_count():
    calls = []
    rounds = in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, budget=100.0, most=3)
    assert calls == ["a", *["a", "b"] * 4] and len(rounds) == 3 and all(costs.keys() == {"a", "b"} for costs in rounds)
    assert len(in_turn({"a": lambda: None}, budget=0.0)) == 1  # where time is short, it does


def test_what_does_not_fit_into_memory_is_said(monkeypatch):
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(module, "steps", lambda *_: {way: too_large if way == "through" else int for way in ROWS})
    column = timed("SD 1.5", 512, budget=0.0)
    assert column["ratios"]["through"] is None and column["ratios"]["plain"] == 1
    assert "linear colours | out of memory |" in table([column])


@pytest.mark.slow
def test_without_a_gpu_a_reduced_size_is_measured(columns):
    """Without a GPU, operations are counted and a reduced size is measured."""
    assert [(column["pixels"], column["measure"]) for column in columns] \
        == [(256, "operations"), (512, "operations"), (64, "operations"), (64, "seconds")]
    for column in columns[:3]:
        assert list(column["ratios"]) == list(ROWS)
        assert column["ratios"]["plain"] == 1 < column["ratios"]["colours"] < column["ratios"]["stem"]
        assert column["ratios"]["stem"] < column["ratios"]["taesd"]
    assert columns[3]["plain"] > 0 and columns[3]["ratios"].keys() == ROWS.keys() - {"vae"}
    lines = table(columns).splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] \
        == [*ROWS.values(), "target for a guided step, at most"]
    assert {line.count("|") for line in lines} == {len(columns) + 2}
    assert lines[-1].split(" | ")[1:3] == ["1.10", "1.05"] and "not measured" in lines[6]


@pytest.mark.slow
def test_going_through_the_denoiser_costs_a_second_step(columns):
    """Going back through the denoiser costs at least a second plain step."""
    for column in columns[:2]:
        assert column["ratios"]["through"] - (column["ratios"]["colours"] - 1) >= 2


def test_on_a_gpu_both_networks_are_measured_at_their_full_size(monkeypatch):
    monkeypatch.setattr(module, "SIZES", {"SD 1.5": 512, "SDXL": 1024})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    asked = {"measure": "operations", "plain": 1e12, "ratios": dict.fromkeys(ROWS, 1.0)}
    monkeypatch.setattr(module, "count_flops", lambda name, pixels: {"network": name, "pixels": pixels, **asked})
    monkeypatch.setattr(module, "timed", lambda name, pixels, device, dtype: {
        "network": name, "pixels": pixels, **asked, "measure": "seconds", "place": device, "dtype": str(dtype), "rounds": 9})
    found = [(column["network"], column["pixels"], column.get("place"), column.get("dtype")) for column in speed(print)]
    assert found == [("SD 1.5", 512, None, None), ("SDXL", 1024, None, None),
                     ("SD 1.5", 512, "cuda", "torch.float16"), ("SDXL", 1024, "cuda", "torch.float16")]


@pytest.mark.slow
def test_half_precision_is_measured_as_on_a_gpu(tiny):
    column = timed("SDXL", 64, dtype=torch.bfloat16, budget=0.0)
    assert column["dtype"] == "bfloat16" and all(ratio > 0 for ratio in column["ratios"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name, weights", [("SD 1.5", 859_520_964), ("SDXL", 2_567_463_684)])
def test_the_networks_have_as_many_weights_as_the_published(name: str, weights: int):
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    with torch.device("meta"):
        net = diffusers.UNet2DConditionModel(**NETWORKS[name])
    assert sum(weight.numel() for weight in net.parameters()) == weights


@pytest.mark.slow
def test_the_command_prints_the_table_and_writes_the_columns(columns, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(module, "speed", lambda report: columns)
    main(["bench", "speed", "--out", str(tmp_path / "columns")])
    assert table(columns) in capsys.readouterr().out
    assert json.loads((tmp_path / "columns.json").read_text()) == columns


@pytest.mark.parametrize("package", ["diffusers", "timm"])
def test_a_missing_package_is_one_sentence(package: str, tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as error:
        main(["bench", "speed"])
    assert error.value.code == 1 and f"pip install {package}>=" in capsys.readouterr().err


def test_throughput_is_measured_beside_the_floor(tiny, tmp_path):
    """All loops train, and nothing is faster than the passes that they contain, but for the noise of few rounds."""
    bench = throughput.ThroughputBench(pixels=64, batch=4, budget=0.0)
    rows = {row["way"]: row for row in throughput.throughput_bench(bench, tmp_path, lambda line: None)}
    assert rows.keys() == throughput.ROWS.keys() and rows["original"]["to_original"] == rows["floor"]["of_floor"] == 1
    assert all(row["images_a_second"] > 0 for row in rows.values()) and rows["as set"]["of_floor"] < 1.5
    assert len(throughput.table([*rows.values()]).splitlines()) == 6
