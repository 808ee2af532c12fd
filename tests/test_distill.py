"""Distillation without data: resumable to the bit, experts independent of one another, the base untouched, and it learns."""
import math
from dataclasses import replace

import pytest
import torch
from helpers import SmallNet, disturb, fixed_weights, full_disk, images, level, randn, same, says, small_guider, snapshot

from ppap_core.distill import DistillConfig, disagreement, distill, distill_expert, distill_loss, draw_batch, view_of
from ppap_core.experts import ExpertBank, LoraSpec, base_network, with_experts
from ppap_core.files import load_tensors
from ppap_core.guidance import Term, guidance_shift
from ppap_core.guider import IgnoreSigma, clean
from ppap_core.noise import ExpertSchedule, as_seen, expand
from ppap_core.samples import SHARD, SampleStore
from ppap_core.tasks import TASKS
from ppap_core.tinyworld import load_guider
from ppap_core.tinyworld.scenes import draw

CONFIG = DistillConfig(steps=10, batch=3, lr=1e-2, seed=4, save_every=3)
EDGES = (0.1, 0.5, 2.0, 10.0)
TASK_VIEWS = [(task, view) for task in TASKS for view in ("noisy", "denoised")]


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x * expand(0.25 / (0.25 + sigma**2), x)


def make_bank(guider, view: str = "denoised", rank: int = 2, seed: int = 0) -> ExpertBank:
    return ExpertBank(base_network(guider), ExpertSchedule(EDGES), LoraSpec(rank=rank), view, seed=seed)


@pytest.fixture
def store(tmp_path) -> SampleStore:
    store = SampleStore(tmp_path / "store", {"seed": 0})
    store.fill(SHARD, lambda seeds: images(len(seeds), seed=seeds[0]))
    return store


class Stop(Exception):
    pass


def stop_after(steps: int):
    def on_step(index, step, loss):
        if step + 1 == steps:
            raise Stop
    return on_step


# The loss

@pytest.mark.parametrize("task, view", TASK_VIEWS)
def test_the_loss_compares_the_expert_on_the_noisy_image_with_the_plain_network_on_the_clean_one(task, view):
    guider = small_guider(task)
    bank = make_bank(guider, view)
    disturb(bank, 1)
    image, sigma, noise = images(), torch.tensor([0.5, 1.0, 1.9]), randn(3, 3, 20, 28, seed=8)
    loss = distill_loss(guider, bank, view_of(bank, denoise), image, image, sigma, noise)
    x = image + sigma[:, None, None, None] * noise
    seen = x / (1 + sigma**2).sqrt()[:, None, None, None] if view == "noisy" else denoise(x, sigma)
    expected = TASKS[task].distance(with_experts(guider, bank).predict(seen, sigma), guider.predict(image, clean(image)))
    assert loss.shape == (3,) and torch.equal(loss, expected)


def test_without_noise_a_new_expert_has_nothing_to_learn():
    guider = small_guider()
    bank = make_bank(guider)
    image = images()
    loss = distill_loss(guider, bank, lambda x, sigma: x, image, image, level(0.2, image), torch.zeros_like(image))
    assert loss.abs().max() < 1e-6


@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_an_expert_sees_in_guidance_what_it_saw_in_distillation(view):
    guider, seen = small_guider(), []
    bank = make_bank(guider, view)
    image, sigma, noise = images(), level(1.0, images()), randn(3, 3, 20, 28, seed=8)
    handle = bank.register_forward_pre_hook(lambda module, inputs: seen.append([part.detach().clone() for part in inputs]))
    distill_loss(guider, bank, view_of(bank, denoise), image, image, sigma, noise)
    x = image + noise
    guidance_shift([Term(with_experts(guider, bank))], x, sigma, denoise(x, sigma))
    handle.remove()
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_no_gradient_reaches_the_teacher_or_the_denoiser(view):
    guider = small_guider()
    bank = make_bank(guider, view)
    factor = torch.nn.Parameter(torch.tensor(0.8))
    image = images()
    with bank.trainable(1):
        see = view_of(bank, lambda x, sigma: x * factor)
        distill_loss(guider, bank, see, image, image, level(1.0, image), randn(3, 3, 20, 28)).sum().backward()
    assert factor.grad is None and all(parameter.grad is None for parameter in guider.net.parameters())
    assert any(parameter.grad is not None for parameter in bank.parameters())


def test_the_denoised_view_needs_the_model_and_the_noisy_view_does_not():
    guider = small_guider()
    assert view_of(make_bank(guider, "noisy"), None) is as_seen
    with says(ValueError, "denoised", "model"):
        view_of(make_bank(guider, "denoised"), None)


# Batches

def test_a_batch_of_a_step_is_a_function_of_seed_expert_and_step(store):
    bank = make_bank(small_guider())
    first = draw_batch(bank, 1, store, 5, 6, 4)
    again = draw_batch(bank, 1, SampleStore(store.folder, store.recipe), 5, 6, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for index, step, seed in ((2, 5, 4), (1, 6, 4), (1, 5, 5)):
        other = draw_batch(bank, index, store, step, 6, seed)
        assert not torch.equal(first[0], other[0]) and not torch.equal(first[2], other[2])


def test_the_noise_of_every_batch_is_of_its_own_expert(store):
    bank = make_bank(small_guider())
    for index in range(3):
        sigmas = torch.cat([draw_batch(bank, index, store, step, 8, 0)[2] for step in range(50)])
        assert {bank.schedule.index(sigma) for sigma in sigmas.tolist()} == {index}


def test_half_of_the_images_are_mirrored_and_nothing_else_is_done_to_them(store):
    bank, mirrored = make_bank(small_guider()), 0
    for step in range(40):
        batch = draw_batch(bank, 0, store, step, 8, 0)[0]
        stored = store.images.float() / 127.5 - 1
        for image in batch:
            straight = (stored == image).flatten(1).all(1).any()
            turned = (stored == image.flip(-1)).flatten(1).all(1).any()
            assert bool(straight) != bool(turned)
            mirrored += int(turned)
    assert 120 < mirrored < 200  # of 320


@pytest.mark.parametrize("seed", [123_456_789, 2**32 - 1, 2**64 - 1])
def test_any_seed_that_comfyui_gives_can_be_distilled_with(store, seed):
    guider = small_guider()
    bank = make_bank(guider)
    losses = distill_expert(guider, bank, 2, store, denoise, replace(CONFIG, steps=2, seed=seed))
    assert len(losses) == 2
    assert losses != distill_expert(guider, make_bank(guider), 2, store, denoise, replace(CONFIG, steps=2, seed=seed - 1))


# Training

@pytest.mark.parametrize("stop", [1, 5, 6, 9])
@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_a_training_that_was_stopped_and_gone_on_with_gives_the_same_bits_as_one_without_a_stop(store, tmp_path, stop, view):
    guider = small_guider()
    straight, stopped, resumed = (make_bank(guider, view) for _ in range(3))
    losses = distill_expert(guider, straight, 1, store, denoise, CONFIG)
    state = tmp_path / "state.safetensors"
    with pytest.raises(Stop):
        distill_expert(guider, stopped, 1, store, denoise, CONFIG, state, stop_after(stop))
    assert len(load_tensors(state)[1]["losses"]) == stop
    disturb(resumed, 1)  # what was in memory is lost and does not matter
    assert distill_expert(guider, resumed, 1, store, denoise, CONFIG, state) == losses
    assert same(resumed.weights(1), straight.weights(1)) and not same(stopped.weights(1), straight.weights(1))


def test_the_learning_rate_falls_along_a_cosine_to_zero(store):
    """AdamW's first step moves every weight by the rate itself, and no later one by much more than its own rate."""
    guider = small_guider()
    bank, moves = make_bank(guider), []
    before = {name: value.clone() for name, value in bank.weights(1).items()}
    def on_step(index, step, loss):
        moves.append(max(float((value - before[name]).abs().max()) for name, value in bank.weights(1).items()))
        before.update({name: value.clone() for name, value in bank.weights(1).items()})
    distill_expert(guider, bank, 1, store, denoise, CONFIG, on_step=on_step)
    rates = [CONFIG.lr * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert moves[0] == pytest.approx(CONFIG.lr, rel=1e-3)
    assert all(0.3 * rate < move < 2 * rate for move, rate in zip(moves, rates, strict=True))


def test_a_training_that_the_machine_ended_goes_on_from_the_last_saved_step(store, tmp_path, monkeypatch):
    guider, state = small_guider(), tmp_path / "state.safetensors"
    straight, resumed = make_bank(guider), make_bank(guider)
    losses = distill_expert(guider, straight, 1, store, denoise, CONFIG)
    copy = tmp_path / "copy.safetensors"
    def on_step(index, step, loss):
        if step == 7:  # the state of step 6 is what a power cut here leaves
            copy.write_bytes(state.read_bytes())
    distill_expert(guider, make_bank(guider), 1, store, denoise, CONFIG, state, on_step)
    assert len(load_tensors(copy)[1]["losses"]) == 6
    assert distill_expert(guider, resumed, 1, store, denoise, CONFIG, copy) == losses
    assert same(resumed.weights(1), straight.weights(1))


def test_a_finished_training_is_loaded_and_not_gone_on_with(store, tmp_path):
    guider, state = small_guider(), tmp_path / "state.safetensors"
    first, second = make_bank(guider), make_bank(guider)
    losses = distill_expert(guider, first, 0, store, denoise, CONFIG, state)
    def fail(*_):
        raise AssertionError("trained again")
    assert distill_expert(guider, second, 0, store, fail, CONFIG, state, fail) == losses
    assert same(first.weights(0), second.weights(0))


def test_an_expert_does_not_depend_on_whether_others_were_trained_before_it(store):
    guider = small_guider()
    alone, after = make_bank(guider), make_bank(guider)
    expected = distill_expert(guider, alone, 2, store, denoise, CONFIG)
    losses = distill(guider, after, store, denoise, CONFIG)
    assert losses[2] == expected and same(after.weights(2), alone.weights(2))
    assert same(make_bank(guider).weights(1), alone.weights(1))


def test_looking_through_the_experts_in_the_middle_of_a_training_does_not_change_it(store):
    guider = small_guider()
    quiet, watched = make_bank(guider), make_bank(guider)
    losses = distill_expert(guider, quiet, 1, store, denoise, CONFIG)
    def preview(index, step, loss):
        disagreement(guider, with_experts(guider, watched), store, denoise, [0.2, 5.0], size=2)
    assert distill_expert(guider, watched, 1, store, denoise, CONFIG, on_step=preview) == losses
    assert same(quiet.weights(1), watched.weights(1))


@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_distillation_changes_no_weight_and_no_statistic_of_the_plain_network(store, view):
    guider = small_guider()
    kept, image = snapshot(guider.net), images()
    expected = guider.predict(image, clean(image))
    bank = make_bank(guider, view)
    start = [{name: value.clone() for name, value in bank.weights(index).items()} for index in range(3)]
    distill_expert(guider, bank, 1, store, denoise, CONFIG)
    assert {"norm_1.running_mean", "norm_1.num_batches_tracked"} <= {name.removeprefix("net.") for name in kept}
    assert same(snapshot(guider.net), kept) and torch.equal(guider.predict(image, clean(image)), expected)
    assert [same(bank.weights(index), start[index]) for index in range(3)] == [True, False, True]
    assert not any(parameter.requires_grad for parameter in bank.parameters())


def test_distillation_works_under_inference_mode_and_gives_the_same_experts(store):
    guider = small_guider()
    outside, inside = make_bank(guider), make_bank(guider)
    losses = distill_expert(guider, outside, 1, store, denoise, CONFIG)
    with torch.inference_mode():
        fresh = SampleStore(store.folder, store.recipe)
        fresh.batch(0, 2, 0)  # its images are now tensors of inference mode
        assert distill_expert(guider, inside, 1, fresh, denoise, CONFIG) == losses
    assert same(inside.weights(1), outside.weights(1))


def test_every_step_is_reported_and_every_expert_has_its_own_state(store, tmp_path):
    guider, seen = small_guider(), []
    bank = make_bank(guider)
    losses = distill(guider, bank, store, denoise, replace(CONFIG, steps=4), tmp_path / "states",
                     lambda index, step, loss: seen.append((index, step, loss)))
    assert seen == [(index, step, losses[index][step]) for index in range(3) for step in range(4)]
    names = sorted(path.name for path in (tmp_path / "states").iterdir())
    assert names == [f"expert_{index}.state.safetensors" for index in range(3)]


# It learns

def test_a_short_distillation_brings_an_expert_nearer_to_the_clean_answer_than_the_plain_network(tmp_path):
    """The bundled guider on noisy scenes that the training has not seen."""
    guider = replace(load_guider("class"), view="noisy")
    store, held_out = (SampleStore(tmp_path / name, {"seed": seed}) for name, seed in (("train", 0), ("test", 1000)))
    for each in (store, held_out):
        each.fill(2 * SHARD, lambda seeds: draw(seeds).image)
    bank = ExpertBank(base_network(guider), ExpertSchedule((0.3, 0.6, 2.0)), LoraSpec(rank=4), "noisy")
    distill_expert(guider, bank, 0, store, config=DistillConfig(steps=80, batch=16, lr=3e-3))
    plain, expert = (disagreement(guider, judge, held_out, as_seen, [0.45, 0.59, 0.7, 1.9])
                     for judge in (guider, with_experts(guider, bank)))
    assert all(after < 0.8 * before for before, after in zip(plain[:2], expert[:2], strict=True))
    assert expert[2:] == plain[2:]  # of the expert that was not trained


def test_the_disagreement_of_the_plain_network_is_zero_without_noise_and_grows_with_it(store):
    guider = small_guider()
    values = disagreement(guider, guider, store, as_seen, [0.0, 0.1, 1.0], size=16)
    assert values[0] == pytest.approx(0, abs=1e-6) and values[0] < values[1] < values[2]


# Faults

class NanAfter(torch.nn.Module):
    """A network that breaks after some calls."""

    def __init__(self, calls: int):
        super().__init__()
        self.net, self.left = fixed_weights(SmallNet()), calls

    def forward(self, image):
        self.left -= 1
        return self.net(image) * (1 if self.left >= 0 else math.nan)


def test_a_network_that_breaks_in_distillation_is_told_and_the_steps_before_are_kept(store, tmp_path):
    net = NanAfter(10**6)
    guider = replace(small_guider(), net=IgnoreSigma(net))
    expected = make_bank(guider)
    losses = distill_expert(guider, expected, 1, store, denoise, CONFIG)
    bank, state, breaks = make_bank(guider), tmp_path / "state.safetensors", iter(range(100))
    def breaking(x, sigma):
        return denoise(x, sigma) * (math.nan if next(breaks) == 4 else 1)
    with says(ValueError, "expert 1", "nan", "step 4", guider.name):
        distill_expert(guider, bank, 1, store, breaking, CONFIG, state)
    assert load_tensors(state)[1]["losses"] == losses[:4]
    assert all(bool(value.isfinite().all()) for value in bank.weights(1).values())
    assert distill_expert(guider, make_bank(guider), 1, store, denoise, CONFIG, state) == losses
    net.left = 0
    with says(ValueError, "expert 0", "nan", "step 0"):
        distill_expert(guider, bank, 0, store, denoise, CONFIG, tmp_path / "other.safetensors")


@pytest.mark.parametrize("change, word", [
    ("seed", "config"), ("steps", "config"), ("rank", "lora"), ("view", "view"), ("edges", "edges"), ("guider", "guider"),
    ("weights", "fingerprint"), ("expert", "index"), ("images", "images"), ("store", "store"),
])
def test_the_state_of_another_distillation_is_refused_and_left_alone(store, tmp_path, change, word):
    guider, state = small_guider(), tmp_path / "state.safetensors"
    distill_expert(guider, make_bank(guider), 1, store, denoise, CONFIG, state)
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
        store.fill(2 * SHARD, lambda seeds: images(len(seeds), seed=seeds[0]))
    elif change == "store":
        store = SampleStore(tmp_path / "another store", {"seed": 5})
        store.fill(SHARD, lambda seeds: images(len(seeds)))
    with says(ValueError, "state.safetensors", f"({word} is", "delete"):
        distill_expert(guider, bank, index, store, denoise, config, state)
    assert state.read_bytes() == kept


def test_a_truncated_state_is_refused(store, tmp_path):
    guider, state = small_guider(), tmp_path / "state.safetensors"
    distill_expert(guider, make_bank(guider), 1, store, denoise, replace(CONFIG, steps=2), state)
    state.write_bytes(state.read_bytes()[:500])
    with says(ValueError, "state.safetensors", "cannot be read"):
        distill_expert(guider, make_bank(guider), 1, store, denoise, replace(CONFIG, steps=2), state)


def test_a_full_disk_in_a_training_is_told_and_the_last_state_stays_whole(store, tmp_path):
    guider, state = small_guider(), tmp_path / "state.safetensors"
    straight, resumed = make_bank(guider), make_bank(guider)
    losses = distill_expert(guider, straight, 1, store, denoise, CONFIG)
    with pytest.raises(Stop):
        distill_expert(guider, make_bank(guider), 1, store, denoise, CONFIG, state, stop_after(5))
    with full_disk(), says(OSError, "state.safetensors", "Free some disk space"):
        distill_expert(guider, make_bank(guider), 1, store, denoise, CONFIG, state)
    assert len(load_tensors(state)[1]["losses"]) == 5
    assert distill_expert(guider, resumed, 1, store, denoise, CONFIG, state) == losses
    assert same(resumed.weights(1), straight.weights(1))


def test_an_expert_that_the_bank_does_not_have_is_refused(store):
    guider = small_guider()
    with says(IndexError, "no expert 3", "has 3"):
        distill_expert(guider, make_bank(guider), 3, store, denoise, CONFIG)
