"""Networks under ComfyUI's memory management: loaded, differentiable, and with room for their gradients."""
import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import torch

from ...ppap_core.guidance.gradients import part_of
from ...ppap_core.guidance.memory import gradient_bytes
from ...ppap_core.guiders.guider import Guider

log = logging.getLogger(__name__)
BACKWARD_OVERHEAD = 1.5  # of what autograd keeps: the backward pass needs room of its own
MODEL_GRADIENT_FACTOR = 2.0  # of that share for a gradient through the model; what it keeps depends on its kind and is not known before
MAX_GRADIENT_SHARE = 1 / 4  # of the device's memory that a gradient may ask for; what needs more is done in parts of the batch


def patcher(model: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A network that ComfyUI moves and frees."""
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


def patcher_of(net: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """The one patcher of a guider's network: it lives on the network, because ComfyUI must not see it go first."""
    if not hasattr(net, "comfy_patcher"):
        net.comfy_patcher = patcher(net)
    return net.comfy_patcher


def materialize_on(networks: Iterable[torch.nn.Module], device: torch.device) -> None:
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


def load_to_train(networks: Sequence[torch.nn.Module]) -> None:
    """Load networks and free all memory beside them: training keeps what it computes, and asks no model."""
    loaded = [patcher_of(net) for net in networks]
    comfy.model_management.load_models_gpu(loaded, memory_required=1e20, force_full_load=True)
    materialize_on(networks, loaded[0].load_device)


def compute_type(model: comfy.model_patcher.ModelPatcher) -> torch.dtype:
    """The type a model computes in, which is not that of its weights where these are cast: float8, for one."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


class MemoryReservation(comfy.controlnet.ControlBase):
    """Memory that the sampling needs beside the model: asked for as a ControlNet asks for its own."""

    def __init__(self, size: float):
        super().__init__()
        self.size = size

    def inference_memory_requirements(self, dtype: torch.dtype) -> float:
        return self.size

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False) -> "MemoryReservation":
        clone = MemoryReservation(self.size)
        if autoregister:
            self.multigpu_clones[load_device] = clone
        return clone


def reserve_gradient_memory(guiders: Sequence[Guider], through: bool, key: str) -> Callable:
    """A wrapper of ComfyUI's prepare_sampling that makes room for the guiders' gradients before the model is loaded.

    through: whether gradients go through the model too, which keeps all that it computes.
    """
    @cache
    def needed(shape: tuple[int, ...], compute: torch.dtype, limit: float) -> float:
        return max((_memory_of(guider, shape, compute, limit) for guider in guiders), default=0.0)  # one runs after another

    def prepare(executor, model, noise_shape, conds: dict, *args: Any, **kwargs: Any) -> tuple:
        limit = MAX_GRADIENT_SHARE * comfy.model_management.get_total_memory(model.load_device)
        size = needed(_as_images(tuple(noise_shape)), compute_type(model), limit) + through * MODEL_GRADIENT_FACTOR * limit
        others = [each["control"].size for each in conds.get(key, [])]  # of a guidance below this one
        loaded, _, *more = executor(model, noise_shape, conds | {key: [{"control": MemoryReservation(max([size, *others]))}]}, *args,
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
        return BACKWARD_OVERHEAD * gradient_bytes(part, (count, *shape[1:]), compute, without=_pack_attributes(guider))
    try:
        whole = bytes_for(shape[0])
        return whole if whole <= limit else max(limit, bytes_for(1))
    except Exception as error:  # a network may do what cannot be followed without numbers, and sampling works all the same
        log.warning("the memory that %s needs cannot be told before it runs (%s): none is kept free for it", guider.name,
                    error)
        return 0.0


def _pack_attributes(guider: Guider) -> tuple:
    """What this pack keeps on networks that is not part of them."""
    networks = [each for each in (guider.net, guider.decode) if isinstance(each, torch.nn.Module)]
    return tuple(value for net in networks for name, value in vars(net).items() if name in ("comfy_patcher", "loaded_as"))
