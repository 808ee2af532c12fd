"""The course of a distillation: presets, early ends, limits of time, answers that are kept, estimates, going on."""
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import VIEWS, disturb, images, made_up_trajectories, randn, same, says, small_guider

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network
from ppap_core.experts.check import HeldOutCheck
from ppap_core.experts.distill import Distillation, Watch, distill
from ppap_core.experts.estimate import Estimate, estimate_distillation
from ppap_core.experts.examine import KnowledgeTest
from ppap_core.experts.lesson import DistillConfig, distill_expert, sample_batch
from ppap_core.experts.presets import AS_SET, BAKING_PRESETS, PRESETS, with_preset
from ppap_core.experts.samples import SHARD_SIZE, SampleStore
from ppap_core.experts.teacher import FOLDER, TeacherAnswers
from ppap_core.experts.variants import VARIANTS, vary
from ppap_core.guiders.guider import clean
from ppap_core.guiders.tasks import TASKS
from ppap_core.io.hashing import digest
from ppap_core.schedules import ExpertSchedule
from ppap_core.training.finetune import FineTune
from ppap_core.training.loop import AdamW, RunOptions, optimize
from ppap_core.training.plateau import Plateau, PlateauRule

CONFIG = DistillConfig(steps=8, batch=3, lr=1e-2, seed=4)
FAST = replace(CONFIG, fast=True)
EDGES = (0.1, 0.5, 10.0)


def made(seeds: list[int]):
    ends = images(len(seeds), seed=seeds[0])
    return ends, made_up_trajectories(ends, seeds[0])


def make_bank(guider, view: str = "denoised", rank: int = 2) -> ExpertBank:
    return ExpertBank(base_network(guider), ExpertSchedule(EDGES), LoraSpec(rank=rank), view)


@pytest.fixture
def store(tmp_path) -> SampleStore:
    store = SampleStore(tmp_path / "store", {"seed": 0})
    store.fill(SHARD_SIZE, made)
    store.hold_out().fill(SHARD_SIZE, made)
    return store


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


def stop_at(step: int):
    def on_step(index, done, loss):
        if (index, done) == (1, step):
            raise Stop
    return on_step


# Presets

def test_as_set_changes_neither_numbers_nor_hashes():
    assert with_preset(CONFIG, AS_SET) == CONFIG
    assert not {"patience", "fast"} & {*CONFIG.fingerprint_fields()}
    assert len({digest(with_preset(CONFIG, name)) for name in PRESETS}) == len(PRESETS)


def test_presets_grow_and_unknown_ones_are_refused():
    steps = [with_preset(CONFIG, name).steps for name in ("quick look", "good", "thorough")]
    assert steps == sorted(set(steps))
    with says(ValueError, "no preset 'best'", "quick look"):
        with_preset(CONFIG, "best")


def test_presets_of_baking_grow_and_keep_the_rest():
    own = FineTune(7, 3, 5, 0.1, 9)
    assert with_preset(own, AS_SET, BAKING_PRESETS) == own
    made = [with_preset(own, name, BAKING_PRESETS) for name in BAKING_PRESETS]
    assert [(each.steps, each.rank) for each in made] == [(7, 3), (150, 16), (600, 16), (1500, 64)]
    assert {(each.batch, each.lr, each.seed) for each in made} == {(5, 0.1, 9)}
    with says(ValueError, "no preset 'as set, fast'", "thorough"):
        with_preset(own, "as set, fast", BAKING_PRESETS)


# An end where nothing rises

def walk(measures: list[float], steps: int = 100, stop_after: int | None = None, **options):
    """A training under a rule, with these measures; returns the losses, what is trained, and its learning rates."""
    point, rates, left = torch.zeros(3, requires_grad=True), [], iter(measures)
    plateau = Plateau(PlateauRule(steps, 5, 2), 0.1, lambda: next(left), {"point": point})

    def on_step(step, loss, _):
        rates.append(plateau.rate(step))
        if step == stop_after:
            raise Stop
    losses = optimize({"point": point}, lambda step: (point - randn(3, seed=step)).square().mean(), steps,
                      AdamW(plateau.rate), "a point", plateau.added_to(RunOptions({}, on_step=on_step, **options)))
    return losses, point.detach(), rates


def test_what_rises_is_trained_to_the_last_step():
    losses, _, rates = walk([*range(100)])
    assert len(losses) == 100 and rates[:80] == [0.1] * 80 and rates[90] == pytest.approx(0.05) and rates[99] > 0


def test_what_rises_no_more_ends_soon_after():
    """Checks at 0, 5, ...; the means of the 4th and 5th and of the two before are equal at step 20."""
    losses, _, rates = walk([1, 2, 3, 3, 3, 3, 9, 9, 9])
    assert len(losses) == 32 and rates[25] == 0.1 and rates[28] < 0.1


def test_the_end_begins_with_the_best_weights():
    """Those of the check at 10, to which the training comes back at 20; the fall of the rate is as short as ever."""
    seen = []
    point, measures = torch.zeros(1, requires_grad=True), iter([1, 2, 9, 1, 1])
    plateau = Plateau(PlateauRule(100, 5, 2), 0.1, lambda: next(measures), {"point": point})
    options = plateau.added_to(RunOptions(on_step=lambda *_: seen.append(point.item())))
    optimize({"point": point}, lambda step: -point.sum(), 100, AdamW(lambda step: 0.1 if step < 20 else 1e-9), "x", options)
    assert len(seen) == 25 and seen[19] > 1.8
    assert seen[20] == pytest.approx(seen[9], abs=1e-6)


@pytest.mark.parametrize("stopped", [3, 20, 27])
def test_a_resumed_training_ends_as_one_without_a_stop(stopped, tmp_path):
    measures, file = [1, 2, 3, 3, 3, 3], tmp_path / "state.safetensors"
    losses, point, _ = walk(measures)
    with pytest.raises(Stop):
        walk(measures, stop_after=stopped, state_file=file)
    asked = stopped // 5 + 1
    again, resumed, _ = walk(measures[asked:], state_file=file)
    assert again == losses and torch.equal(resumed, point)
    assert walk([], state_file=file)[0] == losses


def test_a_check_is_the_agreement_at_held_out_steps(store):
    guider = small_guider("depth")
    bank = make_bank(guider)
    disturb(bank, 1)
    check = HeldOutCheck(guider, bank, 1, store)
    known = KnowledgeTest(guider, bank, store).measure(1)
    assert known is not None
    expert, plain = check(), check.plain()
    assert abs(expert.agreement - known.expert) < 0.15 and abs(plain.agreement - known.plain) < 0.15
    assert expert.distance != plain.distance and expert.agreement != plain.agreement
    sharp = HeldOutCheck(guider, bank, 1, store, temperature=0.25)()
    assert sharp.agreement == expert.agreement and (sharp.distance == expert.distance) == (not TASKS["depth"].is_logits)


def test_experts_end_early_and_tell_their_checks(store, tmp_path, monkeypatch):
    monkeypatch.setattr("ppap_core.experts.lesson.CHECK_EVERY", 2)
    guider, seen = small_guider(), []
    config = replace(CONFIG, steps=60, patience=1, lr=0.0)
    losses = Distillation(guider, make_bank(guider), store, config, tmp_path / "states").run(
        Watch(on_check=lambda *told: seen.append(told)))
    assert [len(each) for each in losses] == [3, 3]  # nothing is learned at this rate: it turns at 2
    assert [index for index, *_ in seen] == [0, 0, 1, 1] and all(0 <= plain == expert <= 1 for _, plain, expert in seen)


# Answers that are kept

@pytest.mark.parametrize("task", TASKS)
def test_kept_answers_are_those_of_each_step(store, task):
    guider = small_guider(task)
    answers = TeacherAnswers(guider, store)
    assert answers.count_missing() == 1
    answers.fill()
    rows, chosen = torch.tensor([5, 63, 5, 0]), torch.tensor([0, 1, 1, 0])
    images, changed = store.images_at(rows), chosen == 1
    expected, in_mirror = guider.predict(images, clean(rows)), guider.predict(images.flip(3), clean(rows))
    assert answers.count_missing() == 0 and TeacherAnswers(guider, store).count_missing() == 0
    torch.testing.assert_close(TeacherAnswers(guider, store)(rows, torch.zeros(4, dtype=torch.long)), expected)
    answers = TeacherAnswers(guider, store, VARIANTS[:2])
    assert answers.count_missing() == 1
    answers.fill()
    found = answers(rows, chosen)
    torch.testing.assert_close(found[changed], in_mirror[changed])
    torch.testing.assert_close(found[~changed], expected[~changed])
    assert not torch.allclose(expected[1], in_mirror[1])


def test_the_teacher_answers_once_for_each_image(store, monkeypatch):
    guider, asked = small_guider(), []
    real = torch.nn.Module.__call__
    plain = base_network(guider)
    monkeypatch.setattr(type(plain), "__call__", lambda net, image: (asked.append(len(image)) if net is plain else None,
                                                                      real(net, image))[1], raising=False)
    sharp = {"temperature": 0.25, "lr": 1e-4}  # a distance that rounding does not reach
    losses = distill(guider, make_bank(guider), store, replace(FAST, **sharp))
    assert sum(asked) == SHARD_SIZE + 1 and len(losses) == 2  # one to know the size of an answer
    usual = distill(guider, make_bank(guider), store, replace(CONFIG, **sharp))
    for fast, slow in zip(losses, usual, strict=True):
        assert fast == pytest.approx(slow, rel=0.05)


@pytest.mark.parametrize("view", VIEWS)
def test_a_varied_batch_shows_variants_with_their_inputs(store, view):
    """Which ones depends on the step, and not on the processes that share it."""
    bank, config = make_bank(small_guider(), view), replace(CONFIG, batch=64)
    varied = replace(config, varied=True)
    plain, pairs = (sample_batch(bank, 1, store, 5, each) for each in (config, varied))
    seen = set()
    for image, inputs, usual, usual_inputs in zip(*pairs[:2], *plain[:2], strict=True):
        [number] = [number for number, variant in enumerate(VARIANTS) if torch.equal(vary(usual[None], variant)[0], image)]
        assert torch.equal(vary(usual_inputs[None], VARIANTS[number])[0], inputs)
        seen.add(number)
    assert seen == {*range(len(VARIANTS))} and torch.equal(pairs.sigma, plain.sigma)
    halves = [sample_batch(bank, 1, store, 5, varied, (index, 2)) for index in range(2)]
    assert all(torch.equal(half.images, pairs.images[index::2]) for index, half in enumerate(halves))


def test_answers_to_variants_are_kept_for_a_fast_training(store):
    """Losses are those of a teacher that answers in each step, but for rounding."""
    guider, sharp = small_guider(), {"temperature": 0.25, "lr": 1e-4, "varied": True}
    fast, slow = (distill(guider, make_bank(guider), store, replace(config, **sharp)) for config in (FAST, CONFIG))
    unvaried = distill(guider, make_bank(guider), store, replace(CONFIG, **sharp | {"varied": False}))
    for each, usual, other in zip(fast, slow, unvaried, strict=True):
        assert each == pytest.approx(usual, rel=0.05) and usual != other


def test_a_fast_training_resumes_to_the_bit(store, tmp_path):
    guider = small_guider()
    straight, again = make_bank(guider), make_bank(guider)
    alone = distill_expert(guider, make_bank(guider), 0, store, FAST)
    losses = distill(guider, straight, store, FAST)
    assert alone == losses[0]
    with pytest.raises(Stop):
        distill(guider, make_bank(guider), store, FAST, tmp_path / "states", stop_at(4))
    assert distill(guider, again, SampleStore(store.folder, store.manifest), FAST, tmp_path / "states") == losses
    assert all(same(straight.weights(index), again.weights(index)) for index in range(2))


def test_damaged_answers_are_made_again(store):
    guider = small_guider()
    TeacherAnswers(guider, store).fill()
    [file] = (store.folder / FOLDER).glob("*/*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    TeacherAnswers(guider, store).fill()
    assert file.read_bytes() == whole


def test_answers_that_cannot_be_kept_are_computed(store, caplog):
    guider = small_guider()
    (store.folder / FOLDER).write_text("in the way")
    losses = distill(guider, make_bank(guider), store, FAST)
    assert "computed in each step" in caplog.text
    (store.folder / FOLDER).unlink()
    kept = distill(guider, make_bank(guider), store, FAST)
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in zip(losses, kept, strict=True))


# Limits and going on

def test_a_limit_keeps_what_is_reached_and_more_time_goes_on(store, tmp_path):
    guider = small_guider()
    expected, bank = make_bank(guider), make_bank(guider)
    losses = distill(guider, expected, store, CONFIG)
    start = {name: weight.clone() for name, weight in bank.weights(0).items()}
    none = Distillation(guider, bank, store, CONFIG, tmp_path / "states").run(Watch(seconds_for=lambda index: 0.0))
    assert none == [[], []] and same(bank.weights(0), start)
    slow = iter([math.inf, 0.0])
    some = Distillation(guider, bank, store, CONFIG, tmp_path / "states").run(Watch(seconds_for=lambda index: next(slow)))
    assert some == [losses[0], []]
    assert distill(guider, bank, store, CONFIG, tmp_path / "states") == losses
    assert all(same(bank.weights(index), expected.weights(index)) for index in range(2))


def test_experts_go_on_from_others(store, tmp_path):
    """Of the same noise, whatever their number; the state is that of another training."""
    guider = small_guider()
    former = make_bank(guider)
    disturb(former, 1)
    bank = ExpertBank(base_network(guider), ExpertSchedule((0.1, 0.3, 0.5, 10.0)), LoraSpec(rank=2))
    distillation = Distillation(guider, bank, store, replace(CONFIG, lr=0.0), tmp_path / "states")
    distillation.begin_with(former)
    distillation.run()
    assert [same(bank.weights(index), former.weights(place)) for index, place in enumerate((0, 0, 1))] == [True] * 3
    with says(ValueError, "another training (former is", "expected None", "delete"):
        Distillation(guider, bank, store, replace(CONFIG, lr=0.0), tmp_path / "states").run()
    with says(ValueError, "another view (noisy, expected denoised)"):
        distillation.begin_with(make_bank(guider, "noisy"))
    distillation = Distillation(guider, make_bank(guider, rank=3), store, CONFIG)
    distillation.begin_with(former)
    with says(ValueError, "check rank"):
        distillation.run()


# How long it takes

def test_an_estimate_is_what_is_left_times_what_it_takes():
    clock = SimpleNamespace(now=100.0)
    estimate = Estimate({"step": 10, "test": 4}, {"step": 2.0, "test": 5.0}, lambda: clock.now)
    assert estimate.at_start == estimate.remaining() == 40 and estimate.remaining("test") == 20
    for _ in range(4):
        clock.now += 3.0
        estimate.done("step")
    assert 2.0 < estimate.seconds["step"] < 3.0 and estimate.spent() == 12 and estimate.at_start == 40
    assert estimate.remaining() == pytest.approx(6 * estimate.seconds["step"] + 20)
    for _ in range(500):
        clock.now += 3.0
        estimate.done("step")
    assert estimate.left["step"] == 0 and estimate.seconds["step"] == pytest.approx(3.0, abs=0.01)


def test_all_parts_of_a_distillation_are_timed_and_counted(store, tmp_path, monkeypatch):
    """By the work that it then does; timing changes no weight, and a finished one is not timed."""
    guider, bank = small_guider(), make_bank(small_guider())
    config = replace(FAST, patience=3, steps=100)
    start = {name: weight.clone() for name, weight in bank.weights(0).items()}
    distillation = Distillation(guider, bank, store, config, tmp_path / "states")
    test = KnowledgeTest(guider, bank, store)
    estimate = estimate_distillation(distillation, test)
    tests = sum(map(test.count, range(2)))
    assert estimate.left == {"answers": 1, "step": 200, "check": 4, "test": tests} and tests > 4
    assert all(seconds > 0 for seconds in estimate.seconds.values())
    assert estimate.remaining() == pytest.approx(sum(estimate.left[part] * estimate.seconds[part] for part in estimate.left))
    assert same(bank.weights(0), start) and not (tmp_path / "states").exists()
    short = Distillation(guider, bank, store, FAST, tmp_path / "states")
    with pytest.raises(Stop):
        short.run(Watch(stop_at(3)))
    assert estimate_distillation(short, test).left["step"] == 4 and estimate_distillation(short, test).left["answers"] == 0
    short.run()
    assert estimate_distillation(short, test).at_start == 0
