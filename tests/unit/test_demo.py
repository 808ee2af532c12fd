"""The demo in miniature: what a newcomer sees first works, says what it found, and goes on where it was stopped."""
import json

import pytest
from PIL import Image

from examples import demo as module
from examples.demo import demo
from ppap_core.experts.lesson import DistillConfig

ROWS = ["unguided", "plain guider, noisy view", "five experts, noisy view", "plain guider, denoised view",
        "five experts, denoised view", "five experts, through the model"]


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        # one weight, so that only the way through the model tells the last two rows apart
        for name, value in (("SAMPLES", 64), ("STEPS", 6), ("IMAGES", 4), ("TRAINING", DistillConfig(2, 4)),
                            ("THROUGH_WEIGHT", module.WEIGHT)):
            patch.setattr(module, name, value)
        yield


@pytest.mark.slow
def test_the_demo_counts_every_method_and_keeps_experts(small, tmp_path):
    lines = []
    demo(tmp_path, lines.append)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["row"] for row in results] == ROWS and all(0 <= row["score"] <= 1 for row in results)
    assert len({row["frechet"] for row in results}) == len(ROWS), "every way makes other images"
    assert (tmp_path / "results.md").read_text().count("\n") == 2 + len(ROWS)
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 8 * 32 and sheet.height > len(ROWS) * 32
    assert {file.name for file in tmp_path.glob("experts_*.safetensors")} == {"experts_noisy.safetensors",
                                                                             "experts_denoised.safetensors"}
    assert (tmp_path / "teacher_distance_noisy.png").exists() and str(tmp_path) in lines[-1]

    again = []
    demo(tmp_path, again.append)
    assert not [line for line in again if "step" in line or "samples:" in line], "nothing is made twice"
    for row, before in zip(json.loads((tmp_path / "results.json").read_text()), results, strict=True):
        assert {**row, "seconds_per_image": 0} == {**before, "seconds_per_image": 0}
