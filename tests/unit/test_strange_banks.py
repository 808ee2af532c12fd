"""Files of experts from strangers: every field is checked before anything is made of it, and nothing is let in."""
import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SmallNet, disturb, fixed_weights, same, says, small_guider

from ppap_core.experts.adapters import FREE_NUMBERS, MAX_EXPERTS, LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network
from ppap_core.experts.checkpoint import load_bank, save_bank
from ppap_core.experts.header import FIELDS, MAX_BYTES
from ppap_core.experts.readout import ReadoutNetwork, ReadoutSpec
from ppap_core.experts.readout_file import is_readout_file, load_readout, save_readout
from ppap_core.guiders.latents import LatentSpace, Stem, stem_numbers
from ppap_core.io.files import load_tensors, read_json, save_tensors
from ppap_core.io.values import is_number, shown
from ppap_core.rng import seeded
from ppap_core.schedules import ExpertSchedule

SPACE = LatentSpace("Test", torch.ones(5, 3), torch.zeros(3))
GUIDER = small_guider()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and description of a bank of latents."""
    bank = ExpertBank(base_network(GUIDER), ExpertSchedule((0.1, 1.0, 10.0)), LoraSpec(2, 3.0), space=SPACE)
    for index in range(2):
        disturb(bank, index)
    file = tmp_path_factory.mktemp("bank") / "x.safetensors"
    save_bank(file, bank, GUIDER)
    return load_tensors(file)


def written(path: Path, tensors: dict[str, torch.Tensor], header: Any) -> Path:
    save_tensors(path, tensors, header)
    return path


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


WRONG: dict[str, list[Any]] = {
    "edges": [None, "1", [], [1.0], [1.0, math.nan], [0.1, math.inf], [0.0, 1.0], [2.0, 1.0], [1.0, 1.0], [True, 2.0],
              ["1", "2"], [[0.1], [1.0]], {"0": 1.0}, [10**400, 10**401], [0.01 * each for each in range(1, 10**5)]],
    "rank": [None, "2", 2.0, 0, -1, True, [2], 10**9, 10**4000, math.nan, 2**63],
    "alpha": [None, "3", [3.0], True, math.nan, math.inf, -math.inf, 10**400, 1e9, {}],
    "targets": [None, "conv_1", [], {}, [1], [None], ["conv_1", "conv_1"], ["nowhere"], ["norm_1"], ["../conv_1"], [""],
                ["conv_1" * 1000], [f"layer_{each}" for each in range(10**5)], [["conv_1"]]],
    "view": [None, "latent", "", 3, ["noisy"], {"noisy": 1}, "noisy" * 10**5],
    "space": [None, "", 3, ["Test"], "x" * 10**5, "pixel"],
    "shuffle": [None, "1", 0, 9, -1, 1.5, True, 10**9],
    "recipe": [None, "x", 3, [1], [[1]]],
    "weights": [None, "x", [1], {"conv_1.weight": None}, {"conv_1.weight": ""}, {"conv_1.weight": " "}, {"a": "b"}],
}
REFUSED = [(field, value) for field, values in WRONG.items() for value in values]


def test_every_field_is_tried():
    assert WRONG.keys() == FIELDS.keys()


@pytest.mark.parametrize("field, value", REFUSED, ids=[f"{field}-{number}" for number, (field, _) in enumerate(REFUSED)])
def test_a_field_that_cannot_be_is_refused_in_words(tmp_path: Path, whole: tuple, field: str, value: Any):
    """In one short sentence, at once, and before memory is taken."""
    tensors, header = whole
    if field == "weights":
        header = header | {"fingerprint": "another"}  # by which the network is found first
    file = written(tmp_path / "x.safetensors", tensors, header | {field: value})
    started = time.process_time()
    with pytest.raises(ValueError) as caught:
        load_bank(file, GUIDER)
    message = str(caught.value)
    assert "x.safetensors" in message and len(message) < 1500 and "\n" not in message
    assert time.process_time() - started < 2


@pytest.mark.parametrize("field", [*FIELDS, "task", "preprocess", "kind", "format", "noise", "fingerprint", "guider",
                                   "library"])
@pytest.mark.parametrize("value", [{}, [[[[1]]]], "\ud800", "a\nb", 10**4000, 1e308, "x" * 10**5], ids=range(7))
def test_nothing_but_a_bank_or_a_sentence_comes_of_any_value(tmp_path: Path, whole: tuple, field: str, value: Any):
    tensors, header = whole
    file = written(tmp_path / "x.safetensors", tensors, header | {field: value})
    try:
        assert len(load_bank(file, GUIDER).schedule) == 2
    except ValueError as error:
        assert len(str(error)) < 1500 and "\n" not in str(error) and str(error).encode()


SHAPES = [deep(1000), deep(100_000), f'{{"kind": {deep(5000)}}}', "1" * 5000, f'{{"a": {"1" * 5000}}}', "NaN",
          '{"kind": NaN}', "nul", '"\\ud800"', ""]


@pytest.mark.parametrize("metadata", SHAPES, ids=range(len(SHAPES)))
def test_a_description_of_any_shape_is_refused(tmp_path: Path, metadata: str):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", {"ppap": metadata})
    for read in (load_tensors, lambda file: load_bank(file, GUIDER)):
        try:
            read(tmp_path / "x.safetensors")
        except ValueError as error:
            assert "x.safetensors" in str(error) and len(str(error)) < 1500


def test_json_that_is_nested_too_deep_is_refused(tmp_path: Path):
    for number, text in enumerate((deep(100_000), '{"a": ' + "1" * 5000 + "}")):
        (tmp_path / f"{number}.json").write_text(text)
        with says(ValueError, f"{number}.json", "cannot be read"):
            read_json(tmp_path / f"{number}.json")


@pytest.mark.parametrize("length", [MAX_BYTES + 1, 2**40, 2**64 - 1])
def test_a_header_of_gigabytes_is_not_read(tmp_path: Path, length: int):
    """The file need not be as long as it says, or may be: a hole in it costs nothing."""
    file = tmp_path / "x.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", length))
        opened.truncate(min(length, 2**33) + 8)
    with says(ValueError, "x.safetensors", "cannot be read", f"{length:,}"):
        load_bank(file, GUIDER)


def with_shape(path: Path, shape: list[int]) -> Path:
    """A copy of a file in which one tensor says another shape."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    names = json.loads(data[8:8 + size])
    names["expert_0.conv_2.lora_A.weight"]["shape"] = shape
    changed = json.dumps(names).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + size:])
    return path


@pytest.mark.parametrize("shape, words", [([2, 10**9], "cannot be read"), ([10**12, 10**12], "cannot be read"),
                                          ([2, 8, 3], "cannot be read"), ([0, 10**18], ""), ([144], "(144,)")])
def test_shapes_that_lie_are_refused(tmp_path: Path, whole: tuple, shape: list[int], words: str):
    file = with_shape(written(tmp_path / "x.safetensors", *whole), shape)
    with says(ValueError, "x.safetensors", words):
        load_bank(file, GUIDER)


CHANGES: dict[str, Any] = {
    "another expert": lambda tensors: tensors | {"expert_2.x": torch.zeros(1)},
    "a path": lambda tensors: tensors | {"../../x": torch.zeros(1)},
    "none": lambda tensors: {},
    "one expert": lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith("expert_1")},
    "a name too many": lambda tensors: tensors | {"expert_1.x": torch.zeros(1)},
    "no numbers": lambda tensors: tensors | {"expert_1.conv_2.lora_A.weight": torch.full((2, 8, 3, 3), math.nan)},
    "no colours": lambda tensors: tensors | {"space.factors": torch.full((5, 3), math.inf)},
    "other colours": lambda tensors: tensors | {"space.factors": torch.ones(10**6, 3)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_cannot_be_are_refused(tmp_path: Path, whole: tuple, change: str):
    tensors, header = whole
    file = written(tmp_path / "x.safetensors", CHANGES[change](tensors), header)
    with says(ValueError, "x.safetensors"):
        load_bank(file, GUIDER)


# Readouts

READOUTS: dict[str, list[Any]] = {
    "edges": [None, [1.0], [2.0, 1.0], [0.1, 1.0, 10.0, 100.0], [0.1, 10.0]],
    "place": [None, 3, "x" * 10**5],
    "channels": [None, 0, 10**9, 2**16, "8", 8.0, True, 6],
    "output": [None, [], [0], [10**9], [2**16, 2**16], [5, 1, 1, 1, 1], ["5"], 5, [6]],
    "dense": [None, 1, "no", True],
    "recipe": [[1]],
}


@pytest.mark.parametrize("field", READOUTS)
def test_a_readout_that_cannot_be_is_refused_in_words(tmp_path: Path, field: str):
    readout = ReadoutNetwork(base_network(GUIDER), ExpertSchedule((0.1, 1.0, 10.0)), ReadoutSpec("layers.1", 8, (5,)))
    save_readout(tmp_path / "whole.safetensors", readout, GUIDER)
    assert is_readout_file(tmp_path / "whole.safetensors") and load_readout(tmp_path / "whole.safetensors", GUIDER)
    tensors, header = load_tensors(tmp_path / "whole.safetensors")
    for value in READOUTS[field]:
        file = written(tmp_path / "x.safetensors", tensors, header | {field: value})
        with says(ValueError, "x.safetensors", "damaged"):
            load_readout(file, GUIDER)
    broken = tensors | {"head_1.mean": torch.full((8,), math.nan)}
    with says(ValueError, "x.safetensors", "head 1", "no numbers"):
        load_readout(written(tmp_path / "x.safetensors", broken, header), GUIDER)


@pytest.mark.parametrize("metadata", SHAPES, ids=range(len(SHAPES)))
def test_any_file_can_be_asked_whether_it_is_a_readout(tmp_path: Path, metadata: str):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", {"ppap": metadata})
    assert not is_readout_file(tmp_path / "x.safetensors")


# Sizes

def test_a_bank_takes_at_most_four_times_its_network():
    """Small ones are free; the message says both sizes, and nothing is allocated before."""
    net = fixed_weights(SmallNet(width=8)).eval()
    wide = torch.nn.Sequential(torch.nn.Linear(4000, 1500), torch.nn.Linear(1500, 4000)).eval()
    schedule = ExpertSchedule((0.1, 1.0))
    assert len(ExpertBank(net, schedule, LoraSpec(64)).schedule) == 1, "more than the network, but little"
    with says(ValueError, "1 experts of rank 1000000", "fewer experts"):
        ExpertBank(net, schedule, LoraSpec(1_000_000))
    own = sum(parameter.numel() for parameter in wide.parameters())
    rank = 4 * own // (4000 + 1500)
    assert 4 * own > FREE_NUMBERS and rank > 1000
    with says(ValueError, f"rank {rank + 1}", str(own)):
        ExpertBank(wide, schedule, LoraSpec(rank + 1, targets=("0",)))


def test_more_experts_than_anyone_needs_are_refused():
    with says(ValueError, f"{MAX_EXPERTS + 1} experts", f"at most {MAX_EXPERTS}"):
        ExpertBank(fixed_weights(SmallNet()).eval(), ExpertSchedule.log_spaced(MAX_EXPERTS + 1, 0.1, 10.0), LoraSpec(1))


@pytest.mark.parametrize("channels", [3, 16])
def test_the_size_of_a_stem_is_known_before_it_is_made(channels: int):
    space = LatentSpace("Test", torch.ones(channels, 3), torch.zeros(3))
    assert stem_numbers(space) == sum(each.numel() for each in Stem(space, seeded(0)).parameters())


def test_an_honest_file_comes_back(tmp_path: Path, whole: tuple):
    """The file that the others are made from."""
    tensors, header = whole
    bank = load_bank(written(tmp_path / "x.safetensors", tensors, header), GUIDER)
    save_bank(tmp_path / "y.safetensors", bank, GUIDER)
    again, description = load_tensors(tmp_path / "y.safetensors")
    assert same(again, tensors) and description == header


def test_values_are_shown_short():
    assert len(shown("x" * 10**6)) < 300 and len(shown({"a": [[[["x"] * 10**6]]]})) < 300 and len(shown(10**4000)) < 100
    assert [is_number(value) for value in (1, 0.5, True, "1", math.nan, math.inf, 10**400)] == [True, True] + [False] * 5
