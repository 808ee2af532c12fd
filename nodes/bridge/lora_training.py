"""Fine-tuning of a MODEL by a LoRA, as a sampler: ComfyUI loads the model and prepares its conditioning as for any other."""
from typing import Any

import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...ppap_core.io.files import save_tensors
from ...ppap_core.io.hashing import digest
from ...ppap_core.training.finetune import FineTune, as_lora, fine_tune
from ...ppap_core.training.loop import RunOptions
from ...ppap_core.training.lora import Adapters
from . import latents, noise_levels, paths
from .autograd import autograd, for_gradients, make_differentiable, with_gradients
from .autoguidance import DIFFUSION_MODEL_PREFIX
from .fingerprint import fingerprint_model
from .latents import Patcher
from .memory import reserve_gradient_memory
from .progress import progress_with_plot
from .sampler import cfg_guider, run_inside_sampler

KEY = "ppap_tune"
CHECKPOINT_FRACTIONS = (16, 4)  # what is kept on the way: after a sixteenth and a quarter of the steps


def train_lora(model: Patcher, positive: list, latent: dict, name: str, config: FineTune) -> tuple[Patcher, list[float]]:
    """The MODEL with a LoRA that was trained on images, and the losses. The LoRA, and early states of it, are saved."""
    latents.require_supported(model)
    early = {config.steps // share for share in CHECKPOINT_FRACTIONS} - {0}
    for each in (name, *(early_name(name, step) for step in early)):
        paths.new_lora_file(each)
    tuned, images = for_gradients(model), model.model.process_latent_in(latent["samples"])
    tuned.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, reserve_gradient_memory([], True, KEY))
    about = {**fingerprint_model(model, positive), "data": digest(images)}
    state = paths.output_folder("ppap_training", f"{digest([about, name, vars(config)])}.state.safetensors")
    report, values = progress_with_plot(config.steps), []

    def on_step(step: int, loss: float, changes: Adapters) -> None:
        values.append(loss)
        if step + 1 in early:
            save_lora(early_name(name, step + 1), changes)
        report(step + 1, {"loss": values})

    def train(predict_at: Any, noise: Tensor, extra_args: dict) -> tuple[Adapters, list[float]]:
        make_differentiable(guider)
        sampling, net = guider.inner_model.model_sampling, guider.inner_model.diffusion_model

        def predict(images: Tensor, noise: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
            levels = [float(sampling.percent_to_sigma(float(each))) for each in share.clamp(1e-3, 1 - 1e-3)]
            sigma = torch.tensor(levels, device=images.device)
            seen = sampling.noise_scaling(sigma.reshape(-1, *(1,) * (images.ndim - 1)), noise, images)
            return predict_at(seen, sigma, **extra_args), noise_levels.to_ve(sampling, images, sigma)[1]

        with autograd():
            return fine_tune(net, predict, images.to(noise), config, latents.sigma_data_of(model),
                             RunOptions(about, state, on_step=on_step, run_step=with_gradients(net)))

    guider = cfg_guider(tuned, positive, positive, 1.0)
    changes, losses = run_inside_sampler(guider, (config.batch, *images.shape[1:]), config.seed, train)
    save_lora(name, changes)
    return comfy.sd.load_lora_for_models(model, None, as_lora(changes, DIFFUSION_MODEL_PREFIX), 1.0, 0.0)[0], losses


def save_lora(name: str, changes: Adapters) -> None:
    """Write a LoRA where the stock loaders look for it."""
    save_tensors(paths.new_lora_file(name), as_lora(changes, DIFFUSION_MODEL_PREFIX), {"made_by": "ComfyUI-PPAP"})


def early_name(name: str, step: int) -> str:
    """The name of the LoRA as it was after so many steps."""
    return f"{name}_{step}"
