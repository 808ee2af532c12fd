"""Files: what is saved comes back bit for bit, what does not belong is refused, and a fault leaves the old file."""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import SmallNet, disturb, fixed_weights, full_disk, images, level, randn, same, says, small_guider
from safetensors.torch import save_file

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.experts.checkpoint import load_bank, save_bank
from ppap_core.guiders.guider import IgnoreSigma
from ppap_core.guiders.preprocess import Preprocess
from ppap_core.guiders.tasks import TASKS
from ppap_core.io.files import (
    FileInUseError,
    load_tensors,
    optimizer_tensors,
    read_json,
    read_safetensors,
    restore_optimizer,
    save_tensors,
    with_prefix,
    without_prefix,
    write_json,
)
from ppap_core.schedules import ExpertSchedule

TENSORS = {"a": randn(3, 5), "b.c": torch.arange(7), "half": randn(2, 3, seed=1).bfloat16(), "one": torch.tensor(4.5)}
ABOUT = {"format": 1, "edges": [0.1, 1 / 3, 80.0], "name": "größe", "nested": {"x": [True, None]}}


# Tensors and JSON

def test_tensors_and_their_description_come_back_bit_for_bit(tmp_path):
    save_tensors(tmp_path / "new folder" / "x.safetensors", TENSORS, ABOUT)
    tensors, about = load_tensors(tmp_path / "new folder" / "x.safetensors")
    assert same(tensors, TENSORS) and about == ABOUT
    assert all(tensors[name].dtype == TENSORS[name].dtype for name in TENSORS)


def test_tensors_that_are_views_or_in_training_are_saved(tmp_path):
    views = {"t": randn(4, 6).T, "s": randn(4, 6)[1:3, ::2], "p": torch.nn.Parameter(randn(3))}
    save_tensors(tmp_path / "x.safetensors", views, {})
    assert same(load_tensors(tmp_path / "x.safetensors")[0], {name: value.detach() for name, value in views.items()})


def test_tensors_made_under_inference_mode_are_saved(tmp_path):
    with torch.inference_mode():
        save_tensors(tmp_path / "x.safetensors", {"a": randn(3)}, {})
    assert torch.equal(load_tensors(tmp_path / "x.safetensors")[0]["a"], randn(3))


def test_saving_again_replaces_the_file_only(tmp_path):
    """The old file is replaced, and nothing is left beside it."""
    for value in (1.0, 2.0):
        save_tensors(tmp_path / "x.safetensors", {"a": torch.full((3,), value)}, {"value": value})
    assert load_tensors(tmp_path / "x.safetensors")[1] == {"value": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="permissions of Unix")
def test_a_file_has_the_permissions_that_other_new_files_have(tmp_path):
    (tmp_path / "plain").write_text("")
    save_tensors(tmp_path / "x.safetensors", TENSORS, {})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


WRITERS = {
    "tensors": lambda path: save_tensors(path, {"a": randn(100, 100)}, {}),
    "json": lambda path: write_json(path, {"a": "x" * 5000}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_the_old_file_untouched(tmp_path, write):
    """A full disk is reported in words and leaves the old file untouched."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with full_disk(), says(OSError, "could not write x.safetensors", "Free some disk space"):
        write(path)
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]
    write(path)  # and with room again it works
    assert path.read_bytes() != b"old"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_stop_between_writing_and_renaming_leaves_the_old_file(tmp_path, write, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("ppap_core.io.files.os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write(path)
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]


def save_some_bank(path: Path) -> None:
    guider = small_guider()
    save_bank(path, make_bank(guider), guider)


@pytest.mark.parametrize("write", [*WRITERS.values(), save_some_bank], ids=[*WRITERS, "bank"])
def test_a_file_that_is_held_open_is_told_in_words(tmp_path, write, monkeypatch):
    """Windows refuses to replace what a loader holds: the sentence says so, and says nothing of the disk."""
    def refuse(*_):
        raise PermissionError(13, "Access is denied")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr("ppap_core.io.files.os.replace", refuse)
        patch.setattr("ppap_core.io.files.time.sleep", lambda seconds: None)
        with says(FileInUseError, "could not write x.safetensors", "held open", "loaded from it"):
            write(path)
    assert path.read_bytes() == b"old" and [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]
    write(path)
    assert path.read_bytes() != b"old"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_cannot_be_made_is_told_in_words(tmp_path, write):
    (tmp_path / "file").write_text("in the way")
    with says(OSError, "could not write x.safetensors", "another folder"):
        write(tmp_path / "file" / "x.safetensors")


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_name_that_is_a_folder_is_told_in_words(tmp_path, write):
    (tmp_path / "x.safetensors").mkdir()
    with says(OSError, "could not write x.safetensors"):
        write(tmp_path / "x.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]


def spoil(path, how: str):
    guider = small_guider()
    save_bank(path, make_bank(guider), guider)
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "one byte short":
        path.write_bytes(whole[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        torch.save({"a": torch.zeros(3)}, path)
    elif how == "huge header":
        path.write_bytes(b"\xff" * 64)
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "without metadata":
        save_file({"a": torch.zeros(3)}, path)
    elif how == "metadata of another program":
        save_file({"a": torch.zeros(3)}, path, metadata={"format": "pt"})
    elif how == "metadata that is no JSON":
        save_file({"a": torch.zeros(3)}, path, metadata={"ppap": "{"})
    elif how == "metadata that is no object":
        save_file({"a": torch.zeros(3)}, path, metadata={"ppap": "[1]"})


SPOILED = {
    "missing": (FileNotFoundError, "there is no file"),
    "folder": (FileNotFoundError, "there is no file"),
    **dict.fromkeys(("truncated", "one byte short", "empty", "pickle", "huge header"), (ValueError, "cannot be read")),
    **dict.fromkeys(("without metadata", "metadata of another program", "metadata that is no JSON",
                     "metadata that is no object"), (ValueError, "no description of this pack")),
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("load", [load_tensors, lambda path: load_bank(path, small_guider())], ids=["tensors", "bank"])
def test_a_spoiled_file_is_refused_by_name(tmp_path, how, load):
    spoil(tmp_path / "my experts.safetensors", how)
    kind, words = SPOILED[how]
    with says(kind, "my experts.safetensors", words):
        load(tmp_path / "my experts.safetensors")


def test_any_safetensors_file_can_be_read(tmp_path):
    """A file without our description can be read too."""
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert same(tensors, {"a": torch.ones(3)}) and metadata == {"format": "pt"}


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "folder" / "x.json", ABOUT)
    assert read_json(tmp_path / "folder" / "x.json") == ABOUT


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b"3"])
def test_json_that_is_damaged_is_refused_by_name(tmp_path, data):
    (tmp_path / "x.json").write_bytes(data)
    with says(ValueError, "x.json", "JSON"):
        read_json(tmp_path / "x.json")


def test_names_go_under_a_prefix_and_out_again():
    both = with_prefix("expert_1", TENSORS) | with_prefix("expert_10", {"z": torch.ones(1)})
    assert without_prefix("expert_1", both) == TENSORS


def test_a_restored_optimizer_goes_on_as_if_never_stopped():
    def step(parameter, optimizer, seed):
        parameter.grad = randn(4, 3, seed=seed)
        optimizer.step()
    straight, stopped = (torch.nn.Parameter(randn(4, 3, seed=9)) for _ in range(2))
    first, second = (torch.optim.AdamW([parameter], lr=0.1) for parameter in (straight, stopped))
    for seed in range(3):
        step(straight, first, seed)
        step(stopped, second, seed)
    third = torch.optim.AdamW([stopped], lr=0.1)
    restore_optimizer(third, {name: tensor.clone() for name, tensor in optimizer_tensors(second).items()})
    for seed in range(3, 6):
        step(straight, first, seed)
        step(stopped, third, seed)
    assert torch.equal(straight, stopped)


def test_an_optimiser_that_was_put_back_leaves_its_file_free(tmp_path: Path):
    """A mapped file cannot be replaced on Windows, and the next state is written under the same name."""
    parameter = torch.nn.Parameter(randn(4, 3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = randn(4, 3)
    optimizer.step()
    save_tensors(tmp_path / "state.safetensors", optimizer_tensors(optimizer), {})
    kept = load_tensors(tmp_path / "state.safetensors")[0]
    restore_optimizer(optimizer, kept)
    own = {tensor.data_ptr() for row in optimizer.state.values() for tensor in row.values()}
    assert not own & {tensor.data_ptr() for tensor in kept.values()}


# Banks

def make_bank(guider, rank: int = 2, view: str = "denoised", edges=(0.1, 1.0, 10.0)) -> ExpertBank:
    bank = ExpertBank(base_network(guider), ExpertSchedule(edges), LoraSpec(rank, alpha=3.0), view)
    for index in range(len(bank.schedule)):
        disturb(bank, index, seed=20 * index)
    return bank


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("view", ["noisy", "denoised"])
def test_a_bank_comes_back_with_every_bit_and_every_answer(tmp_path, task, view):
    guider = small_guider(task)
    bank = make_bank(guider, view=view, edges=(0.02, 1 / 3, 2.5, 80.0))
    bank.training_info = {"steps": 5}
    save_bank(tmp_path / "x.safetensors", bank, guider)
    again = load_bank(tmp_path / "x.safetensors", small_guider(task))
    assert again.training_info == bank.training_info
    assert (again.schedule, again.lora, again.view) == (bank.schedule, bank.lora, view)
    for index, sigma in enumerate((0.1, 1.0, 30.0)):
        assert same(again.weights(index), bank.weights(index))
        image = images()
        answers = [with_experts(guider, each).energy(image, level(sigma, image)) for each in (bank, again)]
        assert torch.equal(*answers) and not torch.equal(answers[0], guider.energy(image, level(sigma, image)))


def test_the_file_of_a_bank_holds_adapters_only(tmp_path):
    """The file holds adapters only and says which network they belong to."""
    guider = small_guider()
    bank = make_bank(guider)
    bank.training_info = {"steps": 5, "losses": [[1.0], [2.0]]}
    save_bank(tmp_path / "x.safetensors", bank, guider)
    tensors, about = load_tensors(tmp_path / "x.safetensors")
    assert len(tensors) == 2 * len(bank.weights(0)) and all("lora_" in name for name in tensors)
    assert about["guider"] == "small/class" and about["task"] == "class" and about["fingerprint"] == bank.fingerprint
    assert about["view"] == "denoised" and about["space"] == "pixel" and about["edges"] == [0.1, 1.0, 10.0]
    assert about["rank"] == 2 and about["alpha"] == 3.0 and about["targets"] == list(bank.lora.targets)
    assert about["preprocess"] == guider.preprocess.to_dict() and about["recipe"]["losses"] == [[1.0], [2.0]]
    assert {"format", "kind", "noise"} <= about.keys()


def test_a_full_disk_while_saving_a_bank_leaves_the_old_bank(tmp_path):
    guider = small_guider()
    bank = make_bank(guider)
    save_bank(tmp_path / "x.safetensors", bank, guider)
    old = (tmp_path / "x.safetensors").read_bytes()
    disturb(bank, 0, seed=77)
    with full_disk(), says(OSError, "could not write x.safetensors", "Free some disk space"):
        save_bank(tmp_path / "x.safetensors", bank, guider)
    assert (tmp_path / "x.safetensors").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def other_guider(change: str):
    guider = small_guider()
    return {
        "task": lambda: replace(small_guider("depth"), name=guider.name),
        "fingerprint": lambda: small_guider(seed=8),
        "preprocess": lambda: replace(guider, preprocess=replace(guider.preprocess, mean=(0.5, 0.5, 0.5))),
        "architecture": lambda: replace(guider, net=IgnoreSigma(fixed_weights(SmallNet(width=16)))),
    }[change]()


@pytest.mark.parametrize("change, words", [
    ("task", ["task", "'class'", "'depth'"]),
    ("fingerprint", ["fingerprint"]),
    ("preprocess", ["preprocess", "0.48", "0.5, 0.5"]),
    ("architecture", ["fingerprint"]),
])
def test_a_bank_of_another_guider_is_refused_with_both_values(tmp_path, change, words):
    guider = small_guider()
    save_bank(tmp_path / "x.safetensors", make_bank(guider), guider)
    with says(ValueError, "x.safetensors does not fit", *words):
        load_bank(tmp_path / "x.safetensors", other_guider(change))


def test_a_bank_fits_its_network_in_any_folder(tmp_path):
    """A bank belongs to its network, whatever the folder is called."""
    guider = small_guider()
    bank = make_bank(guider)
    save_bank(tmp_path / "x.safetensors", bank, guider)
    again = load_bank(tmp_path / "x.safetensors", replace(guider, name="small/another"))
    assert same(again.weights(1), bank.weights(1))


def test_a_bank_is_not_loaded_over_experts(tmp_path):
    guider = small_guider()
    bank = make_bank(guider)
    save_bank(tmp_path / "x.safetensors", bank, guider)
    with says(ValueError, "not a plain guider"):
        load_bank(tmp_path / "x.safetensors", with_experts(guider, bank))


@pytest.mark.parametrize("change, words", [
    ({"format": 2}, ["format", "2", "1"]),
    ({"kind": "sample store"}, ["kind", "'sample store'", "'expert bank'"]),
    ({"space": "SD15"}, ["damaged", "space.factors"]),
    ({"noise": "t of a flow"}, ["noise", "'t of a flow'"]),
    ({"rank": 4}, ["shape", "rank"]),
    ({"targets": ["conv_1"]}, ["unexpected"]),
    ({"edges": [0.1, 0.5, 1.0, 10.0]}, ["expert 2", "misses"]),
    ({"edges": [1.0, 0.1]}, ["ascending"]),
    ({"edges": None}, ["x.safetensors", "damaged"]),
    ({"rank": "many"}, ["x.safetensors", "damaged"]),
    ({"view": "latent"}, ["latent", "noisy"]),
])
def test_a_bank_with_a_wrong_description_is_refused(tmp_path, change, words):
    guider = small_guider()
    save_bank(tmp_path / "x.safetensors", make_bank(guider), guider)
    tensors, about = load_tensors(tmp_path / "x.safetensors")
    save_tensors(tmp_path / "x.safetensors", tensors, about | change)
    with says(ValueError, *words):
        load_bank(tmp_path / "x.safetensors", guider)


@pytest.mark.parametrize("key", ["edges", "rank", "alpha", "targets", "view"])
def test_a_bank_whose_description_lacks_something_is_refused(tmp_path, key):
    guider = small_guider()
    save_bank(tmp_path / "x.safetensors", make_bank(guider), guider)
    tensors, about = load_tensors(tmp_path / "x.safetensors")
    del about[key]
    save_tensors(tmp_path / "x.safetensors", tensors, about)
    with says(ValueError, "x.safetensors", "damaged", key):
        load_bank(tmp_path / "x.safetensors", guider)


def test_the_preprocessing_of_a_guider_is_json():
    about = Preprocess((12, 16), (0.48, 0.45, 0.4), (0.22, 0.23, 0.24), "bicubic").to_dict()
    assert json.loads(json.dumps(about)) == about
