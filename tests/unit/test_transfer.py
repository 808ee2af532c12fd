"""The benchmark of experts that travel, in miniature: what is measured, and how a table compares it."""
from pathlib import Path

import pytest
import torch

from benchmarks import transfer
from benchmarks.families import FAMILIES, Family
from benchmarks.transfer import (
    NOTHING,
    PLAIN,
    WAYS,
    Cell,
    TransferBench,
    TransferRun,
    gain,
    plot,
    share,
    table,
    transfer_bench,
)
from ppap_core import DistillConfig

MINIATURE = TransferBench(images=2, batch=2, store=64, experts=2, rank=1, training=DistillConfig(steps=1, batch=2))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]()


def rows(family: str, models: tuple[str, ...]) -> list[dict]:
    """A row for each measurement: the plain guider is right once of four times, experts twice, those of others thrice."""
    made = []
    for model in models:
        made.append({"model": model, "guide": NOTHING, "way": "", "right": "0000", "second": "0000", "frechet": 40.0})
        for way in WAYS:
            digits = {PLAIN: "1000", **{f"experts of {each}": "1100" if each == model else "1110" for each in models}}
            made += [{"model": model, "guide": guide, "way": way, "right": right, "second": right, "frechet": 9.0}
                     for guide, right in digits.items()]
    return [{"family": family, **row} for row in made]


def test_shares_and_gains_have_standard_errors():
    assert share("1100") == (0.5, 0.25)
    assert gain(["1100"], ["1100"]) == (0.0, 0.0) and gain(["1111"], ["0000"]) == (1.0, 0.0)
    mean, error = gain(["1100"], ["0110"])
    assert mean == 0.0 and error == pytest.approx(0.5**0.5 / 2)
    assert gain(["1100"] * 2, ["0110"] * 2) == (mean, error), "two judges of one image are no two images"


def test_a_table_compares_with_the_models_own_experts():
    text = table(rows("latents", ("flow", "eps")))
    lines = [line for line in text.splitlines() if line.startswith("| latents")]
    assert len(lines) == 8 and all(line.count("|") == 12 for line in lines)
    assert "| latents | flow | experts of eps | 75.0 ± 21.7 | 75.0 ± 21.7 | 9.0 | +25.0 ± 21.7 |" in text
    assert "| latents | eps | experts of eps | 50.0 ± 25.0 | 50.0 ± 25.0 | 9.0 |  |" in text
    assert "| latents | eps | nothing | 0.0 ± 0.0 | 0.0 ± 0.0 | 40.0 | -50.0 ± 25.0 |" in text
    assert "| latents | eps | experts of eps |" in table(rows("latents", ("flow", "eps"))[:-1]), "what lacks is left out"
    assert plot(rows("latents", ("flow", "eps"))).shape[:2] == (1, 3)


def test_models_predict_images_and_pass_gradients(family: Family):
    """At low noise the prediction of every model is near its input, whatever the kind of the model."""
    x = family._sample(next(iter(family.models.values())).denoise, torch.tensor([2.0, 0.5, 0.0]), range(2))
    assert x.shape[1] == 3 and x.abs().max() <= 1
    for name, model in family.models.items():
        sigmas = model.sigmas
        assert sigmas[-1] == 0 and (sigmas[:-1] > sigmas[1:]).all(), name
        state = torch.randn(2, *family.shape, generator=torch.Generator().manual_seed(0)).mul(family.sigma_data)
        point = state.requires_grad_(True)
        denoised = model.denoise(point, torch.full((2,), 0.05))
        assert (denoised - point).abs().mean() < 0.3 * family.sigma_data, name
        assert torch.autograd.grad(denoised.sum(), point)[0].abs().max() > 0, name


def test_experts_of_few_steps_guide_their_own_model_only(tmp_path: Path):
    run = TransferRun(MINIATURE, FAMILIES["latents"](), tmp_path, print)
    cells = list(run.cells())
    assert Cell("flow", "experts of eps", "through the model") in cells and Cell("eps", NOTHING, "") in cells
    assert {cell.model for cell in cells if cell.guide == "experts of flow in 8 steps"} == {"flow in 8 steps"}
    assert {cell.model for cell in run.cells(["eps"])} == {"eps"}
    [term] = run.terms(Cell("eps", PLAIN, "through the model"), torch.tensor([3]))
    assert term.backprop_through_model and term.normalized and term.weight == WAYS["through the model"]
    assert not run.terms(Cell("eps", NOTHING, ""), torch.tensor([3]))


@pytest.mark.wide
def test_every_pixel_model_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "FAMILIES", {"pixels": FAMILIES["pixels"]})
    monkeypatch.setattr(transfer, "SCENES", 64)
    found = transfer_bench(MINIATURE, tmp_path, lambda line: None)
    assert len(found) == 2 * (1 + 2 * 3) and all(len(row["right"]) == 2 and row["frechet"] > 0 for row in found)
    monkeypatch.setattr(TransferRun, "_measure", lambda *inputs: pytest.fail("a finished part is only read"))
    assert transfer_bench(MINIATURE, tmp_path, lambda line: None) == found
    assert len(transfer_bench(MINIATURE, tmp_path, lambda line: None, ["sibling"])) == 7
