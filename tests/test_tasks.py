"""The comparisons of each kind of network, against their definitions."""
import pytest
import torch
from helpers import randn

from ppap_core.tasks import IGNORE, TASKS

SHAPES = {"class": (3, 5), "depth": (3, 1, 6, 9), "segmentation": (3, 4, 6, 9)}


def target_of(task: str, count: int = 3) -> torch.Tensor:
    if task == "class":
        return torch.tensor([2, 0, 4])[:count]
    if task == "depth":
        return randn(count, 1, 6, 9, seed=7)
    return randn(count, 6, 9, seed=8).gt(0).long() + 1


@pytest.mark.parametrize("task", TASKS)
def test_every_comparison_gives_one_finite_number_for_each_image(task):
    output, other = randn(*SHAPES[task]), randn(*SHAPES[task], seed=1)
    for value in (TASKS[task].loss(output, target_of(task)), TASKS[task].distance(output, other),
                  TASKS[task].score(output, target_of(task))):
        assert value.shape == (3,) and bool(value.isfinite().all())


@pytest.mark.parametrize("task", TASKS)
def test_a_comparison_of_one_image_does_not_depend_on_the_rest_of_the_batch(task):
    output, other, target = randn(*SHAPES[task]), randn(*SHAPES[task], seed=1), target_of(task)
    for i in range(3):
        one = slice(i, i + 1)
        for compare, second in ((TASKS[task].loss, target), (TASKS[task].distance, other), (TASKS[task].score, target)):
            torch.testing.assert_close(compare(output[one], second[one]), compare(output, second)[one], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("task", TASKS)
def test_one_target_for_all_is_the_same_as_a_copy_for_each(task):
    output, target = randn(*SHAPES[task]), target_of(task, 1)
    copies = target.repeat(3, *(1,) * (target.ndim - 1))
    assert torch.equal(TASKS[task].loss(output, target), TASKS[task].loss(output, copies))
    assert torch.equal(TASKS[task].score(output, target), TASKS[task].score(output, copies))


@pytest.mark.parametrize("task", TASKS)
def test_the_distance_to_oneself_is_zero_and_to_another_is_more(task):
    output, other = randn(*SHAPES[task]), randn(*SHAPES[task], seed=1)
    assert TASKS[task].distance(output, output).abs().max() < 1e-6
    assert TASKS[task].distance(output, other).min() > 0.05


@pytest.mark.parametrize("task", TASKS)
def test_networks_of_half_precision_are_compared_in_full_precision(task):
    output, other = randn(*SHAPES[task]).bfloat16(), randn(*SHAPES[task], seed=1).bfloat16()
    assert TASKS[task].loss(output, target_of(task)).dtype == torch.float32
    torch.testing.assert_close(TASKS[task].distance(output, other), TASKS[task].distance(output.float(), other.float()))


def test_the_energy_of_a_class_is_minus_the_log_of_its_probability():
    logits, target = randn(3, 5), target_of("class")
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = torch.stack([p[i, k] for i, k in enumerate(target.tolist())])
    torch.testing.assert_close(TASKS["class"].loss(logits, target), -expected.log())
    torch.testing.assert_close(TASKS["class"].score(logits, target), expected)


def test_distillation_of_classes_is_the_divergence_of_the_student_from_the_teacher():
    student, teacher = randn(3, 5), randn(3, 5, seed=1)
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(TASKS["class"].distance(student, teacher), (p * (p / q).log()).sum(1))


def test_distillation_of_segmentations_is_the_mean_divergence_of_the_pixels():
    student, teacher = randn(3, 4, 6, 9), randn(3, 4, 6, 9, seed=1)
    pixels = [TASKS["class"].distance(student[:, :, i, j], teacher[:, :, i, j]) for i in range(6) for j in range(9)]
    torch.testing.assert_close(TASKS["segmentation"].distance(student, teacher), torch.stack(pixels).mean(0))


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (300.0, 7.0), (0.01, -5.0)])
def test_depth_is_judged_without_regard_to_its_scale_and_shift(scale, shift):
    depth, target = randn(3, 1, 6, 9), target_of("depth")
    expected = TASKS["depth"].loss(depth, target)
    torch.testing.assert_close(TASKS["depth"].loss(depth * scale + shift, target), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(TASKS["depth"].loss(target * scale + shift, target), torch.zeros(3), rtol=0, atol=1e-4)


def test_the_energy_of_depth_is_one_minus_its_correlation():
    depth, target = randn(3, 1, 6, 9), target_of("depth")
    expected = torch.stack([torch.corrcoef(torch.stack([depth[i].flatten(), target[i].flatten()]))[0, 1] for i in range(3)])
    torch.testing.assert_close(TASKS["depth"].loss(depth, target), 1 - expected)
    torch.testing.assert_close(TASKS["depth"].loss(-target, target), torch.full((3,), 2.0))
    assert torch.equal(TASKS["depth"].score(-target, target), torch.zeros(3))


def test_distillation_of_depth_does_not_depend_on_the_range_of_the_network():
    student, teacher = randn(3, 1, 6, 9), randn(3, 1, 6, 9, seed=1)
    distance = TASKS["depth"].distance
    scaled = distance(1000 * student + 3, 1000 * teacher + 3)
    torch.testing.assert_close(scaled, distance(student, teacher), rtol=1e-3, atol=0)
    assert distance(teacher + 1, teacher).min() > 0.3  # but the student must have the teacher's own scale and shift


@pytest.mark.parametrize("depth", [torch.zeros(3, 1, 6, 9), torch.full((3, 1, 6, 9), 1e4)])
def test_a_flat_depth_map_has_a_finite_energy_and_gradient(depth):
    depth = depth.clone().requires_grad_()
    energy = TASKS["depth"].loss(depth, target_of("depth"))
    energy.sum().backward()
    assert bool(energy.isfinite().all()) and bool(depth.grad.isfinite().all())
    assert bool(TASKS["depth"].distance(depth.detach(), depth.detach() + 1).isfinite().all())


def test_ignored_pixels_do_not_count():
    logits, target = randn(3, 4, 6, 9), target_of("segmentation")
    half = target.clone()
    half[:, :, 4:] = IGNORE
    for compare in (TASKS["segmentation"].loss, TASKS["segmentation"].score):
        torch.testing.assert_close(compare(logits, half), compare(logits[..., :4], target[..., :4]))


def test_a_map_of_ignored_pixels_only_gives_no_gradient():
    logits = randn(3, 4, 6, 9).requires_grad_()
    energy = TASKS["segmentation"].loss(logits, torch.full((3, 6, 9), IGNORE))
    energy.sum().backward()
    assert torch.equal(energy.detach(), torch.zeros(3)) and torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_score_of_a_segmentation_is_the_share_of_right_pixels():
    target = target_of("segmentation")
    logits = torch.nn.functional.one_hot(target, 4).permute(0, 3, 1, 2).float()
    logits[1, :, :2] = torch.tensor([9.0, 0.0, 0.0, 0.0])[:, None, None]  # label 0 is in no target: 2 of 6 rows wrong
    torch.testing.assert_close(TASKS["segmentation"].score(logits, target), torch.tensor([1.0, 2 / 3, 1.0]))
