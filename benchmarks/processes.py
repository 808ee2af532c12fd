"""Images per second of a distillation on the tiny world by several processes: torchrun ... -m benchmarks.processes [steps]

Images are noise, since only the time is measured; saving and measuring of the experts is not in it. Beside the clock's time
stands that of the busiest process on its processor, which says on a busy machine as well what the processes cost.
"""
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network
from ppap_core.experts.distill import distill
from ppap_core.experts.lesson import DistillConfig
from ppap_core.experts.processes import Crew, launched_crew
from ppap_core.experts.samples import SampleStore
from ppap_core.experts.source import schedule_for
from ppap_core.experts.trajectories import Trajectories
from ppap_core.tinyworld.loaders import SIZE, load_guider

EXPERTS, BATCH, STEPS, IMAGES = 5, 32, 100, 256
LEVELS = (40.0, 10.0, 3.0, 1.0, 0.3, 0.1)


def noise(seeds: list[int]) -> tuple[torch.Tensor, Trajectories]:
    """Made-up images and trajectories."""
    images = torch.rand(len(seeds), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seeds[0])) * 2 - 1
    steps = images.half()[:, None].expand(-1, len(LEVELS), -1, -1, -1)
    return images, Trajectories(torch.tensor(LEVELS).expand(len(seeds), -1), steps, steps)


def images_per_second(crew: Crew, steps: int) -> tuple[float, float]:
    """Train five experts for some steps each, after a few that are not counted; by the clock, and by the processor."""
    guider, warm_up = load_guider("class"), DistillConfig(3, BATCH)
    with TemporaryDirectory() as folder:
        store = SampleStore(Path(folder), {"seed": 0})
        store.fill(IMAGES, noise)
        bank = ExpertBank(base_network(guider), schedule_for(store, EXPERTS), LoraSpec(8))
        distill(guider, bank, store, warm_up, crew=crew)
        started = time.monotonic(), time.process_time()
        distill(guider, bank, store, DistillConfig(steps, BATCH), crew=crew)
        seconds = torch.tensor([time.monotonic() - started[0], time.process_time() - started[1]])
    if crew.size > 1:
        torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
    clock, processor = (EXPERTS * steps * BATCH / seconds).tolist()
    return clock, processor


if __name__ == "__main__":
    with launched_crew("cpu") as crew:
        clock, processor = images_per_second(crew, int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
        if crew.rank == 0:
            print(f"{crew.size} processes: {clock:.1f} images per second, {processor:.1f} by the processors' time")
