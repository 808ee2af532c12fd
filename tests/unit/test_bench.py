"""The benchmark in miniature: its rows, its numbers' ranges, and that finished parts are not done again."""
import json
import math
from dataclasses import fields, replace

import pytest
import torch
from helpers import images, level, randn, says

from benchmarks import bad_models as siblings
from benchmarks import ppap_reference as original
from benchmarks import rules as rules_bench
from benchmarks import tables as module
from benchmarks.ablations import ABLATIONS, JointOverMarginal, Smooth
from benchmarks.bad_models import DAMAGED, KINDS, TUNED, bad_version
from benchmarks.tables import Row, bench, in_bfloat16, interval, prior_config, read_table, sampler, told
from benchmarks.tiny_world import NOISE, generate_store, load_world
from benchmarks.training import Training, changes, make_guider
from ppap_core.cli import main
from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.experts.samples import SampleStore, from_uint8
from ppap_core.guidance.autoguidance import autoguided
from ppap_core.guidance.prior import PriorConfig, PriorObjective, optimize_images
from ppap_core.guidance.terms import Term
from ppap_core.guidance.training_free import METHODS
from ppap_core.guiders.guider import Guider, clean
from ppap_core.schedules import ExpertSchedule
from ppap_core.tinyworld.loaders import load_denoiser, load_guider
from ppap_core.tinyworld.scenes import draw

EDGES = [0.05, 1.0, 10.0]
TWO = {"edges": EDGES, "steps": 2, "batch": 4, "images": 64}
SMALL = {
    "title": "small", "task": "class", "images": 12, "search": 8, "steps": 4, "scenes": 256, "reference": "labels",
    "points": [{"weight": 4, "balanced": False}, {"weight": 0.5, "balanced": True}],
    "rows": [{"row": "unguided", "way": "nothing"},
             {"row": "unguided, other scenes", "way": "nothing", "scenes_from": 5000},
             {"row": "plain"},
             {"row": "elucd", "variant": "elucd"},
             {"row": "labels", "training": {**TWO, "view": "noisy", "labels": True, "whole": True}},
             {"row": "experts", "training": TWO},
             {"row": "experts, two steps", "steps": 2, "training": TWO},
             {"row": "dps", "way": "dps", "points": [{"rho": 0.1}]},
             {"row": "mpgd", "way": "mpgd", "points": [{"mu": 0.1}]},
             {"row": "told", "way": "told", "points": [{"weight": 2}]},
             {"row": "auto", "way": "autoguidance", "settings": {"bad": "dropout", "told": False},
              "points": [{"weight": 2}]}]}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A folder with the small table, in the place of the bundled ones."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "small.json").write_text(json.dumps(SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TABLES", folder)
        yield folder


@pytest.fixture(scope="module")
def finished(tables, tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("bench"), []
    return folder, bench(read_table("small"), folder, lines.append), lines


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["row"]: row for row in rows}


def test_every_row_is_measured_and_in_range(finished):
    _, rows, _ = finished
    assert [row["row"] for row in rows] == [row["row"] for row in SMALL["rows"]]
    for row in rows:
        assert row["images"] == 12 and row["frechet"] > 0 and row["time_ratio"] > 0 and math.isfinite(row["energy"])
        assert all(0 <= row[name] <= 1 for name in ("score", "second_score", "own_score", "precision", "recall"))


def test_a_search_measures_every_point_and_takes_the_best(finished):
    rows = by_name(finished[1])
    assert [each["setting"] for each in rows["plain"]["searched"]] == SMALL["points"]
    best = max(rows["plain"]["searched"], key=lambda each: each["score"])
    assert rows["plain"]["setting"] == best["setting"] and best["images"] == 8
    assert rows["dps"]["searched"] == [] and rows["dps"]["setting"] == {"rho": 0.1}


def test_passes_share_and_images_are_counted(finished):
    rows = by_name(finished[1])
    assert [rows[name]["forwards"] for name in ("unguided", "plain", "dps", "mpgd", "told")] == [4, 4, 4, 4, 8]
    assert rows["experts, two steps"]["forwards"] == 2
    assert [rows[name]["backwards"] for name in ("unguided", "plain", "dps", "mpgd")] == [0, 0, 4, 0]
    assert rows["plain"]["trainable_share"] == 0 and rows["labels"]["trainable_share"] == 1
    assert 0 < rows["experts"]["trainable_share"] < 0.03, "rank 2 is what the table promises"
    assert rows["experts"]["training_images"] == 64 and rows["labels"]["training_images"] == 2 * 2 * 4


def test_other_scenes_show_the_spread(finished):
    rows = by_name(finished[1])
    assert rows["unguided"]["frechet"] != rows["unguided, other scenes"]["frechet"]


def test_a_row_of_fewer_steps_is_guided_by_the_same_experts(finished):
    folder, rows, _ = finished
    few, many = (by_name(rows)[name] for name in ("experts, two steps", "experts"))
    assert few["agreement"] == many["agreement"] and few["frechet"] != many["frechet"]
    assert len(list(folder.glob("class_*"))) == 2, "experts and labels"


def test_agreement_is_nothing_with_the_reference_itself(finished):
    rows = by_name(finished[1])
    assert max(rows["labels"]["agreement"].values()) < 1e-6 < min(rows["plain"]["agreement"].values())
    assert "agreement" not in rows["dps"] and "agreement" not in rows["unguided"]


def test_what_is_finished_is_not_done_again(finished):
    folder, rows, _ = finished
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    again = []
    assert bench(read_table("small"), folder, again.append) == rows and not again
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}


def test_other_noise_levels_are_measured_anew(finished, tmp_path):
    folder, rows, _ = finished
    table = read_table("small")
    (tmp_path / "measured").mkdir()
    for file in (folder / "measured").iterdir():
        (tmp_path / "measured" / file.name).write_bytes(file.read_bytes())
    first = table.rows[0]
    [other] = bench(replace(table, rows=(first,), schedule="ddim", reference=""), tmp_path, lambda line: None)
    assert other["frechet"] != by_name(rows)[first.row]["frechet"]


def test_a_row_alone_is_the_row_of_the_whole_table(finished):
    folder, rows, _ = finished
    alone, = bench(read_table("small"), folder, lambda line: None, ["mpgd"])
    assert alone == by_name(rows)["mpgd"]


def test_the_command_writes_table_plot_and_rows(finished, capsys, tmp_path):
    folder, rows, _ = finished
    main(["bench", "small", "--folder", str(folder), "--out", str(tmp_path / "evidence")])
    written = json.loads((tmp_path / "evidence.json").read_text())
    assert written["rows"] == rows and written["table"]["rows"][5]["row"] == "experts"
    text = (tmp_path / "evidence.md").read_text()
    assert text in capsys.readouterr().out and text.count("\n") == 2 + len(rows) and "| mu 0.1 |" in text
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("evidence.png", "evidence_agreement.png"))


def test_an_unknown_table_is_one_sentence_and_no_traceback(tables, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench", "smal", "--folder", str(tmp_path)])
    assert error.value.code == 1 and "there is no table 'smal': expected one of small" in capsys.readouterr().err


def test_an_unknown_row_is_refused_before_anything_is_done(tables, tmp_path):
    with says(ValueError, "'mpdg'", "unguided; unguided, other scenes; plain"):
        bench(read_table("small"), tmp_path / "bench", lambda line: None, ["mpgd", "mpdg"])
    assert not (tmp_path / "bench").exists()


def test_a_missing_file_is_one_sentence_and_no_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["inspect", str(tmp_path / "none.safetensors")])
    assert error.value.code == 1 and "there is no file" in capsys.readouterr().err


BUNDLED = sorted((module.Path(module.__file__).parent / "rows").glob("*.json"))


@pytest.mark.parametrize("file", BUNDLED, ids=lambda file: file.stem)
def test_a_bundled_table_names_only_what_exists(file, monkeypatch):
    monkeypatch.setattr(module, "TABLES", file.parent)
    table = read_table(file.stem)
    names = [row.row for row in table.rows]
    assert len(set(names)) == len(names) and (not table.reference or table.reference in names)
    for row in table.rows:
        assert row.way in {"nothing", "guidance", "told", "autoguidance", "prior", *METHODS}
        assert row.variant in {"", *ABLATIONS} and row.points
        if row.training.edges:
            assert ExpertSchedule(tuple(row.training.edges))
        if row.way == "autoguidance":
            assert row.settings["bad"] in KINDS and isinstance(row.settings["told"], bool)
            assert row.settings.get("good", TUNED) == TUNED
        if row.way == "prior":
            assert prior_config(**row.settings)
        if row.way in METHODS:
            for point in row.points:
                replace(METHODS[row.way], **row.settings, **point)


def test_another_option_does_not_rename_a_training():
    assert changes(Training(view="noisy", edges=(1, 2))) == {"view": "noisy", "edges": (1, 2)} and changes(Training()) == {}


# Ways to sample

def test_noise_and_scene_have_different_generators():
    world, seen = load_world(), []
    recorded = replace(world, denoiser=lambda x, sigma: seen.append(x) or 0 * x)
    sampler(recorded, Row("unguided", "nothing"), world.guider, {}, 1)([7], draw([7]))
    assert not torch.allclose(seen[0][0] / 80, torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(7)), atol=1e-3)


def test_a_cfg_weight_of_one_is_the_conditional_model():
    """A weight above one goes away from the unconditional prediction."""
    world, given = load_world(), torch.zeros(2, 16)
    given[0, 3] = given[1, 5] = 1
    x, sigma = 2 * randn(2, 3, 32, 32), torch.full((2,), 2.0)
    with torch.no_grad():
        ways = [told(world, given), told(world, 0 * given)]
        one, none = (each(x, sigma).float() for each in ways)
        two, outside = (autoguided(*ways, interval(2, **window))(x, sigma) for window in ({}, {"low": 3.0}))
    assert torch.allclose(two, 2 * one - none, atol=0.02) and not torch.allclose(one, none, atol=0.02)
    assert torch.equal(outside, one)


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("given", [[], [torch.eye(16)[:2]]], ids=["untold", "told"])
def test_a_damaged_denoiser_is_worse_in_the_same_way_each_time(kind, given, tmp_path):
    world, scenes = load_world(), draw(range(2))
    sigma = torch.full((2,), 0.5)
    x = scenes.image + 0.5 * randn(2, 3, 32, 32)
    bad = in_bfloat16(world, bad_version(kind, bool(given), tmp_path, world.device), *given)
    good = told(world, *given) if given else world.denoise
    with torch.no_grad():
        once, again, undamaged = bad(x, sigma), bad(x, sigma), good(x, sigma)
    assert torch.equal(once, again) and not torch.equal(once, undamaged)
    assert (once - scenes.image).square().mean() > (undamaged - scenes.image).square().mean()


@pytest.mark.parametrize("is_told", [False, True])
def test_a_true_sibling_is_bundled_and_worse_than_the_denoiser(is_told, tmp_path):
    world, scenes = load_world(), draw(range(16))
    given = [torch.eye(16)[scenes.label]] if is_told else []
    bad = in_bfloat16(world, bad_version(KINDS[0], is_told, tmp_path, world.device), *given)
    good = told(world, *given) if is_told else world.denoise
    for sigma in (torch.full((16,), each) for each in (0.3, 1.0, 3.0)):
        x = scenes.image + sigma[0] * randn(16, 3, 32, 32)
        with torch.no_grad():
            of_bad, of_good = ((each(x, sigma) - scenes.image).square().mean() for each in (bad, good))
        assert of_good < of_bad < 0.5 * sigma[0] ** 2
    assert list(tmp_path.iterdir()) == []


def test_other_siblings_are_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(siblings, "FULL", {False: 32, True: 32})
    once, again = (bad_version(KINDS[1], False, tmp_path, torch.device("cpu")) for _ in range(2))
    files = [file.name for file in tmp_path.iterdir()]
    assert files == ["denoiser_32_0.25.safetensors"]
    assert all(torch.equal(*each) for each in zip(once.state_dict().values(), again.state_dict().values(), strict=True))


def test_one_training_makes_a_fine_tune_and_weaker_ones(tmp_path, monkeypatch):
    """Those of less strength are beside the same file; without it they are the model that was tuned, bit for bit."""
    small = {TUNED: (4, 12, 12, 1.0), "early": (4, 12, 3, 1.0), "half": (4, 12, 12, 0.5), "none": (4, 12, 12, 0.0)}
    monkeypatch.setattr(siblings, "MADE", small)
    device, scenes = torch.device("cpu"), draw(range(16))
    x, sigma = scenes.image + randn(16, 3, 32, 32), torch.ones(16)
    with torch.no_grad():
        found = {kind: bad_version(kind, False, tmp_path, device)(x, sigma) for kind in small}
        plain = load_denoiser()(x, sigma)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lora_4_12_12.safetensors", "lora_4_12_3.safetensors"]
    assert torch.equal(found["none"], plain)
    off = {kind: (each - plain).abs().mean() for kind, each in found.items()}
    assert 0 < off["half"] < off[TUNED] and off["early"] > 0
    assert not torch.equal(found["early"], found[TUNED])


def test_a_method_of_priors_searches_from_the_scene_s_noise():
    world, scenes = load_world(), draw(range(2))
    row = Row("prior", "prior", settings={"steps": 3})
    found = sampler(world, row, world.guider, {"weight": 1.0, "balanced": True}, 16)([0, 1], scenes)
    aimed = world.guider.aim(scenes.label)
    expected, _ = optimize_images(PriorObjective(world.denoise, [Term(aimed, 1.0, normalized=True)]),
                                  torch.zeros(2, 3, 32, 32), PriorConfig(3), [NOISE, NOISE + 1])
    assert torch.equal(found, expected)
    tidy = replace(row, settings={"steps": 3, "level": 0.5})
    assert not torch.equal(sampler(world, tidy, world.guider, {"weight": 1.0, "balanced": True}, 16)([0, 1], scenes), found)


# Trainings

def small_training(**options) -> Training:
    return Training(**{**TWO, "edges": tuple(EDGES), **options})


@pytest.mark.parametrize("options", [{}, {"fresh_noise": True}, {"warm_start": True}, {"view": "noisy", "draws": 2},
                                     {"features": 1.0}, {"jitter": 0.5}, {"rank": 3, "ranks": (3, 1)}, {"guided": 0.5},
                                     {"original": True, "view": "noisy"}, {"labels": True}, {"labels": True, "whole": True}],
                         ids=lambda options: ", ".join(options) or "trajectories")
def test_every_training_moves_the_guider_and_is_read_again(options, finished, tmp_path):
    world, report = load_world(), lambda line: None
    (tmp_path / "samples_4_64").symlink_to(finished[0] / "samples_4_64")
    guider, cost = make_guider(world, small_training(**options), 4, tmp_path, report)
    again, cost_again = make_guider(world, small_training(**options), 4, tmp_path, report)
    picture = images(2)
    sigma = level(0.1, picture)
    with torch.no_grad():
        answers = [each.predict(picture, sigma) for each in (guider, again, world.guider)]
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2]) and cost == cost_again
    assert guider.view == options.get("view", "denoised") and all(not each.requires_grad for each in guider.net.parameters())


def test_an_expert_keeps_to_its_own_rank_while_it_learns(finished, tmp_path):
    (tmp_path / "samples_4_64").symlink_to(finished[0] / "samples_4_64")
    guider, cost = make_guider(load_world(), small_training(rank=3, ranks=(3, 1)), 4, tmp_path, lambda line: None)
    wide, narrow = ({name: weight.flatten(2).norm(dim=(0, 2)) if ".lora_B" in name else weight.flatten(1).norm(dim=1)
                     for name, weight in guider.net.weights(index).items()} for index in range(2))
    assert all((used > 0).all() for used in wide.values())
    assert all(used[0] > 0 and (used[1:] == 0).all() for used in narrow.values())
    assert cost["trainable_share"] == pytest.approx(2 / 3 * guider.net.trainable_share())


def test_guided_trajectories_end_at_the_target(finished, tmp_path):
    world = load_world()
    store = generate_store(world, tmp_path / "samples_4_64", 64, 4, lambda line: None, 0.5)
    assert [file.name for file in tmp_path.iterdir()] == ["samples_4_64_guided_0.5"]
    free = SampleStore(finished[0] / "samples_4_64", {name: store.manifest[name] for name in store.manifest if name != "guided"})
    wanted = draw([NOISE + store.manifest["seed"] + index for index in range(64)]).label
    right = [(world.answer(from_uint8(each.images)).argmax(1) == wanted).float().mean() for each in (free, store)]
    assert right[1] > right[0] + 0.1


def test_a_warm_expert_starts_as_its_neighbour(finished, tmp_path):
    world, store = load_world(), finished[0] / "samples_4_64"
    (tmp_path / "samples_4_64").symlink_to(store)
    guider, _ = make_guider(world, small_training(warm_start=True, lr=0.0), 4, tmp_path, lambda line: None)
    first, second = (guider.net.weights(index) for index in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(SampleStore(store, json.loads((store / "manifest.json").read_text()))) == 64


def test_the_reference_carries_weights_and_moments_on(finished, tmp_path, monkeypatch):
    """Training carries weights and optimizer moments from one interval to the next."""
    world = load_world()
    (tmp_path / "samples_4_64").symlink_to(finished[0] / "samples_4_64")
    starts, moments, adamw = [], [], torch.optim.AdamW

    class Watched(adamw):
        def load_state_dict(self, state):
            starts.append([parameter.detach().clone() for parameter in self.param_groups[0]["params"]])
            moments.append(len(state["state"]))
            super().load_state_dict(state)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    guider, _ = make_guider(world, small_training(original=True), 4, tmp_path, lambda line: None)
    assert len(guider.net.schedule) == 5 and moments == [0, *[len(starts[0])] * 4]
    for index in range(1, 5):
        assert all(torch.equal(*each) for each in zip(starts[index], guider.net.weights(index - 1).values(), strict=True))


def test_the_reference_sends_four_edges_to_lower_experts():
    """An edge of the reference goes to the lower expert at four of its 25 steps."""
    guider = load_world().guider
    bank = ExpertBank(base_network(guider), original.schedule(), LoraSpec(2))
    asked, mended = [], []
    for sigma in original.ddim_sigmas(25)[:-1]:
        bank(images(1), sigma[None])
        mended.append(bank.active)
        original.LowerOnEdges(bank)(images(1), sigma[None])
        asked.append(bank.active)
    assert mended == [4] * 5 + [3] * 5 + [2] * 5 + [1] * 5 + [0] * 5
    assert sum(a != b for a, b in zip(asked, mended, strict=True)) == 4 and asked == sorted(asked, reverse=True)


def test_the_reference_has_the_levels_of_its_schedule():
    sigmas = original.ddim_sigmas(25)
    share = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    assert len(sigmas) == 26 and sigmas[-1] == 0
    torch.testing.assert_close(1 / (1 + sigmas[:-1].double() ** 2), share[torch.arange(960, -1, -40)], rtol=1e-5, atol=0)


# Changes of a guider

def test_softplus_replaces_every_relu_and_nothing_else():
    guider, picture = load_guider("class"), draw(range(4)).image
    with torch.no_grad():
        plain, soft, sharp = (each.predict(picture, clean(picture)) for each in
                              (guider, ABLATIONS["softplus"](guider), replace(guider, net=Smooth(guider.net, 1e4))))
        assert not torch.allclose(plain, soft, atol=0.1) and torch.allclose(plain, sharp, atol=1e-2)
        assert torch.equal(plain, guider.predict(picture, clean(picture))), "only inside"


def test_elucd_with_equal_temperatures_is_the_cross_entropy():
    guider, picture = load_guider("class").aim(torch.tensor([2])), draw(range(4)).image
    values = {each.name: getattr(guider, each.name) for each in fields(Guider)}
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


def test_blended_experts_meet_on_the_edge_only():
    """Blended experts meet on the edge, and away from it each is itself."""
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
        once, again, plain = (each.predict(picture, clean(picture)) for each in (averaged, averaged, guider))
    assert torch.equal(once, again) and not torch.allclose(once, plain, atol=1e-3)
    averaged.net.std = 0.0
    with torch.no_grad():
        assert torch.allclose(averaged.predict(picture, clean(picture)), plain, atol=1e-5)


def test_the_denoiser_passes_gradients_only_on_demand():
    world = replace(load_world(), denoiser=load_denoiser())
    x, sigma = randn(1, 3, 32, 32), torch.ones(1)
    assert not world.denoise(x, sigma).requires_grad and world.denoise(x.requires_grad_(True), sigma).requires_grad


# Rules

def test_each_rule_is_obeyed_better_under_the_prior(monkeypatch):
    """The judge obeys each rule better under the prior than without guidance."""
    monkeypatch.setattr(rules_bench, "TARGETS", {"symmetry left-right": None, "brightness": 0.75})
    config = rules_bench.RulesBench(images=4, scenes=256, prior=PriorConfig(steps=40))
    rows = rules_bench.rules_bench(config, lambda line: None)
    assert [row["way"] for row in rows] == 2 * ["sampling", "guided sampling", "prior"]
    for free, guided, found in (rows[:3], rows[3:]):
        assert guided["off"] < free["off"] and found["off"] < free["off"]
        assert found["frechet"] > 0 and found["seconds"] > 0
    assert rules_bench.table(rows).count("\n") == 2 + len(rows)
