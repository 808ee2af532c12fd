"""Distillation without data: resumable to the bit, the base untouched, and it learns."""
import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    VIEWS,
    SmallNet,
    disturb,
    fixed_weights,
    full_disk,
    gaussian_denoise,
    images,
    level,
    made_up_trajectories,
    randn,
    same,
    says,
    small_guider,
    snapshot,
)

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.experts.check import teacher_distance
from ppap_core.experts.distill import distill
from ppap_core.experts.lesson import DistillConfig, distill_expert, distill_loss, sample_batch
from ppap_core.experts.pairs import Pairs, trajectory_pairs
from ppap_core.experts.samples import SHARD_SIZE, BatchSpec, SampleStore
from ppap_core.experts.trajectories import Trajectories, TrajectoryRecorder
from ppap_core.guidance.gradients import Prediction
from ppap_core.guidance.shift import guidance_shift
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import IgnoreSigma, clean
from ppap_core.guiders.tasks import TASKS
from ppap_core.io.files import load_tensors
from ppap_core.rng import seeded_noise
from ppap_core.sampling import karras_sigmas, sample_euler
from ppap_core.schedules import ExpertSchedule
from ppap_core.tinyworld.loaders import SIGMA_MAX, SIGMA_MIN, SIZE, load_denoiser, load_guider
from ppap_core.training.loop import RunOptions

CONFIG = DistillConfig(steps=10, batch=3, lr=1e-2, seed=4)
WARM = replace(CONFIG, warm_start=True)
EDGES = (0.1, 0.5, 2.0, 10.0)
TASK_VIEWS = [(task, view) for task in TASKS for view in VIEWS]


def never(*_):
    raise AssertionError("asked although nothing needs it")


def made(seeds: list[int]) -> tuple[torch.Tensor, Trajectories]:
    """Images and made-up trajectories of them, with two steps in each interval."""
    ends = images(len(seeds), seed=seeds[0])
    return ends, made_up_trajectories(ends, seeds[0])


def make_bank(guider, view: str = "denoised", rank: int = 2, seed: int = 0) -> ExpertBank:
    return ExpertBank(base_network(guider), ExpertSchedule(EDGES), LoraSpec(rank=rank), view, seed=seed)


@pytest.fixture
def store(tmp_path) -> SampleStore:
    store = SampleStore(tmp_path / "store", {"seed": 0})
    store.fill(SHARD_SIZE, made)
    return store


class Stop(Exception):
    pass


def stop_after(steps: int):
    def on_step(step, loss, weights):
        if step + 1 == steps:
            raise Stop
    return on_step


# The loss

@pytest.mark.parametrize("task, view", TASK_VIEWS)
def test_the_loss_compares_expert_on_noise_with_teacher(task, view):
    """The expert sees the noisy image, the plain network the clean one."""
    guider = small_guider(task)
    bank = make_bank(guider, view)
    disturb(bank, 1)
    image, sigma, noise = images(), torch.tensor([0.5, 1.0, 1.9]), randn(3, 3, 20, 28, seed=8)
    x = image + sigma[:, None, None, None] * noise
    seen = x / (1 + sigma**2).sqrt()[:, None, None, None] if view == "noisy" else gaussian_denoise(x, sigma)
    loss = distill_loss(guider, bank, Pairs(image, seen, sigma))
    expected = TASKS[task].distance(with_experts(guider, bank).predict(seen, sigma), guider.predict(image, clean(image)))
    assert loss.shape == (3,) and torch.equal(loss, expected)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.is_logits])
def test_a_temperature_divides_the_teacher_s_logits(task):
    """A tagger's become probabilities each by a sigmoid, a classifier's by one softmax."""
    guider, image = small_guider(task), images()
    bank = make_bank(guider)
    disturb(bank, 1)
    sigma = level(1.0, image)
    loss = distill_loss(guider, bank, Pairs(image, image, sigma), temperature=0.25)
    student, teacher = with_experts(guider, bank).predict(image, sigma), 4 * guider.predict(image, clean(image))
    torch.testing.assert_close(loss, TASKS[task].distance(student, teacher))
    if task == "tags":
        p, q = teacher.double().sigmoid(), student.double().sigmoid()
        each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        torch.testing.assert_close(loss, each.sum(1).float(), rtol=1e-4, atol=1e-6)


def test_without_noise_a_new_expert_has_nothing_to_learn():
    guider = small_guider()
    bank = make_bank(guider)
    image = images()
    loss = distill_loss(guider, bank, Pairs(image, image, level(0.2, image)))
    assert loss.abs().max() < 1e-6


@pytest.mark.parametrize("view", VIEWS)
def test_an_expert_sees_in_guidance_what_it_saw_in_distillation(store, view):
    """Up to the half precision that trajectories are kept in."""
    guider, seen, recorder = small_guider(), [], TrajectoryRecorder()
    bank, x = make_bank(guider, view), randn(1, *store.images.shape[1:])
    sigma = level(1.0, x)
    recorder.record(x, sigma, gaussian_denoise(x, sigma))
    inputs = {"noisy": recorder.calls[0][1], "denoised": recorder.calls[0][2]}[view]
    handle = bank.register_forward_pre_hook(lambda module, inputs: seen.append([part.detach().clone() for part in inputs]))
    distill_loss(guider, bank, Pairs(images(1), inputs.float(), sigma))
    guidance_shift([Term(with_experts(guider, bank))], Prediction(x, sigma, gaussian_denoise(x, sigma)))
    handle.remove()
    (learned, learned_at), (guided, at) = seen
    assert torch.equal(learned_at, at)
    torch.testing.assert_close(learned, guided, rtol=0, atol=5e-3)


@pytest.mark.parametrize("view", VIEWS)
def test_no_gradient_reaches_the_teacher(store, view):
    guider = small_guider()
    bank = make_bank(guider, view)
    with bank.trainable(1):
        distill_loss(guider, bank, sample_batch(bank, 1, store, 0, CONFIG)).sum().backward()
    assert all(parameter.grad is None for parameter in guider.net.parameters())
    assert any(parameter.grad is not None for parameter in bank.parameters())


# Pairs

@pytest.mark.parametrize("view", VIEWS)
def test_the_pairs_of_a_step_are_those_of_bank_and_config(store, view):
    bank = make_bank(small_guider(), view)
    found = sample_batch(bank, 2, store, 5, CONFIG)
    expected = trajectory_pairs(store, bank.schedule, 2, BatchSpec(5, 3, 4), view)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert {bank.schedule.index(float(sigma)) for sigma in found.sigma} == {2}


@pytest.mark.parametrize("seed", [123_456_789, 2**32 - 1, 2**64 - 1])
def test_any_seed_that_comfyui_gives_can_be_distilled_with(store, seed):
    guider = small_guider()
    bank = make_bank(guider)
    losses = distill_expert(guider, bank, 2, store, replace(CONFIG, steps=2, seed=seed))
    assert len(losses) == 2
    assert losses != distill_expert(guider, make_bank(guider), 2, store, replace(CONFIG, steps=2, seed=seed - 1))


# Training

@pytest.mark.parametrize("stop", [1, 5, 6, 9])
@pytest.mark.parametrize("view", VIEWS)
def test_a_resumed_distillation_gives_the_same_bits(store, tmp_path, stop, view):
    """A resumed distillation gives the bits of one that was never stopped."""
    guider = small_guider()
    straight, stopped, resumed = (make_bank(guider, view) for _ in range(3))
    losses = distill_expert(guider, straight, 1, store, CONFIG)
    state = tmp_path / "state.safetensors"
    with pytest.raises(Stop):
        distill_expert(guider, stopped, 1, store, CONFIG, RunOptions(state_file=state, on_step=stop_after(stop)))
    assert len(load_tensors(state)[1]["losses"]) == stop
    disturb(resumed, 1)  # what was in memory is lost and does not matter
    again = SampleStore(store.folder, store.manifest)
    assert distill_expert(guider, resumed, 1, again, CONFIG, RunOptions(state_file=state)) == losses
    assert same(resumed.weights(1), straight.weights(1)) and not same(stopped.weights(1), straight.weights(1))


def test_the_learning_rate_falls_along_a_cosine_to_zero(store):
    """AdamW's first step moves every weight by the rate itself, and no later one by much more than its own rate."""
    guider = small_guider()
    bank, moves = make_bank(guider), []
    before = {name: value.clone() for name, value in bank.weights(1).items()}
    def on_step(step, loss, weights):
        moves.append(max(float((value - before[name]).abs().max()) for name, value in bank.weights(1).items()))
        before.update({name: value.clone() for name, value in bank.weights(1).items()})
    distill_expert(guider, bank, 1, store, CONFIG, RunOptions(on_step=on_step))
    rates = [CONFIG.lr * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert moves[0] == pytest.approx(CONFIG.lr, rel=1e-3)
    assert all(0.3 * rate < move < 2 * rate for move, rate in zip(moves, rates, strict=True))


def test_a_killed_training_resumes_from_the_last_save(store, tmp_path, monkeypatch):
    guider, state = small_guider(), tmp_path / "state.safetensors"
    straight, resumed = make_bank(guider), make_bank(guider)
    losses = distill_expert(guider, straight, 1, store, CONFIG)
    copy = tmp_path / "copy.safetensors"
    def on_step(step, loss, weights):
        if step == 7:  # the state of step 6 is what a power cut here leaves
            copy.write_bytes(state.read_bytes())
    distill_expert(guider, make_bank(guider), 1, store, CONFIG, RunOptions(state_file=state, save_every=3, on_step=on_step))
    assert len(load_tensors(copy)[1]["losses"]) == 6
    assert distill_expert(guider, resumed, 1, store, CONFIG, RunOptions(state_file=copy)) == losses
    assert same(resumed.weights(1), straight.weights(1))


def test_a_finished_training_is_loaded_and_not_gone_on_with(store, tmp_path):
    guider, state = small_guider(), tmp_path / "state.safetensors"
    first, second = make_bank(guider), make_bank(guider)
    losses = distill_expert(guider, first, 0, store, CONFIG, RunOptions(state_file=state))
    assert distill_expert(guider, second, 0, store, CONFIG, RunOptions(state_file=state, on_step=never)) == losses
    assert same(first.weights(0), second.weights(0))


def test_an_expert_starts_as_its_neighbour_ended(store, tmp_path):
    """A warm start, also where the training is stopped and resumed."""
    guider, still = small_guider(), make_bank(small_guider())
    first = distill_expert(guider, still, 0, store, CONFIG)
    still.load(1, still.weights(0))
    second = distill_expert(guider, still, 1, store, CONFIG)
    bank, again = make_bank(guider), make_bank(guider)
    losses = distill(guider, bank, store, WARM)
    assert losses[:2] == [first, second] and same(bank.weights(1), still.weights(1))
    def on_step(index, step, loss):
        if (index, step) == (1, 4):
            raise Stop
    with pytest.raises(Stop):
        distill(guider, make_bank(guider), store, WARM, tmp_path / "states", on_step)
    assert distill(guider, again, store, WARM, tmp_path / "states") == losses
    assert all(same(again.weights(index), bank.weights(index)) for index in range(3))


def test_experts_without_a_warm_start_are_independent(store):
    guider = small_guider()
    alone, after = make_bank(guider), make_bank(guider)
    expected = distill_expert(guider, alone, 2, store, CONFIG)
    losses = distill(guider, after, store, CONFIG)
    assert losses[2] == expected and same(after.weights(2), alone.weights(2))
    assert same(make_bank(guider).weights(1), alone.weights(1))


def test_asking_the_experts_does_not_change_a_training(store):
    """A preview in the middle of a training uses the network in training."""
    guider = small_guider()
    quiet, watched = make_bank(guider), make_bank(guider)
    losses = distill_expert(guider, quiet, 1, store, CONFIG)
    def preview(step, loss, weights):
        teacher_distance(guider, with_experts(guider, watched), store, watched.schedule, size=2)
    assert distill_expert(guider, watched, 1, store, CONFIG, RunOptions(on_step=preview)) == losses
    assert same(quiet.weights(1), watched.weights(1))


@pytest.mark.parametrize("view", VIEWS)
def test_distillation_leaves_the_plain_network_alone(store, view):
    """Neither its weights nor its statistics change."""
    guider = small_guider()
    kept, image = snapshot(guider.net), images()
    expected = guider.predict(image, clean(image))
    bank = make_bank(guider, view)
    start = [{name: value.clone() for name, value in bank.weights(index).items()} for index in range(3)]
    distill_expert(guider, bank, 1, store, CONFIG)
    assert {"norm_1.running_mean", "norm_1.num_batches_tracked"} <= {name.removeprefix("net.") for name in kept}
    assert same(snapshot(guider.net), kept) and torch.equal(guider.predict(image, clean(image)), expected)
    assert [same(bank.weights(index), start[index]) for index in range(3)] == [True, False, True]
    assert not any(parameter.requires_grad for parameter in bank.parameters())


@pytest.mark.parametrize("view", VIEWS)
def test_distillation_works_under_inference_mode(store, view):
    """Distillation gives the same experts under inference mode."""
    guider = small_guider()
    outside, inside = make_bank(guider, view), make_bank(guider, view)
    losses = distill_expert(guider, outside, 1, store, CONFIG)
    with torch.inference_mode():
        again = SampleStore(store.folder, store.manifest)
        trajectory_pairs(again, outside.schedule, 1, BatchSpec(0, 2, 0), view)  # its tensors are now those of inference mode
        assert distill_expert(guider, inside, 1, again, CONFIG) == losses
    assert same(inside.weights(1), outside.weights(1))


def test_layers_that_take_no_adapter_are_said_once(store, caplog):
    guider = small_guider()
    base_network(guider).mix = torch.nn.utils.parametrizations.weight_norm(base_network(guider).mix)
    distill(guider, make_bank(guider), store, replace(CONFIG, steps=2))
    assert [record.getMessage() for record in caplog.records if "take no adapter" in record.getMessage()] == [
        f"small/class: {make_bank(guider).describe_left_out()}"]


def test_each_step_is_reported_each_expert_has_a_state(store, tmp_path):
    guider, seen = small_guider(), []
    bank = make_bank(guider)
    losses = distill(guider, bank, store, replace(CONFIG, steps=4), tmp_path / "states",
                     lambda index, step, loss: seen.append((index, step, loss)))
    assert seen == [(index, step, losses[index][step]) for index in range(3) for step in range(4)]
    names = sorted(path.name for path in (tmp_path / "states").iterdir())
    assert names == [f"expert_{index}.state.safetensors" for index in range(3)]


# It learns

@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[SampleStore, SampleStore]:
    """Images of the bundled denoiser and their trajectories: to learn from, and held out."""
    denoiser, stores = load_denoiser(), []
    def generate(seeds):
        recorder, sigmas = TrajectoryRecorder(), karras_sigmas(5, SIGMA_MIN, SIGMA_MAX)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = sample_euler(recorder.wrap(denoiser), seeded_noise(seeds, (3, SIZE, SIZE)) * SIGMA_MAX, sigmas)
        return found, recorder.trajectories(seeds)
    for name, seed in (("train", 0), ("test", 1000)):
        stores.append(SampleStore(tmp_path_factory.mktemp(name), {"seed": seed}))
        stores[-1].fill(SHARD_SIZE, generate)
    return tuple(stores)


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS)
def test_a_short_distillation_brings_an_expert_nearer(tiny, view):
    """The bundled guider on the way to images that the training has not seen."""
    guider, (store, held_out) = replace(load_guider("class"), view=view), tiny
    bank = ExpertBank(base_network(guider), ExpertSchedule((0.05, 5.0, 80.0)), LoraSpec(rank=4), view)
    distill_expert(guider, bank, 1, store, DistillConfig(steps=40, batch=8, lr=3e-3))
    plain, expert = (teacher_distance(guider, judge, held_out, bank.schedule)
                     for judge in (guider, with_experts(guider, bank)))
    assert expert[1][1] < 0.8 * plain[1][1]
    assert expert[0] == pytest.approx(plain[0], rel=1e-4)  # of the expert that was not trained


@pytest.mark.parametrize("view", VIEWS)
def test_the_teacher_distance_grows_with_the_noise(tmp_path, view):
    """The plain network's distance from its clean output grows from about nothing."""
    store, guider = SampleStore(tmp_path, {"seed": 0}), small_guider(view=view)
    ends = images(SHARD_SIZE)
    store.fill(SHARD_SIZE, lambda seeds: (ends, made_up_trajectories(ends, levels=(3.0, 0.1, 1e-3))))
    found = teacher_distance(guider, guider, store, ExpertSchedule((1e-4, 0.01, 1.0, 10.0)), size=16)
    assert [at for at, _ in found] == pytest.approx([1e-3, 0.1, 3.0])
    assert abs(found[0][1]) < 1e-5 and 10 * found[0][1] < found[1][1] < found[2][1]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("edges", [(0.05, 10.0), (0.1, 0.4, 1.0, 10.0), EDGES])
def test_the_teacher_distance_has_a_value_per_interval(store, view, edges):
    """The mean over images, each asked for by itself."""
    guider, schedule = small_guider(), ExpertSchedule(edges)
    bank = make_bank(guider, view)
    for index in range(3):
        disturb(bank, index, seed=10 * index + 1)
    other = with_experts(guider, bank)
    found = teacher_distance(guider, other, store, schedule, size=40)
    assert len(found) == len(schedule)
    for index, (at, value) in enumerate(found):
        pairs = trajectory_pairs(store, schedule, index, BatchSpec(0, 40, -1), view)
        each = [distill_loss(guider, bank, Pairs(*(part[i:i + 1] for part in pairs))) for i in range(40)]
        assert at == pytest.approx(float(pairs.sigma.log().mean().exp()), rel=1e-5)
        assert value == pytest.approx(float(torch.cat(each).mean()), rel=1e-4)


# Faults

class NanAfter(torch.nn.Module):
    """A network that breaks after some calls."""

    def __init__(self, calls: int):
        super().__init__()
        self.net, self.left = fixed_weights(SmallNet()), calls

    def forward(self, image):
        self.left -= 1
        return self.net(image) * (1 if self.left >= 0 else math.nan)


def test_a_broken_network_is_reported_and_steps_are_kept(store, tmp_path):
    """A network that breaks is reported, and the steps before the fault are kept."""
    net = NanAfter(10**6)
    guider = replace(small_guider(), net=IgnoreSigma(net))
    expected = make_bank(guider)
    losses = distill_expert(guider, expected, 1, store, CONFIG)
    bank, state, net.left = make_bank(guider), tmp_path / "state.safetensors", 4
    with says(ValueError, "expert 1", "nan", "step 4", guider.name):
        distill_expert(guider, bank, 1, store, CONFIG, RunOptions(state_file=state))
    assert load_tensors(state)[1]["losses"] == losses[:4]
    assert all(bool(value.isfinite().all()) for value in bank.weights(1).values())
    net.left = 10**6
    assert distill_expert(guider, make_bank(guider), 1, store, CONFIG, RunOptions(state_file=state)) == losses
    net.left = 0
    with says(ValueError, "expert 0", "nan", "step 0"):
        distill_expert(guider, bank, 0, store, CONFIG, RunOptions(state_file=tmp_path / "other.safetensors"))


def test_after_nan_experts_of_a_lower_rate_go_on(store, tmp_path):
    """Each expert goes on where the last good state of the other rate is, in the folder beside."""
    net, fast, steps = NanAfter(10**6), replace(CONFIG, steps=15), []
    guider = replace(small_guider(), net=IgnoreSigma(net))
    net.left = 2 * fast.steps - 1  # of the teacher: the last step of the second expert breaks
    with says(ValueError, "expert 1", f"step {fast.steps - 1}", "step 10 is kept"):
        distill(guider, make_bank(guider), store, fast, tmp_path / "fast")
    net.left, slow = 10**6, replace(fast, lr=fast.lr / 10)
    bank = make_bank(guider)
    distill(guider, bank, store, slow, tmp_path / "slow", lambda index, step, _: steps.append((index, step)))
    assert [step for index, step in steps if index == 1] == list(range(10, fast.steps))
    assert [step for index, step in steps if index == 0] == list(range(fast.steps))
    assert all(bool(value.isfinite().all()) for index in range(3) for value in bank.weights(index).values())


@pytest.mark.parametrize("change, word", [
    ("seed", "config"), ("steps", "config"), ("rank", "lora"), ("view", "view"), ("edges", "edges"), ("guider", "guider"),
    ("weights", "fingerprint"), ("expert", "index"), ("images", "images"), ("store", "store"),
])
def test_a_foreign_state_is_refused_and_left_alone(store, tmp_path, change, word):
    """The state of another distillation."""
    guider, state = small_guider(), tmp_path / "state.safetensors"
    distill_expert(guider, make_bank(guider), 1, store, CONFIG, RunOptions(state_file=state))
    kept = state.read_bytes()
    config, index, bank = CONFIG, 1, make_bank(guider)
    if change in ("seed", "steps"):
        config = replace(CONFIG, **{change: 7})
    elif change == "rank":
        bank = make_bank(guider, rank=3)
    elif change == "view":
        bank = make_bank(guider, "noisy")
    elif change == "edges":
        bank = ExpertBank(base_network(guider), ExpertSchedule((0.1, 0.6, 2.0, 10.0)), LoraSpec(rank=2))
    elif change == "guider":
        guider = replace(guider, name="small/another")
    elif change == "weights":
        guider = small_guider(seed=9)
        bank = make_bank(guider)
    elif change == "expert":
        index = 2
    elif change == "images":
        store.fill(2 * SHARD_SIZE, made)
    elif change == "store":
        store = SampleStore(tmp_path / "another store", {"seed": 5})
        store.fill(SHARD_SIZE, made)
    with says(ValueError, "state.safetensors", f"({word} is", "delete"):
        distill_expert(guider, bank, index, store, config, RunOptions(state_file=state))
    assert state.read_bytes() == kept


def test_the_state_of_another_start_is_refused(store, tmp_path):
    guider, state = small_guider(), tmp_path / "state.safetensors"
    distill_expert(guider, make_bank(guider), 1, store, WARM, RunOptions(state_file=state))
    with says(ValueError, "state.safetensors", "start is 'neighbour', expected None", "delete"):
        distill_expert(guider, make_bank(guider), 1, store, CONFIG, RunOptions(state_file=state))


@pytest.mark.parametrize("size", [0, 500, -1])
def test_a_truncated_state_is_named_and_made_again(store, tmp_path, caplog, size):
    guider, config, options = small_guider(), replace(CONFIG, steps=2), RunOptions(state_file=tmp_path / "state.safetensors")
    losses = distill_expert(guider, make_bank(guider), 1, store, config, options)
    state = options.state_file
    whole = state.read_bytes()
    state.write_bytes(whole[:size])
    assert distill_expert(guider, make_bank(guider), 1, store, config, options) == losses
    assert state.read_bytes() == whole
    assert "state.safetensors cannot be read" in caplog.text and "starts anew" in caplog.text


def test_a_full_disk_leaves_the_last_state_whole(store, tmp_path):
    """A full disk is reported in words and leaves the last state whole."""
    guider, state = small_guider(), tmp_path / "state.safetensors"
    straight, resumed = make_bank(guider), make_bank(guider)
    losses = distill_expert(guider, straight, 1, store, CONFIG)
    with pytest.raises(Stop):
        distill_expert(guider, make_bank(guider), 1, store, CONFIG, RunOptions(state_file=state, on_step=stop_after(5)))
    with full_disk(), says(OSError, "state.safetensors", "Free some disk space"):
        distill_expert(guider, make_bank(guider), 1, store, CONFIG, RunOptions(state_file=state))
    assert len(load_tensors(state)[1]["losses"]) == 5
    assert distill_expert(guider, resumed, 1, store, CONFIG, RunOptions(state_file=state)) == losses
    assert same(resumed.weights(1), straight.weights(1))


def test_an_expert_that_the_bank_does_not_have_is_refused(store):
    guider = small_guider()
    with says(IndexError, "no expert 3", "has 3"):
        distill_expert(guider, make_bank(guider), 3, store, CONFIG)
