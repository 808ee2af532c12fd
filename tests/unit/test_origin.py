"""Experts say on which model they were distilled, and which models they can guide."""
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import randn, says, small_guider

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.experts.checkpoint import load_bank, save_bank
from ppap_core.experts.origin import (
    MAX_SHOWN,
    Origin,
    describe_origin,
    describe_transfer,
    origin_of,
    remember_origin,
    shared_name,
)
from ppap_core.guiders.latents import LatentSpace
from ppap_core.schedules import ExpertSchedule
from ppap_core.tinyworld.loaders import load_guider

SAVED = Path(__file__).parents[1] / "fixtures" / "core"
SDXL = Origin("SDXL", "one.safetensors", 1.0, 0.03, 14.6)


def bank_of(space: str | None = "Test") -> ExpertBank:
    latents = LatentSpace(space, randn(4, 3), randn(3)) if space else None
    return ExpertBank(base_network(small_guider()), ExpertSchedule((0.1, 1.0, 10.0)), LoraSpec(2, 2.0), space=latents)


def test_the_origin_travels_in_the_file(tmp_path: Path):
    bank, guider = bank_of(), small_guider()
    bank.training_info = {"images": 512, "samples": {"steps": 20}, "seed": 3}
    remember_origin(bank, SDXL)
    save_bank(tmp_path / "x.safetensors", bank, guider)
    again = load_bank(tmp_path / "x.safetensors", guider)
    assert origin_of(again) == SDXL and again.training_info == bank.training_info
    text = describe_origin(again)
    assert text == describe_origin(bank) == (
        "These experts guide every model of Test latents. Distilled on SDXL (one.safetensors), 512 images, "
        "20 sampling steps, sigma 0.1 to 10.")


@pytest.mark.parametrize("name, kind, task", [("denoised_latent", "SD3 latents", "class"),
                                              ("denoised_pixel", "pixels", "depth")])
def test_a_file_of_an_earlier_version_names_no_model(name: str, kind: str, task: str):
    bank = load_bank(SAVED / f"{name}.safetensors", load_guider(task))
    assert origin_of(bank) is None and describe_transfer(bank, SDXL) == ""
    text = describe_origin(bank)
    assert kind in text and "a model that the file does not name, 64 images, sigma" in text


@pytest.mark.parametrize("other, differs", [
    (SDXL, False), (Origin("SDXL"), False), (Origin("SDXL", "two.safetensors"), True), (Origin("SD15"), True)])
def test_a_remark_is_made_where_another_model_is_guided(other: Origin, differs: bool):
    """A file name that is not known on one side proves nothing."""
    bank = bank_of()
    remember_origin(bank, SDXL)
    assert describe_transfer(bank, other) == (
        f"experts distilled on SDXL (one.safetensors) guide {other.name}" if differs else "")


@pytest.mark.parametrize("said", [None, 3, [], {}, {"model": 7}, {"file": "x"}])
def test_an_origin_that_is_none_is_passed_over(said: object):
    bank = bank_of()
    bank.training_info = {"origin": said, "images": "many", "samples": [1]}
    assert origin_of(bank) is None and describe_origin(bank).endswith("does not name, sigma 0.1 to 10.")


def test_long_names_and_lines_of_a_file_are_cut():
    bank = bank_of()
    bank.training_info = {"origin": {"model": "a\nb" + 10**6 * "c", "file": ["x"], "sigma_data": "wide"}}
    origin = origin_of(bank)
    assert origin.model.startswith("a bcc") and len(origin.model) == MAX_SHOWN and origin.sigma_data == 0.0
    assert "\n" not in describe_origin(bank)


@pytest.mark.parametrize("guider, space, name", [
    ("tinyworld/guider_class", None, "tinyworld-guider_class--pixel"), ("owner--net", "SDXL", "owner--net--SDXL"),
    ("../../etc/passwd", "a/b\\c", "etc-passwd--a-b-c"), ("网络", "SDXL", "experts--SDXL"), ("", "..", "experts--experts")])
def test_a_shared_name_stays_in_its_folder(guider: str, space: str | None, name: str):
    experts = with_experts(small_guider(), bank_of(space))
    assert shared_name(replace(experts, name=guider)) == name


def test_a_guider_without_experts_has_no_shared_name():
    with says(ValueError, "no experts"):
        shared_name(small_guider())
