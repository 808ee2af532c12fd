"""Images unlike each other, and the best of many."""
from ..pages import Out, Page
from .parts import add_comparison, add_report, add_sampling, add_world


def variety(page: Page) -> None:
    page.note("Read me", """## Seeds that do not look alike
Image to image, high cfg, LoRAs and turbo models cost variety, up to nearly the same picture for every seed. Here all \
images begin with one picture. **Variety** keeps the images of a batch unlike each other: each moves away from the others \
while its layout is still being decided.

In what they should differ is up to the guider that you connect to Variety: without one, in layout; the rule *colours* \
spreads palettes, a classifier subjects. Connect the pictures of earlier runs as *unlike*, and new ones keep away from them \
too.

**Steer** has the same as *unlike each other*.""", (0, 0))
    model, nothing, one, vae = add_world(page, 1)
    page.group("2  The picture that all begin with")
    picture, _ = add_sampling(page, "The picture", model, (model, nothing, one, vae), 21)
    begin = Out(page.add("RepeatLatentBatch", samples=picture, amount=8))
    page.group("3  Unlike each other")
    apart = Out(page.add("PPAPVariety"))
    terms = Out(page.add("PPAPGuidanceTerm", guider=apart, weight=0.5))
    varied = Out(page.add("PPAPApplyGuidance", model=model, terms=terms))
    page.group("4  The same seeds without and with it")
    world = (model, nothing, begin, vae)
    sampled = add_comparison(page, ("Much the same", "Unlike each other"), varied, world, 5, denoise=0.65)
    add_report(page, 5, varied, sampled)


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
    model, nothing, latent, vae = add_world(page)
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
    add_sampling(page, "The first four seeds", model, world, 21)
    page.column()
    _, images = add_sampling(page, "The best four seeds", model, (model, nothing, Out(found), vae), 21)
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
