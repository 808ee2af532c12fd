"""What the pack uses of ComfyUI is there; a release that moves something is told in words."""
import json

import pytest
from helpers.workbench import Workbench

from tools.comfy_symbols import RECORD, differences, state_of, unknown

KNOWN = json.loads(RECORD.read_text(encoding="utf-8"))


def test_comfyui_has_what_the_pack_uses(bench: Workbench):
    from comfyui_version import __version__ as version

    assert differences(KNOWN, version) == []


def test_the_record_has_all_that_the_pack_uses():
    assert not unknown(KNOWN), "run `make symbols` with each ComfyUI that is supported"


@pytest.mark.parametrize(("symbol", "before", "words"), [
    ("comfy.sample.sample", "model, gone=",
     "comfy.sample.sample, which nodes/bridge/distillation.py and nodes/bridge/seeds.py uses, takes (model,"),
    ("comfy.sample.sample", None, ""), ("comfy.sd.VAE", "value", "and took (value)")])
def test_a_release_that_moves_something_is_told(bench: Workbench, symbol: str, before: str | None, words: str):
    said = differences({"9.9": {symbol: before}}, "10.0")
    assert len(said) == bool(before) and all(words in line and "10.0" in line for line in said)


def test_what_is_missing_has_no_state(bench: Workbench):
    assert state_of("comfy.sample.nothing") is None and state_of("comfy.nothing") is None
    assert state_of("comfy.samplers.CFGGuider.model_patcher") == "value"
