"""Real weights in a real ComfyUI: a real classifier from its folder, and a real VAE that guiders look through."""
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import level
from helpers.every_class import without_network
from helpers.real import guider_of, imagenet_folder, networks, photograph, require_folder
from helpers.workbench import Workbench, ksampler
from helpers.worlds import PixelWorld
from torch.nn import functional as F

from ppap_core.guiders.latents import Stem
from ppap_core.guiders.targets import class_target, image_target
from ppap_core.rng import seeded

pytestmark = pytest.mark.real


def test_a_real_classifier_steers_from_its_folder(comfy, tmp_path: Path):
    import folder_paths

    world = PixelWorld(comfy, batch=2)
    shutil.copytree(imagenet_folder(tmp_path), tmp_path / "guiders" / "lite0")
    folder_paths.add_model_folder_path("ppap_guiders", str(tmp_path / "guiders"))
    try:
        [guider] = comfy("PPAPLoadGuider", guider_name="lite0")
        [guider] = comfy("PPAPAimAtClass", guider=guider, classes="goldfish")
        term = world.term(guider, weight=0.2, strength="balanced")
        plain, guided = world.sample(steps=10), world.guided(term, steps=10)
        with comfy.pack.nodes.bridge.autograd.outside_inference_mode(), torch.no_grad():
            before, after = (guider.energy(images.clone(), torch.zeros(2)) for images in (plain, guided))
        assert (after < before - 1).all()
    finally:
        folder_paths.get_folder_paths("ppap_guiders").remove(str(tmp_path / "guiders"))


@pytest.fixture(scope="module")
def taef2(comfy):
    """The tiny autoencoder of FLUX.2 with its real weights, through ComfyUI's own loader."""
    import folder_paths

    import nodes

    latents = str(require_folder() / "latents")
    if "taef2" not in getattr(nodes.VAELoader, "image_taes", ()):
        pytest.skip("this ComfyUI does not know taef2")
    folder_paths.add_model_folder_path("vae_approx", latents)
    yield comfy("VAELoader", vae_name="taef2")[0]
    folder_paths.get_folder_paths("vae_approx").remove(latents)


def test_a_real_vae_is_looked_through(bench: Workbench, taef2):
    """Its own decoder makes the same picture, and a gradient passes."""
    scene, photo = bench.scene("Flux 2"), F.interpolate(photograph("astronaut"), (64, 96), mode="area")
    encode, decode = networks().taef2()
    packed = F.pixel_unshuffle(encode(photo), 2)
    decoder = bench.comfy.pack.nodes.bridge.latents.Decoder(taef2, scene.model)
    point = scene.model.model.process_latent_in(packed).requires_grad_()
    seen = decoder(point, level(0.1, point))
    assert (seen - decode(encode(photo))).abs().mean() < 0.02  # ComfyUI computes it in half precision or not
    [gradient] = torch.autograd.grad(seen.square().sum(), point)
    assert gradient.isfinite().all() and (gradient != 0).any()


def likeness(seen: torch.Tensor, photos: torch.Tensor) -> torch.Tensor:
    """Correlation of pictures with photographs, each made as small."""
    photos = F.interpolate(photos, seen.shape[-2:], mode="area")
    seen, photos = (F.layer_norm(each, each.shape[1:]) for each in (seen, photos))
    return (seen * photos).flatten(1).mean(1)


@pytest.fixture(scope="module")
def diffused(comfy) -> tuple:
    """Real photographs, and the latents of them that FLUX.2 diffuses: 128 channels, four places to each."""
    photos = F.interpolate(networks().imagenette(2)[0], (128, 128), mode="area")
    return photos, without_network("Flux2"), F.pixel_unshuffle(networks().taef2()[0](photos), 2).clone()


def test_real_latents_show_their_linear_colours(comfy, diffused: tuple):
    """0.86 on average over 20 photographs by ComfyUI's factors."""
    photos, model, packed = diffused
    space = comfy.pack.nodes.bridge.latents.latent_space(model)
    seen = space.colors(model.model.process_latent_in(packed))
    assert space.shuffle == 2 and seen.shape[-2:] == (16, 16) and likeness(seen, photos).mean() > 0.8


def test_colours_are_read_off_a_real_vae(comfy, diffused: tuple, taef2):
    photos, model, packed = diffused
    with torch.inference_mode():
        space = comfy.pack.nodes.bridge.latents.space_seen_by(taef2, model)
    seen = space.colors(model.model.process_latent_in(packed))
    likenesses = likeness(seen, photos)
    assert seen.shape[-2:] == (8, 8) and likenesses.mean() > 0.88 and likenesses.min() > 0.5


def test_a_stem_learns_to_show_real_latents(comfy, diffused: tuple):
    """On photographs that it has not seen, after few steps, it is closer to them than the colours."""
    photos, model, packed = diffused
    target = F.interpolate(photos, (64, 64), mode="area")
    with comfy.pack.nodes.bridge.autograd.outside_inference_mode():
        space = comfy.pack.nodes.bridge.latents.latent_space(model)
        stem, latents = Stem(space, seeded(0)), model.model.process_latent_in(packed)
        optimizer, is_seen = torch.optim.Adam(stem.parameters(), 2e-3), torch.arange(len(photos)) % 4 > 0
        before = (stem(latents) - target)[~is_seen].detach().square().mean()
        for _ in range(40):
            loss = (stem(latents[is_seen]) - target[is_seen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = (stem(latents) - target)[~is_seen].detach().square().mean()
    assert after < 0.7 * before


@pytest.mark.parametrize("name", ["expression", "person", "squeezenet"])
def test_a_real_network_steers_through_a_real_vae(bench: Workbench, taef2, name: str):
    scene, guider = bench.scene("Flux 2"), guider_of(name)
    photo = F.interpolate(photograph("astronaut"), (96, 160), mode="area")
    guider = guider.aim(class_target(guider, guider.labels[1]) if guider.labels else image_target(guider, photo))
    term = bench.terms(guider=guider, weight=0.3)
    [model] = bench.comfy("PPAPApplyGuidance", model=scene.model, terms=term, max_rms=0.0, vae=taef2)
    plain, guided = (ksampler(bench, which) for which in (scene, replace(scene, model=model)))
    energy = [guider.energy(bench.comfy("VAEDecode", samples={"samples": latent}, vae=taef2)[0].movedim(-1, 1) * 2 - 1,
                            torch.zeros(len(latent))) for latent in (plain, guided)]
    assert (energy[1] < energy[0]).all()
