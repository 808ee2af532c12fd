"""Fine-tuning of a MODEL by a LoRA, in the place of a sampler: ComfyUI loads the model and prepares its conditioning."""
from functools import partial
from typing import Any

import comfy.samplers
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...ppap_core.io.files import save_tensors
from ...ppap_core.io.hashing import digest
from ...ppap_core.training.finetune import FineTune, as_lora, fine_tune
from ...ppap_core.training.loop import RunOptions
from ...ppap_core.training.lora import LoraUpdate
from . import latents, noise_levels, paths
from .autograd import GradientPass, for_gradients, make_differentiable, networks_of, outside_inference_mode
from .autoguidance import DIFFUSION_MODEL_PREFIX
from .fingerprint import fingerprint_model
from .foreign import Memory
from .hooks import LORA, Hooks, attach
from .latents import Patcher
from .memory import GradientMemory, log
from .progress import LossProgress
from .sampler import new_cfg_guider, run_inside_sampler
from .shared_weights import uncompiled, without_layers

CHECKPOINT_FRACTIONS = (16, 4)  # early states are saved after a sixteenth and a quarter of the steps


class LoraTraining:
    """Training of a LoRA on images, which resumes where it was cancelled.

    images: LATENT of the model's own kind, as one batch. name: of the LoRA and, with numbers, of its early states.
    ValueError for a model that cannot be trained, and for a name that belongs to a LoRA of another origin.
    """

    def __init__(self, model: Patcher, positive: list, images: dict, name: str, config: FineTune):
        latents.require_supported(model)
        self.model, self.positive, self.name, self.config = model, positive, name, config
        self.images = model.model.process_latent_in(latents.as_diffused(model, images["samples"]))
        self.early_steps = {config.steps // fraction for fraction in CHECKPOINT_FRACTIONS} - {0}
        for file_name in (name, *map(self.early_name, self.early_steps)):
            paths.new_lora_file(file_name)
        self.losses: list[float] = []
        self.unsaved: dict[str, dict[str, Tensor]] = {}  # early states whose files could not be written, by name
        self.progress = LossProgress(config.steps)

    def run(self) -> tuple[Patcher, list[float]]:
        """Train and save the LoRA; returns the MODEL with it, and the loss of every step."""
        trained = for_gradients(self.model)
        memory = GradientMemory([], through_model=True, key=LORA)
        attach(trained, LORA, Hooks({WrappersMP.PREPARE_SAMPLING: memory.reserve}))
        cfg_guider = new_cfg_guider(trained, self.positive, self.positive, 1.0)
        shape = (self.config.batch, *self.images.shape[1:])
        adapters, losses = run_inside_sampler(cfg_guider, shape, self.config.seed, partial(self._train, cfg_guider))
        lora = as_lora(adapters, DIFFUSION_MODEL_PREFIX)
        for file_name, tensors in {self.name: lora, **self.unsaved}.items():
            save_lora(file_name, tensors)
        with without_layers(self.model):
            return comfy.sd.load_lora_for_models(self.model, None, lora, 1.0, 0.0)[0], losses

    def _train(self, cfg_guider: comfy.samplers.CFGGuider, denoise: Any, noise: Tensor,
               extra_args: dict) -> tuple[dict[str, LoraUpdate], list[float]]:
        make_differentiable(cfg_guider, extra_args)
        net = cfg_guider.inner_model.diffusion_model
        memory = Memory(net, extra_args["model_options"])
        denoise = partial(memory.apart, partial(denoise, **extra_args))
        predict = partial(predict_noised, cfg_guider.inner_model.model_sampling, denoise)
        with outside_inference_mode(), uncompiled():
            return fine_tune(net, predict, self.images.to(noise), self.config, latents.sigma_data_of(self.model),
                             self._run_options(GradientPass(*networks_of(cfg_guider))))

    def _run_options(self, gradient_pass: GradientPass) -> RunOptions:
        run_id = {**fingerprint_model(self.model, self.positive), "data": digest(self.images)}
        state_name = digest([run_id, self.name, self.config])
        return RunOptions(run_id, paths.output_folder("ppap_training", f"{state_name}.state.safetensors"),
                          save_every=50, on_step=self._on_step, run_step=gradient_pass.run)

    def _on_step(self, step: int, loss: float, adapters: dict[str, LoraUpdate]) -> None:
        self.losses.append(loss)
        if step + 1 in self.early_steps:
            self._save_early(self.early_name(step + 1), as_lora(adapters, DIFFUSION_MODEL_PREFIX))
        self.progress(step + 1, {"loss": self.losses})

    def _save_early(self, name: str, lora: dict[str, Tensor]) -> None:
        try:
            save_lora(name, lora)
        except OSError as error:
            log.warning("%s The training goes on, and tries again at its end.", error)
            self.unsaved[name] = lora

    def early_name(self, step: int) -> str:
        """Return the name of the LoRA as it was after so many steps."""
        return f"{self.name}_{step}"


def predict_noised(sampling: Any, denoise: Any, images: Tensor, noise: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Put noise on images at shares (B,) of the noise schedule, and predict them: (prediction, VE noise level (B,)).

    sampling: of the model. denoise: (x, sigma) -> prediction, in ComfyUI's own noise levels.
    """
    levels = [float(sampling.percent_to_sigma(float(percent))) for percent in share.clamp(1e-3, 1 - 1e-3)]
    sigma = torch.tensor(levels, device=images.device)
    noised = sampling.noise_scaling(sigma.reshape(-1, *(1,) * (images.ndim - 1)), noise, images)
    return denoise(noised, sigma), noise_levels.to_ve(sampling, images, sigma)[1]


def save_lora(name: str, lora: dict[str, Tensor]) -> None:
    """Write a LoRA where the stock loaders look for it. OSError in words if the file cannot be written."""
    save_tensors(paths.new_lora_file(name), lora, {"made_by": "ComfyUI-PPAP"})
