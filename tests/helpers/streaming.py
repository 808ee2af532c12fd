"""Dynamic VRAM's streaming of weights without a GPU: ComfyUI's own code, around video memory that this process has.

It takes away each weight the moment that ComfyUI gives it up, which on a graphics card happens when memory runs short.
"""
import ctypes
import sys
from typing import Any

import pytest
import torch

TAKEN_AWAY = 0xFF  # four such bytes are no number


class Waiting(torch.nn.Parameter):
    """A parameter that says to be on another device than what is multiplied with it."""

    device = torch.device("cuda:7")


class VideoMemory:
    """Stands for the native library. size: 0 is too small for any weight, each of which then gets memory of its own."""

    def __init__(self, size: int = 1):
        self.size, self.users, self.contents, self.uses = size, dict[int, int](), list[bytearray](), list[int]()

    def add(self, layer: torch.nn.Module) -> None:
        """Stream the weights of a layer, as ModelPatcherDynamic sets it up."""
        from comfy.memory_management import vram_aligned_size

        self.contents.append(bytearray([TAKEN_AWAY]) * vram_aligned_size([layer.weight, layer.bias]))
        self.uses.append(0)
        layer._v, layer._v_signature, layer._pin_state = (None, len(self.contents) - 1, 0), None, {}
        layer.weight = Waiting(layer.weight.data, requires_grad=False)

    def fault(self, alloc: tuple) -> Any:
        place = alloc[1]
        self.users[place] = self.users.get(place, 0) + self.size
        return (ctypes.c_uint32 * 1)(self.uses[place]) if self.size else None

    def unpin(self, alloc: tuple) -> None:
        place = alloc[1]
        self.users[place] -= 1
        if not self.users[place]:
            self.contents[place][:] = bytearray([TAKEN_AWAY]) * len(self.contents[place])
            self.uses[place] += 1

    def tensor(self, alloc: tuple, device: torch.device) -> torch.Tensor:
        return torch.frombuffer(self.contents[alloc[1]], dtype=torch.uint8)


def stream(networks: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch, size: int = 1) -> VideoMemory:
    """Stream the weights of networks' layers for the rest of a test."""
    import comfy.model_management as management
    import comfy_aimdo.torch
    from comfy.cli_args import args
    from comfy_aimdo import model_vbar

    def is_cpu(device: torch.device) -> bool:
        streams = sys._getframe(1).f_globals["__name__"] == "comfy.ops"  # which knows this path for graphics cards only
        return device.type == "cpu" and not streams

    memory = VideoMemory(size)
    monkeypatch.setattr(management, "is_device_cpu", is_cpu)
    monkeypatch.setattr(args, "disable_pinned_memory", True)
    monkeypatch.setattr(model_vbar, "vbar_fault", memory.fault)
    monkeypatch.setattr(model_vbar, "vbar_unpin", memory.unpin)
    monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", memory.tensor)
    for layer in (part for net in networks for part in net.modules()):
        if hasattr(layer, "comfy_cast_weights") and isinstance(getattr(layer, "weight", None), torch.nn.Parameter):
            layer.comfy_cast_weights = True
            memory.add(layer)
    return memory
