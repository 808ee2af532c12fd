"""The benchmark in miniature: rows are measured, trained guiders are kept, and finished parts are not done again."""
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import images, level, randn, says

from benchmarks import bad_models, ppap_reference, runs, tables
from benchmarks import rules as rules_bench
from benchmarks.bad_models import BUNDLED, DAMAGES, QUARTER, TUNED, LoraModel, load_bad_model
from benchmarks.methods import METHODS, Batch, autoguidance, conditional_denoiser, in_bfloat16
from benchmarks.runs import run_table
from benchmarks.tables import Row, read_table, read_training
from benchmarks.tiny_world import NOISE, generate_store, load_world
from benchmarks.training import Trained, Workspace
from ppap_core import (
    ExpertBank,
    LoraSpec,
    PriorConfig,
    PriorObjective,
    SampleStore,
    Term,
    autoguided,
    base_network,
    optimize_images,
)
from ppap_core.cli import main
from ppap_core.experts.samples import from_uint8
from ppap_core.tinyworld.loaders import load_denoiser
from ppap_core.tinyworld.scenes import draw

EDGES = [0.05, 1.0, 10.0]
SHORT = {"edges": EDGES, "steps": 2, "batch": 4}
TWO = {**SHORT, "images": 64}
SMALL = {
    "title": "small", "task": "class", "images": 8, "cost_images": 4, "search": 4, "steps": 4, "scenes": 64,
    "reference": "labels", "points": [{"weight": 4, "balanced": False}, {"weight": 0.5, "balanced": True}],
    "rows": [{"row": "unguided", "way": "nothing"},
             {"row": "unguided, other scenes", "way": "nothing", "scenes_from": 5000},
             {"row": "plain"},
             {"row": "elucd", "variant": "elucd", "points": [{"weight": 4}]},
             {"row": "labels", "training": {**SHORT, "view": "noisy", "labels": True, "whole": True},
              "points": [{"weight": 4}]},
             {"row": "experts", "training": TWO, "points": [{"weight": 4}]},
             {"row": "experts, two steps", "steps": 2, "training": TWO, "points": [{"weight": 4}]},
             {"row": "dps", "way": "dps", "points": [{"rho": 0.1}]},
             {"row": "mpgd", "way": "mpgd", "points": [{"mu": 0.1}]},
             {"row": "told", "way": "told", "points": [{"weight": 2}]},
             {"row": "auto", "way": "autoguidance", "settings": {"bad": "dropout", "told": False},
              "points": [{"weight": 2}]}]}


def silent(line: str) -> None:
    """Report nothing."""


@pytest.fixture(scope="module")
def small_table(tmp_path_factory):
    """A folder with the small table in place of the bundled ones."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "small.json").write_text(json.dumps(SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "TABLES", folder)
        for name, value in (("COST_REPEATS", 1), ("COMPARED", 16)):
            patch.setattr(runs, name, value)
        yield folder


@pytest.fixture(scope="module")
def finished(small_table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return folder, run_table(read_table("small"), folder, silent)


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["row"]: row for row in rows}


@pytest.mark.slow
def test_every_row_is_measured_and_in_range(finished):
    _, rows = finished
    assert [row["row"] for row in rows] == [row["row"] for row in SMALL["rows"]]
    for row in rows:
        assert row["images"] == 8 and row["frechet"] > 0 and row["time_ratio"] > 0 and math.isfinite(row["energy"])
        assert all(0 <= row[name] <= 1 for name in ("score", "second_score", "own_score", "precision", "recall"))


@pytest.mark.slow
def test_a_search_measures_every_point_and_takes_the_best(finished):
    rows = by_name(finished[1])
    assert [result["setting"] for result in rows["plain"]["searched"]] == SMALL["points"]
    best = max(rows["plain"]["searched"], key=lambda result: result["score"])
    assert rows["plain"]["setting"] == best["setting"] and best["images"] == 4
    assert rows["dps"]["searched"] == [] and rows["dps"]["setting"] == {"rho": 0.1}


@pytest.mark.slow
def test_passes_share_and_images_are_counted(finished):
    rows = by_name(finished[1])
    assert [rows[name]["forwards"] for name in ("unguided", "plain", "dps", "mpgd", "told")] == [4, 4, 4, 4, 8]
    assert rows["experts, two steps"]["forwards"] == 2
    assert [rows[name]["backwards"] for name in ("unguided", "plain", "dps", "mpgd")] == [0, 0, 4, 0]
    assert rows["plain"]["trainable_share"] == 0 and rows["labels"]["trainable_share"] == 1
    assert 0 < rows["experts"]["trainable_share"] < 0.03, "rank 2 is what the table promises"
    assert rows["experts"]["training_images"] == 64 and rows["labels"]["training_images"] == 2 * 2 * 4


@pytest.mark.slow
def test_other_scenes_show_the_spread(finished):
    rows = by_name(finished[1])
    assert rows["unguided"]["frechet"] != rows["unguided, other scenes"]["frechet"]


@pytest.mark.slow
def test_a_row_of_fewer_steps_has_the_same_experts(finished):
    folder, rows = finished
    few, many = (by_name(rows)[name] for name in ("experts, two steps", "experts"))
    assert few["agreement"] == many["agreement"] and few["frechet"] != many["frechet"]
    assert len(list(folder.glob("class_*"))) == 2, "experts and labels"


@pytest.mark.slow
def test_the_reference_agrees_with_itself(finished):
    rows = by_name(finished[1])
    assert max(rows["labels"]["agreement"].values()) < 1e-6 < min(rows["plain"]["agreement"].values())
    assert "agreement" not in rows["dps"] and "agreement" not in rows["unguided"]


@pytest.mark.slow
def test_finished_parts_are_not_done_again(finished):
    folder, rows = finished
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    lines = []
    assert run_table(read_table("small"), folder, lines.append) == rows and not lines
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}


@pytest.mark.slow
def test_other_noise_levels_are_measured_anew(finished, tmp_path):
    folder, rows = finished
    table = read_table("small")
    (tmp_path / "measured").mkdir()
    for file in (folder / "measured").iterdir():
        (tmp_path / "measured" / file.name).write_bytes(file.read_bytes())
    first = table.rows[0]
    [other] = run_table(replace(table, rows=(first,), schedule="ddim", reference=""), tmp_path, silent)
    assert other["frechet"] != by_name(rows)[first.name]["frechet"]


@pytest.mark.slow
def test_a_row_alone_is_the_row_of_the_whole_table(finished):
    folder, rows = finished
    [alone] = run_table(read_table("small"), folder, silent, ["mpgd"])
    assert alone == by_name(rows)["mpgd"]


@pytest.mark.slow
def test_the_command_writes_table_plot_and_rows(finished, capsys, tmp_path):
    folder, rows = finished
    main(["bench", "small", "--folder", str(folder), "--out", str(tmp_path / "evidence")])
    written = json.loads((tmp_path / "evidence.json").read_text())
    assert written["rows"] == rows and written["table"] == SMALL
    text = (tmp_path / "evidence.md").read_text()
    assert text in capsys.readouterr().out and text.count("\n") == 2 + len(rows) and "| mu 0.1 |" in text
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("evidence.png", "evidence_agreement.png"))


def test_an_unknown_table_is_one_sentence(small_table, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench", "smal", "--folder", str(tmp_path)])
    assert error.value.code == 1 and "there is no table 'smal': expected one of small" in capsys.readouterr().err


def test_an_unknown_row_is_refused_before_any_is_run(small_table, tmp_path):
    with says(ValueError, "'mpdg'", "unguided; unguided, other scenes; plain"):
        run_table(read_table("small"), tmp_path / "bench", silent, ["mpgd", "mpdg"])
    assert not (tmp_path / "bench").exists()


def test_a_missing_file_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["inspect", str(tmp_path / "none.safetensors")])
    assert error.value.code == 1 and "there is no file" in capsys.readouterr().err


# Methods

def sampled(world, row: Row, setting: dict, numbers: list[int], steps: int, tmp_path) -> torch.Tensor:
    """Images of a row for scenes of these numbers."""
    seeds = [NOISE + number for number in numbers]
    batch = Batch(draw(numbers), seeds, *world.start(seeds, steps))
    return METHODS[row.method](row, Workspace(world, tmp_path, steps, silent)).sample(batch, setting)


def test_the_noise_for_a_scene_is_not_of_its_own_generator(tmp_path):
    world, inputs = load_world(), []
    recorded = world.with_model(lambda x, sigma: inputs.append(x) or 0 * x)
    sampled(recorded, Row("unguided", "nothing"), {}, [7], 1, tmp_path)
    own = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(7))
    assert not torch.allclose(inputs[0][0] / 80, own, atol=1e-3)


def test_classifier_free_guidance_leaves_the_unconditional_model():
    """Weight 1 is the conditional model alone; outside the interval it is too."""
    world, given = load_world(), torch.zeros(2, 16)
    given[0, 3] = given[1, 5] = 1
    x, sigma = 2 * randn(2, 3, 32, 32), torch.full((2,), 2.0)
    with torch.no_grad():
        models = [conditional_denoiser(world, given), conditional_denoiser(world, 0 * given)]
        one, none = (model(x, sigma).float() for model in models)
        two, outside = (autoguided(*models, autoguidance(2, **window))(x, sigma) for window in ({}, {"low": 3.0}))
    assert torch.allclose(two, 2 * one - none, atol=0.02) and not torch.allclose(one, none, atol=0.02)
    assert torch.equal(outside, one)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("given", [[], [torch.eye(16)[:2]]], ids=["unconditional", "conditional"])
def test_a_damaged_denoiser_is_worse_and_deterministic(kind, given, tmp_path):
    world, scenes = load_world(), draw(range(2))
    sigma = torch.full((2,), 0.5)
    x = scenes.image + 0.5 * randn(2, 3, 32, 32)
    bad = in_bfloat16(world, load_bad_model(kind, bool(given), tmp_path, world.device), *given)
    good = conditional_denoiser(world, *given) if given else world.denoise
    with torch.no_grad():
        first, second, undamaged = bad(x, sigma), bad(x, sigma), good(x, sigma)
    assert torch.equal(first, second) and not torch.equal(first, undamaged)
    assert (first - scenes.image).square().mean() > (undamaged - scenes.image).square().mean()


@pytest.mark.parametrize("is_conditional", [False, True], ids=["unconditional", "conditional"])
def test_a_bundled_bad_model_is_worse_than_the_denoiser(is_conditional, tmp_path):
    world, scenes = load_world(), draw(range(16))
    given = [torch.eye(16)[scenes.label]] if is_conditional else []
    bad = in_bfloat16(world, load_bad_model(BUNDLED, is_conditional, tmp_path, world.device), *given)
    good = conditional_denoiser(world, *given) if is_conditional else world.denoise
    for sigma in (torch.full((16,), value) for value in (0.3, 1.0, 3.0)):
        x = scenes.image + sigma[0] * randn(16, 3, 32, 32)
        with torch.no_grad():
            of_bad, of_good = ((model(x, sigma) - scenes.image).square().mean() for model in (bad, good))
        assert of_good < of_bad < 0.5 * sigma[0] ** 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_bad_model_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_models, "FULL_STEPS", {False: 8, True: 8})
    first, second = (load_bad_model(QUARTER, False, tmp_path, torch.device("cpu")) for _ in range(2))
    assert [file.name for file in tmp_path.iterdir()] == ["denoiser_32_0.25.safetensors"]
    assert all(torch.equal(*pair) for pair in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.slow
def test_loras_of_one_training_are_taken_on_its_way(tmp_path, monkeypatch):
    """Those of less strength come from the same file; at strength 0 they are the plain model, bit for bit."""
    loras = {TUNED: LoraModel(4, 12, 12, 1.0), "early": LoraModel(4, 12, 3, 1.0), "half": LoraModel(4, 12, 12, 0.5),
             "none": LoraModel(4, 12, 12, 0.0)}
    monkeypatch.setattr(bad_models, "LORAS", loras)
    device, scenes = torch.device("cpu"), draw(range(16))
    x, sigma = scenes.image + randn(16, 3, 32, 32), torch.ones(16)
    with torch.no_grad():
        results = {kind: load_bad_model(kind, False, tmp_path, device)(x, sigma) for kind in loras}
        plain = load_denoiser()(x, sigma)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lora_4_12_12.safetensors", "lora_4_12_3.safetensors"]
    assert torch.equal(results["none"], plain)
    error = {kind: (result - plain).abs().mean() for kind, result in results.items()}
    assert 0 < error["half"] < error[TUNED] and error["early"] > 0
    assert not torch.equal(results["early"], results[TUNED])


def test_the_prior_searches_from_the_noise_of_the_scene(tmp_path):
    world, scenes, setting = load_world(), draw(range(2)), {"weight": 1.0, "balanced": True}
    row = Row("prior", "prior", settings={"steps": 3})
    result = sampled(world, row, setting, [0, 1], 16, tmp_path)
    aimed = world.guider.aim(scenes.label)
    objective = PriorObjective(world.denoise, [Term(aimed, 1.0, normalized=True)])
    expected, _ = optimize_images(objective, torch.zeros(2, 3, 32, 32), PriorConfig(3), [NOISE, NOISE + 1])
    assert torch.equal(result, expected)
    renoised = replace(row, settings={"steps": 3, "level": 0.5})
    assert not torch.equal(sampled(world, renoised, setting, [0, 1], 16, tmp_path), result)


# Trainings

@pytest.fixture
def workspace(finished, tmp_path) -> Workspace:
    """An empty folder but for the generated images of the finished table."""
    (tmp_path / "samples_4_64").symlink_to(finished[0] / "samples_4_64")
    return Workspace(load_world(), tmp_path, 4, silent)


def trained(workspace: Workspace, **given) -> Trained:
    return read_training({**TWO, **given}).make(workspace)


@pytest.mark.slow
@pytest.mark.parametrize("given", [
    {}, {"fresh_noise": True}, {"warm_start": True}, {"view": "noisy", "draws": 2}, {"features": 1.0}, {"jitter": 0.5},
    {"rank": 3, "ranks": [3, 1]}, {"guided": 0.5}, {"original": True, "view": "noisy"}],
    ids=lambda given: ", ".join(given) or "trajectories")
def test_a_distillation_moves_the_guider_and_is_read_again(given, workspace):
    moves_and_is_read_again(workspace, {**TWO, **given})


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"labels": True}, {"labels": True, "whole": True}], ids=["experts", "networks"])
def test_a_labelled_training_moves_and_is_read_again(given, workspace):
    moves_and_is_read_again(workspace, {**SHORT, **given})


def moves_and_is_read_again(workspace: Workspace, given: dict) -> None:
    first, second = (read_training(given).make(workspace) for _ in range(2))
    picture = images(2)
    sigma = level(0.1, picture)
    with torch.no_grad():
        outputs = [guider.predict(picture, sigma) for guider in (first.guider, second.guider, workspace.world.guider)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2]) and first.costs == second.costs
    assert first.guider.view == given.get("view", "denoised")
    assert not any(parameter.requires_grad for parameter in first.guider.net.parameters())


@pytest.mark.slow
def test_an_expert_keeps_to_its_own_rank_while_it_learns(workspace):
    guider, costs = trained(workspace, rank=3, ranks=[3, 1])
    wide, narrow = ({name: weight.flatten(2).norm(dim=(0, 2)) if ".lora_B" in name else weight.flatten(1).norm(dim=1)
                     for name, weight in guider.net.weights(index).items()} for index in range(2))
    assert all((used > 0).all() for used in wide.values())
    assert all(used[0] > 0 and (used[1:] == 0).all() for used in narrow.values())
    assert costs["trainable_share"] == pytest.approx(2 / 3 * guider.net.trainable_share())


@pytest.mark.slow
def test_guided_trajectories_lead_to_what_the_guider_aims_at(finished, tmp_path):
    world = load_world()
    store = generate_store(world, tmp_path / "samples_4_64", 64, 4, silent, 0.5)
    assert [file.name for file in tmp_path.iterdir()] == ["samples_4_64_guided_0.5"]
    manifest = {name: value for name, value in store.manifest.items() if name != "guided"}
    free = SampleStore(finished[0] / "samples_4_64", manifest)
    wanted = draw([NOISE + store.manifest["seed"] + index for index in range(64)]).label
    right = [(world.plain_output(from_uint8(part.images)).argmax(1) == wanted).float().mean() for part in (free, store)]
    assert right[1] > right[0] + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("fresh_noise", [False, True])
def test_a_warm_expert_starts_as_its_neighbour(fresh_noise, workspace):
    guider, _ = trained(workspace, warm_start=True, lr=0.0, **({"fresh_noise": True} if fresh_noise else {}))
    first, second = (guider.net.weights(index) for index in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_the_original_trains_one_adapter_by_one_optimizer(workspace, monkeypatch):
    """Weights and moments go on from interval to interval, while the learning rate starts again in each."""
    rates, optimizers, adamw = [], [], torch.optim.AdamW

    class Watched(adamw):
        def step(self, closure=None):
            optimizers.append(self)
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    guider, _ = trained(workspace, original=True)
    assert len(guider.net.schedule) == 5 and len({id(optimizer) for optimizer in optimizers}) == 1
    assert rates == pytest.approx([2e-3, 1e-3] * 5)
    weights = [torch.cat([weight.flatten() for weight in guider.net.weights(index).values()]) for index in range(5)]
    steps = [float((after - before).norm()) for before, after in zip(weights, weights[1:], strict=False)]
    assert all(0 < step < 0.1 * float(weights[0].norm()) for step in steps), "each starts where the one before ended"


@pytest.mark.slow
def test_the_original_sends_edges_to_the_lower_expert():
    """At four of its 25 steps."""
    bank = ExpertBank(base_network(load_world().guider), ppap_reference.schedule(), LoraSpec(2))
    asked, mended = [], []
    for sigma in ppap_reference.ddim_sigmas(25)[:-1]:
        bank(images(1), sigma[None])
        mended.append(bank.active)
        ppap_reference.LowerOnEdges(bank)(images(1), sigma[None])
        asked.append(bank.active)
    assert mended == [4] * 5 + [3] * 5 + [2] * 5 + [1] * 5 + [0] * 5
    assert sum(a != b for a, b in zip(asked, mended, strict=True)) == 4 and asked == sorted(asked, reverse=True)


# Rules

@pytest.mark.slow
def test_rules_are_obeyed_better_than_without_guidance(monkeypatch):
    monkeypatch.setattr(rules_bench, "TARGETS", {"symmetry left-right": None, "brightness": 0.75})
    config = rules_bench.RulesBench(images=4, steps=8, scenes=256, prior=PriorConfig(steps=25))
    rows = rules_bench.rules_bench(config, silent)
    assert [row["way"] for row in rows] == 2 * ["sampling", "guided sampling", "prior"]
    for free, guided, searched in (rows[:3], rows[3:]):
        assert guided["off"] < free["off"] and searched["off"] < free["off"]
        assert searched["frechet"] > 0 and searched["seconds"] > 0
