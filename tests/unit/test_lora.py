"""Low-rank changes beside the weights: the same as in the weights, and gone without a trace."""
import pytest
import torch
from helpers import randn, says
from torch import nn

from ppap_core.training.lora import LoraUpdate, supports_lora, with_adapters


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2), nn.Conv2d(6, 5, 1), nn.Flatten(2),
                             nn.Linear(6, 9)).double().requires_grad_(False)


def change(out: int, *shape: int, scale: float = 0.7, rows: tuple[int, int] | None = None, seed: int = 0) -> LoraUpdate:
    up, down = randn(out, 2, seed=seed, dtype=torch.float64), randn(2, *shape, seed=seed + 1, dtype=torch.float64)
    return LoraUpdate(up, down, scale, rows)


def weight(part: LoraUpdate) -> torch.Tensor:
    return part.scale * (part.up @ part.down.flatten(1)).reshape(len(part.up), *part.down.shape[1:])


CHANGES = {"0": [change(6, 3, 3, 3), change(6, 3, 3, 3, scale=-0.2, seed=5)], "1": [change(5, 6, 1, 1, seed=7)],
           "3": [change(4, 6, rows=(2, 4), seed=9), change(3, 6, rows=(6, 3), seed=11)]}


def test_a_change_beside_the_weight_is_the_change_in_the_weight():
    net, merged, x = network(), network(), randn(2, 3, 8, 6, dtype=torch.float64)
    for name, parts in CHANGES.items():
        for part in parts:
            first, count = part.rows or (0, len(part.up))
            merged[int(name)].weight[first:first + count] += weight(part)
    with with_adapters(net, CHANGES):
        found = net(x)
    torch.testing.assert_close(found, merged(x), rtol=0, atol=1e-12)
    assert not torch.allclose(found, network()(x))


def test_the_network_is_restored_bit_for_bit():
    """The network is what it was bit for bit, also after a fault."""
    net, x = network(), randn(2, 3, 8, 6, dtype=torch.float64)
    with pytest.raises(KeyError), with_adapters(net, CHANGES):
        raise KeyError
    assert torch.equal(net(x), network()(x)) and all(torch.equal(*each) for each in zip(
        net.state_dict().values(), network().state_dict().values(), strict=True))


def test_gradients_pass_a_change():
    net, x = network(), randn(2, 3, 8, 6, dtype=torch.float64).requires_grad_(True)
    up = CHANGES["3"][0].up.clone().requires_grad_(True)
    with with_adapters(net, {"3": [LoraUpdate(up, CHANGES["3"][0].down, rows=(2, 4))]}):
        net(x).square().sum().backward()
    assert x.grad.abs().max() > 0 and up.grad.abs().max() > 0


@pytest.mark.parametrize(("name", "words"), [("2", "Flatten"), ("9", "no layer")])
def test_what_is_no_layer_is_said_in_words(name, words):
    with says(ValueError, words, name), with_adapters(network(), {name: [change(4, 6)]}):
        raise AssertionError


class ForeignLinear(nn.Module):
    """A linear layer of another library, which shares no class with torch's."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias, self.in_features, self.out_features = layer.weight, layer.bias, 6, 9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def test_a_layer_is_judged_by_what_it_has_and_not_by_its_class():
    net, foreign, x = network(), network(), randn(2, 3, 8, 6, dtype=torch.float64)
    foreign[3] = ForeignLinear(foreign[3])
    with with_adapters(net, CHANGES), with_adapters(foreign, CHANGES):
        assert torch.equal(net(x), foreign(x))


@pytest.mark.parametrize("layer", [nn.Embedding(3, 4), nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3),
                                   nn.Conv2d(4, 4, 3, padding_mode="reflect"), nn.Conv1d(4, 4, 3), nn.ReLU(), None], ids=str)
def test_other_layers_support_no_change(layer):
    assert not supports_lora(layer)
