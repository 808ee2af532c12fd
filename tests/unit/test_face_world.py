"""The world of real faces, with the real networks where there are any."""
import pytest
import torch
from helpers.real import networks
from torch import Tensor

from benchmarks.face_world import FaceWorld, load_face_world, within_range
from ppap_core import Term, base_network, class_target


@pytest.fixture(scope="module")
def world() -> FaceWorld:
    networks()
    return load_face_world()


@pytest.fixture(scope="module")
def faces(world: FaceWorld) -> Tensor:
    return world.sample(range(2), steps=6)


def test_faces_that_leave_the_range_come_back_into_it():
    inside = torch.linspace(-0.9, 0.9, 1600).reshape(1, 1, 40, 40)
    both = within_range(torch.cat([inside, 3 * inside + 1]))
    assert torch.allclose(both[:1], inside, atol=1e-6)
    assert both.abs().max() <= 1 and ((both[1:] - both[1:].mean()) / inside > 0.9).all()


@pytest.mark.real
def test_a_face_depends_on_its_seed_alone(world: FaceWorld, faces: Tensor):
    assert faces.shape == (2, 1, 40, 40) and faces.isfinite().all() and faces.dtype == torch.float32
    assert torch.allclose(world.sample([1], steps=6), faces[1:], atol=0.05)


@pytest.mark.real
def test_the_denoiser_in_bfloat16_follows_that_in_float32(world: FaceWorld):
    x = world.start(range(2))[0] / 10  # at a noise level of 1
    exact = networks().faces()(x, 1.0)
    assert (world.denoise(x, x.new_ones(2)) - exact).square().mean().sqrt() < 0.02


@pytest.mark.real
def test_networks_see_one_channel_as_they_see_three(world: FaceWorld, faces: Tensor):
    level = faces.new_zeros(2)
    direct = base_network(world.guider).net(networks().face_view(faces))
    for image in (faces, faces.expand(-1, 3, -1, -1)):
        assert torch.allclose(world.guider.predict(image, level), direct, atol=1e-3)


@pytest.mark.real
def test_recorded_faces_are_named_as_those_that_were_sampled(world: FaceWorld, faces: Tensor):
    images, trajectories = world.sample_recorded(range(2), steps=6)
    assert images.abs().max() <= 1 and trajectories.noisy_vp.shape == (2, 6, 1, 40, 40)
    named, wanted = (world.plain_output(part).softmax(1) for part in (images, faces))
    assert torch.allclose(named, wanted, atol=0.1)


@pytest.mark.real
@pytest.mark.parametrize("through", [False, True])
def test_guidance_lowers_the_energy_of_a_face(world: FaceWorld, faces: Tensor, through: bool):
    happy = world.guider.aim(class_target(world.guider, "happy"))
    guided = world.sample(range(2), 6, [Term(happy, 0.3, normalized=True, backprop_through_model=through)])
    before, after = (happy.energy(image, image.new_zeros(2)) for image in (faces, guided))
    assert (after < before).all()
