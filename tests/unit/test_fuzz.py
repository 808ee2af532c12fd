"""Every reader of files and names, on inputs from nowhere: each goes well or ends in one documented error in words.

None takes two seconds or 200 MB, writes outside of its folder, starts a program or talks to a network. A short run is among
the other tests; `make fuzz` takes 100,000 inputs.
"""
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import disturb, images, made_up_trajectories, randn, small_guider
from helpers.fuzz import TEXTS, VALUES, changed, harmless, inputs, keeping_to, spoilt, with_header
from hypothesis import given
from hypothesis import strategies as st

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network
from ppap_core.experts.checkpoint import load_bank, save_bank
from ppap_core.experts.distill import distill
from ppap_core.experts.knowledge import describe_knowledge
from ppap_core.experts.lesson import DistillConfig
from ppap_core.experts.origin import Origin, describe_origin
from ppap_core.experts.readout import ReadoutNetwork, ReadoutSpec
from ppap_core.experts.readout_file import is_readout_file, load_readout, save_readout
from ppap_core.experts.samples import SHARD_SIZE, SampleStore
from ppap_core.experts.source import FILE, Source, load_source, save_source
from ppap_core.experts.states import NOTE, state_folder
from ppap_core.experts.upkeep import describe_store, merge_stores, open_store, verify_store
from ppap_core.guiders.latents import LatentSpace
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.loaders.contents import INDEX, read_index, weight_files
from ppap_core.guiders.loaders.hub import files_to_fetch, folder_name
from ppap_core.guiders.loaders.labels import TAGS_FILE, class_labels, tag_names
from ppap_core.guiders.loaders.trained import save_trained
from ppap_core.guiders.loaders.transformers import linear_head
from ppap_core.guiders.processor_config import processor_preprocess
from ppap_core.guiders.train import train_guider
from ppap_core.io.files import DamagedFileError, load_tensors, read_description, read_json, save_tensors
from ppap_core.schedules import ExpertSchedule

GUIDER = small_guider()
SPACE = LatentSpace("Test", torch.ones(5, 3), torch.zeros(3))
SPEC = ReadoutSpec("middle", 4, (5,), False)
EDGES = ExpertSchedule((0.1, 1.0, 10.0))
CONFIG = DistillConfig(steps=2, batch=2)
READ = (ValueError, FileNotFoundError, DamagedFileError)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with keeping_to(tmp_path_factory.mktemp("place")) as folder:
        yield folder


class Files(dict):
    """Content of files by name, of which a report shows the names."""

    def __repr__(self) -> str:
        return f"<{', '.join(self)}>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files as the pack writes them."""
    folder = tmp_path_factory.mktemp("whole")
    bank = ExpertBank(base_network(GUIDER), EDGES, LoraSpec(2, 3.0), space=SPACE)
    store = SampleStore(folder / "store", {"model": "made up", "seed": 0})
    store.fill(SHARD_SIZE, generate)
    plain = ExpertBank(base_network(GUIDER), EDGES, LoraSpec(2))
    distill(GUIDER, plain, store, CONFIG, folder)
    disturb(bank, 0)
    bank.training_info = plain.training_info | {"origin": {"model": "x", "file": "y"}, "knowledge": [None, {
        "plain": 0.5, "expert": 0.6, "commonest": 0.1, "plain_error": 0.1, "expert_error": 0.1, "gain_error": 0.1,
        "images": 64, "held_out": True, "possible": 0.5}]}
    save_bank(folder / "bank", bank, GUIDER)
    save_readout(folder / "readout", ReadoutNetwork(base_network(GUIDER), EDGES, SPEC), GUIDER)
    save_source(store, Source(SPACE, Origin("x")))
    save_tensors(folder / "head", {"0.weight": randn(3, 5), "0.bias": randn(3), "2.weight": randn(1, 3)}, {})
    state_folder(GUIDER, plain, lambda *_: folder / "states" / "x")
    files = {"bank": folder / "bank", "readout": folder / "readout", "shard": store.shards.file(0), "head": folder / "head",
             "state": folder / "expert_0.state.safetensors", "source": store.folder / FILE,
             "manifest": store.folder / "manifest.json", "note": folder / "states" / "x" / NOTE}
    return Files({name: file.read_bytes() for name, file in files.items()})


def generate(seeds: list[int]) -> tuple[torch.Tensor, Any]:
    made = images(len(seeds), seeds[0])[..., :5, :7]
    return made, made_up_trajectories(made, seeds[0])


def described(data: bytes, change: Callable[[dict], Any]) -> bytes:
    """A file of the pack whose own description is changed."""
    def in_header(header: dict) -> dict:
        own = json.loads(header["__metadata__"]["ppap"])
        return header | {"__metadata__": {"ppap": json.dumps(change(own))}}
    return with_header(data, in_header)


def description(data: bytes) -> dict:
    found: list[dict] = []
    described(data, lambda own: found.append(own) or own)
    return found[0]


def strange(data: st.DataObject, whole: bytes) -> bytes:
    """A file with another description, with other names and shapes of tensors, or with other bytes."""
    kind = data.draw(st.integers(0, 4))
    if kind < 3:
        own = data.draw(changed(description(whole)))
        return described(whole, lambda _: own)
    if kind == 3:
        return with_header(whole, lambda header: data.draw(changed(header)))
    return data.draw(spoilt(whole))


def written(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


# Files of experts

def read_bank(file: Path) -> None:
    bank = load_bank(file, GUIDER)
    describe_knowledge(bank), describe_origin(bank)


READERS: dict[str, Callable[[Path], object]] = {
    "bank": read_bank, "readout": lambda file: describe_knowledge(load_readout(file, GUIDER)), "head": linear_head}


@pytest.mark.parametrize("kind", READERS)
@inputs(0.04)
@given(st.data())
def test_files_of_networks(whole: dict[str, bytes], place: Path, kind: str, data: st.DataObject):
    file = written(place / "x.safetensors", strange(data, whole[kind]))
    harmless(lambda: READERS[kind](file), place, *READ, names="x.safetensors")


@inputs(0.04)
@given(st.data())
def test_any_file_for_any_reader(whole: dict[str, bytes], place: Path, data: st.DataObject):
    """A file of another kind, or none at all."""
    other = st.sampled_from(sorted(whole)).flatmap(lambda name: spoilt(whole[name]))
    file = written(place / "x.safetensors", data.draw(st.one_of(st.binary(max_size=200), other)))
    for read in (*READERS.values(), is_readout_file, load_tensors, read_description, read_json, tag_names):
        harmless(partial(read, file), place, *READ, names="x.safetensors")


# Stores and states of trainings

def read_store(folder: Path) -> None:
    store = open_store(folder)
    describe_store(store), list(verify_store(store))
    assert all(map(len, (store.images_at([0, 1]), store.sigmas, store.denoised[:2])))


@inputs(0.04)
@given(st.data())
def test_shards(whole: dict[str, bytes], place: Path, data: st.DataObject):
    written(place / "store" / "manifest.json", whole["manifest"])
    written(place / "store" / "shard_00000.safetensors", strange(data, whole["shard"]))
    harmless(lambda: read_store(place / "store"), place, *READ)


@inputs(0.03)
@given(st.data())
def test_manifests(whole: dict[str, bytes], place: Path, data: st.DataObject):
    """Of a store that is read, one that is merged into another, and one that is gone on with."""
    said = json.loads(whole["manifest"])
    manifest = data.draw(st.one_of(changed(said), VALUES))
    for name, content in (("store", json.dumps(said)), ("other", json.dumps(manifest))):
        written(place / name / "manifest.json", content.encode())
        written(place / name / "shard_00000.safetensors", whole["shard"])
    harmless(lambda: read_store(place / "other"), place, *READ)
    harmless(lambda: merge_stores(open_store(place / "store"), open_store(place / "other")), place, *READ)
    harmless(lambda: SampleStore(place / "other", said), place, *READ)


@inputs(0.05)
@given(st.data())
def test_sources(whole: dict[str, bytes], place: Path, data: st.DataObject):
    written(place / "sourced" / "manifest.json", whole["manifest"])
    written(place / "sourced" / FILE, strange(data, whole["source"]))
    harmless(lambda: load_source(open_store(place / "sourced")), place, *READ, names=FILE)


@pytest.fixture(scope="module")
def learning(whole: dict[str, bytes], place: Path) -> SampleStore:
    written(place / "learning" / "shard_00000.safetensors", whole["shard"])
    written(place / "learning" / "manifest.json", whole["manifest"])
    return open_store(place / "learning")


@inputs(0.01)
@given(st.data())
def test_states(whole: dict[str, bytes], place: Path, learning: SampleStore, data: st.DataObject):
    """A training goes on from a strange state, begins anew, or says what is wrong with it."""
    written(place / "training" / "expert_0.state.safetensors", strange(data, whole["state"]))
    bank = ExpertBank(base_network(GUIDER), ExpertSchedule((0.1, 1.0)), LoraSpec(2))
    harmless(lambda: distill(GUIDER, bank, learning, CONFIG, place / "training"), place, *READ)


@inputs(0.01)
@given(st.data())
def test_notes_of_other_releases(whole: dict[str, bytes], place: Path, data: st.DataObject):
    note = data.draw(st.one_of(changed(json.loads(whole["note"])), VALUES))
    written(place / "states" / "other" / NOTE, json.dumps(note).encode())
    written(place / "states" / "other" / "expert_0.state.safetensors", strange(data, whole["state"]))
    bank, mine = ExpertBank(base_network(GUIDER), EDGES, LoraSpec(2)), place / "states" / "x"
    harmless(lambda: state_folder(GUIDER, bank, lambda *_: mine), place, *READ)
    for file in mine.iterdir():
        file.unlink()
    mine.rmdir()


# Names

@inputs(0.2)
@given(st.one_of(TEXTS, st.text(alphabet="ab-._/\\:\x00 é", max_size=20), st.tuples(TEXTS, TEXTS).map("/".join)))
def test_names_on_the_hub(place: Path, name: str):
    """A name either names a folder inside the others, or nothing."""
    def inside() -> None:
        folder = place / folder_name(name)
        assert folder.parent == place and folder.resolve().parent == place.resolve() and "\\" not in folder.name
    harmless(inside, place, ValueError)


NAMES = st.one_of(TEXTS, st.sampled_from(["config.json", "model.safetensors", INDEX, "model-00001-of-00002.safetensors",
                                          "pytorch_model.bin", "head.safetensors", "model_index.json", "../x.safetensors",
                                          "a/model.safetensors", "x.safetensors"]))


@inputs(0.15)
@given(st.lists(NAMES, max_size=8))
def test_files_on_the_hub(place: Path, names: list[str]):
    def inside() -> None:
        assert all((place / file).resolve().parent == place.resolve() for file in files_to_fetch("a/b", names))
    harmless(inside, place, ValueError, FileNotFoundError)


@inputs(0.08)
@given(st.one_of(VALUES, st.dictionaries(TEXTS, NAMES, max_size=4).map(lambda files: {"weight_map": files})))
def test_indices_of_weights(whole: dict[str, bytes], place: Path, index: Any):
    folder = place / "indexed"
    written(folder / "model-00001-of-00002.safetensors", whole["head"])
    written(folder / INDEX, json.dumps(index).encode())

    def inside() -> None:
        read_index(folder)
        assert all(file.resolve().parent == folder.resolve() for file in weight_files(folder))
    harmless(inside, place, *READ)


# Folders of guiders

@inputs(0.1)
@given(st.one_of(st.text(max_size=60), st.lists(st.lists(TEXTS, max_size=3), max_size=4).map(
    lambda rows: "\n".join(["tag_id,name", *(",".join(row) for row in rows)]))))
def test_tables_of_tags(place: Path, text: str):
    file = written(place / "tags" / TAGS_FILE, text.encode("utf-8", "surrogatepass"))
    harmless(lambda: [name + "" for name in tag_names(file)], place, ValueError, names=TAGS_FILE)


@inputs(0.1)
@given(st.one_of(VALUES, st.dictionaries(TEXTS, st.integers(-3, 9)), st.dictionaries(st.integers(-3, 9).map(str), VALUES)),
       VALUES, st.integers(1, 6))
def test_names_of_classes(place: Path, names: Any, descriptions: Any, count: int):
    def labelled() -> None:
        labels = class_labels("x", count, names, descriptions)
        assert len(labels) == count == len(set(labels)) and all(isinstance(label, str) for label in labels)
    harmless(labelled, place)


def saved_by_timm(folder: Path) -> None:
    import timm

    settings = {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 2}
    net = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=5, **settings)
    timm.models._hub.save_for_hf(net, folder, model_config={"label_names": list("abcde")}, model_args=settings,
                                 safe_serialization=True)


def saved_by_transformers(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    ViTForImageClassification(ViTConfig(image_size=32, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                                        intermediate_size=16, num_labels=5)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


LIBRARIES = {"timm": saved_by_timm, "transformers": saved_by_transformers}


@pytest.fixture(scope="module", params=LIBRARIES)
def folder(request: pytest.FixtureRequest, place: Path) -> Path:
    pytest.importorskip(request.param)
    LIBRARIES[request.param](folder := place / request.param)
    return folder


@inputs(0.003)
@given(st.data())
def test_folders_of_networks(place: Path, folder: Path, data: st.DataObject):
    """config.json says other things than the weights."""
    config = folder / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps(data.draw(changed(json.loads(whole)))))
    try:
        harmless(lambda: load_guider(folder), place, *READ, ImportError)
    finally:
        config.write_text(whole)


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    backbone = small_guider("embedding")
    save_trained(folder := place / "taste", train_guider(backbone, {"a": images(2), "b": images(2, 1)}, copies=0), backbone)
    return folder


@inputs(0.05)
@given(st.data())
def test_folders_of_trained_guiders(place: Path, trained: Path, data: st.DataObject):
    """Their description or their head says something else."""
    file = trained / data.draw(st.sampled_from(["config.json", "head.safetensors"]))
    whole, backbone = file.read_bytes(), small_guider("embedding")
    config = st.one_of(changed(json.loads((trained / "config.json").read_text())), VALUES).map(json.dumps).map(str.encode)
    file.write_bytes(data.draw(config) if file.suffix == ".json" else strange(data, whole))
    try:
        harmless(lambda: load_guider(trained, find_backbone=lambda *_: backbone), place, *READ)
    finally:
        file.write_bytes(whole)


PROCESSOR = {"do_resize": True, "size": {"height": 16, "width": 20}, "do_center_crop": True, "crop_size": 14, "resample": 3,
             "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
             "image_std": [0.2, 0.2, 0.2], "do_pad": False, "size_divisor": 8, "crop_pct": 0.9, "keep_aspect_ratio": False,
             "ensure_multiple_of": 4, "image_processor_type": "Unknown"}
OTHER_SIZES = st.sampled_from([{"shortest_edge": 16}, {"shortest_edge": 16, "longest_edge": 40}, 16, [16, 20], None, {}])


def sees(config: dict, place: Path) -> None:
    """What a guider would do with an image."""
    assert processor_preprocess(config)(torch.zeros(1, 3, 9, 12)).isfinite().all()


@inputs(0.002)
@given(OTHER_SIZES.flatmap(lambda size: changed(PROCESSOR | {"size": size, "image_processor_type": "ViTImageProcessor"})))
def test_image_processors_of_the_library(place: Path, config: dict):
    pytest.importorskip("transformers")
    harmless(lambda: sees(config, place), place, ValueError)


@inputs(0.12)
@given(OTHER_SIZES.flatmap(lambda size: changed(PROCESSOR | {"size": size})))
def test_image_processors_that_nobody_knows(place: Path, config: dict):
    harmless(lambda: sees(config, place), place, ValueError)


def test_a_key_that_no_text_can_hold_is_told(tmp_path: Path):
    """Half of a surrogate pair, as JSON may have it."""
    (tmp_path / "config.json").write_text('{"\\\\ud800": null}')
    assert not harmless(lambda: load_guider(tmp_path), tmp_path, ValueError, names="has the keys")
