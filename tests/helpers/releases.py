"""Networks and experts as another release of transformers wrote them: tests/fixtures/releases, and how it was made.

A folder there holds what the library's configuration says and the shapes of the weights; their values are made again, to the
bit. Run `PYTHONPATH=.:tests python -m helpers.releases` with a release of transformers to write its experts.
"""
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import disturb
from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.experts.checkpoint import save_bank
from ppap_core.guiders.guider import Guider
from ppap_core.guiders.loaders import load_guider
from ppap_core.schedules import ExpertSchedule

RELEASES = Path(__file__).parents[1] / "fixtures" / "releases"
WRITERS = ("transformers-4.57.6", "transformers-5.24.0")
SIDE = 64  # of the image that answers are compared on
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PYRAMID = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4,
        "out_features": ["stage1", "stage2"]}
STAGED = {**SWIN, "image_size": 64, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1],
          "out_features": ["stage1", "stage2", "stage3", "stage4"]}
MASKS = {"hidden_dim": 32, "encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2,
         "dim_feedforward": 16, "feature_size": 32, "mask_feature_size": 32, "num_queries": 4}
LABELS = {str(index): name for index, name in enumerate(("wall", "star", "disk"))}


def families() -> dict[str, tuple[str, Any, int]]:
    """Name of a folder -> architecture, configuration, side of the images."""
    import transformers as t

    dino = t.Dinov2Config(**{**SMALL, "num_hidden_layers": 4}, image_size=28, patch_size=14, reshape_hidden_states=False,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    beit = {**SMALL, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8, "use_relative_position_bias": True}
    return {
        "vit": ("ViTForImageClassification", t.ViTConfig(**SMALL, image_size=32, patch_size=8, id2label=LABELS), 32),
        "dinov2": ("Dinov2Model", t.Dinov2Config(**SMALL, image_size=28, patch_size=14), 28),
        "depth_anything": ("DepthAnythingForDepthEstimation", t.DepthAnythingConfig(
            backbone_config=dino, patch_size=14, head_hidden_size=8, reassemble_hidden_size=16, **NECK), 28),
        "segformer": ("SegformerForSemanticSegmentation", t.SegformerConfig(
            **PYRAMID, decoder_hidden_size=8, id2label=LABELS), 64),
        "beit": ("BeitForSemanticSegmentation", t.BeitConfig(**beit, out_indices=[1, 2, 3, 4], use_auxiliary_head=False,
                                                             id2label=LABELS), 32),
        "swin": ("SwinForImageClassification", t.SwinConfig(**SWIN, id2label=LABELS), 32),
        "mask2former": ("Mask2FormerForUniversalSegmentation", t.Mask2FormerConfig(
            backbone_config=t.SwinConfig(**STAGED), **MASKS, common_stride=4, id2label=LABELS), 64),
    }


def write_description(folder: Path, architecture: str, config: Any, side: int) -> None:
    """Write the configuration of a network and the shapes of its weights."""
    import transformers

    config.architectures = [architecture]
    config.save_pretrained(folder)
    state = getattr(transformers, architecture)(config).state_dict()
    (folder / "weights.json").write_text(json.dumps({
        name: list(tensor.shape) if tensor.is_floating_point() else {"integers": tensor.tolist()}
        for name, tensor in state.items()}))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": side, "width": side},
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}))


def write_weights(description: Path, folder: Path) -> Path:
    """Write a folder as the hub offers it: what is described and weights, the same to the bit on every machine."""
    folder.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text((description / name).read_text())
    described = json.loads((description / "weights.json").read_text())
    generator = torch.Generator().manual_seed(0)
    save_file({name: _values(name, described[name], generator) for name in sorted(described)},
              folder / "model.safetensors", {"format": "pt"})
    return folder


def _values(name: str, shape: list[int] | dict, generator: torch.Generator) -> Tensor:
    """Multiples of a power of two: no rounding is involved."""
    if isinstance(shape, dict):
        return torch.tensor(shape["integers"])
    if name.endswith(("running_mean", "running_var")):
        return torch.full(shape, float(name.endswith("var")))
    steps = torch.randint(-128, 129, shape, generator=generator) / 128
    if len(shape) < 2:
        return steps / 8 + (0 if name.endswith("bias") else 1)
    inputs = steps[0].numel()
    return steps / 2 ** round((inputs - 1).bit_length() / 2 - 0.5)


def answers(guider: Guider, bank: ExpertBank) -> Tensor:
    """Some values of the plain network's output and of its expert's, (2, n)."""
    image = torch.linspace(-9, 9, 3 * SIDE * SIDE).sin().reshape(1, 3, SIDE, SIDE)
    with torch.no_grad():
        outputs = [asked.predict(image, torch.ones(1)).flatten() for asked in (guider, with_experts(guider, bank))]
    return torch.stack([output[::max(1, len(output) // 32)] for output in outputs])


def _write() -> None:
    import tempfile

    import transformers

    place = RELEASES / f"transformers-{transformers.__version__}"
    found = load_file(place / "answers.safetensors") if place.exists() else {}
    for name, made in families().items():
        if (place / f"{name}.safetensors").exists():
            continue
        if not (RELEASES / name).exists():
            write_description(RELEASES / name, *made)
        with tempfile.TemporaryDirectory() as folder:
            guider = load_guider(write_weights(RELEASES / name, Path(folder) / name))
            bank = ExpertBank(base_network(guider), ExpertSchedule((0.1, 10.0)), LoraSpec(rank=1))
            disturb(bank, 0)
            save_bank(place / f"{name}.safetensors", bank, replace(guider, name=f"transformers/{name}"))
            found[name] = answers(guider, bank)
    save_file(found, place / "answers.safetensors")


if __name__ == "__main__":
    _write()
