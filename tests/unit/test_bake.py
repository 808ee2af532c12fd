"""Baking: a network learns to predict what a guided one predicted, from the steps of guided samplings."""
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import images, made_up_trajectories
from torch import Tensor, nn

from ppap_core import SampleStore
from ppap_core.experts.bake import Learned, Student, bake, guided_error, held_out_of, random_steps
from ppap_core.experts.samples import HELD_OUT_SEEDS
from ppap_core.experts.trajectories import Trajectories
from ppap_core.noise import expand, from_vp, to_vp
from ppap_core.training.finetune import FineTune
from ppap_core.training.lora import with_adapters


def guided_trajectories(seeds: list[int]) -> tuple[Tensor, Trajectories]:
    """Images whose predictions were given more contrast."""
    shown = torch.cat([images(1, seed) for seed in seeds])[..., :8, :12]
    made = made_up_trajectories(shown)
    return shown, made._replace(denoised=made.denoised * 1.5)


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    store = SampleStore(tmp_path / "store", {"of": "a guided model"})
    store.fill(64, guided_trajectories)
    return store


def predict(net: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of these images, behind a layer that changes nothing."""
    return net(x * expand(0.25 / (0.25 + sigma**2), x))


def untouched() -> nn.Conv2d:
    layer = nn.Conv2d(3, 3, 1).requires_grad_(False)
    layer.weight.copy_(torch.eye(3)[:, :, None, None])
    layer.bias.zero_()
    return layer


def student(net: nn.Module) -> Student:
    return Student(net, partial(predict, net), 0.5)


def error(net: nn.Module, store: SampleStore) -> float:
    return guided_error(student(net), store, 16)


def test_steps_are_those_that_were_sampled(store: SampleStore):
    steps = random_steps(store, FineTune(batch=5, seed=3), 2)
    torch.testing.assert_close(predict(nn.Identity(), steps.x, steps.sigma) * 1.5, steps.guided, atol=0.02, rtol=0)
    assert torch.equal(steps.x, random_steps(store, FineTune(batch=5, seed=3), 2).x)
    assert not torch.equal(steps.x, random_steps(store, FineTune(batch=5, seed=3), 3).x)


def test_the_network_learns_what_guidance_did(store: SampleStore):
    net = untouched()
    before = error(net, store)
    updates, losses = bake(student(net), store, FineTune(60, 2, 16, 0.05))
    assert error(net, store) == before, "the weights stay as they are"
    with with_adapters(net, {name: [update] for name, update in updates.items()}):
        learned = Learned(before, error(net, store))
    assert len(losses) == 60 and learned.share > 0.1


def test_it_is_measured_on_what_is_held_out(store: SampleStore):
    assert held_out_of(store) is store
    store.hold_out().fill(64, guided_trajectories)
    assert held_out_of(store).first_seed == store.first_seed + HELD_OUT_SEEDS


def test_states_come_back_from_the_vp_scale():
    x, sigma = images(3), torch.tensor([0.1, 2.0, 80.0])
    torch.testing.assert_close(from_vp(to_vp(x, sigma), sigma), x)
    assert Learned(0.0, 0.0).share == 1 and Learned(1.0, 4.0).share == -1
