"""Preprocessing of images, against the libraries that the networks come from."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import H, W, images, randn, says
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ppap_core.guiders.cutouts import cut_outs
from ppap_core.guiders.preprocess import FITS, Preprocess, timm_preprocess
from ppap_core.guiders.processor_config import processor_preprocess
from ppap_core.io.hashing import digest

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")  # 512 x 512, 300 x 451, 400 x 600: height x width


def photograph(name: str, *, upright: bool = False) -> Tensor:
    """A photograph of scikit-image as (3, H, W) in [0, 1], without a download."""
    data = pytest.importorskip("skimage.data", reason="the photographs come with scikit-image")
    image = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1).float() / 255
    return image.mT.contiguous() if upright else image


def ours(preprocess: Preprocess, image: Tensor) -> Tensor:
    """A photograph (3, H, W) in [0, 1] as a network gets it."""
    return preprocess(image[None] * 2 - 1)


# The arithmetic

def test_preprocessing_normalizes_each_channel():
    image = images()
    out = Preprocess((H, W), MEAN, STD)(image)
    for channel in range(3):
        expected = (image[:, channel] * 0.5 + 0.5 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(out[:, channel], expected, rtol=1e-5, atol=1e-6)


def test_an_image_of_the_right_size_is_not_resampled():
    image = images()
    assert torch.equal(Preprocess((H, W))(image), ((image + 1) / 2 - 0.5) / 0.5)
    assert torch.equal(Preprocess((1, 1), fit="own").frame(image), image)


@pytest.mark.parametrize("size", [(12, 16), (H, 16), (30, W), (41, 57)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_orders_sizes_and_smooths(size, interpolation):
    """Height comes before width, and shrinking smooths."""
    image = images()
    out = Preprocess(size, interpolation=interpolation)(image)
    assert out.shape == (3, 3, *size)
    torch.testing.assert_close(out, F.interpolate(image, size, mode=interpolation, antialias=True), rtol=0, atol=1e-6)


def test_blue_comes_first_where_the_network_wants_it():
    image = images()
    assert torch.equal(Preprocess((H, W), bgr=True)(image), Preprocess((H, W))(image).flip(1))


def test_half_precision_images_keep_their_type():
    for preprocess in (Preprocess((H, W), MEAN, STD), Preprocess((H, W), square=True, fill=MEAN)):
        assert preprocess(images().bfloat16()).dtype == torch.bfloat16


def tagger_input(image: Tensor, edge: int) -> Tensor:
    """A photograph (3, H, W) in [0, 1] as taggers of drawings read it with PIL: white to a square, blue first, to 255."""
    from torchvision.transforms.functional import to_pil_image

    picture = to_pil_image(image)
    square = Image.new("RGB", (max(picture.size),) * 2, (255, 255, 255))
    square.paste(picture, tuple((max(picture.size) - side) // 2 for side in picture.size))
    return torch.from_numpy(np.asarray(square.resize((edge, edge), Image.BICUBIC))[:, :, ::-1].copy()).permute(2, 0, 1)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_tagger_reads_white_squares_with_blue_first(name):
    preprocess = Preprocess((96, 96), (0.0,) * 3, (1 / 255,) * 3, "bicubic", bgr=True, square=True, fill=(1.0,) * 3)
    for upright in (False, True):
        image = photograph(name, upright=upright)
        difference = (ours(preprocess, image)[0].clamp(0, 255) - tagger_input(image, 96)).abs()
        assert (difference > 2).float().mean() < 0.02  # of 255: PIL rounds and clips after each of its two passes


def test_a_square_is_filled_in_each_channel():
    image = images()
    out = Preprocess((W, W), MEAN, STD, square=True, fill=MEAN)(image)
    top = (W - H) // 2
    assert torch.equal(out[:, :, top:top + H], Preprocess((H, W), MEAN, STD)(image))
    torch.testing.assert_close(out[:, :, :top], torch.zeros(3, 3, top, W), rtol=0, atol=1e-6)
    mask = Preprocess((W, W), square=True).frame(image[:, :1], beyond=0.0)
    assert torch.equal(mask[:, :, :top], torch.zeros(3, 1, top, W))


def test_fields_of_this_version_hash_only_where_they_are_set():
    """A preprocessing that the first version could write keeps its hash."""
    first = Preprocess((12, 16), MEAN, STD, "bicubic", "shortest", 32, (8, 8))
    assert digest(first) == "428b07cfca3aaa00"
    assert len({digest(first), digest(replace(first, square=True)), digest(replace(first, fill=MEAN))}) == 3


# Sizes and places

@pytest.mark.parametrize("fit, image, size, multiple, expected", [
    ("stretch", (300, 451), (224, 200), 1, (224, 200)),
    ("shortest", (300, 451), (224, 10**6), 1, (224, 336)),
    ("shortest", (451, 300), (224, 10**6), 1, (336, 224)),
    ("shortest", (300, 900), (200, 400), 1, (133, 400)),     # the longer edge would become 600
    ("shortest", (300, 451), (100, 10**6), 32, (128, 160)),
    ("cover", (300, 451), (224, 300), 1, (224, 337)),
    ("cover", (300, 451), (150, 300), 1, (200, 300)),
    ("least", (300, 450), (400, 400), 1, (267, 400)),        # 400/450 is closer to 1 than 400/300
    ("least", (300, 450), (518, 518), 14, (350, 518)),
    ("own", (300, 451), (1, 1), 32, (288, 448)),
    ("own", (20, 45), (1, 1), 32, (32, 32)),
    ("patches", (256, 256), (256, 256), 16, (256, 256)),
    ("patches", (100, 400), (256, 256), 16, (128, 512)),
])
def test_every_fit_gives_the_size_that_it_says(fit, image, size, multiple, expected):
    found = FITS[fit](image, size, multiple)
    assert found == expected and all(isinstance(side, int) for side in found)
    assert FITS[fit](image[::-1], size[::-1] if fit in ("stretch", "cover", "least") else size, multiple) == expected[::-1]


@pytest.mark.parametrize("height", [20, 21, 22, 23])
def test_the_middle_is_cropped_as_the_two_libraries_do_it(height):
    image = randn(1, 3, height, 28)
    down, near = (Preprocess((1, 1), fit="own", crop=(20, 24), crop_rounds=rounds).frame(image) for rounds in (False, True))
    assert torch.equal(down, image[:, :, (height - 20) // 2:(height - 20) // 2 + 20, 2:26])
    transforms = pytest.importorskip("torchvision.transforms.functional")
    assert torch.equal(near, transforms.center_crop(image, [20, 24]))


def test_a_crop_larger_than_the_image_is_black_beyond_it():
    image = images()
    out = Preprocess((1, 1), fit="own", crop=(24, 33)).frame(image)
    inside = torch.zeros(24, 33, dtype=torch.bool)
    inside[2:2 + H, 2:2 + W] = True
    assert out.shape == (3, 3, 24, 33) and torch.equal(out[..., 2:2 + H, 2:2 + W], image)
    assert bool((out[..., ~inside] == -1).all())


def test_maps_get_the_geometry_and_nothing_else():
    labels = torch.arange(H * W).reshape(1, 1, H, W).float()
    preprocess = Preprocess((15, 10**6), MEAN, STD, "bicubic", "shortest", crop=(15, 15), bgr=True)
    out = preprocess.frame(labels, "nearest-exact")
    assert out.shape == (1, 1, 15, 15) and set(out.flatten().tolist()) <= set(labels.flatten().tolist())
    assert torch.equal(preprocess.frame(images()), preprocess.frame(images(), "bicubic"))


KINDS = {
    "square": Preprocess((7, 9), square=True, fill=MEAN),
    "stretch": Preprocess((7, 9), MEAN, STD),
    "shortest": Preprocess((9, 10**6), MEAN, STD, "bicubic", "shortest", crop=(9, 8)),
    "cover": Preprocess((11, 9), MEAN, STD, "bicubic", "cover", crop=(9, 8), crop_rounds=True),
    "least": Preprocess((13, 13), MEAN, STD, fit="least", multiple=7),
    "own": Preprocess((1, 1), MEAN, STD, fit="own", multiple=8, bgr=True),
    "patches": Preprocess((6, 6), MEAN, STD, fit="patches", multiple=4),
    "not smoothed": Preprocess((9, 7), MEAN, STD, antialias=False, align_corners=True),
    "padded": Preprocess((1, 1), MEAN, STD, fit="own", crop=(33, 22)),
}


@pytest.mark.parametrize("preprocess", KINDS.values(), ids=KINDS)
def test_the_gradient_is_the_finite_difference(preprocess):
    image = images(dtype=torch.float64).requires_grad_()
    weights = randn(*preprocess(image).shape, seed=1).double()
    direction = randn(3, 3, H, W, seed=2).double()
    def value(x: Tensor) -> Tensor:
        return (preprocess(x) ** 2 * weights).sum()
    slope = (torch.autograd.grad(value(image), image)[0] * direction).sum()
    numeric = (value(image.detach() + 1e-5 * direction) - value(image.detach() - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close(slope, numeric, rtol=1e-7, atol=0)


@pytest.mark.parametrize("preprocess", KINDS.values(), ids=KINDS)
def test_the_description_is_json_and_restores_everything(preprocess):
    about = json.loads(json.dumps(preprocess.to_dict()))
    again = Preprocess(**{name: tuple(value) if isinstance(value, list) else value for name, value in about.items()})
    assert again == preprocess and about == preprocess.to_dict()


def test_what_is_left_at_its_default_is_not_in_the_description():
    about = Preprocess((12, 16)).to_dict()
    assert about == {"size": [12, 16], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}


# timm

@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("size", [(96, 96), (96, 128), (128, 80)])
def test_an_image_is_read_as_timm_reads_it(name, crop_mode, crop_pct, size):
    create_transform = pytest.importorskip("timm.data").create_transform
    data = {"input_size": (3, *size), "interpolation": "bicubic", "mean": MEAN, "std": STD, "crop_pct": crop_pct,
            "crop_mode": crop_mode}
    for upright in (False, True):
        image = photograph(name, upright=upright)
        expected = create_transform(**data, is_training=False)(image)
        torch.testing.assert_close(ours(timm_preprocess(data), image)[0], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("crop_mode, interpolation, crop_pct", [
    ("border", "bicubic", 1.0), ("border", "bilinear", 0.9), ("border", "bicubic", 1.1), ("center", "bilinear", 1.1),
    ("squash", "bilinear", 1.1), ("center", "nearest", 0.875), (None, "bicubic", 0.9), ("center", "lanczos", 0.9)])
@pytest.mark.parametrize("size", [(96, 96), (97, 128)])
def test_an_image_is_read_as_timm_reads_a_picture(crop_mode, interpolation, crop_pct, size):
    """In 8 bits, as timm reads files: with borders in the mean colour, smaller than the crop, in every filter."""
    create_transform = pytest.importorskip("timm.data").create_transform
    from torchvision.transforms.functional import to_pil_image

    data = {"input_size": (3, *size), "interpolation": interpolation, "mean": MEAN, "std": STD, "crop_pct": crop_pct,
            "crop_mode": crop_mode}
    for upright in (False, True):
        image = photograph("chelsea", upright=upright)
        expected = create_transform(**data, is_training=False)(to_pil_image(image))
        found = ours(timm_preprocess(data), image)[0]
        assert (found - expected).abs().mean() < 0.02 < (found.roll(1, -1) - expected).abs().mean() / 4  # not by a pixel


def test_a_network_of_grey_images_is_refused():
    data = {"input_size": (1, 28, 28), "interpolation": "bilinear", "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    with says(ValueError, "1 channels", "three"):
        timm_preprocess(data)


def test_what_timm_says_of_a_network_is_enough():
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    for name in ("resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto"):
        data = resolve_data_config({}, model=timm.create_model(name, pretrained=False))
        image = photograph("chelsea")
        expected = create_transform(**data, is_training=False)(image)
        torch.testing.assert_close(ours(timm_preprocess(data), image)[0], expected, rtol=0, atol=1e-3)


# transformers

def square(edge: int) -> dict:
    return {"height": edge, "width": edge}


PROCESSORS = {  # name of the case -> (kind, settings)
    "CLIP": ("CLIP", {"size": {"shortest_edge": 96}, "crop_size": square(96)}),
    "CLIP, wide crop": ("CLIP", {"size": {"shortest_edge": 96}, "crop_size": {"height": 64, "width": 90}}),
    "SigLIP": ("Siglip", {"size": square(96)}),
    "SigLIP 2": ("Siglip2", {"max_num_patches": 64, "patch_size": 16}),
    "SigLIP 2, other patches": ("Siglip2", {"max_num_patches": 100, "patch_size": 14}),
    "ViT": ("ViT", {"size": {"height": 96, "width": 80}}),
    "ViT, not normalised": ("ViT", {"size": square(96), "do_normalize": False}),
    "ViT, not resized": ("ViT", {"do_resize": False}),
    "DPT": ("DPT", {"size": square(96)}),
    "DPT, proportions": ("DPT", {"size": square(96), "keep_aspect_ratio": True}),
    "DPT, proportions and patches": ("DPT", {"size": square(98), "keep_aspect_ratio": True, "ensure_multiple_of": 14}),
    "DPT, patches": ("DPT", {"size": {"height": 100, "width": 150}, "ensure_multiple_of": 14}),
    "DepthPro": ("DepthPro", {"size": square(96)}),
    "GLPN": ("GLPN", {"size_divisor": 32}),
    "GLPN, other steps": ("GLPN", {"size_divisor": 80}),
    "ZoeDepth": ("ZoeDepth", {"size": {"height": 96, "width": 128}, "do_pad": False, "ensure_multiple_of": 32}),
    "ZoeDepth, any size": ("ZoeDepth", {"size": {"height": 96, "width": 128}, "do_pad": False}),
    "SegFormer": ("Segformer", {"size": square(96)}),
    "BEiT": ("Beit", {"size": square(110), "do_center_crop": True, "crop_size": square(96)}),
    "BEiT, not cropped": ("Beit", {"size": square(96), "crop_size": square(96)}),
    "Mask2Former": ("Mask2Former", {"size": {"shortest_edge": 96, "longest_edge": 150}, "size_divisor": 32}),
    "Mask2Former, longer": ("Mask2Former", {"size": {"shortest_edge": 96, "longest_edge": 300}, "size_divisor": 32}),
    "ConvNeXT": ("ConvNext", {"size": {"shortest_edge": 224}, "crop_pct": 0.875}),
    "ConvNeXT, other crop": ("ConvNext", {"size": {"shortest_edge": 100}, "crop_pct": 0.95}),
    "ConvNeXT, large": ("ConvNext", {"size": {"shortest_edge": 384}, "crop_pct": 0.875}),
    "LeViT": ("Levit", {"size": {"shortest_edge": 224}}),
    "PoolFormer": ("PoolFormer", {"size": {"shortest_edge": 96}, "crop_pct": 0.9, "crop_size": square(96)}),
    "MobileViT": ("MobileViT", {"size": {"shortest_edge": 96}, "crop_size": square(80)}),
    "MobileViT, not flipped": ("MobileViT", {"size": {"shortest_edge": 96}, "crop_size": square(80),
                                             "do_flip_channel_order": False}),
    "BiT": ("Bit", {"size": {"shortest_edge": 110}, "crop_size": square(96)}),
    "DINOv3": ("DINOv3ViT", {"size": square(96)}),
}


def make_processor(folder, kind: str, settings: dict):
    """A processor of transformers and its own file: the kind that works on tensors, where this version has it."""
    transformers = pytest.importorskip("transformers")
    fast = f"{kind}ImageProcessorFast" if transformers.__version__ < "5" else ""
    make = getattr(transformers, fast, None) or getattr(transformers, f"{kind}ImageProcessor", None)
    if make is None:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}ImageProcessor")
    processor = make(**settings)
    processor.save_pretrained(folder)
    return processor, json.loads((folder / "preprocessor_config.json").read_text())


def theirs(processor, image: Tensor, **inputs) -> Tensor:
    """The processor's output for a photograph (3, H, W) in [0, 1], nothing rounded to 8 bits."""
    out = processor(images=[image], do_rescale=False, return_tensors="pt", **inputs)
    if "spatial_shapes" not in out:
        return out["pixel_values"]
    rows, columns = out["spatial_shapes"][0].tolist()
    edge = math.isqrt(out["pixel_values"].shape[-1] // 3)
    patches = out["pixel_values"][0, :rows * columns].reshape(rows, columns, edge, edge, 3)
    return patches.permute(4, 0, 2, 1, 3).reshape(1, 3, rows * edge, columns * edge)


def agree(processor, config: dict, image: Tensor, **inputs) -> None:
    """Numbers to 1e-3; processors without tensors resize in 8 bits, and clip what bicubic filters overshoot."""
    found, expected = ours(processor_preprocess(config), image), theirs(processor, image, **inputs)
    assert found.shape == expected.shape
    if hasattr(processor, "backend") or "Fast" in type(processor).__name__:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    else:
        assert ((found - expected).abs() > 0.03).float().mean() < 0.02


@pytest.mark.parametrize("kind, settings", PROCESSORS.values(), ids=PROCESSORS)
def test_an_image_is_read_as_transformers_reads_it(tmp_path, kind, settings):
    processor, config = make_processor(tmp_path, kind, settings)
    for name, upright in (("astronaut", False), ("chelsea", False), ("coffee", True)):
        agree(processor, config, photograph(name, upright=upright))


@pytest.mark.parametrize("settings", [{"do_split_image": True, "size": {"shortest_edge": 96, "longest_edge": None}},
                                      {"do_pad": True, "size": {"shortest_edge": 96, "longest_edge": 96}}])
def test_a_square_image_is_read_as_eomt_reads_it(tmp_path, settings):
    """Square images are read as EoMT reads them; others are made square."""
    processor, config = make_processor(tmp_path, "Eomt", settings)
    agree(processor, config, photograph("astronaut"))
    assert ours(processor_preprocess(config), photograph("chelsea")).shape == (1, 3, 96, 96)


def test_an_image_is_read_as_oneformer_reads_it(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "classes.json").write_text(json.dumps({"0": {"name": "wall", "isthing": 0}}))
    settings = {"size": {"shortest_edge": 96, "longest_edge": 300}, "repo_path": str(tmp_path),
                "class_info_file": "classes.json", "num_text": 4}
    processor, config = make_processor(tmp_path, "OneFormer", settings)
    for name in PHOTOGRAPHS:
        agree(processor, config, photograph(name), task_inputs=["semantic"])


OLD_FILES = {  # what the hub's older files say, with the processors' former names
    "CLIP": ("CLIP", {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224,
                      "do_center_crop": True, "do_normalize": True, "do_resize": True, "image_mean": MEAN,
                      "image_std": STD, "resample": 3}),
    "ViT": ("ViT", {"feature_extractor_type": "ViTFeatureExtractor", "size": 96, "do_normalize": True, "do_resize": True,
                    "image_mean": MEAN, "image_std": STD, "resample": 2}),
    "ViT, list": ("ViT", {"image_processor_type": "ViTImageProcessor", "size": [96, 80], "do_normalize": True,
                          "do_resize": True, "image_mean": MEAN, "image_std": STD, "resample": 2}),
    "ConvNeXT": ("ConvNext", {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875,
                              "do_normalize": True, "do_resize": True, "image_mean": MEAN, "image_std": STD, "resample": 3}),
    "MobileViT": ("MobileViT", {"feature_extractor_type": "MobileViTFeatureExtractor", "size": 96, "crop_size": 80,
                                "do_center_crop": True, "do_flip_channel_order": True, "do_resize": True, "resample": 2}),
    "GLPN": ("GLPN", {"feature_extractor_type": "GLPNFeatureExtractor", "do_rescale": True, "do_resize": True,
                      "resample": 2, "size_divisor": 32}),
    "SegFormer": ("Segformer", {"feature_extractor_type": "SegformerFeatureExtractor", "size": 96, "do_normalize": True,
                                "do_resize": True, "image_mean": MEAN, "image_std": STD, "reduce_labels": True,
                                "resample": 2}),
    "MaskFormer": ("MaskFormer", {"feature_extractor_type": "MaskFormerFeatureExtractor", "size": 96, "max_size": 130,
                                  "size_divisibility": 0, "do_normalize": True, "do_resize": True, "image_mean": MEAN,
                                  "image_std": STD, "resample": 2, "size_divisor": 32}),
}


@pytest.mark.parametrize("kind, config", OLD_FILES.values(), ids=OLD_FILES)
def test_an_old_file_is_read_as_transformers_reads_it(tmp_path, kind, config):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    fast = f"{kind}ImageProcessorFast" if transformers.__version__ < "5" else ""
    load = getattr(transformers, fast, None) or getattr(transformers, f"{kind}ImageProcessor")
    processor = load.from_pretrained(tmp_path)
    agree(processor, json.loads(json.dumps(config)), photograph("chelsea"))


# Files that say too little

NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True, "size": {"height": 20, "width": 28}}


def without(*names: str, **changed) -> dict:
    return {name: value for name, value in NORMAL.items() if name not in names} | changed


@pytest.mark.parametrize("config", [
    without("image_mean"), without("image_std"), without(image_mean=[0.5]), without(image_std=0.5),
    without(image_mean=None)])
def test_normalizing_without_a_mean_or_spread_is_refused(config):
    with says(ValueError, "preprocessor_config.json", "image_", "three numbers", "do_normalize"):
        processor_preprocess(config)


@pytest.mark.parametrize("config", [
    without(do_normalize=False), without("image_mean", do_normalize=False), without("image_mean", "do_normalize"),
    without(do_normalize=None), without("do_normalize", do_flip_channel_order=False)])
def test_without_normalizing_numbers_go_from_0_to_1(config):
    image = images()
    torch.testing.assert_close(processor_preprocess(config)(image), (image + 1) / 2, rtol=0, atol=1e-7)


def test_a_file_with_a_mean_normalizes():
    """A file that does not say whether it normalizes does so if it has a mean."""
    assert processor_preprocess(without("do_normalize")) == processor_preprocess(NORMAL) == Preprocess((20, 28))


@pytest.mark.parametrize("size", [None, {}, {"longest_edge": 512}, {"max_height": 5, "max_width": 6}])
def test_a_file_with_a_size_that_says_nothing_is_refused(size):
    with says(ValueError, "preprocessor_config.json", "size", "height and width", "shortest_edge"):
        processor_preprocess(without(size=size))


def test_a_lanczos_filter_is_bicubic_an_unknown_one_bilinear():
    assert [processor_preprocess(without(resample=number)).interpolation for number in (0, 1, 2, 3, 4)] == [
        "nearest-exact", "bicubic", "bilinear", "bicubic", "bilinear"]


# Parts of an image

def test_cut_outs_are_squares_inside_the_image():
    """Their sides are between two fifths and all of the shorter side."""
    where = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"))[None].expand(3, -1, -1, -1)
    edges = set()
    for seed in range(50):
        for part in cut_outs(where, 4, seed / 7):
            top, left, edge = *part[0, :, 0, 0].tolist(), part.shape[-1]
            assert part.shape == (3, 2, edge, edge) and 0.4 * H <= edge <= H
            assert torch.equal(part, where[:, :, top:top + edge, left:left + edge])
            edges.add(edge)
    assert min(edges) <= 9 and max(edges) >= H - 1


def test_parts_are_in_places_that_depend_on_the_seed_only():
    image = images()
    first, again = (cut_outs(image, 4, 1.5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    places = {tuple(part.sum().item() for part in cut_outs(image, 4, seed)) for seed in (0.5, 0.75, 1, 1.25, 1.5, 2, 80)}
    assert len(places) == 7
    for index in range(3):  # every image of a batch gets the same places, alone or with others
        alone = cut_outs(image[index:index + 1], 4, 1.5)
        assert all(torch.equal(a, b[index:index + 1]) for a, b in zip(alone, first, strict=True))
    assert [part.shape for part in cut_outs(image, 2, 1.5)] == [part.shape for part in first[:2]]
    assert cut_outs(image, 0, 1.5) == []


def test_cut_outs_reach_pixels_beyond_a_centre_crop():
    preprocess = Preprocess((12, 10**6), fit="shortest", crop=(12, 12))
    image = images().requires_grad_()
    preprocess(image).sum().backward()
    assert image.grad[..., 0].abs().sum() == 0
    for seed in range(20):
        for part in cut_outs(image, 4, seed):
            preprocess(part).sum().backward()
    reached = image.grad.abs().sum((0, 1)) > 0
    assert bool(reached.any(0).all()) and bool(reached.any(1).all())


@pytest.mark.parametrize("settings, value", [({}, -1.0), ({"beyond": 0.0}, 0.0)])
def test_a_crop_beyond_the_image_is_filled(settings, value):
    framed = Preprocess((6, 8), crop=(10, 8)).frame(torch.ones(1, 1, 6, 8), **settings)
    assert framed[0, 0, :, 0].tolist() == [value] * 2 + [1.0] * 6 + [value] * 2
