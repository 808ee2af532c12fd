"""Pictures that are grey, small or torn."""
from ..pages import Out, Page
from .parts import add_report, add_sampling, add_world


def _restore(page: Page, world: tuple, guider: Out, titles: tuple[str, str]) -> None:
    """Nodes that make whole pictures of what is left of one, and report."""
    model, nothing, latent, vae = world
    terms = Out(page.add("PPAPGuidanceTerm", guider=guider))
    steered = Out(page.add("PPAPApplyGuidance", model=model, terms=terms, vae=vae))
    page.group("4  The same seeds without and with it")
    add_sampling(page, titles[0], model, world, 8, steps=30, sampler="euler_ancestral")
    page.column()
    sampled, images = add_sampling(page, titles[1], steered, world, 8, steps=30, sampler="euler_ancestral")
    page.column()
    exact = Out(page.add("PPAPFinish", image=images, guider=guider))
    page.add("SaveImage", f"{titles[1]}, exactly", images=exact, filename_prefix="ppap")
    add_report(page, 5, steered, sampled)


def _whole_picture(page: Page, world: tuple, seed: int) -> Out:
    """A picture of the world, to be damaged."""
    model, nothing, _, vae = world
    one = Out(page.add("EmptySD3LatentImage", "Empty latent: one", width=128, height=128, batch_size=1))
    return add_sampling(page, "The picture as it was", model, (model, nothing, one, vae), seed)[1]


def colourise(page: Page) -> None:
    page.note("Read me", """## Colours for a grey picture
The rule *grey copy* is shown a picture without colours. The model makes pictures that, made grey, equal it: each seed \
finds other colours for the same picture.

1. For your own, put **Load Image** in place of the grey picture, and an empty latent of its size.
2. **Apply Guidance** has the VAE, to compare shades exactly. *euler_ancestral* renews noise in each step, and mends what \
was decided wrongly early on.
3. **Meet Exactly** gives the result the very shades of the picture, without a tint.

A prompt says what there is to be seen, and colours follow it. **Steer** has this as *colours for a grey image*.""", (0, 0))
    world = add_world(page, classes="heart")
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
    world = add_world(page, classes="star")
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
    world = add_world(page, classes="ring")
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
