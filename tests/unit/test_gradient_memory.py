"""The memory of a guider's gradient is predicted before it runs."""
from dataclasses import replace

import pytest
import torch
from helpers import VIEWS, B, H, W, disturb, images, level, randn, same, small_guider, snapshot
from helpers.guider_families import FAMILIES, aimed

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.guidance.gradients import HALF, energy_at, energy_gradient
from ppap_core.guidance.memory import gradient_bytes
from ppap_core.guiders.guider import Guider
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.rules import rule_guider
from ppap_core.guiders.tasks import TASKS
from ppap_core.schedules import ExpertSchedule


def really_kept(guider: Guider, count: int, compute: torch.dtype | None) -> int:
    """Bytes that autograd keeps when the network runs, beside its weights."""
    kept, point = {}, images(count).requires_grad_()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*guider.net.parameters(), *guider.net.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        energy = energy_at(guider, point, level(1.0, point), compute)
    assert len(energy) == count
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("view", VIEWS)
def test_what_is_told_is_what_is_kept(view, task, compute):
    guider = small_guider(task, view)
    for count in (1, B):
        predicted, kept = gradient_bytes(guider, (count, 3, H, W), compute), really_kept(guider, count, compute)
        assert kept > 5000 and predicted == pytest.approx(kept, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm ResNet", "timm VGG, style", "CLIP", "Depth Anything", "SegFormer", "CLIPSeg"])
def test_memory_of_library_networks_in_half_precision(name, tmp_path):
    """The bytes are predicted for networks of the libraries too, and these compute in half precision."""
    FAMILIES[name].write(tmp_path)
    guider = aimed(load_guider(tmp_path, FAMILIES[name].output), FAMILIES[name])
    for compute in (None, torch.bfloat16):
        kept = really_kept(guider, B, compute)
        assert gradient_bytes(guider, (B, 3, H, W), compute) == pytest.approx(kept, rel=0.05)
    x = images()
    full = energy_gradient(guider, x, level(0.5, x))
    for compute in HALF:
        energy, gradient = energy_gradient(guider, x, level(0.5, x), compute)
        assert gradient.isfinite().all() and not torch.equal(gradient, full[1])
        torch.testing.assert_close(energy, full[0], rtol=0.05, atol=0.02)


def test_cut_outs_count_beside_the_whole_image():
    guider = small_guider()
    one, three = (gradient_bytes(replace(guider, cutouts=count), (B, 3, H, W)) for count in (0, 2))
    assert three > 2.5 * one


def test_half_precision_keeps_less():
    small, large = (gradient_bytes(small_guider("depth"), (B, 3, H, W), compute) for compute in (torch.float16, None))
    assert small < 0.7 * large


def test_nothing_is_computed_and_the_weights_may_be_anywhere():
    guider = small_guider()
    expected = gradient_bytes(guider, (B, 3, H, W))
    with torch.inference_mode():
        for tensor in guider.net.parameters():
            tensor.data = tensor.data.clone()  # as ComfyUI leaves them when it moves a network
        assert tensor.is_inference() and gradient_bytes(guider, (B, 3, H, W)) == expected
    assert gradient_bytes(replace(guider, net=guider.net.to("meta")), (B, 3, H, W)) == expected


def test_experts_are_counted_and_stay_as_they_are():
    guider = small_guider()
    bank = ExpertBank(base_network(guider), ExpertSchedule.log_spaced(3, 0.01, 0.5), LoraSpec(2, 2.0))
    for index in range(3):
        disturb(bank, index)
    bank.select(0)
    before, image = snapshot(bank), images()
    answer = bank(image, level(0.02, image))
    assert gradient_bytes(with_experts(guider, bank), (B, 3, H, W)) >= gradient_bytes(guider, (B, 3, H, W))
    assert bank.active == 0 and same(snapshot(bank), before) and torch.equal(bank(image, level(0.02, image)), answer)


class Eye(torch.nn.Module):
    """A decoder, whose weights are none of the guider's network."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(),
                                        torch.nn.Conv2d(8, 3, 1))

    def forward(self, diffused: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.body(diffused)


class Experts(torch.nn.Module):
    """A network with an eye of its own, as a bank for latents has one."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net, self.eye = net, Eye()

    def forward(self, image: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.net(image, sigma)

    def decode(self, diffused: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.eye(diffused, sigma)


@pytest.mark.parametrize("own", [False, True], ids=["decoder", "of the experts"])
def test_what_a_guider_looks_through_may_be_on_another_device(own: bool):
    net = Experts(small_guider().net)
    guider = replace(small_guider(), net=net, decode=net.decode if own else net.eye)
    here = gradient_bytes(guider, (B, 3, H, W))
    assert here > gradient_bytes(replace(guider, decode=None), (B, 3, H, W))
    net.eye.to("meta")
    assert gradient_bytes(guider, (B, 3, H, W)) == here


def test_a_rule_needs_memory_too():
    guider = rule_guider("edges").aim(randn(1, 1, 64, 64))
    assert gradient_bytes(guider, (B, 3, H, W)) > 0
