"""The short name of a value: the same in every process, another one for another value."""
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import randn

from ppap_core.io.function_fingerprint import hashed_as
from ppap_core.io.hashing import digest

VALUE = {"model": "tiny", "steps": 4, "cfg": 7.5, "tags": {"b", "a", "c"}, "none": None, "shape": (3, [32, 32])}


def scaled(scale):
    return lambda x: scale * x  # as the patches of a model are


def test_the_order_of_keys_does_not_matter():
    assert digest(VALUE) == digest(dict(reversed(VALUE.items()))) and len(digest(VALUE)) == 16


@pytest.mark.parametrize("a, b", [
    (1, 2), (1, 1.5), ("1", 1), (None, 0), (None, "None"),
    ([1, 23], [12, 3]),
    (["ab", "c"], ["a", "bc"]),
    ([[1], 2], [[1, 2]]),
    ({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "c": 2}}),
    ({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}),
    (randn(3, 5), randn(5, 3)), (torch.zeros(3), torch.zeros(3).half()), (torch.tensor(1), torch.tensor(2)),
    (randn(100, 100), randn(100, 100, seed=1)), (torch.float16, torch.float32), (b"a", b"b"),
    (scaled(1.0), scaled(2.0)), (lambda x, by=1: x, lambda x, by=2: x),
])
def test_another_value_has_another_name(a, b):
    assert digest(a) == digest(a) and digest(a) != digest(b)


@pytest.mark.parametrize("side", [512, 832, 1024])
def test_what_is_painted_into_a_mask_counts(side):
    empty, here, there = (torch.zeros(1, side, side) for _ in range(3))
    here[:, 100:180, 301:377], there[:, 201:280, 301:377] = 1, 1
    assert len({digest({"mask": mask}) for mask in (empty, here, there)}) == 3


def test_of_weights_some_values_count():
    weights = {"a": randn(300, 300), "b": randn(7)}
    assert digest(weights, sampled=True) == digest({**weights}, sampled=True) != digest(weights)
    assert digest(weights, sampled=True) != digest({**weights, "a": weights["a"] + 1}, sampled=True)


def test_what_a_function_remembers_does_not_count():
    def patch(scale):
        average, last = 0.0, None

        def run(x):
            nonlocal average, last
            average, last = 0.5 * average + scale * x, torch.ones(3)
            return average

        def look():
            return last
        return {"run": run, "look": look}

    functions = patch(2.0)
    before = digest(functions)
    functions["run"](3.0)
    assert digest(functions) == before == digest(patch(2.0)) != digest(patch(3.0))


def test_a_function_that_waits_for_a_value_has_a_name():
    def recursive():
        return later()
    assert digest(recursive)

    def later():
        return 1


def test_a_function_or_field_that_was_renamed_keeps_its_name():
    @dataclass
    class Old:
        see: object

    @dataclass
    class New:
        decode: object

        def fingerprint_fields(self):
            return {"see": self.decode}

    class Patch:
        def __init__(self, scale):
            self.scale = scale

        @hashed_as("scaled.<locals>.<lambda>", "scale")
        def apply(self, x):
            return self.scale * x

    assert digest(New(3)) == digest(Old(3)) != digest(New(4))
    assert digest(Patch(2.0).apply) == digest(scaled(2.0)) != digest(Patch(3.0).apply)


def test_a_value_has_the_same_name_in_another_process():
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); from ppap_core.io.hashing import digest; " \
           f"print(digest({VALUE!r}))"
    names = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env={"PYTHONHASHSEED": str(seed)}).stdout.strip() for seed in (1, 2)}
    assert names == {digest(VALUE)}
