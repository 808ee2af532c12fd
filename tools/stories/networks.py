"""Networks of one's own: from a folder, from a few pictures, and heads that read a model's features."""
from ..pages import Out, Page
from .parts import add_comparison, add_pixels, add_report, add_sampling, add_world


def own_classifier(page: Page) -> None:
    page.note("Read me", """## Your own classifier
Any classifier steers: one that you fine-tuned, or one from the hub. Put its folder into *models/ppap_guiders*: \
`config.json`, `model.safetensors` and `preprocessor_config.json`, as `save_pretrained` of transformers writes them. Press \
**R**, and **Load Guider** lists it.

The one here comes with the pack. It was trained on its own labels, the colour of the thing, whatever is behind it, in a \
minute on a laptop: `examples/own_classifier.py` in the repository shows how.

**Preview Guider** draws what it sees. **Aim at Class** takes a name: red, yellow, green, turquoise, blue, pink.""", (0, 0))
    world = add_world(page)
    page.group("2  A folder, and a class")
    guider = Out(page.add("PPAPLoadGuider", "Load Guider: a folder", guider_name="tinyworld-colours"))
    blue = Out(page.add("PPAPAimAtClass", guider=guider, classes="blue"))
    terms = Out(page.add("PPAPGuidanceTerm", guider=blue, weight=0.4, gradient="through the model"))
    model = Out(page.add("PPAPApplyGuidance", model=world[0], terms=terms))
    page.group("3  The same seed without and with it")
    _, plain = add_sampling(page, "Without", world[0], world, 8)
    page.column()
    latent, steered = add_sampling(page, "A blue thing", model, world, 8, "SaveImage")
    page.group("4  What the classifier sees in them")
    for title, images in (("Without", plain), ("With", steered)):
        seen = Out(page.add("PPAPLookThrough", f"Preview Guider: {title.lower()}", guider=guider, image=images))
        page.add("PreviewImage", f"What it sees: {title.lower()}", images=seen)
        page.column()
    add_report(page, 5, model, latent)


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
    star = add_pixels(page, "Without guidance", world, few, Out(world))
    for title, each, weight in (("The plain classifier", guider, 0.6), ("The readout", Out(learned), 0.3)):
        page.column()
        aimed = Out(page.add("PPAPAimAtClass", f"Aim at Class: {title.lower()}", guider=each, classes="star"))
        terms = Out(page.add("PPAPGuidanceTerm", f"Guidance Term: {title.lower()}", guider=aimed, weight=weight))
        model = Out(page.add("PPAPApplyGuidance", f"Apply Guidance: {title.lower()}", model=Out(world), terms=terms))
        page.column()
        star = add_pixels(page, title, world, few, model)
    add_report(page, 4, model, star)
    page.column()
    page.add("PPAPPlotIntervals", "Which head works at which step", model=Out(world), terms=terms)


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
    world = add_world(page)
    model, nothing, _, vae = world
    page.group("2  Pictures of both kinds")
    many = Out(page.add("EmptySD3LatentImage", "Empty latents: twelve", width=128, height=128, batch_size=12))
    _, whole = add_sampling(page, "Whole", model, (model, nothing, many, vae), 30)
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
    sampled = add_comparison(page, ("Without", "Steered towards close-ups"), steered, world, 8)
    add_report(page, 6, steered, sampled)
