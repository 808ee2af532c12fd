"""A guider: network, target, prompt, energy, parts of the image. Preprocessing and targets have their own files."""
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from helpers import EXAMPLES, H, SmallNet, W, fixed_weights, images, level, randn, says, small_guider
from torch import Tensor, nn

from ppap_core.guiders.cutouts import cut_outs
from ppap_core.guiders.guider import Guider, IgnoreSigma, clean, short_labels
from ppap_core.guiders.preprocess import Preprocess
from ppap_core.guiders.rules import RULES, rule_guider
from ppap_core.guiders.targets import image_target
from ppap_core.guiders.tasks import TASKS, resize_map

DENSE = {name for name, task in TASKS.items() if task.dense}


def test_a_plain_network_is_frozen_and_ignores_noise_levels():
    net = SmallNet().train()
    ignore = IgnoreSigma(net)
    image = randn(3, 3, 12, 16)
    assert torch.equal(ignore(image, torch.zeros(3)), ignore(image, torch.full((3,), 50.0)))
    assert not net.training and not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_energy_and_score_see_the_preprocessed_image(task):
    guider, image = small_guider(task), images()
    output = guider.net.net(guider.preprocess(image))
    loss = TASKS[task].loss(output, EXAMPLES[task].target)
    assert torch.equal(guider.energy(image, clean(image)), loss * (3 * H * W) if TASKS[task].sum_over_pixels else loss)
    assert torch.equal(guider.score(image, clean(image)), TASKS[task].score(output, EXAMPLES[task].target))


@pytest.mark.parametrize("task", TASKS)
def test_an_energy_does_not_depend_on_the_rest_of_the_batch(task):
    guider, image = small_guider(task), images()
    whole = guider.energy(image, clean(image))
    for i in range(3):
        torch.testing.assert_close(guider.energy(image[i:i + 1], torch.zeros(1)), whole[i:i + 1], rtol=1e-5, atol=1e-5)


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
    target = EXAMPLES[task].target.repeat(count, *(1,) * (EXAMPLES[task].target.ndim - 1))
    with says(ValueError, f"for {count} images", "but 3"):
        small_guider(task).aim(target).energy(images(), torch.zeros(3))


@pytest.mark.parametrize("height, width", [(8, 6), (12, 16), (3, 16)])
@pytest.mark.parametrize("task", sorted(DENSE))
def test_a_target_map_of_another_size_than_the_output_is_resized(task, height, width):
    target = resize_map(EXAMPLES[task].target.flip(-1), (height, width))
    guider, image = small_guider(task), images()
    expected = guider.aim(resize_map(target, (6, 8)))
    assert torch.equal(guider.aim(target).energy(image, clean(image)), expected.energy(image, clean(image)))
    assert torch.equal(guider.aim(target).score(image, clean(image)), expected.score(image, clean(image)))


@pytest.mark.parametrize("task, shape", [
    ("depth", (1, 3, 6, 8)), ("depth", (1, 6, 8)), ("depth", (1, 1)), ("mask", (1, 2, 6, 8)),
    ("segmentation", (1, 2, 6, 8)), ("segmentation", (1, 2))])
def test_a_target_map_with_other_channels_is_refused(task, shape):
    expected = "(height, width)" if task == "segmentation" else "(1, height, width)"
    with says(ValueError, f"small/{task}", str(shape[1:]), expected, "aim it"):
        small_guider(task).aim(torch.zeros(shape)).energy(images(), torch.zeros(3))


@pytest.mark.parametrize("task", TASKS)
def test_an_image_meets_its_own_target_best(task):
    """The target that a guider reads in it."""
    guider, image = small_guider(task), images()
    aimed = guider.aim(image_target(guider, image))
    own = aimed.energy(image, clean(image))
    assert not aimed.target.requires_grad
    for other in (EXAMPLES[task].target, image_target(guider, image.flip(0)), image_target(guider, -image)):
        assert bool((own <= guider.aim(other).energy(image, clean(image))).all())
    if not TASKS[task].names_classes:
        torch.testing.assert_close(aimed.score(image, clean(image)), torch.ones(3))


def test_a_network_that_uses_the_noise_level_gets_it():
    def net(image, sigma):
        return image.mean(dim=(2, 3)) * sigma[:, None]
    guider = Guider("toy", net, Preprocess((H, W)), "class", tuple("abc"), target=torch.tensor([1]))
    image = images()
    assert torch.equal(guider.predict(image, level(2.0, image)), 2 * guider.predict(image, level(1.0, image)))


# Networks that are asked about a text

class Asked(nn.Module):
    """A mask network that multiplies its features by what it is asked for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)

    def forward(self, image: Tensor, prompt: Tensor) -> Tensor:
        return (self.conv(image) * prompt[:, :, None, None]).sum(1, keepdim=True)


def asked(prompt: Tensor | None) -> Guider:
    return replace(small_guider("mask"), net=IgnoreSigma(fixed_weights(Asked())), prompt=prompt)


def test_a_prompt_is_for_all_images_or_one_for_each():
    image, prompts = images(), randn(3, 6, seed=3)
    each = asked(prompts).energy(image, clean(image))
    for i in range(3):
        one = asked(prompts[i:i + 1])
        torch.testing.assert_close(one.energy(image[i:i + 1], torch.zeros(1)), each[i:i + 1])
        torch.testing.assert_close(one.energy(image, clean(image))[i], each[i])
    assert not torch.equal(asked(prompts[:1]).energy(image, clean(image)), asked(prompts[1:2]).energy(image, clean(image)))


def test_without_a_prompt_the_network_sees_the_image_only():
    def net(*inputs: Tensor) -> Tensor:
        assert len(inputs) == 2
        return inputs[0].mean(dim=(2, 3))
    replace(small_guider(), net=net, target=torch.tensor([1])).energy(images(), torch.zeros(3))


def test_targets_made_in_inference_mode_pass_gradients():
    """Targets and prompts made in inference mode take part in gradients."""
    with torch.inference_mode():
        prompt, target = randn(1, 6, seed=3), torch.rand(1, 1, 6, 8)
    image = images().requires_grad_()
    asked(prompt).aim(target).energy(image, clean(image)).sum().backward()
    assert bool(image.grad.abs().sum((1, 2, 3)).gt(0).all())


# Parts of the image

@pytest.mark.parametrize("task", TASKS)
def test_no_parts_change_no_bit(task):
    guider, image = small_guider(task), images().requires_grad_()
    plain, none = (torch.autograd.grad(each.energy(image, level(1.5, image)).sum(), image)[0]
                   for each in (guider, replace(guider, cutouts=0)))
    assert torch.equal(plain, none)
    assert torch.equal(guider.energy(image, level(1.5, image)), replace(guider, cutouts=0).energy(image, level(1.5, image)))


@pytest.mark.parametrize("task", sorted(set(TASKS) - DENSE))
def test_with_cut_outs_the_energy_is_the_mean_of_all_parts(task):
    """The whole image is one of them."""
    guider, image = small_guider(task), images()
    parts = [image, *cut_outs(image, 5, 1.5)]
    expected = sum(TASKS[task].loss(guider.predict(part, clean(part)), guider.target) for part in parts) / 6
    expected = expected * 3 * H * W if TASKS[task].sum_over_pixels else expected
    torch.testing.assert_close(replace(guider, cutouts=5).energy(image, level(1.5, image)), expected)


@pytest.mark.parametrize("cutouts", [1, 4])
@pytest.mark.parametrize("task", ["class", "embedding", "number"])
def test_energies_with_cut_outs_repeat_for_single_images(task, cutouts):
    """Images one by one have the energies that they have in a batch."""
    guider, image = replace(small_guider(task), cutouts=cutouts), images()
    energy = guider.energy(image, level(1.5, image))
    assert torch.equal(guider.energy(image, level(1.5, image)), energy)
    assert not torch.equal(guider.energy(image, level(1.25, image)), energy)  # other places at the next noise level
    for i in range(3):
        torch.testing.assert_close(guider.energy(image[i:i + 1], image.new_tensor([1.5])), energy[i:i + 1],
                                   rtol=1e-5, atol=1e-5)


# Names of classes

@pytest.mark.parametrize("descriptions, names", [
    (["tench, Tinca tinca", "goldfish"], ("tench", "goldfish")),
    (["crane", "crane, bird"], ("crane", "bird")),
    (["crane", "crane"], ("crane", "crane 1")),
    (["Cardigan, Cardigan Welsh corgi", "cardigan"], ("Cardigan", "cardigan 1")),
    ([], ()),
])
def test_every_class_gets_a_short_name_of_its_own(descriptions, names):
    assert short_labels(descriptions) == names


@pytest.mark.parametrize("name", RULES)
def test_rules_are_guiders_like_any_other(name):
    guider, image = rule_guider(name), images()
    aimed = guider if guider.target is not None else guider.aim(image_target(guider, images(1, seed=1)))
    assert aimed.energy(image, clean(image)).shape == aimed.score(image, clean(image)).shape == (3,)
