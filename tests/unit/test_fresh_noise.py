"""The paper's training pairs, which the benchmark compares with trajectories."""
import math

import pytest
import torch
from helpers import made_up_trajectories, randn, says

from benchmarks import ppap_reference
from benchmarks.fresh_noise import fresh_pairs
from ppap_core.experts.samples import SHARD_SIZE, BatchSpec, SampleStore, from_uint8
from ppap_core.noise import expand, to_vp
from ppap_core.schedules import ExpertSchedule

SHAPE = (3, 5, 7)
MANIFEST = {"seed": 11}
SCHEDULE = ExpertSchedule((0.1, 0.7, 2.0, 10.0))


def with_ways(images: torch.Tensor) -> tuple:
    """Images and made-up trajectories of them."""
    return images, made_up_trajectories(images)


@pytest.fixture
def pixels(tmp_path) -> SampleStore:
    store = SampleStore(tmp_path / "pixels", MANIFEST)
    store.fill(SHARD_SIZE, lambda seeds: with_ways(randn(len(seeds), *SHAPE, seed=seeds[0]).tanh()))
    return store


def test_fresh_noise_is_the_one_of_the_paper(pixels):
    """Standard normal, independent of image and step, at noise levels that are log-uniform in the interval of the expert."""
    asked = []
    def view(x, sigma):
        asked.append((x, sigma))
        return to_vp(x, sigma)
    pairs = [fresh_pairs(pixels, SCHEDULE, 1, BatchSpec(step, 50, 0), view) for step in range(40)]
    images, inputs, sigma = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert torch.equal(torch.cat([x for x, _ in asked]) / (1 + sigma**2).sqrt()[:, None, None, None], inputs)
    assert torch.equal(torch.cat([at for _, at in asked]), sigma)
    noise = (torch.cat([x for x, _ in asked]) - images) / expand(sigma, images)
    assert noise.mean().abs() < 0.01 and abs(noise.std() - 1) < 0.01 and abs((noise**4).mean() - 3) < 0.05
    assert (noise * images).mean().abs() < 0.01
    assert len(noise.flatten(1)[:, 0].unique()) == 2000
    assert {SCHEDULE.index(float(each)) for each in sigma} == {1}
    share = (sigma / 0.7).log() / math.log(2.0 / 0.7)
    assert abs(share.mean() - 0.5) < 0.03 and abs(share.std() - 12**-0.5) < 0.02


def test_half_of_the_images_under_fresh_noise_are_mirrored(pixels):
    """Half of the images are mirrored, and nothing else is done to them."""
    mirrored, stored = 0, from_uint8(pixels.images)
    for step in range(40):
        for image in fresh_pairs(pixels, SCHEDULE, 0, BatchSpec(step, 8, 0), to_vp).images:
            straight, turned = ((stored == each).flatten(1).all(1).any() for each in (image, image.flip(-1)))
            assert bool(straight) != bool(turned)
            mirrored += int(turned)
    assert 120 < mirrored < 200  # of 320


def test_fresh_pairs_are_a_function_of_seed_expert_and_step(pixels):
    first = fresh_pairs(pixels, SCHEDULE, 1, BatchSpec(5, 6, 4), to_vp)
    again = fresh_pairs(SampleStore(pixels.folder, pixels.manifest), SCHEDULE, 1, BatchSpec(5, 6, 4), to_vp)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for index, step, seed in ((2, 5, 4), (1, 6, 4), (1, 5, 5)):
        other = fresh_pairs(pixels, SCHEDULE, index, BatchSpec(step, 6, seed), to_vp)
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_no_gradient_passes_through_what_sees_fresh_noise(pixels):
    factor = torch.nn.Parameter(torch.tensor(0.8))
    pairs = fresh_pairs(pixels, SCHEDULE, 1, BatchSpec(0, 4, 0), lambda x, sigma: x * factor)
    assert not any(part.requires_grad for part in pairs)


def test_fresh_noise_on_decoded_latents_is_refused(tmp_path):
    store = SampleStore(tmp_path, MANIFEST)
    store.fill(SHARD_SIZE, lambda seeds: (randn(len(seeds), *SHAPE).tanh(),
                                          made_up_trajectories(randn(len(seeds), 4, 2, 3))))
    with says(ValueError, "(4, 2, 3)", str(SHAPE), "trajectories"):
        fresh_pairs(store, SCHEDULE, 1, BatchSpec(0, 4, 0), to_vp)


def test_the_model_is_asked_where_the_bank_is(pixels):
    """On a device that every machine has, and that no tensor gets to by itself."""
    asked = []
    pairs = fresh_pairs(pixels, SCHEDULE, 1, BatchSpec(0, 4), lambda x, sigma: asked.append((x.device, sigma.device)) or x,
                        "meta")
    assert asked == [(torch.device("meta"),) * 2] and {part.device.type for part in pairs} == {"meta"}


@pytest.mark.parametrize("experts", [1, 5, 7, 10])
def test_the_paper_s_split_has_equal_shares_of_timesteps(experts):
    """Every expert has an equal share of the timesteps."""
    schedule = ppap_reference.schedule(experts)
    shares = [0] * experts
    for sigma in ppap_reference.SIGMAS.tolist():
        shares[schedule.index(sigma)] += 1
    assert len(schedule) == experts and max(shares) - min(shares) <= (1 if 1000 % experts else 0)


@pytest.mark.parametrize("experts", [0, 1000])
def test_a_number_of_experts_that_is_impossible_is_refused(experts):
    with says(ValueError, "expert"):
        ppap_reference.schedule(experts)
