"""Fine-tuning of a MODEL by a LoRA, in the place of a sampler: ComfyUI loads the model and prepares its conditioning."""
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

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

Result = TypeVar("Result")
CHECKPOINT_FRACTIONS = (16, 4)  # early states are saved after a sixteenth and a quarter of the steps


class Trainee(NamedTuple):
    """A MODEL that is loaded to be trained."""

    net: torch.nn.Module
    sampling: Any
    denoise: Callable[[Tensor, Tensor], Tensor]  # (x, sigma) -> prediction, in ComfyUI's own noise levels
    gradient_pass: GradientPass
    device: torch.device


def train_inside_sampler(model: Patcher, positive: list, shape: tuple[int, ...], seed: int,
                         train: Callable[[Trainee], Result]) -> Result:
    """Return the result of `train`, with a MODEL loaded and made differentiable. shape: of what it is given at once."""
    trained = for_gradients(model)
    memory = GradientMemory([], through_model=True, key=LORA)
    attach(trained, LORA, Hooks({WrappersMP.PREPARE_SAMPLING: memory.reserve}))
    cfg_guider = new_cfg_guider(trained, positive, positive, 1.0)
    return run_inside_sampler(cfg_guider, shape, seed, partial(_train_loaded, cfg_guider, train))


def _train_loaded(cfg_guider: comfy.samplers.CFGGuider, train: Callable[[Trainee], Result], denoise: Any, noise: Tensor,
                  extra_args: dict) -> Result:
    make_differentiable(cfg_guider, extra_args)
    inner = cfg_guider.inner_model
    memory = Memory(inner.diffusion_model, extra_args["model_options"])
    denoise = partial(memory.apart, partial(denoise, **extra_args))
    with outside_inference_mode(), uncompiled():
        return train(Trainee(inner.diffusion_model, inner.model_sampling, denoise, GradientPass(*networks_of(cfg_guider)),
                             noise.device))


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
        shape = (self.config.batch, *self.images.shape[1:])
        adapters, losses = train_inside_sampler(self.model, self.positive, shape, self.config.seed, self._train)
        lora = as_lora(adapters, DIFFUSION_MODEL_PREFIX)
        for file_name, tensors in {self.name: lora, **self.unsaved}.items():
            save_lora(file_name, tensors)
        return with_lora(self.model, lora), losses

    def _train(self, trainee: Trainee) -> tuple[dict[str, LoraUpdate], list[float]]:
        predict = partial(predict_noised, trainee.sampling, trainee.denoise)
        return fine_tune(trainee.net, predict, self.images.to(trainee.device), self.config,
                         latents.sigma_data_of(self.model), self._run_options(trainee.gradient_pass))

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


def with_lora(model: Patcher, lora: dict[str, Tensor]) -> Patcher:
    """Clone a MODEL with a LoRA at full strength."""
    with without_layers(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def save_lora(name: str, lora: dict[str, Tensor]) -> None:
    """Write a LoRA where the stock loaders look for it. OSError in words if the file cannot be written."""
    save_tensors(paths.new_lora_file(name), lora, {"made_by": "ComfyUI-PPAP"})
