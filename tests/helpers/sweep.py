"""What each class of ComfyUI's models is asked, and what it answered: "yes", or the sentence by which it was refused."""
import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers import every_class
from helpers.model_families import small_vae
from helpers.workbench import THROUGH, Scene, Workbench, autoguided, ksampler, with_lora_at

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "compatibility.md"
HEADING = "## Every class of models"
QUESTIONS = ("guided in the prediction", "through the model", "experts", "autoguidance")
BATCH = 8  # samples of a class, of which its experts learn


def answer(question: Callable[[], None]) -> str:
    """Ask: "yes", or the pack's own sentence of a refusal. Any other error is raised."""
    try:
        question()
    except ValueError as error:
        raised_in, sentence = Path(traceback.extract_tb(error.__traceback__)[-1].filename), str(error)
        if "\n" in sentence or not any(raised_in.is_relative_to(ROOT / part) for part in ("nodes", "ppap_core")):
            raise
        return sentence
    return "yes"


def scene_of(name: str, one_frame: bool = False) -> Scene:
    """A class's model with what it is sampled from; one_frame: a latent of images only."""
    with torch.inference_mode():  # as loaders do
        scene = Scene(*every_class.build(name), steps=2)
    samples = scene.latent["samples"]
    return replace(scene, latent={"samples": samples[:, :, :1]}) if one_frame and samples.ndim == 5 else scene


def vae_of(scene: Scene) -> Any:
    """A VAE for latents, None for pixels."""
    latent = scene.model.model.latent_format
    channels = latent.process_out(scene.latent["samples"]).shape[1]
    return None if channels == 3 else small_vae(channels)


def is_guided(bench: Workbench, scene: Scene, vae: Any = None, **term: Any) -> None:
    """Assert that guidance acts, and that its weight 0 changes no bit."""
    plain, neutral, guided = (ksampler(bench, each) for each in (
        scene, guided_by(bench, scene, vae, **{**term, "weight": 0.0}), guided_by(bench, scene, vae, **term)))
    assert plain.isfinite().all() and guided.isfinite().all(), "not finite"
    assert torch.equal(neutral, plain), "weight 0 changes the image"
    assert not torch.equal(guided, plain), "guidance has no effect"


def guided_by(bench: Workbench, scene: Scene, vae: Any, **term: Any) -> Scene:
    return bench.patch(scene, "PPAPApplyGuidance", terms=bench.terms(**{"weight": 0.3, **term}), max_rms=0.0, vae=vae)


def has_experts(bench: Workbench, scene: Scene, name: str) -> None:
    """Assert that samples are made, that experts learn one step from them, and that they guide."""
    shape, vae = (BATCH, *scene.latent["samples"].shape[1:]), vae_of(scene)
    samples, *_ = bench.comfy("PPAPGenerateSamples", name=f"sweep {name}", count=BATCH, steps=2, cfg=1.0, seed=0,
                              sampler_name="euler", scheduler="simple", model=scene.model, vae=vae, positive=scene.positive,
                              latent_image={"samples": torch.zeros(shape)})
    [plain] = bench.comfy("PPAPLoadGuider", guider_name="tinyworld/class")
    [aimed] = bench.comfy("PPAPAimAtClass", guider=plain, classes="star")
    experts, *_ = bench.comfy("PPAPDistilExperts", samples=samples, guider=aimed, view="denoised", experts=1, sigma_min=0.01,
                              sigma_max=50.0, steps=1, batch_size=2, learning_rate=1e-3, rank=2, alpha=2.0, seed=0)
    is_guided(bench, scene, guider=experts)


def is_autoguided(bench: Workbench, scene: Scene) -> None:
    """Assert that autoguidance by a LoRA acts, and that its weight 1 changes no bit."""
    bad = with_lora_at(scene, 0.5)
    plain, neutral, guided = (ksampler(bench, each) for each in (
        scene, autoguided(bench, scene, bad, 1.0), autoguided(bench, scene, bad)))
    assert torch.equal(neutral, plain) and guided.isfinite().all() and not torch.equal(guided, plain)


def ask(bench: Workbench, name: str) -> list[str]:
    """The answers of a class to `QUESTIONS`; those of a class without a recipe, which should be refused, are all one."""
    if name not in every_class.BY_CLASS:
        model = every_class.without_network(name)
        return [answer(lambda: bench.guide(Scene(model, [], [], {})))] * len(QUESTIONS)
    scene, image = scene_of(name), scene_of(name, one_frame=True)
    vae = None if scene.model.model.latent_format.latent_rgb_factors else vae_of(scene)
    return [answer(lambda: is_guided(bench, scene, vae)), answer(lambda: is_guided(bench, scene, vae, **THROUGH)),
            answer(lambda: has_experts(bench, image, name)), answer(lambda: is_autoguided(bench, scene))]


# The table in docs/compatibility.md

def row(name: str, answers: list[str]) -> str:
    """The row of a class: yes or no to each question, and why not."""
    cells = ["yes" if said == "yes" else "no" for said in answers]
    why = " ".join(dict.fromkeys(without_details(said) for said in answers if said != "yes"))
    return f"| {' | '.join([name, *cells, why])} |".replace("  |", " |")


def without_details(sentence: str) -> str:
    """A sentence without what torch says in brackets, which its versions say in their own words."""
    return re.sub(r" \(.*\)", "", sentence)


def section() -> str:
    """What the document says of all classes."""
    return DOCUMENT.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]


def documented() -> dict[str, str]:
    """The rows of the document, by class."""
    lines = section().splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("|")} if lines else {}


def untried() -> list[str]:
    """The classes of the ComfyUI at hand that the document lacks."""
    return [name for name in every_class.names() if name not in documented()]


def is_as_documented(said: str) -> bool:
    """Whether a row is that of the document; an older ComfyUI may also do what the newest cannot."""
    name, *cells = (cell.strip() for cell in said.strip("|").split("|"))
    wanted = [cell.strip() for cell in documented()[name].strip("|").split("|")][1:]
    return cells == wanted or all(cell in ("yes", known) for cell, known in zip(cells[:-1], wanted[:-1], strict=True))


def write(rows: dict[str, str]) -> None:
    """Put rows into the document, in the order of ComfyUI's classes, and keep those of other classes."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, tail = text.index("|", text.index(HEADING)), text.index("\n\n", text.index("|", text.index(HEADING)))
    known = documented() | rows
    title = [line for line in text[head:tail].splitlines()[:2]]
    body = [known[name] for name in sorted(known, key=str.lower) if name in every_class.names()]
    DOCUMENT.write_text(text[:head] + "\n".join([*title, *body]) + text[tail:], encoding="utf-8")
