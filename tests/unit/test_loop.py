"""The training loop: what benchmarks add to it, and resuming with it."""
import pytest
import torch
from helpers import randn, says

from ppap_core.io.files import load_tensors
from ppap_core.training.loop import AdamW, RunOptions, optimize

TARGET = randn(3, 5)


class Run:
    """A point on its way to a target, and the moving average of where it was."""

    def __init__(self):
        self.point = torch.zeros(3, 5, requires_grad=True)
        self.average = torch.zeros(3, 5)

    def loss(self, step: int) -> torch.Tensor:
        return (self.point - TARGET + 0.1 * randn(3, 5, seed=step)).square().mean()

    def follow(self, step: int, loss: float, trained: dict[str, torch.Tensor]) -> None:
        self.average.lerp_(trained["point"].detach(), 0.3)

    def go(self, steps: int = 20, on_step=None, settings: float | AdamW = 0.1, **options) -> list[float]:
        return optimize({"point": self.point}, self.loss, steps, settings, "a point", RunOptions(
            {"name": "point"}, on_step=on_step or self.follow, extra_state={"average": self.average}, **options))


@pytest.mark.parametrize("stop", [0, 6, 7, 19])
def test_a_resumed_training_keeps_its_moving_average(stop, tmp_path):
    straight, stopped, resumed = Run(), Run(), Run()
    losses = straight.go()

    def cancel(step, loss, trained):
        stopped.follow(step, loss, trained)
        if step == stop:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        stopped.go(on_step=cancel, state_file=tmp_path / "state.safetensors", save_every=7)
    assert resumed.go(state_file=tmp_path / "state.safetensors") == losses
    assert torch.equal(resumed.point, straight.point) and torch.equal(resumed.average, straight.average)


def test_a_state_without_the_moving_average_is_refused(tmp_path):
    run, file = Run(), tmp_path / "state.safetensors"
    optimize({"point": run.point}, run.loss, 3, 0.1, "a point", RunOptions({"name": "point"}, file))
    assert not any(name.startswith("extra") for name in load_tensors(file)[0])
    with says(ValueError, "state.safetensors", "0 of 1 extra", "delete"):
        Run().go(state_file=file)


def test_another_schedule_and_weight_decay_are_obeyed():
    still, decaying = Run(), Run()
    still.go(5, settings=AdamW(lambda step: 0.0, weight_decay=0.5))
    assert torch.equal(still.point, torch.zeros(3, 5))
    with torch.no_grad():
        decaying.point.fill_(1000.0)
    decaying.go(1, settings=AdamW(lambda step: 0.1, weight_decay=0.5))
    assert torch.allclose(decaying.point, torch.full((3, 5), 1000.0 * (1 - 0.1 * 0.5) - 0.1))
