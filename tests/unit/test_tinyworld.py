"""The tiny world: scenes whose truths agree with their pixels, an exact mixture, and bundled networks that do their work."""
from dataclasses import fields, replace
from functools import partial
from itertools import count

import pytest
import torch
from helpers import SmallNet, images, level, randn, same, says
from helpers.gaussian import GaussianMixture
from torch.nn import functional as F

from benchmarks.evaluation import Evaluator, Scores, features, reference, score
from benchmarks.judges import TinyTransformer, augment, tiny_convnext
from benchmarks.losses import task_loss
from benchmarks.networks import WEIGHTS as JUDGES
from benchmarks.networks import load_conditional_denoiser, load_held_out_judge, load_judge
from benchmarks.train_tinyworld import NETWORKS, TRAINING_SEEDS, Network, TrainConfig, fit, home_of
from examples.priors.networks import WEIGHTS as PRIORS
from ppap_core.guiders.guider import clean
from ppap_core.io.files import load_tensors
from ppap_core.noise import PIXEL_SIGMA_DATA, expand
from ppap_core.tinyworld.loaders import CONDITIONS, LABELS, SIZE, WEIGHTS, condition, load_denoiser, load_guider
from ppap_core.tinyworld.networks.classifiers import tiny_resnet
from ppap_core.tinyworld.networks.denoiser import TinyDenoiser
from ppap_core.tinyworld.scenes import CLASSES, SHAPES, draw

CLASS_LOSS = partial(task_loss, "class")
HELD_OUT = range(500, 756)  # below the seeds of every training


def eroded(mask: torch.Tensor, by: int = 1) -> torch.Tensor:
    """Pixels whose whole neighbourhood is in the mask, (B, H, W)."""
    return -F.max_pool2d(-F.pad(mask.float(), (by,) * 4), 2 * by + 1, 1) > 0.5


# Scenes

@pytest.mark.parametrize("size, shape", [(32, (32, 32)), ((20, 28), (20, 28)), ((41, 17), (41, 17))])
def test_a_scene_can_have_any_size(size, shape):
    scenes = draw(range(3), size)
    assert scenes.image.shape == (3, 3, *shape) and scenes.image.abs().max() <= 1
    assert scenes.depth.shape == (3, 1, *shape) and scenes.depth.min() >= 0 and scenes.depth.max() <= 1
    assert scenes.segmentation.shape == (3, *shape) and scenes.label.shape == (3,)
    assert scenes.label.dtype == scenes.segmentation.dtype == torch.long


def test_a_scene_depends_on_its_seed_only():
    together = draw([4, 900, 7, 4])
    for i, seed in enumerate([4, 900, 7, 4]):
        alone = draw([seed])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))
    assert not torch.equal(together.image[0], together.image[1])


def test_a_scene_s_segmentation_is_its_label_in_the_object():
    """The segmentation is the label inside the object and zero outside."""
    scenes = draw(range(200))
    for label, segmentation in zip(scenes.label.tolist(), scenes.segmentation, strict=True):
        assert segmentation.unique().tolist() == [0, 1 + label]
        assert 25 < int((segmentation > 0).sum()) < 512


def test_all_classes_are_about_equally_frequent():
    counts = draw(range(1600), 8).label.bincount(minlength=len(CLASSES))
    assert len(CLASSES) == 8 and counts.min() > 140 and counts.max() < 260  # 200 each


def test_a_chosen_class_changes_nothing_but_the_object():
    for label in range(len(CLASSES)):
        assert draw(range(3), label=label).label.tolist() == [label] * 3
    disk, ring = draw(range(20), label=0), draw(range(20), label=CLASSES.index("ring"))
    wall = eroded((disk.segmentation == 0) & (ring.segmentation == 0))
    assert int(wall.sum()) > 1000
    torch.testing.assert_close(disk.image.movedim(1, -1)[wall], ring.image.movedim(1, -1)[wall])
    assert torch.equal(disk.depth[:, 0][wall], ring.depth[:, 0][wall])


def test_the_segmentation_follows_the_pixels_of_the_image():
    """One hue inside the object, another one on the wall; a few pixels hold a tip thinner than themselves."""
    scenes, compared = draw(range(60)), 0
    rgb = (scenes.image.double() + 1) / 2
    unclipped = (rgb < 0.999).all(1)
    for i in range(60):
        hues = []
        for region in (scenes.segmentation[i] > 0, scenes.segmentation[i] == 0):
            inner = eroded(region[None])[0] & unclipped[i]
            colours = F.normalize(rgb[i][:, inner], dim=0)
            if len(colours.T) < 5:
                break
            hues.append(colours.median(1).values)
            strange = (colours - hues[-1][:, None]).abs().amax(0) > 1e-4
            assert int(strange.sum()) <= 4
        if len(hues) == 2:
            compared += 1
            assert (hues[0] - hues[1]).norm() > 0.02
    assert compared > 30


def test_the_object_is_nearer_than_the_wall_and_the_wall_is_flat():
    scenes = draw(range(100))
    depth, inside = scenes.depth[:, 0].double(), scenes.segmentation > 0
    for i in range(100):
        assert depth[i][inside[i]].min() >= depth[i][~inside[i]].max()
    bend = depth[:, :, :-2] - 2 * depth[:, :, 1:-1] + depth[:, :, 2:]
    flat = eroded(~inside & (depth > 0))[:, :, 1:-1]
    assert int(flat.sum()) > 10_000 and bend[flat].abs().max() < 1e-6


def test_a_scene_is_the_same_at_three_times_the_size():
    small, large = draw(range(50), (20, 28)), draw(range(50), (60, 84))
    assert torch.equal(small.label, large.label)
    agree = small.segmentation == large.segmentation[:, 1::3, 1::3]  # pixel centres coincide
    assert agree.float().mean() > 0.9995
    difference = (small.depth - large.depth[:, :, 1::3, 1::3])[agree[:, None]]
    assert difference.abs().max() < 1e-3
    averaged = F.avg_pool2d(large.image, 3)
    assert (small.image - averaged).abs().mean() < 0.02


def test_every_shape_is_drawn_in_its_place():
    """Centred on the origin, within the unit of its formula, and no two alike."""
    axis = torch.linspace(-1.3, 1.3, 53)
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    masks = {name: shape(x, y) < 0 for name, shape in SHAPES.items()}
    for name, mask in masks.items():
        assert 0.08 < mask.float().mean() < 0.45, name
        assert not mask[torch.hypot(x, y) > 1.2].any(), name
        others = [other for key, other in masks.items() if key != name]
        assert all((mask ^ other).float().mean() > 0.03 for other in others), name


# The exact mixture

def test_the_exact_denoiser_is_the_posterior_mean():
    """Against a Monte Carlo average over the prior, weighted by the likelihood of what is seen."""
    world = GaussianMixture(0.5 * randn(3, 1, 1, 2, dtype=torch.float64), 0.3)
    x, sigma = torch.tensor([[[[0.4, -0.2]]]], dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)
    prior = (world.means[:, None] + 0.3 * randn(3, 200_000, 1, 1, 2, dtype=torch.float64)).flatten(0, 1)
    weights = (-(prior - x).square().flatten(1).sum(1) / (2 * 0.36)).softmax(0)
    torch.testing.assert_close(world(x, sigma)[0], (weights[:, None, None, None] * prior).sum(0), rtol=0, atol=3e-3)


@pytest.mark.parametrize("sigma, near", [(1e-3, "x"), (1e3, "mean")])
def test_the_exact_denoiser_at_both_ends_of_noise(sigma, near):
    """It trusts the image without noise and the prior in pure noise."""
    world = GaussianMixture.of_shape((3, 5, 7))
    x = world.means[:2] + 0.1
    expected = x if near == "x" else world.means.mean(0).expand_as(x)
    torch.testing.assert_close(world(x, level(sigma, x)), expected, rtol=0, atol=2e-2)


def test_class_probabilities_ignore_the_rest_of_the_batch():
    world = GaussianMixture.of_shape((3, 5, 7))
    x = randn(3, 3, 5, 7, dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    together = world.log_likelihood(x, sigma)
    assert together.shape == (3, 4)
    for i in range(3):
        torch.testing.assert_close(world.log_likelihood(x[i:i + 1], sigma[i:i + 1])[0], together[i])


# Networks

@pytest.mark.parametrize("make", [tiny_resnet, tiny_convnext])
@pytest.mark.parametrize("dense", [False, True])
def test_a_tiny_network_answers_for_each_image_or_for_each_pixel(make, dense):
    torch.manual_seed(0)
    net = make(5, dense).eval()
    image = images()[:, :, :16, :24]
    out = net(image)
    assert out.shape == ((3, 5, 16, 24) if dense else (3, 5)) and net.features(image).shape == (3, 128)
    torch.testing.assert_close(net(image[1:2]), out[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_a_tiny_transformer_predicts_by_image_or_by_pixel(dense):
    torch.manual_seed(0)
    net, image = TinyTransformer(5, dense).eval(), draw(range(3), SIZE).image
    with torch.no_grad():
        out = net(image)
        assert out.shape == ((3, 5, SIZE, SIZE) if dense else (3, 5))
        torch.testing.assert_close(net(image[1:2]), out[1:2], rtol=1e-4, atol=1e-5)


def test_a_new_denoiser_is_that_of_a_gaussian_prior():
    """Its last layer starts at zero, and the preconditioning does the rest."""
    x, sigma = randn(3, 3, 20, 28), torch.tensor([0.02, 1.0, 80.0])
    expected = x * expand(PIXEL_SIGMA_DATA**2 / (PIXEL_SIGMA_DATA**2 + sigma**2), x)
    torch.testing.assert_close(TinyDenoiser(width=8, blocks=1)(x, sigma), expected)


def test_augmentation_follows_its_generator():
    """Augmentation follows its generator and keeps the shape."""
    image = draw(range(3), (20, 28)).image
    first, second, third = (augment(image, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == image.shape and torch.equal(first, second) and not torch.equal(first, third)
    assert 0.01 < (first - image).abs().mean() < 0.5


# Training

CONFIG = TrainConfig(steps=6, batch=2, seed=3)


def train(folder, loss, config: TrainConfig = CONFIG) -> None:
    fit("small", Network(partial(SmallNet, (len(CLASSES),)), loss, config), folder, torch.device("cpu"), save_every=2)


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, capsys):
    train(tmp_path / "straight", CLASS_LOSS)
    calls = count()
    def breaking(net, scenes, generator):
        if next(calls) == 5:
            raise InterruptedError
        return CLASS_LOSS(net, scenes, generator)
    with pytest.raises(InterruptedError):
        train(tmp_path / "stopped", breaking)
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["small.state.safetensors"]
    train(tmp_path / "stopped", CLASS_LOSS)
    straight, stopped = (load_tensors(tmp_path / name / "small.safetensors") for name in ("straight", "stopped"))
    assert same(straight[0], stopped[0]) and straight[1] == stopped[1]
    assert straight[1]["recipe"]["steps"] == 6 and "step 4 of 6" in capsys.readouterr().out


def test_no_training_sees_the_scenes_that_tests_use(tmp_path, monkeypatch):
    seen = []
    def record(seeds, *args, **kwargs):
        seen.extend(seeds)
        return draw(seeds, *args, **kwargs)
    monkeypatch.setattr("benchmarks.train_tinyworld.draw", record)
    train(tmp_path, CLASS_LOSS, TrainConfig(steps=3, batch=2, seed=0))
    assert len(set(seen)) == 6 and min(seen) >= TRAINING_SEEDS > max(HELD_OUT)


# Bundled weights: floors, not golden numbers

@pytest.mark.parametrize("task, floor", [("class", 0.97), ("depth", 0.95), ("segmentation", 0.97)])
@pytest.mark.parametrize("load", [load_guider, load_judge, load_held_out_judge])
def test_a_bundled_network_knows_scenes_that_it_has_not_seen(load, task, floor):
    scenes, network = draw(HELD_OUT), load(task)
    truth = {"class": scenes.label, "depth": scenes.depth, "segmentation": scenes.segmentation}[task]
    if task == "class":
        score = (network.predict(scenes.image, clean(scenes.image)).argmax(1) == truth).float().mean()
    else:
        score = network.aim(truth).score(scenes.image, clean(scenes.image)).mean()
    assert score > floor and network.task == task and network.labels == LABELS[task]


@pytest.mark.parametrize("load", [load_guider, load_judge, load_held_out_judge])
def test_a_bundled_classifier_bears_noise_that_no_eye_sees(load):
    """Otherwise its answers on generated images would be worthless."""
    scenes, network = draw(HELD_OUT), load("class")
    noisy = scenes.image + 0.1 * randn(*scenes.image.shape)
    assert (network.predict(noisy, clean(noisy)).argmax(1) == scenes.label).float().mean() > 0.9


@pytest.mark.parametrize("sigma, ceiling", [(0.1, 0.03), (0.5, 0.13), (2.0, 0.33)])
def test_the_bundled_denoiser_beats_a_gaussian_prior(sigma, ceiling):
    """Root mean square error, in units of the data; the Gaussian prior leaves sigma * 0.5 / sqrt(sigma^2 + 0.25)."""
    image = draw(range(500, 564)).image
    x = image + sigma * randn(*image.shape)
    with torch.no_grad():
        error = (load_denoiser()(x, level(sigma, x)) - image).square().mean().sqrt().item()
    assert error < ceiling < sigma * PIXEL_SIGMA_DATA / (sigma**2 + PIXEL_SIGMA_DATA**2) ** 0.5


def rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def test_a_condition_is_one_hot_or_zero():
    found = condition(torch.tensor([3, -1, 0]))
    assert found.shape == (3, CONDITIONS) and found.dtype == torch.float32
    assert found.nonzero().tolist() == [[0, 3], [2, 0]] and found.sum() == 2


@pytest.mark.parametrize("sigma, apart", [(0.1, 0.01), (0.5, 0.02), (2.0, 0.05), (10.0, 0.05)])
def test_without_a_class_it_is_the_unconditional_denoiser(sigma, apart):
    """It was trained on from there. Measured: 0.0045, 0.011, 0.024, 0.020 apart, and errors within 1.3 % of each other."""
    scenes = draw(range(500, 564))
    x, nothing = scenes.image + sigma * randn(*scenes.image.shape), condition(torch.full((64,), -1))
    with torch.no_grad():
        plain, untold = load_denoiser()(x, level(sigma, x)), load_conditional_denoiser()(x, level(sigma, x), nothing)
    assert 0 < rms(untold - plain) < apart
    assert rms(untold - scenes.image) == pytest.approx(rms(plain - scenes.image), rel=0.03)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0])
def test_the_right_class_helps_and_another_one_harms(sigma):
    """The conditional denoiser."""
    scenes = draw(range(500, 564))
    x, net = scenes.image + sigma * randn(*scenes.image.shape), load_conditional_denoiser()
    told, untold, wrong = (condition(label) for label in (scenes.label, torch.full((64,), -1), (scenes.label + 3) % 8))
    with torch.no_grad():
        errors = [rms(net(x, level(sigma, x), given) - scenes.image) for given in (told, untold, wrong)]
    assert errors[0] < 0.98 * errors[1] and errors[1] < 0.98 * errors[2]


def test_the_bundled_files_are_small_and_tell_their_recipe():
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for folder in (WEIGHTS, JUDGES, PRIORS)
             for path in folder.rglob("*.safetensors") if ".state." not in path.name}
    assert files.keys() == NETWORKS.keys() and all(path.is_relative_to(home_of(name)) for name, path in files.items())
    for name, path in files.items():
        assert path.stat().st_size < 16 * 2**20, name
        about = load_tensors(path)[1]
        assert about["name"] == name and about["recipe"]["steps"] > 0, name


def test_a_task_without_a_bundled_network_is_refused():
    with says(ValueError, "no network for tags", "class, depth, segmentation"):
        load_guider("tags")


def test_guider_and_judges_are_of_three_architectures():
    networks = [load("class") for load in (load_guider, load_judge, load_held_out_judge)]
    assert len({frozenset(network.net.state_dict()) for network in networks}) == 3
    assert len({network.name for network in networks}) == 3
    assert {network.preprocess.size for network in networks} == {(SIZE, SIZE)}


# Judging

def test_scores_tell_wanted_scenes_from_others():
    scenes, others = draw(range(500, 532)), draw(range(600, 632))
    for task, right, wrong in (("class", (0.95, 1), (0, 0.4)), ("depth", (0, 0.05), (0.1, 1)),
                               ("segmentation", (0.9, 1), (0.2, 0.75))):
        judge = load_judge(task)
        for judged, (low, high) in ((scenes.image, right), (others.image, wrong)):
            found = score(judge, judged, scenes)
            assert found.shape == (32,) and 0 <= found.min() and found.max() <= 1
            assert low <= found.mean() <= high, (task, found.mean())


def test_a_reference_is_the_features_of_the_first_scenes():
    judge, whole = load_judge("class"), draw(range(300))
    real = reference(judge, 300, SIZE, torch.device("cpu"), kept=20)
    torch.testing.assert_close(real.features, features(judge, whole.image[:20]))
    assert real.stats.count == 300
    torch.testing.assert_close(real.stats.mean, features(judge, whole.image).double().mean(0), rtol=1e-4, atol=1e-5)


def test_measures_are_in_range_and_tell_good_from_bad():
    judge, guider, asked = load_judge("class"), load_guider("class"), []
    real = reference(judge, 100, SIZE, torch.device("cpu"))

    def exact(seeds, scenes):
        asked.append(list(seeds))
        assert torch.equal(scenes.label, draw(seeds).label)
        return scenes.image

    def measure(sample):
        evaluator = Evaluator((judge, load_held_out_judge("class")), guider, real, torch.device("cpu"), batch=10)
        return evaluator.evaluate(sample, range(500, 525))
    good, bad = measure(exact), measure(lambda seeds, _: 0.02 * randn(len(seeds), 3, SIZE, SIZE))
    assert asked == [list(range(500, 510)), list(range(510, 520)), list(range(520, 525))]
    for found in (good, bad):
        assert found.images == 25 and found.energy >= 0 and found.frechet >= 0
        for name in ("score", "second_score", "own_score", "precision", "recall"):
            assert 0 <= getattr(found, name) <= 1, name
        assert all(isinstance(getattr(found, field.name), float) for field in fields(Scores)[1:])
    assert min(good.score, good.second_score, good.own_score, good.precision) > 0.7
    assert max(bad.score, bad.second_score, bad.own_score) < 0.4 and bad.precision == bad.recall == 0
    assert good.energy < 0.2 < bad.energy and good.frechet < 0.5 * bad.frechet


def test_the_scores_of_a_judgement_are_each_of_its_own_judge():
    """A judge that is always right, one that never is, and a guider that is right about the even seeds."""
    scenes = draw(range(500, 520))

    def answering(right):
        def net(image, sigma):
            shift = torch.tensor([0 if each else 1 for each in right])
            return 9 * F.one_hot((scenes.label + shift) % len(CLASSES), len(CLASSES)).float()
        return replace(load_guider("class"), net=net)
    always, never, even = (answering(right) for right in ([True] * 20, [False] * 20, [True, False] * 10))
    evaluator = Evaluator((always, never), even, reference(load_judge("class"), 20, SIZE, torch.device("cpu")),
                          torch.device("cpu"))
    found = evaluator.evaluate(lambda seeds, scenes: scenes.image, range(500, 520))
    assert (found.score, found.second_score, found.own_score) == (1, 0, 0.5) and found.energy == pytest.approx(4.5, abs=0.01)
