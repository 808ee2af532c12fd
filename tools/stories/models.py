"""Models of few steps, of one frame, and with guidance baked in."""
from ..pages import Out, Page
from .parts import add_comparison, add_report, add_sampling, add_world


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
    model, *rest = add_world(page)
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
    latent = add_comparison(page, ("Without guidance", "Steered towards stars"), steered, world, 8, steps=4)
    add_report(page, 4, steered, latent)


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
    sampled = add_comparison(page, ("Without guidance", "A star, in these colours"), model, world, 8)
    add_report(page, 4, model, sampled)


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
    world = add_world(page)
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
        add_sampling(page, title, each, world, 8, shown)
        page.column()
