"""A guider trained on a few pictures in a real ComfyUI: it guides, is saved for Load Guider, and says how good it is."""
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import says
from helpers.worlds import PixelWorld
from torch import Tensor

from ppap_core.tinyworld.scenes import CLASSES, draw


def pictures(shape: str, count: int = 5) -> Tensor:
    """IMAGEs of a shape."""
    return (draw(range(count), label=CLASSES.index(shape)).image.movedim(1, -1) + 1) / 2


def eyes(world: PixelWorld, name: str = "tinyworld/class") -> Any:
    return world.comfy("PPAPLoadGuider", guider_name=name, answer="embedding")[0]


def train(world: PixelWorld, backbone: Any = None, **changes: Any) -> tuple:
    """Guider, report and IMAGE of what it got wrong."""
    settings = {"like": pictures("star"), "unlike": pictures("disk"), "names": "star, disk", "name": "", "copies": 1}
    return world.comfy("PPAPTrainGuider", backbone=backbone or eyes(world), **settings | changes)


def folder_of(world: PixelWorld, name: str) -> Path:
    return world.comfy.pack.nodes.bridge.paths.new_guider_folder(name)


def test_it_guides_as_any_classifier(pixels: PixelWorld):
    guider, report, wrong = train(pixels)
    assert "star 5 of 5, disk 5 of 5" in report and wrong.shape[0] == 1 and wrong.shape[-1] == 3
    [aimed] = pixels.comfy("PPAPAimAtClass", guider=guider, classes="star")
    plain = pixels.sample()
    made = pixels.guided(pixels.term(aimed, weight=0.7, strength="balanced"))
    assert pixels.energy(aimed, made).mean() < pixels.energy(aimed, plain).mean() - 0.2
    assert torch.equal(pixels.guided(pixels.term(aimed, weight=0.0)), plain)
    assert pixels.comfy("PPAPLookThrough", guider=guider, image=pictures("star"))[0].shape[0] == 5


def test_experts_are_distilled_for_it(pixels: PixelWorld):
    [aimed] = pixels.comfy("PPAPAimAtClass", guider=train(pixels)[0], classes="star")
    assert pixels.guided(pixels.term(pixels.experts(guider=aimed))).isfinite().all()


def test_it_is_saved_for_load_guider(pixels: PixelWorld):
    guider, report, _ = train(pixels, name="my stars")
    assert "Saved as my stars" in report
    assert "my stars" in pixels.comfy.pack.nodes.bridge.guider_cache.guider_sources()
    [loaded] = pixels.comfy("PPAPLoadGuider", guider_name="my stars")
    seen = [pixels.comfy("PPAPLookThrough", guider=each, image=pictures("disk"))[0] for each in (guider, loaded)]
    assert torch.equal(*seen)
    assert "is this very guider" in train(pixels, name="my stars")[1]
    assert "in place of" in train(pixels, name="my stars", copies=0, like=pictures("ring"))[1]
    with says(ValueError, "'own'"):
        pixels.comfy("PPAPLoadGuider", guider_name="my stars", answer="embedding")


def test_a_folder_of_something_else_is_kept(pixels: PixelWorld):
    network = folder_of(pixels, "a network")
    network.mkdir(parents=True)
    (network / "config.json").write_text('{"architecture": "resnet18"}')
    kind = pixels.comfy.registered["PPAPTrainGuider"]
    assert "would be lost" in kind.validate_inputs(name="a network", names="a, b")
    assert kind.validate_inputs(name="", names="a, b") is kind.validate_inputs(name=None, names=None) is True
    with says(ValueError, "a network", "would be lost"):
        train(pixels, name="a network")


def test_a_guider_that_names_a_trained_one_is_refused(pixels: PixelWorld):
    """Two folders that name each other would be loaded for ever."""
    train(pixels, name="first")
    file = folder_of(pixels, "first") / "config.json"
    file.write_text(file.read_text().replace("tinyworld/guider_class", "timm/first"))
    with says(ValueError, "first was trained on", "trained itself"):
        pixels.comfy("PPAPLoadGuider", guider_name="first")


def test_up_to_eight_classes(pixels: PixelWorld):
    further = {f"class_{number}": pictures(shape, 2) for number, shape in enumerate(CLASSES[2:], 3)}
    guider, report, _ = train(pixels, like=pictures("disk", 2), unlike=pictures("square", 2), **further, copies=0,
                              names=", ".join(CLASSES[:7]))
    assert guider.labels == (*CLASSES[:7], "class 8") and "guessing reaches 12%" in report


@pytest.mark.parametrize(("changes", "words"), [
    ({"names": "a, b, c"}, "images of 2 are connected"), ({"names": "a, A"}, "a different one"),
    ({"like": pictures("star", 1)}, "1 picture of 'star'"),
    ({"unlike": pictures("disk") * torch.nan}, "disk: the image has"),
    ({"name": "a/b"}, "cannot name a file")], ids=["names", "alike", "one", "nan", "folder"])
def test_what_it_refuses(pixels: PixelWorld, changes: dict, words: str):
    with says(ValueError, words):
        train(pixels, **changes)


def test_only_plain_networks_are_backbones(pixels: PixelWorld):
    [rule] = pixels.comfy("PPAPRule", rule="brightness")
    for words, guider in (("no plain network", rule), ("no plain network", pixels.experts()),
                          ("as its embedding", pixels.comfy("PPAPLoadGuider", guider_name="tinyworld/depth")[0])):
        with says(ValueError, words):
            train(pixels, guider)


def test_it_can_be_cancelled(pixels: PixelWorld):
    import comfy.model_management as management

    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        train(pixels, name="cancelled")
    assert not folder_of(pixels, "cancelled").exists()
