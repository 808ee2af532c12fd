"""What the guiders see is shown while a model is sampled, beside the preview that ComfyUI draws."""
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy
import pytest
import torch
from helpers.comfy_server import Server
from helpers.graphs import WORLD, node, sampling, weighing
from helpers.worlds import PixelWorld
from PIL import Image

SIDE, CAPTION, STEPS = 256, 40, 5
FAINT = 1e-9  # a weight that moves no image visibly, so that the last prediction is the image


@pytest.fixture
def live(comfy, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the previews, without a pause between two pictures."""
    module = comfy.pack.nodes.bridge.live_preview
    monkeypatch.setattr(module, "PAUSE", 0.0)
    return module


@pytest.fixture
def sent(comfy, live: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """The previews that ComfyUI's progress bars send, where previews are on."""
    from comfy import utils
    from comfy.cli_args import LatentPreviewMethod, args

    previews: list = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK",
                        lambda value, total, preview, node_id=None: previews.append(preview and preview[1]))
    yield previews


def guided(comfy, pixels: PixelWorld, terms: tuple, live_preview: bool = True) -> Any:
    return comfy("PPAPApplyGuidance", model=pixels.model, terms=terms, max_rms=0.0, live_preview=live_preview)[0]


def tile(preview: Image.Image, index: int) -> Image.Image:
    """One of up to four pictures, which stand two by two."""
    left, top = index % 2 * SIDE, index // 2 * (SIDE + CAPTION)
    return preview.crop((left, top, left + SIDE, top + SIDE))


def difference(one: Image.Image, other: Image.Image) -> float:
    return numpy.abs(numpy.asarray(one, dtype=float) - numpy.asarray(other.resize(one.size), dtype=float)).mean()


def test_each_step_shows_what_a_guider_sees_and_no_bit_changes(comfy, pixels: PixelWorld, sent: list):
    terms = pixels.term()
    settings = {"model": pixels.model, "terms": terms, "max_rms": 0.0, **pixels.settings(steps=STEPS)}
    shown = comfy("PPAPGuidedKSampler", live_preview=True, **settings)[0]["samples"]
    plain = comfy("PPAPGuidedKSampler", **settings)[0]["samples"]
    previews, without = sent[:STEPS], sent[STEPS:]
    assert torch.equal(shown, plain) and len(without) == STEPS
    assert {preview.size for preview in previews} == {(2 * SIDE, SIDE + CAPTION)}
    assert all(difference(tile(*pair, 0), core) == 0 for *pair, core in zip(previews, without, strict=True))
    assert len({tile(preview, 1).tobytes() for preview in previews}) == STEPS


def test_progress_bars_are_left_as_they_were(comfy, pixels: PixelWorld, sent: list, monkeypatch: pytest.MonkeyPatch):
    """Where a sampling ends well, and where Cancel ends it from inside the progress bar."""
    from comfy import utils
    from comfy.model_management import InterruptProcessingException as Interrupted

    def cancel(value: int, total: int, preview: Any, node_id: str | None = None) -> None:
        raise Interrupted

    before, model = utils.ProgressBar.update_absolute, guided(comfy, pixels, pixels.term())
    pixels.sample(model, steps=2)
    assert utils.ProgressBar.update_absolute is before and len(sent) == 2
    monkeypatch.setattr(utils, "PROGRESS_BAR_HOOK", cancel)
    with pytest.raises(Interrupted):
        pixels.sample(model, steps=2)
    assert utils.ProgressBar.update_absolute is before


GUIDERS = {
    "class": lambda comfy, pixels: pixels.guider,
    "depth": lambda comfy, pixels: like(comfy, pixels, comfy("PPAPLoadGuider", guider_name="tinyworld/depth")[0]),
    "regions": lambda comfy, pixels: like(comfy, pixels, comfy("PPAPLoadGuider", guider_name="tinyworld/segmentation")[0]),
    "colours": lambda comfy, pixels: like(comfy, pixels, comfy("PPAPRule", rule="colours")[0]),
    "number": lambda comfy, pixels: comfy("PPAPAimAtNumber", guider=comfy("PPAPRule", rule="contrast")[0], number=0.3)[0],
    "features": lambda comfy, pixels: comfy("PPAPRule", rule="symmetry left-right")[0],
}


def like(comfy, pixels: PixelWorld, guider: Any) -> Any:
    return comfy("PPAPAimAtImage", guider=guider, image=torch.rand(3, 32, 32, 3), image_is="a picture")[0]


@pytest.mark.parametrize("kind", GUIDERS)
def test_the_last_picture_is_that_of_preview_guider(comfy, pixels: PixelWorld, sent: list, kind: str):
    guider = GUIDERS[kind](comfy, pixels)
    samples = pixels.sample(guided(comfy, pixels, pixels.term(guider, weight=FAINT)), steps=STEPS)
    image = comfy("VAEDecode", samples={"samples": samples}, vae=pixels.vae)[0]
    [seen, *_] = comfy("PPAPLookThrough", guider=guider, image=image)[0]
    wanted = Image.fromarray((seen.numpy() * 255).astype(numpy.uint8))
    assert difference(tile(sent[-1], 1), wanted) < 3


def test_all_guidance_of_a_model_is_shown_at_once(comfy, pixels: PixelWorld, sent: list):
    """Of two that are asked to, and one that is not; a term whose window is over is said to rest, one of weight 0 is not."""
    terms = pixels.term(start_percent=0.0, end_percent=0.2, terms=pixels.term(weight=0.0))
    model = guided(comfy, pixels, terms)
    [model] = comfy("PPAPApplyGuidance", model=model, terms=pixels.term(), max_rms=0.0)
    [model] = comfy("PPAPApplyGuidance", model=model, terms=pixels.term(), max_rms=0.0, live_preview=True)
    pixels.sample(model, steps=STEPS)
    assert [preview.size for preview in sent] == [(2 * SIDE, 2 * (SIDE + CAPTION))] * STEPS
    assert len({tile(preview, 1).tobytes() for preview in sent[-3:]}) == 1
    assert len({tile(preview, 2).tobytes() for preview in sent}) == STEPS


def test_the_page_is_sent_the_pictures(server: Server):
    """The last one whatever the time: two tiles, at the node that samples."""
    graph = WORLD | {
        "2": node("PPAPLoadGuider", guider_name="tinyworld/class"),
        "3": node("PPAPAimAtClass", guider=["2", 0], classes="star"),
        "4": node("PPAPGuidanceTerm", **weighing(["3", 0])),
        "5": node("PPAPGuidedKSampler", terms=["4", 0], max_rms=0.0, live_preview=True, **sampling()),
        "6": node("PreviewAny", source=["5", 1])}
    with server.listen() as until:
        server.queue(graph)
        received = [data for kind, data in until("execution_success") if kind == "preview" and data[:4] == b"\0\0\0\1"]
    picture = Image.open(BytesIO(received[-1][8:]))  # behind the kinds of the message and of the picture
    assert picture.size == (2 * SIDE, SIDE + CAPTION)


def test_a_preview_is_drawn_a_few_times_in_a_second(comfy, pixels: PixelWorld, sent: list, live: Any,
                                                    monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "PAUSE", 1000.0)
    pixels.sample(guided(comfy, pixels, pixels.term()), steps=STEPS)
    assert [preview is not None for preview in sent if preview] == [True] * 2  # the first, and always the last


@pytest.mark.parametrize("kind", ["experts", pytest.param("readout", marks=pytest.mark.wide)])
def test_experts_are_named_in_the_caption(comfy, pixels: PixelWorld, live: Any, monkeypatch: pytest.MonkeyPatch, kind: str):
    captions: list[str] = []
    monkeypatch.setattr(live, "captioned_tiles", lambda pictures, height: captions.append(pictures[1][0]) or pictures[0][1])
    sight = comfy.pack.nodes.bridge.live_preview.LivePreview
    guider = experts(comfy, pixels) if kind == "experts" else readout(comfy, pixels)
    model = guided(comfy, pixels, pixels.term(guider, weight=0.3, strength="balanced"))
    monkeypatch.setattr(sight, "__call__", lambda preview, *args: preview.extend(("JPEG", Image.new("RGB", (8, 8)), None)))
    pixels.sample(model, steps=STEPS)
    assert "expert 2 of 2" in captions[0] and "expert 1 of 2" in captions[-1] and "energy" in captions[0]


def experts(comfy, pixels: PixelWorld) -> Any:
    core, bridge = comfy.pack.ppap_core, comfy.pack.nodes.bridge
    spec, schedule = core.experts.adapters.LoraSpec(2, 2.0), core.schedules.ExpertSchedule((0.01, 1.0, 80.0))
    bank = bridge.distillation.new_bank(pixels.guider, schedule, spec, "denoised", 0, None)
    return core.experts.bank.with_experts(pixels.guider, bank)


def readout(comfy, pixels: PixelWorld) -> Any:
    return comfy("PPAPDistillReadout", model=pixels.model, samples=pixels.samples(), guider=pixels.guider,
                 positive=pixels.conditioning, heads=2, steps=2, batch_size=4, learning_rate=1e-3, seed=0)[0]


def test_nothing_is_drawn_where_previews_are_off(comfy, pixels: PixelWorld, live: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live, "captioned_tiles", lambda *args: pytest.fail("drawn"))
    pixels.sample(guided(comfy, pixels, pixels.term()), steps=2)
