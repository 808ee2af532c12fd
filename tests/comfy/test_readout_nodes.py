"""Readouts in a real ComfyUI: distilled on a model's features, they guide it, and are saved and refused like experts."""
from typing import Any

import pytest
import torch
from helpers import says
from helpers.worlds import LatentWorld, PixelWorld

SETTINGS = {"heads": 2, "steps": 40, "batch_size": 16, "learning_rate": 3e-3, "seed": 0}


@pytest.fixture(scope="module")
def readout(pixels: PixelWorld) -> Any:
    """A readout of the tiny classifier, aimed at stars, after a short training."""
    samples = pixels.samples(name="readout", steps=6)
    return pixels.comfy("PPAPDistillReadout", model=pixels.model, samples=samples, guider=pixels.guider,
                        positive=pixels.conditioning, **SETTINGS)


def test_a_readout_leads_to_what_the_plain_guider_sees(pixels: PixelWorld, readout: Any):
    guider, losses = readout
    assert all(sum(head[-10:]) < sum(head[:10]) for head in losses.values())
    plain, guided = pixels.sample(), pixels.guided(pixels.term(guider, weight=0.5, strength="balanced"))
    print(pixels.energy(pixels.guider, plain), pixels.energy(pixels.guider, guided))
    assert guided.isfinite().all()
    assert pixels.energy(pixels.guider, guided).mean() < pixels.energy(pixels.guider, plain).mean() - 0.5


def test_weight_0_of_a_readout_changes_nothing(pixels: PixelWorld, readout: Any):
    assert torch.equal(pixels.guided(pixels.term(readout[0], weight=0.0)), pixels.sample())
