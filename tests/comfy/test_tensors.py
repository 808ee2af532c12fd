"""Images and masks as other packs hand them over: each form means what its values say, or is refused in a sentence."""
import pytest
import torch
from helpers import says
from helpers.worlds import PixelWorld
from torch import Tensor

HEIGHT, WIDTH = 6, 8


@pytest.fixture(scope="module")
def tensors(comfy):
    return comfy.pack.nodes.bridge.tensors


@pytest.fixture(scope="module")
def world(comfy) -> PixelWorld:
    return PixelWorld(comfy)


def drawn() -> Tensor:
    """One soft mask (1, H, W)."""
    return torch.rand(1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255


FORMS = {
    "as it should be": lambda mask: mask,
    "no batch": lambda mask: mask[0],
    "channel first": lambda mask: mask[:, None],
    "channel last": lambda mask: mask[..., None],
    "channel last, no batch": lambda mask: mask[0, ..., None],
    "one frame": lambda mask: mask[None, None],
    "bytes": lambda mask: (mask * 255).round().to(torch.uint8),
    "floats up to 255": lambda mask: (mask * 255).round(),
    "inference tensor": lambda mask: torch.inference_mode()(mask.clone)(),
    "not contiguous": lambda mask: mask.mT.contiguous().mT,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_of_any_form_is_read_alike(tensors, form: str):
    read = tensors.mask_from_comfy(FORMS[form](drawn()))
    assert read.shape == (1, HEIGHT, WIDTH) and not read.is_inference()
    torch.testing.assert_close(read, drawn())


def test_masks_of_a_batch_and_of_frames_stay_apart(tensors):
    masks = torch.stack([drawn()[0], drawn()[0] / 2, drawn()[0] / 4])
    for form in (masks, masks[:, None], masks[..., None], masks[None, None]):
        assert torch.equal(tensors.mask_from_comfy(form), masks)


def test_a_mask_of_yes_and_no_is_read(tensors):
    for kind in (torch.bool, torch.uint8, torch.int64, torch.float16):
        assert torch.equal(tensors.mask_from_comfy((drawn() > 0.5).to(kind)).float(), (drawn() > 0.5).float())


def test_values_beyond_a_mask_are_cut_and_said(tensors, caplog: pytest.LogCaptureFixture):
    mask = torch.tensor([[[-2.0, 0.25, 3.0, float("nan"), float("inf"), float("-inf")]]])
    assert tensors.mask_from_comfy(mask).tolist() == [[[0.0, 0.25, 1.0, 0.0, 1.0, 0.0]]]
    assert "not numbers" in caplog.text and "from -2 to 3" in caplog.text


@pytest.mark.parametrize("shape", [(0, 6, 8), (1, 0, 8), (2, 3, 6, 8), (2, 6, 8, 3), (8,), ()])
def test_what_is_no_mask_is_refused(tensors, shape: tuple[int, ...]):
    with says(ValueError, "the mask has the shape", str(shape), "(batch, height, width)"):
        tensors.mask_from_comfy(torch.ones(shape))


def colored() -> Tensor:
    """One picture (1, H, W, 3)."""
    return torch.rand(1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255


PICTURES = {
    "as it should be": lambda image: image,
    "no batch": lambda image: image[0],
    "alpha": lambda image: torch.cat([image, torch.rand(1, HEIGHT, WIDTH, 1)], -1),
    "bytes": lambda image: (image * 255).round().to(torch.uint8),
    "floats up to 255": lambda image: (image * 255).round(),
}


@pytest.mark.parametrize("form", PICTURES)
def test_an_image_of_any_form_is_read_alike(tensors, form: str):
    torch.testing.assert_close(tensors.image_from_comfy(PICTURES[form](colored())), colored().movedim(-1, 1) * 2 - 1)


def test_a_grey_image_has_three_equal_colors(tensors):
    grey = colored()[..., :1]
    expected = (grey * 2 - 1).movedim(-1, 1).expand(1, 3, HEIGHT, WIDTH)
    for form in (grey, grey[..., 0], grey[0, ..., 0], grey[0], torch.cat([grey, torch.ones_like(grey)], -1)):
        assert torch.equal(tensors.image_from_comfy(form), expected)


def test_an_image_a_little_out_of_range_is_kept(tensors):
    image = colored() * 1.1 - 0.05
    assert torch.equal(tensors.image_from_comfy(image), image.movedim(-1, 1) * 2 - 1)


@pytest.mark.parametrize("shape", [(0, 6, 8, 3), (1, 0, 8, 3), (1, 6, 8, 5), (1, 3, 6, 8), (3,)])
def test_what_is_no_image_is_refused(tensors, shape: tuple[int, ...]):
    with says(ValueError, "the image has the shape", str(shape), "(batch, height, width, 3)"):
        tensors.image_from_comfy(torch.ones(shape))


def test_an_image_of_a_failed_vae_is_refused(tensors):
    with says(ValueError, "not numbers", "VAE"):
        tensors.image_from_comfy(colored().index_fill(1, torch.tensor([2]), float("nan")))


@pytest.mark.parametrize("damage", [lambda mask: mask * 255, lambda mask: mask * 3 - (mask == 0).float(),
                                    lambda mask: mask.masked_fill(mask == 0, float("nan"))],
                         ids=["bytes", "beyond 0 and 1", "not a number"])
def test_a_damaged_mask_steers_as_a_sound_one(world: PixelWorld, damage):
    """Masks on the grid of what is sampled, which nothing resizes."""
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:] = 1
    assert torch.equal(world.guided(world.term(mask=damage(mask))), world.guided(world.term(mask=mask)))


def test_each_form_of_mask_says_where_a_class_is(comfy):
    [guider] = comfy("PPAPLoadGuider", guider_name="tinyworld/segmentation")
    mask = torch.zeros(1, 32, 32)
    mask[:, 13:25, 6:18] = 1
    [expected] = comfy("PPAPAimAtMask", guider=guider, mask=mask, name="disk")
    for form in FORMS.values():
        [aimed] = comfy("PPAPAimAtMask", guider=guider, mask=form(mask), name="disk")
        assert torch.equal(aimed.target, expected.target)
