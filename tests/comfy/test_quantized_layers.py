"""Low-rank updates on layers as other people's loaders make them: found as in float32, and right beside their weights."""
import pytest
import torch
from helpers import randn
from helpers.model_families import FAMILIES, small
from helpers.quantized import KINDS, dequantized, quantized
from helpers.workbench import Scene, Workbench, train_lora
from torch import Tensor
from torch.nn import functional as F

from ppap_core.training.finetune import initial_updates
from ppap_core.training.lora import LoraUpdate, supports_lora, with_adapters

TOLERANCES = {"int8": 0.1}  # where no gradient passes, as before the first layer, inputs are rounded too
EACH = pytest.mark.parametrize("kind", KINDS)


def network(model: object) -> torch.nn.Module:
    return model.model.diffusion_model


@EACH
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_as_many_layers_learn_as_in_float32(bench: Workbench, family: str, kind: str):
    """Their updates have the shapes that they have in float32."""
    updates = [initial_updates(network(model), 2, 0, torch.device("cpu"))
               for model in (small(family).model, quantized(family, kind).model)]
    shapes = [{name: (update.up.shape, update.down.shape) for name, update in each.items()} for each in updates]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 10


@EACH
@pytest.mark.parametrize("family", ["SD 3", "Flux", "SDXL"])
def test_an_update_beside_a_quantised_weight(bench: Workbench, family: str, kind: str):
    """It adds to the output of every layer that is linear what it would add to weights in float32."""
    for layer in network(quantized(family, kind).model).modules():
        if supports_lora(layer) and len(layer.weight.shape) == 2:
            rows, columns = layer.weight.shape
            update, x = LoraUpdate(randn(rows, 2), randn(2, columns, seed=1), 0.3), randn(1, 3, columns, seed=2)
            with torch.no_grad():
                plain = layer(x)
                with with_adapters(layer, {"": [update]}):
                    found = layer(x) - plain
                assert torch.equal(layer(x), plain)
            torch.testing.assert_close(found, F.linear(x, 0.3 * update.up @ update.down), rtol=1e-4, atol=1e-4)


def gradients(bench: Workbench, scene: Scene, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Those of the first step in which all parts of the updates have one."""
    loop, seen = bench.comfy.pack.ppap_core.training.loop, []

    def check(parameters: dict[str, Tensor], step: int) -> None:
        seen.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_require_finite_gradient", check)
        train_lora(bench, scene, name, steps=2, learning_rate=1e-2)
    return seen[1]


@EACH
@pytest.mark.parametrize("family", ["SD 3", "Flux", "SDXL"])
def test_training_has_the_gradient_of_the_dequantised_model(bench: Workbench, family: str, kind: str,
                                                            monkeypatch: pytest.MonkeyPatch):
    with torch.inference_mode():
        quantised = quantized(family, kind)
        plain = dequantized(family, quantised.model)
    expected, found = (gradients(bench, Scene(*made), f"{family} {kind} {number}", monkeypatch)
                       for number, made in enumerate((plain, quantised)))
    assert found.keys() == expected.keys()
    names = [*expected]
    whole = torch.cat([expected[name].flatten() for name in names])
    error = torch.cat([found[name].flatten() for name in names]) - whole
    assert whole.norm() > 0 and error.norm() < TOLERANCES.get(kind, 1e-3) * whole.norm(), float(error.norm() / whole.norm())
