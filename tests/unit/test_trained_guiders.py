"""Guiders trained on a few pictures: exact left-out predictions, honest reports, folders that are read back or refused."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import images, level, randn, says, small_guider
from torch import Tensor

from ppap_core import Guider, TrainedGuider, class_target, load_guider, save_trained, train_guider, visualize
from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network
from ppap_core.guiders.guider import with_input
from ppap_core.guiders.ridge import _groups, _Regression, fit_linear
from ppap_core.guiders.train import altered
from ppap_core.schedules import ExpertSchedule
from ppap_core.tinyworld.loaders import load_guider as load_tiny
from ppap_core.tinyworld.scenes import draw

SIZES = (7, 5, 6)  # examples of each class
LABELS = torch.arange(3).repeat_interleave(torch.tensor(SIZES))


def blobs(apart: float, views: int = 1, size: int = 4) -> Tensor:
    """Features (18, views, size) of three classes around means that are so far apart."""
    means = apart * torch.eye(3, size)
    return means[LABELS][:, None] + randn(len(LABELS), views, size, seed=3)


def refitted(features: Tensor, kept: Tensor, strength: float) -> Tensor:
    """Centred predictions for all plain examples by a regression of the kept ones alone, by its normal equations."""
    whole = _Regression(features.double(), LABELS)
    rows = ((features.double().flatten(0, 1) - whole.mean) / whole.deviation).unflatten(0, features.shape[:2])
    one = torch.ones(*rows.shape[:2], 1, dtype=rows.dtype)
    design, weights = torch.cat([one, rows], 2), (whole.root[:, 0]**2).unflatten(0, features.shape[:2])
    wanted = whole.centred.unflatten(0, features.shape[:2])
    a, w, y = (part[kept].flatten(0, 1) for part in (design, weights[..., None], wanted))
    penalty = strength * features.shape[2] * torch.eye(a.shape[1], dtype=a.dtype)
    penalty[0, 0] = 0
    return design[:, 0] @ torch.linalg.solve(a.mT @ (w * a) + penalty, a.mT @ (w * y))


@pytest.mark.parametrize("size", [4, 30], ids=["few features", "many features"])
def test_left_out_predictions_are_those_of_a_refit(size: int):
    features, groups = blobs(1.0, 3, size), list(_groups(LABELS))
    assert sorted(torch.cat(groups).tolist()) == list(range(18)) and len(groups) == 5
    found = _Regression(features.double(), LABELS).left_out(torch.tensor(0.02), groups)
    for group in groups:
        kept = torch.ones(18, dtype=torch.bool)
        kept[group] = False
        torch.testing.assert_close(found[group], refitted(features, kept, 0.02)[group])


def test_its_logits_are_those_of_the_scaled_regression():
    features = blobs(3.0)
    fit = fit_linear(features, LABELS)
    shown = refitted(features, torch.ones(18, dtype=torch.bool), fit.strength)
    logits = fit.logits(features[:, 0]).double()
    scale = logits.std() / (shown - shown.mean(1, keepdim=True)).std()
    torch.testing.assert_close(logits - logits.mean(1, keepdim=True), scale * (shown - shown.mean(1, keepdim=True)),
                               atol=1e-4, rtol=1e-4)


def test_probabilities_are_calibrated():
    """What is left out of features that hardly tell is unsure; what is far apart is sure."""
    near, far = fit_linear(blobs(0.3), LABELS), fit_linear(blobs(9.0), LABELS)
    assert near.probabilities.amax(1).mean() < 0.6 and far.probabilities.amax(1).mean() > 0.85, "smoothed: at most 0.9"
    assert near.loss > far.loss and near.strength >= far.strength


@pytest.mark.parametrize("strange", [{}, {"scale": 1e6}, {"constant": True}], ids=str)
def test_features_of_any_range(strange: dict):
    features = blobs(9.0) * strange.get("scale", 1)
    if strange.get("constant"):
        features[..., 3] = 7.0
    fit = fit_linear(features, LABELS)
    assert fit.weight.isfinite().all() and (fit.logits(features[:, 0]).argmax(1) == LABELS).all()


# Pictures

RING, STAR = 5, 3


@pytest.fixture(scope="module")
def eyes() -> Guider:
    """The tiny network for classes, read as an embedding."""
    return load_tiny("class", "embedding")


def pictures(count: int = 6, start: int = 0) -> dict[str, Tensor]:
    return {name: draw(range(start, start + count), label=label).image for name, label in (("ring", RING), ("star", STAR))}


@pytest.fixture(scope="module")
def trained(eyes: Guider) -> TrainedGuider:
    return train_guider(eyes, pictures(), copies=2, name="rings")


def test_it_names_the_class_of_other_pictures(trained: TrainedGuider):
    for index, other in enumerate(pictures(20, 100).values()):
        assert (trained.guider.predict(other, torch.zeros(20)).argmax(1) == index).float().mean() > 0.9
    assert trained.accuracy > 0.9 and trained.tells_apart and trained.guider.labels == ("ring", "star")


def test_it_guides_as_any_classifier(trained: TrainedGuider):
    aimed, x = trained.guider.aim(class_target(trained.guider, "ring")), pictures()["star"].requires_grad_()
    gradient = torch.autograd.grad(aimed.energy(x, level(0.0, x)).sum(), x)[0]
    assert gradient.flatten(1).any(1).all() and visualize(trained.guider, x).shape[0] == len(x)
    bank = ExpertBank(base_network(trained.guider), ExpertSchedule((0.1, 1.0, 9.0)), LoraSpec(2))
    assert torch.equal(bank(x, level(0.5, x)), trained.guider.net(x, level(0.5, x)))


def test_the_seed_decides_what_copies_show(eyes: Guider, trained: TrainedGuider):
    weights = [train_guider(eyes, pictures(), copies=2, seed=seed).guider.net.net.head.weight for seed in (0, 1)]
    same = torch.equal(weights[0], trained.guider.net.net.head.weight)
    assert same and (trained.refused_copies or not torch.equal(*weights))
    parts = altered(images(2), 4, 1)
    assert all(part.shape[2] >= 0.7 * images(2).shape[2] - 1 for part in parts)
    assert all(map(torch.equal, parts, altered(images(2), 4, 1)))


def test_what_cannot_be_told_apart_is_said(eyes: Guider):
    alike = {"a": draw(range(12)).image, "b": draw(range(50, 62)).image}
    found = train_guider(eyes, alike, copies=0)
    assert not found.tells_apart and "cannot tell them apart" in found.describe()
    assert "50%" in found.describe() and found.wrong(alike).shape[-1] > 300


def test_a_report_counts_and_draws(trained: TrainedGuider):
    assert "ring 6 of 6, star 6 of 6" in trained.describe()
    assert trained.wrong(pictures()).shape == (1, 3, 256, 256), "a note that there are none"
    mistaken = replace(trained, probabilities=torch.tensor([[0.2, 0.8]] * 12))
    assert "ring 0 of 6, star 6 of 6" in mistaken.describe() and mistaken.accuracy == 0.5 and not mistaken.tells_apart
    lucky = replace(trained, probabilities=torch.eye(2)[[0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]])
    assert "may be luck" in lucky.describe() and not lucky.tells_apart
    assert mistaken.wrong(pictures()).shape[2] == 2 * (160 + 40), "six tiles in two rows"


def test_pictures_of_several_sizes(eyes: Guider):
    several = {"ring": draw(range(4), 48, RING).image, "star": draw(range(4), (40, 32), STAR).image}
    assert train_guider(eyes, several, copies=1).probabilities.shape == (8, 2)


def test_what_cannot_be_trained_on_is_refused(eyes: Guider, trained: TrainedGuider):
    two = pictures(2)
    for words, backbone, shown in (
            ("at least two, such as like", eyes, {"ring": two["ring"]}),
            ("no picture of 'star'", eyes, two | {"star": two["star"][:0]}),
            ("a different one for each", eyes, {"ring": two["ring"], "Ring ": two["star"]}),
            ("as its embedding", small_guider("depth"), two), ("was trained itself", trained.guider, two),
            ("not numbers", eyes, two | {"star": two["star"] * torch.nan})):
        with says(ValueError, words):
            train_guider(backbone, shown, copies=0)


# Folders

@pytest.fixture
def saved(tmp_path: Path, trained: TrainedGuider, eyes: Guider) -> Path:
    assert save_trained(tmp_path / "rings", trained, eyes) == "saved"
    return tmp_path / "rings"


def find_tiny(name: str, output: str) -> Guider:
    return load_tiny(name.removeprefix("tinyworld/guider_"), output)


def read(folder: Path, backbone: Guider | None = None) -> Guider:
    return load_guider(folder, find_backbone=(lambda *_: backbone) if backbone else find_tiny)


def test_a_folder_gives_the_same_guider(saved: Path, trained: TrainedGuider):
    loaded, shown = read(saved), pictures(3, 50)["star"]
    assert torch.equal(loaded.predict(shown, level(0.0, shown)), trained.guider.predict(shown, level(0.0, shown)))
    assert (loaded.name, loaded.labels, loaded.task) == ("trained/rings", ("ring", "star"), "class")
    assert sum(file.stat().st_size for file in saved.iterdir()) < 4000, "the backbone is named, not copied"


def test_another_guider_takes_the_place_of_one_alone(saved: Path, trained: TrainedGuider, eyes: Guider):
    assert save_trained(saved, trained, eyes) == "unchanged"
    other = train_guider(eyes, pictures(7), copies=0, name="rings")
    assert save_trained(saved, other, eyes) == "replaced"
    (saved.parent / "network").mkdir()
    (saved.parent / "network" / "config.json").write_text('{"architecture": "resnet18"}')
    with says(ValueError, "'network'", "no trained guider"):
        save_trained(saved.parent / "network", trained, eyes)


def test_a_write_that_was_cut_off_is_noticed(saved: Path, trained: TrainedGuider, eyes: Guider, tmp_path: Path):
    other = train_guider(eyes, pictures(7), copies=0, name="rings")
    save_trained(tmp_path / "other", other, eyes)
    shutil.copy(tmp_path / "other" / "head.safetensors", saved)
    with says(ValueError, "rings/head.safetensors", "train it again"):
        read(saved)
    assert save_trained(saved, trained, eyes) == "replaced" and read(saved)


def test_a_backbone_that_is_not_there_or_differs(saved: Path, eyes: Guider):
    for words, backbone in (("the weights of the one that is here differ", load_tiny("depth", "embedding")),
                            ("in another way", replace(eyes, preprocess=replace(eyes.preprocess, size=(30, 32)))),
                            ("no plain network", replace(eyes, net=ExpertBank(base_network(eyes), ExpertSchedule((0.1, 1.0)),
                                                                              LoraSpec(2))))):
        with says(ValueError, "rings was trained on", words):
            read(saved, backbone)
    with says(ValueError, "rings was trained on", "cannot be loaded"):
        load_guider(saved)
    with says(ValueError, "rings", "'own'"):
        load_guider(saved, "style")


def test_it_reads_images_as_its_backbone_was_set(tmp_path: Path, eyes: Guider):
    blue_first = with_input(eyes, "blue first", "white")
    save_trained(tmp_path / "x", train_guider(blue_first, pictures(3), copies=0), blue_first)
    assert read(tmp_path / "x").preprocess == blue_first.preprocess != eyes.preprocess


@pytest.mark.parametrize(("key", "value", "words"), [
    ("ppap_trained", 2, "format"), ("backbone", {"name": "x"}, "backbone"), ("labels", "ab", "labels"),
    ("labels", ["a"], "shapes"), ("labels", ["a", "A"], "different one"), ("head", "0", "head.safetensors")])
def test_a_damaged_description_is_refused(saved: Path, key: str, value: object, words: str):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {key: value}))
    with says(ValueError, words):
        read(saved)


def test_a_backbone_from_the_folder_beside_it(tmp_path: Path):
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet10t", pretrained=False, num_classes=0)
    timm.models._hub.save_for_hf(net, tmp_path / "small", safe_serialization=True)
    backbone = load_guider(tmp_path / "small", "embedding")
    save_trained(tmp_path / "taste", train_guider(backbone, pictures(2), copies=0), backbone)
    assert load_guider(tmp_path / "taste").labels == ("ring", "star")
    config = json.loads((tmp_path / "taste" / "config.json").read_text())
    for name in ("timm/../small", "timm/taste", "tinyworld/class", "timm/gone", "timm/\0"):
        config["backbone"]["name"] = name
        (tmp_path / "taste" / "config.json").write_text(json.dumps(config))
        with says(ValueError, "taste was trained on", "cannot be loaded"):
            load_guider(tmp_path / "taste")
