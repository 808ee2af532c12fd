"""The store of generated images and their trajectories, and the pairs that experts learn from."""
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import full_disk, gaussian_denoise, level, made_up_trajectories, randn, says

from ppap_core.experts.pairs import trajectory_pairs
from ppap_core.experts.samples import SHARD_SIZE, BatchSpec, SampleStore, from_uint8, to_uint8
from ppap_core.experts.source import schedule_for
from ppap_core.experts.trajectories import STEPS_PER_TRAJECTORY, Trajectories, TrajectoryRecorder
from ppap_core.io.files import load_tensors, save_tensors
from ppap_core.noise import to_vp
from ppap_core.rng import seeded_noise
from ppap_core.sampling import karras_sigmas, sample_heun
from ppap_core.schedules import ExpertSchedule

SHAPE = (3, 5, 7)
MANIFEST = {"model": "gaussian", "steps": 4, "seed": 11}


def generate(seeds: list[int]) -> tuple[torch.Tensor, Trajectories]:
    """A real sampling, of a Gaussian around zero."""
    recorder = TrajectoryRecorder()
    images = sample_heun(recorder.wrap(gaussian_denoise), seeded_noise(seeds, SHAPE) * 5.0, karras_sigmas(4, 0.1, 5.0))
    return images, recorder.trajectories(seeds)


def end_in(images: torch.Tensor) -> tuple[torch.Tensor, Trajectories]:
    """Images and made-up trajectories of them."""
    return images, made_up_trajectories(images)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_byte_value_survives_the_way_to_an_image_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert from_uint8(values)[[0, 255]].tolist() == [-1.0, 1.0]
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.999, 1.0, 9.0])).tolist() == [0, 0, 255, 255, 255]


def test_experts_between_given_edges_have_steps_to_learn_from(tmp_path):
    store = SampleStore(tmp_path / "a", MANIFEST)
    store.fill(1, generate)
    lowest, low, high, highest = store.sigmas.unique().tolist()
    assert schedule_for(store, 7, edges=(low, high)).edges == (lowest, low, high, highest)
    assert schedule_for(store, 7, sigma_max=high, edges=(low,)).edges == (lowest, low, high)
    for edges in ((low * 1.001, low * 1.002), (lowest / 2,), (highest,), (highest * 2,)):
        with says(ValueError, "no step of the samples", "between the edges"):
            schedule_for(store, 7, edges=edges)


def test_a_store_holds_whole_shards_of_its_seeds(tmp_path):
    store, asked = SampleStore(tmp_path / "a", MANIFEST), []
    store.fill(SHARD_SIZE + 1, lambda seeds: asked.extend(seeds) or generate(seeds))
    assert len(store) == 2 * SHARD_SIZE and asked == list(range(11, 11 + 2 * SHARD_SIZE))
    assert store.images.shape == (2 * SHARD_SIZE, *SHAPE) and store.images.dtype == torch.uint8
    assert store.sigmas.shape == (2 * SHARD_SIZE, STEPS_PER_TRAJECTORY)
    assert store.noisy_vp.shape == store.denoised.shape == (2 * SHARD_SIZE, STEPS_PER_TRAJECTORY, *SHAPE)
    expected, paths = generate(asked)
    torch.testing.assert_close(from_uint8(store.images), expected.clamp(-1, 1), rtol=0, atol=1 / 127)
    for name, part in paths._asdict().items():
        torch.testing.assert_close(getattr(store, name), part, rtol=0, atol=2e-3)


def test_a_trajectory_depends_on_its_seed_only():
    """A trajectory depends on its seed and not on the size of the batch."""
    together, paths = generate(list(range(5)))
    for seed in range(5):
        alone, path = generate([seed])
        torch.testing.assert_close(alone[0], together[seed], rtol=0, atol=1e-6)
        assert torch.equal(path.sigmas[0], paths.sigmas[seed])
        for part, whole in zip(path, paths, strict=True):
            torch.testing.assert_close(part[0], whole[seed], rtol=0, atol=2e-3)


def test_a_store_that_holds_enough_generates_nothing(tmp_path):
    SampleStore(tmp_path, MANIFEST).fill(SHARD_SIZE, generate)
    def fail(seeds):
        raise AssertionError("generated again")
    SampleStore(tmp_path, MANIFEST).fill(SHARD_SIZE, fail)


@pytest.mark.parametrize("where", ["in a shard", "after a shard", "while writing"])
def test_a_fill_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, where, monkeypatch):
    SampleStore(tmp_path / "straight", MANIFEST).fill(2 * SHARD_SIZE, generate)
    store = SampleStore(tmp_path / "stopped", MANIFEST)

    def stop(*_):
        raise InterruptedError
    with pytest.raises((InterruptedError, OSError)):
        if where == "after a shard":
            store.fill(2 * SHARD_SIZE, generate, on_shard=stop)
        else:
            store.fill(SHARD_SIZE, generate)
            if where == "while writing":
                monkeypatch.setattr("ppap_core.io.files.os.replace", stop)
            store.fill(2 * SHARD_SIZE, stop if where == "in a shard" else generate)
    monkeypatch.undo()
    assert len(store) == SHARD_SIZE and len(contents(tmp_path / "stopped")) == 2
    again = SampleStore(tmp_path / "stopped", MANIFEST)
    again.fill(2 * SHARD_SIZE, generate)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def test_a_fill_reports_each_shard_after_it_is_safe(tmp_path):
    store, seen = SampleStore(tmp_path, MANIFEST), []
    store.fill(2 * SHARD_SIZE, generate, on_shard=lambda count, new: seen.append((count, len(new), len(store))))
    assert seen == [(SHARD_SIZE, SHARD_SIZE, SHARD_SIZE), (2 * SHARD_SIZE, SHARD_SIZE, 2 * SHARD_SIZE)]


def test_images_added_later_are_seen(tmp_path):
    store = SampleStore(tmp_path, MANIFEST)
    store.fill(SHARD_SIZE, generate)
    assert {len(part) for part in (store.images, store.sigmas, store.noisy_vp, store.denoised)} == {SHARD_SIZE}
    store.fill(2 * SHARD_SIZE, generate)
    assert {len(part) for part in (store.images, store.sigmas, store.noisy_vp, store.denoised)} == {2 * SHARD_SIZE}


@pytest.mark.parametrize("other, words", [
    (MANIFEST | {"steps": 5}, ["steps is 4, expected 5"]),
    (MANIFEST | {"cfg": 7.0}, ["cfg is None, expected 7.0"]),
    ({"model": "gaussian", "steps": 4}, ["seed is 11, expected None"]),
])
def test_a_folder_of_another_manifest_is_refused_and_left_alone(tmp_path, other, words):
    SampleStore(tmp_path / "mine", MANIFEST).fill(SHARD_SIZE, generate)
    kept = contents(tmp_path / "mine")
    with says(ValueError, "mine", *words):
        SampleStore(tmp_path / "mine", other)
    assert contents(tmp_path / "mine") == kept


@pytest.mark.parametrize("manifest", [{"size": (20, 28), "seed": 0}, {"sigma_max": 80.0}, {"nested": {"a": [1, (2, 3)]}}])
def test_a_store_knows_its_own_manifest_again(tmp_path, manifest):
    assert SampleStore(tmp_path, manifest).manifest == SampleStore(tmp_path, manifest).manifest


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\x00\xff"])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    """What the images beside it were made from is not known any more."""
    (tmp_path / "manifest.json").write_bytes(text.encode("latin1"))
    (tmp_path / "shard_00000.safetensors").touch()
    with says(ValueError, "manifest.json", "JSON"):
        SampleStore(tmp_path, MANIFEST)


def test_an_empty_store_is_refused(tmp_path):
    with says(ValueError, "empty", "no images"):
        SampleStore(tmp_path / "empty", MANIFEST).random_images(BatchSpec(0, 4, 0))


def test_a_truncated_shard_is_refused_by_name(tmp_path):
    store = SampleStore(tmp_path, MANIFEST)
    store.fill(SHARD_SIZE, generate)
    shard = next(tmp_path.glob("shard_*"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with says(ValueError, shard.name, "cannot be read"):
        SampleStore(tmp_path, MANIFEST).random_images(BatchSpec(0, 4, 0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["images", "noisy_vp", "denoised"])
def test_what_is_not_finite_is_not_stored(tmp_path, value, part):
    def broken(seeds):
        images, paths = generate(seeds)
        (images if part == "images" else getattr(paths, part))[3, 1, 2, 2] = value
        return images, paths
    store = SampleStore(tmp_path, MANIFEST)
    with says(ValueError, "NaN", "precision"):
        store.fill(SHARD_SIZE, broken)
    assert len(store) == 0 and not list(tmp_path.glob("shard_*"))


def test_a_batch_is_a_function_of_step_size_and_seed(tmp_path):
    store = SampleStore(tmp_path, MANIFEST)
    store.fill(2 * SHARD_SIZE, generate)
    first = store.random_images(BatchSpec(3, 6, 5))
    assert first.shape == (6, *SHAPE) and first.abs().max() <= 1
    store.random_images(BatchSpec(4, 6, 5))
    assert torch.equal(SampleStore(tmp_path, MANIFEST).random_images(BatchSpec(3, 6, 5)), first)
    for other in (store.random_images(BatchSpec(4, 6, 5)), store.random_images(BatchSpec(3, 6, 6))):
        assert not torch.equal(other, first)


def test_batches_reach_every_image(tmp_path):
    store = SampleStore(tmp_path, MANIFEST)
    images = torch.arange(2 * SHARD_SIZE, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1) / 127.5 - 1
    store.fill(2 * SHARD_SIZE, lambda seeds: end_in(images[[seed - 11 for seed in seeds]]))
    drawn = torch.cat([store.random_images(BatchSpec(step, 32, 0)) for step in range(60)])[:, 0, 0, 0]
    assert len(to_uint8(drawn).unique()) == 2 * SHARD_SIZE


@pytest.mark.parametrize("seed", [2**32 - 1, 2**63, 2**64 - 1])
def test_any_64_bit_seed_fills_a_store_and_draws_batches(tmp_path, seed):
    store = SampleStore(tmp_path, MANIFEST | {"seed": seed})
    store.fill(SHARD_SIZE, generate)
    assert not torch.equal(store.random_images(BatchSpec(0, 4, seed)), store.random_images(BatchSpec(0, 4, seed - 1)))


def test_nothing_of_a_shard_is_left_behind_when_the_disk_is_full(tmp_path):
    store = SampleStore(tmp_path, MANIFEST)
    with full_disk(), says(OSError, "shard_00000", "Free some disk space"):
        store.fill(SHARD_SIZE, generate)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_stored_images_are_the_ones_generated_up_to_rounding(tmp_path):
    store = SampleStore(tmp_path, MANIFEST)
    store.fill(SHARD_SIZE, lambda seeds: end_in(randn(len(seeds), *SHAPE, seed=seeds[0]).tanh()))
    assert (from_uint8(store.images) - randn(SHARD_SIZE, *SHAPE, seed=11).tanh()).abs().max() <= 0.5 / 127.5 + 1e-6


@pytest.mark.parametrize("images, paths", [(1, 0), (0, 1), (-1, 0), (0, -1)])
def test_a_generator_must_keep_to_its_seeds(tmp_path, images, paths):
    """A generator must make one image and one trajectory for each seed."""
    def wrong(seeds):
        made, way = generate(seeds + [0])
        return made[:SHARD_SIZE + images], Trajectories(*(part[:SHARD_SIZE + paths] for part in way))
    store = SampleStore(tmp_path, MANIFEST)
    with says(ValueError, f"{SHARD_SIZE + images} images", f"{SHARD_SIZE + paths} trajectories", f"{SHARD_SIZE} seeds"):
        store.fill(SHARD_SIZE, wrong)
    assert len(store) == 0 and not list(tmp_path.glob("shard_*"))


@pytest.mark.parametrize("old", [0, 1])
def test_a_store_of_images_without_trajectories_is_refused(tmp_path, old):
    store = SampleStore(tmp_path / "old", MANIFEST)
    store.fill(2 * SHARD_SIZE, generate)
    shard = tmp_path / "old" / f"shard_{old:05d}.safetensors"
    save_tensors(shard, {"images": load_tensors(shard)[0]["images"]}, {"first": old * SHARD_SIZE})
    assert SampleStore(tmp_path / "old", MANIFEST).random_images(BatchSpec(0, 4, 0)).shape == (4, *SHAPE)
    with says(ValueError, "old", "trajectories", "delete"):
        trajectory_pairs(SampleStore(tmp_path / "old", MANIFEST), ExpertSchedule((0.1, 1.0)), 0, BatchSpec(0, 4, 0), "noisy")


# What is kept of a trajectory

def recorded(seeds: Sequence[int], calls: int, kept: int) -> torch.Tensor:
    """The numbers of the calls that are kept of each image, (B, kept): the sigma says the call, the prediction the image."""
    recorder = TrajectoryRecorder()
    for call in range(calls):
        image = torch.arange(len(seeds)).float().reshape(-1, 1, 1, 1).expand(-1, 2, 3, 5)
        recorder.record(call + image, level(float(call), image), image)
    found = recorder.trajectories(seeds, kept)
    image, call = torch.arange(len(seeds))[:, None], found.sigmas.long()
    assert found.noisy_vp.shape == found.denoised.shape == (len(seeds), kept, 2, 3, 5)
    assert (found.denoised == image[..., None, None, None]).all(), "what is kept is of the image itself"
    expected = ((image + call) / (1 + call**2).sqrt()).half()
    assert (found.noisy_vp == expected[..., None, None, None]).all(), "state and noise level are of one call"
    return call


@pytest.mark.parametrize("calls, kept", [(24, 6), (20, 6), (7, 6), (6, 6), (20, 1), (9, 2)])
def test_one_call_of_each_equal_part_of_the_trajectory_is_kept(calls, kept):
    chosen = recorded(range(600), calls, kept)
    for part in range(kept):  # a call that lies across the end of a part belongs to both
        inside = set(range(part * calls // kept, -(-(part + 1) * calls // kept)))
        assert set(chosen[:, part].tolist()) == inside
    assert len(chosen.unique()) == calls


def test_every_call_is_kept_about_equally_often():
    counts = recorded(range(2000), 20, 6).flatten().bincount(minlength=20)
    assert counts.min() > 500 and counts.max() < 700  # 600 each


def test_what_is_kept_depends_on_the_seed_of_the_image_only():
    seeds = [3, 2**63, 11, 2**64 - 1, 0, 17, 12]
    together = recorded(seeds, 20, 6)
    for cut in (1, 4):
        assert torch.equal(torch.cat([recorded(seeds[:cut], 20, 6), recorded(seeds[cut:], 20, 6)]), together)
    assert torch.equal(recorded(seeds[::-1], 20, 6).flip(0), together)
    assert len({tuple(row) for row in together.tolist()}) == len(seeds)


@pytest.mark.parametrize("calls, expected", [(1, [0, 0, 0, 0, 0, 0]), (2, [0, 0, 0, 1, 1, 1]), (3, [0, 0, 1, 1, 2, 2])])
def test_short_trajectories_are_kept_whole_and_more_than_once(calls, expected):
    assert recorded(range(50), calls, 6).tolist() == [expected] * 50


def test_a_recorder_is_emptied_and_refuses_silent_models():
    """It forgets what it gave, and refuses a model that was not asked."""
    recorder, x = TrajectoryRecorder(), randn(3, *SHAPE)
    with says(ValueError, "not asked", "step"):
        recorder.trajectories(range(3))
    for sigma in (2.0, 0.5):
        recorder.record(x, level(sigma, x), x)
        assert recorder.trajectories(range(3), 2).sigmas.tolist() == [[sigma, sigma]] * 3
    with says(ValueError, "not asked", "step"):
        recorder.trajectories(range(3))


@pytest.mark.parametrize("sigma", [80.0, 1e6])
def test_half_precision_bears_the_strongest_noise(sigma):
    recorder, image, noise = TrajectoryRecorder(), randn(3, *SHAPE).tanh(), randn(3, *SHAPE, seed=1)
    recorder.record(image + sigma * noise, level(sigma, image), image)
    found = recorder.trajectories(range(3), 1)
    assert found.noisy_vp.dtype == found.denoised.dtype == torch.float16 and found.sigmas.tolist() == [[sigma]] * 3
    torch.testing.assert_close(found.noisy_vp[:, 0].float(), noise, rtol=2e-3, atol=2 / sigma)


def test_overhearing_a_sampling_changes_nothing_about_it():
    x, sigmas, recorder = seeded_noise(range(3), SHAPE) * 5.0, karras_sigmas(4, 0.1, 5.0), TrajectoryRecorder()
    asked = []
    def denoise(x, sigma):
        asked.append((x.clone(), sigma.clone()))
        return gaussian_denoise(x, sigma)
    assert torch.equal(sample_heun(recorder.wrap(denoise), x, sigmas), sample_heun(gaussian_denoise, x, sigmas))
    assert len(recorder.calls) == len(asked) == 7
    for (sigma, noisy, denoised), (state, at) in zip(recorder.calls, asked, strict=True):
        assert torch.equal(sigma, at) and torch.equal(noisy, to_vp(state, at).half())
        assert torch.equal(denoised, gaussian_denoise(state, at).half())


# Pairs of trajectories

SCHEDULE = ExpertSchedule((0.1, 0.7, 2.0, 10.0))


def numbered(folder: Path, step_sigmas: torch.Tensor) -> SampleStore:
    """A store whose images have their number as their colour, and whose states have number and step."""
    store = SampleStore(folder, {"seed": 0})

    def generate(seeds):
        number = torch.tensor(seeds)
        images = from_uint8(number.to(torch.uint8))[:, None, None, None].expand(-1, *SHAPE)
        states = (10 * number[:, None] + torch.arange(step_sigmas.shape[1])).half()[..., None, None, None]
        return images, Trajectories(step_sigmas[number], states.expand(-1, -1, *SHAPE), -states.expand(-1, -1, *SHAPE))
    store.fill(len(step_sigmas), generate)
    return store


def spread_sigmas() -> torch.Tensor:
    """Noise levels of 64 images with six steps each: around every edge, on it, and beyond all edges."""
    edges = torch.tensor(SCHEDULE.edges)
    beside = [edges.nextafter(torch.tensor(end)) for end in (0.0, math.inf)]
    special = torch.cat([edges, *beside, torch.tensor([1e-6, 80.0])])
    return torch.cat([special, (2.5 * randn(64 * 6 - len(special))).exp()]).reshape(64, 6)


def places(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Image numbers and steps that pairs of a numbered store were made of."""
    seen = pairs.inputs[:, 0, 0, 0].abs().long()
    assert (pairs.inputs.abs() == seen[:, None, None, None]).all()
    return seen // 10, seen % 10


@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_pairs_are_steps_and_the_images_that_these_led_to(tmp_path, view):
    store = numbered(tmp_path, spread_sigmas())
    pairs = trajectory_pairs(store, SCHEDULE, 1, BatchSpec(0, 500, 0), view)
    number, step = places(pairs)
    assert pairs.images.shape == pairs.inputs.shape == (500, *SHAPE) and pairs.inputs.dtype == torch.float32
    assert (to_uint8(pairs.images) == number[:, None, None, None]).all(), "the image is that of the step"
    assert torch.equal(pairs.sigma, store.sigmas[number, step]), "the noise level is that of the step"
    assert (pairs.inputs.flatten(1)[number + step > 0].sign() == (1 if view == "noisy" else -1)).all()


@pytest.mark.parametrize("edges", [SCHEDULE.edges, (0.5, 1.0), (0.001, 0.7, 200.0)])
def test_every_step_belongs_to_the_expert_that_guides_there(tmp_path, edges):
    """Those below the first edge are the first expert's, those above the last edge the last one's."""
    sigmas, schedule = spread_sigmas(), ExpertSchedule(edges)
    store, responsible = numbered(tmp_path, sigmas), [[schedule.index(float(sigma)) for sigma in row] for row in sigmas]
    for index in range(len(schedule)):
        number, step = places(trajectory_pairs(store, schedule, index, BatchSpec(0, 12_000, 0), "noisy"))
        expected = {(i, k) for i in range(64) for k in range(6) if responsible[i][k] == index}
        assert set(zip(number.tolist(), step.tolist(), strict=True)) == expected


def test_pairs_are_a_function_of_seed_expert_and_step(tmp_path):
    store = numbered(tmp_path, spread_sigmas())
    first = trajectory_pairs(store, SCHEDULE, 1, BatchSpec(5, 9, 4), "noisy")
    trajectory_pairs(store, SCHEDULE, 1, BatchSpec(6, 9, 4), "noisy")
    again = trajectory_pairs(SampleStore(tmp_path, store.manifest), SCHEDULE, 1, BatchSpec(5, 9, 4), "noisy")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for index, step, seed in ((2, 5, 4), (1, 6, 4), (1, 5, 5)):
        other = trajectory_pairs(store, SCHEDULE, index, BatchSpec(step, 9, seed), "noisy")
        assert not torch.equal(first.images, other.images) and not torch.equal(first.sigma, other.sigma)
    other_view = trajectory_pairs(store, SCHEDULE, 1, BatchSpec(5, 9, 4), "denoised")
    assert torch.equal(first.images, other_view.images) and torch.equal(first.inputs, -other_view.inputs)


def test_experts_do_not_learn_from_the_same_images_at_once(tmp_path):
    """Not even experts with equally many steps learn from the same images at once."""
    store = numbered(tmp_path, torch.tensor([5.0, 0.4]).repeat(64, 1))
    first, second = (places(trajectory_pairs(store, ExpertSchedule((0.1, 1.0, 10.0)), index, BatchSpec(0, 9, 0), "noisy"))[0]
                     for index in (0, 1))
    assert not torch.equal(first, second)


def test_an_interval_that_no_step_lies_in_is_refused(tmp_path):
    store = numbered(tmp_path, torch.tensor([5.0, 1.0, 0.4]).repeat(64, 1))
    schedule = ExpertSchedule((0.1, 0.5, 0.75, 10.0))
    assert trajectory_pairs(store, schedule, 0, BatchSpec(0, 4, 0), "noisy").sigma.tolist() == pytest.approx([0.4] * 4)
    with says(ValueError, "0.5", "0.75", "expert 1", "more steps"):
        trajectory_pairs(store, schedule, 1, BatchSpec(0, 4, 0), "noisy")
