"""ComfyUI's own architectures with random weights, so small that a step takes milliseconds, and their conditioning.

A family is data; ComfyUI is imported where a model is built, for it is not always there.
"""
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import pytest
import torch

from helpers import randn

SIZE = (12, 20)        # of latents, not square
ODD = (13, 21)         # of latents, for architectures that pad
WIDTH, TOKENS = 16, 5  # of contexts; pooled outputs are as wide
UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
        "context_dim": WIDTH, "model_channels": 32, "num_heads": 2, "num_head_channels": -1, "channel_mult": [1, 2],
        "num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 0, 0]}
SD15 = {**UNET, "num_res_blocks": [2, 2], "transformer_depth": [0, 1, 1, 0], "transformer_depth_output": [1, 0, 0, 0, 0, 0]}
SD20 = {**UNET, "use_linear_in_transformer": True}
SDXL = {**SD20, "num_classes": "sequential", "adm_in_channels": WIDTH + 6 * 256}
SD3 = {"in_channels": 16, "input_size": None, "depth": 1, "num_blocks": 2, "adm_in_channels": WIDTH, "num_patches": 256,
       "pos_embed_max_size": 16, "pos_embed_scaling_factor": None,
       "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 64}}}
FLUX = {"in_channels": 16, "out_channels": 16, "vec_in_dim": WIDTH, "context_in_dim": WIDTH, "hidden_size": 32,
        "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6], "theta": 10000,
        "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": []}
FLUX_2 = {**FLUX, "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "axes_dim": [4, 4, 4, 4], "patch_size": 1,
          "qkv_bias": False, "ops_bias": False, "mlp_silu_act": True, "global_modulation": True, "txt_ids_dims": [3],
          "guidance_embed": False}
CHROMA = {**FLUX, "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 32, "hidden_dim": 32, "n_layers": 1}
QWEN = {"in_channels": 64, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
LUMINA = {"in_channels": 16, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
          "multiple_of": 32, "ffn_dim_multiplier": 2.0, "qk_norm": True, "cap_feat_dim": WIDTH, "axes_dims": (4, 6, 6),
          "axes_lens": (64, 64, 64)}
Z_IMAGE = {**LUMINA, "dim": 256, "n_heads": 16, "n_kv_heads": 16, "ffn_dim_multiplier": 0.5, "z_image_modulation": True,
           "time_scale": 1000.0, "pad_tokens_multiple": 4}
WAN = {"dim": 32, "ffn_dim": 64, "freq_dim": 16, "text_dim": WIDTH, "num_heads": 2, "num_layers": 2}
HUNYUAN_VIDEO = {**FLUX, "patch_size": [1, 2, 2], "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
                 "vision_in_dim": None, "meanflow_sum": False}
LTX = {"in_channels": 128, "cross_attention_dim": 32, "attention_head_dim": 16, "num_attention_heads": 2,
       "caption_channels": WIDTH, "num_layers": 1}
COSMOS = {"max_img_h": 64, "max_img_w": 64, "max_frames": 8, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
          "patch_temporal": 1, "model_channels": 48, "num_blocks": 1, "num_heads": 2, "crossattn_emb_channels": WIDTH,
          "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 8}
MASKED = {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}
NO_LORA = ("Embedding", "EqualLinear", "Direction", "MoEGate")  # kinds of layers with a matrix that are not x @ weight
PLAYGROUND = {"sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002}


@dataclass(frozen=True)
class Family:
    """A kind of model. config, base: its classes in ComfyUI; kind: its prediction type, where it is not that of its base."""

    config: str
    base: str
    net: dict
    kind: str | None = None
    flow: bool = True
    latent: tuple[int, ...] = (2, 16, *SIZE)
    sampling: dict = field(default_factory=dict)
    latent_format: str | None = None
    params: tuple[str, str] | None = None  # the module and class of the network's settings, whose fields differ by version
    extra: dict = field(default_factory=dict)  # what its text encoder returns besides context and pooled output


FAMILIES = {
    "SD 1.5": Family("SD15", "BaseModel", SD15, "EPS", False, (2, 4, *SIZE)),
    "SD 2.1 (v)": Family("SD20", "BaseModel", SD20, "V_PREDICTION", False, (2, 4, *SIZE)),
    "SDXL": Family("SDXL", "SDXL", SDXL, "EPS", False, (2, 4, *SIZE)),
    "Playground 2.5 (EDM)": Family("SDXL", "SDXL", SDXL, "EDM", False, (2, 4, *SIZE), PLAYGROUND, "SDXL_Playground_2_5"),
    "SD 3": Family("SD3", "SD3", SD3),
    "Flux": Family("Flux", "Flux", FLUX, params=("flux", "FluxParams")),
    "Flux 2": Family("Flux2", "Flux2", FLUX_2, latent=(2, 128, 6, 10), params=("flux", "FluxParams")),
    "Chroma": Family("Chroma", "Chroma", CHROMA, params=("chroma", "ChromaParams")),
    "Qwen-Image": Family("QwenImage", "QwenImage", QWEN),
    "Lumina 2": Family("Lumina2", "Lumina2", LUMINA, extra=MASKED),
    "Z-Image": Family("ZImage", "Lumina2", Z_IMAGE, extra=MASKED),
    "Cosmos-Predict2": Family("CosmosT2IPredict2", "CosmosPredict2", COSMOS),
    "Wan 2.1": Family("WAN21_T2V", "WAN21", WAN, latent=(1, 16, 3, *SIZE)),
    "HunyuanVideo": Family("HunyuanVideo", "HunyuanVideo", HUNYUAN_VIDEO, latent=(1, 16, 3, *SIZE),
                           params=("hunyuan_video", "HunyuanVideoParams")),
    "LTX-Video": Family("LTXV", "LTXV", LTX, latent=(1, 128, 3, 6, 10), extra=MASKED),
}


class Small(NamedTuple):
    """A MODEL, two CONDITIONINGs and an empty LATENT."""

    model: Any
    positive: list
    negative: list
    latent: dict


def small(name: str, dtype: torch.dtype = torch.float32) -> Small:
    """One of the families; the test is skipped where this ComfyUI does not have it."""
    model = unfilled(name, dtype)
    fill(model.model.diffusion_model)
    return with_conditioning(name, model)


def with_conditioning(name: str, model: Any) -> Small:
    """A MODEL of a family with what it is sampled from."""
    extra = FAMILIES[name].extra
    return Small(model, conditioning(1, extra), conditioning(2, extra), {"samples": torch.zeros(FAMILIES[name].latent)})


def without_network(latent_format: str, kind: str = "FLOW") -> Any:
    """A MODEL whose network is never run; the test is skipped where this ComfyUI does not have its latents."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.supported_models_base

    if not hasattr(comfy.latent_formats, latent_format):
        pytest.skip(f"this ComfyUI has no latents of {latent_format}")
    if kind not in comfy.model_base.ModelType.__members__:
        pytest.skip(f"this ComfyUI has no {kind}")
    config = comfy.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.latent_format = getattr(comfy.latent_formats, latent_format)()
    return patcher(comfy.model_base.BaseModel(config, comfy.model_base.ModelType[kind]))


def conditioning(seed: int, extra: dict, width: int = WIDTH) -> list:
    """A CONDITIONING as a text encoder returns it."""
    return [[randn(1, TOKENS, width, seed=seed), {"pooled_output": randn(1, WIDTH, seed=10 + seed), **extra}]]


def small_vae(channels: int) -> Any:
    """A VAE of images with random weights, for latents of so many channels, half as big as the images."""
    import comfy.ldm.models.autoencoder
    import comfy.sd

    settings = {"double_z": True, "z_channels": channels, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
                "ch_mult": [1, 1], "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0}
    config = {"params": {"ddconfig": settings, "embed_dim": channels}}
    net = fill(comfy.ldm.models.autoencoder.AutoencoderKL(**config["params"]))
    return comfy.sd.VAE(sd=net.state_dict(), config=config)


def small_video_vae() -> Any:
    """Wan's VAE, which Qwen-Image and Cosmos-Predict2 share, with random weights and few channels."""
    import inspect

    import comfy.sd
    from comfy.ldm.wan.vae import WanVAE

    if "conv_out_channels" not in inspect.signature(WanVAE).parameters:
        pytest.skip("this ComfyUI builds Wan's VAE at its full size only")
    net = fill(WanVAE(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                      temperal_downsample=[False, True, True]))
    return comfy.sd.VAE(sd=net.state_dict())


def control_net() -> Any:
    """A CONTROL_NET for SD 1.5."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management as management

    settings = {key: value for key, value in SD15.items() if key != "out_channels"}
    net = fill(comfy.cldm.cldm.ControlNet(**settings, hint_channels=3))
    return comfy.controlnet.ControlNet(net, load_device=management.get_torch_device())


def t2i_adapter() -> Any:
    """A CONTROL_NET that is a T2I-Adapter for SD 1.5."""
    import comfy.controlnet
    from comfy.t2i_adapter.adapter import Adapter

    net = fill(Adapter([32, 64], nums_rb=2, cin=3 * 8**2, ksize=1, sk=True, use_conv=False, xl=False))
    return comfy.controlnet.T2IAdapter(net, net.input_channels, 8, "nearest-exact")


def lora(model: Any, rank: int = 2) -> dict:
    """A LoRA for every linear layer of a model, as read from its file."""
    tensors: dict[str, torch.Tensor] = {}
    net = model.model.diffusion_model
    other = {f"{name}.weight" for name, part in net.named_modules() if type(part).__name__ in NO_LORA}
    for name, tensor in net.state_dict().items():
        if tensor.ndim == 2 and name.endswith(".weight") and name not in other:
            layer, (height, width) = f"diffusion_model.{name.removesuffix('.weight')}", tensor.shape
            tensors[f"{layer}.lora_up.weight"] = 0.1 * randn(height, rank, seed=len(tensors))
            tensors[f"{layer}.lora_down.weight"] = randn(rank, width, seed=len(tensors))
    return tensors


def unfilled(name: str, dtype: torch.dtype, compute: torch.dtype | None = None, operations: Any = None) -> Any:
    """A MODEL whose weights are memory as it happens to be.

    dtype: of the weights. compute: what they are cast to; None: nothing. operations: classes of its layers, as a loader
    sets them; None: ComfyUI's own.
    """
    import comfy.latent_formats
    import comfy.model_base
    import comfy.supported_models

    family = FAMILIES[name]
    if not hasattr(comfy.supported_models, family.config):
        pytest.skip(f"this ComfyUI has no {name}")
    config = getattr(comfy.supported_models, family.config)(_supported(family))
    config.unet_config.update(_supported(family))  # over those of the full-size network
    config.sampling_settings.update(family.sampling)
    if family.latent_format:
        config.latent_format = getattr(comfy.latent_formats, family.latent_format)()
    config.set_inference_dtype(dtype, compute)
    config.custom_operations = operations
    kind = {"model_type": comfy.model_base.ModelType[family.kind]} if family.kind else {}
    return patcher(getattr(comfy.model_base, family.base)(config, **kind))


def _supported(family: Family) -> dict:
    """The settings of the network that this version of ComfyUI has."""
    if family.params is None:
        return family.net
    import importlib

    module, kind = family.params
    names = {field.name for field in fields(getattr(importlib.import_module(f"comfy.ldm.{module}.model"), kind))}
    return {key: value for key, value in family.net.items() if key in names}


def patcher(model: Any) -> Any:
    """A MODEL of ComfyUI's network."""
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher

    return ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


def fill(net: torch.nn.Module) -> torch.nn.Module:
    """Fill a network with weights as if trained: ComfyUI leaves memory as it happens to be."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted(net.state_dict().items()):
        if tensor.ndim > 1:
            tensor.normal_(generator=generator).div_(tensor[0].numel() ** 0.5)
        else:
            tensor.normal_(float(not name.endswith("bias")), 0.1, generator=generator)
    return net
