"""The work of other packs on a MODEL: caches of predictions, LoRAs by bypass, compiled layers, functions on weights."""
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same, says
from helpers.caches import CACHES, cached
from helpers.model_families import lora, small
from helpers.workbench import EPS, FLOW, THROUGH, Scene, Workbench, autoguided, ksampler, search, train_lora, with_lora_at
from safetensors.torch import load_file
from torch import Tensor

CACHED = pytest.mark.parametrize("cache", CACHES)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


# Caches

@CACHED
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_cache_never_answers_the_bad_model(bench: Workbench, cache: str, cfg: float):
    """The bad model sees the good one's input, which the cache would take for a step without a change."""
    scene = replace(bench.scene(EPS), cfg=cfg)
    plain = ksampler(bench, scene)
    wanted = ksampler(bench, autoguided(bench, scene, with_lora_at(scene, 1.0)))
    with_cache = replace(scene, model=cached(scene.model, cache))
    assert torch.equal(ksampler(bench, with_cache), plain), "the cache itself changes something"
    found = ksampler(bench, autoguided(bench, with_cache, with_lora_at(with_cache, 1.0)))
    assert (wanted - plain).abs().max() > 1e-2
    assert close(found, wanted)


@CACHED
def test_a_cache_goes_on_for_each_model_by_itself(bench: Workbench, cache: str):
    """Every other step is answered from memory: of the good model for the good one, of the bad for the bad."""
    scene = replace(bench.scene(FLOW), steps=4, cfg=1.0)
    with torch.inference_mode():
        apart = replace(scene, model=small(FLOW).model)
    good = replace(scene, model=cached(scene.model, cache, alternate=True))
    bad = with_lora_at(good, 1.0)
    found = ksampler(bench, autoguided(bench, good, bad))
    alone = replace(apart, model=cached(apart.model, "closure", alternate=True))
    good = replace(scene, model=cached(scene.model, cache, alternate=True))
    assert close(found, ksampler(bench, autoguided(bench, good, with_lora_at(alone, 1.0))))


class EveryOther(torch.nn.Module):
    """A layer that is computed every other time, the way of packs that put cached layers in the place of others."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer, self.last = layer, None

    def forward(self, *args: Any) -> Tensor:
        self.last, output = (None, self.last) if self.last is not None else (self.layer(*args),) * 2
        return output


def test_a_layer_that_remembers_does_so_for_each_model(bench: Workbench):
    """Both models have the same layer object, in the place of the same layer; ComfyUI applies no LoRA inside of it."""
    import comfy.sd

    scene, path = replace(bench.scene(FLOW), steps=4, cfg=1.0), "diffusion_model.final_layer"
    with torch.inference_mode():
        used, other, apart = (with_layer(model, path, EveryOther(model.model.diffusion_model.final_layer))
                              for model in (small(FLOW).model for _ in range(3)))
        tensors = {name: tensor for name, tensor in lora(scene.model).items() if "final_layer" not in name}
        bad, bad_apart = (comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)[0] for model in (used, apart))
    found = ksampler(bench, autoguided(bench, replace(scene, model=used), bad))
    assert close(found, ksampler(bench, autoguided(bench, replace(scene, model=other), bad_apart)))


@pytest.mark.parametrize("kind", ["shared", "own weights"])
def test_real_caches_leave_the_bad_model_alone(bench: Workbench, kind: str):
    scene = replace(bench.scene(EPS), steps=6, cfg=1.0)
    settings = {"reuse_threshold": 1e-9, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    for node in ("EasyCache", "LazyCache"):
        with torch.inference_mode():
            apart = scene if kind == "shared" else replace(scene, model=small(EPS).model)
        wanted = ksampler(bench, autoguided(bench, scene, with_lora_at(apart, 1.0)))
        good, bad = bench.patch(scene, node, **settings), bench.patch(apart, node, **settings)
        bad = with_lora_at(good if kind == "shared" else bad, 1.0)
        found = ksampler(bench, autoguided(bench, good, bad))
        assert close(found, wanted)
        holder = bad.model_options["transformer_options"]["easycache"]
        assert not getattr(holder, "uuid_cache_diffs", None), "the cache keeps something of this sampling"


@pytest.mark.parametrize("cache", [each if number < 2 else pytest.param(each, marks=pytest.mark.wide)
                                   for number, each in enumerate(CACHES)])
def test_no_graph_stays_alive_in_a_cache(bench: Workbench, cache: str, monkeypatch: pytest.MonkeyPatch):
    """Neither between two steps nor afterwards; a second look at each step shows that there was one."""
    alive, module, scene = [], bench.comfy.pack.nodes.bridge.guidance, bench.scene(EPS)

    def tensors_with_graph() -> int:
        gc.collect()
        return sum(each.grad_fn is not None for each in gc.get_objects() if issubclass(type(each), Tensor))

    def shifted(args: dict, *more: Any, real: Callable = module.apply_shift) -> Tensor:
        alive.append(tensors_with_graph())
        return real(args, *more)
    monkeypatch.setattr(module, "apply_shift", shifted)
    steps, before = [], tensors_with_graph()

    def on_step(*args: Any, real: Callable = module.GuidedModel.on_predict, **kwargs: Any) -> Tensor:
        try:
            return real(*args, **kwargs)
        finally:
            steps.append(tensors_with_graph())
    monkeypatch.setattr(module.GuidedModel, "on_predict", on_step)
    guided = bench.guide(replace(scene, model=cached(scene.model, cache)), **THROUGH)
    ksampler(bench, guided)
    assert all(count > before for count in alive[1:]) and steps == [before] * scene.steps


@CACHED
@pytest.mark.parametrize("family", [EPS])
def test_a_gradient_through_a_cached_model_is_right(bench: Workbench, cache: str, family: str):
    scene = bench.scene(family)
    wanted = ksampler(bench, bench.guide(scene, **THROUGH))
    assert close(ksampler(bench, bench.guide(replace(scene, model=cached(scene.model, cache)), **THROUGH)), wanted)


@CACHED
def test_a_second_attempt_at_a_step_is_computed(bench: Workbench, cache: str, monkeypatch: pytest.MonkeyPatch):
    """A step that runs out of memory on its way back is done again, and not answered from the first attempt."""
    module, scene = bench.comfy.pack.nodes.bridge.guidance, bench.scene(EPS)
    wanted = ksampler(bench, bench.guide(scene, **THROUGH))
    failures = [1]

    def shifted(*args: Any, real: Callable = module.apply_shift) -> Tensor:
        if failures and failures.pop():
            raise torch.OutOfMemoryError("out of memory")
        return real(*args)
    monkeypatch.setattr(module, "apply_shift", shifted)
    assert close(ksampler(bench, bench.guide(replace(scene, model=cached(scene.model, cache)), **THROUGH)), wanted)
    assert not failures


@CACHED
@pytest.mark.parametrize("gradient", ["in the prediction", "through the model"])
def test_a_search_is_not_answered_by_a_cache(bench: Workbench, cache: str, gradient: str):
    """A search asks at levels and noises that are no steps of a sampling."""
    scene = bench.scene(EPS)
    wanted = search(bench, scene.conditioned(), steps=4, gradient=gradient)
    with_cache = replace(scene, model=cached(scene.model, cache, alternate=True))
    assert close(search(bench, with_cache.conditioned(), steps=4, gradient=gradient), wanted)


@CACHED
def test_a_training_is_not_answered_by_a_cache(bench: Workbench, cache: str):
    scene = bench.scene(EPS)
    wanted = ksampler(bench, replace(scene, model=train_lora(bench, scene, "uncached", steps=4)[0]))
    with_cache = replace(scene, model=cached(scene.model, cache, alternate=True))
    trained = train_lora(bench, with_cache, "cached", steps=4)[0]
    trained.model_options, trained.wrappers = scene.model.model_options, scene.model.wrappers
    assert close(ksampler(bench, replace(scene, model=trained)), wanted)


@CACHED
def test_samples_share_no_cache_between_batches(pixels: Any, cache: str):
    """An image depends on its seed only; a cache that is left as it is would answer a batch from the one before."""
    model = cached(pixels.model, cache, alternate=True)
    stores = [pixels.samples(model=cached(pixels.model, cache, alternate=True) if batch == 64 else model, steps=3, count=64,
                             name=f"{cache} {batch}", latent_image={"samples": torch.zeros(batch, 3, 16, 24)}).store
              for batch in (64, 32)]
    assert (stores[0].images.float() - stores[1].images.float()).abs().max() <= 1


# LoRAs that are no patches

def by_bypass(model: Any, strength: float) -> Any:
    """The MODEL with a LoRA, as ComfyUI's loader by bypass puts it on."""
    import comfy.sd

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI loads no LoRA by bypass")
    return comfy.sd.load_bypass_lora_for_models(model, None, lora(model), strength, 0.0)[0]


def ordinary(model: Any, strength: float) -> Any:
    return with_lora_at(Scene(model, [], [], {}), strength)


def untouched(model: Any, strength: float) -> Any:
    return model


WAYS = {"bypass": by_bypass, "patches": ordinary, "none": untouched}


@pytest.mark.parametrize("family", [EPS, FLOW, *(pytest.param(name, marks=pytest.mark.wide) for name in ("SDXL", "Flux"))])
@pytest.mark.parametrize(("good", "bad"), [("bypass", "bypass"), ("none", "bypass"), ("bypass", "none"),
                                           ("patches", "bypass"), ("bypass", "patches")])
def test_a_lora_by_bypass_is_guided_as_any_other(bench: Workbench, family: str, good: str, bad: str):
    """One copy of the weights predicts what two copies do, whichever loader either model comes from."""
    scene = bench.scene(family)
    with torch.inference_mode():
        apart, plain, used = (small(family).model for _ in range(3))
        wanted = ksampler(bench, autoguided(bench, replace(scene, model=ordinary(plain, 1.0 * (good != "none"))),
                                            ordinary(apart, 0.4 * (bad != "none"))))
        shared = replace(scene, model=WAYS[good](used, 1.0))
        before = ksampler(bench, shared)
    found = ksampler(bench, autoguided(bench, shared, WAYS[bad](used, 0.4)))
    assert close(found, wanted) and (found - before).abs().max() > 1e-2
    assert torch.equal(ksampler(bench, shared), before), "the good model is not what it was"
    assert torch.equal(ksampler(bench, replace(scene, model=used)), ksampler(bench, scene)), "something is left behind"


def test_a_bad_model_of_its_own_may_have_a_bypass(bench: Workbench):
    scene = bench.scene(FLOW)
    with torch.inference_mode():
        one, two = small(FLOW).model, small(FLOW).model
    assert close(ksampler(bench, autoguided(bench, scene, by_bypass(one, 0.5))),
                 ksampler(bench, autoguided(bench, scene, ordinary(two, 0.5))))


@pytest.mark.parametrize("kind", ["guided", "autoguided", "trained", "searched"])
def test_gradients_pass_a_lora_by_bypass(bench: Workbench, kind: str):
    """The loader makes its tensors in inference mode, where autograd accepts none; the results are those of patches."""
    results = []
    for way in (by_bypass, ordinary):
        with torch.inference_mode():
            scene = replace(bench.scene(FLOW), model=small(FLOW).model)
            used = replace(scene, model=way(scene.model, 0.6))
            other = way(scene.model, 0.2)
        if kind == "guided":
            results.append(ksampler(bench, bench.guide(used, **THROUGH)))
        elif kind == "autoguided":
            results.append(ksampler(bench, bench.guide(autoguided(bench, used, other), **THROUGH)))
        elif kind == "trained":
            results.append(ksampler(bench, replace(used, model=train_lora(bench, used, f"on {way.__name__}", steps=4)[0])))
        else:
            results.append(search(bench, used.conditioned(), steps=3, **THROUGH))
    assert close(*results)


def test_the_same_lora_by_bypass_is_the_model_itself(bench: Workbench):
    scene = replace(bench.scene(FLOW), model=by_bypass(bench.scene(FLOW).model, 0.5))
    with says(ValueError, "the bad model is the model itself"):
        ksampler(bench, autoguided(bench, scene, scene.model))
    with says(ValueError, "the bad model is the model itself"):
        ksampler(bench, autoguided(bench, scene, scene.model.clone()))


def test_what_acts_on_samplings_only_makes_no_bad_model(bench: Workbench):
    """The sentence does not say that the bad model is the model itself, for it is not."""
    scene, post_cfg, wrapper = bench.scene(FLOW), bench.scene(FLOW).model.clone(), bench.scene(FLOW).model.clone()
    post_cfg.set_model_sampler_post_cfg_function(lambda args: 0.5 * args["denoised"])
    wrapper.add_wrapper_with_key("predict_noise", "another pack", lambda executor, *args: 0.5 * executor(*args))
    for bad in (post_cfg, wrapper):
        with says(ValueError, "only by functions that act on whole samplings", "connect a weaker one"):
            ksampler(bench, autoguided(bench, scene, bad))
        with says(ValueError, "the bad model is the model itself"):
            ksampler(bench, autoguided(bench, replace(scene, model=bad), bad))


# Layers, functions on weights, options

def with_layer(model: Any, path: str, layer: Any) -> Any:
    clone = model.clone()
    clone.add_object_patch(path, layer)
    return clone


class Halved(torch.nn.Module):
    """A block of another pack around a block of the network, whose output it halves."""

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        return output / 2 if isinstance(output, Tensor) else tuple(each if each is None else each / 2 for each in output)


BLOCK = "diffusion_model.joint_blocks.0"


def halved(model: Any) -> Any:
    return with_layer(model, BLOCK, Halved(model.model.diffusion_model.joint_blocks[0]))


@pytest.mark.parametrize("which", ["good", "bad"])
def test_a_layer_of_another_pack_belongs_to_its_model(bench: Workbench, which: str):
    scene = bench.scene(FLOW)
    with torch.inference_mode():
        used, other, apart = (small(FLOW).model for _ in range(3))
    good, bad = (halved(used), used) if which == "good" else (used, halved(used))
    wanted_good, wanted_bad = (halved(other), apart) if which == "good" else (other, halved(apart))
    before = ksampler(bench, replace(scene, model=good))
    found = ksampler(bench, autoguided(bench, replace(scene, model=good), bad))
    assert close(found, ksampler(bench, autoguided(bench, replace(scene, model=wanted_good), wanted_bad)))
    assert (found - before).abs().max() > 1e-2
    assert torch.equal(ksampler(bench, replace(scene, model=good)), before)
    assert torch.equal(ksampler(bench, replace(scene, model=used)), ksampler(bench, scene)), "something is left"


def compiled(model: Any, backend: str = "eager") -> Any:
    """The MODEL with its blocks compiled one by one, as packs do it."""
    for number, block in enumerate(model.model.diffusion_model.joint_blocks):
        model = with_layer(model, f"diffusion_model.joint_blocks.{number}", torch.compile(block, backend=backend))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("good", "bad"), [("none", "patches"), ("none", "bypass"), ("bypass", "bypass")])
@pytest.mark.parametrize("which", ["good", "both"])
def test_compiled_blocks_are_guided_as_others(bench: Workbench, good: str, bad: str, which: str):
    """Compiled code does not see a change of its layers, so that it would answer as the good model."""
    scene = bench.scene(FLOW)
    with torch.inference_mode():
        used = small(FLOW).model
        base = compiled(used)
        found = ksampler(bench, autoguided(bench, replace(scene, model=WAYS[good](base, 1.0)),
                                           WAYS[bad](base if which == "both" else used, 0.3)))
    plain = replace(scene, model=ordinary(scene.model, 1.0 * (good != "none")))
    assert close(found, ksampler(bench, autoguided(bench, plain, ordinary(scene.model, 0.3))))


@pytest.mark.slow
def test_a_lora_that_comfyui_leaves_out_is_not_taken_off(bench: Workbench, caplog: pytest.LogCaptureFixture):
    """ComfyUI applies no patches to layers that were compiled one by one; the bad model has its own LoRA all the same."""
    scene = bench.scene(FLOW)
    with torch.inference_mode():
        used, other, apart = (small(FLOW).model for _ in range(3))
        base = compiled(used)
        found = ksampler(bench, autoguided(bench, replace(scene, model=ordinary(base, 1.0)), ordinary(base, 0.3)))
        wanted = ksampler(bench, autoguided(bench, replace(scene, model=ordinary(compiled(other), 1.0)),
                                            ordinary(apart, 0.3)))
    assert close(found, wanted) and "does not apply the model's LoRA" in caplog.text


@pytest.mark.slow
def test_a_whole_compiled_model_is_guided_as_others(bench: Workbench):
    """The way of ComfyUI's own node: a wrapper that runs compiled code in the place of the network."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    scene = bench.scene(FLOW)
    base = scene.model.clone()
    set_torch_compile_wrapper(base, backend="eager")
    found = ksampler(bench, autoguided(bench, replace(scene, model=base), ordinary(base, 0.5)))
    assert close(found, ksampler(bench, autoguided(bench, scene, ordinary(scene.model, 0.5))))


@pytest.mark.slow
def test_a_lora_trained_on_compiled_blocks_fits_the_model(bench: Workbench):
    import folder_paths

    scene, folder = bench.scene(FLOW), Path(folder_paths.get_folder_paths("loras")[0])
    with torch.inference_mode():
        used = small(FLOW).model
    models = [train_lora(bench, replace(scene, model=model), name, steps=8)[0]
              for name, model in (("compiled", compiled(used)), ("plain", scene.model))]
    assert same(load_file(folder / "compiled.safetensors"), load_file(folder / "plain.safetensors"))
    assert models[0].patches.keys() == models[1].patches.keys()


def wrapped(model: Any, factor: float) -> Any:
    """The MODEL with a function on one weight."""
    clone = model.clone()
    clone.add_weight_wrapper(f"{BLOCK}.x_block.mlp.fc1.weight", lambda weight, **unused: weight * factor)
    return clone


def test_other_functions_on_weights_are_refused_in_words(bench: Workbench):
    scene = bench.scene(FLOW)
    with says(ValueError, "functions on its weights", "a file of its own"):
        ksampler(bench, autoguided(bench, scene, wrapped(scene.model, 0.5)))
    both = replace(scene, model=wrapped(scene.model, 0.5))
    assert ksampler(bench, autoguided(bench, both, ordinary(both.model, 0.5))).isfinite().all()


def test_other_patches_of_attention_make_a_bad_model(bench: Workbench):
    """The same weights and another option: the bad model is not the model itself."""
    scene = bench.scene(EPS)
    for good, bad in (({}, {"attn1": True}), ({"attn1": True}, {}), ({}, {"wrapper": True}), ({}, {"function": True})):
        found = ksampler(bench, autoguided(bench, replace(scene, model=weakened(scene.model, **good)),
                                           weakened(scene.model, **bad)))
        assert (found - ksampler(bench, replace(scene, model=weakened(scene.model, **good)))).abs().max() > 1e-2


def weakened(model: Any, attn1: bool = False, wrapper: bool = False, function: bool = False) -> Any:
    """The MODEL with a patch of its attention, a wrapper of its network, or a function around it, of another pack."""
    clone = model.clone()
    if attn1:
        clone.set_model_attn1_output_patch(lambda output, options: 0.2 * output)
    if wrapper:
        clone.add_wrapper_with_key("diffusion_model", "another pack", lambda executor, *args, **kwargs: (
            0.9 * executor(*args, **kwargs)))
    if function:
        clone.set_model_unet_function_wrapper(lambda apply, args: 0.9 * apply(args["input"], args["timestep"], **args["c"]))
    return clone


# Fingerprints

def test_a_fingerprint_sees_all_that_is_on_a_model(bench: Workbench):
    """Samples of one model are not taken for those of another; what is equal has an equal fingerprint, also once sampled."""
    about, scene = bench.comfy.pack.nodes.bridge.fingerprint.fingerprint_model, bench.scene(FLOW)
    make = {"plain": lambda: scene.model,
            "0.2": lambda: by_bypass(scene.model, 0.2), "1": lambda: by_bypass(scene.model, 1.0),
            "another LoRA": lambda: other_bypass(scene.model), "layer": lambda: halved(scene.model),
            "wrapped by 2": lambda: wrapped(scene.model, 2.0), "wrapped by 3": lambda: wrapped(scene.model, 3.0),
            "wrapper": lambda: weakened(scene.model, wrapper=True),
            "against 0.2": lambda: autoguided(bench, scene, by_bypass(scene.model, 0.2)).model,
            "against 1": lambda: autoguided(bench, scene, by_bypass(scene.model, 1.0)).model}
    found = {}
    for name, factory in make.items():
        with torch.inference_mode():
            model, again = factory(), factory()
        found[name] = about(model)["model"]
        assert about(again)["model"] == found[name], name
        if "wrapped" not in name:
            ksampler(bench, replace(scene, model=model))
            assert about(model)["model"] == found[name] == about(model.clone())["model"], f"{name}, once sampled"
    assert len(set(found.values())) == len(found)


def other_bypass(model: Any) -> Any:
    import comfy.sd

    tensors = {name: tensor * (1.001 if "lora_up" in name else 1) for name, tensor in lora(model).items()}
    return comfy.sd.load_bypass_lora_for_models(model, None, tensors, 0.2, 0.0)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fingerprint_outlives_the_first_sampling(bench: Workbench, dtype: torch.dtype):
    """ComfyUI casts a LoRA to the type of the layers when it injects it for the first time."""
    about = bench.comfy.pack.nodes.bridge.fingerprint.fingerprint_model
    with torch.inference_mode():
        scene = replace(Scene(*small(FLOW, dtype)), steps=1)
        model = by_bypass(scene.model, 0.3)
    before = about(model)["model"]
    ksampler(bench, replace(scene, model=model))
    assert about(model)["model"] == before


def test_compiled_blocks_have_the_fingerprint_of_the_model(bench: Workbench):
    """Loaded or not, they compute the same."""
    about, scene = bench.comfy.pack.nodes.bridge.fingerprint.fingerprint_model, bench.scene(FLOW)
    before, model = about(scene.model), compiled(scene.model)
    assert about(model) == before
    stance = getattr(torch.compiler, "set_stance", None)
    if stance is None:
        pytest.skip("this torch cannot run compiled layers as they are written")
    with stance("force_eager"):
        ksampler(bench, replace(scene, model=model))
    assert about(model) == before


def test_samples_of_another_strength_are_not_reused(pixels: Any):
    settings = {"name": "by bypass", "steps": 1}
    pixels.samples(model=by_bypass(pixels.model, 1.0), **settings)
    with says(ValueError, "by bypass", "other settings", "another name"):
        pixels.samples(model=by_bypass(pixels.model, 0.2), **settings)
