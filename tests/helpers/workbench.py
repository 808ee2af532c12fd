"""ComfyUI's own kinds of models at small size, and the nodes between them: what tests of guidance sample with."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.model_families import lora, small

STEPS, WEIGHT = 3, 0.1
EPS, FLOW, VIDEO = "SD 1.5", "SD 3", "Wan 2.1"  # the families that stand for all others
THROUGH = {"gradient": "through the model"}


@dataclass(frozen=True)
class Scene:
    """The inputs of a sampler node. steps and denoise as KSampler takes them."""

    model: Any
    positive: list
    negative: list
    latent: dict
    cfg: float = 4.0
    denoise: float = 1.0
    steps: int = STEPS
    sampler: str = "euler"
    scheduler: str = "simple"
    seed: int = 5

    def inputs(self) -> dict:
        """The inputs that all sampler nodes share."""
        return {**self.conditioned(), "cfg": self.cfg}

    def conditioned(self) -> dict:
        """The model, its conditioning and the latent."""
        return {"model": self.model, "positive": self.positive, "negative": self.negative, "latent_image": self.latent}


class Workbench:
    """Small models, a rule aimed at brightness, and the nodes between them."""

    def __init__(self, comfy: Callable[..., tuple]):
        self.comfy = comfy
        self.scenes: dict[str, Scene] = {}
        self.images: dict[str, tuple[Tensor, Tensor]] = {}
        [rule] = comfy("PPAPRule", rule="brightness")
        [self.guider] = comfy("PPAPAimAtNumber", guider=rule, number=0.9)

    def scene(self, family: str) -> Scene:
        """A model of a family, made once."""
        if family not in self.scenes:
            with torch.inference_mode():  # as loaders do
                self.scenes[family] = Scene(*small(family))
        return self.scenes[family]

    def terms(self, weight: float = WEIGHT, guider: Any = None, **changes: Any) -> tuple:
        """One term, with everything at its neutral value but the weight."""
        settings = {"weight": weight, "start_percent": 0.0, "end_percent": 1.0, "factor_at_start": 1.0, "factor_at_end": 1.0,
                    "view": "own", "strength": "balanced", **changes}
        return self.comfy("PPAPGuidanceTerm", guider=guider or self.guider, **settings)[0]

    def guide(self, scene: Scene, *args: Any, **changes: Any) -> Scene:
        """The scene with guidance on its model."""
        return self.patch(scene, "PPAPApplyGuidance", terms=self.terms(*args, **changes), max_rms=0.0)

    def patch(self, scene: Scene, node: str, **inputs: Any) -> Scene:
        """The scene with another node on its model; the test is skipped where this ComfyUI does not have it."""
        if node not in self.comfy.registered:
            pytest.skip(f"this ComfyUI has no {node}")
        return replace(scene, model=self.comfy(node, model=scene.model, **inputs)[0])

    def energy(self, scene: Scene, samples: Tensor, guider: Any = None) -> Tensor:
        """The energy (B,) of final latents, seen by their linear colours."""
        with self.comfy.pack.nodes.bridge.autograd.outside_inference_mode(), torch.no_grad():
            image = colours(scene.model.model, samples.clone())
            return (guider or self.guider).energy(image, torch.zeros(len(image)))

    def plain(self, family: str) -> tuple[Tensor, Tensor]:
        """KSampler's latents of a family without and with guidance, sampled once."""
        if family not in self.images:
            self.images[family] = steered(self, self.scene(family))
        return self.images[family]


def colours(model: Any, samples: Tensor) -> Tensor:
    """The linear preview of latents as images (B, 3, H, W); frames of videos become images."""
    latent, latent_format = model.process_latent_in(samples), model.latent_format
    if latent.ndim == 5:
        latent = latent.movedim(2, 1).flatten(0, 1)
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    factors, bias = torch.tensor(latent_format.latent_rgb_factors), latent_format.latent_rgb_factors_bias or [0.0, 0.0, 0.0]
    image = torch.einsum("bchw, cd -> bdhw", reshape(latent) if reshape else latent, factors)
    return image + torch.tensor(bias)[:, None, None]


def steered(bench: Workbench, scene: Scene, sample: Callable | None = None, **term: Any) -> tuple[Tensor, Tensor]:
    """Latents without and with guidance; asserts that weight 0 changes no bit and that guidance lowers the energy."""
    plain, guided, neutral = ((sample or ksampler)(bench, each) for each in (
        scene, bench.guide(scene, **term), bench.guide(scene, **{**term, "weight": 0.0})))
    assert plain.isfinite().all() and torch.equal(neutral, plain), "weight 0 changes the image"
    before, after = (bench.energy(scene, samples, term.get("guider")).mean().item() for samples in (plain, guided))
    assert guided.isfinite().all() and after < before, f"the energy went from {before} to {after}"
    return plain, guided


# Sampler nodes

def ksampler(bench: Workbench, scene: Scene) -> Tensor:
    return bench.comfy("KSampler", **scene.inputs(), seed=scene.seed, steps=scene.steps, denoise=scene.denoise,
                       sampler_name=scene.sampler, scheduler=scene.scheduler)[0]["samples"]


def two_halves(bench: Workbench, scene: Scene) -> Tensor:
    """One KSamplerAdvanced hands a noisy latent over to another."""
    def part(latent: dict, first: int, last: int) -> dict:
        inputs = {**scene.inputs(), "latent_image": latent, "noise_seed": scene.seed, "steps": scene.steps,
                  "sampler_name": scene.sampler, "scheduler": scene.scheduler, "start_at_step": first, "end_at_step": last,
                  "add_noise": "disable" if first else "enable",
                  "return_with_leftover_noise": "disable" if last > scene.steps else "enable"}
        return bench.comfy("KSamplerAdvanced", **inputs)[0]
    return part(part(scene.latent, 0, 2), 2, 10000)["samples"]


def custom_inputs(bench: Workbench, scene: Scene) -> dict:
    """The sampler, the sigmas and the latent of a scene, for the custom nodes."""
    [sampler] = bench.comfy("KSamplerSelect", sampler_name=scene.sampler)
    [sigmas] = bench.comfy("BasicScheduler", model=scene.model, scheduler=scene.scheduler, steps=scene.steps,
                           denoise=scene.denoise)
    return {"sampler": sampler, "sigmas": sigmas, "latent_image": scene.latent}


def sampler_custom(bench: Workbench, scene: Scene) -> Tensor:
    return bench.comfy("SamplerCustom", **{**scene.inputs(), **custom_inputs(bench, scene)}, add_noise=True,
                       noise_seed=scene.seed)[0]["samples"]


def with_guider(bench: Workbench, scene: Scene, node: str, **inputs: Any) -> Tensor:
    """SamplerCustomAdvanced with one of ComfyUI's guiders."""
    [guider] = bench.comfy(node, model=scene.model, **inputs)
    [noise] = bench.comfy("RandomNoise", noise_seed=scene.seed)
    return bench.comfy("SamplerCustomAdvanced", noise=noise, guider=guider, **custom_inputs(bench, scene))[0]["samples"]


def basic_guider(bench: Workbench, scene: Scene) -> Tensor:
    return with_guider(bench, scene, "BasicGuider", conditioning=scene.positive)


def cfg_guider(bench: Workbench, scene: Scene) -> Tensor:
    return with_guider(bench, scene, "CFGGuider", positive=scene.positive, negative=scene.negative, cfg=scene.cfg)


def dual_cfg_guider(bench: Workbench, scene: Scene) -> Tensor:
    return with_guider(bench, scene, "DualCFGGuider", cond1=scene.positive, cond2=scene.negative, negative=scene.negative,
                       cfg_conds=scene.cfg, cfg_cond2_negative=2.0, style="regular")


def perp_neg_guider(bench: Workbench, scene: Scene) -> Tensor:
    return with_guider(bench, scene, "PerpNegGuider", positive=scene.positive, negative=scene.negative,
                       empty_conditioning=scene.negative, cfg=scene.cfg, neg_scale=1.0)


SAMPLER_NODES = {"KSampler": ksampler, "KSampler (Advanced), two halves": two_halves, "SamplerCustom": sampler_custom,
                 "BasicGuider": basic_guider, "CFGGuider": cfg_guider, "DualCFGGuider": dual_cfg_guider,
                 "PerpNegGuider": perp_neg_guider}


# Autoguidance, training and priors

def with_lora_at(scene: Scene, strength: float) -> Any:
    """The MODEL with a LoRA."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(scene.model, None, lora(scene.model), strength, 0.0)[0]


def sibling(family: str) -> Any:
    """A MODEL of the same kind with other weights."""
    with torch.inference_mode():
        model = small(family).model
        generator = torch.Generator().manual_seed(1)
        for tensor in model.model.diffusion_model.state_dict().values():
            tensor.add_(0.2 * tensor.abs().mean() * torch.randn(tensor.shape, generator=generator))
    return model


def autoguided(bench: Workbench, scene: Scene, bad: Any, weight: float = 2.5, **changes: float) -> Scene:
    """The scene with autoguidance on its model."""
    schedule = {"start_percent": 0.0, "end_percent": 1.0, "factor_at_start": 1.0, "factor_at_end": 1.0} | changes
    return bench.patch(scene, "PPAPAutoguidance", bad_model=bad, weight=weight, **schedule)


def train_lora(bench: Workbench, scene: Scene, name: str, **changes: Any) -> tuple[Any, Tensor]:
    """Train LoRA on four random images; the MODEL and the picture of its losses."""
    shape = (4, *scene.latent["samples"].shape[1:])
    images = {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(3))}
    settings = {"steps": 32, "rank": 2, "batch_size": 2, "learning_rate": 1e-3, "seed": 0} | changes
    return bench.comfy("PPAPTrainLora", model=scene.model, positive=scene.positive, latent=images, name=name, **settings)


def search(world: Any, inputs: dict, terms: tuple = (), **changes: Any) -> Tensor:
    """The latents that Plug-and-Play Prior finds. world holds `comfy`; inputs: a model, its conditioning and the latent."""
    settings = {"seed": 3, "steps": 6, "cfg": 1.0, "learning_rate": 1.0, "sigma_max": 5.0, "sigma_min": 0.1,
                "start_noise": 1.0, "clean_up": 0.0, "particles": 1, "gradient": "in the prediction", **changes}
    latent, plot = world.comfy("PPAPPlugAndPlayPrior", **inputs, terms=terms, **settings)
    assert plot.ndim == 4 and plot.std() > 0.01
    return latent["samples"]
