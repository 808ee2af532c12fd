"""The bundled tiny worlds in ComfyUI, with the nodes that tests ask most often."""
from collections.abc import Callable
from typing import Any

import torch

KINDS = ("flow", "eps")
HEIGHT, WIDTH = 12, 16  # of the latents: not the square that the models were trained on


class PixelWorld:
    """The tiny world with its stock sampler, and a classifier aimed at stars."""

    def __init__(self, comfy: Callable[..., tuple], batch: int = 3):
        self.comfy = comfy
        self.model, self.conditioning, self.latent, self.vae = comfy("PPAPTinyWorld", batch_size=batch)
        [self.plain] = comfy("PPAPLoadGuider", guider_name="tinyworld/class")
        [self.guider] = comfy("PPAPAimAtClass", guider=self.plain, classes="star")

    def conditioned(self, **changes: Any) -> dict:
        """The model, its conditioning and the latent."""
        return {"model": self.model, "positive": self.conditioning, "negative": self.conditioning,
                "latent_image": self.latent, **changes}

    def settings(self, **changes: Any) -> dict:
        """The inputs of a sampler node, but for the model."""
        return {"seed": 5, "steps": 5, "cfg": 1.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0,
                "positive": self.conditioning, "negative": self.conditioning, "latent_image": self.latent, **changes}

    def sample(self, model: Any = None, **changes: Any) -> torch.Tensor:
        """Latents from the stock KSampler."""
        return self.comfy("KSampler", model=model or self.model, **self.settings(**changes))[0]["samples"]

    def term(self, guider: Any = None, **changes: Any) -> tuple:
        """One term, with everything at its neutral value but the weight."""
        settings = {"weight": 4.0, "start_percent": 0.0, "end_percent": 1.0, "factor_at_start": 1.0, "factor_at_end": 1.0,
                    "view": "own", "strength": "raw", **changes}
        return self.comfy("PPAPGuidanceTerm", guider=guider or self.guider, **settings)[0]

    def guided(self, terms: tuple | None = None, max_rms: float = 0.0, **changes: Any) -> torch.Tensor:
        """Latents from the stock KSampler with a guided model."""
        [model] = self.comfy("PPAPApplyGuidance", model=self.model, terms=terms or self.term(), max_rms=max_rms)
        return self.sample(model, **changes)

    def samples(self, **changes: Any) -> Any:
        """A small store of generated samples, 32 at once."""
        many = {"samples": self.latent["samples"][:1].repeat(32, 1, 1, 1)}
        settings = {"name": "some", "count": 64, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "karras",
                    "seed": 0, "model": self.model, "positive": self.conditioning, "latent_image": many, **changes}
        return self.comfy("PPAPGenerateSamples", **settings)[0]

    def experts(self, **changes: Any) -> Any:
        """A guider with two experts that have hardly learned anything."""
        settings = {"view": "denoised", "experts": 2, "sigma_min": 0.0, "sigma_max": 0.0, "steps": 2, "batch_size": 4,
                    "learning_rate": 1e-3, "rank": 2, "alpha": 2.0, "seed": 0, "guider": self.guider, **changes}
        return self.comfy("PPAPDistilExperts", samples=self.samples(), **settings)[0]

    def starts(self, view: str) -> list[dict]:
        """Two experts of a view that learn at a rate of 0, as weights by name."""
        bank = self.experts(view=view, learning_rate=0.0).net
        return [bank.weights(index) for index in range(2)]

    def seen(self, seed: int = 77) -> torch.Tensor:
        """An IMAGE of the tiny world."""
        return self.comfy("VAEDecode", samples={"samples": self.sample(seed=seed)[:1]}, vae=self.vae)[0]

    def energy(self, guider: Any, images: torch.Tensor) -> torch.Tensor:
        """The energy (B,) of clean images."""
        with self.comfy.pack.nodes.bridge.autograd.outside_inference_mode(), torch.no_grad():
            return guider.energy(images.clone(), torch.zeros(len(images)))


class LatentWorld:
    """The models of latents, their conditioning, and guiders of every kind."""

    def __init__(self, comfy: Callable[..., tuple]):
        self.comfy = comfy
        self.models, self.vaes = zip(*(comfy("PPAPTinyLatentWorld", kind=kind) for kind in KINDS), strict=True)
        self.vae = self.vaes[0]
        self.nothing, self.star = (comfy("PPAPClassConditioning", classes=classes)[0] for classes in ("", "star"))
        [plain] = comfy("PPAPLoadGuider", guider_name="tinyworld/class")
        [self.guider] = comfy("PPAPAimAtClass", guider=plain, classes="star")

    def model(self, kind: str) -> Any:
        return self.models[KINDS.index(kind)]

    def sample(self, model: Any, **changes: Any) -> torch.Tensor:
        settings = {"seed": 3, "steps": 5, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
                    "positive": self.nothing, "negative": self.nothing,
                    "latent_image": {"samples": torch.zeros(3, 16, HEIGHT, WIDTH)}, **changes}
        return self.comfy("KSampler", model=model, **settings)[0]["samples"]

    def guided(self, kind: str, guider: Any = None, vae: Any = None, max_rms: float = 0.0, sampling: dict | None = None,
               **changes: Any) -> torch.Tensor:
        settings = {"guider": guider or self.guider, "weight": 0.3, "start_percent": 0.0, "end_percent": 1.0,
                    "factor_at_start": 1.0, "factor_at_end": 1.0, "view": "own", **changes}
        [terms] = self.comfy("PPAPGuidanceTerm", **settings)
        [model] = self.comfy("PPAPApplyGuidance", model=self.model(kind), terms=terms, max_rms=max_rms, vae=vae)
        return self.sample(model, **(sampling or {}))

    def seen(self, kind: str, samples: torch.Tensor) -> torch.Tensor:
        """Sampled latents in linear colours, as guiders see them without a VAE."""
        space = self.comfy.pack.nodes.bridge.latents.space_of(self.model(kind))
        return space.colors(self.model(kind).model.process_latent_in(samples).clone())

    def energy(self, kind: str, samples: torch.Tensor, guider: Any = None) -> torch.Tensor:
        with self.comfy.pack.nodes.bridge.autograd.outside_inference_mode(), torch.no_grad():
            images = self.seen(kind, samples)
            return (guider or self.guider).energy(images, torch.zeros(len(images)))

    def samples(self, kind: str, name: str, **changes: Any) -> Any:
        settings = {"name": name, "count": 64, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
                    "seed": 0, "model": self.model(kind), "positive": self.nothing, "vae": self.vae,
                    "latent_image": {"samples": torch.zeros(32, 16, HEIGHT, WIDTH)}, **changes}
        return self.comfy("PPAPGenerateSamples", **settings)[0]

    def experts(self, kind: str, view: str, samples: Any = None) -> Any:
        return self.comfy("PPAPDistilExperts", samples=samples or self.samples(kind, kind), guider=self.guider, view=view,
                          experts=2, sigma_min=0.0, sigma_max=0.0, steps=2, batch_size=4, learning_rate=1e-2, rank=2,
                          alpha=2.0, seed=0)[0]


class FilmWorld(LatentWorld):
    """The latent tiny world whose flow model has a time axis, and makes each frame of it by itself."""

    def __init__(self, comfy: Callable[..., tuple], frames: int = 1, size: tuple[int, int] = (HEIGHT, WIDTH)):
        super().__init__(comfy)
        import comfy.latent_formats as formats

        self.shape = (16, frames, *size)
        of_frames = type("SD3", (formats.SD3,), {"latent_dimensions": 3})
        flow = super().model("flow").clone()
        flow.add_object_patch("latent_format", of_frames())
        flow.set_model_unet_function_wrapper(frame_by_frame)
        self.models = (flow, *self.models[1:])

    def sample(self, model: Any, **changes: Any) -> torch.Tensor:
        return super().sample(model, **{"latent_image": {"samples": torch.zeros(3, *self.shape)}, **changes})

    def samples(self, kind: str, name: str, **changes: Any) -> Any:
        return super().samples(kind, name, **{"latent_image": {"samples": torch.zeros(32, *self.shape)}, **changes})


def frame_by_frame(apply_model: Callable, args: dict) -> torch.Tensor:
    """Run a model of images (B T, C, h, w) on the frames of videos (B, C, T, h, w)."""
    frames = args["input"].shape[2]
    per_frame = {name: value.repeat_interleave(frames, 0) if isinstance(value, torch.Tensor) else value
                 for name, value in args["c"].items()}
    images = apply_model(args["input"].movedim(2, 1).flatten(0, 1), args["timestep"].repeat_interleave(frames), **per_frame)
    return images.unflatten(0, (-1, frames)).movedim(1, 2)
