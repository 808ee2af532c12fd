"""Real architectures at small size with random weights, saved into folders as their libraries save them."""
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from helpers import randn
from ppap_core.guiders.guider import Guider
from ppap_core.guiders.targets import aim_at_text, class_target, image_target, mask_target, number_target

LABELS = ("wall", "star", "disk", "heart", "ring")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"]}


class Family(NamedTuple):
    """One row of docs/guiders.md: how to write its folder, and what its guider is."""

    write: Callable[[Path], None]
    task: str
    output: str = "own"
    aim: str = "image"    # or "class", "text", "mask", "text, mask", "number"
    grouped: bool = False  # whether it has grouped convolutions, which keep no adapter


def random_weights(net: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a network with random weights that let an image through: fresh ones give much the same for every image."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.named_parameters():
        if tensor.ndim > 1:
            tensor.data.normal_(generator=generator).mul_(1.0 / tensor[0].numel() ** 0.5)
        elif name.endswith("bias"):
            tensor.data.normal_(generator=generator).mul_(0.1)
        else:
            tensor.data.normal_(generator=generator).mul_(0.1).add_(1)
    return net.eval()


def save_tokenizer(folder: Path, length: int = 16) -> None:
    """Save a fast tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(
        ["<pad>", "<start>", "a", "star", "ring", "red", "blue", "the", "task", "is", "semantic", "<unk>", "<end>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", eos_token="<end>",
                                   unk_token="<unk>", model_max_length=length)
    fast.save_pretrained(folder)


def timm_net(architecture: str, labels: bool = True, side: int | None = None, **settings) -> Callable[[Path], None]:
    """side: pixels that its config names as the input's, where they are no setting of the network."""
    def write(folder: Path) -> None:
        timm = pytest.importorskip("timm")
        classes = len(LABELS) if labels else 0
        net = random_weights(timm.create_model(architecture, pretrained=False, num_classes=classes, **settings))
        if side:
            net.pretrained_cfg["input_size"] = (3, side, side)
        config = {"label_names": list(LABELS)} if labels else {}
        timm.models._hub.save_for_hf(net, folder, model_config=config, model_args=settings or None, safe_serialization=True)
    return write


def hf_net(architecture: str, config: Callable[[], object], processor: dict, tokenizer: bool = False,
            after: Callable[[Path], None] | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        transformers = pytest.importorskip("transformers")
        if not hasattr(transformers, architecture):
            pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
        made = config()
        model = random_weights(getattr(transformers, architecture)(made))
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        if tokenizer:
            save_tokenizer(folder)
        if after:
            after(folder)
    return write


def processor(kind: str, side: int | None = None, **more) -> dict:
    """A preprocessor_config.json; with a side it stretches to a square."""
    square = {"size": {"height": side, "width": side}, "do_normalize": True} if side else {}
    return {"image_processor_type": f"{kind}ImageProcessor", "do_resize": True, "resample": 2, **square, **more}


def config(name: str, **settings) -> Callable[[], object]:
    def make():
        import transformers

        return getattr(transformers, name)(**{key: value() if callable(value) else value for key, value in settings.items()})
    return make


NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8}
PYRAMID = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
CONVNEXT = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
DPT = {**VIT, **NECK, "image_size": 32, "patch_size": 8, "backbone_out_indices": [0, 1, 2, 3], "readout_type": "project"}
BEIT = {**VIT, "image_size": 32, "patch_size": 8, "use_relative_position_bias": True}
MASKS = {"hidden_dim": 32, "encoder_feedforward_dim": 32, "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 2,
         "dim_feedforward": 32}
CLIP_PROCESSOR = processor("CLIP", size={"shortest_edge": 32}, do_center_crop=True, crop_size={"height": 32, "width": 32},
                           do_normalize=True, **(CLIP | {"resample": 3}))


def text_and_image(kind: str, vision: dict | None = None, **more) -> Callable[[], object]:
    text = {"vocab_size": 13, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 12, "pad_token_id": 0, **VIT}
    return config(kind, text_config=text, vision_config={**(vision or {"image_size": 32}), "patch_size": 8, **VIT}, **more)


def aesthetic_head(folder: Path) -> None:
    from safetensors.torch import save_file

    sizes, layers = (24, 16, 8, 1), (0, 2, 4)
    generator = torch.Generator().manual_seed(3)
    save_file({f"layers.{layer}.{name}": torch.randn(shape, generator=generator) / a**0.5
               for layer, a, b in zip(layers, sizes, sizes[1:], strict=False)
               for name, shape in (("weight", (b, a)), ("bias", (b,)))}, folder / "head.safetensors")


def tagger(folder: Path) -> None:
    """A timm network with a table of its tags beside it."""
    timm_net("vit_tiny_patch16_224", img_size=48, depth=2)(folder)
    rows = [f"{index},{name},0,1" for index, name in enumerate(LABELS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]))


CLASSIFIERS = {
    "timm ResNet": Family(timm_net("resnet10t"), "class", aim="class"),
    "timm ViT": Family(timm_net("vit_tiny_patch16_224", img_size=48, depth=2), "class", aim="class"),
    "timm ConvNeXt": Family(timm_net("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), "class", aim="class",
                            grouped=True),
    "timm EVA": Family(timm_net("eva02_tiny_patch14_224", img_size=56, depth=2), "class", aim="class"),
    "image classifier (ViT)": Family(hf_net(
        "ViTForImageClassification", config("ViTConfig", image_size=32, patch_size=8, **VIT, **NAMED),
        processor("ViT", 32, **HALVES)), "class", aim="class"),
    "image classifier (ConvNeXt)": Family(hf_net(
        "ConvNextForImageClassification", config("ConvNextConfig", **CONVNEXT, **NAMED),
        processor("ConvNext", size={"shortest_edge": 32}, crop_pct=0.875, do_normalize=True, **IMAGENET)),
        "class", aim="class", grouped=True),
}
ONE_LABEL = {"id2label": {0: "star"}, "label2id": {"star": 0}}
SCORERS = {
    "tagger (timm ViT)": Family(tagger, "tags", aim="class"),
    "image classifier with one output (ViT)": Family(hf_net(
        "ViTForImageClassification", config("ViTConfig", image_size=32, patch_size=8, **VIT, **ONE_LABEL),
        processor("ViT", 32, **HALVES)), "number", aim="number"),
}
WHOLE_IMAGE = {
    "CLIP": Family(hf_net("CLIPModel", text_and_image("CLIPConfig", projection_dim=24), CLIP_PROCESSOR, tokenizer=True),
                   "embedding", aim="text"),
    "SigLIP": Family(hf_net("SiglipModel", text_and_image("SiglipConfig"), processor("Siglip", 32, **HALVES),
                             tokenizer=True), "embedding", aim="text"),
    "SigLIP 2 (NaFlex)": Family(hf_net(
        "Siglip2Model", text_and_image("Siglip2Config", {"num_patches": 16}),
        processor("Siglip2", patch_size=8, max_num_patches=16, do_normalize=True, **HALVES), tokenizer=True),
        "embedding", aim="text"),
    "aesthetic head on CLIP": Family(hf_net("CLIPModel", text_and_image("CLIPConfig", projection_dim=24), CLIP_PROCESSOR,
                                             after=aesthetic_head), "number", aim="number"),
    "DINOv2": Family(hf_net(
        "Dinov2Model", config("Dinov2Config", image_size=42, patch_size=14, **VIT),
        processor("Bit", size={"shortest_edge": 48}, do_center_crop=True, crop_size={"height": 42, "width": 42},
                  do_normalize=True, **(IMAGENET | {"resample": 3}))), "structure"),
    "DINOv3": Family(hf_net("DINOv3ViTModel", config("DINOv3ViTConfig", image_size=32, patch_size=8, num_register_tokens=2,
                                                      **VIT), processor("DINOv3ViT", 32, **IMAGENET)), "structure"),
    "timm ViT, structure": Family(timm_net("vit_tiny_patch16_224", labels=False, img_size=48, depth=2), "structure",
                                  "structure"),
    "timm VGG, style": Family(timm_net("vgg11", side=64, mlp_ratio=0.01), "style", "style"),
    "timm embedding": Family(timm_net("vit_tiny_patch16_224", labels=False, img_size=48, depth=2), "embedding"),
}
DEPTH = {
    "Depth Anything": Family(hf_net("DepthAnythingForDepthEstimation", config(
        "DepthAnythingConfig", backbone_config=config("Dinov2Config", image_size=42, patch_size=14, **VIT,
                                                      out_features=STAGES, reshape_hidden_states=False),
        patch_size=14, head_hidden_size=8, reassemble_hidden_size=32, **NECK),
        processor("DPT", 42, ensure_multiple_of=14, keep_aspect_ratio=True, **IMAGENET)), "depth"),
    "DPT depth": Family(hf_net("DPTForDepthEstimation", config("DPTConfig", **DPT), processor("DPT", 32, **HALVES)),
                        "depth"),
    "ZoeDepth": Family(hf_net("ZoeDepthForDepthEstimation", config(
        "ZoeDepthConfig", backbone_config=config("BeitConfig", **BEIT, reshape_hidden_states=False, out_features=STAGES),
        **NECK, bottleneck_features=8, num_attractors=[4, 2, 2, 1], bin_embedding_dim=8, num_relative_features=8,
        patch_transformer_hidden_size=16, patch_transformer_intermediate_size=32, patch_transformer_num_attention_heads=2,
        bin_configurations=[{"n_bins": 16, "min_depth": 0.001, "max_depth": 10.0, "name": "indoor"}]),
        processor("ZoeDepth", 32, ensure_multiple_of=32, keep_aspect_ratio=True, do_pad=False, **HALVES)), "depth"),
    "GLPN": Family(hf_net("GLPNForDepthEstimation", config("GLPNConfig", **PYRAMID, decoder_hidden_size=8),
                           processor("GLPN", size_divisor=32)), "depth", grouped=True),
}
REGIONS = {
    "SegFormer": Family(hf_net("SegformerForSemanticSegmentation", config(
        "SegformerConfig", **PYRAMID, decoder_hidden_size=16, **NAMED), processor("Segformer", 64, **IMAGENET)),
        "segmentation", grouped=True),
    "UperNet": Family(hf_net("UperNetForSemanticSegmentation", config(
        "UperNetConfig", backbone_config=config("ConvNextConfig", **CONVNEXT, out_features=STAGES), hidden_size=16,
        use_auxiliary_head=False, **NAMED), processor("Segformer", 64, **IMAGENET)), "segmentation", grouped=True),
    "DPT segmentation": Family(hf_net("DPTForSemanticSegmentation", config(
        "DPTConfig", **DPT, use_auxiliary_head=False, **NAMED), processor("DPT", 32, **HALVES)), "segmentation"),
    "BEiT": Family(hf_net("BeitForSemanticSegmentation", config(
        "BeitConfig", **BEIT, out_indices=[1, 2, 3, 4], use_auxiliary_head=False, **NAMED),
        processor("Beit", 32, do_center_crop=False, **HALVES)), "segmentation"),
    "Mask2Former": Family(hf_net("Mask2FormerForUniversalSegmentation", config(
        "Mask2FormerConfig", backbone_config=config("SwinConfig", **SWIN), **MASKS, **NAMED, feature_size=32,
        mask_feature_size=32, num_queries=7, common_stride=4),
        processor("Mask2Former", size={"shortest_edge": 64, "longest_edge": 128}, size_divisor=32, do_normalize=True,
                  **IMAGENET)), "segmentation"),
    "OneFormer": Family(hf_net("OneFormerForUniversalSegmentation", config(
        "OneFormerConfig", backbone_config=config("SwinConfig", **SWIN), **MASKS, **NAMED, num_queries=8, conv_dim=32,
        mask_dim=32, task_seq_len=16, max_seq_len=16, text_encoder_width=16, text_encoder_context_length=16,
        text_encoder_num_layers=1, text_encoder_vocab_size=13, text_encoder_proj_layers=1, text_encoder_n_ctx=2,
        query_dec_layers=1, is_training=False),
        processor("OneFormer", size={"shortest_edge": 64, "longest_edge": 128}, do_normalize=True, **IMAGENET),
        tokenizer=True), "segmentation"),
    "EoMT": Family(hf_net("EomtForUniversalSegmentation", config(
        "EomtConfig", **VIT, image_size=32, patch_size=8, num_queries=6, num_blocks=1, num_upscale_blocks=1, **NAMED),
        processor("Eomt", size={"shortest_edge": 32, "longest_edge": None}, do_split_image=True, do_normalize=True,
                  **IMAGENET)), "segmentation", grouped=True),
    "SegFormer with one label": Family(hf_net("SegformerForSemanticSegmentation", config(
        "SegformerConfig", **PYRAMID, decoder_hidden_size=16, **ONE_LABEL), processor("Segformer", 64, **IMAGENET)),
        "mask", aim="mask", grouped=True),
    "EoMT with one label": Family(hf_net("EomtForUniversalSegmentation", config(
        "EomtConfig", **VIT, image_size=32, patch_size=8, num_queries=6, num_blocks=1, num_upscale_blocks=1, **ONE_LABEL),
        processor("Eomt", size={"shortest_edge": 32, "longest_edge": None}, do_split_image=True, do_normalize=True,
                  **IMAGENET)), "mask", aim="mask", grouped=True),
    "CLIPSeg": Family(hf_net("CLIPSegForImageSegmentation", text_and_image(
        "CLIPSegConfig", projection_dim=16, reduce_dim=16, extract_layers=[0, 1, 2], decoder_num_attention_heads=2,
        decoder_intermediate_size=32), processor("ViT", 32, **IMAGENET), tokenizer=True), "mask", aim="text, mask"),
}
FAMILIES: dict[str, Family] = CLASSIFIERS | SCORERS | WHOLE_IMAGE | DEPTH | REGIONS


AIMS = {"class": "Aim at Class", "text": "Aim at Text or Image", "mask": "Aim at Mask", "number": "Aim at Number",
        "text, mask": "Aim at Text, then Mask", "image": "Aim at Image"}


def row(name: str) -> str:
    """The line of a family in the table of docs/guiders.md."""
    family = FAMILIES[name]
    aim = "Aim at Image or Mask" if family.task == "segmentation" else AIMS[family.aim]
    return f"| {name} | {family.task} | {aim} |" + " yes |" * 7


def photographs(height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    """Smooth images (2, 3, height, width) in [-1, 1], which random networks tell apart as they do photographs."""
    coarse = randn(2, 3, 5, 7, seed=seed)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)


def aimed(guider: Guider, family: Family) -> Guider:
    """The guider with a target, set as users set it."""
    if family.aim == "text, mask":
        guider = aim_at_text(guider, "a star")
    other = photographs(48, 48, seed=5)[:1]
    return {"class": lambda: guider.aim(class_target(guider, "star")),
            "text": lambda: aim_at_text(guider, "a red ring"),
            "mask": lambda: guider.aim(mask_target(guider, torch.eye(48)[None], "")),
            "number": lambda: guider.aim(number_target(guider, 9.0)),
            "image": lambda: guider.aim(image_target(guider, other))}[family.aim.split(", ")[-1]]()
