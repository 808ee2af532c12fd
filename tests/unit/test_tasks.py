"""The comparisons of each kind of network, against their definitions."""
import math

import pytest
import torch
from helpers import EXAMPLES, images, randn, says

from ppap_core.guiders.guider import Guider, IgnoreSigma
from ppap_core.guiders.preprocess import Preprocess
from ppap_core.guiders.targets import image_target, map_target, mask_target, with_cutouts
from ppap_core.guiders.tasks import IGNORE, TASKS, Task, half_mse, normalized_mse, proximity, resize_map
from ppap_core.guiders.visualize import visualize

SHAPES = {task: (3, *example.shape) for task, example in EXAMPLES.items()}
LABEL_MAPS = randn(3, 6, 8, seed=8).gt(0).long() + 1
SQUARES = [name for name, task in TASKS.items() if task.loss is half_mse]


def target_of(task: str, count: int = 3) -> torch.Tensor:
    return TASKS[task].target_of(randn(*SHAPES[task], seed=7))[:count]


def test_every_task_is_tested():
    """Each has a row in EXAMPLES in tests/helpers, of a shape and a target that belong together."""
    assert set(EXAMPLES) == set(TASKS), "give each task a row in EXAMPLES in tests/helpers"
    assert all(example.target.shape == target_of(task, 1).shape for task, example in EXAMPLES.items())


@pytest.mark.parametrize("task", TASKS)
def test_a_task_that_takes_a_drawn_map_says_how_it_is_drawn(task):
    assert bool(TASKS[task].drawn_as) == (TASKS[task].from_map is not None)


@pytest.mark.parametrize("task", TASKS)
def test_every_comparison_gives_one_finite_number_for_each_image(task):
    output, other = randn(*SHAPES[task]), randn(*SHAPES[task], seed=1)
    for value in (TASKS[task].loss(output, target_of(task)), TASKS[task].distance(output, other),
                  TASKS[task].score(output, target_of(task))):
        assert value.shape == (3,) and bool(value.isfinite().all())


@pytest.mark.parametrize("task", TASKS)
def test_comparisons_do_not_depend_on_the_rest_of_the_batch(task):
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
    assert TASKS[task].distance(output, other).min() > 0.01


@pytest.mark.parametrize("task", TASKS)
def test_half_precision_is_compared_in_full_precision(task):
    output, other = randn(*SHAPES[task]).bfloat16(), randn(*SHAPES[task], seed=1).bfloat16()
    assert TASKS[task].loss(output, target_of(task)).dtype == torch.float32
    torch.testing.assert_close(TASKS[task].distance(output, other), TASKS[task].distance(output.float(), other.float()))


def test_the_energy_of_a_class_is_minus_its_log_probability():
    logits, target = randn(3, 5), target_of("class")
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = torch.stack([p[i, k] for i, k in enumerate(target.tolist())])
    torch.testing.assert_close(TASKS["class"].loss(logits, target), -expected.log())
    torch.testing.assert_close(TASKS["class"].score(logits, target), expected)


def test_classes_are_distilled_by_the_divergence():
    """The loss is the divergence of the student from the teacher."""
    student, teacher = randn(3, 5), randn(3, 5, seed=1)
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(TASKS["class"].distance(student, teacher), (p * (p / q).log()).sum(1))


def test_segmentations_are_distilled_by_mean_divergence():
    """The loss is the mean divergence of the pixels."""
    student, teacher = randn(3, 4, 6, 8), randn(3, 4, 6, 8, seed=1)
    pixels = [TASKS["class"].distance(student[:, :, i, j], teacher[:, :, i, j]) for i in range(6) for j in range(8)]
    torch.testing.assert_close(TASKS["segmentation"].distance(student, teacher), torch.stack(pixels).mean(0))


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (300.0, 7.0), (0.01, -5.0)])
def test_depth_is_judged_without_regard_to_its_scale_and_shift(scale, shift):
    depth, target = randn(3, 1, 6, 8), target_of("depth")
    expected = TASKS["depth"].loss(depth, target)
    torch.testing.assert_close(TASKS["depth"].loss(depth * scale + shift, target), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(TASKS["depth"].loss(target * scale + shift, target), torch.zeros(3), rtol=0, atol=1e-4)


def test_the_energy_of_depth_is_one_minus_its_correlation():
    depth, target = randn(3, 1, 6, 8), target_of("depth")
    expected = torch.stack([torch.corrcoef(torch.stack([depth[i].flatten(), target[i].flatten()]))[0, 1] for i in range(3)])
    torch.testing.assert_close(TASKS["depth"].loss(depth, target), 1 - expected)
    torch.testing.assert_close(TASKS["depth"].loss(-target, target), torch.full((3,), 2.0))
    assert torch.equal(TASKS["depth"].score(-target, target), torch.zeros(3))


def test_distilling_depth_ignores_scale_and_shift():
    student, teacher = randn(3, 1, 6, 8), randn(3, 1, 6, 8, seed=1)
    distance = TASKS["depth"].distance
    torch.testing.assert_close(distance(1000 * student + 3, teacher), distance(student, teacher), rtol=1e-3, atol=0)
    torch.testing.assert_close(distance(student, 0.01 * teacher - 7), distance(student, teacher), rtol=1e-2, atol=0)
    assert TASKS["depth"].distance(-teacher, teacher).min() > 1.99


@pytest.mark.parametrize("depth", [torch.zeros(3, 1, 6, 8), torch.full((3, 1, 6, 8), 1e4)])
def test_a_flat_depth_map_has_a_finite_energy_and_gradient(depth):
    depth = depth.clone().requires_grad_()
    energy = TASKS["depth"].loss(depth, target_of("depth"))
    energy.sum().backward()
    assert bool(energy.isfinite().all()) and bool(depth.grad.isfinite().all())
    assert bool(TASKS["depth"].distance(depth.detach(), depth.detach() + 1).isfinite().all())


def test_ignored_pixels_do_not_count():
    logits, target = randn(3, 4, 6, 8), LABEL_MAPS
    half = target.clone()
    half[:, :, 4:] = IGNORE
    for compare in (TASKS["segmentation"].loss, TASKS["segmentation"].score):
        torch.testing.assert_close(compare(logits, half), compare(logits[..., :4], target[..., :4]))


def test_a_map_of_ignored_pixels_only_gives_no_gradient():
    logits = randn(3, 4, 6, 8).requires_grad_()
    energy = TASKS["segmentation"].loss(logits, torch.full((3, 6, 8), IGNORE))
    energy.sum().backward()
    assert torch.equal(energy.detach(), torch.zeros(3)) and torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_score_of_a_segmentation_is_its_pixel_accuracy():
    target = LABEL_MAPS
    logits = torch.nn.functional.one_hot(target, 4).permute(0, 3, 1, 2).float()
    logits[1, :, :2] = torch.tensor([9.0, 0.0, 0.0, 0.0])[:, None, None]  # label 0 is in no target: 2 of 6 rows wrong
    torch.testing.assert_close(TASKS["segmentation"].score(logits, target), torch.tensor([1.0, 2 / 3, 1.0]))


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_between_0_and_1(task):
    for scale in (0.1, 1.0, 50.0):
        score = TASKS[task].score(scale * randn(*SHAPES[task]), target_of(task))
        assert bool(((score >= 0) & (score <= 1)).all())


@pytest.mark.parametrize("task", TASKS)
def test_energies_have_the_gradient_of_finite_differences(task):
    output = randn(*SHAPES[task], dtype=torch.float64).requires_grad_()
    target = target_of(task)
    target = target.double() if target.is_floating_point() else target
    direction = randn(*SHAPES[task], seed=3, dtype=torch.float64)
    slope = (torch.autograd.grad(TASKS[task].loss(output, target).sum(), output)[0] * direction).sum()
    ahead, behind = (TASKS[task].loss(output.detach() + step * direction, target).sum() for step in (1e-5, -1e-5))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)


# Several classes

@pytest.mark.parametrize("classes", [[2, 0, 4], [1]])
def test_a_weight_of_one_class_is_that_class(classes):
    logits, index = randn(3, 5), torch.tensor(classes)
    weights = torch.nn.functional.one_hot(index, 5).float()
    for compare in (TASKS["class"].loss, TASKS["class"].score):
        torch.testing.assert_close(compare(logits, weights), compare(logits, index))


def test_the_energy_of_several_classes_is_a_weighted_sum():
    logits, weights = randn(3, 5), torch.tensor([[1.0, 0.0, 0.5, 0.0, -0.25]])
    expected = sum(weight * TASKS["class"].loss(logits, torch.tensor([k])) for k, weight in enumerate(weights[0].tolist()))
    torch.testing.assert_close(TASKS["class"].loss(logits, weights), expected)


def test_a_negative_weight_rewards_less_likely_classes():
    """The energy falls as the class becomes less likely."""
    logits = randn(3, 5).requires_grad_()
    TASKS["class"].loss(logits, torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0]])).sum().backward()
    step = (logits - 0.1 * logits.grad).detach()
    assert bool((step[:, 1] < logits[:, 1]).all()) and bool((step[:, 0] > logits[:, 0]).all())


def test_the_score_of_several_classes_is_a_geometric_mean():
    """The score is the geometric mean of the classes' probabilities by their weights."""
    logits = randn(3, 5)
    p = logits.softmax(1)
    score = TASKS["class"].score(logits, torch.tensor([[3.0, 0.0, 1.0, 0.0, 0.0]]))
    torch.testing.assert_close(score, (p[:, 0] ** 3 * p[:, 2]) ** 0.25)


# Tags

def test_the_energy_of_a_tag_is_minus_its_own_log_probability():
    """All other tags are free: none of the push removes one that is true."""
    logits = randn(3, 5).requires_grad_()
    energy = TASKS["tags"].loss(logits, torch.tensor([1]))
    torch.testing.assert_close(energy, -logits[:, 1].sigmoid().log())
    energy.sum().backward()
    assert bool((logits.grad[:, 1] < 0).all()) and not logits.grad[:, [0, 2, 3, 4]].any()


def test_an_avoided_tag_is_wanted_absent():
    logits, weights = randn(3, 5), torch.tensor([[1.0, 0.0, 0.5, 0.0, -0.25]])
    p = logits.sigmoid()
    expected = -p[:, 0].log() - 0.5 * p[:, 2].log() - 0.25 * (1 - p[:, 4]).log()
    torch.testing.assert_close(TASKS["tags"].loss(logits, weights), expected)
    torch.testing.assert_close(TASKS["tags"].score(logits, weights), (-expected / 1.75).exp())


def test_tags_are_distilled_each_by_a_divergence_of_its_own():
    student, teacher = randn(3, 5), randn(3, 5, seed=1)
    p, q = teacher.sigmoid(), student.sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(TASKS["tags"].distance(student, teacher), each.sum(1))


@pytest.mark.parametrize("logit", [-300.0, 300.0])
def test_certain_tags_have_finite_energies_and_gradients(logit):
    logits = torch.full((1, 5), logit, requires_grad=True)
    for value in (TASKS["tags"].loss(logits, torch.tensor([[1.0, -1.0, 0.0, 0.5, -2.0]])),
                  TASKS["tags"].distance(logits, -logits.detach())):
        [gradient] = torch.autograd.grad(value.sum(), logits)
        assert bool(value.isfinite()) and bool(gradient.isfinite().all()) and bool(gradient.any())


# Masks

def test_the_energy_of_a_mask_is_the_mean_cross_entropy():
    logits, target = randn(3, 1, 6, 8), target_of("mask")
    p = logits.double().sigmoid()
    each = -(target * p.log() + (1 - target) * (1 - p).log())
    torch.testing.assert_close(TASKS["mask"].loss(logits, target), each.mean((1, 2, 3)).float())
    torch.testing.assert_close(TASKS["mask"].score(logits, target), 1 - (p - target).abs().mean((1, 2, 3)).float())


def test_masks_are_distilled_by_the_mean_divergence():
    """The loss is the mean divergence of the two outcomes."""
    student, teacher = randn(3, 1, 6, 8), randn(3, 1, 6, 8, seed=1)
    both = [torch.cat([logits, torch.zeros_like(logits)], dim=1) for logits in (student, teacher)]
    torch.testing.assert_close(TASKS["mask"].distance(student, teacher), TASKS["segmentation"].distance(*both))


# Embeddings

@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_embeddings_are_compared_by_their_direction(scale):
    embedding, target = randn(3, 6), target_of("embedding")
    cosine = torch.stack([a @ b / (a.norm() * b.norm()) for a, b in zip(embedding, target, strict=True)])
    torch.testing.assert_close(TASKS["embedding"].loss(scale * embedding, target), 100 * (1 - cosine))
    torch.testing.assert_close(TASKS["embedding"].distance(embedding, scale * target), 1 - cosine)
    torch.testing.assert_close(TASKS["embedding"].score(scale * embedding, target), cosine.clamp_min(0))
    assert torch.equal(TASKS["embedding"].score(-target, target), torch.zeros(3))


# Numbers and features

@pytest.mark.parametrize("task", SQUARES)
def test_numbers_and_features_are_compared_by_half_the_mse(task):
    output, target = randn(*SHAPES[task]), target_of(task)
    torch.testing.assert_close(TASKS[task].loss(output, target), ((output - target) ** 2).flatten(1).mean(1) / 2)
    assert TASKS[task].sum_over_pixels and torch.equal(TASKS[task].score(target, target), torch.ones(3))
    torch.testing.assert_close(TASKS[task].score(target + 1, target), torch.full((3,), 0.5))


def test_the_energy_of_a_number_is_half_the_square():
    numbers, target = randn(3, 1), torch.tensor([[0.8]])
    assert torch.equal(TASKS["number"].loss(numbers, target), half_mse(numbers, target))
    torch.testing.assert_close(TASKS["number"].score(target + 1, target), torch.tensor([0.5]))


def test_numbers_that_nobody_aimed_at_are_free():
    numbers = randn(3, 4).requires_grad_()
    target = torch.tensor([[math.nan, 2.0, math.nan, math.nan]])
    for compare in (TASKS["number"].score, TASKS["number"].loss):
        value = compare(numbers, target)
        torch.testing.assert_close(value, compare(numbers[:, 1:2], target[:, 1:2]))
    value.sum().backward()
    assert torch.equal(numbers.grad != 0, torch.tensor([[False, True, False, False]]).expand(3, 4))


@pytest.mark.parametrize("task", [name for name in SQUARES if TASKS[name].distance is not half_mse])
def test_distillation_of_features_does_not_depend_on_their_range(task):
    student, teacher = randn(*SHAPES[task]), randn(*SHAPES[task], seed=1)
    distance = TASKS[task].distance
    torch.testing.assert_close(distance(1000 * student, 1000 * teacher), distance(student, teacher))
    torch.testing.assert_close(distance(torch.zeros_like(teacher), teacher), torch.ones(3))
    assert bool(distance(student, torch.zeros_like(teacher)).isfinite().all())


# Maps of another size

def test_a_map_of_the_right_size_is_not_touched():
    depth, labels = randn(2, 1, 6, 9), randn(2, 6, 9).gt(0).long()
    assert resize_map(depth, (6, 9)) is depth and resize_map(labels, (6, 9)) is labels


@pytest.mark.parametrize("size", [(3, 5), (12, 18), (9, 6)])
def test_maps_are_smoothed_and_labels_are_never_mixed(size):
    depth = randn(2, 1, 6, 9)
    expected = torch.nn.functional.interpolate(depth, size, mode="bilinear", antialias=True)
    assert torch.equal(resize_map(depth, size), expected)
    labels = torch.tensor([0, 7, 150])[torch.randint(3, (2, 6, 9), generator=torch.Generator().manual_seed(0))]
    labels[:, :2] = IGNORE
    resized = resize_map(labels, size)
    assert resized.shape == (2, *size) and resized.dtype == torch.long
    assert set(resized.unique().tolist()) <= {IGNORE, 0, 7, 150}
    assert bool((resized[:, 0] == IGNORE).all())


def test_labels_grow_into_blocks():
    labels = randn(2, 6, 9).gt(0).long()
    assert torch.equal(resize_map(labels, (12, 27)), labels.repeat_interleave(2, dim=1).repeat_interleave(3, dim=2))


# A task is one value

def _draw_points(points: torch.Tensor, labels: tuple[str, ...]) -> torch.Tensor:
    picture = torch.full((len(points), 3, 8, 8), -1.0)
    for image, places in zip(picture, ((points + 1) * 4).long().clamp(0, 7), strict=True):
        image[:, places[:, 1], places[:, 0]] = 1
    return picture


def _points_of(picture: torch.Tensor, preprocess: Preprocess, labels: int) -> torch.Tensor:
    places = (preprocess.frame(picture, "nearest-exact").mean(1) > 0).nonzero()[:labels, 1:].flip(1)
    return (places[None] + 0.5) / 4 - 1


POINTS = Task(half_mse, normalized_mse, proximity, from_map=_points_of, preview=_draw_points, croppable=True)


class CentreOfMass(torch.nn.Module):
    """The centre of light of each colour of an image, (B, 3, 2) in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        light = self.gain * (image + 1.01)
        y, x = (torch.linspace(-1, 1, side + 1)[:-1] + 1 / side for side in image.shape[2:])
        moments = torch.stack([(light * x).sum((2, 3)), (light * y[:, None]).sum((2, 3))], 2)
        return moments / light.sum((2, 3))[..., None]


def test_a_new_task_is_one_value(monkeypatch):
    """Energy, distillation, targets from images and drawings, cut-outs and the preview follow from it alone."""
    monkeypatch.setitem(TASKS, "example", POINTS)
    guider = Guider("test/example", IgnoreSigma(CentreOfMass()), Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3), "example",
                    labels=("red", "green", "blue"))
    image, sigma = images(), torch.zeros(3)
    points = guider.predict(image, sigma)
    assert points.shape == (3, 3, 2)

    own, other = guider.aim(image_target(guider, image)), guider.aim(image_target(guider, image.flip(3)))
    assert own.energy(image, sigma).max() < 1e-6 < other.energy(image, sigma).min()
    assert bool((own.score(image, sigma) > 0.999).all())

    still, moved = (TASKS["example"].distance(points, guider.predict(seen, sigma)) for seen in (image, image.flip(3)))
    assert still.max() < 1e-6 < moved.min()

    drawn = torch.full((1, 3, 8, 8), -1.0)
    for x, y in ((1, 2), (6, 3), (4, 7)):
        drawn[..., y, x] = 1
    target = map_target(guider, drawn)
    assert target.shape == (1, 3, 2) and torch.equal(_draw_points(target, ()), drawn)
    assert guider.aim(target).energy(image, sigma).shape == (3,)

    assert visualize(guider, image).shape == (3, 3, 8, 8)
    assert with_cutouts(own, 2).energy(image, sigma).shape == (3,)
    with says(ValueError, "example", "a mask"):
        mask_target(guider, torch.ones(1, 8, 8), "red")
