"""Weights as they lie in real folders: some that nobody asks for are missing, others have names of another time."""
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import says
from helpers.guider_families import (
    CONVNEXT,
    FAMILIES,
    HALVES,
    IMAGENET,
    NAMED,
    STAGES,
    VIT,
    config,
    hf_net,
    photographs,
    processor,
    random_weights,
    timm_net,
)
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

from ppap_core.guiders.guider import Guider, clean
from ppap_core.guiders.loaders import load_guider
from ppap_core.io.hashing import fingerprint_network

pytestmark = pytest.mark.slow  # all together take several seconds of the fast tests' minute

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

WRITERS: dict[str, Callable[[Path], None]] = {name: family.write for name, family in FAMILIES.items()} | {
    "ViT": hf_net("ViTModel", config("ViTConfig", image_size=32, patch_size=8, **VIT), processor("ViT", 32, **HALVES)),
    "UperNet, trained with a second head": hf_net("UperNetForSemanticSegmentation", config(
        "UperNetConfig", backbone_config=config("ConvNextConfig", **CONVNEXT, out_features=STAGES), hidden_size=16,
        auxiliary_in_channels=16, auxiliary_channels=8, **NAMED), processor("Segformer", 64, **IMAGENET)),
    "Swin": timm_net("swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=16, depths=(2, 2),
                     num_heads=(1, 2)),
    "DeiT III": timm_net("deit3_small_patch16_224", img_size=48, depth=2, embed_dim=32, num_heads=2),
}


FIRST_FUSION = r"fusion_stage\.layers\.0\.residual_layer1"  # of the first map, which no other is added to


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, weights: dict[str, Tensor]) -> None:
    plain = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})


def drop(folder: Path, pattern: str) -> list[str]:
    """Take weights out of a folder's file; returns their names, of which there must be one at least."""
    weights = weights_of(folder)
    gone = [name for name in weights if re.search(pattern, name)]
    assert gone, f"no weight is called {pattern}: {list(weights)[:5]}"
    rewrite(folder, {name: tensor for name, tensor in weights.items() if name not in gone})
    return gone


def answer(guider: Guider) -> Tensor:
    image = photographs()
    prompt = [guider.read_text("a star")] if guider.task == "mask" else []
    return guider.net(guider.preprocess(image), clean(image), *[each.expand(2, -1) for each in prompt])


def output_of(name: str) -> str:
    return FAMILIES[name].output if name in FAMILIES else "own"


@pytest.mark.parametrize(("name", "pattern"), [
    ("DPT depth", FIRST_FUSION), ("Depth Anything", FIRST_FUSION), ("ZoeDepth", FIRST_FUSION),
    ("DPT segmentation", FIRST_FUSION),
    ("Depth Anything", "mask_token"), ("ViT", "pooler"), ("DINOv2", "mask_token"), ("DINOv3", "mask_token"),
    ("CLIP", "logit_scale"), ("SigLIP", "logit_(scale|bias)"), ("SigLIP 2 (NaFlex)", "logit_(scale|bias)"),
    ("CLIPSeg", "logit_scale|visual_projection"), ("aesthetic head on CLIP", "^text_model|text_projection"),
    ("OneFormer", "text_mapper|logit_scale"), ("Mask2Former", r"criterion\.empty_weight"),
    ("UperNet, trained with a second head", "auxiliary_head"), ("timm ViT, structure", "^fc_norm|^norm"),
    ("timm VGG, style", "^head|pre_logits"),
])
def test_weights_that_nobody_asks_for_may_be_missing(name: str, pattern: str, tmp_path, caplog):
    """The answer is that of the whole folder, and the network is the same each time, so that experts recognise it."""
    WRITERS[name](tmp_path)
    whole = answer(load_guider(tmp_path, output_of(name)))
    drop(tmp_path, pattern)
    guider = load_guider(tmp_path, output_of(name))
    torch.testing.assert_close(answer(guider), whole)
    again = load_guider(tmp_path, output_of(name))
    assert fingerprint_network(again.net) == fingerprint_network(guider.net)
    assert all(tensor.isfinite().all() for tensor in guider.net.parameters())
    assert "weights are missing that its answer never reads" in caplog.text, caplog.text


@pytest.mark.parametrize(("name", "pattern"), [
    ("DPT depth", r"fusion_stage\.layers\.1\.residual_layer1"), ("DPT depth", r"fusion_stage\.layers\.0\.residual_layer2"),
    ("DPT depth", r"^head\."), ("DPT depth", r"readout_projects.0"), ("Depth Anything", r"layer\.0\..*fc1.weight"),
    ("Depth Anything", r"fusion_stage\.layers\.3\.projection\.bias"), ("ZoeDepth", "relative_position_bias_table"),
    ("ViT", "patch_embeddings"), ("ViT", r"layernorm\.weight$"), ("DINOv2", "cls_token"), ("DINOv2", "layer_scale1"),
    ("DINOv3", "register_tokens"), ("CLIP", "visual_projection"), ("CLIP", r"text_model.*layers\.3.*fc2\.bias"),
    ("CLIP", r"vision_model.*layers\.0\..*layer_norm1\.weight"), ("CLIP", "token_embedding"),
    ("SigLIP", r"vision_model\.head\.probe"), ("SigLIP 2 (NaFlex)", r"text_model.*layers\.0"),
    ("CLIPSeg", "text_projection"), ("CLIPSeg", r"^decoder"), ("aesthetic head on CLIP", "visual_projection"),
    ("image classifier (ViT)", "classifier.bias"), ("image classifier (ConvNeXt)", "layer_scale|gamma"),
    ("SegFormer", r"batch_norm\.running_mean"), ("SegFormer", "decode_head.classifier"), ("BEiT", "cls_token"),
    ("Mask2Former", "class_predictor"), ("Mask2Former", r"queries_(features|embedder)"), ("EoMT", "query"),
    ("OneFormer", r"class_embed"), ("GLPN", r"head\.|decoder"), ("UperNet", "psp|fpn"),
    ("timm ResNet", "conv1"), ("timm ResNet", r"layer4.*running_var"), ("timm ResNet", r"^fc"),
    ("timm ViT", r"blocks\.1\.mlp"), ("timm EVA", r"pos_embed"), ("timm ConvNeXt", r"stages\.3.*gamma"),
    ("timm embedding", r"^norm"), ("timm ViT, structure", r"blocks\.1\."), ("timm VGG, style", r"features\.0\."),
])
def test_weights_that_are_used_may_not_be_missing(name: str, pattern: str, tmp_path):
    """The sentence names a weight that the answer needs."""
    WRITERS[name](tmp_path)
    gone = drop(tmp_path, pattern)
    with pytest.raises(ValueError, match="missing") as caught:
        load_guider(tmp_path, output_of(name))
    said = str(caught.value)
    assert tmp_path.name in said and "\n" not in said and "copy the folder again" in said
    assert any(tail(each) in said for each in gone), said


def tail(name: str) -> str:
    """The end of a weight's name, which all releases of a library share."""
    return name.rpartition(".")[2]


def test_the_sentence_names_a_weight_that_is_used(tmp_path):
    """Beside many that nobody asks for."""
    WRITERS["DPT depth"](tmp_path)
    drop(tmp_path, r"fusion_stage\.layers\.0\.residual_layer1|head\.head\.2\.weight")
    with says(ValueError, "5 weights are missing", "head.head.2.weight"):
        load_guider(tmp_path)


# Names and layouts of another time

def as_older(name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as earlier releases of timm wrote them."""
    if name == "Swin":
        tables = {f"layers.{i}.blocks.{j}.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long)
                  for i in (0, 1) for j in (0, 1)}
        tables |= {f"layers.{i}.blocks.1.attn_mask": torch.zeros(16, 16, 16) for i in (0, 1)}
        older = {each.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): tensor
                 for each, tensor in weights.items()}
        return older | tables
    if name == "timm EVA":
        return weights | {f"rope.freqs_{which}": torch.zeros(16, 16) for which in ("cos", "sin")} | {
            f"blocks.{i}.attn.rope.freqs_cos": torch.zeros(16, 16) for i in (0, 1)}
    if name == "timm ViT":
        return weights | {"pre_logits.fc.weight": torch.ones(192, 192), "pre_logits.fc.bias": torch.ones(192)}
    if name == "DeiT III":
        return {re.sub(r"ls([12])\.gamma", r"gamma_\1", each): tensor for each, tensor in weights.items()}
    if name == "timm ConvNeXt":
        return {each.replace("head.fc.", "head."): tensor for each, tensor in weights.items()}
    return {re.sub(r"^fc\.", "classifier.", each): tensor for each, tensor in weights.items()}


@pytest.mark.parametrize("name", ["Swin", "timm EVA", "timm ViT", "DeiT III", "timm ConvNeXt", "timm ResNet"])
def test_older_files_of_timm_are_converted(name: str, tmp_path):
    """The network is that of the file as it is today."""
    WRITERS[name](tmp_path)
    plain, weights = answer(load_guider(tmp_path)), weights_of(tmp_path)
    older = as_older(name, weights)
    assert older.keys() != weights.keys()
    rewrite(tmp_path, older)
    torch.testing.assert_close(answer(load_guider(tmp_path)), plain)


def test_an_older_file_without_a_used_weight_is_refused(tmp_path):
    WRITERS["Swin"](tmp_path)
    older = as_older("Swin", weights_of(tmp_path))
    rewrite(tmp_path, {name: tensor for name, tensor in older.items() if name != "layers.0.blocks.1.attn.qkv.weight"})
    with says(ValueError, "layers.0.blocks.1.attn.qkv.weight", "1 weights are missing"):
        load_guider(tmp_path)


def test_more_blocks_than_the_config_says_are_refused(tmp_path):
    """A network without its last blocks would be another one."""
    WRITERS["timm ViT"](tmp_path)
    more = {f"blocks.2.norm1.{name}": torch.ones(192) for name in ("weight", "bias")}
    rewrite(tmp_path, weights_of(tmp_path) | more)
    with says(ValueError, "2 unexpected", "blocks.2"):
        load_guider(tmp_path)


def test_a_head_is_left_out_where_there_are_no_classes(tmp_path):
    WRITERS["timm embedding"](tmp_path)
    plain, weights = answer(load_guider(tmp_path)), weights_of(tmp_path)
    rewrite(tmp_path, weights | {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)})
    torch.testing.assert_close(answer(load_guider(tmp_path)), plain)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "backbone.", "_orig_mod.module.", "timm_model."])
@pytest.mark.parametrize("name", ["timm ResNet", "timm ViT", "image classifier (ViT)", "DINOv2", "DPT depth"])
def test_the_prefix_of_a_wrapper_is_taken_off(name: str, prefix: str, tmp_path):
    WRITERS[name](tmp_path)
    plain, weights = answer(load_guider(tmp_path)), weights_of(tmp_path)
    rewrite(tmp_path, {prefix + each: tensor for each, tensor in weights.items()})
    torch.testing.assert_close(answer(load_guider(tmp_path)), plain)


# Numbers and files

def in_half(said: dict) -> dict:
    """A configuration that names half precision, in its parts too."""
    parts = {key: in_half(value) for key, value in said.items() if isinstance(value, dict) and "model_type" in value}
    return said | parts | {"torch_dtype": "float16", "dtype": "float16"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["timm ViT", "CLIP", "Depth Anything"])
def test_weights_of_any_precision_are_read_exactly(name: str, dtype: torch.dtype, tmp_path):
    """The network computes in single precision with the very numbers of the file, whatever type config.json names."""
    WRITERS[name](tmp_path)
    rounded = {each: tensor.to(dtype) for each, tensor in weights_of(tmp_path).items()}
    rewrite(tmp_path, {each: tensor.float() for each, tensor in rounded.items()})
    if "timm" not in name:
        said = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(in_half(said)))
    single = load_guider(tmp_path)
    rewrite(tmp_path, rounded)
    guider = load_guider(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in guider.net.parameters())
    assert fingerprint_network(guider.net) == fingerprint_network(single.net)
    torch.testing.assert_close(answer(guider), answer(single))


def split(folder: Path) -> list[str]:
    """Write a folder's weights as two shards and an index; returns the shards."""
    weights, names = weights_of(folder), [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    halves = [dict(list(weights.items())[part::2]) for part in (0, 1)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name, {"format": "pt"})
    where = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()
    return names


@pytest.mark.parametrize("name", ["timm ViT", "image classifier (ViT)"])
def test_shards_are_read_as_one_file(name: str, tmp_path):
    WRITERS[name](tmp_path)
    plain = answer(load_guider(tmp_path))
    names = split(tmp_path)
    torch.testing.assert_close(answer(load_guider(tmp_path)), plain)
    (tmp_path / names[1]).unlink()
    with says(FileNotFoundError, names[1], tmp_path.name):
        load_guider(tmp_path)


@pytest.mark.parametrize("name", ["timm ViT", "image classifier (ViT)"])
def test_the_only_file_of_weights_may_have_any_name(name: str, tmp_path):
    WRITERS[name](tmp_path)
    plain = answer(load_guider(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    torch.testing.assert_close(answer(load_guider(tmp_path)), plain)
    (tmp_path / "model.fp32.safetensors").write_bytes((tmp_path / "model.fp16.safetensors").read_bytes())
    with says(FileNotFoundError, "model.fp16.safetensors", "model.fp32.safetensors", "index"):
        load_guider(tmp_path)


@pytest.mark.parametrize(("name", "changed", "words"), [
    ("image classifier (ViT)", "classifier.bias", "ViTForImageClassification"),
    ("DINOv2", "embeddings.cls_token", "Dinov2Model"), ("timm ResNet", "fc.bias", "resnet10t")])
def test_weights_of_another_shape_are_refused_by_name(name: str, changed: str, words: str, tmp_path):
    WRITERS[name](tmp_path)
    weights = weights_of(tmp_path)
    assert changed in weights
    rewrite(tmp_path, weights | {changed: torch.zeros(3, 3)})
    with says(ValueError, changed, words, "copy the folder again"):
        load_guider(tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_quantised_weights_are_refused(method: str, tmp_path):
    WRITERS["image classifier (ViT)"](tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": method}}))
    with says(ValueError, method, "quantised"):
        load_guider(tmp_path)


def test_a_timm_network_that_transformers_saved_is_loaded(tmp_path):
    """Its config.json has keys of both libraries, and its weights the prefix of the wrapper."""
    import transformers

    net = timm.create_model("resnet10t", num_classes=5)
    wrapped = transformers.TimmWrapperForImageClassification(transformers.TimmWrapperConfig(
        architecture="resnet10t", num_classes=5, num_labels=5))
    wrapped.timm_model.load_state_dict(random_weights(net).state_dict())
    wrapped.save_pretrained(tmp_path)
    guider = load_guider(tmp_path)
    assert guider.task == "class" and len(guider.labels) == 5
    assert fingerprint_network(guider.net.net) == fingerprint_network(net)


def test_a_weight_under_two_names_is_missing_under_none(tmp_path):
    """Files hold one name of a shared weight only."""
    net = random_weights(timm.create_model("coat_tiny", num_classes=5))
    WRITERS["timm ResNet"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "coat_tiny", "model_args": None}))
    save_model(net, str(tmp_path / "model.safetensors"))
    assert len(weights_of(tmp_path)) < len(net.state_dict())
    assert fingerprint_network(load_guider(tmp_path).net.net) == fingerprint_network(net)


def test_settings_that_no_network_has_are_refused(tmp_path):
    WRITERS["timm ResNet"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": {"depth_of_tomorrow": 3}}))
    with says(ValueError, "resnet10t", "depth_of_tomorrow", "copy the folder again"):
        load_guider(tmp_path)


def test_weights_without_a_place_are_said(tmp_path, caplog):
    """A transformers network loads without them, as the library does it, but not silently."""
    WRITERS["image classifier (ViT)"](tmp_path)
    rewrite(tmp_path, weights_of(tmp_path) | {"something.else": torch.ones(3)})
    load_guider(tmp_path)
    assert "no place for 1 of its weights, such as something.else" in caplog.text


def test_a_strange_wrapper_is_refused(tmp_path):
    net = random_weights(timm.create_model("resnet10t", num_classes=5))
    WRITERS["timm ResNet"](tmp_path)
    rewrite(tmp_path, {f"{'ab'[i % 2]}.{name}": tensor for i, (name, tensor) in enumerate(net.state_dict().items())})
    with says(ValueError, "resnet10t", "unexpected"):
        load_guider(tmp_path)
