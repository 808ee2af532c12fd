"""The table of choosing against guiding: what its ways cost, and that each of them makes images."""
from dataclasses import replace

import pytest
import torch

from benchmarks.choosing import WAYS, ChoosingBench, Run, Way, choosing_bench
from benchmarks.few_steps import load_few_step_world
from benchmarks.tiny_world import TinyWorld, load_world
from ppap_core import Prediction
from ppap_core.guidance.particles import Resampling


@pytest.fixture(scope="module")
def world() -> TinyWorld:
    return load_world()


def sampled(world: TinyWorld, way: Way) -> torch.Tensor:
    return Run(world, ChoosingBench(), way).sample([3, 8], world.wanted([3, 8]))


def test_ways_are_compared_at_equal_passes():
    passes = {way.name: way.passes for way in WAYS}
    once = ("unguided", "guidance", "guidance through the model")
    assert {passes[name] for name in passes if name.removeprefix("in latents: ") not in once} == {64}
    assert len(passes) == len(WAYS)


@pytest.mark.parametrize("way", [{"looked": 2}, {"particles": Resampling(2, 1.0)}, {"guidance": "prediction"},
                                 {"guidance": "through"}, {"scorer": "answer", "particles": Resampling(2, 0.0)}], ids=str)
def test_a_way_makes_other_images_than_plain_sampling(world: TinyWorld, way: dict):
    way = replace(Way("some", steps=3, ahead=1), **way)
    images = sampled(world, way)
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
    assert way.scorer or not torch.equal(images, sampled(world, Way("plain", steps=3)))


@pytest.mark.parametrize("way", [way for way in WAYS if way.decoded], ids=lambda way: way.name)
def test_latents_are_chosen_by_colours_or_through_the_decoder(way: Way):
    run = Run(load_few_step_world("flow"), ChoosingBench(), replace(way, steps=2, particles=Resampling(3, 0.0)))
    colours, wanted = replace(run, way=replace(run.way, decoded=False)), run.world.wanted([3])
    state = run.world.start([1, 2, 3], 2)[0] / 1000
    decoded, linear = (each.choice(each.terms(wanted), 3)(Prediction(state, torch.zeros(3), state))
                       for each in (run, colours))
    assert decoded.shape == (1, 3) and not torch.allclose(decoded, linear, atol=1e-3)
    assert run.sample([3], wanted).shape == (1, 16, 16, 16)


def test_a_row_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no way 'other'"):
        choosing_bench(ChoosingBench(), tmp_path, print, ["other"])
