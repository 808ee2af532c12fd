"""What a classifier's outputs are and how its classes are called, in every form in which folders say it."""
import json
from pathlib import Path

import pytest
import torch
from helpers import fixed_weights, images, says

from ppap_core.guiders.guider import Guider, clean, with_input
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.loaders.labels import class_labels
from ppap_core.guiders.targets import class_target, number_target

pytestmark = pytest.mark.slow  # all together take several seconds of the fast tests' minute

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

NAMES = ["tench", "goldfish", "white shark"]
SYNSETS = ["n01440764", "n01443537", "n01484850"]


def write_timm(folder: Path, classes: int = 3, **config) -> Path:
    """A folder of a small timm network; `config` replaces what its config.json says, None takes it out."""
    net = fixed_weights(timm.create_model("vit_tiny_patch16_224", num_classes=classes, img_size=32, depth=1, embed_dim=24,
                                          num_heads=2))
    arguments = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}
    timm.models._hub.save_for_hf(net, folder, model_args=arguments, safe_serialization=True)
    return rewrite(folder, **config)


def write_transformers(folder: Path, architecture: str = "ViTForImageClassification", labels: int = 3, **config) -> Path:
    said = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32,
            "patch_size": 8}
    if architecture == "SegformerForSemanticSegmentation":
        said = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
                "decoder_hidden_size": 16}
    kind = getattr(transformers, architecture)
    kind(kind.config_class(**said, num_labels=labels)).save_pretrained(folder, safe_serialization=True)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3, "do_normalize": True, "do_resize": True}))
    return rewrite(folder, **config)


def rewrite(folder: Path, **config) -> Path:
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    return folder


def gradient(guider: Guider) -> torch.Tensor:
    image = images().requires_grad_()
    energy = guider.energy(image, clean(image))
    assert bool((energy.abs() > 0).all())
    return torch.autograd.grad(energy.sum(), image)[0]


# Names of timm

@pytest.mark.parametrize("said", [
    {"label_names": NAMES}, {"label_names": {"1": "goldfish", "2": "white shark", "0": "tench"}},
    {"label_names": {"goldfish": 1, "white shark": 2, "tench": 0}}, {"labels": NAMES}, {"id2label": dict(enumerate(NAMES))},
    {"label2id": {"white shark": 2, "goldfish": 1, "tench": 0}},
    {"label_names": SYNSETS, "label_descriptions": dict(zip(reversed(SYNSETS), reversed(NAMES), strict=True))},
    {"label_names": NAMES, "label_descriptions": {name: f"a fish, that is {name}" for name in NAMES}},
    {"label_descriptions": {"2": "white shark", "0": "tench", "1": "goldfish"}}, {"label_descriptions": NAMES},
    {"label_names": [[name, "fish"] for name in NAMES]}, {"pretrained_cfg": {"label_names": NAMES}},
    {"pretrained_cfg": {"label_names": {"1": "goldfish", "0": "tench", "2": "white shark"}}},
], ids=str)
def test_a_class_is_called_as_the_folder_says(tmp_path, said):
    guider = load_guider(write_timm(tmp_path / "net", **said))
    assert guider.labels == tuple(NAMES) and guider.task == "class"
    assert class_target(guider, "tench, white shark, goldfish").tolist() == [0, 2, 1]


@pytest.mark.parametrize("said, labels, words", [
    ({"label_names": NAMES[:2]}, ("0", "1", "2"), "2"),
    ({"label_names": [*NAMES, "hammerhead"]}, ("0", "1", "2"), "4"),
    ({"label_names": {"2": "white shark", "0": "tench"}}, ("tench", "1", "white shark"), "2"),
    ({"label_names": {"0": "tench", "7": "goldfish"}}, ("tench", "1", "2"), "1"),
    ({"label_names": {"0": "tench", "1": None, "2": ""}}, ("tench", "1", "2"), "1"),
    ({"label_names": {"-1": "nothing", "0": "tench", "1": "goldfish", "2": "white shark"}}, tuple(NAMES), "3"),
    ({"label_names": "fishes"}, ("0", "1", "2"), "no names for its 3 classes"),
    ({"label_names": {"fish": "tench"}}, ("0", "1", "2"), "no names for its 3 classes"),
    ({}, ("0", "1", "2"), "no names for its 3 classes"),
], ids=str)
def test_what_does_not_fit_is_told_and_numbers_go_on(tmp_path, caplog, said, labels, words):
    guider = load_guider(write_timm(tmp_path / "net", **said))
    assert guider.labels == labels
    assert class_target(guider, "2").tolist() == [2]
    assert words in caplog.text and "aim it at numbers" in caplog.text


@pytest.mark.parametrize("names, labels", [
    ([7, 5, 6], ("7", "5", "6")), ({"3": 0, "7": 1, "9": 2}, ("3", "7", "9")), ({0: 5, 1: 6, 2: 7}, ("5", "6", "7")),
    (["cat", "cat", "cat"], ("cat", "cat 1", "cat 2")), ({0: "a", "2": "c", 1: "b"}, ("a", "b", "c")),
    ({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, ("0", "1", "2")), (["caf\u00e9", "\u732b", "\U0001f431"],) * 2,
    (["a, b", "a, c", "a, b"], ("a", "c", "b")), (["true", True, None], ("true", "True 1", "2")),
], ids=str)
def test_names_of_any_kind_make_a_label_for_each_class(names, labels):
    assert class_labels("net", 3, names) == tuple(labels)


@pytest.mark.parametrize("said", [
    {"dataset": "imagenet-1k"}, {"pretrained_cfg": {"tag": "a1_in1k"}}, {"pretrained_cfg": {"tag": "augreg_in21k_ft_in1k"}},
    {"pretrained_cfg": {"tag": "fb_in22k_ft_in1k_384"}}, {"pretrained_cfg": {"hf_hub_id": "timm/resnet18.a1_in1k"}},
    {"tag": "a1_in1k", "pretrained_cfg": None},
], ids=str)
def test_a_thousand_classes_of_imagenet_have_its_names(tmp_path, said):
    guider = load_guider(write_timm(tmp_path / "net", 1000, **{"pretrained_cfg": {}} | said))
    assert class_target(guider, "goldfish").tolist() == [1]


def test_a_folder_from_the_hub_may_have_the_tag_in_its_name(tmp_path):
    guider = load_guider(write_timm(tmp_path / "timm--vit_tiny.augreg_in1k", 1000, pretrained_cfg={}))
    assert class_target(guider, "goldfish").tolist() == [1]


@pytest.mark.parametrize("said", [
    {}, {"pretrained_cfg": None}, {"dataset": "birds", "pretrained_cfg": {"tag": "a1_in1k"}},
    {"pretrained_cfg": {"tag": "a1_in1k_ft_birds"}}, {"pretrained_cfg": {"tag": "augreg_in21k"}},
    {"pretrained_cfg": {"dataset": "imagenet21k"}},
], ids=str)
def test_a_thousand_other_classes_have_numbers(tmp_path, caplog, said):
    guider = load_guider(write_timm(tmp_path / "net", 1000, **{"pretrained_cfg": {}} | said))
    assert guider.labels == tuple(map(str, range(1000))) and "no names for its 1000 classes" in caplog.text
    with says(ValueError, "goldfish", "a number below 1000"):
        class_target(guider, "goldfish")


def test_old_files_say_all_at_the_top(tmp_path):
    """Mean, std, size and interpolation are read where there is no pretrained_cfg."""
    said = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "input_size": [3, 32, 32], "interpolation": "bilinear",
            "crop_pct": 0.5, "num_classes": 3, "labels": NAMES, "pretrained_cfg": None}
    guider = load_guider(write_timm(tmp_path / "net", **said))
    assert guider.labels == tuple(NAMES)
    assert guider.preprocess.mean == (0.1, 0.2, 0.3) and guider.preprocess.std == (0.5, 0.6, 0.7)
    assert guider.preprocess.interpolation == "bilinear"
    assert guider.preprocess.size[0] == 64 and guider.preprocess.crop == (32, 32)


# Names of transformers

@pytest.mark.parametrize("said, labels, words", [
    ({"id2label": {"2": "shark", "0": "tench", "1": "goldfish"}}, ("tench", "goldfish", "shark"), ""),
    ({"id2label": {"0": "tench", "5": "goldfish", "1": "shark"}}, ("tench", "shark", "2"), "of the 3 that its files name 2"),
    ({"id2label": {"0": "tench", "2": "shark"}}, ("tench", "1", "shark"), "of the 2 that its files name 2"),
    ({"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}}, ("a", "b", "c"), "of the 4 that its files name 3"),
    ({"id2label": {"0": "a", "1": "b"}, "num_labels": 7}, ("a", "b", "2"), "of the 2 that its files name 2"),
    ({"id2label": None, "label2id": {"c": 2, "a": 0, "b": 1}}, ("a", "b", "c"), ""),
    ({"id2label": {str(i): f"LABEL_{i}" for i in range(3)}, "label2id": {"c": 2, "a": 0, "b": 1}}, ("a", "b", "c"), ""),
    ({"id2label": None, "label2id": None}, ("0", "1", "2"), "no names for its 3 classes"),
    ({"id2label": {"1": "a", "2": "b", "3": "c"}}, ("0", "a", "b"), "of the 3 that its files name 2"),
    ({"id2label": {"0": "cat", "1": "cat", "2": "dog"}}, ("cat", "cat 1", "dog"), ""),
    ({"id2label": {"0": "\u732b", "1": "\u72ac", "2": "caf\u00e9"}}, ("\u732b", "\u72ac", "caf\u00e9"), ""),
    ({"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 2, "b": 1, "c": 0}}, ("a", "b", "c"), "contradicts"),
], ids=str)
def test_transformers_classes_are_called_as_the_library_does(tmp_path, caplog, said, labels, words):
    guider = load_guider(write_transformers(tmp_path / "net", **said))
    assert guider.labels == labels and guider.task == "class"
    assert [class_target(guider, label).tolist() for label in labels] == [[0], [1], [2]]
    told = " ".join(record.getMessage() for record in caplog.records if record.name.startswith("ppap_core"))
    assert words in told and bool(words) == bool(told)


@pytest.mark.parametrize("architecture, labels", [
    ("SegformerForSemanticSegmentation", 5), ("ViTForImageClassification", 5), pytest.param(
        "ViTForImageClassification", 1, marks=pytest.mark.skipif(
            transformers.__version__ < "4.57", reason="older releases take a head half as large for quantised"))])
def test_the_weights_say_how_many_classes_there_are(tmp_path, architecture, labels):
    folder = write_transformers(tmp_path / "net", architecture, labels, id2label={"0": "a", "1": "b"}, label2id=None)
    guider = load_guider(folder)
    assert guider.labels == ("a", "b", "2", "3", "4")[:labels] if labels > 1 else guider.task == "number"
    assert guider.predict(images(), clean(images())).shape[1] == labels


def test_weights_that_differ_otherwise_are_still_refused(tmp_path):
    with says(ValueError, "another shape", "copy"):
        load_guider(write_transformers(tmp_path / "net", hidden_size=24))


# What the outputs are

@pytest.mark.parametrize("write, said", [
    (write_timm, {}), (write_timm, {"label_names": ["beautiful"]}), (write_timm, {"problem_type": "regression"}),
    (write_transformers, {}), (write_transformers, {"problem_type": "regression"}),
    (write_transformers, {"id2label": {"0": "nsfw"}, "label2id": {"nsfw": 0}}),
    (write_transformers, {"problem_type": "single_label_classification"}),
])
def test_one_output_is_a_number(tmp_path, write, said):
    """It has an energy and a gradient, which a class among one has not."""
    guider = load_guider(write(tmp_path / "net", **{"classes" if write is write_timm else "labels": 1}, **said))
    assert guider.task == "number" and guider.labels == ()
    assert bool((gradient(guider.aim(number_target(guider, 9.0))).flatten(1).abs().amax(1) > 0).all())
    image = images()
    assert guider.predict(image, clean(image)).shape == (3, 1)


@pytest.mark.parametrize("write, names", [(write_timm, "label_names"), (write_transformers, "id2label")])
def test_outputs_of_a_regression_are_numbers_with_names(tmp_path, write, names):
    said = {names: {"0": "valence", "1": "arousal", "2": "dominance"}, "problem_type": "regression"}
    guider = load_guider(write(tmp_path / "net", **said))
    assert guider.task == "number" and guider.labels == ("valence", "arousal", "dominance")
    with says(ValueError, "3 numbers", "valence, arousal"):
        number_target(guider, 5.0)
    image = images()
    energy = guider.aim(number_target(guider, 5.0, "arousal")).energy(image, clean(image))
    expected = (guider.predict(image, clean(image))[:, 1] - 5).square() / 2 * image[0].numel()
    torch.testing.assert_close(energy, expected)


@pytest.mark.parametrize("write, names, problem", [
    (write_timm, "label_names", "multi_label_classification"), (write_timm, "label_names", "multilabel"),
    (write_transformers, "id2label", "multi_label_classification")])
def test_labels_of_a_multi_label_network_are_tags(tmp_path, write, names, problem):
    """Each has a probability of its own, and only those aimed at count."""
    said = {names: {"0": "1girl", "1": "solo", "2": "smile"}, "problem_type": problem}
    guider = load_guider(write(tmp_path / "net", **said))
    assert guider.task == "tags" and guider.labels == ("1girl", "solo", "smile")
    image = images()
    energy = guider.aim(class_target(guider, "solo")).energy(image, clean(image))
    torch.testing.assert_close(energy, -guider.predict(image, clean(image))[:, 1].sigmoid().log())


def test_one_label_of_a_multi_label_network_is_a_tag(tmp_path):
    """It can be wanted, or wanted absent."""
    guider = load_guider(write_transformers(tmp_path / "net", labels=1, problem_type="multi_label_classification",
                                            id2label={"0": "nsfw"}))
    assert guider.task == "tags" and guider.labels == ("nsfw",)
    there, absent = (gradient(guider.aim(class_target(guider, words))) for words in ("nsfw", "nsfw:-1"))
    assert bool(((there * absent).flatten(1).sum(1) < 0).all())


def test_a_folder_without_a_problem_type_has_classes(tmp_path):
    for folder in (write_timm(tmp_path / "a"), write_transformers(tmp_path / "b")):
        assert load_guider(folder).task == "class"


def test_one_label_of_a_segmentation_is_a_mask(tmp_path):
    from ppap_core.guiders.targets import mask_target

    guider = load_guider(write_transformers(tmp_path / "net", "SegformerForSemanticSegmentation", 1))
    assert guider.task == "mask" and guider.labels == ()
    aimed = guider.aim(mask_target(guider, torch.eye(32)[None], "star"))
    assert bool((gradient(aimed).flatten(1).abs().amax(1) > 0).all())
    two = load_guider(write_transformers(tmp_path / "two", "SegformerForSemanticSegmentation", 2))
    assert two.task == "segmentation" and two.labels == ("0", "1")


# Taggers

def write_tags(folder: Path, names: list[str], header: str = "tag_id,name,category,count") -> Path:
    rows = [f'{1000 + index},"{name}",0,{10 - index}' for index, name in enumerate(names)]
    (folder / "selected_tags.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return folder


def test_tags_are_named_by_their_table(tmp_path):
    guider = load_guider(write_tags(write_timm(tmp_path / "net", pretrained_cfg={}), ["1girl", "long_hair", ":d"]))
    assert guider.task == "tags" and guider.labels == ("1girl", "long_hair", ":d")
    assert class_target(guider, "long hair").tolist() == [1]


@pytest.mark.parametrize("side, channels, padding, bgr, square, fill", [
    ("tagger", "own", "own", True, True, 1.0), ("tagger", "red first", "none", False, False, 1.0),
    ("tagger", "own", "black", True, True, 0.0), ("other", "own", "own", False, False, 0.0),
    ("other", "blue first", "white", True, True, 1.0), ("other", "own", "white", False, True, 1.0),
])
def test_blue_first_and_white_around_can_be_set(tmp_path, side, channels, padding, bgr, square, fill):
    """They are a tagger's own with a table of tags, any network's on request, and nobody's otherwise."""
    folder = write_timm(tmp_path / "net", pretrained_cfg={"crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3})
    guider = load_guider(write_tags(folder, NAMES) if side == "tagger" else folder)
    changed = with_input(guider, channels, padding)
    assert (changed.preprocess.bgr, changed.preprocess.square, changed.preprocess.fill) == (bgr, square, (fill,) * 3)
    assert (changed is guider) == (channels == padding == "own")
    wide = torch.full((1, 3, 16, 32), -1.0)
    wide[:, 2] = 0.5
    seen = changed.preprocess(wide)
    assert seen.shape == (1, 3, 32, 32)
    torch.testing.assert_close(seen[0, :, 16, 16], torch.tensor([0.5, -1, -1] if bgr else [-1, -1, 0.5]))
    if square:
        torch.testing.assert_close(seen[0, :, :8], torch.full((3, 8, 32), 2 * fill - 1), rtol=0, atol=0.3)


@pytest.mark.parametrize("channels, padding", [("green first", "own"), ("own", "pink")])
def test_no_other_way_to_read_an_image_is_known(tmp_path, channels, padding):
    with says(ValueError, "green first" if padding == "own" else "pink", "own"):
        with_input(load_guider(write_timm(tmp_path / "net")), channels, padding)


def test_a_table_of_another_network_names_no_tag(tmp_path, caplog):
    guider = load_guider(write_tags(write_timm(tmp_path / "net", pretrained_cfg={}), ["1girl", "solo"]))
    assert guider.task == "tags" and guider.labels == ("0", "1", "2") and "no name is trusted" in caplog.text


def test_a_damaged_table_of_tags_is_refused(tmp_path):
    folder = write_tags(write_timm(tmp_path / "net"), ["1girl", "solo", "smile"], header="a,b,c,d")
    with says(ValueError, "net/selected_tags.csv", "'name'"):
        load_guider(folder)
    (folder / "selected_tags.csv").write_bytes(b"\xff\xfe\x00")
    with says(ValueError, "net/selected_tags.csv", "'name'"):
        load_guider(folder)
