"""Quantised weights, as artists download them: all nodes work, and tell one model from another."""
from pathlib import Path

import pytest
import torch
from helpers import says
from helpers.features import controlled
from helpers.model_families import FAMILIES, control_net, lora, small_vae
from helpers.quantized import KINDS, dequantized, packed, quantized, quantized_parts, values_of
from helpers.quantized_uses import USES, QuantizedWorld
from helpers.workbench import THROUGH, Scene, Workbench, ksampler, steered
from torch import Tensor

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
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
@pytest.mark.parametrize("family", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.wide)
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


def test_quantised_layers_are_put_back_whatever_happens(bench: Workbench, monkeypatch: pytest.MonkeyPatch,
                                                        caplog: pytest.LogCaptureFixture):
    """A pass that fails leaves the layers as they were: later samplings are the same bit for bit. The log tells of it."""
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
    caplog.set_level("INFO")
    with says(ValueError, "in its gradient pass"):
        ksampler(bench, bench.guide(scene, **THROUGH))
    assert caplog.text.count("quantised layers multiply in the type of their inputs") == 1
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


# Loaders, VAEs and ControlNets

def quantized_flow(factor: float = 1.0) -> dict[str, Tensor]:
    """The weights of the bundled flow as a file of scaled float8 weights has them."""
    from ppap_core.tinyworld.latents import load_flow

    state = load_flow().state_dict()
    scaled = {key: tensor for key, tensor in state.items() if tensor.ndim == 2 and key.startswith("joint_blocks")}
    for key, weight in scaled.items():
        scale = weight.abs().max() / 448
        state[key] = (weight / scale).to(torch.float8_e4m3fn)
        state[f"{key.removesuffix('.weight')}.scale_weight"] = factor * scale
    return {**state, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}


@torch.inference_mode()
def test_scaled_float8_files_of_the_stock_loader_are_told_apart(bench: Workbench):
    import comfy.sd

    models = [comfy.sd.load_diffusion_model_state_dict(quantized_flow(factor)) for factor in (1.0, 1.0, 1.5)]
    first, again, rescaled = (fingerprint(bench, model) for model in models)
    assert first == again != rescaled


def quantize_layers(net: torch.nn.Module, kind: str, factor: float = 1.0) -> torch.nn.Module:
    """Exchange the linear layers of a network for quantised ones, as ComfyUI makes them."""
    import comfy.ops

    if not hasattr(comfy.ops, "mixed_precision_ops"):
        pytest.skip("this ComfyUI has no quantised layers")
    operations = comfy.ops.mixed_precision_ops({}, torch.float32)
    for parent in list(net.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, torch.nn.Linear):
                made = operations.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                bias = {} if layer.bias is None else {"bias": layer.bias}
                made.load_state_dict({**bias, **quantized_parts(layer.weight, kind, factor)})
                setattr(parent, name, made)
    return net


@pytest.mark.parametrize("kind", ["fp8_scaled", "int8", "nvfp4", "mxfp8"])
def test_a_copy_for_gradients_is_dequantised(bench: Workbench, kind: str):
    """What decodes latents for guiders: gradients pass it, ComfyUI can move it, and the original stays quantised."""
    import comfy.model_management

    memory = bench.comfy.pack.nodes.bridge.memory
    with torch.inference_mode():
        net = quantize_layers(torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 32)), kind)
        plain = [(values_of(layer), layer.bias.clone()) for layer in net]
    with torch.inference_mode(False):
        copied = memory.private_copy(net)
    for _ in range(2):
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([memory.patcher_of(copied)])
        memory.materialize_on([copied], torch.device("cpu"))
        point = torch.ones(3, 32, requires_grad=True)
        wanted = point
        for weight, bias in plain:
            wanted = torch.nn.functional.linear(wanted, weight.clone(), bias.clone())
        torch.testing.assert_close(copied(point), wanted)
        torch.testing.assert_close(torch.autograd.grad(copied(point).sum(), point), torch.autograd.grad(wanted.sum(), point))
        with torch.inference_mode():
            comfy.model_management.unload_all_models()
    assert all(hasattr(layer.weight, "_qdata") and not layer._full_precision_mm for layer in net)


@pytest.mark.parametrize("kind", ["fp8_scaled", "int8", "nvfp4", "mxfp8"])
def test_a_quantised_controlnet_is_told_apart_and_differentiable(bench: Workbench, kind: str):
    fingerprint = bench.comfy.pack.nodes.bridge.fingerprint.fingerprint_control
    with torch.inference_mode():
        controls = [control_net() for _ in range(3)]
        for control, factor in zip(controls, (1.0, 1.0, 2.0), strict=True):
            quantize_layers(control.control_model, kind, factor)
        first, again, rescaled = map(fingerprint, controls)
    assert first == again != rescaled
    steered(bench, controlled(bench, bench.scene("SD 1.5"), lambda: controls[0]), **THROUGH)


@torch.inference_mode()
def test_a_packed_vae_or_controlnet_is_told_apart(bench: Workbench):
    """Their blocks of bytes are hashed with the scales."""
    module, prints = bench.comfy.pack.nodes.bridge.fingerprint, []
    for factor in (1.0, 1.0, 2.0):
        vae, control = small_vae(4), control_net()
        for net in (vae.first_stage_model.decoder, control.control_model):
            net.packed = torch.nn.Parameter(packed(torch.ones(4, 32), factor), requires_grad=False)
        prints.append((module.fingerprint_vae(vae), module.fingerprint_control(control)))
    assert prints[0] == prints[1] and all(a != b for a, b in zip(prints[0], prints[2], strict=True))


# The document

def test_the_document_lists_the_tested_quantisations():
    section = DOCUMENT.read_text().split("## Quantised models\n")[1].split("\n## ")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()
                      if line.startswith("|")]
    assert head == ["weights", "ComfyUI", *USES] and [row[0] for row in rows] == list(KINDS)
    assert all(row[2:] == ["yes"] * len(USES) for row in rows)
    assert [kind for kind, version, *_ in rows if version == "both"] == ["fp8_scaled", "plain fp8", "GGUF-like"]
