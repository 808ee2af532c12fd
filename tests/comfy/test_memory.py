"""Guiders under ComfyUI's memory management: counted, freed, shared, and with room for their gradients."""
import copy
import gc
import os
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import says
from helpers.worlds import PixelWorld

GB = 1024**3


@pytest.fixture(scope="module")
def world(comfy) -> PixelWorld:
    return PixelWorld(comfy)


class Own(torch.nn.Module):
    """A small classifier of our own, in the place of one that was loaded."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, 2), torch.nn.SiLU(), torch.nn.Flatten(),
                                          torch.nn.Linear(1568, 8))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


def guider_of(world: PixelWorld, net: torch.nn.Module) -> Any:
    """The classifier of the tiny world with another network."""
    return replace(world.guider, name="own", net=world.comfy.pack.ppap_core.guiders.guider.IgnoreSigma(net))


def guided_model(world: PixelWorld, *guiders: Any) -> Any:
    """A model with an Apply Guidance for each guider."""
    model = world.model
    for guider in guiders:
        [model] = world.comfy("PPAPApplyGuidance", model=model, terms=world.term(guider), max_rms=0.0)
    return model


# Loading and freeing

def test_guiders_are_loaded_while_the_model_samples(world: PixelWorld):
    """Each guider is among ComfyUI's loaded models."""
    import comfy.model_management as management
    import comfy.model_patcher

    seen, model = [], guided_model(world, world.guider)
    model.set_model_sampler_post_cfg_function(
        lambda args: seen.append([each.model for each in management.current_loaded_models]) or args["denoised"])
    management.unload_all_models()
    world.sample(model)
    for loaded in seen:
        [patcher] = [each for each in loaded if each.model is world.guider.net]
        assert isinstance(patcher, comfy.model_patcher.ModelPatcher) and patcher.model_size() > 0
    assert len(seen) == 5


def test_sampling_goes_on_after_everything_was_unloaded(world: PixelWorld):
    import comfy.model_management as management

    model = guided_model(world, world.guider)
    first = world.sample(model)
    management.unload_all_models()
    assert torch.equal(world.sample(model), first)


def test_a_network_that_is_not_used_any_more_is_freed(world: PixelWorld):
    import comfy.model_management as management

    def sample() -> weakref.ref:
        guider = guider_of(world, Own())
        world.sample(guided_model(world, guider))
        return weakref.ref(guider.net)
    network = sample()
    management.unload_all_models()
    gc.collect()
    assert network() is None


class Full(Own):
    """A network for which there is never enough memory."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_running_out_of_memory_leaves_the_model_as_it_was(world: PixelWorld):
    plain, guided = world.sample(), world.guided()
    model = guided_model(world, guider_of(world, Full()))
    with says(torch.OutOfMemoryError, "own", "single image", "32 x 32"):
        world.sample(model)
    assert torch.equal(world.sample(), plain) and torch.equal(world.guided(), guided)
    with says(torch.OutOfMemoryError, "own"):
        world.sample(model)


def test_a_copied_network_has_a_patcher_of_its_own(comfy, pixels: PixelWorld):
    """A copy, such as one without values that is measured, takes nothing along that ComfyUI manages."""
    memory, net = comfy.pack.nodes.bridge.memory, pixels.plain.net
    patcher = memory.patcher_of(net)
    copied = copy.deepcopy(net)
    assert memory.pack_data(copied) == memory.PackData()
    assert memory.patcher_of(copied).model is copied and memory.patcher_of(net) is patcher


# Room for gradients

@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """The arguments of load_models_gpu, call by call."""
    import comfy.model_management as management

    calls, load = [], management.load_models_gpu

    def spy(models, **settings):
        calls.append(settings)
        return load(models, **settings)
    monkeypatch.setattr(management, "load_models_gpu", spy)
    return calls


def needed(world: PixelWorld, asked: list[dict], model: Any = None, **changes: Any) -> float:
    """The memory that one sampling asks for beside the weights, at best and at least."""
    asked.clear()
    world.sample(model, **changes)
    return torch.tensor([asked[0]["memory_required"], asked[0]["minimum_memory_required"]], dtype=torch.float64)


def test_comfyui_keeps_memory_free_for_the_gradients(comfy, world: PixelWorld, asked: list[dict]):
    told = comfy.pack.ppap_core.guidance.memory.gradient_bytes
    for batch in (1, 3):
        latent = {"samples": torch.zeros(batch, 3, 32, 32)}
        more = (needed(world, asked, guided_model(world, world.guider), latent_image=latent)
                - needed(world, asked, latent_image=latent))
        assert more.tolist() == pytest.approx([1.5 * told(world.guider, (batch, 3, 32, 32))] * 2)


def test_the_largest_guider_decides_the_memory(world: PixelWorld, asked: list[dict]):
    """Guiders run one after another, so that the largest counts."""
    small, large = guider_of(world, Own()), world.guider
    plain = needed(world, asked)
    alone = [needed(world, asked, guided_model(world, guider)) - plain for guider in (small, large)]
    assert (alone[0] < alone[1]).all() and (alone[0] > 0).all()
    for order in ((small, large), (large, small)):
        assert torch.equal(needed(world, asked, guided_model(world, *order)) - plain, alone[1])
    [both] = world.comfy("PPAPCombineTerms", first=world.term(large), second=world.term(small))
    [combined] = world.comfy("PPAPApplyGuidance", model=world.model, terms=both, max_rms=0.0)
    assert torch.equal(needed(world, asked, combined) - plain, alone[1])


def test_a_guider_of_weight_0_takes_no_room(world: PixelWorld, asked: list[dict]):
    [model] = world.comfy("PPAPApplyGuidance", model=world.model, terms=world.term(weight=0.0), max_rms=0.0)
    assert torch.equal(needed(world, asked, model), needed(world, asked))


def test_training_frees_all_other_memory(world: PixelWorld, asked: list[dict]):
    """Only the guider and its experts stay loaded."""
    import comfy.model_management as management

    world.samples()
    asked.clear()
    guider = world.experts()
    [training] = asked
    assert training["memory_required"] > 1e18 and training["force_full_load"]
    loaded = {id(each.model.model) for each in management.current_loaded_models}
    assert {id(world.plain.net), id(guider.net)} <= loaded


def test_above_a_quarter_of_memory_one_image_is_asked_for(comfy, world: PixelWorld, asked: list[dict], monkeypatch):
    import comfy.model_management as management

    def room(total: float, batch: int) -> float:
        monkeypatch.setattr(management, "get_total_memory", lambda *args, **kwargs: total)
        latent = {"samples": torch.zeros(batch, 3, 32, 32)}
        return (needed(world, asked, guided_model(world, world.guider), latent_image=latent)
                - needed(world, asked, latent_image=latent))[0].item()
    one, three = room(64 * GB, 1), room(64 * GB, 3)
    assert three == pytest.approx(3 * one, rel=0.01)
    assert room(4 * 2 * one, 3) == pytest.approx(2 * one) and room(4 * 0.5 * one, 3) == one


class Follows(Own):
    """A network that asks for a number before it goes on, so that nothing can be told without numbers."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image) * (2.0 if image.mean().item() > 0 else 1.0)


def test_a_network_that_cannot_be_told_is_sampled_all_the_same(world: PixelWorld, asked: list[dict], caplog):
    guided = guided_model(world, guider_of(world, Follows()))
    assert torch.equal(needed(world, asked, guided), needed(world, asked)) and "own" in caplog.text
    assert not torch.equal(world.sample(guided), world.sample())


def test_gradients_through_the_model_ask_for_half_the_device(comfy, world: PixelWorld, asked: list[dict]):
    """The activations that a model keeps are not known beforehand."""
    import comfy.model_management as management

    whole = management.get_total_memory(world.model.load_device)
    [term] = comfy("PPAPGuidanceTerm", guider=world.guider, weight=0.5, start_percent=0.0, end_percent=1.0,
                   factor_at_start=1.0, factor_at_end=1.0, view="own", gradient="through the model")
    through = comfy("PPAPApplyGuidance", model=world.model, terms=term, max_rms=0.0)[0]
    more = needed(world, asked, through) - needed(world, asked, guided_model(world, world.guider))
    assert torch.allclose(more, torch.tensor(whole / 2, dtype=torch.float64))


def test_the_conditioning_of_the_sampling_stays_as_it_was(comfy, world: PixelWorld):
    import comfy.controlnet

    given, conds = [], {"positive": [{"control": comfy.controlnet.ControlBase()}]}
    wrapper = world.comfy.pack.nodes.bridge.memory.GradientMemory([world.guider], False, "ppap").reserve

    def executor(model, noise_shape, conds, model_options=None):
        given.append((conds, model_options))
        return "model", conds, ["more"]
    found = wrapper(executor, world.model, (2, 3, 32, 32), conds, model_options={"a": 1})
    assert found == ("model", conds, ["more"]) and found[1] is conds and list(conds) == ["positive"]
    [(passed, options)] = given
    assert passed["positive"] is conds["positive"] and options == {"a": 1}
    [room] = [each["control"] for each in passed["ppap"]]
    assert room.get_models() == [] and room.inference_memory_requirements(torch.float16) > 0


# The type to compute in

@pytest.mark.parametrize(("weights", "cast"), [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None),
                                               (torch.float8_e4m3fn, torch.bfloat16), (torch.float32, torch.float16)])
def test_guiders_compute_in_the_type_of_the_model(comfy, weights: torch.dtype, cast: torch.dtype | None):
    model = SimpleNamespace(get_model_object={"manual_cast_dtype": cast}.get,
                            model=SimpleNamespace(get_dtype=lambda: weights))
    assert comfy.pack.nodes.bridge.memory.compute_type(model) == (cast or weights)


def test_a_model_in_half_precision_is_guided_in_half_precision(comfy, world: PixelWorld):
    class Watch(Own):
        types: list = []

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            self.types.append(super().forward(image).dtype)
            return super().forward(image)

    half = world.model.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    half.set_model_unet_function_wrapper(lambda model, given: given["input"] * 0.1)
    for model, expected in ((half, torch.bfloat16), (world.model, torch.float32)):
        Watch.types.clear()
        [guided] = comfy("PPAPApplyGuidance", model=model, terms=world.term(guider_of(world, Watch())), max_rms=0.0)
        assert world.sample(guided).isfinite().all() and set(Watch.types[1:]) == {expected}


# One network for each folder

@pytest.fixture
def folder(comfy, monkeypatch):
    """A folder among the guiders, and how often one was read."""
    import folder_paths

    place = Path(folder_paths.get_folder_paths("ppap_guiders")[0]) / "some net"
    place.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (place / name).write_text("{}")
    reads = []

    def read(found, answer, find_backbone):
        reads.append((found.name, answer))
        guider = comfy.pack.ppap_core.tinyworld.loaders.load_guider("class")
        return replace(guider, name=found.name)
    monkeypatch.setattr(comfy.pack.ppap_core.guiders.loaders, "load_guider", read)
    return SimpleNamespace(place=place, reads=reads)


def test_a_folder_is_read_once_while_its_network_is_in_use(comfy, folder):
    [first] = comfy("PPAPLoadGuider", guider_name="some net")
    kept = first.aim(torch.tensor([1]))
    del first
    gc.collect()
    [second] = comfy("PPAPLoadGuider", guider_name="some net")
    assert folder.reads == [("some net", "own")] and second.net is kept.net
    assert second == replace(kept, target=None) and second.labels


def test_nothing_is_kept_for_networks_that_are_not_in_use(comfy, folder):
    network = weakref.ref(comfy("PPAPLoadGuider", guider_name="some net")[0].net)
    gc.collect()
    assert network() is None
    comfy("PPAPLoadGuider", guider_name="some net")
    assert len(folder.reads) == 2


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_changed_is_read_again(comfy, folder, file: str):
    [before] = comfy("PPAPLoadGuider", guider_name="some net")
    (folder.place / file).write_text("{ }")
    os.utime(folder.place / file, (1, 1))
    [after] = comfy("PPAPLoadGuider", guider_name="some net")
    assert len(folder.reads) == 2 and after.net is not before.net
    (folder.place / "tokenizer.json").unlink(missing_ok=True)


def test_what_is_read_of_a_network_tells_it_apart(comfy, folder):
    load = comfy.pack.nodes.bridge.guider_cache.load_guider
    own, structure, again = load("some net"), load("some net", "structure"), load("some net", "structure")
    assert folder.reads == [("some net", "own"), ("some net", "structure")]
    assert structure.net is again.net is not own.net


def test_two_loaded_guiders_steer_with_one_network(comfy, world: PixelWorld):
    import comfy.model_management as management

    [other] = comfy("PPAPLoadGuider", guider_name="tinyworld/class")
    assert other.net is world.plain.net
    [other] = comfy("PPAPAimAtClass", guider=other, classes="disk")
    management.unload_all_models()
    assert world.guided(world.term(other, terms=world.term())).isfinite().all()
    assert [each.model.model for each in management.current_loaded_models].count(other.net) == 1
