"""Every kind of network that can guide, on the real architecture at small size: what docs/guiders.md says of it."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import level, randn, says
from helpers.guider_families import FAMILIES, LABELS, aimed, photographs, row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.experts.checkpoint import load_bank, save_bank
from ppap_core.experts.lesson import distill_loss
from ppap_core.experts.pairs import Pairs
from ppap_core.guiders.guider import Guider, clean
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.loaders.transformers_outputs import semantic_logits
from ppap_core.guiders.targets import class_target, image_target
from ppap_core.guiders.tasks import TASKS, most_probable
from ppap_core.noise import to_vp
from ppap_core.schedules import ExpertSchedule

pytestmark = pytest.mark.slow  # all together take several seconds of the fast tests' minute

pytest.importorskip("timm")
pytest.importorskip("transformers")

EVERY = pytest.mark.parametrize("name", FAMILIES)
H, W = 40, 56
SCHEDULE = ExpertSchedule((0.05, 0.4, 3.0, 20.0))


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> dict[str, Path]:
    """A folder for each family, written when it is first asked for."""
    class Folders(dict):
        def __missing__(self, name: str) -> Path:
            folder = tmp_path_factory.mktemp("families") / name.replace(" ", "_")
            folder.mkdir()
            FAMILIES[name].write(folder)
            self[name] = folder
            return folder
    return Folders()


@pytest.fixture
def guider(name: str, written) -> Guider:
    return aimed(load_guider(written[name], FAMILIES[name].output), FAMILIES[name])


@EVERY
def test_a_folder_is_recognised_and_its_network_frozen(name: str, guider: Guider):
    assert guider.task == FAMILIES[name].task
    task = TASKS[guider.task]
    assert guider.labels == (LABELS if task.names_classes or task.target_of is most_probable else ())
    assert not any(parameter.requires_grad for parameter in guider.net.parameters()) and not guider.net.training
    assert not any(module.training for module in guider.net.modules())


def gradient_of(guider: Guider, image: Tensor) -> Tensor:
    image = image.clone().requires_grad_()
    return torch.autograd.grad(guider.energy(image, clean(image)).sum(), image)[0]


@torch.no_grad()
def numeric_slope(guider: Guider, image: Tensor, direction: Tensor, step: float) -> Tensor:
    higher, lower = (guider.energy(image + sign * step * direction, clean(image)) for sign in (1, -1))
    return (higher - lower) / (2 * step)


@EVERY
def test_the_gradient_is_the_finite_difference_of_the_energy(name: str, guider: Guider):
    image, direction = photographs(), photographs(seed=1).double()
    single = gradient_of(guider, image)
    assert single.isfinite().all() and bool((single.flatten(1).abs().amax(1) > 0).all())
    guider.net.double()
    with sdpa_kernel(SDPBackend.MATH):  # the faster ones misread masks of single precision beside double queries
        gradient = gradient_of(guider, image.double())
        slope = (gradient * direction).sum((1, 2, 3))
        errors = [(slope - numeric_slope(guider, image.double(), direction, step)).abs() for step in (1e-4, 1e-6)]
    # kinks want a small step, softmaxes that stay in single precision a large one: each image has the one that suits it
    assert (torch.minimum(*errors) < 0.02 * slope.abs().max()).all(), (slope, errors)
    torch.testing.assert_close(single.double(), gradient, rtol=0.02, atol=0.02 * float(gradient.abs().max()))


@pytest.mark.slow
@EVERY
def test_experts_start_plain_learn_alone_and_are_saved(name: str, guider: Guider, tmp_path):
    """Three experts start as the plain network, each learns alone, and all come back from a file."""
    net, image = base_network(guider), photographs()
    bank = ExpertBank(net, SCHEDULE, LoraSpec(rank=2, alpha=2.0), view="noisy")
    experts = with_experts(guider, bank)
    grouped = {part for part, module in net.named_modules() if getattr(module, "groups", 1) > 1}
    assert bool(grouped) is FAMILIES[name].grouped and not grouped & set(bank.lora.targets)
    plain = guider.predict(image, clean(image))
    for sigma in (0.1, 1.0, 10.0):
        # bit for bit, but that a single thread may convolve by the copy of a weight in another order
        torch.testing.assert_close(experts.predict(image, level(sigma, image)), plain, rtol=0,
                                   atol=0 if torch.get_num_threads() > 1 else 1e-4 * float(plain.abs().max()))

    before = [experts.predict(image, level(sigma, image)) for sigma in (0.1, 10.0)]
    with bank.trainable(1) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        pairs = Pairs(image, to_vp(image + randn(*image.shape, seed=3), level(1.0, image)), level(1.0, image))
        for _ in range(2):
            loss = distill_loss(guider, bank, pairs)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    assert loss.shape == (2,) and bool(loss.isfinite().all())
    assert not torch.equal(experts.predict(image, level(1.0, image)), plain)
    assert all(torch.equal(experts.predict(image, level(sigma, image)), kept)
               for sigma, kept in zip((0.1, 10.0), before, strict=True))
    assert torch.equal(guider.predict(image, clean(image)), plain)

    save_bank(tmp_path / "bank.safetensors", bank, guider)
    again = with_experts(guider, load_bank(tmp_path / "bank.safetensors", guider))
    for sigma in (0.1, 1.0, 10.0):
        assert torch.equal(again.predict(image, level(sigma, image)), experts.predict(image, level(sigma, image)))


def real_photographs(square: bool) -> list[Tensor]:
    """(3, h, w) in [0, 1]."""
    data = pytest.importorskip("skimage.data")
    shown = [data.astronaut()[100:420, 60:380]] + ([] if square else [data.chelsea()[20:260, 40:400]])
    return [torch.from_numpy(each.copy()).permute(2, 0, 1).float() / 255 for each in shown]


def prepared_by_the_library(folder: Path, image: Tensor) -> tuple[Tensor, bool]:
    """The library's own preprocessing of an image (3, h, w) in [0, 1], and whether it avoids rounding to 8 bits."""
    if "architecture" in json.loads((folder / "config.json").read_text()):
        import timm

        said = json.loads((folder / "config.json").read_text())
        side = said.get("model_args", {}).get("img_size")
        size = {"input_size": (3, *(side if isinstance(side, list) else (side, side)))} if side else {}
        transform = timm.data.create_transform(**timm.data.resolve_data_config(said["pretrained_cfg"]) | size)
        if (folder / "selected_tags.csv").exists():  # as its authors' scripts do it: square and white, then blue first
            missing = max(image.shape) - torch.tensor(image.shape[:0:-1])
            edges = [side for pixels in missing.tolist() for side in (pixels // 2, pixels - pixels // 2)]
            return transform(torch.nn.functional.pad(image, edges, value=1.0))[None].flip(1), True
        return transform(image)[None], True
    import transformers

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    name = settings.pop("image_processor_type")
    fast = getattr(transformers, f"{name}Fast", None)
    exact = bool(fast) or int(transformers.__version__.split(".")[0]) > 4
    kind = fast or getattr(transformers, name)
    more = {}
    if name == "OneFormerImageProcessor":
        (folder / "classes.json").write_text(json.dumps({"0": {"name": "wall", "isthing": 0}}))
        settings |= {"repo_path": str(folder), "class_info_file": "classes.json"}
        more = {"task_inputs": ["semantic"]}
    done = kind(**settings)(image, **more, do_rescale=False, return_tensors="pt", input_data_format="channels_first")
    values = done["pixel_values"]
    if "spatial_shapes" in done:  # patches: put them back into the picture
        (rows, columns), side = done["spatial_shapes"][0].tolist(), settings["patch_size"]
        values = values[:, :rows * columns].reshape(1, rows, columns, side, side, 3)
        values = values.permute(0, 5, 1, 3, 2, 4).reshape(1, 3, rows * side, columns * side)
    return (values if isinstance(values, Tensor) else torch.stack(list(values))), exact


@EVERY
def test_preprocessing_agrees_with_the_library_s_own(name: str, guider: Guider, written):
    """Photographs are prepared as the library prepares them."""
    for image in real_photographs(square="EoMT" in name):
        theirs, exact = prepared_by_the_library(written[name], image)
        difference = (guider.preprocess(image[None] * 2 - 1) - theirs).abs()
        assert difference.max() < 1e-3 if exact else difference.mean() < 0.02


def spoil(folder: Path, how: str) -> None:
    config = folder / "config.json"
    said = json.loads(config.read_text())
    weights = folder / "model.safetensors"
    if how == "a pickle":
        torch.save({"a": torch.zeros(3)}, folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "a pickle under the name of safetensors":
        torch.save({"a": torch.zeros(3)}, weights)
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "another architecture":
        config.write_text(json.dumps(said | {"architectures": ["BertForMaskedLM"]}))
    elif how == "an unknown architecture":
        config.write_text(json.dumps(said | {"architectures": ["TomorrowForImageClassification"]}))
    elif how == "another size":
        config.write_text(json.dumps(said | {"hidden_size": 64}))
    elif how == "more layers":
        config.write_text(json.dumps(said | {"num_hidden_layers": 6}))
    elif how == "code of its own":
        config.write_text(json.dumps(said | {"model_type": "evil", "auto_map": {"AutoModel": "evil.Evil"}}))
        (folder / "evil.py").write_text("raise SystemExit('this code must never run')")
    elif how == "no preprocessing":
        (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize("how, kind, words", [
    ("a pickle", FileNotFoundError, ["model.safetensors", "pytorch_model.bin", "pickle"]),
    ("a pickle under the name of safetensors", ValueError, ["model.safetensors", "cannot be read"]),
    ("truncated", ValueError, ["model.safetensors", "cannot be read"]),
    ("another architecture", ValueError, ["BertForMaskedLM", "ForImageClassification", "CLIPModel"]),
    ("an unknown architecture", ValueError, ["TomorrowForImageClassification", "transformers"]),
    ("another size", ValueError, ["ViTForImageClassification", "copy"]),
    ("more layers", ValueError, ["missing", "copy"]),
    ("no preprocessing", FileNotFoundError, ["preprocessor_config.json"]),
])
def test_an_incomplete_folder_is_refused_in_one_sentence(tmp_path, how: str, kind, words):
    FAMILIES["image classifier (ViT)"].write(tmp_path)
    spoil(tmp_path, how)
    with says(kind, *words):
        load_guider(tmp_path)


def test_code_in_a_folder_is_never_run(tmp_path):
    FAMILIES["image classifier (ViT)"].write(tmp_path)
    spoil(tmp_path, "code of its own")
    try:
        load_guider(tmp_path)
    except ValueError as error:
        assert "\n" not in str(error)


def test_code_beside_a_tokenizer_is_never_run(tmp_path):
    FAMILIES["CLIP"].write(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('this code must never run')")
    try:
        load_guider(tmp_path).read_text("a star")
    except ValueError as error:
        assert "\n" not in str(error) and "tokenizer" in str(error)


@pytest.mark.parametrize("name", ["TokenizersBackend", "TomorrowTokenizer"])
def test_a_tokenizer_of_another_release_is_read(tmp_path, name: str):
    """transformers 5 writes the name of a class that 4 does not have."""
    FAMILIES["CLIP"].write(tmp_path)
    expected = load_guider(tmp_path).read_text("a red ring")
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": name}))
    assert torch.equal(load_guider(tmp_path).read_text("a red ring"), expected)


@pytest.mark.parametrize("name", ["CLIP", "OneFormer"])
def test_a_missing_tokenizer_is_told_in_one_sentence(tmp_path, name: str):
    FAMILIES[name].write(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with says(FileNotFoundError, "tokenizer", "copy"):
        load_guider(tmp_path).read_text("a star")


def test_without_class_names_numbers_go_on_working(tmp_path, caplog):
    """The log says that the names are missing, and numbers still choose a class."""
    FAMILIES["image classifier (ViT)"].write(tmp_path)
    config = tmp_path / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"id2label": {str(i): f"LABEL_{i}" for i in range(5)}, "label2id": {}}))
    guider = load_guider(tmp_path)
    assert class_target(guider, "3").tolist() == [3] and "no names for its 5 classes" in caplog.text


def test_a_network_that_cannot_be_read_so_is_refused(written):
    with says(ValueError, "CLIPModel", "style", "timm"):
        load_guider(written["CLIP"], "style")


def the_library_s_model(folder: Path) -> torch.nn.Module:
    import transformers

    said = json.loads((folder / "config.json").read_text())
    return getattr(transformers, said["architectures"][0]).from_pretrained(folder)


@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "SigLIP 2 (NaFlex)", "CLIPSeg"])
def test_texts_are_read_as_the_library_reads_them(name: str, guider: Guider, written):
    """Texts are tokenized as the library does it and read by the text half alone."""
    import transformers

    folder, text = written[name], "a blue star"
    model = the_library_s_model(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)([text], return_tensors="pt", max_length=16, truncation=True,
                                                                padding="max_length" if "SigLIP" in name else False)
    with torch.no_grad():
        found = (model.clip if name == "CLIPSeg" else model).get_text_features(input_ids=tokens["input_ids"])
    found = found if isinstance(found, Tensor) else found.pooler_output
    torch.testing.assert_close(guider.read_text(text), found)
    assert not any("text" in part for part, _ in guider.net.named_parameters())


@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "SigLIP 2 (NaFlex)"])
def test_images_are_read_as_the_library_reads_them(name: str, guider: Guider, written):
    folder, image = written[name], photographs(32, 32)
    model = the_library_s_model(folder)
    prepared = {"pixel_values": guider.preprocess(image)}
    if "NaFlex" in name:
        patches = prepared["pixel_values"].reshape(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 192)
        prepared = {"pixel_values": patches, "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
                    "spatial_shapes": torch.tensor([[4, 4]] * 2)}
    with torch.no_grad():
        found = model.get_image_features(**prepared)
    found = found if isinstance(found, Tensor) else found.pooler_output
    torch.testing.assert_close(guider.predict(image, clean(image)), found)


@pytest.mark.parametrize("name", ["Mask2Former", "OneFormer", "EoMT"])
def test_semantic_logits_are_the_library_s_own(name: str, guider: Guider):
    import transformers

    image = photographs(64, 64)
    ours = guider.predict(image, clean(image))
    model = base_network(guider).model
    more = {"task_inputs": base_network(guider).forward_fn.args[0].expand(2, -1)} if name == "OneFormer" else {}
    with torch.no_grad():
        found = model(pixel_values=guider.preprocess(image), **more)
    shares = torch.einsum("bqc,bqhw->bchw", found.class_queries_logits.softmax(-1)[..., :-1],
                          found.masks_queries_logits.sigmoid())
    torch.testing.assert_close(ours.exp(), shares.clamp_min(1e-6))
    processor = getattr(transformers, f"{name.replace('EoMT', 'Eomt')}ImageProcessor")
    if name == "Mask2Former":  # the library's post-processing goes by way of a larger map, so compare the labels inside
        maps = processor().post_process_semantic_segmentation(found, target_sizes=[(64, 64)] * 2)
        mine = torch.nn.functional.interpolate(ours, (64, 64), mode="nearest").argmax(1)
        assert (torch.stack(maps) == mine).float().mean() > 0.9


def test_a_faint_class_has_a_gradient_in_float16():
    scale = torch.full((1, 1), 1.0)

    def model(pixel_values: Tensor) -> SimpleNamespace:
        masks = (pixel_values.movedim(1, -1) @ scale.expand(3, 2)).movedim(-1, 1)  # in half, as autocast has it
        classes = masks.new_tensor([[[-5.0, 0, 0], [-5, 0, 0]]])
        return SimpleNamespace(masks_queries_logits=masks, class_queries_logits=classes)

    image = torch.full((1, 3, 20, 20), -2.0, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        found = semantic_logits(model, image)[:, 0]
    assert found.dtype == torch.float32 and -12 < found.mean() < -9
    [gradient] = torch.autograd.grad(1024 * found.mean(), image)
    assert gradient.isfinite().all() and gradient.abs().min() > 0


@pytest.mark.parametrize("name", ["DINOv2", "timm ViT, structure"])
def test_structure_sees_places_not_common_changes(name: str, guider: Guider):
    """A change of all tokens alike is not seen; where things are is."""
    image = photographs(42, 42)
    own = guider.aim(image_target(guider, image))
    assert own.energy(image, clean(image)).abs().max() < 1e-6
    assert (own.energy(image.flip(3), clean(image)) > 1e-4).all()


def test_style_does_not_see_where_things_are(written):
    guider = load_guider(written["timm VGG, style"], "style")
    image = photographs(224, 224)
    own = guider.aim(image_target(guider, image))
    turned, another = own.energy(image.flip(3), clean(image)), own.energy(image.flip(0), clean(image))
    assert (turned < another / 3).all()


@EVERY
def test_the_table_in_the_docs_has_a_line_for_each_family(name: str):
    assert row(name) in (Path(__file__).parents[2] / "docs" / "guiders.md").read_text().splitlines()
