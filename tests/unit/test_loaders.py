"""Guiders from folders, as timm itself writes them: nothing is downloaded, and what does not fit is told in words."""
import json

import pytest
import torch
from helpers import B, fixed_weights, images, level, says
from safetensors.torch import load_file, save_file

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.guiders.guider import clean
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.targets import class_target
from ppap_core.io.hashing import fingerprint_network
from ppap_core.schedules import ExpertSchedule

timm = pytest.importorskip("timm")

ARCHITECTURES = {  # name: (settings, size of the input)
    "resnet10t": ({}, (176, 176)),
    "vit_tiny_patch16_224": ({"img_size": 48}, (48, 48)),
    "convnext_atto": ({}, (224, 224)),
}
LABELS = ["tench", "red fox", "tabby cat", "tiger cat", "goldfish"]


def write_folder(folder, architecture: str = "resnet10t", **config) -> torch.nn.Module:
    """A folder as timm's own `save_for_hf` writes it for a network of five classes."""
    settings, _ = ARCHITECTURES[architecture]
    net = fixed_weights(timm.create_model(architecture, pretrained=False, num_classes=5, **settings))
    timm.models._hub.save_for_hf(net, folder, model_config={"label_names": LABELS} | config, model_args=settings or None,
                            safe_serialization=True)
    return net.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_timm_network_is_loaded_whole(tmp_path, architecture):
    """A network that timm saved is loaded with its weights, preprocessing and classes."""
    net = write_folder(tmp_path / "my net", architecture)
    guider = load_guider(tmp_path / "my net")
    data = timm.data.resolve_data_config({}, model=net)
    assert guider.name == "timm/my net" and guider.task == "class" and guider.labels == tuple(LABELS)
    assert fingerprint_network(base_network(guider)) == fingerprint_network(net)
    assert guider.preprocess.crop == ARCHITECTURES[architecture][1]
    assert tuple(guider.preprocess.mean) == tuple(data["mean"]) and tuple(guider.preprocess.std) == tuple(data["std"])
    assert guider.preprocess.interpolation == data["interpolation"] == "bicubic"
    assert not any(parameter.requires_grad for parameter in guider.net.parameters()) and not guider.net.net.training


def test_a_loaded_network_answers_as_the_saved_one(tmp_path):
    """Images prepared by timm give the saved network's output."""
    net = write_folder(tmp_path / "net", "vit_tiny_patch16_224")
    guider = load_guider(tmp_path / "net")
    image = images()
    said = json.loads((tmp_path / "net" / "config.json").read_text())["pretrained_cfg"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(said) | {"input_size": (3, 48, 48)})
    prepared = torch.stack([transform((each + 1) / 2) for each in image])
    with torch.no_grad():
        torch.testing.assert_close(guider.predict(image, clean(image)), net(prepared), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_experts_of_a_loaded_network_start_as_it(tmp_path, architecture):
    """Experts start as the loaded network and leave grouped convolutions alone."""
    write_folder(tmp_path / "net", architecture)
    guider = load_guider(tmp_path / "net")
    net = base_network(guider)
    bank = ExpertBank(net, ExpertSchedule((0.1, 1.0, 10.0)), LoraSpec(rank=1))
    grouped = {name for name, module in net.named_modules() if getattr(module, "groups", 1) > 1}
    assert bool(grouped) is (architecture == "convnext_atto")
    assert bank.lora.targets and not grouped & set(bank.lora.targets)
    assert net.default_cfg["classifier"] not in bank.lora.targets
    image = images(1)
    with torch.no_grad():
        assert torch.equal(with_experts(guider, bank).predict(image, level(3.0, image)), guider.predict(image, clean(image)))


def test_a_gradient_reaches_the_image_through_a_loaded_network(tmp_path):
    write_folder(tmp_path / "net")
    guider = load_guider(tmp_path / "net")
    image = images().requires_grad_()
    energy = guider.aim(class_target(guider, "tiger cat")).energy(image, clean(image))
    energy.sum().backward()
    assert energy.shape == (B,) and image.grad.abs().flatten(1).amax(1).min() > 0


def test_a_network_of_imagenet_knows_its_classes_by_name(tmp_path):
    net = timm.create_model("resnet10t", pretrained=False)
    timm.models._hub.save_for_hf(net, tmp_path / "net", safe_serialization=True)
    guider = load_guider(tmp_path / "net")
    assert len(guider.labels) == 1000
    assert class_target(guider, "goldfish").tolist() == [1]
    with says(ValueError, "'goldfsh'", "goldfish"):
        class_target(guider, "goldfsh")


def test_every_imagenet_class_can_be_chosen_by_name(tmp_path):
    """Names that two classes share, or that hold a comma, must not hide a class."""
    net = timm.create_model("resnet10t", pretrained=False)
    timm.models._hub.save_for_hf(net, tmp_path / "net", safe_serialization=True)
    guider = load_guider(tmp_path / "net")
    for index, label in enumerate(guider.labels):
        assert class_target(guider, label).tolist() == [index], label


def spoil(folder, how: str):
    config, weights = folder / "config.json", folder / "model.safetensors"
    if how == "no config":
        config.unlink()
    elif how == "config is no JSON":
        config.write_text("{")
    elif how == "config is binary":
        config.write_bytes(b"\xff\x00\xfe")
    elif how == "config of another library":
        config.write_text(json.dumps({"model_type": "resnet", "hidden_sizes": [8]}))
    elif how == "unknown architecture":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"architecture": "resnet_of_tomorrow"}))
    elif how.startswith("model_args"):
        torch.save({"a": torch.zeros(3)}, folder / "vocab.txt")
        name = how.split()[-1]
        value = str(folder / "vocab.txt") if name == "checkpoint_path" else True
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_args": {name: value}}))
    elif how == "weight index without files":
        (folder / "model.safetensors.index.json").write_text("{}")
    elif how == "weight index of numbers":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "pickle in place of weights":
        torch.save({"a": torch.zeros(3)}, weights)
    elif how == "missing weights":
        tensors = load_file(weights)
        del tensors["fc.weight"]
        save_file(tensors, weights)
    elif how == "unexpected weights":
        save_file(load_file(weights) | {"another.weight": torch.zeros(2)}, weights)
    elif how == "weights for other classes":
        save_file(load_file(weights) | {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}, weights)


@pytest.mark.parametrize("how, kind, words", [
    ("no config", (ValueError, FileNotFoundError), ["config.json"]),
    ("config is no JSON", ValueError, ["config.json", "JSON"]),
    ("config is binary", ValueError, ["config.json", "JSON"]),
    ("config of another library", ValueError, ["model_type", "architecture", "timm"]),
    ("unknown architecture", ValueError, ["resnet_of_tomorrow", "timm"]),
    ("model_args that load a pickle: checkpoint_path", ValueError, ["model_args", "checkpoint_path"]),
    ("model_args that download: pretrained", ValueError, ["model_args", "pretrained"]),
    ("weight index without files", ValueError, ["model.safetensors.index.json"]),
    ("weight index of numbers", ValueError, ["model.safetensors.index.json"]),
    ("no weights", FileNotFoundError, ["model.safetensors"]),
    ("truncated weights", ValueError, ["model.safetensors", "cannot be read"]),
    ("pickle in place of weights", ValueError, ["model.safetensors", "cannot be read"]),
    ("missing weights", ValueError, ["net/model.safetensors", "1 weights are missing", "fc.weight"]),
    ("unexpected weights", ValueError, ["net/model.safetensors", "1 unexpected", "another.weight"]),
    ("weights for other classes", ValueError, ["net/model.safetensors", "fc.weight"]),
])
def test_a_folder_that_is_not_a_whole_guider_is_refused(tmp_path, how, kind, words):
    write_folder(tmp_path / "net")
    spoil(tmp_path / "net", how)
    with says(kind, *words):
        load_guider(tmp_path / "net")


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with says((ValueError, FileNotFoundError), "nowhere"):
        load_guider(tmp_path / "nowhere")
