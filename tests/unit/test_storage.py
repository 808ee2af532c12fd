"""Tensors of other classes than torch's own: how they are hashed and copied, by what they hold."""
import pytest
import torch
from helpers.quantized import PackedTensor, packed
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from ppap_core.io.hashing import digest, fingerprint_network
from ppap_core.io.storage import independent_copy, named_tensors, rewrapped, storages, stored_tensors


def wrapper() -> TwoTensor:
    """A tensor without a storage of its own, one of whose parts wraps others too."""
    return TwoTensor(TwoTensor(torch.ones(3, 4), torch.ones(3, 4)), torch.ones(3, 4))


def test_what_a_wrapper_holds_is_found():
    whole = wrapper()
    assert [type(part) for part in stored_tensors(whole)] == [Tensor] * 3
    assert [storage.nbytes() for storage in storages(whole)] == [48] * 3


@pytest.mark.parametrize("part", range(3))
def test_every_part_of_a_wrapper_is_hashed(part: int):
    first, second = wrapper(), wrapper()
    assert digest(first, sampled=True) == digest(second, sampled=True)
    stored_tensors(second)[part].mul_(2)
    assert digest(first, sampled=True) != digest(second, sampled=True)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint8", "int8", "bfloat16"])
def test_weights_of_every_type_are_hashed(dtype: str):
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    one, two = (torch.full((3, 4), value).to(getattr(torch, dtype)) for value in (1.0, 2.0))
    assert len({digest(tensor, sampled=True) for tensor in (one, two)}) == 2


@pytest.mark.parametrize("changed", [{"factor": 2.0}, {"value": -1.0}], ids=["scales", "values"])
def test_large_packed_weights_are_hashed_by_whole_blocks(changed: dict):
    """Single bytes at even steps could all be scales, or none of them."""
    weight = torch.linspace(-1, 1, 1024 * 512).reshape(1024, 512)
    first, other = packed(weight, 1.0), packed(weight * changed.get("value", 1.0), changed.get("factor", 1.0))
    assert digest(first, sampled=True) != digest(other, sampled=True)
    assert digest(first, sampled=True) == digest(packed(weight, 1.0), sampled=True)


@pytest.mark.parametrize("make", [wrapper, lambda: packed(torch.ones(4, 32), 1.0), lambda: torch.ones(3, 4),
                                  lambda: nn.Parameter(torch.ones(3, 4))], ids=["wrapper", "packed", "plain", "parameter"])
def test_a_copy_made_outside_inference_mode_serves_autograd(make):
    with torch.inference_mode():
        tensor = make()
    copied = independent_copy(tensor)
    assert type(copied) is type(tensor) and copied.shape == tensor.shape
    assert not copied.is_inference() and not any(part.is_inference() for part in stored_tensors(copied))
    old, new = ({storage.data_ptr() for storage in storages(each)} for each in (tensor, copied))
    assert not old & new and digest(copied) == digest(tensor)


def test_a_wrapper_is_made_anew_around_the_same_memory():
    with torch.inference_mode():
        tensor = nn.Parameter(wrapper(), requires_grad=False)
    again = rewrapped(tensor)
    assert isinstance(again, nn.Parameter) and not again.is_inference()
    assert [part.data_ptr() for part in storages(again)] == [part.data_ptr() for part in storages(tensor)]


class PackedLayer(nn.Module):
    """A layer that saves a stand-in without values, as loaders of packed files do to tell their size."""

    def __init__(self, factor: float):
        super().__init__()
        self.weight = nn.Parameter(packed(torch.ones(4, 32), factor), requires_grad=False)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = torch.empty(4, 32, device="meta")


def test_a_network_is_hashed_by_the_weights_it_holds():
    net = nn.Sequential(PackedLayer(1.0), nn.Linear(4, 4))
    tensors = named_tensors(net)
    assert list(tensors) == list(net.state_dict()) and isinstance(tensors["0.weight"], PackedTensor)
    assert fingerprint_network(PackedLayer(1.0)) == fingerprint_network(PackedLayer(1.0))
    assert fingerprint_network(PackedLayer(1.0)) != fingerprint_network(PackedLayer(2.0))
