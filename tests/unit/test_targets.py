"""Texts, classes, images and masks become targets, or a sentence says what is wrong with them."""
from dataclasses import replace

import pytest
import torch
from helpers import H, W, images, randn, says, small_guider
from torch.nn import functional as F

from ppap_core.guiders.guider import clean, short_labels
from ppap_core.guiders.preprocess import Preprocess
from ppap_core.guiders.rules import rule_guider
from ppap_core.guiders.targets import (
    aim_at_text,
    class_target,
    image_target,
    label_index,
    map_target,
    mask_target,
    number_target,
)
from ppap_core.guiders.tasks import IGNORE, TASKS
from ppap_core.viz.colors import label_picture, palette

OTHERS = sorted(name for name, task in TASKS.items() if not task.names_classes)
DRAWN, MASKED = ([name for name, task in TASKS.items() if aims(task)] for aims in (
    lambda task: task.from_map, lambda task: task.from_mask))


def cropped(task: str):
    """A guider that sees only the middle of an image."""
    return replace(small_guider(task), preprocess=Preprocess((12, 10**6), fit="shortest", crop=(12, 12)))


# Classes

@pytest.mark.parametrize("words, numbers", [
    ("tabby", [2]), ("Red Fox", [0]), ("  goldfish ", [4]), ("3", [3]), ("0", [0]),
    ("tabby, 3,red fox", [2, 3, 0]), ("tiger,tiger", [3, 3]), ("tabby,,", [2]), ("tabby:1", [2]), ("3 : 1.0", [3]),
])
def test_a_class_is_chosen_by_name_or_number(words, numbers):
    target = class_target(small_guider(), words)
    assert target.tolist() == numbers and target.dtype == torch.long


@pytest.mark.parametrize("words, weights", [
    ("tabby + tiger:0.5", [[0, 0, 1, 0.5, 0]]),
    ("Red Fox+4:-1", [[1, 0, 0, 0, -1]]),
    ("tabby:0.5", [[0, 0, 0.5, 0, 0]]),
    ("tabby:-1", [[0, 0, -1, 0, 0]]),
    ("tabby + 2", [[0, 0, 2, 0, 0]]),
    ("tabby + tiger, goldfish", [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]),
    ("tabby:1e-1 + tiger : 2", [[0, 0, 0.1, 2, 0]]),
])
def test_several_classes_are_weighed(words, weights):
    target = class_target(small_guider(), words)
    assert target.dtype == torch.float32
    torch.testing.assert_close(target, torch.tensor(weights, dtype=torch.float32))


@pytest.mark.parametrize("name", ["black+white", "scale 1:10", "a+b:2", "+"])
def test_a_name_that_holds_a_plus_or_a_colon_itself_is_found(name):
    guider = replace(small_guider(), labels=("fox", name, "cat"))
    assert class_target(guider, f"fox, {name.upper()}").tolist() == [0, 1]


@pytest.mark.parametrize("words, hints", [
    ("fox", ["'fox'", "red fox"]),
    ("goldfsh", ["'goldfsh'", "goldfish"]),
    ("tigre", ["tiger"]),
    ("zzz", ["'zzz'", "red fox", "grey fox", "tabby"]),
    ("5", ["'5'", "below 5"]),
    ("-1", ["'-1'", "below 5"]),
    ("1.5", ["'1.5'"]),
    ("²", ["'²'", "below 5"]),
    ("tabby, dragon", ["'dragon'"]),
    ("tabby + dragon:0.5", ["'dragon'"]),
    ("", ["no class"]),
    (" , ,", ["no class"]),
    ("tabby:", ["''", "weight", "star:0.5"]),
    ("tabby:much", ["'much'", "weight", "star:0.5"]),
    ("tabby:nan", ["'nan'", "weight"]),
    ("tabby:inf", ["'inf'", "weight"]),
    ("tabby +", ["''", "red fox"]),
    (":2", ["''", "red fox"]),
])
def test_an_unknown_class_or_weight_is_refused(words, hints):
    with says(ValueError, *hints):
        class_target(small_guider(), words)


@pytest.mark.parametrize("task", OTHERS)
def test_a_class_for_a_guider_without_classes_is_refused(task):
    with says(ValueError, f"small/{task}", "a class", "another kind of target"):
        class_target(small_guider(task), "tabby")


@pytest.mark.parametrize("words, target", [
    ("solo", [1]), ("long hair", [2]), ("LONG_HAIR", [2]), (":d", [3]), ("+_+", [4]), ("1girl, solo", [0, 1]), ("1", [1]),
    ("+_+ + solo:0.5", [[0, 0.5, 0, 0, 1]]), ("solo + +_+:-1", [[0, 1, 0, 0, -1]]),
    ("solo + long hair:0.5", [[0, 1, 0.5, 0, 0]]), ("solo + :d", [[0, 1, 0, 1, 0]]), (":d:-1 + 1girl", [[1, 0, 0, -1, 0]]),
])
def test_tags_are_chosen_by_name_with_or_without_underscores(words, target):
    assert class_target(small_guider("tags"), words).tolist() == target


@pytest.mark.parametrize("words, hints", [("long", ["'long'", "long_hair"]), ("sola", ["'sola'", "solo"])])
def test_an_unknown_tag_is_refused_with_similar_ones(words, hints):
    with says(ValueError, *hints):
        class_target(small_guider("tags"), words)


def test_tags_that_are_aimed_at_leave_all_others_alone():
    """The gradient is that of the tag alone, whatever the others are."""
    guider, image = small_guider("tags"), images().requires_grad_()
    [gradient] = torch.autograd.grad(guider.aim(class_target(guider, "solo")).energy(image, clean(image)).sum(), image)
    [own] = torch.autograd.grad(-F.logsigmoid(guider.predict(image, clean(image))[:, 1]).sum(), image)
    torch.testing.assert_close(gradient, own)


def test_the_message_asks_for_numbers_where_there_are_no_names():
    with says(ValueError, "'goldfish'", "a number below 3", "no other names"):
        class_target(replace(small_guider(), labels=("0", "1", "2")), "goldfish")


@pytest.mark.parametrize("name", ["Straße", "STRASSE", "cafe\u0301", "caf\u00e9", "\u732b"])
def test_names_in_any_script_are_found(name):
    labels = short_labels(["Stra\u00dfe", "Caf\u00e9", "\u732b"])
    index = label_index(replace(small_guider(), labels=labels), name)
    assert index == (0 if "s" in name.lower() else 1 if "c" in name else 2)


@pytest.mark.parametrize("names", [
    ["cat", "cat", "Cat"], ["a", "a 2", "a"], ["", "", "cat"], [",", "cat, feline", "cat"], ["a 1", "a", "a", "a 2", "a"],
    ["1", "0", "1"], ["Stra\u00dfe", "STRASSE"], ["+", ":", "a+b"],
])
def test_every_class_is_reached_by_its_own_label(names):
    """Whatever the names are: the same twice, empty, commas only, or those that a number would be given."""
    guider = replace(small_guider(), labels=short_labels(names))
    assert [class_target(guider, label).tolist() for label in guider.labels] == [[index] for index in range(len(names))]


def test_a_class_is_found_by_its_name_in_any_case():
    assert [label_index(small_guider(), name) for name in ("RED FOX", "grey fox", "4")] == [0, 1, 4]


# Texts

def knows_texts(task: str):
    return replace(small_guider(task), read_text=lambda text: torch.full((1, 6), float(len(text))) * torch.arange(1, 7))


def test_each_line_of_a_text_is_the_target_of_one_image():
    aimed = aim_at_text(knows_texts("embedding"), " a fox \n\n a goldfish\n")
    assert torch.equal(aimed.target, torch.tensor([[5.0], [10.0]]) * torch.arange(1, 7)) and aimed.prompt is None
    assert aim_at_text(knows_texts("embedding"), "a fox").target.shape == (1, 6)


def test_a_mask_guider_takes_a_text_and_keeps_its_target():
    guider = knows_texts("mask")
    aimed = aim_at_text(guider, "a fox")
    assert torch.equal(aimed.prompt, 5.0 * torch.arange(1, 7)[None]) and aimed.target is guider.target


@pytest.mark.parametrize("text", ["", "  \n \n"])
def test_no_text_is_refused(text):
    with says(ValueError, "no text", "expected"):
        aim_at_text(knows_texts("embedding"), text)


@pytest.mark.parametrize("task", ["class", "depth", "embedding", "mask"])
def test_a_text_for_a_guider_that_knows_none_is_refused(task):
    with says(ValueError, f"small/{task}", "texts", "CLIP"):
        aim_at_text(small_guider(task), "a fox")


# Pictures

@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.has_prompt])
def test_a_picture_is_met_best_by_itself(task):
    guider, picture = small_guider(task), images()
    own, others = (guider.aim(image_target(guider, each)).energy(picture, clean(picture))
                   for each in (picture, picture.flip(0)))
    assert bool((own <= others + 1e-4).all())


def test_a_mask_guider_needs_a_text_first():
    """A text comes before a picture or a mask."""
    for aim in (lambda guider: image_target(guider, images()), lambda guider: mask_target(guider, torch.ones(1, H, W), "")):
        with says(ValueError, "small/mask", "not asked yet", "aim it at a text"):
            aim(replace(small_guider("mask"), read_text=lambda text: randn(1, 4)))


def test_what_an_asked_mask_guider_reads_in_a_picture_is_a_mask():
    net = small_guider("mask").net
    guider = replace(small_guider("mask"), prompt=randn(1, 6), net=lambda image, sigma, prompt: net(image, sigma))
    target = image_target(guider, images())
    assert target.shape == (3, 1, 6, 8) and bool(((target > 0) & (target < 1)).all())


# Drawn maps

def test_a_drawn_depth_is_its_grey():
    picture = images()
    torch.testing.assert_close(map_target(small_guider("depth"), picture),
                               F.interpolate(picture.mean(1, keepdim=True), (12, 16), mode="bilinear", antialias=True))


def test_a_drawn_mask_is_its_grey_from_0_to_1():
    picture = 1.2 * images()
    expected = F.interpolate((picture.mean(1, keepdim=True) + 1) / 2, (12, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(map_target(small_guider("mask"), picture), expected.clamp(0, 1))


@pytest.mark.parametrize("task", ["depth", "mask"])
def test_maps_are_drawn_in_the_frame_of_the_whole_image(task):
    """A network that sees only the middle of an image gets only the middle of the map."""
    picture = images()
    target = map_target(cropped(task), picture)
    assert target.shape == (3, 1, 12, 12)
    torch.testing.assert_close(target, map_target(cropped(task), picture.mean(1, keepdim=True).expand(-1, 3, -1, -1)))
    whole = map_target(replace(cropped(task), preprocess=Preprocess((12, 16))), picture)
    torch.testing.assert_close(target, whole[..., 2:14])


def test_a_drawn_segmentation_is_read_by_its_colours():
    labels = randn(3, 12, 16).gt(0).long()
    assert torch.equal(map_target(small_guider("segmentation"), label_picture(labels)), labels)
    large = label_picture(labels.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2))
    target = map_target(small_guider("segmentation"), large)
    assert torch.equal(target, labels) and target.dtype == torch.long


@pytest.mark.parametrize("task", sorted(set(TASKS) - set(DRAWN)))
def test_a_map_for_a_guider_that_reads_none_is_refused(task):
    with says(ValueError, f"small/{task}", task, "a drawn map", " or ".join(DRAWN)):
        map_target(small_guider(task), images(1))


# Masks

def test_a_class_is_wanted_inside_a_mask_and_anything_outside():
    mask = torch.zeros(3, H, W)
    mask[:, 4:12, 7:20] = 1
    target = mask_target(small_guider("segmentation"), mask, " Thing ")
    assert target.shape == (3, 12, 16) and target.dtype == torch.long and set(target.unique().tolist()) == {IGNORE, 1}
    expected = F.interpolate(mask[:, None], (12, 16), mode="nearest-exact")[:, 0] > 0.5
    assert torch.equal(target == 1, expected)
    assert mask_target(small_guider("segmentation"), mask, "0").max() == 0


def test_a_mask_guider_takes_the_mask_itself():
    guider, mask = replace(small_guider("mask"), prompt=randn(1, 6)), torch.rand(2, H, W)
    target = mask_target(guider, mask, "not used")
    torch.testing.assert_close(target, F.interpolate(mask[:, None], (12, 16), mode="bilinear", antialias=True))


def test_a_mask_is_cropped_as_the_image_is():
    mask = torch.zeros(1, H, W)
    mask[:, :, :14] = 1  # the left half
    target = mask_target(cropped("segmentation"), mask, "wall")
    assert target.shape == (1, 12, 12) and bool((target[..., :6] == 0).all()) and bool((target[..., 7:] == IGNORE).all())


@pytest.mark.parametrize("mask", [torch.zeros(1, H, W), torch.full((2, H, W), 0.3),
                                  torch.stack([torch.ones(H, W), torch.zeros(H, W)])])
def test_an_empty_mask_is_refused(mask):
    with says(ValueError, "mask is empty", "paint"):
        mask_target(small_guider("segmentation"), mask, "thing")


def test_a_mask_for_an_unknown_class_is_refused():
    """A mask for an unknown class or for another kind of guider is refused."""
    with says(ValueError, "'think'", "thing"):
        mask_target(small_guider("segmentation"), torch.ones(1, H, W), "think")
    for task in sorted(set(TASKS) - set(MASKED)):
        with says(ValueError, f"small/{task}", "a mask", " or ".join(MASKED)):
            mask_target(small_guider(task), torch.ones(1, H, W), "thing")


# Numbers

def test_a_number_is_a_target_for_what_measures_one():
    target = number_target(small_guider("number"), 3)
    assert target.tolist() == [[3.0]] and target.dtype == torch.float32
    assert number_target(rule_guider("brightness"), 0.4).item() == pytest.approx(0.4)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"number"}))
def test_a_number_for_a_guider_that_measures_none_is_refused(task):
    with says(ValueError, f"small/{task}", "a number"):
        number_target(small_guider(task), 3)


def test_one_of_several_numbers_is_chosen_by_name_or_index():
    guider = replace(small_guider("number"), labels=("valence", "arousal", "3"))
    for name in ("Arousal", "1", " arousal "):
        target = number_target(guider, 0.5, name)
        assert target.shape == (1, 3) and target[0, 1] == 0.5 and target.isnan().tolist() == [[True, False, True]]
    with says(ValueError, "3 numbers", "valence, arousal"):
        number_target(guider, 0.5)
    with says(ValueError, "'arousel'", "arousal"):
        number_target(guider, 0.5, "arousel")


# Palettes

def test_colours_are_stripes_as_wide_as_they_say():
    picture = palette("#ff0000, 00FF00:2 ,#102030:1", size=8)
    assert picture.shape == (1, 3, 8, 8) and picture.dtype == torch.float32
    shades = torch.tensor([[255, 0, 0]] * 2 + [[0, 255, 0]] * 4 + [[16, 32, 48]] * 2).float() / 127.5 - 1
    assert all(torch.equal(picture[0, :, row].T, shades) for row in range(8))


@pytest.mark.parametrize("words", ["#ff0000", "#ff0000:3", "#ff0000, #ff0000:0.2"])
def test_one_colour_fills_the_picture(words):
    assert torch.equal(palette(words), torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 64, 64))


def test_a_palette_of_many_colours_gives_each_its_share():
    words = ", ".join(f"#{index * 8:02x}0000" for index in range(32))
    assert palette(words)[0, 0, 0].unique(return_counts=True)[1].tolist() == [2] * 32


@pytest.mark.parametrize("words, part", [
    ("red", "'red'"), ("#ff00", "'#ff00'"), ("#ff0000, blue", "'blue'"), ("#ff000g", "'#ff000g'"),
    ("#ff0000:0", "'#ff0000:0'"), ("#ff0000:-1", "'#ff0000:-1'"), ("#ff0000:nan", "'#ff0000:nan'"),
    ("#ff0000:inf", "'#ff0000:inf'"), ("#ff0000:wide", "'#ff0000:wide'"), ("#", "'#'"),
    (":2", "':2'"), ("#ff 00 00 00", "'#ff 00 00 00'"),
])
def test_what_is_no_colour_is_refused(words, part):
    with says(ValueError, part, "six hexadecimal digits", "#e63946:2"):
        palette(words)


@pytest.mark.parametrize("words", ["", " , ,"])
def test_no_colour_is_refused(words):
    with says(ValueError, "no colour", "#1d3557"):
        palette(words)
