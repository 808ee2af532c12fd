"""What many stories have in common: the stock loaders, a sampling, and what steering did."""
from ..pages import Out, Page


def add_world(page: Page, count: int = 4, classes: str = "") -> tuple[Out, Out, Out, Out]:
    """The stock loaders: the model, its prompt, empty unless classes are given, empty latents and the VAE."""
    page.group("1  Stock loaders")
    model = page.add("UNETLoader", "The tiny flow model", unet_name="tinyworld_flow.safetensors")
    vae = page.add("VAELoader", vae_name="tinyworld_vae.safetensors")
    nothing = page.add("PPAPClassConditioning", f"Class Conditioning: {classes or 'anything'}", classes=classes)
    latent = page.add("EmptySD3LatentImage", width=128, height=128, batch_size=count)
    return Out(model), Out(nothing), Out(latent), Out(vae)


def add_sampling(page: Page, title: str, model: Out, world: tuple, seed: int, shown: str = "PreviewImage",
                 steps: int = 20, sampler: str = "euler", denoise: float = 1.0) -> tuple[Out, Out]:
    """Nodes that sample, decode and show; the latents and the images."""
    _, nothing, latent, vae = world
    sampled = page.add("KSampler", f"KSampler: {title.lower()}", model=model, positive=nothing, negative=nothing,
                       latent_image=latent, seed=seed, steps=steps, cfg=1.0, sampler_name=sampler, scheduler="simple",
                       denoise=denoise)
    images = page.add("VAEDecode", samples=Out(sampled), vae=vae)
    page.add(shown, title, images=Out(images), **({"filename_prefix": "ppap"} if shown == "SaveImage" else {}))
    return Out(sampled), Out(images)


def add_comparison(page: Page, titles: tuple[str, str], steered: Out, world: tuple, seed: int, **settings: float) -> Out:
    """The same seeds by a world's model and by a steered one, beside each other; the latents of the second."""
    add_sampling(page, titles[0], world[0], world, seed, **settings)
    page.column()
    return add_sampling(page, titles[1], steered, world, seed, "SaveImage", **settings)[0]


def add_report(page: Page, number: int, model: Out, latent: Out) -> None:
    """Nodes that say and draw what steering did, in a group of this number."""
    page.group(f"{number}  What steering did")
    report = Out(page.add("PPAPGuidanceReport", model=model, latent=latent))
    page.add("PPAPReadGuidance", report=report)
    page.column()
    plot = page.add("PPAPPlotGuidance", report=report)
    page.add("PreviewImage", "What steering did", images=Out(plot))


def add_pixels(page: Page, title: str, world: int, latent: Out, model: Out) -> Out:
    """Nodes that sample pixels and show them enlarged; the latents."""
    anything = Out(world, 1)
    sampled = Out(page.add("KSampler", f"KSampler: {title.lower()}", model=model, positive=anything, negative=anything,
                           latent_image=latent, seed=7, steps=20, cfg=1.0, sampler_name="heun", scheduler="karras"))
    images = Out(page.add("VAEDecode", samples=sampled, vae=Out(world, 3)))
    larger = Out(page.add("ImageScaleBy", "Larger", image=images, upscale_method="nearest-exact", scale_by=8.0))
    page.add("PreviewImage", title, images=larger)
    return sampled
