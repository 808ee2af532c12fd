"""Autoguidance with ComfyUI's own kinds of models: the formula, bad models of every make, memory, and company."""
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same, says
from helpers.features import FEATURES, MIXING, with_lora
from helpers.model_families import FAMILIES, lora, small
from helpers.workbench import (
    EPS,
    FLOW,
    VIDEO,
    Scene,
    Workbench,
    autoguided,
    ksampler,
    sibling,
    train_lora,
    with_guider,
    with_lora_at,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

KINDS = [EPS, "SDXL", FLOW, "Flux", VIDEO]


def once(bench: Workbench, scene: Scene, **changes: Any) -> Tensor:
    """The prediction: where a single Euler step ends, as the model has it inside."""
    out = ksampler(bench, replace(scene, steps=1, denoise=0.5, **changes))
    return scene.model.model.process_latent_in(out)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_the_prediction_is_the_published_combination(bench: Workbench, family: str, cfg: float):
    """D + (w_c - 1)(D - D_bad), and with CFG its own part: all predictions at one noisy image."""
    scene, bad = bench.scene(family), sibling(family)
    good, worse = once(bench, scene, cfg=1.0), once(bench, replace(scene, model=bad), cfg=1.0)
    expected = once(bench, scene, cfg=cfg) + 1.5 * (good - worse)
    found = once(bench, autoguided(bench, scene, bad), cfg=cfg)
    assert (good - worse).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize(("good", "bad"), [(0.0, 1.0), (1.0, 0.4), (0.7, 0.0)])
def test_shared_weights_predict_as_separate_ones(bench: Workbench, family: str, good: float, bad: float):
    """One copy of the weights under two LoRAs predicts what two copies do."""
    scene = replace(bench.scene(family), model=with_lora_at(bench.scene(family), good))
    with torch.inference_mode():
        apart = replace(bench.scene(family), model=small(family).model)
    shared = ksampler(bench, autoguided(bench, scene, with_lora_at(bench.scene(family), bad)))
    separate = ksampler(bench, autoguided(bench, scene, with_lora_at(apart, bad)))
    torch.testing.assert_close(shared, separate, rtol=1e-3, atol=1e-3 * float(separate.abs().max()))
    assert (shared - ksampler(bench, scene)).abs().max() > 1e-2


@pytest.mark.parametrize("family", [EPS, FLOW])
def test_a_neutral_value_changes_no_bit(bench: Workbench, family: str):
    scene, bad = bench.scene(family), with_lora_at(bench.scene(family), 1.0)
    plain = ksampler(bench, scene)
    for neutral in ({"weight": 1.0}, {"start_percent": 0.4, "end_percent": 0.4},
                    {"factor_at_start": 0.0, "factor_at_end": 0.0}):
        assert torch.equal(ksampler(bench, autoguided(bench, scene, bad, **neutral)), plain), neutral
    assert not torch.equal(ksampler(bench, autoguided(bench, scene, bad)), plain)
    assert torch.equal(ksampler(bench, scene), plain), "the good model is not what it was"


@pytest.mark.parametrize("family", [EPS, FLOW])
def test_an_interval_is_a_part_of_the_schedule(bench: Workbench, family: str):
    scene, bad = replace(bench.scene(family), steps=4), sibling(family)
    whole, first, last = (ksampler(bench, autoguided(bench, scene, bad, start_percent=start, end_percent=end))
                          for start, end in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0)))
    assert not torch.equal(first, last) and not torch.equal(first, whole) and not torch.equal(last, whole)


@pytest.mark.parametrize("make", [sibling, lambda family: None], ids=["own weights", "LoRA"])
def test_the_guider_does_what_the_patch_does(bench: Workbench, make: Callable):
    scene = bench.scene(FLOW)
    bad = make(FLOW) or with_lora_at(scene, 1.0)
    place = {"start_percent": 0.0, "end_percent": 0.8, "factor_at_start": 1.0, "factor_at_end": 0.5}
    through_guider = with_guider(bench, scene, "PPAPAutoguidanceGuider", bad_model=bad, weight=2.0, positive=scene.positive,
                                 negative=scene.negative, cfg=scene.cfg, **place)
    assert torch.equal(through_guider, ksampler(bench, autoguided(bench, scene, bad, 2.0, **place)))


def test_a_lora_after_the_node_belongs_to_the_good_model(bench: Workbench):
    scene, bad = bench.scene(FLOW), sibling(FLOW)
    before = ksampler(bench, autoguided(bench, with_lora(bench, scene), bad))
    assert torch.equal(before, ksampler(bench, with_lora(bench, autoguided(bench, scene, bad))))


@pytest.mark.parametrize(("feature", "family"), [(name, family) for name, (_, families) in FEATURES.items()
                                                 for family in families if name not in MIXING])
@pytest.mark.parametrize("kind", ["own weights", "LoRA"])
def test_autoguidance_and_another_feature_work_at_once(bench: Workbench, feature: str, family: str, kind: str):
    plain = bench.scene(family)
    scene = FEATURES[feature][0](bench, plain)
    bad = sibling(family) if kind == "own weights" else with_lora_at(plain, 0.5)
    alone, both = ksampler(bench, scene), ksampler(bench, autoguided(bench, scene, bad))
    assert both.isfinite().all() and not torch.equal(alone, both)
    assert torch.equal(ksampler(bench, autoguided(bench, scene, bad, 1.0)), alone)
    assert torch.equal(ksampler(bench, scene), alone), "something is left behind"


@pytest.mark.parametrize("family", [EPS, FLOW])
@pytest.mark.parametrize("kind", ["own weights", "LoRA"])
def test_guidance_by_a_network_goes_through_both_models(bench: Workbench, family: str, kind: str):
    scene = bench.scene(family)
    bad = sibling(family) if kind == "own weights" else with_lora_at(scene, 0.5)
    auto = autoguided(bench, scene, bad, 1.5)
    for way in ("in the prediction", "through the model"):
        steered = ksampler(bench, bench.guide(auto, gradient=way))
        assert bench.energy(scene, steered).mean() < bench.energy(scene, ksampler(bench, auto)).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_model_can_be_guided_by_its_sibling(bench: Workbench, family: str):
    scene = bench.scene(family)
    found = ksampler(bench, autoguided(bench, scene, sibling(family)))
    assert found.isfinite().all() and not torch.equal(found, ksampler(bench, scene))


def test_a_bad_model_made_by_a_lora_needs_hardly_any_memory(bench: Workbench, monkeypatch: pytest.MonkeyPatch):
    """Loaded models and low-rank updates take little more than the good model alone."""
    import comfy.model_management as management
    import comfy.sd

    scene, module = bench.scene(FLOW), bench.comfy.pack.nodes.bridge.autoguidance
    [bad, _] = comfy.sd.load_lora_for_models(scene.model, None, lora(scene.model, rank=1), 0.5, 0.0)
    changes, needed, difference, predict = [], [], module.difference, module.predict

    def watched(*args: Any) -> Tensor:
        parts = [part for layer in changes[-1].values() for part in layer]
        extra = sum(each.numel() * each.element_size() for part in parts for each in (part.up, part.down))
        needed.append(extra + sum(each.model_memory() for each in management.current_loaded_models))
        return predict(*args)

    monkeypatch.setattr(module, "difference", lambda *args: changes.append(difference(*args)) or changes[-1])
    monkeypatch.setattr(module, "predict", watched)
    management.unload_all_models()
    ksampler(bench, autoguided(bench, scene, bad))
    assert needed and scene.model.model_size() < max(needed) <= 1.1 * scene.model.model_size()


def test_what_is_no_bad_model_is_said_in_words(bench: Workbench):
    scene = bench.scene(FLOW)
    with says(ValueError, "the bad model is the model itself"):
        ksampler(bench, autoguided(bench, scene, scene.model))
    with says(ValueError, "another kind", "SD15"):
        autoguided(bench, scene, bench.scene(EPS).model)
    other = scene.model.clone()
    key = next(key for key in scene.model.model.state_dict() if key.endswith(".weight"))
    other.add_patches({key: ("diff", (torch.ones_like(scene.model.model.state_dict()[key]),))})
    with says(ValueError, "no plain LoRA", "a file of its own"):
        ksampler(bench, autoguided(bench, scene, other))


def test_each_guided_model_has_its_own_fingerprint(bench: Workbench):
    """Samples of one guided model must not be taken for those of another."""
    scene, about = bench.scene(FLOW), bench.comfy.pack.nodes.bridge.fingerprint.fingerprint_model
    weak, weaker = with_lora_at(scene, 0.5), with_lora_at(scene, 0.2)
    models = [scene.model, *(autoguided(bench, scene, bad, weight, **place).model for bad, weight, place in (
        (weak, 2.0, {}), (weak, 2.5, {}), (weak, 2.0, {"end_percent": 0.5}), (weaker, 2.0, {}), (sibling(FLOW), 2.0, {})))]
    recipes = [about(model, scene.positive)["model"] for model in models]
    assert len(set(recipes)) == len(recipes) and recipes[1] == about(autoguided(bench, scene, weak, 2.0).model)["model"]


# A bad model, made

@pytest.mark.parametrize("family", [EPS, FLOW, VIDEO])
def test_the_stock_loader_reads_a_trained_lora(bench: Workbench, family: str):
    """The finished LoRA and its early checkpoints."""
    scene, name = bench.scene(family), f"{family} sibling"
    before = ksampler(bench, scene)
    model, losses = train_lora(bench, scene, name)
    made = ksampler(bench, replace(scene, model=model))
    assert losses.ndim == 4 and not torch.equal(made, before) and torch.equal(ksampler(bench, scene), before)
    [loaded] = bench.comfy("LoraLoaderModelOnly", model=scene.model, lora_name=f"{name}.safetensors", strength_model=1.0)
    assert torch.equal(ksampler(bench, replace(scene, model=loaded)), made)
    [early] = bench.comfy("LoraLoaderModelOnly", model=scene.model, lora_name=f"{name}_2.safetensors", strength_model=1.0)
    good = replace(scene, model=model)
    assert not torch.equal(ksampler(bench, autoguided(bench, good, early)), made)


@pytest.mark.parametrize("family", [EPS, FLOW])
def test_training_lowers_the_error_on_the_images(bench: Workbench, family: str, monkeypatch: pytest.MonkeyPatch):
    losses, module = [], bench.comfy.pack.nodes.bridge.lora_training
    monkeypatch.setattr(module, "fine_tune", lambda *args, real=module.fine_tune: losses.append(real(*args)) or losses[-1])
    train_lora(bench, bench.scene(family), "learns", steps=120, rank=8)
    values = losses[0][1]
    assert sum(values[-30:]) < 0.9 * sum(values[:30])


def test_a_training_that_was_cancelled_goes_on(bench: Workbench, monkeypatch: pytest.MonkeyPatch):
    import comfy.model_management as management

    scene, module = bench.scene(FLOW), bench.comfy.pack.nodes.bridge.lora_training
    whole = ksampler(bench, replace(scene, model=train_lora(bench, scene, "whole", seed=4)[0]))
    folder = bench.comfy.pack.nodes.bridge.paths.output_folder("ppap_training")
    for state in folder.glob("*.safetensors"):
        state.unlink()

    def cancelled(total):
        def report(done, losses=None):
            if done == 9:
                raise management.InterruptProcessingException
        return report
    with monkeypatch.context() as patch:
        patch.setattr(module, "LossProgress", cancelled)
        with pytest.raises(management.InterruptProcessingException):
            train_lora(bench, scene, "cancelled", seed=4)
    steps, real = [], module.fine_tune
    monkeypatch.setattr(module, "fine_tune", lambda *args: real(
        *args[:-1], replace(args[-1], on_step=lambda step, *more: steps.append(step))))
    again = ksampler(bench, replace(scene, model=train_lora(bench, scene, "cancelled", seed=4)[0]))
    assert torch.equal(again, whole) and steps == list(range(9, 32))


def test_a_lora_s_name_stays_in_its_folder(bench: Workbench):
    node = bench.comfy.registered["PPAPTrainLora"]
    assert node.validate_inputs(name="fine") is True and "cannot name a file" in node.validate_inputs(name="../out")


@pytest.mark.parametrize("name", ["bought", "bought_2"])
def test_a_lora_of_another_origin_is_not_lost(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    file = tmp_path / f"{name}.safetensors"
    save_file({"a": torch.ones(2)}, file)
    before, scene = file.read_bytes(), bench.scene(EPS)
    with says(ValueError, f"'{name}'", "another name"):
        train_lora(bench, scene, "bought", steps=8)
    assert file.read_bytes() == before
    assert "another name" in bench.comfy.registered["PPAPTrainLora"].validate_inputs(name=name)
    train_lora(bench, scene, "own", steps=8)
    train_lora(bench, scene, "own", steps=8, seed=1)  # its own are replaced


def refuse_to_replace(monkeypatch: pytest.MonkeyPatch, module: Any, held: dict[str, int]) -> None:
    """Let os.replace fail for some names of files, as often as said: Windows does where something holds them open."""
    def replace_file(source: Any, target: Any, real: Callable = os.replace) -> None:
        if held.get(Path(target).name, 0) > 0:
            held[Path(target).name] -= 1
            raise PermissionError(13, "Access is denied")
        real(source, target)
    monkeypatch.setattr(module.os, "replace", replace_file)
    monkeypatch.setattr(module, "RENAMING_PAUSES", (0.0,))


def test_an_early_lora_that_is_held_is_written_at_the_end(bench: Workbench, monkeypatch: pytest.MonkeyPatch,
                                                          caplog: pytest.LogCaptureFixture):
    """The training goes on and is the same; a LoRA that is still held at the end is told, and the finished one is safe."""
    import folder_paths

    scene, folder = bench.scene(EPS), Path(folder_paths.get_folder_paths("loras")[0])
    train_lora(bench, scene, "free", seed=6)
    refuse_to_replace(monkeypatch, bench.comfy.pack.ppap_core.io.files, {"held_2.safetensors": 2, "busy_2.safetensors": 99,
                                                                         "own.safetensors": 2})
    train_lora(bench, scene, "held", seed=6)
    assert "held_2.safetensors" in caplog.text and "held open" in caplog.text
    for suffix in ("", "_2", "_8"):
        assert same(load_file(folder / f"held{suffix}.safetensors"), load_file(folder / f"free{suffix}.safetensors"))
    with says(OSError, "busy_2.safetensors", "held open", "loaded from it"):
        train_lora(bench, scene, "busy", seed=6)
    assert same(load_file(folder / "busy.safetensors"), load_file(folder / "free.safetensors"))
    with says(OSError, "own.safetensors", "held open"):
        train_lora(bench, scene, "own", seed=6)
    train_lora(bench, scene, "own", seed=6)  # its state is kept, and only saved
    assert same(load_file(folder / "own.safetensors"), load_file(folder / "free.safetensors"))


def test_after_nan_a_lora_of_a_lower_rate_goes_on(bench: Workbench, monkeypatch: pytest.MonkeyPatch):
    """No LoRA of NaN is saved, also not of the last step; the sentence says what is kept."""
    import folder_paths

    scene, module = bench.scene(EPS), bench.comfy.pack.nodes.bridge.lora_training
    folder, broken, steps = Path(folder_paths.get_folder_paths("loras")[0]), [31], []

    def noised(*args: Any, real: Callable = module.predict_noised) -> tuple[Tensor, Tensor]:
        prediction, sigma = real(*args)
        steps.append(len(steps))
        return prediction * (float("nan") if steps[-1] in broken else 1.0), sigma
    monkeypatch.setattr(module, "predict_noised", noised)
    with says(ValueError, "step 31", "step 30 is kept", "lower"):
        train_lora(bench, scene, "broken", seed=7)
    assert not (folder / "broken.safetensors").exists()
    broken.clear()
    steps.clear()
    train_lora(bench, scene, "broken", seed=7, learning_rate=1e-4)
    assert len(steps) == 2 and all(each.isfinite().all() for each in load_file(folder / "broken.safetensors").values())


def test_the_toy_is_a_picture(bench: Workbench):
    [picture] = bench.comfy("PPAPAutoguidanceToy", steps=64)
    assert picture.shape == (1, 888, 840, 3) and picture.std() > 0.05
