"""Dynamic VRAM, ComfyUI's default on NVIDIA: it needs a GPU to run, so what it leaves on networks is made here with its own
classes, around a native library that only counts."""
import copy
import gc
from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from helpers.features import FEATURES
from helpers.model_families import small
from helpers.streaming import stream
from helpers.workbench import EPS, FLOW, THROUGH, Scene, Workbench, autoguided, ksampler, search, sibling, train_lora
from helpers.worlds import LatentWorld

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def freed(comfy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The native memory that was given back."""
    import comfy.model_patcher

    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    from comfy_aimdo import host_buffer, model_vbar

    found, handles, library = [], iter(range(1000, 9999)), MagicMock()
    library.hostbuf_allocate.side_effect = library.vbar_allocate.side_effect = lambda *size: next(handles)
    library.vbar_get.return_value = 1 << 40
    library.hostbuf_free.side_effect = found.append
    library.vbar_free.side_effect = lambda *which: found.append(which[-1])
    for module in (host_buffer, model_vbar):
        monkeypatch.setattr(module, "lib", library)
        monkeypatch.setattr(module.control, "lib", library)
    monkeypatch.setattr(model_vbar.control, "get_devctx", lambda device: 7)
    return found


def dynamic(patcher: Any) -> Any:
    """A copy of a MODEL as dynamic VRAM loads it on a GPU."""
    import comfy.model_patcher
    from comfy_aimdo.model_vbar import ModelVBAR

    found = comfy.model_patcher.ModelPatcherDynamic(patcher.model, GPU, CPU)
    found.cached_patcher_init = patcher.cached_patcher_init
    found.model.dynamic_vbars[GPU] = ModelVBAR(100, 0)
    for part in found.model.modules():
        if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d)):
            part._v, part._v_weight, part._v_signature = ModelVBAR(10, 0), torch.zeros(2), 3
    return found


def handles_of(net: torch.nn.Module) -> set[str]:
    return {name for part in net.modules() for name in vars(part) if name.startswith(("dynamic_", "_v"))}


def test_a_private_copy_frees_nothing_of_the_original(comfy, freed: list[int]):
    """A private copy holds no handle on the original's memory."""
    net = dynamic(comfy("PPAPTinyLatentWorld", kind="flow")[1].patcher).model
    before = handles_of(net)
    own = comfy.pack.nodes.bridge.memory.private_copy(net)
    assert before and not handles_of(own) and handles_of(net) == before
    assert [part.kernel_size for part in own.modules() if isinstance(part, torch.nn.Conv2d)][0] == (3, 3)
    assert all(torch.equal(*each) for each in zip(own.state_dict().values(), net.state_dict().values(), strict=True))
    del own
    gc.collect()
    assert not freed
    careless = copy.deepcopy(net)
    del careless
    gc.collect()
    assert freed, "what this test counts is not what a plain copy frees"


def test_a_decoder_is_a_private_copy_made_on_demand(comfy, freed: list[int]):
    """The VAE is copied only for guiders that look through it."""
    latents, world = comfy.pack.nodes.bridge.latents, LatentWorld(comfy)
    dynamic(world.vae.patcher)
    made = latents.Decoder(world.vae, world.model("flow"))
    assert not handles_of(made)
    for view, networks in (("denoised", 2), ("noisy", 1)):
        [terms] = comfy("PPAPGuidanceTerm", guider=world.guider, weight=1.0, start_percent=0.0, end_percent=1.0,
                        factor_at_start=1.0, factor_at_end=1.0, view=view)
        assert len(comfy.pack.nodes.bridge.terms.decoders_for(terms, world.model("flow"), world.vae)[1]) == networks


def test_a_gradient_through_the_model_takes_weights_that_stay(comfy, freed: list[int]):
    world = LatentWorld(comfy)
    plain = world.model("flow")
    settings = {"guider": world.guider, "weight": 0.3, "start_percent": 0.0, "end_percent": 1.0, "factor_at_start": 1.0,
                "factor_at_end": 1.0, "view": "own"}

    def guided(model: Any, gradient: str) -> Any:
        [terms] = comfy("PPAPGuidanceTerm", **settings, gradient=gradient)
        return comfy("PPAPApplyGuidance", model=model, terms=terms, max_rms=0.0)[0]

    wanted = world.sample(guided(plain, "through the model"))
    model = dynamic(plain)
    cheap, through = (guided(model, gradient) for gradient in ("in the prediction", "through the model"))
    assert cheap.is_dynamic() and cheap.model is model.model
    assert not through.is_dynamic() and through.model is not model.model
    through.load_device = CPU
    assert torch.equal(world.sample(through), wanted)
    model.cached_patcher_init = None
    streamed = guided(model, "through the model")
    assert streamed.is_dynamic() and streamed.model is model.model


@pytest.mark.parametrize("size", [1, 0], ids=["held in video memory", "in memory of its own"])
@pytest.mark.parametrize("family", [EPS, FLOW])
def test_streamed_weights_stay_while_a_gradient_needs_them(bench: Workbench, freed: list[int], monkeypatch, family: str,
                                                           size: int):
    """A model whose weights are streamed, and which cannot be loaded twice, is steered as one that holds them."""
    with torch.inference_mode():
        scene = Scene(*small(family))
    plain, wanted = ksampler(bench, scene), ksampler(bench, bench.guide(scene, **THROUGH))
    memory = stream([scene.model.model.diffusion_model], monkeypatch, size)
    assert torch.equal(ksampler(bench, scene), plain)
    assert torch.equal(ksampler(bench, bench.guide(scene, **THROUGH)), wanted)
    assert torch.equal(ksampler(bench, scene), plain)
    assert sum(memory.uses) > 0 if size else not any(memory.uses)
    assert not any(memory.users.values()), "memory is held when it is no longer needed"


def test_streamed_weights_that_are_let_go_spoil_a_gradient(bench: Workbench, freed: list[int], monkeypatch):
    """The test above would fail if nothing held the weights."""
    with torch.inference_mode():
        scene = Scene(*small(EPS))
    stream([scene.model.model.diffusion_model], monkeypatch)
    monkeypatch.setattr(bench.comfy.pack.nodes.bridge.autograd, "StreamedWeights", lambda networks: nullcontext())
    latent = ksampler(bench, bench.guide(scene, **THROUGH))
    assert torch.equal(latent, ksampler(bench, scene)), "a gradient that is no number was not left out"


def test_streamed_weights_wait_in_main_memory_if_need_be(bench: Workbench, freed: list[int], monkeypatch):
    """A gradient that runs out of memory goes on with copies of what it needs, streamed weights among them."""
    with torch.inference_mode():
        scene = Scene(*small(FLOW))
    wanted = ksampler(bench, bench.guide(scene, **THROUGH))
    stream([scene.model.model.diffusion_model], monkeypatch)
    monkeypatch.setattr(bench.comfy.pack.nodes.bridge.autograd, "StreamedWeights", out_of_memory)
    assert torch.equal(ksampler(bench, bench.guide(scene, **THROUGH)), wanted)


def out_of_memory(networks: Any) -> None:
    raise torch.OutOfMemoryError


def test_what_runs_beside_the_model_may_be_streamed(bench: Workbench, freed: list[int], monkeypatch):
    """A ControlNet and a bad model with weights of its own let gradients through."""
    with torch.inference_mode():
        scene = Scene(*small(EPS))
    scene, bad = FEATURES["ControlNet"][0](bench, scene), sibling(EPS)
    scene = bench.guide(autoguided(bench, scene, bad, 1.5), **THROUGH)
    wanted = ksampler(bench, scene)
    stream([scene.positive[0][1]["control"].control_model, bad.model.diffusion_model], monkeypatch)
    assert torch.equal(ksampler(bench, scene), wanted)


def test_a_streamed_model_is_trained_and_searched(bench: Workbench, freed: list[int], monkeypatch):
    def made(scene: Scene, name: str) -> list[torch.Tensor]:
        prior = search(bench, scene.conditioned(), bench.terms(**THROUGH), gradient="through the model", steps=2)
        return [prior, train_lora(bench, scene, name, steps=2)[1]]

    with torch.inference_mode():
        scene = Scene(*small(FLOW))
    wanted = made(scene, "held")
    stream([scene.model.model.diffusion_model], monkeypatch)
    assert all(map(torch.equal, made(scene, "streamed"), wanted))


def test_gradients_switch_off_offload_streams(comfy, monkeypatch):
    """Weights that wait in main memory must not share a buffer while gradients need them."""
    import comfy.model_management as management

    monkeypatch.setattr(management, "NUM_STREAMS", 2)
    with comfy.pack.nodes.bridge.autograd.differentiable_networks():
        assert management.get_offload_stream(torch.device("cuda:0")) is None
    assert management.NUM_STREAMS == 2
