"""The short name of a value: the same in every process, another one for another value."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import randn

from ppap_core.digest import digest

VALUE = {"model": "tiny", "steps": 4, "cfg": 7.5, "tags": {"b", "a", "c"}, "none": None, "shape": (3, [32, 32])}


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
    (randn(100, 100), randn(100, 100, seed=1)),
], ids=str)
def test_another_value_has_another_name(a, b):
    assert digest(a) == digest(a) and digest(a) != digest(b)


def test_a_value_has_the_same_name_in_another_process():
    code = f"import sys; sys.path.append({str(Path(__file__).parent.parent)!r}); from ppap_core.digest import digest; " \
           f"print(digest({VALUE!r}))"
    names = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env={"PYTHONHASHSEED": str(seed)}).stdout.strip() for seed in (1, 2)}
    assert names == {digest(VALUE)}
