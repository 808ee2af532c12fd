"""What experts know, told in the nodes that distil, save and load them."""
import shutil
from typing import Any

import pytest
import torch
from helpers.worlds import PixelWorld

SETTINGS = {"view": "denoised", "experts": 2, "sigma_min": 0.0, "sigma_max": 0.0, "steps": 2, "batch_size": 4,
            "learning_rate": 1e-3, "rank": 1, "alpha": 1.0, "seed": 0}


def told(comfy, node: str, **inputs: Any) -> Any:
    """What a node returned, with the text that it shows."""
    with torch.inference_mode():
        return comfy.registered[node].execute(**inputs)


def test_what_experts_know_is_told_and_goes_with_them(comfy, pixels: PixelWorld, monkeypatch: pytest.MonkeyPatch):
    """Also where the distillation is only loaded. The last prediction is nearly the image, so no expert is needed there."""
    core = comfy.pack.ppap_core.experts
    monkeypatch.setattr(core.samples, "HELD_OUT_SHARE", 1)
    samples = pixels.samples(name="told", latent_image={"samples": torch.zeros(64, 3, 4, 8)})
    unseen, seen = samples.store.held_out.noisy_vp, samples.store.noisy_vp
    assert len(unseen) == len(seen) == 64
    assert torch.cdist(unseen[:, 0].flatten(1).float(), seen[:, 0].flatten(1).float()).min() > 1, "they are not the same"
    made = [told(comfy, "PPAPDistilExperts", samples=samples, guider=pixels.guider, **SETTINGS) for _ in range(2)]
    text = made[0].ui["text"][0]
    assert text == made[1].ui["text"][0] and "64 images that the experts did not learn from" in text
    first, second, conclusion, advice, _ = text.splitlines()
    assert first.endswith("not needed, so the plain network is used"), first
    assert "plain" in second and "commonest answer" in second and "not needed in 1 of 2" in conclusion
    assert "ore images would" in advice
    guider = made[0].args[0]
    image, low = torch.rand(2, 3, 32, 32), torch.full((2,), 0.1)
    with torch.no_grad():
        assert torch.equal(guider.predict(image, low), pixels.plain.predict(image, low))
    saved = told(comfy, "PPAPSaveExperts", guider=guider, file_name="told")
    assert saved.ui["text"][0].endswith(text)
    loaded = told(comfy, "PPAPLoadExperts", guider=pixels.plain, file_name="told.safetensors")
    assert loaded.ui["text"][0].endswith(f".\n{text}") and core.knowledge.knowledge_of(loaded.args[0].net)


def test_samples_of_an_earlier_version_stay_as_they_are(comfy, pixels: PixelWorld, monkeypatch: pytest.MonkeyPatch):
    """They are measured themselves, which is said, and switch no expert off."""
    core = comfy.pack.ppap_core.experts
    settings = {"name": "begun before", "steps": 3, "latent_image": {"samples": torch.zeros(64, 3, 4, 8)}}
    shutil.rmtree(pixels.samples(**settings).store.hold_out().folder)
    monkeypatch.setattr(core.samples, "HELD_OUT_SHARE", 1)
    samples = pixels.samples(**settings)
    assert samples.store.held_out is None
    made = told(comfy, "PPAPDistilExperts", samples=samples, guider=pixels.guider, **SETTINGS)
    text = made.ui["text"][0]
    assert "the experts learned from" in text and "is used" not in text
    weights = made.args[0].net.weights(0)
    assert all(bool(weight.any()) for name, weight in weights.items() if ".lora_B." in name)
