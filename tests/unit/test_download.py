"""Fetching a network from a hub that runs in the test: what is taken, what is not, and what happens when it stops."""
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import says
from helpers.hub import CONFIG, FILES, REPO, TAKEN, Hub, contents, serving

from ppap_core.guiders.loaders import hub as module
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.loaders.hub import download, files_to_fetch, folder_name

pytestmark = pytest.mark.slow  # all together take several seconds of the fast tests' minute

pytest.importorskip("huggingface_hub")
pytest.importorskip("timm")


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    monkeypatch.setattr(module, "PIECE_SIZE", 2000)
    with serving() as hub:
        yield hub


def fetch(hub: Hub, folder: Path, report=lambda done, total: None) -> Path:
    return download(REPO, folder, report, endpoint=hub.url)


# What is fetched

def test_only_weights_and_their_descriptions_are_fetched(hub, tmp_path):
    """Files that can hold code are never fetched."""
    folder = tmp_path / "guiders" / folder_name(REPO)
    assert fetch(hub, folder) == folder
    assert contents(folder) == {name: FILES[name] for name in TAKEN}
    assert list(folder.parent.iterdir()) == [folder], "nothing is left beside it"
    assert hub.served == sum(len(FILES[name]) for name in TAKEN), "every byte comes once"


INDEX = "model.safetensors.index.json"
PLAIN, SHARDS = ["config.json", "model.safetensors"], [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.mark.parametrize(("names", "taken"), [
    ([*PLAIN, "open_clip_model.safetensors"], PLAIN),
    ([*SHARDS[::-1], INDEX, "config.json"], ["config.json", INDEX, *SHARDS]),
    ([*SHARDS, INDEX, *PLAIN], PLAIN), ([*PLAIN, "model.fp16.safetensors", "onnx/model.onnx"], PLAIN),
    ([*PLAIN, "adapter_model.safetensors", "selected_tags.csv"], ["config.json", "selected_tags.csv", "model.safetensors"]),
    (["config.json", "model.fp16.safetensors", "open_clip_model.safetensors", "head.safetensors"],
     ["config.json", "head.safetensors", "model.fp16.safetensors"]),
    (["config.json", "other.safetensors", "spiece.model", "preprocessor_config.json", "special_tokens_map.json"],
     ["config.json", "preprocessor_config.json", "special_tokens_map.json", "spiece.model", "other.safetensors"]),
    ([*PLAIN, "../evil.safetensors", "a\\b.safetensors", "config.json.py", "tokenizer.py", "x.bin"], PLAIN)])
def test_only_known_files_at_the_root_are_wanted(names, taken):
    assert files_to_fetch(REPO, names) == taken


@pytest.mark.parametrize(("names", "words"), [
    ({"config.json": CONFIG, "pytorch_model.bin": b"code"}, ["no weights in safetensors", "another network"]),
    ({"config.json": CONFIG, "onnx/model.safetensors": b"x"}, ["no weights in safetensors"]),
    ({"config.json": CONFIG, "model-00001-of-00002.safetensors": b"x", "model-00002-of-00002.safetensors": b"x"},
     ["model-00001-of-00002.safetensors", "index"]),
    ({"config.json": CONFIG, "a.safetensors": b"x", "b.safetensors": b"x"}, ["a.safetensors, b.safetensors"]),
    ({"config.json": CONFIG, "model.safetensors.index.json": b"{}"}, ["no weights in safetensors"]),
    ({"model_index.json": b"{}", "unet/diffusion_pytorch_model.safetensors": b"x"}, ["pipeline of diffusers"]),
    ({"model_index.json": b"{}", "whole.safetensors": b"x"}, ["no config.json", "pipeline of diffusers"]),
    ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, ["an adapter"]),
    ({"config.json": CONFIG, "adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, ["an adapter"]),
    ({"open_clip_config.json": b"{}", "open_clip_model.safetensors": b"x"}, ["open_clip"]),
    ({"config.json": CONFIG, "tf_model.h5": b"x", "flax_model.msgpack": b"x", "model.gguf": b"x"}, ["no weights"]),
    ({"model.safetensors": b"x"}, ["no config.json"]), ({}, ["no weights in safetensors"])])
def test_a_repository_without_weights_or_config_is_refused(hub, tmp_path, names, words):
    """The repository is refused, and nothing is fetched."""
    hub.files = names
    with says(ValueError, REPO, *words):
        fetch(hub, tmp_path / "net")
    assert hub.served == 0 and not list(tmp_path.iterdir())


VIT = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}
VIT_PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_normalize": True,
                 "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
UNLOADABLE = {  # files of a page that no loader could load -> words of the refusal
    "language model": ({"config.json": {"architectures": ["LlamaForCausalLM"]}}, ["LlamaForCausalLM"]),
    "text encoder": ({"config.json": {"architectures": ["BertModel"], "model_type": "bert"}}, ["BertModel"]),
    "unknown timm name": ({"config.json": {"architecture": "resnet_of_tomorrow"}}, ["resnet_of_tomorrow", "timm"]),
    "timm settings that load": ({"config.json": {"architecture": "resnet18", "model_args": {"pretrained": True}}},
                                ["pretrained", "no setting"]),
    "class of tomorrow": ({"config.json": {"architectures": ["TomorrowForImageClassification"]}}, ["Tomorrow"]),
    "no architecture": ({"config.json": {"model_type": "vit", "hidden_size": 8}}, ["model_type", "architecture"]),
    "part of diffusers": ({"config.json": {"_class_name": "AutoencoderKL", "_diffusers_version": "0.30"}}, ["_class_name"]),
    "no preprocessing": ({"config.json": VIT}, ["preprocessor_config.json"]),
    "a size that is none": ({"config.json": VIT, "preprocessor_config.json": VIT_PROCESSOR | {"size": {"depth": 3}}},
                            ["size", "depth"]),
    "quantised": ({"config.json": VIT | {"quantization_config": {"quant_method": "awq"}},
                   "preprocessor_config.json": VIT_PROCESSOR}, ["awq", "quantised"]),
    "backbone elsewhere": ({"config.json": {"architectures": ["UperNetForSemanticSegmentation"], "model_type": "upernet",
                                            "backbone": "some-one/backbone"},
                            "preprocessor_config.json": VIT_PROCESSOR}, ["some-one/backbone", "backbone_config"]),
    "config of a list": ({"config.json": ["resnet18"]}, ["config.json", "JSON"]),
}



@pytest.mark.parametrize("name", UNLOADABLE)
def test_what_no_loader_loads_is_refused_before_its_weights(hub, tmp_path, name: str):
    """In the loader's own words; no weight is fetched, and nothing is left."""
    pytest.importorskip("transformers")
    described, words = UNLOADABLE[name]
    hub.files = {file: json.dumps(value).encode() for file, value in described.items()}
    hub.files |= {"model.safetensors": bytes(9000), "tokenizer.json": bytes(3000)}
    place = tmp_path / "by-hand"
    place.mkdir()
    for file, content in hub.files.items():
        (place / file).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as loaded:
        load_guider(place)
    with pytest.raises(ValueError) as fetched:
        fetch(hub, tmp_path / "net")
    assert all(word in str(fetched.value) for word in words) and "\n" not in str(fetched.value)
    assert hub.served < 3000 and list(tmp_path.iterdir()) == [place]
    assert in_general(fetched.value) == in_general(loaded.value)


def in_general(error: Exception) -> str:
    """A sentence without the name of the page or folder that it speaks of."""
    return re.sub(rf"\S*({REPO}|{re.escape(folder_name(REPO))}|by-hand)", "it", str(error))


def test_an_index_that_names_a_missing_shard_is_refused(hub, tmp_path):
    where = {"weight_map": {"a": SHARDS[0], "b": "model-00009-of-00009.safetensors"}}
    hub.files = {"config.json": CONFIG, INDEX: json.dumps(where).encode(), SHARDS[0]: bytes(9000), SHARDS[1]: bytes(9000)}
    with says(ValueError, REPO, "model-00009-of-00009.safetensors"):
        fetch(hub, tmp_path / "net")
    assert hub.served < 3000 and not list(tmp_path.iterdir())


def test_what_an_earlier_start_fetched_too_much_is_deleted(hub, tmp_path):
    """Such as shards, where the weights are fetched as one file."""
    part = tmp_path / f".{folder_name(REPO)}"
    part.mkdir()
    for name in (INDEX, *SHARDS, "README.md"):
        (part / name).write_bytes(b"{}")
    fetch(hub, tmp_path / "net")
    assert contents(tmp_path / "net") == {name: FILES[name] for name in TAKEN}


def test_a_begun_download_that_is_refused_now_keeps_its_weights(hub, tmp_path):
    """A newer library may know the network tomorrow."""
    hub.files = {"config.json": b'{"architecture": "resnet_of_tomorrow"}', "model.safetensors": bytes(9000)}
    part = tmp_path / f".{folder_name(REPO)}"
    part.mkdir()
    (part / "model.safetensors").write_bytes(bytes(5000))
    with says(ValueError, "resnet_of_tomorrow"):
        fetch(hub, tmp_path / "net")
    assert contents(part) == {"model.safetensors": bytes(5000)}
    hub.files["config.json"] = CONFIG
    fetch(hub, tmp_path / "net")
    assert contents(tmp_path / "net") == hub.files


@pytest.mark.parametrize("name", ["", "resnet", "a/b/c", "https://huggingface.co/a/b", "../b", "a/..", "a/b c", "/a", "a/",
                                  "a/b\t", "-a/b", "a--b/c", "ä/b", "a\\b", "a/" + 97 * "x"])
def test_only_owner_slash_name_names_a_repository(name, tmp_path):
    with says(ValueError, repr(name), "owner/name"):
        download(name, tmp_path / "net", print)


def test_a_name_makes_one_folder():
    assert folder_name("timm/resnet18.a1_in1k") == "timm--resnet18.a1_in1k"


# Progress, and what happens when it stops

def test_progress_counts_bytes_up_to_the_whole(hub, tmp_path):
    seen = []
    fetch(hub, tmp_path / "net", lambda done, total: seen.append((done, total)))
    whole = sum(len(FILES[name]) for name in TAKEN)
    assert seen[0] == (0, whole) and seen[-1] == (whole, whole)
    assert seen == sorted(seen) and len(seen) > 8 and max(b[0] - a[0] for a, b in zip(seen, seen[1:], strict=False)) <= 2000


class Cancelled(BaseException):
    """The error of a cancel button."""


@pytest.mark.parametrize("stops", [[0], [15], [5000], [3000, 3500, 9000]])
def test_a_download_that_was_stopped_goes_on_where_it_stopped(hub, tmp_path, stops):
    folder = tmp_path / "net"
    for stop in stops:
        def cancel(done, total, stop=stop):
            if done >= stop:
                raise Cancelled
        with pytest.raises(Cancelled):
            fetch(hub, folder, cancel)
        assert not folder.exists(), "a folder that is not whole cannot be chosen"
        assert [each.name[0] for each in tmp_path.iterdir()] == ["."]
    fetch(hub, folder)
    assert contents(folder) == {name: FILES[name] for name in TAKEN}
    assert hub.served == sum(len(FILES[name]) for name in TAKEN), "no byte comes twice"


def test_an_existing_folder_is_left_alone(hub, tmp_path):
    """The folder stays as it is, and the hub is not asked."""
    (tmp_path / "net").mkdir()
    assert fetch(hub, tmp_path / "net") == tmp_path / "net"
    assert not hub.asked and not contents(tmp_path)


@pytest.mark.parametrize("begun", [b"", FILES["model.safetensors"][:700], b"older" + FILES["model.safetensors"]])
def test_a_server_without_ranges_sends_files_whole(hub, tmp_path, begun):
    """A file that was begun is begun anew."""
    hub.ranges = False
    part = tmp_path / f".{folder_name(REPO)}"
    part.mkdir()
    (part / "model.safetensors").write_bytes(begun)
    if begun:
        with says(ValueError, "model.safetensors", REPO, "again"):
            fetch(hub, tmp_path / "net")
    fetch(hub, tmp_path / "net")
    assert contents(tmp_path / "net") == {name: FILES[name] for name in TAKEN}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_download_is_fetched_again(hub, tmp_path, name):
    """The damaged file is thrown away."""
    hub.damaged = name
    with says(ValueError, name, REPO, "again"):
        fetch(hub, tmp_path / "net")
    assert not (tmp_path / "net").exists()
    hub.damaged = ""
    fetch(hub, tmp_path / "net")
    assert contents(tmp_path / "net") == {name: FILES[name] for name in TAKEN}


# What is said when it cannot be

@pytest.mark.parametrize(("status", "code", "words"), [
    (404, "RepoNotFound", ["no network", "check the name"]), (403, "GatedRepo", ["accepted its terms", "hf auth login"])])
def test_what_the_hub_refuses_is_said_in_words(hub, tmp_path, status, code, words):
    hub.refuse = status, code
    with says(ValueError, REPO, *words):
        fetch(hub, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_no_connection_is_said_in_words(tmp_path):
    with says(ConnectionError, REPO, "check the connection", "where it stopped"):
        download(REPO, tmp_path / "net", print, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(("code", "error", "words"), [
    ("Forbidden", ConnectionError, "where it stopped"), ("GatedRepo", ValueError, "accepted its terms")])
def test_a_file_that_is_refused_is_said_in_words(hub, tmp_path, code, error, words):
    def refuse(done, total):
        hub.refuse = 403, code
    with says(error, REPO, words):
        fetch(hub, tmp_path / "net", refuse)


def test_a_disk_without_room_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4000}))
    with says(ValueError, "GB are free", str(tmp_path), "make room"):
        fetch(hub, tmp_path / "net")
    assert hub.served == 0


def test_the_missing_package_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with says(ImportError, "pip install huggingface_hub", "by hand"):
        download(REPO, tmp_path / "net", print)
