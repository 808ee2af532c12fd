"""How each class of ComfyUI's `supported_models` is built so small that a step takes milliseconds.

A recipe is data: the settings of a network, which the classes that share it change by their own `unet_config`.
"""
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

from helpers import model_families as known
from helpers import randn
from helpers.model_families import TOKENS, WIDTH, Small, conditioning, fill, patcher

T5, MASK = randn(1, TOKENS, WIDTH, seed=7), torch.ones(1, TOKENS, dtype=torch.long)
VIDEO_UNET = {**known.UNET, "use_linear_in_transformer": True, "num_classes": "sequential", "use_temporal_attention": True,
              "use_temporal_resblock": True, "extra_ff_mix_layer": True, "use_spatial_context": True, "merge_factor": 0.0,
              "merge_strategy": "learned_with_images", "video_kernel_size": [3, 1, 1], "in_channels": 8,
              "disable_self_attentions": None}
HUNYUAN = {**known.HUNYUAN_VIDEO, "byt5": False}
PIXEL_DIT = {"num_groups": 2, "hidden_size": 32, "pixel_hidden_size": 8, "pixel_attn_hidden_size": 32, "pixel_num_groups": 2,
             "patch_depth": 2, "pixel_depth": 1, "txt_embed_dim": WIDTH, "txt_max_length": TOKENS}
RADIANCE = {**known.CHROMA, "in_channels": 3, "out_channels": 3, "patch_size": 8, "in_dim": 64, "nerf_hidden_size": 8,
            "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 2, "nerf_tile_size": 0, "nerf_final_head_type": "conv",
            "nerf_embedder_dtype": torch.float32, "use_x0": False, "use_sequential_txt_ids": False, "guidance_embed": False}
Z_PIXELS = {**known.Z_IMAGE, "in_channels": 3, "patch_size": 8, "decoder_hidden_size": 32, "decoder_num_res_blocks": 1,
            "decoder_max_freqs": 2, "decoder_in_channels": 192}
COG = {"num_attention_heads": 2, "attention_head_dim": 32, "time_embed_dim": 32, "text_embed_dim": WIDTH, "num_layers": 2,
       "use_rotary_positional_embeddings": True}
OMNI = {"hidden_size": 48, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 2,
        "multiple_of": 16, "axes_dim_rope": (8, 8, 8), "axes_lens": (64, 64, 64)}
KANDINSKY = {"in_text_dim": WIDTH, "in_text_dim2": WIDTH, "time_dim": 32, "model_dim": 64, "ff_dim": 64,
             "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 12, 12)}
CASCADE = {"c_cond": 32, "nhead": [2, 2], "c_hidden": [32, 32], "blocks": [[1, 1], [1, 1]], "c_clip_text": WIDTH,
           "c_clip_text_pooled": WIDTH}
TINY_QWEN_3 = {"vocab_size": 151936, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32,
               "num_attention_heads": 2, "num_key_value_heads": 2, "rope_dims": [6, 5, 5]}
TINY_EYE = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1, "deepstack_visual_indexes": (0,)}


@dataclass(frozen=True)
class Recipe:
    """Small settings for classes that share a network. own: what a class changes, by its name."""

    net: dict
    own: dict[str, dict]
    size: tuple[int, int] = known.SIZE
    frames: int = 1                           # of models with a time axis
    extra: dict = field(default_factory=dict)  # what their text encoder or a node adds to a CONDITIONING
    width: int = WIDTH                        # of a token in a CONDITIONING
    weights: dict = field(default_factory=dict)  # of a checkpoint that its class reads while it is built
    params: tuple[str, str] | None = None     # the module and class of the network's settings


def _all(*names: str) -> dict[str, dict]:
    return {name: {} for name in names}


RECIPES = (
    Recipe(known.SD15, {"SD15": {}, "SD15_instructpix2pix": {"in_channels": 8}}),
    Recipe(known.SD15, {"Stable_Zero123": {"in_channels": 8}},
           weights={"cc_projection.weight": torch.zeros(WIDTH, WIDTH), "cc_projection.bias": torch.zeros(WIDTH)}),
    Recipe(known.SD20, {"SD20": {}, "LotusD": {"num_classes": "sequential", "adm_in_channels": 4},
                        "SD21UnclipL": {"num_classes": "sequential", "adm_in_channels": 1536},
                        "SD21UnclipH": {"num_classes": "sequential", "adm_in_channels": 2048},
                        "SD_X4Upscaler": {"in_channels": 7, "num_classes": 1000, "disable_self_attentions": [True, False]}}),
    Recipe(known.SDXL, {**_all("SDXL", "SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B"),
                        "SDXL_instructpix2pix": {"in_channels": 8}, "SDXLRefiner": {"adm_in_channels": WIDTH + 5 * 256}}),
    Recipe(VIDEO_UNET, {"SVD_img2vid": {"adm_in_channels": 768}, "SV3D_u": {"adm_in_channels": 256},
                        "SV3D_p": {"adm_in_channels": 1280}}),
    Recipe(CASCADE, _all("Stable_Cascade_C")),
    Recipe({"c_cond": 32, "c_hidden": [32] * 4, "nhead": [-1, -1, 2, 2], "blocks": [[1] * 4] * 2, "c_clip": WIDTH,
            "block_repeat": [[1] * 4] * 2}, _all("Stable_Cascade_B"), size=(16, 32)),
    Recipe(known.SD3, _all("SD3")),
    Recipe({"dim": 32, "n_layers": 2, "n_double_layers": 1, "n_heads": 2, "global_conddim": 32, "cond_seq_dim": WIDTH,
            "max_seq": 256}, _all("AuraFlow")),
    Recipe({"hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": WIDTH, "input_size": 16,
            "micro_condition": False}, _all("PixArtAlpha", "PixArtSigma"), size=(24, 44)),
    Recipe({"hidden_size": 32, "depth": 2, "num_heads": 2, "text_states_dim": WIDTH, "text_states_dim_t5": WIDTH,
            "text_len": TOKENS, "text_len_t5": TOKENS},
           {"HunyuanDiT": {}, "HunyuanDiT1": {"size_cond": True, "use_style_cond": True}},
           extra={"conditioning_mt5xl": T5, "attention_mask": MASK, "attention_mask_mt5xl": MASK}),
    Recipe(known.FLUX, {"Flux": {}, "FluxInpaint": {"in_channels": 96}, "FluxSchnell": {"guidance_embed": False},
                        "LongCatImage": {"guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]}},
           params=("flux.model", "FluxParams")),
    Recipe(known.FLUX_2, _all("Flux2"), size=(6, 10), params=("flux.model", "FluxParams")),
    Recipe(known.CHROMA, _all("Chroma"), params=("chroma.model", "ChromaParams")),
    Recipe(RADIANCE, _all("ChromaRadiance"), size=(32, 64), params=("chroma_radiance.model", "ChromaRadianceParams")),
    Recipe({"hidden_size_x": 48, "hidden_size_y": 32, "depth": 2, "num_heads": 2, "mlp_ratio_x": 256.0, "mlp_ratio_y": 2.0,
            "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0,
            "posenc_preserve_area": True, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": WIDTH,
            "t5_token_length": TOKENS}, _all("GenmoMochi"), frames=3, extra={"attention_mask": MASK}),
    Recipe(known.LTX, _all("LTXV"), size=(6, 10), frames=3, extra=known.MASKED),
    Recipe(HUNYUAN, {"HunyuanVideo": {}, "HunyuanVideoI2V": {"in_channels": 33}, "HunyuanVideoSkyreelsI2V":
                     {"in_channels": 32}}, frames=3, params=("hunyuan_video.model", "HunyuanVideoParams")),
    Recipe({**HUNYUAN, "patch_size": [1, 1, 1], "in_channels": 65, "out_channels": 32, "vec_in_dim": None,
            "vision_in_dim": WIDTH, "guidance_embed": False, "use_cond_type_embedding": True},
           {"HunyuanVideo15": {}, "HunyuanVideo15_SR_Distilled": {"in_channels": 98}}, size=(6, 10), frames=3,
           params=("hunyuan_video.model", "HunyuanVideoParams")),
    Recipe({**HUNYUAN, "vec_in_dim": None, "in_channels": 64, "out_channels": 64, "guidance_embed": False},
           {"HunyuanImage21": {"patch_size": [1, 1], "axes_dim": [8, 8]},
            "HunyuanImage21Refiner": {"patch_size": [1, 1, 1], "in_channels": 128}}, size=(6, 10),
           params=("hunyuan_video.model", "HunyuanVideoParams")),
    Recipe({**known.COSMOS, "affline_emb_norm": True, "block_x_format": "THWBD", "extra_per_block_abs_pos_emb": True,
            "extra_per_block_abs_pos_emb_type": "learnable"}, {"CosmosT2V": {}, "CosmosI2V": {"in_channels": 17}}, frames=3),
    Recipe(known.COSMOS, {"CosmosT2IPredict2": {}, "CosmosI2VPredict2": {"in_channels": 17}}),
    Recipe({**known.COSMOS, "crossattn_emb_channels": 1024}, _all("Anima"), width=1024),
    Recipe(known.LUMINA, _all("Lumina2"), extra=known.MASKED),
    Recipe(known.Z_IMAGE, _all("ZImage"), extra=known.MASKED),
    Recipe(Z_PIXELS, _all("ZImagePixelSpace"), size=(32, 64), extra=known.MASKED),
    Recipe(PIXEL_DIT, _all("PixelDiTT2I"), size=(32, 64)),
    Recipe({**PIXEL_DIT, "lq_hidden_dim": 32, "lq_num_res_blocks": 1, "lq_interval": 1}, _all("PiD"), size=(32, 64),
           extra={"lq_latent": randn(1, 16, 1, 2), "degrade_sigma": torch.zeros(1)}),
    Recipe({**known.WAN, "in_dim": 16}, {
        "WAN21_T2V": {}, "WAN21_CausalAR_T2V": {}, "WAN21_FlowRVS": {"model_type": "t2v"}, "WAN21_I2V": {"in_dim": 36},
        "WAN21_FunControl2V": {"in_dim": 48}, "WAN21_Vace": {"vace_layers": 1, "vace_in_dim": 96},
        "WAN21_Camera": {"in_dim": 32}, "WAN22_Camera": {"in_dim": 36}, "WAN22_T2V": {"in_dim": 48, "out_dim": 48},
        "WAN22_S2V": {"audio_inject_layers": [0], "audio_dim": 16}, "WAN21_HuMo": {"in_dim": 36},
        "WAN22_Animate": {"in_dim": 36, "num_layers": 5}, "WAN_Animate2": {"in_dim": 36}, "WAN21_SCAIL": {"in_dim": 20},
        "WAN21_SCAIL2": {"in_dim": 20}, "WAN22_WanDancer": {"in_dim": 36, "audio_inject_layers": [0], "music_dim": 32,
                                                            "music_latent_dim": 32}}, frames=3),
    Recipe({"patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [WIDTH, WIDTH], "text_emb_dim": WIDTH,
            "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 6, 6), "max_resolution": (64, 64),
            "llama_layers": [0, 0]}, _all("HiDream"), extra={"conditioning_llama3": randn(1, 1, TOKENS, WIDTH, seed=8)}),
    Recipe({"text_config_overrides": TINY_QWEN_3, "vision_config_overrides": TINY_EYE}, _all("HiDreamO1"), size=(32, 64),
           extra={"text_input_ids": torch.tensor([[1, 2, 3, 151673]])}),
    Recipe({"norm_eps": 1e-5, "num_layers": 2, "mlp_type": "swiglu", "vid_dim": 64, "txt_in_dim": WIDTH, "heads": 2,
            "head_dim": 32, "mm_layers": 1, "expand_ratio": 2, "rope_dim": 24, "vid_out_norm": True}, _all("SeedVR2"),
           extra={"condition": randn(1, 17, 1, *known.SIZE, seed=9)}),
    Recipe({**OMNI, "text_feat_dim": WIDTH}, _all("Omnigen2"), extra=known.MASKED),
    Recipe({**OMNI, "num_double_stream_layers": 1, "instruction_feat_dim": WIDTH}, _all("Boogu"), extra=known.MASKED),
    Recipe({"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH,
            "axes_dims_rope": (4, 6, 6)}, _all("MageFlow"), size=(6, 10)),
    Recipe(known.QWEN, _all("QwenImage")),
    Recipe({"hidden_size": 32, "num_attention_heads": 2, "text_dim": WIDTH, "num_layers": 2, "mlp_width_ratio": 2.0,
            "rope_dim_list": [4, 6, 6]}, _all("JoyImage")),
    Recipe({"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "intermediate_size": 64, "adaln_dim": 32,
            "llm_features_dim": WIDTH, "mrope_section": (6, 5, 5)}, _all("Ideogram4"), size=(6, 10)),
    Recipe({"features": 64, "tdim": 32, "txtdim": 8, "heads": 2, "kvheads": 2, "multiplier": 2, "layers": 2, "txtlayers": 2,
            "txtheads": 2, "txtkvheads": 2}, _all("Krea2")),
    Recipe({"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "enc_hidden_dim": 8,
            "axes_dims_rope": (4, 6, 6), "selected_layer_index": (0, 1)}, _all("Lens"), size=(6, 10)),
    Recipe(KANDINSKY, {"Kandinsky5Image": {"visual_embed_dim": 64}, "Kandinsky5": {"visual_embed_dim": 132}}),
    Recipe({"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64, "text_in_dim": WIDTH,
            "rope_axes_dim": (4, 6, 6)}, _all("ErnieImage"), size=(6, 10)),
    Recipe(COG, {"CogVideoX_T2V": {}, "CogVideoX_I2V": {"in_channels": 32}, "CogVideoX_Inpaint": {"in_channels": 48}}),
)
BY_CLASS = {name: recipe for recipe in RECIPES for name in recipe.own}


def names() -> list[str]:
    """The classes of the ComfyUI at hand."""
    import comfy.supported_models

    return [kind.__name__ for kind in comfy.supported_models.models]


def build(name: str, changes: dict | None = None) -> Small:
    """A MODEL of a class with random weights, its conditioning and an empty latent. changes: of the recipe's settings."""
    recipe = BY_CLASS[name]
    model = _model(name, _fields(recipe, {**recipe.net, **recipe.own[name], **(changes or {})}), recipe.weights)
    fill(model.model.diffusion_model)
    latent = model.model.latent_format
    time = (recipe.frames,) if latent.latent_dimensions == 3 else ()
    shape = (1 if recipe.frames > 1 else 2, latent.latent_channels, *time, *recipe.size)
    positive, negative = (conditioning(seed, recipe.extra, recipe.width) for seed in (1, 2))
    return Small(model, positive, negative, {"samples": torch.zeros(shape)})


def without_network(name: str) -> Any:
    """A MODEL of a class whose network is left out: what is asked of it are its latents."""
    import comfy.model_base
    import comfy.supported_models

    kind = getattr(comfy.supported_models, name)
    config = kind({**kind.unet_config, "disable_unet_model_creation": True, "hidden_size": 1})
    return patcher(comfy.model_base.BaseModel(config, comfy.model_base.ModelType.FLOW))


def _model(name: str, net: dict, weights: dict) -> Any:
    import comfy.supported_models

    kind = getattr(comfy.supported_models, name)
    config = kind({**kind.unet_config, **net})
    config.unet_config.update(net)
    config.set_inference_dtype(torch.float32, None)
    return patcher(config.get_model(weights, ""))


def _fields(recipe: Recipe, net: dict) -> dict:
    """The settings that this version of ComfyUI has."""
    if recipe.params is None:
        return net
    import importlib

    module, kind = recipe.params
    known_fields = inspect.signature(getattr(importlib.import_module(f"comfy.ldm.{module}"), kind)).parameters
    return {key: value for key, value in net.items() if key in known_fields}
