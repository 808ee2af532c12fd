"""Where memory runs out with a gradient through the model, it goes on with main memory, and comes to the same."""
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.model_families import FAMILIES
from helpers.workbench import (
    EPS,
    FLOW,
    THROUGH,
    Workbench,
    autoguided,
    ksampler,
    search,
    train_lora,
    with_lora_at,
)
from torch import Tensor


class Memory:
    """Memory that, as long as it is short, runs out in the first step of every gradient pass."""

    def __init__(self) -> None:
        self.short, self.failures = True, 0

    def run_out(self, step: Callable[[], Tensor], saves_on_cpu: bool) -> Tensor:
        result = step()
        if self.short and not saves_on_cpu:
            self.failures += 1
            raise torch.OutOfMemoryError("out of memory")
        return result


@pytest.fixture
def memory(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> Memory:
    kind, memory = bench.comfy.pack.nodes.bridge.autograd.GradientPass, Memory()
    run = kind.run
    monkeypatch.setattr(kind, "run", lambda self, step: run(self, lambda: memory.run_out(step, self.saves_on_cpu)))
    return memory


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model_is_guided_as_with_enough_memory(bench: Workbench, memory: Memory, family: str):
    scene = bench.scene(family)
    lean = ksampler(bench, bench.guide(scene, **THROUGH))
    assert memory.failures == 1, "memory runs out once, and then it is known"
    memory.short = False
    whole = ksampler(bench, bench.guide(scene, **THROUGH))
    torch.testing.assert_close(lean, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    assert not torch.equal(whole, bench.plain(family)[0])


@pytest.mark.parametrize("family", [EPS, FLOW])
def test_weights_stay_and_all_else_is_copied(bench: Workbench, family: str):
    autograd, net = bench.comfy.pack.nodes.bridge.autograd, bench.scene(family).model.model.diffusion_model
    with autograd.outside_inference_mode(), autograd.save_activations_on_cpu(net):
        x, weight = torch.ones(3, requires_grad=True), next(net.parameters()).detach().clone()
        y = x * weight.sum()
        y = (z := y.exp()).sin()
        z.mul_(0.0)  # exp keeps what it gave, and sin what it was given
        [found] = torch.autograd.grad(y.sum(), x)
    scale = weight.sum()
    expected = scale * scale.exp() * scale.exp().cos()
    torch.testing.assert_close(found, expected.expand(3))
    bench.comfy.pack.nodes.bridge.memory.materialize_on([net], torch.device("cpu"))
    with autograd.outside_inference_mode(), autograd.save_activations_on_cpu(net):
        layer = next(part for part in net.modules() if isinstance(part, torch.nn.Linear))
        kept = torch.nn.functional.linear(torch.ones(1, layer.in_features, requires_grad=True), layer.weight).grad_fn
        assert kept._saved_mat2.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()


def changing_layers(x: Tensor, in_place: bool, count: int = 400) -> Tensor:
    """Many layers that save a tensor, change it and let go of it, so that later tensors take its place in memory."""
    total = x.new_zeros(())
    for layer in range(count):
        y = (x[:1 + layer % 3] * (1 + layer % 7)).exp()
        total = total + y.t().sin().sum()
        y = y.mul_(0.5) if in_place else y * 0.5
        total = total + y.sum()
    return total


def test_changes_in_place_leave_the_gradient_right(comfy):
    """torch alone mistakes a later tensor for one that was changed, and answers with a wrong gradient."""
    x = (0.001 * torch.randn(3, 5, dtype=torch.float64)).requires_grad_(True)
    with comfy.pack.nodes.bridge.autograd.mutation_allowed():
        [gradient] = torch.autograd.grad(changing_layers(x, in_place=True), x)
    [expected] = torch.autograd.grad(changing_layers(x, in_place=False), x)
    torch.testing.assert_close(gradient, expected)


def test_a_search_through_the_model_finds_the_same(bench: Workbench, memory: Memory):
    scene = bench.scene(FLOW)
    states = bench.comfy.pack.nodes.bridge.paths.output_folder("ppap_prior")
    shutil.rmtree(states, ignore_errors=True)
    lean = search(bench, scene.conditioned(), bench.terms(0.5), seed=41, **THROUGH)
    assert memory.failures == 1
    shutil.rmtree(states)
    memory.short = False
    whole = search(bench, scene.conditioned(), bench.terms(0.5), seed=41, **THROUGH)
    assert (lean - whole).abs().mean() < 1e-3 * whole.abs().mean()


def test_training_and_autoguidance_survive_full_memory( bench: Workbench, memory: Memory):
    """A LoRA is trained to the same weights, and a bad model with shared weights is computed again under its LoRA."""
    scene = bench.scene(EPS)
    lean = ksampler(bench, replace(scene, model=train_lora(bench, scene, "lean", steps=6)[0]))
    steered = ksampler(bench, bench.guide(autoguided(bench, scene, with_lora_at(scene, 1.0)), **THROUGH))
    assert memory.failures == 2
    shutil.rmtree(bench.comfy.pack.nodes.bridge.paths.output_folder("ppap_training"))
    memory.short = False
    whole = ksampler(bench, replace(scene, model=train_lora(bench, scene, "lean", steps=6)[0]))
    freely = ksampler(bench, bench.guide(autoguided(bench, scene, with_lora_at(scene, 1.0)), **THROUGH))
    torch.testing.assert_close(lean, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    torch.testing.assert_close(steered, freely, rtol=1e-3, atol=1e-3 * float(freely.abs().max()))
