"""Gradients through ComfyUI's networks: out of inference mode, past dynamic VRAM, within the memory at hand."""
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch

from .memory import log
from .shared_weights import make_injections_differentiable

NOT_DIFFERENTIABLE_HINTS = ("grad", "backward", "derivative")  # words of torch where an operation cannot be differentiated
DYNAMIC_VRAM_ADVICE = "start ComfyUI with --disable-dynamic-vram, or choose 'in the prediction' as gradient"


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ComfyUI's inference mode: networks and targets made in it could never be differentiated through."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def for_gradients(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """Clone a MODEL so that gradients can pass through it.

    Dynamic VRAM moves weights in and out while a model is at work, but a gradient needs them later. Such a model is loaded a
    second time without it, as ComfyUI itself does for weight hooks. ValueError if its loader cannot load it twice.
    """
    if not is_dynamic(model):
        return model.clone()
    if model.cached_patcher_init is None:
        raise ValueError("gradients cannot pass through this model under dynamic VRAM, and its loader cannot load it twice: "
                         f"{DYNAMIC_VRAM_ADVICE}")
    return model.get_non_dynamic_delegate()


def is_dynamic(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Tell whether dynamic VRAM moves the weights of a model; older versions of ComfyUI have no dynamic VRAM."""
    return hasattr(model, "is_dynamic") and model.is_dynamic()


def make_differentiable(guider: comfy.samplers.CFGGuider) -> None:
    """Let gradients pass through a model that is loaded for sampling, and through the models and ControlNets beside it.

    guider: ComfyUI's guider of that sampling. ValueError for a model under dynamic VRAM.
    """
    loaded = (guider.model_patcher, *guider.loaded_models)
    _hold_weights_in_place(loaded)
    candidates = [guider.inner_model, *(getattr(patcher, "model", None) for patcher in loaded[1:])]
    candidates += [value for control in _controls(guider.conds) for value in vars(control).values()]
    _replace_inference_tensors(net for net in candidates if isinstance(net, torch.nn.Module))
    make_injections_differentiable(guider.model_patcher)


def _hold_weights_in_place(loaded: Iterable[comfy.model_patcher.ModelPatcher]) -> None:
    for patcher in loaded:
        if is_dynamic(patcher):
            raise ValueError(f"gradients cannot pass through {type(patcher.model).__name__}, which runs beside the model, "
                             f"under dynamic VRAM: {DYNAMIC_VRAM_ADVICE}")
        if hasattr(patcher, "unpin_all_weights"):
            patcher.unpin_all_weights()


def _replace_inference_tensors(networks: Iterable[torch.nn.Module]) -> None:
    """Exchange weights that loaders made in inference mode, which autograd never accepts, for equal copies in place."""
    copies: dict[int, torch.Tensor] = {}  # by id: weights that layers share stay shared
    with torch.inference_mode(False):
        for module in (part for net in networks for part in net.modules()):
            owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in owned:
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        if id(tensor) not in copies:
                            copies[id(tensor)] = _normal_copy(tensor)
                        tensors[name] = copies[id(tensor)]


def _normal_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.detach().clone()
    return torch.nn.Parameter(copy, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else copy


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
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(word in str(error) for word in NOT_DIFFERENTIABLE_HINTS):
            raise
        raise ValueError("gradients do not pass through this model, or through something that is applied to it "
                         f"({str(error).splitlines()[0]}): it cannot be trained, and elsewhere "
                         "choose 'in the prediction' as gradient") from error
    finally:
        management.in_training, management.NUM_STREAMS = before, streams


class _Held(WeakKeyDictionary):
    """Saved tensors that stay in memory when they are deleted here."""

    def __init__(self) -> None:
        super().__init__()
        self.deleted: list[torch.Tensor] = []

    def __delitem__(self, key: Any) -> None:
        self.deleted.append(self[key])
        super().__delitem__(key)


@contextmanager
def mutation_allowed() -> Iterator[None]:
    """Context manager: networks may change in place what autograd has saved.

    torch copies a saved tensor before it is changed, lets go of it, and knows it by the identity, address and version of
    the object. A later tensor can have all three and would be given the wrong copy, and so a wrong gradient, without an
    error. Here the originals are held until the pass ends.
    """
    with torch.autograd.graph.allow_mutation_on_saved_tensors() as context:
        context.original = _Held()
        yield


class GradientPass:
    """Forward and backward passes through a network of ComfyUI's, which go on when memory runs out.

    From the first time on that it does, what is kept for the gradient goes to main memory: slower, with equal results.
    """

    def __init__(self, net: torch.nn.Module):
        self.net, self.saves_on_cpu = net, False

    def run(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Call `step`, which runs the network and may be called a second time, and return its result."""
        if not self.saves_on_cpu:
            try:
                with differentiable_networks(), mutation_allowed():
                    return step()
            except torch.OutOfMemoryError:
                log.info("out of memory with a gradient through the model: continuing with main memory, more slowly")
        self.saves_on_cpu = True  # set out here, where the error is gone with the half-built graph that its frames hold
        comfy.model_management.soft_empty_cache()
        with differentiable_networks(), save_activations_on_cpu(self.net):
            return step()


class _CpuStorage:
    """Saved tensors in main memory; weights stay where they are."""

    def __init__(self, net: torch.nn.Module):
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}

    def pack(self, tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        is_weight = tensor.untyped_storage().data_ptr() in self.weights
        return tensor.device, tensor if is_weight else tensor.detach().to("cpu", copy=True)

    def unpack(self, packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
        device, tensor = packed
        return tensor.to(device)


def save_activations_on_cpu(net: torch.nn.Module) -> torch.autograd.graph.saved_tensors_hooks:
    """Context manager: what a pass keeps for its gradient waits in main memory, as copies.

    Unlike recomputation this is exact for every network, even for the many blocks of ComfyUI that change their inputs in
    place.
    """
    storage = _CpuStorage(net)
    return torch.autograd.graph.saved_tensors_hooks(storage.pack, storage.unpack)
