"""Gradients through ComfyUI's networks: out of inference mode, past dynamic VRAM, within the memory at hand."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import torch

from ...ppap_core.training.loop import RunStep
from .memory import log


@contextmanager
def autograd():
    """Leave ComfyUI's inference mode: networks and targets made in it could never be differentiated through."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


NOT_DIFFERENTIABLE_HINTS = ("grad", "backward", "derivative")  # words of torch where an operation cannot be differentiated
DYNAMIC_VRAM_ADVICE = "start ComfyUI with --disable-dynamic-vram, or choose 'in the prediction' as gradient"


def for_gradients(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone of a MODEL that gradients can pass. With dynamic VRAM weights come and go while a model is at work, and a
    gradient needs them later: then it is loaded once more, in the older way, as ComfyUI itself does for hooks.
    """
    if not is_dynamic(model):
        return model.clone()
    if model.cached_patcher_init is None:
        raise ValueError("gradients cannot pass this model under dynamic VRAM, and its loader does not load it twice: "
                         f"{DYNAMIC_VRAM_ADVICE}")
    return model.get_non_dynamic_delegate()


def is_dynamic(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether dynamic VRAM moves the weights of a model; older versions have none."""
    return hasattr(model, "is_dynamic") and model.is_dynamic()


def make_differentiable(guider: Any) -> None:
    """Let gradients pass through a model that is loaded for a sampling, and through the ControlNets beside it.

    guider: ComfyUI's, of that sampling. Loaders make weights in inference mode, which autograd refuses for ever: they are
    exchanged for copies that stay where they were, bit for bit. ValueError under dynamic VRAM.
    """
    for each in (guider.model_patcher, *guider.loaded_models):
        if is_dynamic(each):
            raise ValueError(f"gradients cannot pass {type(each.model).__name__}, which is beside the model, under dynamic "
                             f"VRAM: {DYNAMIC_VRAM_ADVICE}")
        if hasattr(each, "unpin_all_weights"):
            each.unpin_all_weights()
    beside = [guider.inner_model, *(getattr(each, "model", None) for each in guider.loaded_models)]
    beside += [each for control in _controls(guider.conds) for each in vars(control).values()]
    copies: dict[int, torch.Tensor] = {}  # weights that layers share stay shared
    with torch.inference_mode(False):
        for module in (part for net in beside if isinstance(net, torch.nn.Module) for part in net.modules()):
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is not None and tensor.is_inference():
                        if id(tensor) not in copies:
                            copies[id(tensor)] = _normal(tensor)
                        own[name] = copies[id(tensor)]


def _controls(conds: dict) -> Iterator[comfy.controlnet.ControlBase]:
    """ControlNets and T2I-Adapters; not all of them are loaded as models are."""
    for control in (each["control"] for kind in conds.values() for each in kind if "control" in each):
        while control is not None:
            yield control
            control = control.previous_controlnet


@contextmanager
def differentiable_networks():
    """Let ComfyUI's networks take the way that they take in training, where it has one, and let none of their weights pass
    through memory that the next one takes, as those do that wait in main memory.

    ValueError for a network that has no such way.
    """
    management = comfy.model_management
    before = getattr(management, "in_training", None)  # older versions have no second way, and need none
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


def with_gradients(net: torch.nn.Module) -> RunStep:
    """How passes with gradients through a network are done: as ComfyUI does them in training. From the first time on that
    memory runs out, what is kept for the gradient goes to main memory, which is slower.
    """
    lean = False

    def run_step(passes: Callable[[], torch.Tensor]) -> torch.Tensor:
        nonlocal lean
        if not lean:
            try:
                with differentiable_networks(), torch.autograd.graph.allow_mutation_on_saved_tensors():
                    return passes()
            except torch.OutOfMemoryError:
                log.info("memory runs out with a gradient through the model: going on with main memory, and more slowly")
        lean = True  # only here is the error gone, and with it the half-built graph that its frames hold
        comfy.model_management.soft_empty_cache()
        with differentiable_networks(), save_activations_on_cpu(net):
            return passes()
    return run_step


@contextmanager
def save_activations_on_cpu(net: torch.nn.Module):
    """What a pass keeps for its gradient waits in main memory, as copies that work in place cannot change.

    Unlike computing again, this is exact for every network: many of ComfyUI's blocks change what they were given. Weights
    stay where they are.
    """
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}

    def keep(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        stays = tensor.untyped_storage().data_ptr() in weights
        return tensor.device, tensor if stays else tensor.detach().to("cpu", copy=True)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept[1].to(kept[0])):
        yield


def _normal(tensor: torch.Tensor) -> torch.Tensor:
    clone = tensor.detach().clone()
    return torch.nn.Parameter(clone, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else clone
