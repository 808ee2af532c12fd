"""Quantised weights, as artists download them: all nodes work, and tell one model from another."""
import pytest
import torch
from helpers import says
from helpers.model_families import FAMILIES
from helpers.quantized import KINDS, dequantized, quantized
from helpers.quantized_uses import USES, QuantizedWorld
from helpers.workbench import THROUGH, Scene, Workbench, ksampler
from torch import Tensor

OFTEN = ("Flux", "SD 3", "LTX-Video")  # families that stand for the others


def failures(world: QuantizedWorld) -> dict[str, str]:
    """What of all that is done with a MODEL fails, and why."""
    found = {}
    for name, use in USES.items():
        try:
            use(world)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)
                                    for name in FAMILIES])
def test_quantised_weights_serve_in_all_nodes(bench: Workbench, family: str, kind: str):
    assert failures(QuantizedWorld(bench, family, kind)) == {}


def fingerprint(bench: Workbench, model: object) -> str:
    with torch.inference_mode():
        return bench.comfy.pack.nodes.bridge.fingerprint.fingerprint_model(model)["model"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_sees_values_and_scales(bench: Workbench, kind: str):
    """Equal weights have one fingerprint, and others another, whichever part of them is another."""
    with torch.inference_mode():
        models = [quantized("Flux", kind, factor).model for factor in (1.0, 1.0, 2.0)]
        plain = dequantized("Flux", models[0]).model
    first, again, rescaled, floats = (fingerprint(bench, model) for model in (*models, plain))
    assert first == again and len({first, rescaled, floats}) == 3


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_stays_where_weights_move(bench: Workbench, kind: str):
    """Loading a model, with a LoRA and without, and unloading it leave its fingerprint."""
    import comfy.model_management
    import comfy.sd
    from helpers.model_families import lora

    plain = quantized("Flux", kind).model
    changes = lora(dequantized("Flux", plain).model)
    models = [plain, comfy.sd.load_lora_for_models(plain, None, changes, 0.5, 0.0)[0]]
    before = [fingerprint(bench, model) for model in models]
    assert before[0] != before[1]
    for model in (*models, plain):
        comfy.model_management.load_models_gpu([model])
        assert [fingerprint(bench, each) for each in models] == before
        comfy.model_management.unload_all_models()
        assert [fingerprint(bench, each) for each in models] == before


def switches(model: object) -> list[bool]:
    return [vars(layer)["_full_precision_mm"] for layer in model.model.modules() if "_full_precision_mm" in vars(layer)]


def test_quantised_layers_are_put_back_whatever_happens(bench: Workbench, monkeypatch: pytest.MonkeyPatch):
    """A pass that fails leaves the layers as they were, so that later samplings are the same bit for bit."""
    with torch.inference_mode():
        scene = Scene(*quantized("Flux", "fp8_scaled"))
    if not switches(scene.model):
        pytest.skip("the quantised layers of this ComfyUI have no such switch")
    plain = ksampler(bench, scene)

    def fails(args: dict, *others: object) -> Tensor:
        if not any(switches(scene.model)):  # in pure noise no gradient is taken
            return args["denoised"]
        raise ValueError("a guider that stops while the model is in its gradient pass")

    monkeypatch.setattr(bench.comfy.pack.nodes.bridge.guidance, "apply_shift", fails)
    with says(ValueError, "in its gradient pass"):
        ksampler(bench, bench.guide(scene, **THROUGH))
    assert not any(switches(scene.model))
    quantised = [weight for weight in scene.model.model.parameters() if hasattr(weight, "_qdata")]
    assert quantised and all(weight.is_inference() for weight in quantised), "ComfyUI could not move others"
    assert torch.equal(ksampler(bench, scene), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_quantised_models_wait_in_main_memory(bench: Workbench, kind: str, monkeypatch: pytest.MonkeyPatch):
    """The gradient is the same where memory runs out, and quantised weights are not copied for it."""
    with torch.inference_mode():
        scene = Scene(*quantized("Flux", kind))
    whole = ksampler(bench, bench.guide(scene, **THROUGH))
    kind_of_pass = bench.comfy.pack.nodes.bridge.autograd.GradientPass
    initialise = kind_of_pass.__init__

    def short_of_memory(self: object, *networks: torch.nn.Module) -> None:
        initialise(self, *networks)
        self.saves_on_cpu = True

    monkeypatch.setattr(kind_of_pass, "__init__", short_of_memory)
    lean = ksampler(bench, bench.guide(scene, **THROUGH))
    torch.testing.assert_close(lean, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
