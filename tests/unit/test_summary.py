"""What guidance did, in words: also what it did not do."""
from dataclasses import replace

import pytest
import torch
from helpers import images, level, small_guider
from helpers.real import guider_folder, photograph
from torch import nn
from torch.nn import functional as F

from ppap_core.guidance.gradients import energy_at
from ppap_core.guidance.precision import RunState
from ppap_core.guidance.scrutiny import MAX_RETURN, blurring, is_fooled, may_be_fooled, share_taken_back
from ppap_core.guidance.terms import TermRecord
from ppap_core.guiders.guider import Guider, IgnoreSigma, clean
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.preprocess import Preprocess
from ppap_core.guiders.rules import rule_guider
from ppap_core.guiders.targets import class_target
from ppap_core.viz.summary import guidance_warnings, summarize_guidance


def records(*steps: tuple, term: int = 0) -> list[TermRecord]:
    """One record for each (rms, more of TermRecord)."""
    return [TermRecord(term, 5.0 - step, torch.tensor([2.0, 2.0]), torch.tensor([rms, rms]), *more)
            for step, (rms, *more) in enumerate(steps)]


def test_a_run_without_faults_has_no_warnings():
    good = records((0.1,), (0.2,))
    assert summarize_guidance(["a"], good, 2).endswith("at most") and guidance_warnings(["a"], good, 2) == ""
    assert summarize_guidance(["a"], [], 0) == "nothing was sampled" and guidance_warnings(["a"], [], 0) == ""


CASES = {
    "not finite anywhere": (records((0.0, 2), (0.0, 2)), "moved nothing", "not finite"),
    "zero everywhere": (records((0.0,), (0.0,)), "moved nothing", "gradient is zero"),
    "not finite once": (records((0.1,), (0.0, 2), (0.1,)), "without a gradient in 1 of", "1 not finite"),
    "one image not finite": (records((0.1,), (0.1, 1), (0.1,)), "without a gradient in 1 of", "1 not finite"),
    "zero once": (records((0.1,), (0.0,)), "without a gradient in 1 of", "0 not finite"),
    "never asked": ([], "at work in none of 3 steps"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_term_that_does_nothing_is_told_and_warned_of(name):
    found, *words = CASES[name]
    for text in (summarize_guidance(["a"], found, 3), guidance_warnings(["a"], found, 3)):
        assert len(text.splitlines()) == 1 and "a: " in text and all(word in text for word in words)
    assert guidance_warnings(["a"], found, 3).startswith("warning: ")


def test_each_term_has_one_line_with_its_own_notes():
    both = records((0.1,)) + records((0.1, 0, torch.bfloat16), (0.1, 0, torch.bfloat16), term=1)
    first, second = summarize_guidance(["a", "b"], both, 2, [(1, "seen only by the guider")]).splitlines()
    assert first.endswith("at most")
    assert "computed in bfloat16 in 2 of them" in second and second.endswith("seen only by the guider")
    assert guidance_warnings(["a", "b"], both, 2, [(1, "seen")]) == "warning: b: seen"  # another type is no fault


def test_records_of_earlier_versions_are_read():
    """They ended with the size of the shift."""
    old = TermRecord(*(0, 1.0, torch.ones(2), torch.ones(2)))
    assert (old.unguided, old.fallback) == (0, None)
    assert guidance_warnings(["a"], [old], 1) == ""


# Seen only by the guider

class Checkers(nn.Module):
    """Logits of two classes: how much of a checkerboard of single pixels there is."""

    def forward(self, image):
        sign = 1 - 2 * ((torch.arange(image.shape[-2])[:, None] + torch.arange(image.shape[-1])) % 2)
        strength = 40 * (image * sign).mean((1, 2, 3))
        return torch.stack([strength, -strength], 1)


def share(guider: Guider, before: torch.Tensor, after: torch.Tensor) -> float:
    """Share of the fall of the energy that a blur takes back."""
    first, last = (guider.energy(image, clean(image)) for image in (before, after))
    blurred = energy_at(blurring(guider, after), after, clean(after))
    return share_taken_back(first.detach(), last.detach(), blurred.detach())


def pushed(guider: Guider, image: torch.Tensor, steps: int = 40, size: float = 0.008) -> torch.Tensor:
    """The image moved along the raw gradient of the energy, with nothing that keeps it an image."""
    for _ in range(steps):
        point = image.clone().requires_grad_(True)
        [gradient] = torch.autograd.grad(guider.energy(point, clean(point)).sum(), point)
        image = (image - size * gradient / gradient.square().mean().sqrt()).clamp(-1, 1)
    return image


def test_a_pattern_of_single_pixels_is_found():
    guider = Guider("checkers", IgnoreSigma(Checkers()), Preprocess((1, 1), fit="own"), "class", ("yes", "no"),
                    target=torch.tensor([1]))
    image = 0.1 * images()
    assert share(guider, image, pushed(guider, image, 10)) > 0.9


def test_the_blur_is_a_pixel_of_the_image_where_it_is_enlarged():
    """Of the network's input where the image is made smaller."""
    seen = []
    guider = Guider("watch", lambda image, sigma: seen.append(image) or image.mean((2, 3)), Preprocess((60, 60)), "number",
                    target=torch.zeros(1, 3))
    for side in (20, 120):
        dot = torch.zeros(1, 3, side, side)
        dot[..., side // 2, side // 2] = 1
        blurring(guider, dot).energy(dot, clean(dot))
    wide, narrow = ((image[0, 0].mean(0) > 0.1 * image[0, 0].mean(0).max()).sum() for image in seen)
    assert wide > 2 * narrow


def test_what_a_blur_leaves_is_not_called_fooled():
    guider, image = small_guider(), images()
    flat = torch.zeros_like(image) + image.mean((2, 3), keepdim=True)
    assert not is_fooled(share(guider.aim(torch.tensor([0])), image, flat)) and not is_fooled(share(guider, image, image))


def test_an_energy_that_hardly_fell_is_not_judged():
    ten, nine, twelve = (torch.tensor([value]) for value in (10.0, 9.0, 12.0))
    assert share_taken_back(ten, nine, twelve) == 0.0 and share_taken_back(nine, ten, twelve) == 0.0
    assert share_taken_back(ten, torch.tensor([2.0]), torch.tensor([6.0])) == pytest.approx(0.5)
    assert share_taken_back(ten, torch.tensor([float("nan")]), nine) == 0.0


def test_a_blurred_image_is_judged_in_the_type_of_the_run():
    guider, image = small_guider(), images()
    exact = energy_at(blurring(guider, image), image, level(0.5, image))
    for compute in (torch.float16, torch.bfloat16):
        rough = energy_at(blurring(guider, image), image, level(0.5, image), compute)
        torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.02)
        assert not torch.equal(rough, exact)
        assert RunState(fallbacks={0: torch.bfloat16}).as_computed(0, guider, compute) == (guider, torch.bfloat16)


def test_a_decoded_image_tells_the_size_of_a_pixel():
    guider = replace(small_guider(), decode=lambda latent, sigma: F.interpolate(latent, scale_factor=8))
    blurred = blurring(guider, images())
    energy_at(blurred, images(), clean(images()))
    assert blurred.net.side == 8 * min(images().shape[-2:])


def test_only_networks_that_moved_an_image_are_tested():
    """The test costs a forward pass."""
    fell = [TermRecord(0, sigma, torch.tensor([energy]), torch.tensor([0.1])) for sigma, energy in ((5.0, 4.0), (0.1, 1.0))]
    assert may_be_fooled(small_guider(), fell) and not may_be_fooled(small_guider(), fell[::-1])
    assert not may_be_fooled(small_guider(view="noisy"), fell) and not may_be_fooled(rule_guider("sharpness"), fell)
    assert not may_be_fooled(small_guider(), [record._replace(rms=torch.tensor([1e-6])) for record in fell])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "true", "other"),
                         [("chelsea", "Egyptian cat", "goldfish"), ("coffee", "espresso", "castle")])
def test_a_real_network_that_is_fooled_is_found(name, true, other):
    """ImageNet's EfficientNet: a photograph of the class is honest, a raw push towards another one is not."""
    lite, photo = load_guider(guider_folder("tf_efficientnet_lite0")), photograph(name)
    side = min(photo.shape[-2:])
    photo = F.interpolate(photo[..., :side, :side], (256, 256), mode="area")
    honest, fooled = (lite.aim(class_target(lite, words)) for words in (true, other))
    assert share(honest, torch.zeros_like(photo), photo) < MAX_RETURN / 4
    assert share(fooled, photo, pushed(fooled, photo, 20)) > MAX_RETURN
