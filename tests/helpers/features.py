"""Other features of ComfyUI that guidance is combined with: how each is put on a scene, and which families have it."""
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helpers.model_families import FAMILIES, ODD, control_net, lora, t2i_adapter
from helpers.workbench import EPS, FLOW, VIDEO, Scene, Workbench


def mask_of(scene: Scene, kind: str = "left") -> Tensor:
    """A MASK on the grid of the latent: its left half, or rising from left to right."""
    height, width = scene.latent["samples"].shape[-2:]
    across = torch.linspace(0, 1, width).expand(1, height, width)
    return across if kind == "rising" else (across < 0.5).float()


def inpainted(bench: Workbench, scene: Scene, kind: str = "left") -> Scene:
    start = torch.randn(scene.latent["samples"].shape, generator=torch.Generator().manual_seed(3))
    [latent] = bench.comfy("SetLatentNoiseMask", samples={"samples": start}, mask=mask_of(scene, kind))
    return replace(scene, latent=latent)


def from_image(bench: Workbench, scene: Scene) -> Scene:
    return replace(scene, latent={"samples": 2 * torch.ones_like(scene.latent["samples"])}, denoise=0.5)


def resized(bench: Workbench, scene: Scene) -> Scene:
    empty = scene.latent["samples"]
    return replace(scene, latent={"samples": empty.new_zeros(*empty.shape[:-2], *ODD)})


def in_two(bench: Workbench, scene: Scene, node: str, **inputs: Any) -> Scene:
    """Another prompt for a part of the image."""
    [part] = bench.comfy(node, conditioning=scene.negative, strength=1.0, **inputs)
    [both] = bench.comfy("ConditioningCombine", conditioning_1=scene.positive, conditioning_2=part)
    return replace(scene, positive=both)


def by_area(bench: Workbench, scene: Scene) -> Scene:
    return in_two(bench, scene, "ConditioningSetArea", width=80, height=64, x=40, y=16)


def by_mask(bench: Workbench, scene: Scene) -> Scene:
    return in_two(bench, scene, "ConditioningSetMask", mask=mask_of(scene), set_cond_area="default")


def by_time(bench: Workbench, scene: Scene) -> Scene:
    [late] = bench.comfy("ConditioningSetTimestepRange", conditioning=scene.negative, start=0.5, end=1.0)
    [early] = bench.comfy("ConditioningSetTimestepRange", conditioning=scene.positive, start=0.0, end=0.5)
    return replace(scene, positive=early + late)


def controlled(bench: Workbench, scene: Scene, control: Callable[[], Any]) -> Scene:
    height, width = scene.latent["samples"].shape[-2:]
    image = torch.rand(1, 8 * height, 8 * width, 3, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        control = control()
    positive, negative = bench.comfy("ControlNetApplyAdvanced", positive=scene.positive, negative=scene.negative,
                                     control_net=control, image=image, strength=1.0, start_percent=0.0, end_percent=1.0)
    return replace(scene, positive=positive, negative=negative)


def with_lora(bench: Workbench, scene: Scene) -> Scene:
    import comfy.sd

    return replace(scene, model=comfy.sd.load_lora_for_models(scene.model, None, lora(scene.model), 1.0, 0.0)[0])


def with_lora_hooks(bench: Workbench, scene: Scene) -> Scene:
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora=lora(scene.model), strength_model=1.0, strength_clip=0.0)
    return replace(scene, positive=comfy.hooks.set_hooks_for_conditioning(scene.positive, hooks))


def with_lora_schedule(bench: Workbench, scene: Scene) -> Scene:
    """A LoRA by hooks whose strength falls from step to step."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora=lora(scene.model), strength_model=1.0, strength_clip=0.0)
    [falling] = bench.comfy("CreateHookKeyframesInterpolated", strength_start=1.0, strength_end=0.0, interpolation="linear",
                            start_percent=0.0, end_percent=1.0, keyframes_count=4)
    [hooks] = bench.comfy("SetHookKeyframes", hooks=hooks, hook_kf=falling)
    return replace(scene, positive=comfy.hooks.set_hooks_for_conditioning(scene.positive, hooks))


def by_regions(bench: Workbench, scene: Scene) -> Scene:
    """Prompts for the two halves of the picture, one of them with a LoRA."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(lora=lora(scene.model), strength_model=1.0, strength_clip=0.0)
    common = {"strength": 1.0, "set_cond_area": "default"}
    left, right = mask_of(scene), 1 - mask_of(scene)
    positive, negative = bench.comfy("PairConditioningSetProperties", positive_NEW=scene.positive,
                                     negative_NEW=scene.negative, mask=left, hooks=hooks, **common)
    positive, negative = bench.comfy("PairConditioningSetPropertiesAndCombine", positive=positive, negative=negative,
                                     positive_NEW=scene.negative, negative_NEW=scene.negative, mask=right, **common)
    return replace(scene, positive=positive, negative=negative)


def input_ids(node: Any) -> set[str]:
    """The inputs of a node, which grow from version to version."""
    return {each.id for each in node.define_schema().inputs}


def in_windows(dim: int) -> Callable[[Workbench, Scene], Scene]:
    """Context windows of two frames, along a dimension of the latent; where that is the batch, of four images."""
    def patch(bench: Workbench, scene: Scene) -> Scene:
        empty = scene.latent["samples"]
        scene = replace(scene, latent={"samples": empty if dim else torch.cat([empty, empty])})
        node = "ContextWindowsManual"
        newer = {"freenoise": False} if "freenoise" in input_ids(bench.comfy.registered[node]) else {}
        return bench.patch(scene, node, context_length=2, context_overlap=1, context_stride=1, closed_loop=False, dim=dim,
                           context_schedule="standard_static", fuse_method="pyramid", **newer)
    return patch


def with_equal_prompts(bench: Workbench, scene: Scene) -> Scene:
    """TCFG, whose two predictions are then equal in every bit."""
    return bench.patch(replace(scene, positive=scene.negative), "TCFG")


def patched_alone(node: str, **inputs: Any) -> Callable[[Workbench, Scene], Scene]:
    """A node that ComfyUI computes for single images only."""
    return lambda bench, scene: bench.patch(replace(scene, latent={"samples": scene.latent["samples"][:1]}), node, **inputs)


def sharpened(bench: Workbench, scene: Scene) -> Scene:
    [sharpen] = bench.comfy("LatentOperationSharpen", sharpen_radius=2, sigma=1.0, alpha=0.2)
    return bench.patch(scene, "LatentApplyOperationCFG", operation=sharpen)


def patched(node: str, **inputs: Any) -> Callable[[Workbench, Scene], Scene]:
    return lambda bench, scene: bench.patch(scene, node, **inputs)


def foreign(scene: Scene, add: Callable[[Any], None]) -> Scene:
    """The scene with a patch of another pack on its model."""
    model = scene.model.clone()
    add(model)
    return replace(scene, model=model)


def guided_already(bench: Workbench, scene: Scene) -> Scene:
    return bench.guide(scene, guider=bench.comfy("PPAPRule", rule="smoothness")[0])


def foreign_post_cfg(bench: Workbench, scene: Scene) -> Scene:
    return foreign(scene, lambda model: model.set_model_sampler_post_cfg_function(
        lambda args: args["denoised"] + 0.1 * args["cond_denoised"]))


def foreign_wrapper(bench: Workbench, scene: Scene) -> Scene:
    def predict(executor, x, timestep, *args, **kwargs):
        return 0.9 * executor(x, timestep, *args, **kwargs)
    return foreign(scene, lambda model: model.add_wrapper_with_key("predict_noise", "another pack", predict))


DOWNSCALE = {"block_number": 1, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.6,
             "downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic"}
SKIP = {"double_layers": "0", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0}
UNETS, MMDITS = (EPS, "SDXL"), (FLOW, "Flux", "Chroma")
FEATURES = {
    "CFG 1": (lambda bench, scene: replace(scene, cfg=1.0), (EPS, FLOW, VIDEO)),
    "image to image, denoise 0.5": (from_image, (EPS, FLOW, VIDEO)),
    "inpainting (noise mask)": (inpainted, (EPS, FLOW, VIDEO)),
    "DifferentialDiffusion": (lambda bench, scene: bench.patch(inpainted(bench, scene, "rising"), "DifferentialDiffusion"),
                              (EPS, FLOW)),
    "odd sizes": (resized, tuple(family for family in FAMILIES if family not in ("Cosmos-Predict2", "HunyuanVideo"))),
    "area conditioning": (by_area, (EPS, FLOW)),
    "mask conditioning": (by_mask, (EPS, FLOW)),
    "timestep ranges of conditioning": (by_time, (EPS, FLOW)),
    "ControlNet": (lambda bench, scene: controlled(bench, scene, control_net), (EPS,)),
    "T2I-Adapter": (lambda bench, scene: controlled(bench, scene, t2i_adapter), (EPS,)),
    "LoRA": (with_lora, (EPS, FLOW, VIDEO)),
    "LoRA by hooks": (with_lora_hooks, (EPS, FLOW)),
    "LoRA schedule by hooks": (with_lora_schedule, (EPS, FLOW)),
    "regional prompts with masks and hooks": (by_regions, (EPS, FLOW)),
    "context windows of a batch": (in_windows(0), (EPS,)),
    "context windows of frames": (in_windows(2), (VIDEO,)),
    "PerturbedAttentionGuidance": (patched("PerturbedAttentionGuidance", scale=3.0), UNETS),
    "SelfAttentionGuidance": (patched("SelfAttentionGuidance", scale=0.5, blur_sigma=2.0), (EPS,)),
    "SkipLayerGuidanceDiT": (patched("SkipLayerGuidanceDiT", scale=3.0, rescaling_scale=0.0, **SKIP), MMDITS),
    "SkipLayerGuidanceDiTSimple": (patched("SkipLayerGuidanceDiTSimple", **SKIP), (FLOW,)),
    "APG": (patched("APG", eta=0.5, norm_threshold=5.0, momentum=0.0), (EPS, FLOW)),
    "TCFG": (patched("TCFG"), (EPS, FLOW)),
    "TCFG, equal prompts": (with_equal_prompts, (EPS, FLOW)),
    "FreSca": (patched("FreSca", scale_low=1.0, scale_high=1.5, freq_cutoff=2), (EPS, FLOW)),
    "LatentApplyOperationCFG": (sharpened, (EPS,)),
    "CFGOverride": (patched("CFGOverride", cfg=1.5, start_percent=0.3, end_percent=1.0), (FLOW,)),
    "RenormCFG": (patched_alone("RenormCFG", cfg_trunc=100.0, renorm_cfg=0.5), (EPS,)),
    "FreeU": (patched("FreeU", b1=1.3, b2=1.4, s1=0.9, s2=0.2), (EPS,)),
    "FreeU_V2": (patched("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2), UNETS),
    "PatchModelAddDownscale": (patched("PatchModelAddDownscale", **DOWNSCALE), (EPS,)),
    "ToMe": (patched("TomePatchModel", ratio=0.3), UNETS),
    "HyperTile": (patched("HyperTile", tile_size=32, swap_size=2, max_depth=1, scale_depth=False), (EPS,)),
    "Normalized Attention Guidance": (patched("NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5), (EPS, "Flux")),
    "Epsilon Scaling": (patched("Epsilon Scaling", scaling_factor=1.02), (EPS, FLOW)),
    "TemporalScoreRescaling": (patched_alone("TemporalScoreRescaling", tsr_k=0.9, tsr_sigma=1.0), (EPS, FLOW)),
    "CFGZeroStar": (patched("CFGZeroStar"), (EPS, FLOW)),
    "CFGNorm": (patched("CFGNorm", strength=1.0), (EPS, FLOW)),
    "Mahiro": (patched("Mahiro"), (EPS, FLOW)),
    "RescaleCFG": (patched("RescaleCFG", multiplier=0.7), (EPS, FLOW)),
    "ModelSamplingDiscrete": (patched("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True), (EPS,)),
    "ModelSamplingSD3": (patched("ModelSamplingSD3", shift=1.5), (FLOW, VIDEO)),
    "Apply Guidance": (guided_already, (EPS, FLOW, VIDEO)),
    "another pack's post-CFG function": (foreign_post_cfg, (EPS, FLOW, VIDEO)),
    "another pack's PREDICT_NOISE wrapper": (foreign_wrapper, (EPS, FLOW, VIDEO)),
}

# Where guidance may stand beside them on the MODEL wire
ANYWHERE = ("DifferentialDiffusion", "LoRA", "context windows of a batch", "context windows of frames", "APG", "TCFG",
            "TCFG, equal prompts", "FreSca", "LatentApplyOperationCFG", "CFGOverride", "RenormCFG", "FreeU", "FreeU_V2",
            "PatchModelAddDownscale", "ToMe", "HyperTile", "Normalized Attention Guidance", "RescaleCFG",
            "SkipLayerGuidanceDiTSimple", "ModelSamplingDiscrete", "ModelSamplingSD3",
            "another pack's PREDICT_NOISE wrapper")
ADDING = ("PerturbedAttentionGuidance", "SelfAttentionGuidance", "SkipLayerGuidanceDiT", "CFGZeroStar",
          "another pack's post-CFG function")
MIXING = ("Mahiro", "CFGNorm", "Epsilon Scaling", "TemporalScoreRescaling")
