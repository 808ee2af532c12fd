"""Images, maps and masks are resized alike on every device."""
import logging

import pytest
import torch
from helpers import B, H, W, images, level, randn, small_guider
from helpers.devices import AA, Refusing, WithoutDoubles
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.guidance.gradients import energy_gradient
from ppap_core.guidance.shift import GuidanceSettings, guided
from ppap_core.guidance.terms import Term
from ppap_core.guiders import resize as resizing
from ppap_core.guiders.preprocess import Preprocess
from ppap_core.guiders.resize import MAX_SHRINK, resize, resize_labels
from ppap_core.guiders.rules import RULES, rule_guider
from ppap_core.guiders.targets import map_target, mask_target
from ppap_core.guiders.tasks import IGNORE, TASKS, resize_map
from ppap_core.noise import expand
from ppap_core.sampling import karras_sigmas, sample_euler
from ppap_core.schedules import ExpertSchedule

SIZES = [(12, 16), (7, 40), (41, 57), (1, 3), (20, 5)]
BACKWARD = "_aa_backward"


@pytest.fixture(autouse=True)
def nothing_said():
    resizing._say_once.cache_clear()


def resized_and_pulled(image, size, mode, **how):
    """The resized image, and the gradient of its inner product with noise."""
    point = image.clone().requires_grad_(True)
    result = resize(point, size, mode, **how)
    return result.detach(), torch.autograd.grad((result * randn(*result.shape, seed=5)).sum(), point)[0]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_where_torch_can_nothing_changes(size, mode, align_corners):
    image = images().requires_grad_(True)
    result, gradient = resized_and_pulled(image, size, mode, align_corners=align_corners)
    expected = F.interpolate(image, size, mode=mode, antialias=True, align_corners=align_corners)
    assert torch.equal(result, expected)
    assert torch.equal(gradient, torch.autograd.grad((expected * randn(*result.shape, seed=5)).sum(), image)[0])


@pytest.mark.parametrize("refused", [AA, BACKWARD])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_a_device_without_antialiasing_resizes_alike(size, mode, align_corners, refused, caplog):
    """Also one that has the kernel but no gradient of it; it is said once."""
    expected = resized_and_pulled(images(), size, mode, align_corners=align_corners)
    with Refusing(refused), caplog.at_level(logging.WARNING):
        found = [resized_and_pulled(images(), size, mode, align_corners=align_corners) for _ in range(2)]
    for ours, theirs in zip(found[1], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert [mode in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_torchs_kernels_are_not_asked_for_large_factors(mode):
    """On CUDA they refuse them."""
    tall, size = torch.randn(1, 2, 5 * MAX_SHRINK + 1, 30), (5, 30)
    with Refusing(AA):  # else this would say so
        result, gradient = resized_and_pulled(tall, size, mode)
    point = tall.clone().requires_grad_(True)
    expected = F.interpolate(point, size, mode=mode, antialias=True)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    pulled = torch.autograd.grad((expected * randn(*result.shape, seed=5)).sum(), point)[0]
    torch.testing.assert_close(gradient, pulled, rtol=0, atol=1e-5)
    assert not resizing._say_once.cache_info().currsize


def test_large_images_masks_and_maps_are_resized_without_refusal():
    """Wherever they are: for a network, for a target, and for the grid of a latent."""
    side = 4 * MAX_SHRINK + 20
    picture, preprocess = torch.randn(1, 3, side, side), Preprocess((4, 4), interpolation="bicubic")
    with Refusing(AA):
        assert preprocess(picture).shape == (1, 3, 4, 4)
        assert resize_map(picture[:, :1], (4, 4)).shape == (1, 1, 4, 4)
        assert rule_guider("layout").predict(torch.randn(1, 3, 400, 360), torch.zeros(1)).shape == (1, 3, 8, 8)
        assert mask_target(small_guider("mask"), torch.ones(1, 700, 900), "").shape == (1, 1, 12, 16)
        assert map_target(small_guider("depth"), torch.randn(1, 3, 700, 900)).shape == (1, 1, 12, 16)


@pytest.mark.parametrize("size", [(6, 9), (31, 11), (40, 56)])
def test_label_maps_keep_their_labels_without_doubles(size):
    labels = randn(2, H, W).gt(0).long() * 149 + 1
    labels[:, 0] = IGNORE
    with WithoutDoubles():
        found = resize_labels(labels, size)
    assert torch.equal(found, F.interpolate(labels[:, None].double(), size, mode="nearest-exact")[:, 0].long())
    assert found.dtype == torch.long and resize_labels(labels, (H, W)) is labels


def test_a_factor_beyond_reach_has_a_second_derivative_too():
    point = randn(1, 1, 90, 2, dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: resize(x, (2, 3)).square(), point)
    assert torch.autograd.gradgradcheck(lambda x: resize(x, (2, 3)).square(), point)


# Devices

def aimed_rules():
    for name in RULES:
        guider = rule_guider(name)
        yield guider if guider.target is not None else guider.aim(guider.predict(images(1, seed=4), torch.zeros(1)))


GUIDERS = {**{task: small_guider(task) for task in TASKS}, **{guider.name: guider for guider in aimed_rules()}}


@pytest.mark.parametrize("name", GUIDERS)
def test_no_guider_needs_doubles(name):
    """Neither its energy and gradient, nor its target of another size."""
    guider, image = GUIDERS[name], images()
    if TASKS[guider.task].dense:
        guider = guider.aim(guider.target.repeat_interleave(3, -1))
    with WithoutDoubles():
        energy, gradient = energy_gradient(guider, image, level(0.7, image))
        score = guider.score(image, level(0.7, image))
    assert gradient.isfinite().all() and len(energy) == len(score) == B


@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float16])
def test_no_guided_sampling_needs_doubles(compute):
    """With experts, a mask, a limit, and a gradient through the model."""
    guider = small_guider()
    bank = ExpertBank(base_network(guider), ExpertSchedule.log_spaced(2, 0.1, 10.0), LoraSpec(2, 2.0))
    terms = [Term(with_experts(guider, bank)), Term(small_guider("segmentation"), mask=randn(1, 1, H, W).sigmoid()),
             Term(small_guider("depth"), normalized=True, backprop_through_model=True)]
    sigmas = karras_sigmas(3, 0.1, 5.0)
    with WithoutDoubles():
        denoise = guided(lambda x, sigma: x * expand(0.25 / (0.25 + sigma**2), x), terms,
                         GuidanceSettings(max_rms=1.0, compute_dtype=compute))
        assert sample_euler(denoise, 5 * images(), sigmas).isfinite().all()


def test_a_size_seen_without_values_first_is_resized_later():
    """The memory of a gradient is found on tensors without values."""
    with FakeTensorMode():
        assert resize(torch.zeros(1, 3, 450, 450), (10, 10)).shape == (1, 3, 10, 10)
    assert resize(torch.ones(1, 3, 450, 450), (10, 10)).mean() == pytest.approx(1)
