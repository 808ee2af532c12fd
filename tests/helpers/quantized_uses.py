"""All that is done with a MODEL, with quantised weights: the columns of the table in docs/compatibility.md."""
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from helpers.model_families import FAMILIES, lora, small_vae
from helpers.quantized import dequantized, quantized
from helpers.workbench import THROUGH, Scene, Workbench, autoguided, ksampler, search, steered, train_lora

TOLERANCES = {"fp8_scaled": 0.25, "plain fp8": 1e-3, "int8": 0.1, "nvfp4": 0.6, "mxfp8": 0.25, "GGUF-like": 1e-3}
"""Error of a picture by the inputs of layers that are rounded to the type of their weights too."""


class QuantizedWorld:
    """A family with quantised weights, and the same with their values in float32."""

    def __init__(self, bench: Workbench, family: str, kind: str):
        self.bench, self.family, self.kind = bench, family, kind
        self.scene, self.plain = self._scenes()

    def _scenes(self, factor: float = 1.0) -> tuple[Scene, Scene]:
        with torch.inference_mode():  # as loaders do
            scene = Scene(*quantized(self.family, self.kind, factor))
            return scene, Scene(*dequantized(self.family, scene.model))

    @cached_property
    def unguided(self) -> Tensor:
        return ksampler(self.bench, self.scene)

    def is_right(self, change: Callable[[Scene], Scene], times: float = 1.0, unguided: Tensor | None = None) -> None:
        """A change has an effect, and the same as on the model with the values of the weights in float32."""
        made, wanted = (ksampler(self.bench, change(scene)) for scene in (self.scene, self.plain))
        assert made.isfinite().all() and not torch.equal(made, self.unguided if unguided is None else unguided), "no effect"
        error = float((made - wanted).norm() / wanted.norm())
        assert error < times * TOLERANCES[self.kind], f"differs from the dequantised model by {error:.3g}"

    def in_the_prediction(self) -> None:
        steered(self.bench, self.scene)
        self.is_right(self.bench.guide)

    def through_the_model(self) -> None:
        before = self.unguided
        steered(self.bench, self.scene, **THROUGH)
        self.is_right(lambda scene: self.bench.guide(scene, **THROUGH))
        assert torch.equal(ksampler(self.bench, self.scene), before), "later samplings are others"

    def samples(self) -> Any:
        settings = {"steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "seed": 0, "count": 64}
        made, pictures = self._generate(settings, small_vae(FAMILIES[self.family].latent[1]))
        assert len(made.store) == 64 and pictures.isfinite().all()
        return made

    def _generate(self, settings: dict, vae: Any) -> tuple:
        latent = {"samples": torch.zeros(32, FAMILIES[self.family].latent[1], 4, 8)}
        name = f"quantized {list(FAMILIES).index(self.family)} {self.kind}"
        return self.bench.comfy("PPAPGenerateSamples", name=name, model=self.scene.model, vae=vae,
                                positive=self.scene.positive, latent_image=latent, **settings)

    def distil(self) -> None:
        samples = self.samples()
        [plain] = self.bench.comfy("PPAPLoadGuider", guider_name="tinyworld/class")
        [aimed] = self.bench.comfy("PPAPAimAtClass", guider=plain, classes="star")
        experts, *losses = self.bench.comfy(
            "PPAPDistilExperts", samples=samples, guider=aimed, view="denoised", experts=1, sigma_min=0.0, sigma_max=0.0,
            steps=2, batch_size=2, learning_rate=1e-3, rank=2, alpha=2.0, seed=0)
        assert losses
        self.is_right(lambda scene: self.bench.guide(of_one_frame(scene), guider=experts),
                      unguided=ksampler(self.bench, of_one_frame(self.scene)))

    def prior(self) -> None:
        inputs = self.scene.conditioned()
        for gradient in ("in the prediction", "through the model"):
            found = search(self.bench, inputs, self.bench.terms(), steps=2, gradient=gradient)
            assert found.isfinite().all()

    def autoguidance(self) -> None:
        """Autoguidance by a bad model with weights of its own, which are quantised too."""
        bad, plain_bad = self._scenes(0.5)
        self.is_right(lambda scene: autoguided(self.bench, scene, (bad if scene is self.scene else plain_bad).model), 4)

    def autoguidance_by_lora(self) -> None:
        self.is_right(lambda scene: autoguided(self.bench, scene, self._with_lora(scene, 0.5)), 4)

    def _with_lora(self, scene: Scene, strength: float) -> Any:
        import comfy.sd

        return comfy.sd.load_lora_for_models(scene.model, None, lora(self.plain.model), strength, 0.0)[0]

    def train_lora(self) -> None:
        trained = []
        for scene in (self.scene, self.plain):
            model, losses = train_lora(self.bench, scene, f"{self.kind} {scene is self.plain}", steps=2,
                                       batch_size=1)
            assert losses.isfinite().all()
            trained.append(set(model.patches))
        assert trained[0] == trained[1], "other layers were trained than in float32"


def of_one_frame(scene: Scene) -> Scene:
    """The scene with the first frame of its latent, since experts know single images; images stay as they are."""
    empty = scene.latent["samples"]
    return replace(scene, latent={"samples": empty[:, :, :1]}) if empty.ndim == 5 else scene


USES: dict[str, Callable[[QuantizedWorld], Any]] = {
    "guided in the prediction": QuantizedWorld.in_the_prediction, "through the model": QuantizedWorld.through_the_model,
    "samples": QuantizedWorld.samples, "distill": QuantizedWorld.distil, "prior": QuantizedWorld.prior,
    "autoguidance": QuantizedWorld.autoguidance, "autoguidance by LoRA": QuantizedWorld.autoguidance_by_lora,
    "Train LoRA": QuantizedWorld.train_lora}
