"""What guidance could not do is said where the artist looks: in the report, and in the node."""
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.worlds import PixelWorld
from torch import nn


class Dead(nn.Module):
    """A network whose output does not depend on the image."""

    def __init__(self, net: nn.Module, factor: float):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, image: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.net(image, sigma) * self.factor


class Hot(nn.Module):
    """A network that float16 cannot hold, and nothing at all one time."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.levels = net, []

    def forward(self, image: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        if float(sigma[0]) not in self.levels:
            self.levels.append(float(sigma[0]))
        return self.net(image, sigma) * 1e6 / 1e6 / (len(self.levels) != 2)


def nodes_with(comfy: Any, pixels: PixelWorld, net: nn.Module) -> tuple[Any, Any, str]:
    """The outputs of Guided KSampler and Guidance Report, and the text of Guidance Summary, with this network."""
    terms = pixels.term(replace(pixels.guider, net=net), strength="balanced", weight=0.3)
    with torch.inference_mode():
        sampled = comfy.registered["PPAPGuidedKSampler"].execute(model=pixels.model, terms=terms, max_rms=0.0,
                                                                 **pixels.settings())
    [guided] = comfy("PPAPApplyGuidance", model=pixels.model, terms=terms, max_rms=0.0)
    latent = {"samples": pixels.sample(guided)}
    reported = comfy.registered["PPAPGuidanceReport"].execute(model=guided, latent=latent)
    return sampled, reported, comfy("PPAPReadGuidance", report=sampled.args[1])[0]


@pytest.mark.parametrize(("factor", "reason"), [(0.0, "gradient is zero"), (float("nan"), "not finite")])
def test_a_term_that_did_nothing_is_warned_of(comfy, pixels: PixelWorld, factor: float, reason: str):
    sampled, reported, summary = nodes_with(comfy, pixels, Dead(pixels.guider.net, factor))
    for output in (sampled, reported):
        [text] = output.ui["text"]
        assert text.startswith("warning: 1: tinyworld/guider_class: it moved nothing") and reason in text
    assert "moved nothing" in summary and torch.equal(sampled.args[0]["samples"], pixels.sample())


def test_guidance_that_works_warns_of_nothing(comfy, pixels: PixelWorld):
    sampled, reported, summary = nodes_with(comfy, pixels, pixels.guider.net)
    assert sampled.ui is None and reported.ui is None and ";" not in summary


def test_a_weight_of_0_is_no_fault_and_an_empty_mask_is_one(comfy, pixels: PixelWorld):
    terms = pixels.term(mask=torch.zeros(1, 32, 32), terms=pixels.term(weight=0.0))
    _, report = comfy("PPAPGuidedKSampler", model=pixels.model, terms=terms, max_rms=0.0, **pixels.settings(steps=2))
    assert report.summary().count("at work in none of 2 steps") == 2
    assert report.warnings() == "warning: 2: tinyworld/guider_class: at work in none of 2 steps"


def test_fallbacks_and_failed_steps_are_counted(comfy, pixels: PixelWorld, monkeypatch: pytest.MonkeyPatch):
    """The tiny world itself cannot compute in float16; its guider is asked to."""
    monkeypatch.setattr(comfy.pack.nodes.bridge.guidance, "compute_type", lambda model: torch.float16)
    terms = pixels.term(replace(pixels.guider, net=Hot(pixels.guider.net)), strength="balanced", weight=0.3)
    latent, report = comfy("PPAPGuidedKSampler", model=pixels.model, terms=terms, max_rms=0.0, **pixels.settings())
    [summary] = comfy("PPAPReadGuidance", report=report)
    assert "without a gradient in 1 of them (1 not finite)" in summary
    assert "computed in bfloat16 in 4 of them" in summary or "computed in bfloat16 in 5 of them" in summary
    assert latent["samples"].isfinite().all() and "without a gradient" in report.warnings()


def test_layers_without_adapters_are_told_and_no_fault(comfy, pixels: PixelWorld):
    experts = pixels.experts()
    experts.net.left_out = ("stem.grouped",)
    terms = pixels.term(pixels.guider, terms=pixels.term(experts, strength="balanced", weight=0.3))
    _, report = comfy("PPAPGuidedKSampler", model=pixels.model, terms=terms, max_rms=0.0, **pixels.settings())
    with_experts, plain = comfy("PPAPReadGuidance", report=report)[0].splitlines()
    assert "1 of " in with_experts and "stem.grouped" in with_experts and "stem.grouped" not in plain
    assert "stem.grouped" not in report.warnings()


def test_a_report_of_an_earlier_version_is_read(comfy, pixels: PixelWorld):
    """It had neither notes nor remarks."""
    _, report = comfy("PPAPGuidedKSampler", model=pixels.model, terms=pixels.term(), max_rms=0.0, **pixels.settings())
    old = object.__new__(type(report))
    vars(old).update({name: value for name, value in vars(report).items() if name not in ("notes", "remarks")})
    assert comfy("PPAPReadGuidance", report=old) == comfy("PPAPReadGuidance", report=report) and old.warnings() == ""


def test_a_pattern_that_only_the_guider_sees_is_told(comfy, pixels: PixelWorld):
    """A network that looks at nothing but a checkerboard of single pixels."""
    class Checkers(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(40.0), requires_grad=False)

        def forward(self, image: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            rows, columns = (torch.arange(side) for side in image.shape[-2:])
            strength = self.weight * (image * (1 - 2 * ((rows[:, None] + columns) % 2))).mean((1, 2, 3))
            return torch.stack([strength, *7 * [-strength]], 1)

    with torch.inference_mode(False):
        net = Checkers()
    guider = replace(pixels.guider, target=torch.tensor([0]))
    sampled, _, summary = nodes_with(comfy, aimed_at(pixels, guider), net)
    assert "seen only by the guider" in summary and "seen only by the guider" in sampled.ui["text"][0]


def aimed_at(pixels: PixelWorld, guider: Any) -> PixelWorld:
    other = object.__new__(PixelWorld)
    vars(other).update(vars(pixels) | {"guider": guider})
    return other
