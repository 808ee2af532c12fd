"""A guider: preprocessing, target, energy, and targets from words."""
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from helpers import TARGETS, H, SmallNet, W, images, level, randn, says, small_guider
from torch.nn import functional as F

from ppap_core.guider import Guider, IgnoreSigma, Preprocess, class_target, clean, reading
from ppap_core.tasks import TASKS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_preprocessing_gives_each_channel_the_mean_and_spread_of_the_network():
    image = images()
    out = Preprocess((H, W), MEAN, STD)(image)
    for channel in range(3):
        expected = (image[:, channel] * 0.5 + 0.5 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(out[:, channel], expected, rtol=1e-5, atol=1e-6)


def test_an_image_of_the_right_size_is_not_resampled():
    image = images()
    assert torch.equal(Preprocess((H, W))(image), ((image + 1) / 2 - 0.5) / 0.5)


@pytest.mark.parametrize("size", [(12, 16), (H, 16), (30, W), (41, 57)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_gives_height_and_width_in_this_order_and_smooths_when_it_shrinks(size, interpolation):
    image = images()
    out = Preprocess(size, interpolation=interpolation)(image)
    assert out.shape == (3, 3, *size)
    torch.testing.assert_close(out, F.interpolate(image, size, mode=interpolation, antialias=True), rtol=0, atol=1e-6)


def test_the_gradient_through_preprocessing_is_the_finite_difference():
    image = images(dtype=torch.float64).requires_grad_()
    preprocess = Preprocess((7, 9), MEAN, STD)
    direction, weights = randn(3, 3, H, W, seed=1).double(), randn(3, 3, 7, 9).double()
    def value(x):
        return (preprocess(x) ** 2 * weights).sum()
    slope = (torch.autograd.grad(value(image), image)[0] * direction).sum()
    numeric = (value(image.detach() + 1e-5 * direction) - value(image.detach() - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close(slope, numeric, rtol=1e-7, atol=0)


def test_an_off_the_shelf_network_ignores_the_noise_level_and_is_frozen():
    net = SmallNet().train()
    ignore = IgnoreSigma(net)
    image = randn(3, 3, 12, 16)
    assert torch.equal(ignore(image, torch.zeros(3)), ignore(image, torch.full((3,), 50.0)))
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_energy_and_score_compare_the_output_for_the_preprocessed_image(task):
    guider, image = small_guider(task), images()
    output = guider.net.net(guider.preprocess(image))
    assert torch.equal(guider.energy(image, clean(image)), TASKS[task].loss(output, TARGETS[task]))
    assert torch.equal(guider.score(image, clean(image)), TASKS[task].score(output, TARGETS[task]))


def test_aiming_makes_another_guider_and_leaves_the_first():
    first = replace(small_guider(), target=None)
    second = first.aim(torch.tensor([1]))
    assert first.target is None and second.target.tolist() == [1] and second.net is first.net
    with pytest.raises(FrozenInstanceError):
        first.target = torch.tensor([1])


def test_a_guider_without_a_target_is_refused():
    with says(ValueError, "small/class", "no target", "aim"):
        replace(small_guider(), target=None).energy(images(), torch.zeros(3))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("task", TASKS)
def test_a_target_for_another_number_of_images_is_refused(task, count):
    target = TARGETS[task].repeat(count, *(1,) * (TARGETS[task].ndim - 1))
    with says(ValueError, f"for {count} images", "but 3"):
        small_guider(task).aim(target).energy(images(), torch.zeros(3))


@pytest.mark.parametrize("height, width", [(8, 6), (12, 16), (3, 16)])
@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_a_target_map_of_another_size_than_the_output_is_refused(task, height, width):
    """Also one with as many pixels, turned on its side: it would guide towards something else without a word."""
    target = torch.zeros(1, height, width, dtype=torch.long) if task == "segmentation" else randn(1, 1, height, width)
    with says(ValueError, height, width, 6, 8):
        small_guider(task).aim(target).energy(images(), torch.zeros(3))


@pytest.mark.parametrize("words, numbers", [
    ("tabby", [2]), ("Red Fox", [0]), ("  goldfish ", [4]), ("3", [3]), ("0", [0]),
    ("tabby, 3,red fox", [2, 3, 0]), ("tiger,tiger", [3, 3]), ("tabby,,", [2]),
])
def test_a_class_is_chosen_by_name_or_number(words, numbers):
    target = class_target(small_guider(), words)
    assert target.tolist() == numbers and target.dtype == torch.long


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
    ("", ["no class"]),
    (" , ,", ["no class"]),
])
def test_an_unknown_class_is_refused_with_the_closest_names(words, hints):
    with says(ValueError, *hints):
        class_target(small_guider(), words)


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_a_class_for_a_guider_without_classes_is_refused(task):
    with says(ValueError, f"small/{task}", task, "image"):
        class_target(small_guider(task), "tabby")


@pytest.mark.parametrize("task", TASKS)
def test_what_a_guider_reads_in_an_image_is_the_target_that_this_image_meets_best(task):
    guider, image = small_guider(task), images()
    aimed = guider.aim(reading(guider, image))
    own = aimed.energy(image, clean(image))
    assert not aimed.target.requires_grad
    for other in (TARGETS[task], reading(guider, image.flip(0)), reading(guider, -image)):
        assert bool((own <= guider.aim(other).energy(image, clean(image))).all())
    if task != "class":
        torch.testing.assert_close(aimed.score(image, clean(image)), torch.ones(3))


def test_half_precision_images_keep_their_type_in_preprocessing():
    assert Preprocess((H, W), MEAN, STD)(images().bfloat16()).dtype == torch.bfloat16


def test_the_description_of_the_preprocessing_makes_the_same_preprocessing_again():
    preprocess = Preprocess((12, 16), MEAN, STD, "bicubic")
    about = preprocess.about()
    again = Preprocess(tuple(about["size"]), tuple(about["mean"]), tuple(about["std"]), about["interpolation"])
    assert again == preprocess


def test_a_network_that_uses_the_noise_level_gets_it():
    def net(image, sigma):
        return image.mean(dim=(2, 3)) * sigma[:, None]
    guider = Guider("toy", net, Preprocess((H, W)), "class", tuple("abc"), target=torch.tensor([1]))
    image = images()
    assert torch.equal(guider.predict(image, level(2.0, image)), 2 * guider.predict(image, level(1.0, image)))
