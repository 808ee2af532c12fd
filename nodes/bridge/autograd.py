"""Gradients through ComfyUI's networks: out of inference mode, past dynamic VRAM, within the memory at hand."""
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch

from ...ppap_core.io.storage import is_wrapper, rewrapped, storages
from .differentiable import OutputsThatLearn, kernels_in_torch, mutation_allowed
from .memory import FULL_PRECISION, log, replace_tensors
from .shared_weights import make_injections_differentiable
from .streaming import StreamedWeights, renew_streamed

Result = TypeVar("Result")
NOT_DIFFERENTIABLE_HINTS = ("grad", "backward", "derivative")  # words of torch where an operation cannot be differentiated
PROMPT_CACHES_OFF = {"qwen_image21_cache": {"device": "off"}}  # else a gradient would go back into earlier steps
NO_GRADIENT_ADVICE = "choose 'in the prediction' as gradient, and no readout"


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ComfyUI's inference mode: networks and targets made in it could never be differentiated through."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def for_gradients(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """Clone a MODEL so that gradients can pass through it.

    A model under dynamic VRAM is loaded a second time without it, as ComfyUI itself does for weight hooks. If its loader
    cannot do that, its weights are streamed and held while a gradient needs them, as those of models beside it.
    """
    if not is_dynamic(model) or model.cached_patcher_init is None:
        return model.clone()
    return model.get_non_dynamic_delegate()


def is_dynamic(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Tell whether dynamic VRAM moves the weights of a model; older versions of ComfyUI have no dynamic VRAM."""
    return hasattr(model, "is_dynamic") and model.is_dynamic()


def make_differentiable(guider: comfy.samplers.CFGGuider, extra_args: dict) -> None:
    """Let gradients pass through a model that is loaded for sampling, and through the models and ControlNets beside it.

    Loaders make weights in inference mode, which autograd never accepts. guider: ComfyUI's guider of that sampling.
    extra_args: of its sampler, whose options are changed in place.
    """
    extra_args["model_options"].setdefault("transformer_options", {}).update(PROMPT_CACHES_OFF)
    for patcher in (guider.model_patcher, *guider.loaded_models):
        if hasattr(patcher, "unpin_all_weights") and not is_dynamic(patcher):
            patcher.unpin_all_weights()
    replace_tensors(networks_of(guider), lambda tensor: tensor.is_inference() and not is_wrapper(tensor))
    make_injections_differentiable(guider.model_patcher)


def networks_of(guider: comfy.samplers.CFGGuider) -> list[torch.nn.Module]:
    """Return the network that a sampling runs, and those of the models and ControlNets beside it."""
    candidates = [guider.inner_model, *(getattr(patcher, "model", None) for patcher in guider.loaded_models)]
    candidates += [value for control in _controls(guider.conds) for value in vars(control).values()]
    return [net for net in candidates if isinstance(net, torch.nn.Module)]


def _controls(conds: dict) -> Iterator[comfy.controlnet.ControlBase]:
    """Yield ControlNets and T2I-Adapters with those they are chained to; not all of them are loaded as models are."""
    for control in (cond["control"] for kind in conds.values() for cond in kind if "control" in cond):
        while control is not None:
            yield control
            control = control.previous_controlnet


@contextmanager
def differentiable_networks() -> Iterator[None]:
    """Run ComfyUI's networks in training mode, without weight streaming.

    Newer versions of ComfyUI have separate code for training. Streamed weights would pass through memory that the next
    weight overwrites. ValueError for a network that is not differentiable even so.
    """
    management = comfy.model_management
    before = getattr(management, "in_training", None)  # older versions have one code path, which is differentiable
    streams = management.NUM_STREAMS
    try:
        management.in_training, management.NUM_STREAMS = True, 0
        with kernels_in_torch(), OutputsThatLearn():
            yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(word in str(error) for word in NOT_DIFFERENTIABLE_HINTS):
            raise
        raise ValueError("gradients do not pass through this model, or through something that is applied to it "
                         f"({str(error).splitlines()[0]}): it cannot be trained, and elsewhere "
                         f"{NO_GRADIENT_ADVICE}") from error
    finally:
        management.in_training, management.NUM_STREAMS = before, streams


def has_fast_products(layer: torch.nn.Module) -> bool:
    """Tell whether a layer of ComfyUI's would round its inputs to the type of its quantised weights."""
    return vars(layer).get(FULL_PRECISION) is False and getattr(layer, "layout_type", None) is not None


class QuantizedLayers:
    """Quantised layers of networks, which gradients pass as long as the context is open.

    They multiply in the type of their inputs, by ComfyUI's own switch for graphics cards that cannot multiply in the type of
    the weights: the gradient of its quantised products fails in networks that change their outputs in place. Loaders made
    the weights in inference mode. Only the wrapper of a weight is made anew, and the old one is put back: ComfyUI could not
    move another one.
    """

    def __init__(self, networks: Iterable[torch.nn.Module]):
        self.layers = [layer for net in networks for layer in net.modules()]
        self.changed: list[tuple[dict[str, Any], str, Any]] = []  # (owner, name, value before)

    def __enter__(self) -> None:
        with torch.inference_mode(False):
            for layer in self.layers:
                if has_fast_products(layer):
                    self._change(vars(layer), FULL_PRECISION, True)
                for name, weight in layer._parameters.items():
                    if is_wrapper(weight) and weight.is_inference():
                        self._change(layer._parameters, name, rewrapped(weight))

    def _change(self, owner: dict[str, Any], name: str, value: Any) -> None:
        self.changed.append((owner, name, owner[name]))
        owner[name] = value

    def __exit__(self, *error: Any) -> None:
        for owner, name, before in self.changed:
            owner[name] = before


class GradientPass:
    """Forward and backward passes through networks of ComfyUI's, which go on when memory runs out.

    From the first time on that it does, what is kept for the gradient goes to main memory: slower, with equal results.
    """

    def __init__(self, *networks: torch.nn.Module):
        self.networks, self.saves_on_cpu, self.is_open = networks, False, False
        if count := sum(has_fast_products(layer) for net in networks for layer in net.modules()):
            log.info("%d quantised layers multiply in the type of their inputs where gradients go through them, more slowly",
                     count)

    def run(self, step: Callable[[], Result]) -> Result:
        """Call `step`, which runs the network and may be called a second time, and return its result.

        Within a step of the same pass it is just called.
        """
        if self.is_open:
            return step()
        try:
            self.is_open = True
            return self._run(step)
        finally:
            self.is_open = False

    def _run(self, step: Callable[[], Result]) -> Result:
        renew_streamed(self.networks)
        if not self.saves_on_cpu:
            try:
                with differentiable_networks(), QuantizedLayers(self.networks), StreamedWeights(self.networks), \
                        mutation_allowed():
                    return step()
            except torch.OutOfMemoryError:
                log.info("out of memory with a gradient through the model: continuing with main memory, more slowly")
        self.saves_on_cpu = True  # set out here, where the error is gone with the half-built graph that its frames hold
        comfy.model_management.soft_empty_cache()
        with differentiable_networks(), QuantizedLayers(self.networks), save_activations_on_cpu(*self.networks):
            return step()


class _CpuStorage:
    """Saved tensors in main memory; weights stay where they are."""

    def __init__(self, networks: Iterable[torch.nn.Module]):
        self.weights = {storage.data_ptr() for net in networks for tensor in (*net.parameters(), *net.buffers())
                        for storage in storages(tensor)}

    def pack(self, tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        is_weight = all(storage.data_ptr() in self.weights for storage in storages(tensor))
        return tensor.device, tensor if is_weight else tensor.detach().to("cpu", copy=True)

    def unpack(self, packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        device, tensor = packed
        return tensor.to(device)


def save_activations_on_cpu(*networks: torch.nn.Module) -> torch.autograd.graph.saved_tensors_hooks:
    """Context manager: what a pass keeps for its gradient waits in main memory, as copies.

    Unlike recomputation this is exact for every network, even for the many blocks of ComfyUI that change their inputs in
    place.
    """
    storage = _CpuStorage(networks)
    return torch.autograd.graph.saved_tensors_hooks(storage.pack, storage.unpack)
