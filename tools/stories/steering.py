"""Steering in few nodes: colours, strengths, masks, a series, tiles."""
from ..pages import Out, Page
from .parts import add_comparison, add_report, add_sampling, add_world


def steer(page: Page) -> None:
    page.note("Read me", """## First steps
**Steer** is one node between your model and the sampler. Here it asks for the colours of a palette. Press **Run**: \
the same seeds without and with it.

Then choose something else in `towards`: brightness, symmetry, seamless tiling, the layout of an image, a class. Its \
inputs follow the choice. `strength` says how much; `factor` 0 turns it off.

Several Steer nodes in a row steer together. All of this needs no network, no download and no training, but for a class, \
a text and depth, which a network sees.""", (0, 0))
    world = add_world(page)
    page.group("2  Steer")
    model = Out(page.add("PPAPSteer", model=world[0], towards="colours of a palette",
                         **{"towards.palette": "#1d3557:5, #ffd166"}))
    page.group("3  The same seed without and with it")
    latent = add_comparison(page, ("Without", "With these colours"), model, world, 8)
    page.show_in_app({model.node: ["towards", "towards.palette", "strength", "factor"]}, [len(page.nodes)])
    add_report(page, 4, model, latent)


def series(page: Page) -> None:
    page.note("Read me", """## One palette across a series
Each image of a series has its own seed and subject; all shall share the colours of the first.

1. The first image is made without steering. Put **Load Image** in its place to take the colours of a photo, a painting \
or a brand.
2. **Steer** asks each image of the series for *colours of an image*: the same colours in the same shares, wherever they \
are.
3. Change the seed or the prompt: the palette stays.""", (0, 0))
    world = add_world(page, 6)
    page.group("2  The image that gives the colours")
    one = Out(page.add("EmptySD3LatentImage", "Empty latent: one", width=128, height=128, batch_size=1))
    _, colors = add_sampling(page, "The first image", world[0], (world[0], world[1], one, world[3]), 21)
    page.group("3  Its colours for all")
    model = Out(page.add("PPAPSteer", "Steer: these colours", model=world[0], towards="colours of an image",
                         strength="strong", **{"towards.image": colors}))
    page.group("4  The series without and with them")
    latent = add_comparison(page, ("Without", "The series"), model, world, 5)
    add_report(page, 5, model, latent)


def seamless(page: Page) -> None:
    page.note("Read me", """## A seamless texture with a ControlNet beside it
The **ControlNet** places: it asks for the depth of a reference. **Steer** asks for what no ControlNet can: that the image \
continues across its border when laid beside itself, and for the colours of a palette.

Each works on its own side: the ControlNet changes the conditioning, Steer the model. The order does not matter.

Steer leaves a trace of the seam beside a ControlNet, and so does the VAE. **Meet Exactly** takes it away from the finished \
images.

The last pictures show an image four times, two by two: look for the seams.""", (0, 0))
    model, nothing, latent, vae = add_world(page)
    network = Out(page.add("ControlNetLoader", control_net_name="tinyworld_depth.safetensors"))
    page.group("2  A reference, and its depth")
    one = Out(page.add("EmptySD3LatentImage", "Empty latent: the reference", width=128, height=128, batch_size=1))
    _, reference = add_sampling(page, "The reference", model, (model, nothing, one, vae), 4)
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
    _, plain = add_sampling(page, "ControlNet alone", model, controlled, 11)
    page.column()
    sampled, images = add_sampling(page, "Both", steered, controlled, 11)
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
    add_report(page, 6, steered, sampled)


def masks(page: Page) -> None:
    page.note("Read me", """## Several guiders, each with a mask
Light falls from the left: one guider asks for a bright image where its mask is white, another one for a dark image where \
the other mask is. A third one, without a mask, asks for a star. **Guidance Term** joins each with the ones before it.

The masks are made by nodes here; paint yours with **Load Image** and its mask editor. Soft borders hide where two masks \
meet.

**Steer** has a mask too: two of them in a row do the same with less to set.""", (0, 0))
    world = add_world(page)
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
    latent = add_comparison(page, ("Without", "A star, lit from the left"), model, world, 8)
    add_report(page, 7, model, latent)


def strengths(page: Page) -> None:
    page.note("Read me", """## How strong?
One seed at every strength of **Steer**, to compare: off, soft, medium, strong, and a number of your own.

`factor` multiplies the strength: 0 is off, bit for bit. A balanced weight means nearly the same for every guider and \
every model: soft is 0.3, medium 0.7, strong 1 of what a new **Guidance Term** would take.

Change `towards` in all of them to compare something else. Too strong looks burnt out, flat or noisy: go one step \
back.

**Image Grid** lays the images out with labels. **Compare Terms** makes a grid of guiders and strengths: what comes after \
it runs once for each.""", (0, 0))
    world, images = add_world(page), {}
    page.group("2  The same seed at each strength")
    for title, strength, factor in (("Off", "soft", 0.0), ("Soft", "soft", 1.0), ("Medium", "medium", 1.0),
                                    ("Strong", "strong", 1.0), ("Too strong", "strong", 3.0)):
        page.column()
        model = Out(page.add("PPAPSteer", f"Steer: {title.lower()}", model=world[0], strength=strength, factor=factor,
                             towards="colours of a palette", **{"towards.palette": "#1d3557:5, #ffd166"}))
        latent, images[title] = add_sampling(page, title, model, world, 8)
        if title == "Medium":
            medium = model, latent
    page.group("3  All in one picture")
    first, *others = images.values()
    grid = page.add("PPAPImageGrid", "Image Grid: strengths", images=first, row_labels="\n".join(images),
                    **{f"images_{number}": each for number, each in enumerate(others, 2)})
    page.add("PreviewImage", "Every strength", images=Out(grid))
    _guiders_by_strengths(page, world)
    add_report(page, 5, *medium)


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
