"""Every class of models of the ComfyUI at hand: guided, distilled for and autoguided, or refused in one sentence.

PPAP_REFRESH_SWEEP=1 writes the answers into docs/compatibility.md instead of comparing them with it.
"""
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from helpers import sweep
from helpers.every_class import BY_CLASS, names
from helpers.workbench import Workbench, autoguided, ksampler, with_lora_at

REFRESH = bool(os.environ.get("PPAP_REFRESH_SWEEP"))


@pytest.fixture(scope="module")
def check(bench: Workbench) -> Iterator[Callable[[str], None]]:
    """check(name) asks a class, and compares its answers with the document's."""
    rows: dict[str, str] = {}

    def ask(name: str) -> None:
        if name not in names():
            pytest.skip(f"this ComfyUI has no {name}")
        row = sweep.row(name, sweep.ask(bench, name))
        if REFRESH:
            rows[name] = row
        else:
            assert sweep.is_as_documented(row), f"{row} is not in docs/compatibility.md: PPAP_REFRESH_SWEEP=1 writes it"
    yield ask
    if rows:
        sweep.write(rows)


def test_every_class_is_in_the_document(bench: Workbench):
    if (new := sweep.untried()) and not REFRESH:
        pytest.skip(f"classes of this ComfyUI that were never tried: {', '.join(new)}; give them recipes "
                    "in helpers/every_class.py")


def test_the_document_counts_the_classes(bench: Workbench):
    from comfyui_version import __version__ as version

    counted, rows = f"ComfyUI {version.removesuffix('.0')} knows", sweep.documented()
    section = " ".join(sweep.section().split())
    if counted not in section:
        pytest.skip(f"the document counts no classes of ComfyUI {version}")
    guided = [name for name in names() if "yes" in rows.get(name, "")]
    assert re.search(rf"{counted} {len(names())}\b[^0-9]* of which {len(guided)} d", section)


def test_a_class_of_a_newer_comfyui_is_named(bench: Workbench, monkeypatch: pytest.MonkeyPatch):
    """And answers in a sentence where its latents are new too."""
    import comfy.latent_formats
    import comfy.supported_models as known

    latents = type("NewerLatents", (comfy.latent_formats.LatentFormat,), {})
    newer = type("Newer", (known.SD15,), {"latent_format": latents})
    monkeypatch.setattr(known, "models", [*known.models, newer])
    monkeypatch.setattr(known, "Newer", newer, raising=False)
    assert "Newer" in sweep.untried()
    assert "does not know the colours of this model's latents, NewerLatents" in sweep.ask(bench, "Newer")[0]


def test_what_diffuses_no_pictures_is_refused(check: Callable[[str], None]):
    for name in names():
        if name not in BY_CLASS and (REFRESH or name in sweep.documented()):
            check(name)


@pytest.mark.wide
def test_keys_and_values_of_a_network_are_kept_apart(bench: Workbench):
    """HiDream-O1 keeps the prompt's keys and values across steps, whatever LoRA its layers have meanwhile."""
    if "HiDreamO1" not in names():
        pytest.skip("this ComfyUI has no HiDreamO1")
    scene, other = (replace(sweep.scene_of("HiDreamO1"), steps=3, cfg=1.0) for _ in range(2))
    plain, shared, apart = (ksampler(bench, each) for each in (
        scene, autoguided(bench, scene, with_lora_at(scene, 0.5)), autoguided(bench, scene, with_lora_at(other, 0.5))))
    torch.testing.assert_close(shared, apart, rtol=0, atol=1e-4)
    assert (shared - plain).abs().max() > 0.1


@pytest.mark.wide
@pytest.mark.parametrize("name", BY_CLASS)
def test_a_class_answers_as_the_document_says(check: Callable[[str], None], name: str):
    check(name)
