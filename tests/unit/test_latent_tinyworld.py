"""The latent tiny world: an autoencoder, two models of its latents, a ControlNet, and the benchmark on them."""
from functools import partial

import pytest
import torch
from helpers import randn, same, says
from torch.nn import functional as F

from benchmarks.evaluation import overlap
from benchmarks.latent import LatentBench, latent_bench, table
from benchmarks.latent_world import LatentWorld, eps_sigmas, flow_sigmas
from ppap_core.experts.lesson import DistillConfig
from ppap_core.guiders.guider import clean
from ppap_core.tinyworld import latents as latent
from ppap_core.tinyworld.loaders import LABELS, condition
from ppap_core.tinyworld.networks.autoencoder import SHRINK
from ppap_core.tinyworld.networks.flow import TinyControl, from_diffusers, to_diffusers
from ppap_core.tinyworld.scenes import CLASSES, draw


@pytest.mark.slow
def test_the_autoencoder_restores_scenes():
    """Scenes come back, and their latents have the colours of their format."""
    scenes = draw(range(500, 516), latent.SIZE)
    with torch.no_grad():
        found = latent.load_autoencoder()
        latents = found.encode(scenes.image)
        assert (found.decode(latents) - scenes.image).abs().mean() < 0.03
        colours = latent.SPACE.colors(latent.scale_latent(latents))
    assert (colours - F.avg_pool2d(scenes.image, SHRINK)).square().mean().sqrt() < 0.1
    assert torch.allclose(latent.unscale_latent(latent.scale_latent(latents)), latents, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind, floor", [("flow", 0.4), ("eps", 0.25)])
def test_the_latent_models_know_the_class_that_they_are_told(kind, floor):
    """One in eight is chance."""
    world, labels = LatentWorld(), torch.arange(32) % len(CLASSES)
    model = {"flow": world.denoise, "eps": partial(latent.denoise_by_eps, latent.load_eps())}[kind]
    sigmas = {"flow": flow_sigmas, "eps": eps_sigmas}[kind](12)

    @torch.no_grad()
    def with_cfg(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        told, untold = (model(x, sigma, condition(given)) for given in (labels, torch.full_like(labels, -1)))
        return untold + 3 * (told - untold)
    images, judge = world.decode(world.sample(range(32), sigmas, with_cfg)), world.judges["class"]
    right = (judge.predict(images, clean(images)).argmax(1) == labels).float().mean()
    assert right > floor


@pytest.mark.parametrize("task, sides", [("flow", (6, 10)), ("eps", (8, 12))])
def test_the_latent_models_take_images_of_other_sizes(task, sides):
    net = {"flow": latent.load_flow, "eps": latent.load_eps}[task]()
    x, given = randn(2, 16, *sides), condition(torch.tensor([1, -1]))
    args = {"flow": (torch.tensor([0.3, 0.6]), given[:, None], given), "eps": (torch.tensor([10.0, 700.0]), given)}[task]
    with torch.no_grad():
        assert net(x, *args).shape == x.shape


def test_a_fresh_controlnet_does_nothing_a_trained_one_does():
    flow, given = latent.load_flow(), condition(torch.tensor([0, 5]))
    x, t, hint = randn(2, 16, 6, 10), torch.tensor([0.5, 0.9]), randn(2, 16, 6, 10, seed=4)
    with torch.no_grad():
        plain = flow(x, t, given[:, None], given)
        assert torch.equal(flow(x, t, given[:, None], given, TinyControl()(x, t, given[:, None], hint)), plain)
        control = latent.load_control()(x, t, given[:, None], hint)
        assert not torch.allclose(flow(x, t, given[:, None], given, control), plain, atol=1e-3)


def test_the_names_of_diffusers_lead_there_and_back():
    tensors = TinyControl().state_dict()
    renamed = to_diffusers(tensors)
    assert renamed.keys() >= {"pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.bias",
                              "controlnet_blocks.0.weight"}
    assert same(from_diffusers(renamed, tensors), tensors)


def test_labels_are_read_from_names():
    """A wrong name is refused with those there are."""
    assert latent.class_labels("star, ring").tolist() == [CLASSES.index("star"), CLASSES.index("ring")]
    assert latent.class_labels(" ").tolist() == [-1]
    assert latent.class_labels("heart,").tolist() == [CLASSES.index("heart"), -1]
    assert not condition(torch.tensor([-1])).any() and condition(torch.tensor([2])).argmax() == 2
    with says(ValueError, "'sun'", "star"):
        latent.class_labels("star, sun")


@pytest.mark.wide
def test_the_latent_benchmark_measures_every_way_once(tmp_path):
    config = LatentBench(images=4, steps=4, batch=4, store=64, edges=(0.1, 1.0, 10.0), rank=2, weights=(0.1, 0.3),
                         raw=(4.0,), scenes=64, repeats=1, training=DistillConfig(steps=2, batch=4))
    lines = []
    rows = latent_bench(config, tmp_path, lines.append)
    assert {row["task"] for row in rows} == set(LABELS) and len(rows) == 30
    again = []
    assert latent_bench(config, tmp_path, again.append) == rows and not again, "finished rows are not done again"
    shown = table(rows)
    assert "ControlNet of depth, and experts" in shown and shown.count("| no guidance |") == 3


def test_overlap_is_the_mean_over_object_and_wall():
    wanted = torch.zeros(2, 4, 4, dtype=torch.bool)
    wanted[:, :2] = True
    found = wanted.clone()
    found[1, 0] = False
    assert overlap(found, wanted).tolist() == pytest.approx([1.0, (0.5 + 8 / 12) / 2])
