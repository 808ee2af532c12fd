"""The command `ppap distill`: experts of a sample store, by one process or by several that were launched together."""
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from .experts.adapters import LoraSpec
from .experts.bank import ExpertBank, base_network
from .experts.checkpoint import save_bank
from .experts.distill import distill
from .experts.examine import measure_knowledge
from .experts.knowledge import describe_knowledge, remember
from .experts.lesson import DistillConfig, uses_warm_start
from .experts.origin import remember_origin
from .experts.presets import AS_SET, PRESETS, with_preset
from .experts.processes import Crew, launched_crew
from .experts.samples import SampleStore
from .experts.source import load_source, schedule_for
from .experts.states import distillation_digest, state_folder
from .experts.upkeep import open_store
from .guiders.guider import Guider
from .guiders.latents import VIEWS

TINY_WORLD = "tinyworld/"
STATES = "ppap_distillation"  # folder beside that of all stores
REPORTED = 100  # steps between two lines

Report = Callable[[str], None]


def add_arguments(parser: ArgumentParser) -> None:
    """Add what the command takes; what is left out is as in the node's form."""
    parser.add_argument("store", type=Path, help="a folder of generated images, such as output/ppap_samples/<name>")
    parser.add_argument("guider", help="the folder of a network, such as models/ppap_guiders/<name>; or tinyworld/class, "
                        "tinyworld/depth, tinyworld/segmentation")
    parser.add_argument("out", type=Path, help="the file of the experts, such as models/ppap_experts/<name>.safetensors")
    parser.add_argument("--view", choices=VIEWS, default="denoised", help="what the experts look at")
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--sigma-min", type=float, default=0.0, help="0: the lowest noise level of the store")
    parser.add_argument("--sigma-max", type=float, default=0.0, help="0: the highest noise level of the store, up to 100")
    parser.add_argument("--steps", type=int, default=1000, help="training steps for each expert")
    parser.add_argument("--batch", type=int, default=32, help="images in a training step, whatever the number of processes")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--rank", type=int, default=8, help="size of the adapters")
    parser.add_argument("--alpha", type=float, default=8.0, help="the adapters are scaled by alpha / rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the teacher's logits; the paper: 0.25")
    parser.add_argument("--preset", choices=[*PRESETS], default=AS_SET, help="how long to train, in place of --steps")
    parser.add_argument("--output", default="own", help="of the network: own, structure, style or embedding")
    parser.add_argument("--states", type=Path, help=f"where a stopped distillation is kept: {STATES} beside the folder of "
                        "the store, where the node keeps it as well")
    parser.add_argument("--device", help="of the networks: an accelerator if there is one, else cpu")


def run(options: Namespace, report: Report) -> None:
    """Distill and save experts. ValueError, OSError or ImportError in words for what cannot be."""
    device = torch.device(options.device or _own_device())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with launched_crew(device) as crew:
        _run(options, device, crew, report)


def _own_device() -> torch.device | str:
    """An accelerator for each process of a machine; else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0))) if accelerator else "cpu"


def _run(options: Namespace, device: torch.device, crew: Crew, report: Report) -> None:
    store, guider = open_store(options.store), _load_guider(options.guider, options.output)
    base_network(guider).to(device)
    source = load_source(store)
    schedule = schedule_for(store, options.experts, options.sigma_min, options.sigma_max)
    bank = ExpertBank(base_network(guider), schedule, LoraSpec(options.rank, options.alpha), options.view, options.seed,
                      source.space).to(device)
    config = DistillConfig(options.steps, options.batch, options.lr, options.seed, options.temperature,
                           uses_warm_start(options.view))
    config = with_preset(config, options.preset)
    folder_of = partial(_folder_of, options, guider, bank, store, config)
    progress = _Progress(len(schedule), config, report)
    if crew.rank == 0:
        state_folder(guider, bank, folder_of)  # which may copy what another release began
    crew.wait()
    distill(guider, bank, store, config, state_folder(guider, bank, folder_of), progress.on_step, crew)
    if crew.rank > 0:
        return
    remember(bank, measure_knowledge(guider, bank, store))
    if source.origin:
        remember_origin(bank, source.origin)
    save_bank(options.out, bank, guider)
    report(f"{describe_knowledge(bank)}\nsaved {options.out}")


def _load_guider(name: str, output: str) -> Guider:
    if name.startswith(TINY_WORLD):
        from .tinyworld import loaders as tinyworld

        task, names = name.removeprefix(TINY_WORLD), [TINY_WORLD + task for task in tinyworld.LABELS]
        if name not in names:
            raise ValueError(f"there is no {name}: expected one of {', '.join(names)}, or a folder")
        return tinyworld.load_guider(task, output)
    from .guiders.loaders import load_guider

    return load_guider(Path(name), output)


def _folder_of(options: Namespace, guider: Guider, bank: ExpertBank, store: SampleStore, config: DistillConfig,
               fingerprint: str, lora: LoraSpec) -> Path:
    states = options.states or store.folder.resolve().parent.parent / STATES
    return states / distillation_digest(guider, bank, store, config, fingerprint, lora)


class _Progress:
    """Lines about a training, with the images that this process takes in a second."""

    def __init__(self, experts: int, config: DistillConfig, report: Report):
        self.experts, self.config, self.report = experts, config, report
        self.started, self.counted = time.monotonic(), 0

    def on_step(self, expert: int, step: int, loss: float) -> None:
        self.counted += 1
        if (step + 1) % REPORTED == 0 or step + 1 == self.config.steps:
            seconds = time.monotonic() - self.started
            self.report(f"expert {expert + 1} of {self.experts}, step {step + 1} of {self.config.steps}, loss {loss:.4f}, "
                        f"{self.counted * self.config.batch / seconds:.1f} images/s")
            self.started, self.counted = time.monotonic(), 0
