"""Videos: samples are some of their frames, experts and VAEs judge each frame as an image."""
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import randn
from helpers.model_families import small_vae, small_video_vae
from helpers.workbench import THROUGH, Workbench, ksampler, search
from helpers.worlds import FilmWorld, LatentWorld
from torch import Tensor

from benchmarks import evaluation
from benchmarks.networks import load_judge

FRAMES, SIZE = 5, (4, 8)


@pytest.fixture(scope="module")
def worlds(comfy: Callable[..., tuple]) -> tuple[LatentWorld, FilmWorld]:
    """Images, and films of as many frames."""
    return LatentWorld(comfy), FilmWorld(comfy, FRAMES, SIZE)


@pytest.fixture(scope="module")
def distilled(worlds: tuple[LatentWorld, FilmWorld]) -> Callable[[str], Any]:
    """(view) -> experts of films that have hardly learned anything."""
    _, film = worlds
    return lambda view: film.experts("flow", view, film.samples("flow", "film"))


@pytest.fixture(scope="module")
def frames(comfy: Callable[..., tuple]) -> Any:
    return comfy.pack.nodes.bridge.frames


# Samples

@pytest.mark.parametrize(("count", "kept"), [(1, 1), (2, 2), (3, 2), (4, 4), (5, 4), (21, 4)])
def test_files_of_samples_hold_whole_videos(frames: Any, count: int, kept: int):
    assert frames.frames_to_keep(count) == kept and 64 % kept == 0


def test_frames_are_chosen_by_the_seed(frames: Any):
    chosen, again = (frames.choose_frames(range(40), 21, 4) for _ in range(2))
    assert torch.equal(chosen, again) and torch.equal(chosen[7:9], frames.choose_frames([7, 8], 21, 4))
    assert all(row.unique().tolist() == row.tolist() for row in chosen), "in order, and each once"
    assert set(chosen.flatten().tolist()) == set(range(21))


def test_a_latent_frame_stands_for_a_group_of_images(frames: Any):
    """A VAE that halves time twice makes one image of the first frame and four of each later one."""
    at = torch.arange(5)
    assert frames.shown_at(at, 5, 17).tolist() == [0, 2, 6, 10, 14]
    assert frames.shown_at(at, 5, 5).tolist() == [0, 1, 2, 3, 4]
    assert frames.shown_at(at, 5, 20).tolist() == [0, 2, 6, 10, 14]
    assert frames.shown_at(torch.arange(2), 2, 9).tolist() == [0, 4]


def test_samples_of_a_video_are_some_of_its_frames(worlds: tuple[LatentWorld, FilmWorld], frames: Any):
    """The frames are those of whole videos that are sampled from the seeds of their first frames."""
    _, film = worlds
    store = film.samples("flow", "film").store
    assert store.images.shape == (64, 3, 32, 64) and store.denoised.shape[2:] == (16, *SIZE)
    chosen = frames.choose_frames([0, 4], FRAMES, 4)
    film_of = [film.sample(film.model("flow"), steps=3, seed=seed, latent_image={"samples": torch.zeros(1, *film.shape)})
               for seed in (0, 4)]
    wanted = frames.take_frames(torch.cat(film_of), chosen)
    last = film.model("flow").model.process_latent_out(store.denoised[:8, -1].float())
    torch.testing.assert_close(last, wanted, rtol=0, atol=0.02)  # in half precision
    [image] = film.comfy("VAEDecode", samples={"samples": wanted}, vae=film.vae)
    assert (image.movedim(-1, 1) - store.images[:8] / 255).abs().mean() < 0.01


def test_samples_of_videos_are_made_at_once_or_not(worlds: tuple[LatentWorld, FilmWorld]):
    _, film = worlds
    one, other = (film.samples("flow", name, latent_image={"samples": torch.zeros(size, *film.shape)}).store
                  for name, size in (("film", 32), ("film by threes", 3)))
    torch.testing.assert_close(one.denoised.float(), other.denoised.float(), rtol=0, atol=0.02)
    assert torch.equal(one.sigmas, other.sigmas)


def test_a_video_vae_shows_the_middle_of_a_group(bench: Workbench):
    """What the teacher sees are images of the decoded video."""
    vae, latents = small_video_vae(), bench.comfy.pack.nodes.bridge.latents
    samples, chosen = randn(2, 16, 4, 4, 6), torch.tensor([[0, 1], [2, 3]])
    [images] = bench.comfy("VAEDecode", samples={"samples": samples}, vae=vae)
    images = images.reshape(2, 13, *images.shape[1:])
    with torch.inference_mode():
        shown = latents.decode_frames(vae, samples, chosen)
    assert torch.equal(shown, torch.stack([images[0, 0], images[0, 2], images[1, 6], images[1, 10]]))


# Guidance

@pytest.mark.parametrize("term", [{}, {"view": "noisy"}, THROUGH], ids=["in the prediction", "noisy", "through the model"])
@pytest.mark.parametrize("how", ["experts", "colours", "VAE"])
def test_frames_are_guided_as_images(worlds: tuple[LatentWorld, FilmWorld], distilled: Callable, how: str, term: dict):
    """A film that is made frame by frame is guided as so many images are, bit for bit."""
    guider = distilled(term.get("view", "denoised")) if how == "experts" else None
    settings = {"guider": guider, "vae": worlds[0].vae if how == "VAE" else None, **term}
    noise = randn(1, 16, FRAMES, *SIZE)
    images, video = (guided_from(world, each, **settings) for world, each in zip(
        worlds, (noise.movedim(2, 1).flatten(0, 1), noise), strict=True))
    assert torch.equal(video.movedim(2, 1).flatten(0, 1), images)
    assert not torch.equal(video, guided_from(worlds[1], noise, **{**settings, "weight": 0.0}))


def guided_from(world: LatentWorld, noise: Tensor, **term: Any) -> Tensor:
    """Samples from given noise."""
    from comfy.sample import sample

    settings = {"guider": world.guider, "weight": 0.3, "start_percent": 0.0, "end_percent": 1.0, "factor_at_start": 1.0,
                "factor_at_end": 1.0, "view": "own", **term}
    vae = settings.pop("vae")
    [terms] = world.comfy("PPAPGuidanceTerm", **{**settings, "guider": settings["guider"] or world.guider})
    [model] = world.comfy("PPAPApplyGuidance", model=world.model("flow"), terms=terms, max_rms=0.0, vae=vae)
    with torch.inference_mode():
        return sample(model, noise, 3, 1.0, "euler", "simple", world.nothing, world.nothing, torch.zeros_like(noise), seed=0)


def test_experts_of_films_guide_films_and_images(worlds: tuple[LatentWorld, FilmWorld], distilled: Callable):
    experts = distilled("denoised")
    assert experts.net.space_name == "SD3"
    for world in worlds:
        plain, neutral, guided = world.sample(world.model("flow")), world.guided("flow", experts, weight=0.0), world.guided(
            "flow", experts)
        assert torch.equal(plain, neutral) and guided.isfinite().all() and not torch.equal(plain, guided)


@pytest.mark.parametrize("kind", ["of videos", "of images"])
def test_videos_are_guided_through_a_vae(bench: Workbench, kind: str, caplog: pytest.LogCaptureFixture):
    scene = replace(bench.scene("Wan 2.1"), latent={"samples": torch.zeros(1, 16, 3, 4, 6)}, steps=2)
    vae = small_video_vae() if kind == "of videos" else small_vae(16)
    plain = ksampler(bench, scene)

    def through_vae(weight: float) -> Tensor:
        return ksampler(bench, bench.patch(scene, "PPAPApplyGuidance", terms=bench.terms(weight), max_rms=0.0, vae=vae))
    guided = through_vae(0.5)
    assert not [record for record in caplog.records if "memory" in record.message], "the memory of the VAE is not known"
    assert torch.equal(through_vae(0.0), plain) and guided.isfinite().all()
    before, after = (brightness(bench, vae, samples) for samples in (plain, guided))
    assert (after - 0.9).abs().mean() < (before - 0.9).abs().mean()


def brightness(bench: Workbench, vae: Any, samples: Tensor) -> Tensor:
    if vae.latent_dim == 2:
        samples = samples.movedim(2, 1).flatten(0, 1)
    [image] = bench.comfy("VAEDecode", samples={"samples": samples}, vae=vae)
    return image.mean((1, 2, 3))


def test_a_frame_is_decoded_behind_the_one_before_it(bench: Workbench):
    """The first two frames are exactly those of the whole video; parts of a batch are decoded as in the whole."""
    vae, pack = small_video_vae(), bench.comfy.pack.nodes.bridge
    whole = pack.latents.Decoder(vae, bench.scene("Wan 2.1").model)
    decoder = whole.of_frames(3)
    with pack.autograd.outside_inference_mode():
        videos = randn(2, 16, 3, 4, 6)
        frames = pack.latents.frames_as_images(videos).requires_grad_(True)
        decoder.watch(frames, 3)
        shown = decoder(frames, torch.ones(6))
        [gradient] = torch.autograd.grad(shown[1].square().sum(), frames)
        with torch.no_grad():
            wanted = whole.decode(videos)
            parts = [decoder.sliced(part)(frames[part], torch.ones(6)[part]) for part in (slice(0, 2), slice(2, 6))]
    assert shown.shape == (6, 3, 32, 48)
    for video in range(2):
        for frame, image in ((0, 0), (1, 2)):
            torch.testing.assert_close(shown[3 * video + frame], wanted[video, :, image], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cat(parts), shown.detach(), rtol=0, atol=1e-4)
    assert gradient[1].any() and not gradient[[0, 2, 3, 4, 5]].any(), "a frame is judged by itself alone"


def test_a_prior_finds_videos_with_experts(bench: Workbench, worlds: tuple[LatentWorld, FilmWorld], distilled: Callable):
    _, film = worlds
    [terms] = film.comfy("PPAPGuidanceTerm", guider=distilled("denoised"), weight=0.3, start_percent=0.0, end_percent=1.0,
                         factor_at_start=1.0, factor_at_end=1.0, view="own")
    found = search(film, {"model": film.model("flow"), "positive": film.nothing, "negative": film.nothing,
                          "latent_image": {"samples": torch.zeros(1, *film.shape)}}, terms, steps=2)
    assert found.shape == (1, *film.shape) and found.isfinite().all()
    scene = replace(bench.scene("Wan 2.1"), latent={"samples": torch.zeros(1, 16, 3, 4, 6)})
    through_vae = search(bench, scene.conditioned(), bench.terms(), steps=2, vae=small_video_vae())
    assert through_vae.shape == (1, 16, 3, 4, 6) and through_vae.isfinite().all()


# Experts are worth it

WATCHED = 10  # videos, each frame of which follows the frame of a film of its own


@pytest.mark.wide
@pytest.mark.parametrize(("task", "view"), [("segmentation", "denoised"), ("depth", "noisy")])
def test_experts_of_films_are_ahead_of_the_plain_guider(comfy: Callable[..., tuple], task: str, view: str):
    """Judged frame by frame by a network that never guides, by more than two standard errors."""
    film = FilmWorld(comfy, FRAMES, (16, 16))
    [plain] = comfy("PPAPLoadGuider", guider_name=f"tinyworld/{task}")
    samples = film.samples("flow", "long film", count=128, steps=8, latent_image={"samples": torch.zeros(16, *film.shape)})
    experts, *_ = comfy("PPAPDistilExperts", samples=samples, guider=plain, view=view, experts=3, sigma_min=0.0,
                        sigma_max=0.0, steps=100, batch_size=16, learning_rate=2e-3, rank=8, alpha=8.0, seed=0)
    by_plain, by_experts = (scores_of(film, task, guider, view) for guider in (plain, experts))
    ahead = by_experts - by_plain if task == "segmentation" else by_plain - by_experts
    error = ahead.std() / len(ahead) ** 0.5
    print(f"{task}, {view} view: plain {by_plain.mean():.4f}, experts {by_experts.mean():.4f}, {ahead.mean() / error:.1f} "
          "standard errors")
    assert ahead.mean() > 2 * error


def scores_of(film: FilmWorld, task: str, guider: Any, view: str) -> Tensor:
    """The score of each frame of films whose frames are to look like scenes."""
    pack, numbers = film.comfy.pack, range(900, 900 + WATCHED * FRAMES)
    small, large = (pack.ppap_core.tinyworld.scenes.draw(numbers, (side, side)) for side in (32, 128))
    [aimed] = film.comfy("PPAPAimAtImage", guider=guider, image=(large.image.movedim(1, -1) + 1) / 2, image_is="a picture")
    sampling = {"latent_image": {"samples": torch.zeros(WATCHED, *film.shape)}, "steps": 12}
    samples = film.guided("flow", aimed, view=view, sampling=sampling)
    [image] = film.comfy("VAEDecode", samples={"samples": samples.movedim(2, 1).flatten(0, 1)}, vae=film.vae)
    return evaluation.score(load_judge(task), pack.nodes.bridge.tensors.image_from_comfy(image), small)
