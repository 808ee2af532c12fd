"""Steer: one choice in place of a chain of nodes."""
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import says
from helpers.dynamic import CHOICE, expanded, towards
from helpers.guider_families import FAMILIES
from helpers.worlds import PixelWorld

NUMBERS = {"brightness": 0.8, "contrast": 0.3, "saturation": 0.0, "sharpness": 0.15}
WEIGHTS = {"soft": 0.3, "medium": 0.7, "strong": 1.0}
NEW_TERM = {"start_percent": 0.0, "end_percent": 1.0, "factor_at_start": 2.0, "factor_at_end": 0.0, "view": "own"}
COPIES = {"colours for a grey image": "grey copy", "detail for a small image": "small copy"}
PALETTE = "#1d3557:5, #ffd166"


@pytest.fixture(scope="module")
def world(comfy) -> PixelWorld:
    return PixelWorld(comfy, batch=2)


@pytest.fixture(scope="module")
def image(world: PixelWorld) -> torch.Tensor:
    return world.seen()


@pytest.fixture(scope="module")
def steer(comfy) -> Any:
    return comfy.pack.nodes.bridge.steer


def rule(comfy, name: str) -> Any:
    return comfy("PPAPRule", rule=name)[0]


def network(comfy, name: str) -> Any:
    return comfy("PPAPLoadGuider", guider_name=name)[0]


def like(comfy, guider: Any, image: torch.Tensor) -> Any:
    return comfy("PPAPAimAtImage", guider=guider, image=image, image_is="a picture")[0]


def chain(comfy, name: str, image: torch.Tensor) -> tuple[dict, Any]:
    """The inputs that a choice asks for, and the guider that the longer road makes of them."""
    if name in NUMBERS:
        return {name: NUMBERS[name]}, comfy("PPAPAimAtNumber", guider=rule(comfy, name), number=NUMBERS[name])[0]
    if name.endswith("of an image") and not name.startswith("depth"):
        return {"image": image}, like(comfy, rule(comfy, name.split()[0]), image)
    if name in COPIES:
        return {"image": image}, like(comfy, rule(comfy, COPIES[name]), image)
    if name == "colours of a palette":
        return {"palette": PALETTE}, like(comfy, rule(comfy, "colours"), comfy("PPAPPalette", colours=PALETTE)[0])
    if name == "symmetry":
        return {"axis": "half turn"}, rule(comfy, "symmetry half turn")
    if name == "a class":
        guider = network(comfy, "tinyworld/class")
        return ({"classifier": "tinyworld/class", "classes": "star, ring"},
                comfy("PPAPAimAtClass", guider=guider, classes="star, ring")[0])
    if name == "depth or regions of an image":
        return {"map_network": "tinyworld/depth", "image": image}, like(comfy, network(comfy, "tinyworld/depth"), image)
    return {}, comfy("PPAPVariety")[0] if name == "unlike each other" else rule(comfy, name)


def steered(comfy, model: Any, name: str, values: dict, **changes: Any) -> Any:
    settings = {"strength": "medium", "factor": 1.0, **changes}
    return comfy("PPAPSteer", model=model, **settings, **towards(name, **values))[0]


CHOICES = ("colours of a palette", "colours of an image", "layout of an image", "edges of an image", *NUMBERS, "symmetry",
           "seamless tiling", "smoothness", "a class", "depth or regions of an image", "unlike each other", *COPIES)


def test_the_choices_are_those_that_are_tested(steer: Any):
    assert [*steer.CHOICES] == [*CHOICES[:-4], "a text", *CHOICES[-4:]]
    assert steer.STRENGTHS == WEIGHTS


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_the_chain_of_nodes_bit_for_bit(comfy, world: PixelWorld, image: torch.Tensor, name: str):
    values, guider = chain(comfy, name, image)
    found = world.sample(steered(comfy, world.model, name, values, strength="strong"), steps=3)
    weight = 0.3 if name == "unlike each other" else 1.0
    wanted = world.guided(world.term(guider, weight=weight, strength="balanced", **NEW_TERM), steps=3)
    assert torch.equal(found, wanted) and not torch.equal(found, world.sample(steps=3))


@pytest.mark.parametrize("strength", WEIGHTS)
def test_the_strengths_are_weights(steer: Any, strength: str):
    term, apart = (steer.term_of(name, {}, strength, 0.5, None) for name in ("smoothness", "unlike each other"))
    assert term.weight == 0.5 * WEIGHTS[strength] and term.mask is None and apart.weight == 0.3 * term.weight


def test_a_factor_of_0_leaves_the_image_bit_for_bit(comfy, world: PixelWorld):
    model = steered(comfy, world.model, "a class", {"classifier": "tinyworld/class", "classes": "star"}, factor=0.0)
    assert torch.equal(world.sample(model), world.sample())


def test_two_in_a_row_steer_together(comfy, world: PixelWorld):
    """Each guider is content with both, and neither with the other's work alone."""
    choices = {"brightness": {"brightness": 0.8}, "symmetry": {"axis": "left-right"}}
    bright, mirrored = (steered(comfy, world.model, name, values) for name, values in choices.items())
    both = world.sample(steered(comfy, bright, "symmetry", choices["symmetry"]))
    for name, alone in (("brightness", mirrored), ("symmetry", bright)):
        values = {"brightness": 0.8} if name == "brightness" else {"axis": "left-right"}
        guider = comfy.pack.nodes.bridge.steer.guider_of(name, values)
        assert world.energy(guider, both).mean() < world.energy(guider, world.sample(alone)).mean() / 2, name


def test_a_mask_says_where(comfy, world: PixelWorld):
    half = torch.zeros(1, 32, 32)
    half[..., :16] = 1
    model = steered(comfy, world.model, "brightness", {"brightness": 1.0}, mask=half)
    change = (world.sample(model, steps=1) - world.sample(steps=1)).abs()
    assert change[..., :16].min() > 0 and change[..., 16:].max() == 0


def test_a_text_is_seen_by_a_network_for_texts(comfy, world: PixelWorld):
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("ppap_guiders")[0]) / "some clip"
    folder.mkdir(parents=True)
    try:
        FAMILIES["CLIP"].write(folder)
        values = {"text_network": "some clip", "text": "a red ring"}
        found = world.sample(steered(comfy, world.model, "a text", values), steps=2)
        guider = comfy("PPAPAimAtText", guider=network(comfy, "some clip"), text="a red ring")[0]
        wanted = world.guided(world.term(guider, weight=0.7, strength="balanced", **NEW_TERM), steps=2)
        assert torch.equal(found, wanted) and not torch.equal(found, world.sample(steps=2))
        stamp = comfy.pack.nodes.bridge.steer.network_stamp
        assert stamp(**split(towards("a text", **values))) and not stamp(**split(towards("smoothness")))
    finally:
        shutil.rmtree(folder)


def split(inputs: dict) -> dict:
    return {"towards": inputs["towards"], "others": {name: value for name, value in inputs.items() if name != "towards"}}


@pytest.mark.parametrize("name, values, words", [
    ("layout of an image", {"image": None}, ["'layout of an image' was chosen", "no image is connected", "Load Image"]),
    ("depth or regions of an image", {"map_network": "tinyworld/depth", "image": None}, ["no image is connected"]),
    ("a text", {"text_network": "tinyworld/class", "text": "a ring"}, ["knows no texts", "CLIP"]),
    ("a class", {"classifier": "tinyworld/depth", "classes": "star"}, ["cannot be aimed at a class"]),
    ("colours of a palette", {"palette": "blue"}, ["'blue'", "six hexadecimal digits"]),
    ("a wish", {}, ["no choice 'a wish'", "seamless tiling"]),
], ids=["no image", "no image for a network", "no network for texts", "no classifier", "no colour", "no such choice"])
def test_what_is_missing_is_said_in_one_sentence(comfy, world: PixelWorld, name: str, values: dict, words: list[str]):
    with says(ValueError, *words):
        steered(comfy, world.model, name, values)


def test_the_inputs_follow_the_choice(comfy, steer: Any):
    """Where a ComfyUI can do that; elsewhere all are shown. Each says for which choice it is, and its neutral value."""
    info = comfy.registered["PPAPSteer"].GET_NODE_INFO_V1()
    specs = {name: (spec, optional) for name, spec, optional in expanded(info["input"], info["input_order"])}
    kind, *more = info["input"]["required"]["towards"]
    if kind == CHOICE:
        asked = {option["key"]: {name for part in option["inputs"].values() for name in part}
                 for option in more[0]["options"]}
        assert asked == {name: set(choice.inputs) for name, choice in steer.CHOICES.items()}
    for name, ((kind, settings), optional) in specs.items():
        assert settings["tooltip"] and (kind != "FLOAT" or "Neutral" in settings["tooltip"]), name
        assert optional == (name not in ("model", "strength", "factor", "towards"))
    assert {name for name in specs if "." in name} == {f"towards.{slot}" for choice in steer.CHOICES.values()
                                                      for slot in choice.inputs}


def test_the_palette_comes_first_in_files(comfy):
    """A file keeps widgets by their order: one that chose the palette is read alike by every version."""
    info = comfy.registered["PPAPSteer"].GET_NODE_INFO_V1()
    names = [name for name, _, _ in expanded(info["input"], info["input_order"])]
    assert names[:4] == ["model", "strength", "factor", "towards"] and names[6] == "towards.palette"
