"""Tables, trainings and ablations of the benchmark, without running any."""
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from helpers import images, level, randn

import benchmarks
from benchmarks import ppap_reference, tables
from benchmarks.ablations import ABLATIONS, JointOverMarginal, Smooth
from benchmarks.bad_models import KINDS, TUNED
from benchmarks.cli import BENCHMARKS
from benchmarks.distillations import PpapReference
from benchmarks.methods import METHODS, prior_config
from benchmarks.report import Column, cached_json, markdown, write_report
from benchmarks.tables import read_table, read_training
from benchmarks.tiny_world import load_world
from benchmarks.training import Plain, options
from ppap_core import ExpertBank, ExpertSchedule, Guider, LoraSpec, base_network, with_experts
from ppap_core.guidance.training_free import METHODS as TRAINING_FREE
from ppap_core.guiders.guider import clean
from ppap_core.tinyworld.loaders import load_denoiser, load_guider
from ppap_core.tinyworld.scenes import draw

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
BUNDLED = sorted((Path(benchmarks.__file__).parent / "rows").glob("*.json"))


# Reports

def test_a_table_is_written_as_markdown():
    columns = [Column("name", "{name}", numeric=False), Column("gap", "{gap:.1%} ± {error:.1%}")]
    rows = [{"name": "a", "gap": 0.25, "error": 0.01}]
    assert markdown(columns, rows) == "| name | gap |\n|---|---:|\n| a | 25.0% ± 1.0% |\n"
    assert markdown(columns, []) == "| name | gap |\n|---|---:|\n"


def test_a_report_is_two_files(tmp_path):
    write_report(tmp_path / "new" / "table", [{"a": 1}], "| a |\n")
    assert json.loads((tmp_path / "new" / "table.json").read_text()) == [{"a": 1}]
    assert (tmp_path / "new" / "table.md").read_text() == "| a |\n"


def test_a_cached_value_is_made_once(tmp_path):
    calls = []
    values = [cached_json(tmp_path / "value.json", lambda: calls.append(1) or {"n": len(calls)}) for _ in range(2)]
    assert values == [{"n": 1}, {"n": 1}] and len(calls) == 1


@pytest.mark.parametrize("file", sorted(EVIDENCE.glob("*.json")), ids=lambda file: file.stem)
def test_the_evidence_is_written_as_the_benchmark_writes_it(file):
    results = json.loads(file.read_text())
    if isinstance(results, dict):
        text = tables.markdown(results["table"]["title"], results["table"]["task"], results["rows"])
    else:
        text = BENCHMARKS[file.stem].table(results)
    assert text == file.with_suffix(".md").read_text()


# Tables

@pytest.mark.parametrize("file", BUNDLED, ids=lambda file: file.stem)
def test_a_bundled_table_names_only_what_there_is(file):
    table = read_table(file.stem)
    assert len(table.by_name) == len(table.rows) and (not table.reference or table.reference in table.by_name)
    for row in table.rows:
        assert row.method in METHODS and row.ablation in {"", *ABLATIONS} and row.points
        if row.method == "autoguidance":
            assert row.settings["bad"] in KINDS and isinstance(row.settings["told"], bool)
            assert row.settings.get("good", TUNED) == TUNED
        if row.method == "prior":
            assert prior_config(**row.settings)
        for point in row.points if row.method in TRAINING_FREE else ():
            replace(TRAINING_FREE[row.method], **row.settings, **point)


@pytest.mark.parametrize("file", BUNDLED, ids=lambda file: file.stem)
def test_the_trainings_of_a_table_are_read_and_named_again(file):
    for given in (row.get("training", {}) for row in json.loads(file.read_text())["rows"]):
        training = read_training(given)
        assert {**given, **options(training)} == given and read_training(options(training)) == training
        if "edges" in given:
            assert training.schedule == ExpertSchedule(tuple(given["edges"]))


def test_a_training_is_named_by_what_differs_from_defaults():
    assert options(read_training({"view": "noisy", "edges": [1, 2], "steps": 1000})) == {"view": "noisy", "edges": [1, 2]}
    assert options(Plain()) == {} and options(PpapReference(steps=400)) == {"original": True, "steps": 400}
    assert options(read_training({"labels": True, "whole": True, "edges": [1, 2]})) \
        == {"labels": True, "whole": True, "edges": [1, 2]}


def test_an_unknown_training_option_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        read_training({"edges": [1, 2], "temprature": 0.5})


def test_the_levels_of_the_original_are_those_of_its_schedule():
    sigmas = ppap_reference.ddim_sigmas(25)
    share = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert len(sigmas) == 26 and sigmas[-1] == 0
    torch.testing.assert_close(1 / (1 + sigmas[:-1].double() ** 2), share[torch.arange(960, -1, -40)], rtol=1e-5, atol=0)


# Ablations

def test_softplus_takes_the_place_of_every_relu():
    guider, picture = load_guider("class"), draw(range(4)).image
    with torch.no_grad():
        plain, soft, sharp = (judge.predict(picture, clean(picture)) for judge in
                              (guider, ABLATIONS["softplus"](guider), replace(guider, net=Smooth(guider.net, 1e4))))
        assert not torch.allclose(plain, soft, atol=0.1) and torch.allclose(plain, sharp, atol=1e-2)
        assert torch.equal(plain, guider.predict(picture, clean(picture))), "only inside"


def test_elucd_with_equal_temperatures_is_the_cross_entropy():
    guider, picture = load_guider("class").aim(torch.tensor([2])), draw(range(4)).image
    values = {field.name: getattr(guider, field.name) for field in fields(Guider)}
    plain = guider.energy(picture, clean(picture))
    assert torch.allclose(JointOverMarginal(**values, marginal=1.0).energy(picture, clean(picture)), plain, atol=1e-5)
    assert not torch.allclose(JointOverMarginal(**values).energy(picture, clean(picture)), plain, atol=0.1)
    assert ABLATIONS["elucd"](guider).aim(torch.tensor([1])).marginal == 0.5, "aiming keeps the temperatures"


def different_experts() -> Guider:
    guider = load_guider("class")
    bank = ExpertBank(base_network(guider), ExpertSchedule((0.1, 1.0, 10.0)), LoraSpec(2, 2.0))
    for index in range(2):
        weights = bank.weights(index)
        bank.load(index, {name: 0.05 * randn(*tensor.shape, seed=index) for name, tensor in weights.items()})
    return with_experts(guider, bank)


@pytest.mark.slow
def test_blended_experts_meet_on_the_edge():
    """Away from it they are themselves."""
    guider, picture = different_experts(), images(2)
    blended = ABLATIONS["blended"](guider)
    with torch.no_grad():
        for sigma in (level(0.7, picture), level(1.5, picture)):
            assert torch.equal(blended.predict(picture, sigma), guider.predict(picture, sigma))
        below, above = (guider.predict(picture, level(sigma, picture)) for sigma in (0.999, 1.0))
        assert not torch.allclose(below, above, atol=1e-3)
        for sigma in (0.9999, 1.0):
            assert torch.allclose(blended.predict(picture, level(sigma, picture)), (below + above) / 2, atol=1e-3)


def test_averaging_is_the_mean_over_the_same_noise_each_time():
    guider, picture = load_guider("class"), images(2)
    averaged = ABLATIONS["averaged"](guider)
    with torch.no_grad():
        first, second, plain = (judge.predict(picture, clean(picture)) for judge in (averaged, averaged, guider))
    assert torch.equal(first, second) and not torch.allclose(first, plain, atol=1e-3)
    averaged.net.std = 0.0
    with torch.no_grad():
        assert torch.allclose(averaged.predict(picture, clean(picture)), plain, atol=1e-5)


def test_the_denoiser_passes_gradients_only_where_asked():
    world = load_world().with_model(load_denoiser())
    x, sigma = randn(1, 3, 32, 32), torch.ones(1)
    assert not world.denoise(x, sigma).requires_grad and world.denoise(x.requires_grad_(True), sigma).requires_grad
