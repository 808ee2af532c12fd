"""Dynamic VRAM, ComfyUI's default on NVIDIA: it needs a GPU to run, so what it leaves on networks is made here with its own
classes, around a native library that only counts."""
import copy
import gc
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from helpers import says
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
    model = dynamic(plain)
    settings = {"guider": world.guider, "weight": 0.3, "start_percent": 0.0, "end_percent": 1.0, "factor_at_start": 1.0,
                "factor_at_end": 1.0, "view": "own"}

    def guided(model: Any, gradient: str) -> Any:
        [terms] = comfy("PPAPGuidanceTerm", **settings, gradient=gradient)
        return comfy("PPAPApplyGuidance", model=model, terms=terms, max_rms=0.0)[0]

    cheap, through = (guided(model, gradient) for gradient in ("in the prediction", "through the model"))
    assert cheap.is_dynamic() and cheap.model is model.model
    assert not through.is_dynamic() and through.model is not model.model
    through.load_device = CPU
    assert torch.equal(world.sample(through), world.sample(guided(plain, "through the model")))
    model.cached_patcher_init = None
    with says(ValueError, "dynamic VRAM", "--disable-dynamic-vram", "in the prediction"):
        guided(model, "through the model")


def test_dynamic_weights_beside_the_model_are_refused(comfy, freed: list[int]):
    """Gradients through the model need every network that samples with it to keep its weights."""
    plain = comfy("PPAPTinyLatentWorld", kind="flow")[0]
    beside = SimpleNamespace(model_patcher=plain, loaded_models=[dynamic(plain)], inner_model=plain.model, conds={})
    with says(ValueError, "dynamic VRAM", "--disable-dynamic-vram"):
        comfy.pack.nodes.bridge.autograd.make_differentiable(beside)


def test_gradients_switch_off_offload_streams(comfy, monkeypatch):
    """Weights that wait in main memory must not share a buffer while gradients need them."""
    import comfy.model_management as management

    monkeypatch.setattr(management, "NUM_STREAMS", 2)
    with comfy.pack.nodes.bridge.autograd.differentiable_networks():
        assert management.get_offload_stream(torch.device("cuda:0")) is None
    assert management.NUM_STREAMS == 2
