"""A file of experts among people: the nodes say on which model they were distilled, and guide others of its latents."""
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import says
from helpers.worlds import LatentWorld

SAVED = Path(__file__).parents[1] / "fixtures" / "core"


@pytest.fixture(scope="module")
def world(comfy) -> LatentWorld:
    return LatentWorld(comfy)


@pytest.fixture(scope="module")
def experts(comfy, world: LatentWorld) -> Any:
    """A guider with experts of the flow model, on latents of two by two places."""
    samples = comfy("PPAPGenerateSamples", name="shared", count=64, steps=3, cfg=1.0, sampler_name="euler",
                    scheduler="simple", seed=0, model=world.model("flow"), positive=world.nothing, vae=world.vae,
                    latent_image={"samples": torch.zeros(32, 16, 2, 2)})[0]
    return comfy("PPAPDistilExperts", samples=samples, guider=world.guider, view="denoised", experts=2, sigma_min=0.0,
                 sigma_max=0.0, steps=2, batch_size=4, learning_rate=1e-2, rank=2, alpha=2.0, seed=0)[0]


def told(comfy, node: str, **inputs: Any) -> tuple[Any, str]:
    """The first output of a node, and the text that it shows."""
    with torch.inference_mode():
        made = comfy.registered[node].execute(**inputs)
    return (made.args or [None])[0], made.ui["text"][0]


def term(comfy, guider: Any) -> tuple:
    return comfy("PPAPGuidanceTerm", guider=guider, weight=0.3, start_percent=0.0, end_percent=1.0, factor_at_start=1.0,
                 factor_at_end=1.0, view="own")[0]


def report(comfy, world: LatentWorld, kind: str, guider: Any) -> str:
    """What the report says of one sampling of a model that experts guide."""
    [model] = comfy("PPAPApplyGuidance", model=world.model(kind), terms=term(comfy, guider), max_rms=0.0)
    [found] = comfy("PPAPGuidanceReport", model=model, latent={"samples": world.sample(model, steps=2)})
    return found.summary()


def test_experts_are_shared_with_another_model(comfy, world: LatentWorld, experts: Any):
    """Saved under a name that says what they are for, loaded with the words, and reported where the model is another."""
    _, saved = told(comfy, "PPAPSaveExperts", guider=experts, file_name="mine")
    assert "To share it, call it tinyworld-guider_class--SD3.safetensors." in saved
    _, again = told(comfy, "PPAPSaveExperts", guider=experts, file_name="tinyworld-guider_class--SD3")
    assert "To share it" not in again
    loaded, text = told(comfy, "PPAPLoadExperts", guider=world.guider, file_name="tinyworld-guider_class--SD3.safetensors")
    assert text.startswith("These experts guide every model of SD3 latents. Distilled on SD3, 64 images, 3 sampling steps")
    assert text in saved
    assert "experts distilled on SD3 guide TinyEpsConfig" in report(comfy, world, "eps", loaded)
    assert "distilled" not in report(comfy, world, "flow", loaded)


def test_a_loaded_model_is_named_by_its_file(comfy):
    [model] = comfy("UNETLoader", unet_name="tinyworld_flow.safetensors", weight_dtype="default")
    origin = comfy.pack.nodes.bridge.fingerprint.origin_of(model)
    assert origin.model == "SD3" and origin.sigma_data == 1.0 and 0 < origin.sigma_min < 1 < origin.sigma_max
    assert origin.file == ("tinyworld_flow.safetensors" if hasattr(model, "cached_patcher_init") else "")


def test_experts_of_pixels_are_refused_for_latents(comfy, world: LatentWorld):
    """A file of version 0.1.0 among them."""
    core = comfy.pack.ppap_core.experts
    bank = core.checkpoint.load_bank(SAVED / "noisy_pixel.safetensors", world.guider)
    experts = core.bank.with_experts(world.guider, bank)
    with says(ValueError, "pixel", "SD3", "distilled for a model of this kind"):
        comfy("PPAPApplyGuidance", model=world.model("eps"), terms=term(comfy, experts), max_rms=0.0)


def test_the_command_line_makes_the_experts_of_the_node(comfy, world: LatentWorld, experts: Any, tmp_path: Path):
    """From the store and the settings alone, and it goes on with the states that the node left."""
    comfy("PPAPSaveExperts", guider=experts, file_name="by the node")
    paths, cli = comfy.pack.nodes.bridge.paths, importlib.import_module(f"{comfy.pack.__name__}.ppap_core.cli")
    states = paths.output_folder("ppap_distillation")
    before = {file: file.stat().st_mtime_ns for file in states.rglob("*.safetensors")}
    with comfy.pack.nodes.bridge.autograd.outside_inference_mode():
        cli.main(["distill", str(paths.output_folder("ppap_samples", "shared")), "tinyworld/class",
                  str(tmp_path / "x.safetensors"), "--experts", "2", "--steps", "2", "--batch", "4", "--lr", "1e-2",
                  "--rank", "2", "--alpha", "2", "--device", "cpu"])
    assert {file: file.stat().st_mtime_ns for file in states.rglob("*.safetensors")} == before
    assert (tmp_path / "x.safetensors").read_bytes() == paths.new_expert_file("by the node").read_bytes()
