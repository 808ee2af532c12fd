"""Plug-and-play guidance for diffusion models: any network that judges images steers any model that makes them.

A denoiser is any function (x, sigma) -> expected clean image, with x = image + sigma * noise, (B, C, H, W), and sigma (B,).
Images are (B, 3, H, W) in [-1, 1]. A guider turns images into energies (B,), lower is better; a term gives it a weight.

    import torch
    from ppap_core import Term, class_target, guided, karras_sigmas, sample_heun
    from ppap_core.tinyworld.loaders import load_denoiser, load_guider

    guider = load_guider("class")  # or ppap_core.load_guider("a folder with config.json and safetensors")
    guider = guider.aim(class_target(guider, "star"))
    denoise = guided(load_denoiser(), [Term(guider, weight=0.6, normalized=True)])
    sigmas = karras_sigmas(16, 0.02, 80.0)
    images = sample_heun(denoise, sigmas[0] * torch.randn(4, 3, 32, 32), sigmas)

Experts make a guider reliable at high noise: fill a `SampleStore` with images of the model, `distill` an `ExpertBank` from
them, and guide with `with_experts(guider, bank)`.
"""
from .experts.adapters import LoraSpec
from .experts.bake import Student, bake
from .experts.bank import ExpertBank, base_network, with_experts
from .experts.check import teacher_distance
from .experts.checkpoint import load_bank, save_bank
from .experts.distill import distill
from .experts.lesson import DistillConfig
from .experts.readout import ReadoutNetwork, new_readout, reading, with_readout
from .experts.readout_distill import FeatureSamples, distill_readout
from .experts.readout_file import load_readout, save_readout
from .experts.samples import SampleStore
from .experts.trajectories import Trajectories, TrajectoryRecorder
from .guidance.autoguidance import Autoguidance, autoguided
from .guidance.choice import Choice, standings
from .guidance.gradients import Prediction
from .guidance.moments import Moments
from .guidance.particles import Resampling, sample_particles
from .guidance.prior import PriorConfig, PriorObjective, optimize_images
from .guidance.shift import Guidance, GuidanceSettings, guidance_shift, guided
from .guidance.terms import Term
from .guidance.training_free import TrainingFree, sample_training_free
from .guiders.copies import COPIES, copy_guider, without_missing
from .guiders.exact import meet
from .guiders.guider import Guider, IgnoreSigma
from .guiders.latents import LatentSpace
from .guiders.loaders import load_guider
from .guiders.loaders.trained import save_trained
from .guiders.preprocess import Preprocess
from .guiders.rules import RULES, rule_guider
from .guiders.targets import (
    aim_at_text,
    class_target,
    image_target,
    map_target,
    mask_target,
    number_target,
    with_cutouts,
)
from .guiders.tasks import TASKS, Task
from .guiders.train import TrainedGuider, train_guider
from .guiders.variety import unlike
from .guiders.visualize import visualize
from .noise import NoiseInterval, flow_to_ve, to_vp
from .sampling import Denoiser, karras_sigmas, sample_euler, sample_heun, sample_renewing
from .schedules import ExpertSchedule, Ramp, Schedule
from .training.finetune import FineTune, as_lora
from .training.loop import RunOptions

__version__ = "0.2.0"

__all__ = [
    "COPIES", "RULES", "TASKS", "Autoguidance", "Choice", "Denoiser", "DistillConfig", "ExpertBank", "ExpertSchedule",
    "FeatureSamples", "FineTune", "Guidance", "GuidanceSettings", "Guider", "IgnoreSigma", "LatentSpace", "LoraSpec",
    "Moments", "NoiseInterval", "Prediction", "Preprocess", "PriorConfig", "PriorObjective", "Ramp", "ReadoutNetwork",
    "Resampling", "RunOptions", "SampleStore", "Schedule", "Student", "Task", "Term", "TrainedGuider", "TrainingFree",
    "Trajectories", "TrajectoryRecorder", "aim_at_text", "as_lora", "autoguided", "bake", "base_network", "class_target",
    "copy_guider", "distill", "distill_readout", "flow_to_ve", "guidance_shift", "guided", "image_target",
    "karras_sigmas", "load_bank", "load_guider", "load_readout", "map_target", "mask_target", "meet", "new_readout",
    "number_target", "optimize_images", "reading", "rule_guider", "sample_euler", "sample_heun", "sample_particles",
    "sample_renewing", "sample_training_free", "save_bank", "save_readout", "save_trained", "standings",
    "teacher_distance", "to_vp", "train_guider", "unlike", "visualize", "with_cutouts", "with_experts", "with_readout",
    "without_missing",
]
