"""The table of variety: what counts as another picture, and the seeds that give much the same one."""
from dataclasses import replace

import pytest
import torch

from benchmarks.few_steps import load_few_step_world
from benchmarks.networks import load_judge
from benchmarks.variety import Attributes, Case, Run, VarietyBench, attributes, distinct, star_world
from ppap_core.tinyworld.scenes import draw


def test_scenes_differ_in_colour_and_place():
    scenes = draw(range(24))
    found = attributes(load_judge("segmentation"), scenes.image)
    assert distinct(found) > 8 and distinct(attributes(load_judge("segmentation"), scenes.image[:1].repeat(5, 1, 1, 1))) == 1
    assert distinct(Attributes(torch.tensor([1, 1, 2]), torch.tensor([0, 0, 0]))) == 2
    right = attributes(load_judge("segmentation"), scenes.image.flip(3)).quarter % 2
    assert (right != found.quarter % 2).float().mean() > 0.9, "a mirrored thing is on the other side"


@pytest.mark.parametrize("model", ["stars", "turbo"])
def test_seeds_with_common_noise_are_alike_until_they_repel(model: str):
    world = star_world(4.0) if model == "stars" else load_few_step_world("turbo")
    run = Run(world, VarietyBench(), Case(model, 4, 0.8), 0.0)
    def spread(run: Run) -> float:
        return float(run.sample(range(6)).var(0).mean())
    varied = replace(run, case=Case(model, 4))
    assert spread(run) < spread(varied)
    assert spread(run) < spread(replace(run, weight=0.4))
    assert torch.equal(varied.sample([3]), replace(varied, weight=0.4).sample([3])), "one image has none to be unlike"
