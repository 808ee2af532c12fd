"""Networks under ComfyUI's memory management: loaded, differentiable, and with room for their gradients."""
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import torch

from ..ppap_core.guidance import part_of
from ..ppap_core.guider import Guider
from ..ppap_core.memory import gradient_bytes
from ..ppap_core.optimise import Attempt

log = logging.getLogger(__name__)
SPARE = 1.5  # of what autograd keeps: the backward pass needs room of its own
THROUGH = 2.0  # of that share for a gradient through the model; what it keeps depends on its kind and is not known before
NO_WAY_BACK = ("grad", "backward", "derivative")  # words of torch where an operation cannot be differentiated
HOW_ELSE = "start ComfyUI with --disable-dynamic-vram, or choose 'in the prediction' as gradient"
SHARE = 1 / 4  # of the device's memory that a gradient may ask for; what needs more is done in parts of the batch


def patcher(model: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A network that ComfyUI moves and frees."""
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


def patcher_of(net: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """The one patcher of a guider's network: it lives on the network, because ComfyUI must not see it go first."""
    if not hasattr(net, "comfy_patcher"):
        net.comfy_patcher = patcher(net)
    return net.comfy_patcher


def settle(networks: Iterable[torch.nn.Module], device: torch.device) -> None:
    """Make networks differentiable where they are needed.

    ComfyUI moves weights in inference mode, which makes them inference tensors; and a plain guider shares its weights
    with its experts, so that freeing the one moves the other.
    """
    with torch.inference_mode(False):
        for net in networks:
            for tensor in (*net.parameters(), *net.buffers()):
                if tensor.is_inference() or tensor.device != device:
                    tensor.data = tensor.data.to(device, copy=True)


def private_copy(net: torch.nn.Module) -> torch.nn.Module:
    """A copy in main memory of a network that ComfyUI has. What dynamic VRAM hangs on its layers stands for memory of the
    original, which the end of a copied handle would free.
    """
    own = {id(value): None for part in net.modules() for name, value in vars(part).items()
           if _is_handle(name) and not isinstance(value, (int, float, str, type(None)))}  # one 3 is every 3
    found = copy.deepcopy(net, own).to("cpu")
    for part in found.modules():
        for name in filter(_is_handle, list(vars(part))):
            delattr(part, name)
    return found


def _is_handle(name: str) -> bool:
    return name.startswith(("dynamic_", "_v_", "_pin")) or name in ("_v", "_prefetch")


def for_gradients(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone of a MODEL that gradients can pass. With dynamic VRAM weights come and go while a model is at work, and a
    gradient needs them later: then it is loaded once more, in the older way, as ComfyUI itself does for hooks.
    """
    if not is_dynamic(model):
        return model.clone()
    if model.cached_patcher_init is None:
        raise ValueError("gradients cannot pass this model under dynamic VRAM, and its loader does not load it twice: "
                         f"{HOW_ELSE}")
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
                             f"VRAM: {HOW_ELSE}")
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
        if isinstance(error, torch.OutOfMemoryError) or not any(word in str(error) for word in NO_WAY_BACK):
            raise
        raise ValueError("gradients do not pass through this model, or through something that is applied to it "
                         f"({str(error).splitlines()[0]}): it cannot be trained, and elsewhere "
                         "choose 'in the prediction' as gradient") from error
    finally:
        management.in_training, management.NUM_STREAMS = before, streams


def with_gradients(net: torch.nn.Module) -> Attempt:
    """How passes with gradients through a network are done: as ComfyUI does them in training. From the first time on that
    memory runs out, what is kept for the gradient goes to main memory, which is slower.
    """
    lean = False

    def attempt(passes: Callable[[], torch.Tensor]) -> torch.Tensor:
        nonlocal lean
        if not lean:
            try:
                with differentiable_networks(), torch.autograd.graph.allow_mutation_on_saved_tensors():
                    return passes()
            except torch.OutOfMemoryError:
                log.info("memory runs out with a gradient through the model: going on with main memory, and more slowly")
        lean = True  # only here is the error gone, and with it the half-built graph that its frames hold
        comfy.model_management.soft_empty_cache()
        with differentiable_networks(), kept_in_main_memory(net):
            return passes()
    return attempt


@contextmanager
def kept_in_main_memory(net: torch.nn.Module):
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
    copy = tensor.detach().clone()
    return torch.nn.Parameter(copy, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else copy


def load_to_train(networks: Sequence[torch.nn.Module]) -> None:
    """Load networks and free all memory beside them: training keeps what it computes, and asks no model."""
    loaded = [patcher_of(net) for net in networks]
    comfy.model_management.load_models_gpu(loaded, memory_required=1e20, force_full_load=True)
    settle(networks, loaded[0].load_device)


def compute_type(model: comfy.model_patcher.ModelPatcher) -> torch.dtype:
    """The type a model computes in, which is not that of its weights where these are cast: float8, for one."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


class Room(comfy.controlnet.ControlBase):
    """Memory that the sampling needs beside the model: asked for as a ControlNet asks for its own."""

    def __init__(self, size: float):
        super().__init__()
        self.size = size

    def inference_memory_requirements(self, dtype: torch.dtype) -> float:
        return self.size

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False) -> "Room":
        clone = Room(self.size)
        if autoregister:
            self.multigpu_clones[load_device] = clone
        return clone


def room_for(guiders: Sequence[Guider], through: bool, key: str) -> Callable:
    """A wrapper of ComfyUI's prepare_sampling that makes room for the guiders' gradients before the model is loaded.

    through: whether gradients go through the model too, which keeps all that it computes.
    """
    @cache
    def needed(shape: tuple[int, ...], compute: torch.dtype, limit: float) -> float:
        return max((_memory_of(guider, shape, compute, limit) for guider in guiders), default=0.0)  # one runs after another

    def prepare(executor, model, noise_shape, conds: dict, *args: Any, **kwargs: Any) -> tuple:
        limit = SHARE * comfy.model_management.get_total_memory(model.load_device)
        size = needed(_as_images(tuple(noise_shape)), compute_type(model), limit) + through * THROUGH * limit
        others = [each["control"].size for each in conds.get(key, [])]  # of a guidance below this one
        loaded, _, *more = executor(model, noise_shape, conds | {key: [{"control": Room(max([size, *others]))}]}, *args,
                                    **kwargs)
        return loaded, conds, *more
    return prepare


def _as_images(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The frames of videos (B, C, T, h, w) are judged as images, (B T, C, h, w)."""
    return (shape[0] * shape[2], shape[1], *shape[3:]) if len(shape) == 5 else shape


def _memory_of(guider: Guider, shape: tuple[int, ...], compute: torch.dtype, limit: float) -> float:
    """Bytes for the gradient of a whole batch, or of as much of it as the limit allows, but at least of one image."""
    def bytes_for(count: int) -> float:
        part = part_of(guider, slice(0, count), shape[0])
        return SPARE * gradient_bytes(part, (count, *shape[1:]), compute, without=_hung_on(guider))
    try:
        whole = bytes_for(shape[0])
        return whole if whole <= limit else max(limit, bytes_for(1))
    except Exception as error:  # a network may do what cannot be followed without numbers, and sampling works all the same
        log.warning("the memory that %s needs cannot be told before it runs (%s): none is kept free for it", guider.name,
                    error)
        return 0.0


def _hung_on(guider: Guider) -> tuple:
    """What this pack keeps on networks that is not part of them."""
    networks = [each for each in (guider.net, guider.see) if isinstance(each, torch.nn.Module)]
    return tuple(value for net in networks for name, value in vars(net).items() if name in ("comfy_patcher", "loaded_as"))
