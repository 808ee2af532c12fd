"""Networks under ComfyUI's memory management: loaded, differentiable, and with room for their gradients."""
import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import torch

from ...ppap_core.guidance.gradients import slice_guider
from ...ppap_core.guidance.memory import gradient_bytes
from ...ppap_core.guiders.guider import Guider
from ...ppap_core.io.storage import independent_copy, is_wrapper
from .hooks import Feature
from .streaming import SOURCES, is_streamed

log = logging.getLogger(__name__)
BACKWARD_OVERHEAD = 1.5      # memory of a gradient over what autograd keeps: the backward pass needs room of its own
MODEL_GRADIENT_FACTOR = 2.0  # of MAX_GRADIENT_SHARE, for a gradient through the model: its real need is not known beforehand
MAX_GRADIENT_SHARE = 1 / 4   # of the device's memory for one gradient; what needs more is done in parts of the batch
FULL_PRECISION = "_full_precision_mm"  # switch of ComfyUI's quantised layers: whether they multiply in the inputs' type
PACK_DATA = "_ppap"          # attribute of a network


@dataclass
class PackData:
    """Attributes that this pack keeps on a network."""

    patcher: comfy.model_patcher.ModelPatcher | None = None
    guider: Guider | None = None  # as it was loaded, but without its network, which would otherwise hold itself

    def __deepcopy__(self, memo: dict) -> "PackData":
        return PackData()  # a copy of the network is another network


def module_of(guider: Guider) -> torch.nn.Module:
    """Return the network of a guider, which in ComfyUI always is a torch module; a rule is one without weights."""
    if not isinstance(guider.net, torch.nn.Module):
        raise ValueError(f"the network of {guider.name} is {type(guider.net).__name__}, expected a torch module")
    return guider.net


def pack_data(net: torch.nn.Module) -> PackData:
    """Return what this pack keeps on a network."""
    return vars(net).setdefault(PACK_DATA, PackData())


def patcher(model: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """Put a network under ComfyUI's memory management."""
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


def patcher_of(net: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """Return the one patcher of a guider's network. It lives as long as the network, which ComfyUI requires."""
    data = pack_data(net)
    if data.patcher is None:
        data.patcher = patcher(net)
    return data.patcher


def materialize_on(networks: Iterable[torch.nn.Module], device: torch.device) -> None:
    """Make networks differentiable on the device where they are needed.

    ComfyUI moves weights in inference mode, which makes them inference tensors; and a plain guider shares its weights
    with its experts, so that freeing one of them moves the other. Their data are exchanged, where the tensor accepts others.
    """
    def is_elsewhere(tensor: torch.Tensor) -> bool:
        return tensor.is_inference() or tensor.device != device

    def takes_no_data(tensor: torch.Tensor) -> bool:
        return is_wrapper(tensor) or not has_version(tensor)

    networks = list(networks)
    replace_tensors(networks, lambda tensor: is_elsewhere(tensor) and takes_no_data(tensor), device)
    with torch.inference_mode(False):
        for net in networks:
            for tensor in (*net.parameters(), *net.buffers()):
                if is_elsewhere(tensor):
                    tensor.data = tensor.data.to(device, copy=True)


def has_version(tensor: torch.Tensor) -> bool:
    """Tell whether autograd could follow a tensor with other data in it: never one that was made in inference mode."""
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def replace_tensors(networks: Iterable[torch.nn.Module], chosen: Callable[[torch.Tensor], bool],
                    device: torch.device | None = None) -> None:
    """Exchange chosen parameters and buffers for equal copies in place, which autograd accepts.

    device: of the copies; None: that of each tensor. What layers share stays shared, and what dynamic VRAM streams to them
    is left where it waits.
    """
    copies: dict[int, torch.Tensor] = {}
    with torch.inference_mode(False):
        for module in (part for net in networks for part in net.modules()):
            owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in owned:
                for name, tensor in tensors.items():
                    if tensor is not None and chosen(tensor) and not (name in SOURCES and is_streamed(module)):
                        if id(tensor) not in copies:
                            copies[id(tensor)] = independent_copy(tensor, device)
                        tensors[name] = copies[id(tensor)]


def private_copy(net: torch.nn.Module) -> torch.nn.Module:
    """Copy a network of ComfyUI's to main memory for gradients: without its dynamic-VRAM handles, and not quantised.

    A handle stands for memory of the original, which would be freed when the copied handle is.
    """
    memo: dict[int, Any] = {id(value): None for part in net.modules() for name, value in vars(part).items()
                            if _is_handle(name) and not isinstance(value, (int, float, str, type(None)))}  # they share id()
    memo |= {id(weight): torch.nn.Parameter(weight.dequantize(), requires_grad=False) for weight in net.parameters()
             if is_wrapper(weight)}
    copied = copy.deepcopy(net, memo).to("cpu")
    for part in copied.modules():
        if FULL_PRECISION in vars(part):
            setattr(part, FULL_PRECISION, True)
        for name in filter(_is_handle, list(vars(part))):
            delattr(part, name)
    return copied


def _is_handle(name: str) -> bool:
    return name.startswith(("dynamic_", "_v_", "_pin")) or name in ("_v", "_prefetch")


def load_to_train(networks: Sequence[torch.nn.Module]) -> None:
    """Load networks and free all other memory: training keeps its activations, and runs no diffusion model."""
    patchers = [patcher_of(net) for net in networks]
    comfy.model_management.load_models_gpu(patchers, memory_required=1e20, force_full_load=True)
    materialize_on(networks, patchers[0].load_device)


def compute_type(model: comfy.model_patcher.ModelPatcher) -> torch.dtype:
    """Return the type a model computes in. Weights that are cast, such as float8, have another."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


class MemoryReservation(comfy.controlnet.ControlBase):
    """Memory that sampling needs beside the model, asked for as a ControlNet asks for its own."""

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


class GradientMemory(Feature):
    """Keeps memory free for the gradients of guiders, before ComfyUI loads the model.

    guiders: those whose gradients are taken, one after another. through_model: whether gradients also go back through the
    model, for which autograd keeps all that the model computes. key: of the reservation among the conditioning.
    """

    def __init__(self, guiders: Sequence[Guider], through_model: bool, key: str):
        self.guiders, self.through_model, self.key = guiders, through_model, key
        self._sizes: dict[tuple, float] = {}

    def reserve(self, executor: Any, model: comfy.model_patcher.ModelPatcher, noise_shape: Sequence[int], conds: dict,
                *args: Any, **kwargs: Any) -> tuple:
        """Wrap ComfyUI's prepare_sampling: load the models beside the reservation, and return the conditioning as it was."""
        limit = MAX_GRADIENT_SHARE * comfy.model_management.get_total_memory(model.load_device)
        size = self._guider_bytes(tuple(noise_shape), compute_type(model), limit)
        size += self.through_model * MODEL_GRADIENT_FACTOR * limit
        below = [cond["control"].size for cond in conds.get(self.key, [])]  # reserved by a guidance below this one
        reserved = {self.key: [{"control": MemoryReservation(max([size, *below]))}]}
        loaded, _, *rest = executor(model, noise_shape, conds | reserved, *args, **kwargs)
        return loaded, conds, *rest

    def _guider_bytes(self, *need: Any) -> float:
        """Bytes of the largest need, since guiders run one after another; found once for each shape, type and limit."""
        if need not in self._sizes:
            self._sizes[need] = max((_bytes_of(guider, *need) for guider in self.guiders), default=0.0)
        return self._sizes[need]


def _as_images(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Guiders judge the frames of videos (B, C, T, h, w) as images (B T, C, h, w)."""
    return (shape[0] * shape[2], shape[1], *shape[3:]) if len(shape) == 5 else shape


def _bytes_of(guider: Guider, sampled: tuple[int, ...], compute: torch.dtype, limit: float) -> float:
    """Bytes for the gradient of a whole batch, or of as much of it as the limit allows, but at least of one image."""
    shape, frames = _as_images(sampled), sampled[2] if len(sampled) == 5 else 1
    if of_frames := getattr(guider.decode, "of_frames", None):
        guider = replace(guider, decode=of_frames(frames))
    try:
        whole = _bytes_of_images(guider, shape[0], shape, compute)
        return whole if whole <= limit else max(limit, _bytes_of_images(guider, 1, shape, compute))
    except Exception as error:  # a network may do what cannot be traced without numbers, and sampling works all the same
        log.warning("the memory that %s needs is not known before it runs (%s): none is kept free", guider.name, error)
        return 0.0


def _bytes_of_images(guider: Guider, count: int, shape: tuple[int, ...], compute: torch.dtype) -> float:
    part = slice_guider(guider, slice(0, count), shape[0])
    return BACKWARD_OVERHEAD * gradient_bytes(part, (count, *shape[1:]), compute)
