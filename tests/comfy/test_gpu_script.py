"""The script that measures guidance on a graphics card, tried with tiny networks on the CPU."""
import json
from pathlib import Path

import pytest
import torch

from tools import gpu


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(["comfyui"])
    assert capsys.readouterr().out == "There is no CUDA device here: nothing was measured.\n"


@pytest.mark.parametrize("name", ["SD 1.5, as it starts", "SDXL, fp8 weights"])
def test_a_part_is_measured_each_way(comfy, monkeypatch: pytest.MonkeyPatch, name: str):
    pytest.importorskip("comfy.memory_management", reason="this ComfyUI has no dynamic VRAM, which the script compares")
    monkeypatch.setattr(gpu, "STEPS", 1)
    rows = gpu.measure(comfy.registered, gpu.PARTS[name], is_tiny=True)
    assert [*rows] == [*gpu.WAYS] and all(row["seconds"] > 0 for row in rows.values())


def test_parts_that_are_known_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]):
    """A failed part is a row with its error."""
    asked: list[str] = []

    def run(name: str, arguments: object) -> dict:
        asked.append(name)
        return {"error": "out of memory"}
    monkeypatch.setattr(gpu, "run_part", run)
    file = tmp_path / "gpu.json"
    known = dict.fromkeys(list(gpu.PARTS)[1:], {"unguided": {"seconds": 0.25, "peak": 3.0, "left": 0.0}})
    file.write_text(json.dumps(known))
    gpu.main(["comfyui", "--tiny", "--out", str(file)])
    printed = capsys.readouterr().out
    assert asked == ["SD 1.5, as it starts"] and json.loads(file.read_text()).keys() == gpu.PARTS.keys()
    assert "| SD 1.5, as it starts | out of memory | | | |" in printed
    assert "| SDXL, low VRAM | unguided | 0.250 | 3.00 | 0.00 |" in printed
