"""Low-rank updates on layers as other people's loaders make them: found as in float32, and right beside their weights."""
import pytest
import torch
from helpers import randn
from helpers.model_families import FAMILIES, small
from helpers.quantized import KINDS, quantized
from helpers.workbench import Workbench
from torch.nn import functional as F

from ppap_core.training.finetune import initial_updates
from ppap_core.training.lora import LoraUpdate, supports_lora, with_adapters

EACH = pytest.mark.parametrize("kind", KINDS)


def network(model: object) -> torch.nn.Module:
    return model.model.diffusion_model


@EACH
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_as_many_layers_learn_as_in_float32(bench: Workbench, family: str, kind: str):
    """Their updates have the shapes that they have in float32."""
    shapes = [{name: (update.up.shape, update.down.shape) for name, update in initial_updates(network(model), 2, 0).items()}
              for model in (small(family).model, quantized(family, kind).model)]
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
