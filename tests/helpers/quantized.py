"""The small families with weights as artists download them: quantised by ComfyUI itself, or packed as other packs do.

Every weight of a linear layer is quantised; all else stays as it is. ComfyUI's layers multiply in the quantised type, as
they do on newer graphics cards.
"""
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.model_families import Small, small, unfilled, with_conditioning

BLOCK = 16  # values of a packed tensor that share a scale


def quantized(name: str, kind: str, factor: float = 1.0) -> Small:
    """A family with quantised weights; the test is skipped where this ComfyUI has none of that kind.

    kind: one of KINDS. factor: of the scales, for weights that differ in nothing else; a power of 2, as some scales are.
    """
    logging.getLogger("comfy_kitchen").setLevel(logging.ERROR)  # a CPU multiplies in no type of fewer bits, and says so
    return with_conditioning(name, KINDS[kind](name, kind, factor))


def dequantized(name: str, model: Any) -> Small:
    """The same family in float32, with the values of a model's quantised weights."""
    plain = unfilled(name, torch.float32)
    layers = dict(model.model.diffusion_model.named_modules())
    with torch.no_grad():
        for place, layer in plain.model.diffusion_model.named_modules():
            for part, tensor in {**layer._parameters, **layer._buffers}.items():
                if tensor is not None:
                    tensor.copy_(values_of(layers[place], part))
    return with_conditioning(name, plain)


def values_of(layer: Any, part: str = "weight") -> Tensor:
    """The numbers of a tensor of a layer in float32, whatever they are kept as."""
    tensor = getattr(layer, part)
    if type(tensor).dequantize is not Tensor.dequantize:
        tensor = tensor.dequantize()
    scale = getattr(layer, "scale_weight", None) if part == "weight" else None  # of ComfyUI 0.3.64
    return tensor.float() if scale is None else tensor.float() * scale


def linear_layers(name: str) -> dict[str, Tensor]:
    """The linear layers of a family in float32, all of which are quantised, with their weights."""
    net = small(name).model.model.diffusion_model
    return {place: layer.weight for place, layer in net.named_modules() if isinstance(layer, nn.Linear)}


def _in_comfyui_s_format(name: str, kind: str, factor: float) -> Any:
    import comfy.ops

    if not hasattr(comfy.ops, "mixed_precision_ops"):
        return _in_the_older_format(name, kind, factor)
    model = unfilled(name, torch.float32, operations=comfy.ops.mixed_precision_ops({}, torch.float32))
    state = small(name).model.model.diffusion_model.state_dict()
    for layer, weight in linear_layers(name).items():
        del state[f"{layer}.weight"]
        state |= {f"{layer}.{part}": tensor for part, tensor in quantized_parts(weight, kind, factor).items()}
    model.model.load_model_weights(state)
    return model


def quantized_parts(weight: Tensor, kind: str, factor: float = 1.0) -> dict[str, Tensor]:
    """The entries of a state dict for a weight of a layer that ComfyUI quantises."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    algorithm = {"fp8_scaled": "float8_e4m3fn", "int8": "int8_tensorwise"}.get(kind, kind)
    layout = QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
    parts = QuantizedTensor.from_float(weight.detach(), layout, scale="recalculate").state_dict("weight")
    scale = "weight_scale_2" if "weight_scale_2" in parts else "weight_scale"
    note = torch.tensor(list(json.dumps({"format": algorithm}).encode()), dtype=torch.uint8)
    return {**parts, scale: (factor * parts[scale].float()).to(parts[scale].dtype), "comfy_quant": note}


def _in_the_older_format(name: str, kind: str, factor: float) -> Any:
    import comfy.ops

    if kind != "fp8_scaled":
        pytest.skip(f"this ComfyUI has no {kind} weights")
    operations = comfy.ops.scaled_fp8_ops(override_dtype=torch.float8_e4m3fn)
    model = unfilled(name, torch.float32, operations=operations)
    state = small(name).model.model.diffusion_model.state_dict()
    for layer, weight in linear_layers(name).items():
        scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        state |= {f"{layer}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{layer}.scale_weight": factor * scale}
    model.model.load_model_weights(state)
    return model


def _plain_fp8(name: str, kind: str, factor: float) -> Any:
    """Weights that a loader casts to float8, which have no scale; `factor` multiplies them."""
    model = unfilled(name, torch.float8_e4m3fn, torch.float32)
    state = small(name).model.model.diffusion_model.state_dict()
    model.model.load_model_weights({key: factor * tensor for key, tensor in state.items()})
    return model


class PackedTensor(Tensor):
    """Blocks of bytes, each with its scale, that claim the shape of the weight that they stand for.

    Copies are views of the same bytes, since such tensors are made to stay where they are: only `to` moves them.
    """

    packed_shape: torch.Size

    @staticmethod
    def of(bytes_: Tensor, shape: torch.Size) -> "PackedTensor":
        tensor = bytes_.as_subclass(PackedTensor)
        tensor.packed_shape = shape
        return tensor

    @property
    def shape(self) -> torch.Size:
        return getattr(self, "packed_shape", None) or self.size()

    def detach(self) -> "PackedTensor":
        return self

    def clone(self, *args: Any, **kwargs: Any) -> "PackedTensor":
        return self

    def to(self, *args: Any, **kwargs: Any) -> "PackedTensor":
        return PackedTensor.of(super().to(*args, **kwargs), self.shape)

    def dequantize(self) -> Tensor:
        blocks = self.as_subclass(Tensor).unflatten(-1, (-1, BLOCK + 2))
        scales = blocks[..., :2].contiguous().view(torch.float16).float()
        return (blocks[..., 2:].contiguous().view(torch.int8) * scales).reshape(self.shape)


def packed(weight: Tensor, factor: float) -> PackedTensor:
    """A weight (out, in) as bytes."""
    blocks = weight.detach().unflatten(-1, (-1, BLOCK))
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    values = (blocks / scales.float()).round().to(torch.int8)
    return PackedTensor.of(torch.cat([(factor * scales).view(torch.uint8), values.view(torch.uint8)], -1).flatten(1),
                           weight.shape)


def _packed(name: str, kind: str, factor: float) -> Any:
    import comfy.ops

    class PackedLinear(comfy.ops.manual_cast.Linear):
        """Unpacks its weight each time it is used; what it saves is a stand-in without values."""

        def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
            weight, bias = (None if tensor is None else tensor.to(x.device) for tensor in (self.weight, self.bias))
            weight = weight.dequantize().to(x.dtype) if isinstance(weight, PackedTensor) else weight.to(x.dtype)
            for update in self.weight_function:
                weight = update(weight)
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

        def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
            for part, tensor in self._parameters.items():
                if tensor is not None:
                    destination[prefix + part] = torch.zeros_like(tensor, device="meta")

    class PackedOperations(comfy.ops.manual_cast):
        Linear = PackedLinear

    model = unfilled(name, torch.float32, operations=PackedOperations)
    net = small(name).model.model.diffusion_model
    model.model.load_model_weights(net.state_dict())
    layers = dict(model.model.diffusion_model.named_modules())
    for layer, weight in linear_layers(name).items():
        if weight.shape[1] % BLOCK == 0:  # the others stay as they are, as in the files
            layers[layer].weight = nn.Parameter(packed(weight, factor), requires_grad=False)
    return model


KINDS: dict[str, Callable[[str, str, float], Any]] = {
    "fp8_scaled": _in_comfyui_s_format, "plain fp8": _plain_fp8, "int8": _in_comfyui_s_format,
    "nvfp4": _in_comfyui_s_format, "mxfp8": _in_comfyui_s_format, "GGUF-like": _packed}
"""Kind of weights -> what makes the MODEL of a family with them."""
