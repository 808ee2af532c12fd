"""A model on the weights of another: the same network with other injections, layers, wrappers and memory of patches."""
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch

from ...ppap_core.training.lora import Adapters, with_adapters
from .foreign import held_by, replace_tensors
from .latents import Patcher

NETWORK = "diffusion_model"
OF_PREDICTIONS = ("calc_cond_batch", "apply_model", "diffusion_model")  # kinds of wrappers that run for every prediction


def injections_of(model: Patcher) -> list:
    """Return what a MODEL injects into its network while it is loaded, such as LoRAs that ComfyUI loads by bypass."""
    return [injection for injections in model.injections.values() for injection in injections]


def layers_of(model: Patcher) -> dict[str, Any]:
    """Return what a MODEL puts in the place of parts of its network, by their paths; a compiled layer counts as itself."""
    replaced = {}
    for path, value in model.object_patches.items():
        if path.split(".")[0] == NETWORK and plain(value) is not plain(_original(model, path)):
            replaced[path] = plain(value)
    return replaced


def plain(layer: Any) -> Any:
    """Return a layer without torch.compile around it."""
    return getattr(layer, "_orig_mod", layer)


def _original(model: Patcher, path: str) -> Any:
    backup = model.object_patches_backup
    try:
        return backup[path] if path in backup else comfy.utils.get_attr(model.model, path)
    except AttributeError:
        return None  # there is nothing that it replaces


def options_of(model: Patcher) -> dict:
    """Return the options of a MODEL that have an effect on single predictions, with its own wrappers of these."""
    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    inner = options.setdefault("transformer_options", {})
    wrappers = inner["wrappers"] = {kind: dict(by_key) for kind, by_key in inner.get("wrappers", {}).items()}
    for kind in OF_PREDICTIONS:
        for key, functions in model.wrappers.get(kind, {}).items():
            wrappers.setdefault(kind, {})[key] = [*wrappers.get(kind, {}).get(key, []), *functions]
    return options


def differs(good: Patcher, bad: Patcher) -> bool:
    """Tell whether two MODELs of one network differ in anything but patches of weights that has an effect on predictions.

    ValueError if that is something which cannot be exchanged while the other one is sampled.
    """
    if _names(good.weight_wrapper_patches) != _names(bad.weight_wrapper_patches):
        raise ValueError("the bad model is the same MODEL with other functions on its weights (weight wrappers), which "
                         "cannot be exchanged while the good one is sampled: load the bad model from a file of its own")
    return (not _same(injections_of(good), injections_of(bad)) or not _same(layers_of(good), layers_of(bad))
            or not _same(_effective(good), _effective(bad)))


def acts_on_samplings_only(good: Patcher, bad: Patcher) -> bool:
    """Tell whether a bad MODEL has functions that the good one has not, but that no single prediction runs."""
    of_guidance = {key: functions for key, functions in bad.model_options.items() if key.startswith("sampler_")}
    known = {id(function) for model in (good.wrappers, good.callbacks) for by_key in model.values()
             for functions in by_key.values() for function in functions}
    known |= {id(each) for value in good.model_options.values() for each in (value if isinstance(value, list) else [value])}
    own = [function for model in (bad.wrappers, bad.callbacks) for by_key in model.values()
           for functions in by_key.values() for function in functions]
    own += [each for value in of_guidance.values() for each in (value if isinstance(value, list) else [value])]
    return any(id(function) not in known for function in own)


def is_left_out(good: Patcher, key: str) -> bool:
    """Tell whether ComfyUI has left out the patches of a weight: inside layers in the place of others it has other names."""
    replaced = [path for path in good.object_patches if path.split(".")[0] == NETWORK]
    if key in good.backup or not any(key.startswith(f"{path}.") for path in replaced):
        return False
    with without_layers(good):
        return not getattr(comfy.utils.get_attr(good.model, key.rpartition(".")[0]), "weight_function", None)


@contextmanager
def adapted(good: Patcher, adapters: Adapters) -> Iterator[None]:
    """Context manager: add low-rank updates to layers of a network by their own names, whatever is around them."""
    with ExitStack() as stack:
        with without_layers(good):
            stack.enter_context(with_adapters(good.model.diffusion_model, adapters))
        yield


def _names(wrappers: Mapping[str, list]) -> dict[str, list[int]]:
    return {key: [id(function) for function in functions] for key, functions in wrappers.items()}


def _effective(model: Patcher) -> dict:
    """The options that have an effect on a prediction before guidance."""
    options = options_of(model)
    return {"wrapper": options.get("model_function_wrapper"),
            **{key: value for key, value in options["transformer_options"].items() if key not in ("wrappers", "callbacks")},
            "wrappers": {kind: by_key for kind, by_key in options["transformer_options"]["wrappers"].items()
                         if kind in OF_PREDICTIONS and by_key}}


def _same(one: Any, other: Any) -> bool:
    """Whether two nests of mappings and lists hold the same objects."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (isinstance(one, (str, int, float, bool)) and one == other)


@contextmanager
def as_other(good: Patcher, other: Patcher) -> Iterator[None]:
    """Context manager: the network of a loaded MODEL is injected with, and has the layers of, another MODEL of it.

    Compiled layers run uncompiled.
    """
    with ExitStack() as stack:
        if not _same(injections_of(good), injections_of(other)):
            stack.enter_context(_injected(good, other))
        stack.enter_context(_with_layers(good, layers_of(good), layers_of(other)))
        stack.enter_context(uncompiled())
        yield


@contextmanager
def _injected(good: Patcher, other: Patcher) -> Iterator[None]:
    injections = injections_of(other)
    with good.use_ejected():
        try:
            for injection in injections:
                injection.inject(other)
            yield
        finally:
            for injection in reversed(injections):
                injection.eject(other)


@contextmanager
def _with_layers(good: Patcher, own: dict[str, Any], others: dict[str, Any]) -> Iterator[None]:
    changed = [path for path in {**own, **others} if own.get(path) is not others.get(path)]
    with _parts_replaced(good, {path: others[path] if path in others else _original(good, path) for path in changed}):
        yield


@contextmanager
def without_layers(model: Patcher) -> Iterator[None]:
    """Context manager: the network of a MODEL has its own layers, whichever MODEL of it is loaded."""
    backup = model.object_patches_backup
    with _parts_replaced(model, {path: value for path, value in backup.items() if path.split(".")[0] == NETWORK}):
        yield


@contextmanager
def _parts_replaced(model: Patcher, parts: dict[str, Any]) -> Iterator[None]:
    before = {}
    try:
        for path, value in parts.items():
            before[path] = comfy.utils.set_attr(model.model, path, value)
        yield
    finally:
        for path, value in before.items():
            comfy.utils.set_attr(model.model, path, value)


def uncompiled() -> AbstractContextManager:
    """Context manager: compiled layers run as they are written, since their code does not see what is added to layers."""
    stance = getattr(torch.compiler, "set_stance", None)  # of torch 2.6 and newer
    return stance("force_eager") if stance and "torch._dynamo" in sys.modules else nullcontext()


def make_injections_differentiable(*models: Patcher) -> None:
    """Exchange tensors of injections that loaders made in inference mode, which autograd never accepts, for equal copies."""
    with torch.inference_mode(False):
        replace_tensors(held_by(*(part for model in models for injection in injections_of(model)
                                  for part in (injection.inject, injection.eject))), _normal)


def _normal(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone() if tensor.is_inference() else tensor
