"""Draw the workflows that tell one story each, on the bundled models, and put the note on other models into all.

    python -m tools.workflows PATH_TO_COMFYUI [name ...]
"""
import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

from .help_pages import registered
from .pages import Out, Page

ROOT = Path(__file__).parents[1]
OWN_TITLE = "With your own model"
BELOW_NOTE = (0, 480)  # where it stands on the pages that are drawn here
OWN_MODEL = """## With your own model
Open ComfyUI's own template of it (*Browse Templates*) and put the node that steers on the MODEL wire, last before the \
sampler. Prompts, LoRA, size and sampler stay. Steps and cfg of these templates:

| model | steps, cfg | mind |
|---|---|---|
| SDXL | 25, 8 | |
| FLUX.2 Klein | 4, 1; base 20, 5 | before its CFGGuider |
| Krea 2 Turbo | 8, 1 | |
| Anima | 30, 4 | |
| Z-Image | 25, 4; turbo 8, 1 | after ModelSamplingAuraFlow |

A turbo model leaves few steps to steer in: begin with *strong*; *substeps* of **Guidance Term** are for that too. No VAE \
is needed for the colours of these models' latents; connect it for fine detail. Classes, depth and regions: choose a \
network that **Download Guider** fetched, or your own in models/ppap_guiders, in place of those of tinyworld/, which know \
the tiny world only."""


def _world(page: Page, count: int = 4, classes: str = "") -> tuple[Out, Out, Out, Out]:
    """The stock loaders: the model, its prompt, empty unless classes are given, empty latents and the VAE."""
    page.group("1  Stock loaders")
    model = page.add("UNETLoader", "The tiny flow model", unet_name="tinyworld_flow.safetensors")
    vae = page.add("VAELoader", vae_name="tinyworld_vae.safetensors")
    nothing = page.add("PPAPClassConditioning", f"Class Conditioning: {classes or 'anything'}", classes=classes)
    latent = page.add("EmptySD3LatentImage", width=128, height=128, batch_size=count)
    return Out(model), Out(nothing), Out(latent), Out(vae)


def _sample(page: Page, title: str, model: Out, world: tuple, seed: int, shown: str = "PreviewImage",
            steps: int = 20, sampler: str = "euler", denoise: float = 1.0) -> tuple[Out, Out]:
    """Nodes that sample, decode and show; the latents and the images."""
    _, nothing, latent, vae = world
    sampled = page.add("KSampler", f"KSampler: {title.lower()}", model=model, positive=nothing, negative=nothing,
                       latent_image=latent, seed=seed, steps=steps, cfg=1.0, sampler_name=sampler, scheduler="simple",
                       denoise=denoise)
    images = page.add("VAEDecode", samples=Out(sampled), vae=vae)
    page.add(shown, title, images=Out(images), **({"filename_prefix": "ppap"} if shown == "SaveImage" else {}))
    return Out(sampled), Out(images)


def _report(page: Page, number: int, model: Out, latent: Out) -> None:
    page.group(f"{number}  What steering did")
    report = Out(page.add("PPAPGuidanceReport", model=model, latent=latent))
    page.add("PPAPReadGuidance", report=report)
    page.column()
    plot = page.add("PPAPPlotGuidance", report=report)
    page.add("PreviewImage", "What steering did", images=Out(plot))


def steer(page: Page) -> None:
    page.note("Read me", """## First steps
**Steer** is one node between your model and the sampler. Here it asks for the colours of a palette. Press **Run**: \
the same seeds without and with it.

Then choose something else in `towards`: brightness, symmetry, seamless tiling, the layout of an image, a class. Its \
inputs follow the choice. `strength` says how much; `factor` 0 turns it off.

Several Steer nodes in a row steer together. All of this needs no network, no download and no training, but for a class, \
a text and depth, which a network sees.""", (0, 0))
    world = _world(page)
    page.group("2  Steer")
    model = Out(page.add("PPAPSteer", model=world[0], towards="colours of a palette",
                         **{"towards.palette": "#1d3557:5, #ffd166"}))
    page.group("3  The same seed without and with it")
    _sample(page, "Without", world[0], world, 8)
    page.column()
    latent, _ = _sample(page, "With these colours", model, world, 8, "SaveImage")
    page.show_in_app({model.node: ["towards", "towards.palette", "strength", "factor"]}, [len(page.nodes)])
    _report(page, 4, model, latent)


def series(page: Page) -> None:
    page.note("Read me", """## One palette across a series
Each image of a series has its own seed and subject; all shall share the colours of the first.

1. The first image is made without steering. Put **Load Image** in its place to take the colours of a photo, a painting \
or a brand.
2. **Steer** asks each image of the series for *colours of an image*: the same colours in the same shares, wherever they \
are.
3. Change the seed or the prompt: the palette stays.""", (0, 0))
    world = _world(page, 6)
    page.group("2  The image that gives the colours")
    one = Out(page.add("EmptySD3LatentImage", "Empty latent: one", width=128, height=128, batch_size=1))
    _, colors = _sample(page, "The first image", world[0], (world[0], world[1], one, world[3]), 21)
    page.group("3  Its colours for all")
    model = Out(page.add("PPAPSteer", "Steer: these colours", model=world[0], towards="colours of an image",
                         strength="strong", **{"towards.image": colors}))
    page.group("4  The series without and with them")
    _sample(page, "Without", world[0], world, 5)
    page.column()
    latent, _ = _sample(page, "The series", model, world, 5, "SaveImage")
    _report(page, 5, model, latent)


def seamless(page: Page) -> None:
    page.note("Read me", """## A seamless texture with a ControlNet beside it
The **ControlNet** places: it asks for the depth of a reference. **Steer** asks for what no ControlNet can: that the image \
continues across its border when laid beside itself, and for the colours of a palette.

Each works on its own side: the ControlNet changes the conditioning, Steer the model. The order does not matter.

Steer leaves a trace of the seam beside a ControlNet, and so does the VAE. **Meet Exactly** takes it away from the finished \
images.

The last pictures show an image four times, two by two: look for the seams.""", (0, 0))
    model, nothing, latent, vae = _world(page)
    network = Out(page.add("ControlNetLoader", control_net_name="tinyworld_depth.safetensors"))
    page.group("2  A reference, and its depth")
    one = Out(page.add("EmptySD3LatentImage", "Empty latent: the reference", width=128, height=128, batch_size=1))
    _, reference = _sample(page, "The reference", model, (model, nothing, one, vae), 4)
    page.column()
    guider = Out(page.add("PPAPLoadGuider", "Load Guider: a depth network", guider_name="tinyworld/depth"))
    depth = Out(page.add("PPAPLookThrough", "Its depth", guider=guider, image=reference))
    control = page.add("ControlNetApplyAdvanced", positive=nothing, negative=nothing, control_net=network, image=depth,
                       vae=vae)
    page.group("3  Seamless, in these colours")
    colors = Out(page.add("PPAPSteer", "Steer: colours of a palette", model=model, towards="colours of a palette",
                          strength="soft", **{"towards.palette": "#264653:3, #e9c46a"}))
    steered = Out(page.add("PPAPSteer", "Steer: seamless tiling", model=colors, strength="strong",
                           towards="seamless tiling"))
    page.group("4  The same seed with the ControlNet alone, and with both")
    controlled = (model, Out(control), latent, vae)
    _, plain = _sample(page, "ControlNet alone", model, controlled, 11)
    page.column()
    sampled, images = _sample(page, "Both", steered, controlled, 11)
    page.column()
    rule = Out(page.add("PPAPRule", "Rule: seamless tiling", rule="seamless tiling"))
    exact = Out(page.add("PPAPFinish", image=images, guider=rule))
    page.add("SaveImage", "Both, exactly", images=exact, filename_prefix="ppap")
    page.group("5  Each laid beside itself")
    for title, picture in (("ControlNet alone, two by two", plain), ("Both, two by two", images),
                           ("Exactly, two by two", exact)):
        page.column()
        beside = Out(page.add("ImageStitch", "Beside itself", image1=picture, image2=picture, direction="right"))
        tiled = Out(page.add("ImageStitch", "Below itself", image1=beside, image2=beside, direction="down"))
        page.add("PreviewImage", title, images=tiled)
    _report(page, 6, steered, sampled)


def masks(page: Page) -> None:
    page.note("Read me", """## Several guiders, each with a mask
Light falls from the left: one guider asks for a bright image where its mask is white, another one for a dark image where \
the other mask is. A third one, without a mask, asks for a star. **Guidance Term** joins each with the ones before it.

The masks are made by nodes here; paint yours with **Load Image** and its mask editor. Soft borders hide where two masks \
meet.

**Steer** has a mask too: two of them in a row do the same with less to set.""", (0, 0))
    world = _world(page)
    page.group("2  Two masks")
    everything = Out(page.add("SolidMask", "Everything", value=1.0, width=128, height=128))
    left = Out(page.add("FeatherMask", "Left, fading to the right", mask=everything, right=128))
    right = Out(page.add("InvertMask", "Right, fading to the left", mask=left))
    page.group("3  Bright here, dark there")
    rule = Out(page.add("PPAPRule", rule="brightness"))
    bright = Out(page.add("PPAPAimAtNumber", "Aim at Number: bright", guider=rule, number=0.9))
    dark = Out(page.add("PPAPAimAtNumber", "Aim at Number: dark", guider=rule, number=0.05))
    page.group("4  A star")
    guider = Out(page.add("PPAPLoadGuider", "Load Guider: a classifier", guider_name="tinyworld/class"))
    star = Out(page.add("PPAPAimAtClass", guider=guider, classes="star"))
    page.group("5  Three terms")
    first = Out(page.add("PPAPGuidanceTerm", "Guidance Term: bright on the left", guider=bright, mask=left))
    second = Out(page.add("PPAPGuidanceTerm", "Guidance Term: dark on the right", guider=dark, mask=right, terms=first))
    page.column()
    third = Out(page.add("PPAPGuidanceTerm", "Guidance Term: a star", guider=star, terms=second))
    model = Out(page.add("PPAPApplyGuidance", model=world[0], terms=third))
    page.group("6  The same seed without and with all three")
    _sample(page, "Without", world[0], world, 8)
    page.column()
    latent, _ = _sample(page, "A star, lit from the left", model, world, 8, "SaveImage")
    _report(page, 7, model, latent)


def strengths(page: Page) -> None:
    page.note("Read me", """## How strong?
One seed at every strength of **Steer**, to compare: off, soft, medium, strong, and a number of your own.

`factor` multiplies the strength: 0 is off, bit for bit. A balanced weight means nearly the same for every guider and \
every model: soft is 0.3, medium 0.7, strong 1 of what a new **Guidance Term** would take.

Change `towards` in all of them to compare something else. Too strong looks burnt out, flat or noisy: go one step \
back.

**Image Grid** lays the images out with labels. **Compare Terms** makes a grid of guiders and strengths: what comes after \
it runs once for each.""", (0, 0))
    world, images = _world(page), {}
    page.group("2  The same seed at each strength")
    for title, strength, factor in (("Off", "soft", 0.0), ("Soft", "soft", 1.0), ("Medium", "medium", 1.0),
                                    ("Strong", "strong", 1.0), ("Too strong", "strong", 3.0)):
        page.column()
        model = Out(page.add("PPAPSteer", f"Steer: {title.lower()}", model=world[0], strength=strength, factor=factor,
                             towards="colours of a palette", **{"towards.palette": "#1d3557:5, #ffd166"}))
        latent, images[title] = _sample(page, title, model, world, 8)
        if title == "Medium":
            medium = model, latent
    page.group("3  All in one picture")
    first, *others = images.values()
    grid = page.add("PPAPImageGrid", "Image Grid: strengths", images=first, row_labels="\n".join(images),
                    **{f"images_{number}": each for number, each in enumerate(others, 2)})
    page.add("PreviewImage", "Every strength", images=Out(grid))
    _guiders_by_strengths(page, world)
    _report(page, 5, *medium)


def _guiders_by_strengths(page: Page, world: tuple[Out, Out, Out, Out]) -> None:
    model, nothing, _, vae = world
    page.group("4  Two guiders at four strengths")
    palette = Out(page.add("PPAPPalette", colours="#1d3557:5, #ffd166"))
    rule = Out(page.add("PPAPRule", "Rule: colours", rule="colours"))
    colors = Out(page.add("PPAPAimAtImage", guider=rule, image=palette))
    page.column()
    mirrored = Out(page.add("PPAPRule", "Rule: symmetry", rule="symmetry left-right"))
    terms = [Out(page.add("PPAPGuidanceTerm", f"Guidance Term: {name}", guider=guider))
             for name, guider in (("colours", colors), ("symmetry", mirrored))]
    page.column()
    compared = page.add("PPAPCompareTerms", terms=terms[0], terms_2=terms[1], factors="0, 0.4, 1, 1.5")
    few = Out(page.add("EmptySD3LatentImage", "Empty latent: two", width=128, height=128, batch_size=2))
    sampled = Out(page.add("PPAPGuidedKSampler", model=model, terms=Out(compared), positive=nothing, negative=nothing,
                           latent_image=few, seed=8, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple"))
    page.column()
    images = Out(page.add("VAEDecode", samples=sampled, vae=vae))
    grid = Out(page.add("PPAPImageGrid", "Image Grid: guiders and strengths", images=images,
                        row_labels=Out(compared, 1), column_labels=Out(compared, 2)))
    page.add("PreviewImage", "Guiders and strengths", images=grid)


def turbo(page: Page) -> None:
    page.note("Read me", """## Few steps
A LoRA makes the tiny flow model a **turbo** model: images in 4 steps instead of 20, as with Lightning, Hyper or LCM LoRAs. \
A classifier steers it towards stars.

In so few steps each one is long, and a guider that looks once at its start misses. **substeps** in Guidance Term lets it \
look several times on the way, while the model predicts once. Take 16 divided by the steps: 4 for 4 steps, 2 for 8. If \
memory is short, set *gradient* to *in the prediction* and weight to 0.7.

For Krea 2 Turbo (8 steps), Z-Image Turbo (8), FLUX.2 Klein (4) or Anima with a turbo LoRA, open ComfyUI's template of the \
model, keep its steps, cfg and sampler, and put **Apply Guidance** last on the MODEL wire. Classes of real images need \
another guider: **Download Guider** fetches one.""", (0, 0))
    model, *rest = _world(page)
    model = Out(page.add("LoraLoaderModelOnly", "The turbo LoRA", model=model, lora_name="tinyworld_turbo.safetensors",
                         strength_model=1.0))
    world = (model, *rest)
    page.group("2  A star, seen four times in each step")
    guider = Out(page.add("PPAPLoadGuider", "Load Guider: a classifier", guider_name="tinyworld/class"))
    star = Out(page.add("PPAPAimAtClass", guider=guider, classes="star"))
    page.column()
    terms = Out(page.add("PPAPGuidanceTerm", guider=star, weight=0.4, gradient="through the model", substeps=4))
    steered = Out(page.add("PPAPApplyGuidance", model=model, terms=terms))
    page.group("3  The same seed without and with guidance")
    _sample(page, "Without guidance", model, world, 8, steps=4)
    page.column()
    latent, _ = _sample(page, "Steered towards stars", steered, world, 8, "SaveImage", steps=4)
    _report(page, 4, steered, latent)


def one_frame(page: Page) -> None:
    page.note("Read me", """## Latents of one frame
Krea 2, Anima, Qwen-Image and Cosmos-Predict2 make images as films of one frame: their latents have a time axis. All nodes \
take them as images. Here the tiny flow model is given such an axis; a classifier steers it towards stars, and a palette \
gives the colours.

With your own model of frames: its loader in place of **Tiny Latent World**, its own empty latent with *length* 1, and its \
VAE. **Generate Samples** and **Distill Experts** work as for any other model; of longer films they take single frames.""",
              (0, 0))
    page.group("1  A model whose latents have a time axis")
    loaded = page.add("PPAPTinyLatentWorld", kind="flow, one frame")
    nothing = Out(page.add("PPAPClassConditioning", "Class Conditioning: anything", classes=""))
    latent = Out(page.add("EmptyHunyuanLatentVideo", "Empty latents of one frame", width=128, height=128, length=1,
                          batch_size=4))
    world = (Out(loaded), nothing, latent, Out(loaded, 1))
    page.group("2  A star, in these colours")
    guider = Out(page.add("PPAPLoadGuider", "Load Guider: a classifier", guider_name="tinyworld/class"))
    star = Out(page.add("PPAPAimAtClass", guider=guider, classes="star"))
    page.column()
    terms = Out(page.add("PPAPGuidanceTerm", guider=star, weight=0.3, gradient="through the model"))
    shaped = Out(page.add("PPAPApplyGuidance", model=world[0], terms=terms))
    model = Out(page.add("PPAPSteer", model=shaped, towards="colours of a palette", strength="soft",
                         **{"towards.palette": "#1d3557:5, #ffd166"}))
    page.group("3  The same seed without and with guidance")
    _sample(page, "Without guidance", world[0], world, 8)
    page.column()
    sampled, _ = _sample(page, "A star, in these colours", model, world, 8, "SaveImage")
    _report(page, 4, model, sampled)


def own_classifier(page: Page) -> None:
    page.note("Read me", """## Your own classifier
Any classifier steers: one that you fine-tuned, or one from the hub. Put its folder into *models/ppap_guiders*: \
`config.json`, `model.safetensors` and `preprocessor_config.json`, as `save_pretrained` of transformers writes them. Press \
**R**, and **Load Guider** lists it.

The one here comes with the pack. It was trained on its own labels, the colour of the thing, whatever is behind it, in a \
minute on a laptop: `examples/own_classifier.py` in the repository shows how.

**Preview Guider** draws what it sees. **Aim at Class** takes a name: red, yellow, green, turquoise, blue, pink.""", (0, 0))
    world = _world(page)
    page.group("2  A folder, and a class")
    guider = Out(page.add("PPAPLoadGuider", "Load Guider: a folder", guider_name="tinyworld-colours"))
    blue = Out(page.add("PPAPAimAtClass", guider=guider, classes="blue"))
    terms = Out(page.add("PPAPGuidanceTerm", guider=blue, weight=0.4, gradient="through the model"))
    model = Out(page.add("PPAPApplyGuidance", model=world[0], terms=terms))
    page.group("3  The same seed without and with it")
    _, plain = _sample(page, "Without", world[0], world, 8)
    page.column()
    latent, steered = _sample(page, "A blue thing", model, world, 8, "SaveImage")
    page.group("4  What the classifier sees in them")
    for title, images in (("Without", plain), ("With", steered)):
        seen = Out(page.add("PPAPLookThrough", f"Preview Guider: {title.lower()}", guider=guider, image=images))
        page.add("PreviewImage", f"What it sees: {title.lower()}", images=seen)
        page.column()
    _report(page, 5, model, latent)


def readout(page: Page) -> None:
    page.note("Read me", """## Read the model's own mind
What an image will become can be read from the model's inner features while it is still noise. **Distill Readout** trains \
small heads on them, each for one range of noise, that say what a classifier will say of the finished image. No labels, no \
data set.

1. The model generates samples.
2. The heads learn from them.
3. A star, three times from the same seeds: without guidance, by the plain classifier, by the readout.

The first run takes a few minutes on a CPU; **Cancel** loses nothing, and a second run is quick. The heads guide this \
model alone. **Save Experts** keeps them. A gradient goes back through half of the model, so that a step takes two to \
three times as long.""", (0, 0))
    page.group("1  A model, and samples of it")
    world = page.add("PPAPTinyWorld", batch_size=32)
    guider = Out(page.add("PPAPLoadGuider", "Load Guider: a classifier", guider_name="tinyworld/class"))
    generated = page.add("PPAPGenerateSamples", model=Out(world), positive=Out(world, 1), latent_image=Out(world, 2),
                         name="readout", count=256, steps=12, cfg=1.0, sampler_name="euler", scheduler="karras", seed=1000)
    page.group("2  Heads on its inner features")
    learned = page.add("PPAPDistillReadout", model=Out(world), samples=Out(generated), guider=guider,
                       positive=Out(world, 1), heads=5, steps=200, batch_size=16)
    page.add("PPAPSaveExperts", guider=Out(learned), file_name="readout")
    page.column()
    plot = Out(page.add("PPAPPlotLosses", losses=Out(learned, 1)))
    page.add("PreviewImage", "What each head learned", images=plot)
    page.group("3  A star: the same seeds each way")
    few = Out(page.add("PPAPTinyWorld", "Tiny World: eight to sample", batch_size=8), 2)
    star = _pixels(page, "Without guidance", world, few, Out(world))
    for title, each, weight in (("The plain classifier", guider, 0.6), ("The readout", Out(learned), 0.3)):
        page.column()
        aimed = Out(page.add("PPAPAimAtClass", f"Aim at Class: {title.lower()}", guider=each, classes="star"))
        terms = Out(page.add("PPAPGuidanceTerm", f"Guidance Term: {title.lower()}", guider=aimed, weight=weight))
        model = Out(page.add("PPAPApplyGuidance", f"Apply Guidance: {title.lower()}", model=Out(world), terms=terms))
        page.column()
        star = _pixels(page, title, world, few, model)
    _report(page, 4, model, star)
    page.column()
    page.add("PPAPPlotIntervals", "Which head works at which step", model=Out(world), terms=terms)


def _pixels(page: Page, title: str, world: int, latent: Out, model: Out) -> Out:
    """Nodes that sample pixels and show them enlarged; the latents."""
    anything = Out(world, 1)
    sampled = Out(page.add("KSampler", f"KSampler: {title.lower()}", model=model, positive=anything, negative=anything,
                           latent_image=latent, seed=7, steps=20, cfg=1.0, sampler_name="heun", scheduler="karras"))
    images = Out(page.add("VAEDecode", samples=sampled, vae=Out(world, 3)))
    larger = Out(page.add("ImageScaleBy", "Larger", image=images, upscale_method="nearest-exact", scale_by=8.0))
    page.add("PreviewImage", title, images=larger)
    return sampled


def baked(page: Page) -> None:
    page.note("Read me", """## Guidance as a LoRA
Guidance costs time in each image. Baked into a LoRA it costs none, and the LoRA works in any graph, without this pack.

1. **Steer** asks for the colours of a palette.
2. **Generate Samples** makes images with the steered model, and keeps what it predicted on the way.
3. **Bake Guidance** teaches the model *without* Steer to predict the same. It says how much it has learned, and writes \
`models/loras/palette.safetensors`.

All this takes minutes, once; cancel it and queue again, and it goes on. Then delete the nodes of 2 and 3, and use the LoRA \
with the stock loader, at any strength.

For your own model: 512 samples of your usual size and prompt, 600 steps, rank 16. Baking needs the memory of a LoRA \
training.""", (0, 0))
    world = _world(page)
    model, nothing, _, vae = world
    page.group("2  Steered, and samples of it")
    steered = Out(page.add("PPAPSteer", model=model, towards="colours of a palette", strength="strong",
                           **{"towards.palette": "#1d3557:5, #ffd166"}))
    batch = Out(page.add("EmptySD3LatentImage", "Empty latent: made at once", width=128, height=128, batch_size=32))
    samples = Out(page.add("PPAPGenerateSamples", model=steered, positive=nothing, latent_image=batch, vae=vae,
                           name="steered_palette", count=256, steps=20, scheduler="simple"))
    page.group("3  The model learns it")
    learned = page.add("PPAPBakeGuidance", model=model, samples=samples, positive=nothing, name="palette", steps=400)
    page.column()
    page.add("PreviewImage", "How it learned", images=Out(learned, 1))
    page.group("4  The same seed without, steered and baked")
    for title, each, shown in (("Without", model, "PreviewImage"), ("Steered", steered, "PreviewImage"),
                               ("Baked, without Steer", Out(learned), "SaveImage")):
        _sample(page, title, each, world, 8, shown)
        page.column()


def variety(page: Page) -> None:
    page.note("Read me", """## Seeds that do not look alike
Image to image, high cfg, LoRAs and turbo models cost variety, up to nearly the same picture for every seed. Here all \
images begin with one picture. **Variety** keeps the images of a batch unlike each other: each moves away from the others \
while its layout is still being decided.

In what they should differ is up to the guider that you connect to Variety: without one, in layout; the rule *colours* \
spreads palettes, a classifier subjects. Connect the pictures of earlier runs as *unlike*, and new ones keep away from them \
too.

**Steer** has the same as *unlike each other*.""", (0, 0))
    model, nothing, one, vae = _world(page, 1)
    page.group("2  The picture that all begin with")
    picture, _ = _sample(page, "The picture", model, (model, nothing, one, vae), 21)
    begin = Out(page.add("RepeatLatentBatch", samples=picture, amount=8))
    page.group("3  Unlike each other")
    apart = Out(page.add("PPAPVariety"))
    terms = Out(page.add("PPAPGuidanceTerm", guider=apart, weight=0.5))
    varied = Out(page.add("PPAPApplyGuidance", model=model, terms=terms))
    page.group("4  The same seeds without and with it")
    world = (model, nothing, begin, vae)
    _sample(page, "Much the same", model, world, 5, denoise=0.65)
    page.column()
    sampled, _ = _sample(page, "Unlike each other", varied, world, 5, "SaveImage", denoise=0.65)
    _report(page, 5, varied, sampled)


def best(page: Page) -> None:
    page.note("Read me", """## The best of many
Choosing needs no gradient: any network that answers can say which image is better. Three ways, by the same term:

1. **Best Seeds** tries 48 seeds in 5 steps each and hands on the 4 best. A **KSampler** with *the same seed* makes just \
these in full.
2. **Rank Images** sorts finished images, and hands on the best with their latents.
3. **Guided KSampler** with *particles*: for each image 4 are sampled at once, and on the way better ones take the place of \
worse ones. With *terms_guide* on, as here, the term guides them too; off, it only chooses.

Try Best Seeds first: it costs a few full samplings. Where it finds nothing good, guide: choosing finds only what the \
model makes by itself now and then.""", (0, 0))
    model, nothing, latent, vae = _world(page)
    world = (model, nothing, latent, vae)
    page.group("2  What is good: yellow on dark blue")
    palette = Out(page.add("PPAPPalette", colours="#1d3557:5, #ffd166"))
    rule = Out(page.add("PPAPRule", "Rule: colours", rule="colours"))
    colors = Out(page.add("PPAPAimAtImage", guider=rule, image=palette))
    terms = Out(page.add("PPAPGuidanceTerm", guider=colors, weight=0.3))
    page.group("3  The four best of 48 seeds")
    many = Out(page.add("EmptySD3LatentImage", "Empty latent: tried at once", width=128, height=128, batch_size=16))
    found = page.add("PPAPBestSeeds", model=model, terms=terms, seed=21, candidates=48, count=4, steps=5, scheduler="simple",
                     positive=nothing, negative=nothing, latent_image=many, vae=vae)
    page.add("PreviewImage", "All that were tried", images=Out(found, 1))
    page.group("4  The first four seeds, and the best four")
    _sample(page, "The first four seeds", model, world, 21)
    page.column()
    _, images = _sample(page, "The best four seeds", model, (model, nothing, Out(found), vae), 21)
    page.group("5  Sorted")
    ranked = page.add("PPAPRankImages", image=images, terms=terms, count=1)
    page.add("SaveImage", "The best image", images=Out(ranked), filename_prefix="ppap")
    page.group("6  Four particles for each image")
    guided = page.add("PPAPGuidedKSampler", model=model, terms=terms, positive=nothing, negative=nothing,
                      latent_image=latent, seed=21, steps=20, cfg=1.0, sampler_name="euler", scheduler="simple", particles=4,
                      give_up=0.75)
    page.column()
    made = Out(page.add("VAEDecode", samples=Out(guided), vae=vae))
    page.add("PreviewImage", "Guided, with particles", images=made)
    page.group("7  What guidance and particles did")
    page.add("PPAPReadGuidance", report=Out(guided, 1))
    page.column()
    plot = page.add("PPAPPlotGuidance", report=Out(guided, 1))
    page.add("PreviewImage", "What guidance did", images=Out(plot))


def _restore(page: Page, world: tuple, guider: Out, titles: tuple[str, str]) -> None:
    """Nodes that make whole pictures of what is left of one, and report."""
    model, nothing, latent, vae = world
    terms = Out(page.add("PPAPGuidanceTerm", guider=guider))
    steered = Out(page.add("PPAPApplyGuidance", model=model, terms=terms, vae=vae))
    page.group("4  The same seeds without and with it")
    _sample(page, titles[0], model, world, 8, steps=30, sampler="euler_ancestral")
    page.column()
    sampled, images = _sample(page, titles[1], steered, world, 8, steps=30, sampler="euler_ancestral")
    page.column()
    exact = Out(page.add("PPAPFinish", image=images, guider=guider))
    page.add("SaveImage", f"{titles[1]}, exactly", images=exact, filename_prefix="ppap")
    _report(page, 5, steered, sampled)


def _whole_picture(page: Page, world: tuple, seed: int) -> Out:
    """A picture of the world, to be damaged."""
    model, nothing, _, vae = world
    one = Out(page.add("EmptySD3LatentImage", "Empty latent: one", width=128, height=128, batch_size=1))
    return _sample(page, "The picture as it was", model, (model, nothing, one, vae), seed)[1]


def colourise(page: Page) -> None:
    page.note("Read me", """## Colours for a grey picture
The rule *grey copy* is shown a picture without colours. The model makes pictures that, made grey, equal it: each seed \
finds other colours for the same picture.

1. For your own, put **Load Image** in place of the grey picture, and an empty latent of its size.
2. **Apply Guidance** has the VAE, to compare shades exactly. *euler_ancestral* renews noise in each step, and mends what \
was decided wrongly early on.
3. **Meet Exactly** gives the result the very shades of the picture, without a tint.

A prompt says what there is to be seen, and colours follow it. **Steer** has this as *colours for a grey image*.""", (0, 0))
    world = _world(page, classes="heart")
    page.group("2  A grey picture")
    rule = Out(page.add("PPAPRule", rule="grey copy"))
    picture = _whole_picture(page, world, 21)
    page.column()
    grey = Out(page.add("PPAPLookThrough", "Preview Guider: made grey", guider=rule, image=picture))
    page.add("PreviewImage", "The grey picture", images=grey)
    page.group("3  A whole one is asked for")
    guider = Out(page.add("PPAPAimAtImage", guider=rule, image=grey))
    _restore(page, world, guider, ("Without", "In colour"))


def enlarge(page: Page) -> None:
    page.note("Read me", """## Detail for a small picture
The rule *small copy* is shown a picture of 24 pixels. The model makes pictures of 128 that, made small, equal it: each \
seed finds other detail.

1. For your own, put **Load Image** in place of the small picture. Any size will do; the empty latent says how large the \
result is, and should have the same shape.
2. **Meet Exactly** makes the last difference vanish: made small, the result is the picture, to the last bit.

Up to four times is detail, much more is invention. An upscaling model is quicker and knows photographs; this asks your own \
model, with its prompt, its LoRA and its style. **Steer** has this as *detail for a small image*.""", (0, 0))
    world = _world(page, classes="star")
    page.group("2  A small picture")
    picture = _whole_picture(page, world, 34)
    page.column()
    small = Out(page.add("ImageScale", "Made small", image=picture, upscale_method="area", width=24, height=24,
                         crop="disabled"))
    page.add("PreviewImage", "The small picture", images=small)
    page.group("3  A large one is asked for")
    rule = Out(page.add("PPAPRule", rule="small copy"))
    guider = Out(page.add("PPAPAimAtImage", guider=rule, image=small))
    _restore(page, world, guider, ("Without", "Enlarged"))


def restore(page: Page) -> None:
    page.note("Read me", """## A torn picture made whole
The rule *known part* is shown a torn picture, and **Aim at Image** a mask that is white where it is torn. The model makes \
pictures that equal it elsewhere: each seed mends the hole in another way.

1. For your own: **Load Image**, paint over the damage in its mask editor, and connect both its outputs.
2. **Meet Exactly** puts the known pixels back, and hides the edge of the hole.

The same mask serves the other rules: a grey photograph with a scratch is a *grey copy* with something *missing*. Models \
made for inpainting know more of holes; this needs none.""", (0, 0))
    world = _world(page, classes="ring")
    page.group("2  A torn picture")
    picture = _whole_picture(page, world, 13)
    page.column()
    whole = Out(page.add("SolidMask", "Nothing", value=0.0, width=128, height=128))
    hole = Out(page.add("SolidMask", "The hole", value=1.0, width=44, height=56))
    mask = Out(page.add("MaskComposite", "What is torn", destination=whole, source=hole, x=48, y=28, operation="add"))
    black = Out(page.add("EmptyImage", "Black", width=128, height=128, batch_size=1, color=0))
    page.column()
    torn = Out(page.add("ImageCompositeMasked", "Torn", destination=picture, source=black, x=0, y=0, resize_source=False,
                        mask=mask))
    page.add("PreviewImage", "The torn picture", images=torn)
    page.group("3  A whole one is asked for")
    rule = Out(page.add("PPAPRule", rule="known part"))
    guider = Out(page.add("PPAPAimAtImage", guider=rule, image=torn, missing=mask))
    _restore(page, world, guider, ("Without", "Made whole"))


def trained_guider(page: Page) -> None:
    page.note("Read me", """## A guider of your own, from a few pictures
You like close-ups, and no network has that as a class. Show some: twelve that are, twelve that are not.

1. Here the model draws twelve pictures, and **Crop Image** goes close to them. Put **Load Image** in their place; *Batch \
Images* collects several.
2. **Train Guider** looks at them through a network's *embedding* and learns in seconds to tell them apart. It says how \
well, judged by pictures that were left out, and shows those it got wrong. If it cannot tell them apart, it cannot steer \
either: show more pictures, or such as differ in nothing else, or try another network. Here the embedding of the depth \
network tells, that of the classifier hardly.
3. Aim it as any classifier. **Load Guider** lists it as *close-ups* from then on.

For real pictures take an embedding that knows them: DINOv2, CLIP or any network of timm, from **Download Guider**.""",
              (0, 0))
    world = _world(page)
    model, nothing, _, vae = world
    page.group("2  Pictures of both kinds")
    many = Out(page.add("EmptySD3LatentImage", "Empty latents: twelve", width=128, height=128, batch_size=12))
    _, whole = _sample(page, "Whole", model, (model, nothing, many, vae), 30)
    page.column()
    close = Out(page.add("ImageCrop", "Close to them", image=whole, width=80, height=80, x=24, y=24))
    larger = Out(page.add("ImageScale", "As large as the others", image=close, upscale_method="bicubic", width=128,
                          height=128, crop="disabled"))
    page.add("PreviewImage", "Close-ups", images=larger)
    page.group("3  A guider that tells them apart")
    eyes = Out(page.add("PPAPLoadGuider", "Load Guider: an embedding", guider_name="tinyworld/depth", answer="embedding"))
    trained = page.add("PPAPTrainGuider", backbone=eyes, like=larger, unlike=whole, names="close-up, whole",
                       name="close-ups")
    page.add("PreviewImage", "What it got wrong", images=Out(trained, 2))
    page.group("4  Towards close-ups")
    aimed = Out(page.add("PPAPAimAtClass", guider=Out(trained), classes="close-up"))
    terms = Out(page.add("PPAPGuidanceTerm", guider=aimed, weight=0.2, gradient="through the model"))
    steered = Out(page.add("PPAPApplyGuidance", model=model, terms=terms))
    page.group("5  The same seed without and with it")
    _sample(page, "Without", model, world, 8)
    page.column()
    sampled, _ = _sample(page, "Steered towards close-ups", steered, world, 8, "SaveImage")
    _report(page, 6, steered, sampled)


STORIES: dict[str, Callable[[Page], None]] = {"steer": steer, "series": series, "seamless": seamless, "masks": masks,
                                              "strengths": strengths, "turbo": turbo, "one_frame": one_frame,
                                              "own_classifier": own_classifier, "readout": readout, "baked": baked,
                                              "variety": variety, "best": best, "trained_guider": trained_guider,
                                              "colourise": colourise, "enlarge": enlarge, "restore": restore}


def with_own_model(page: dict, at: tuple[int, int] = (-460, 0)) -> dict:
    """A page with the note on other models, the same on each. at: where, by default to the left of everything."""
    page["nodes"] = [node for node in page["nodes"] if node.get("title") != OWN_TITLE]
    number = max(node["id"] for node in page["nodes"]) + 1
    page["nodes"].append({"id": number, "type": "MarkdownNote", "pos": [*at], "size": [420, 560], "flags": {},
                          "order": len(page["nodes"]), "mode": 0, "inputs": [], "outputs": [], "title": OWN_TITLE,
                          "properties": {}, "widgets_values": [OWN_MODEL]})
    page["last_node_id"] = number
    return page


def object_info(comfyui: Path) -> dict[str, dict]:
    """What /object_info would tell, of ComfyUI's own nodes and this pack's."""
    ours = registered(comfyui)
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    return {name: kind.GET_NODE_INFO_V1() if hasattr(kind, "GET_NODE_INFO_V1") else _old_info(kind)
            for name, kind in {**nodes.NODE_CLASS_MAPPINGS, **ours}.items()}


def _old_info(kind: type) -> dict:
    output = kind.RETURN_TYPES  # type: ignore[attr-defined]
    return {"input": kind.INPUT_TYPES(), "output": output,  # type: ignore[attr-defined]
            "output_name": getattr(kind, "RETURN_NAMES", output)}


def write(file: Path, page: dict) -> None:
    text = json.dumps(page, indent=1) + "\n"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
        print(f"wrote {file.relative_to(ROOT)}")


def main() -> None:
    comfyui, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(STORIES)
    info, pages = object_info(comfyui), {file.stem: file for file in (ROOT / "workflows").glob("*.json")}
    drawn = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in pages.items()}
    for name in names:
        page = Page(info)
        STORIES[name](page)
        drawn[name] = page.to_workflow(name)
    for name, content in sorted(drawn.items()):
        at = {"at": BELOW_NOTE} if name in STORIES else {}
        write(ROOT / "workflows" / f"{name}.json", with_own_model(content, **at))


if __name__ == "__main__":
    main()
