"""The training loop: what benchmarks add to it, and resuming with it."""
import os
from pathlib import Path

import pytest
import torch
from helpers import randn, says

from ppap_core.io.files import load_tensors, write_json
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


# Files that are held, and numbers that are none

HELD = "held open"


@pytest.fixture
def held(monkeypatch):
    """Names of files that something holds open, as Windows does: they cannot be replaced."""
    names: set[str] = set()

    def replace_file(source, target, real=os.replace):
        if Path(target).name in names:
            raise PermissionError(13, "Access is denied")
        real(source, target)
    monkeypatch.setattr("ppap_core.io.files.os.replace", replace_file)
    monkeypatch.setattr("ppap_core.io.files.RENAMING_PAUSES", (0.0,))
    return names


def test_a_state_that_is_held_does_not_stop_the_training(tmp_path, held, caplog):
    """The training ends as without a file; that is said once, and the state is written as soon as it can be."""
    file, straight, run = tmp_path / "state.safetensors", Run(), Run()
    losses = straight.go()
    held.add(file.name)
    assert run.go(state_file=file, save_every=3) == losses and not file.exists()
    assert [record.levelname for record in caplog.records] == ["WARNING"] and HELD in caplog.text

    def let_go(step, loss, trained):
        later.follow(step, loss, trained)
        if step == 10:
            held.clear()
    later = Run()
    held.add(file.name)
    later.go(on_step=let_go, state_file=file, save_every=3)
    assert Run().go(state_file=file, on_step=lambda *_: pytest.fail("it was trained again")) == losses
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def test_a_file_that_is_let_go_soon_is_written(tmp_path, held, monkeypatch):
    held.add("x.json")
    monkeypatch.setattr("ppap_core.io.files.time.sleep", lambda seconds: held.clear())
    write_json(tmp_path / "x.json", {})
    assert (tmp_path / "x.json").exists()


class Unstable(Run):
    """A training that explodes at high rates: the loss is a power of the distance, and overflows."""

    def loss(self, step: int) -> torch.Tensor:
        return (self.point - TARGET).square().square().exp().mean() if step > 3 else super().loss(step)


def go(run: Run, file: Path, rate: float, **options) -> list[float]:
    return optimize({"point": run.point}, run.loss, 20, rate, "a point",
                    RunOptions({"name": "point", "config": {"lr": rate}}, file, **options))


@pytest.mark.parametrize("beside", ["same file", "same folder", "folder beside"])
def test_after_nan_a_lower_rate_goes_on_from_the_last_good_step(beside, tmp_path, caplog):
    first = tmp_path / "a" / "one.state.safetensors"
    second = {"same file": first, "same folder": tmp_path / "a" / "two.state.safetensors",
              "folder beside": tmp_path / "b" / "one.state.safetensors"}[beside]
    with says(ValueError, "a point", "step 4", "state of step 0 is kept", "lower"):
        go(Unstable(), first, 30.0)
    tensors, header = load_tensors(first)
    assert all(tensor.isfinite().all() for tensor in tensors.values()) and header["failed"] == {"step": 0, "rate": 30.0}
    steps, run = [], Unstable()
    losses = go(run, second, 0.1, save_every=5, on_step=lambda step, *_: steps.append(step))
    assert steps == list(range(20)) and len(losses) == 20 and run.point.isfinite().all()
    assert "at a learning rate of 30: it goes on at 0.1 from step 0" in caplog.text
    assert "failed" not in load_tensors(second)[1]


class BreaksAt(Run):
    """A training whose numbers break at a step, at high rates only."""

    def __init__(self, step: int, where: str):
        super().__init__()
        self.step, self.where, self.rate = step, where, 1.0

    def loss(self, step: int) -> torch.Tensor:
        value = super().loss(step)
        if step != self.step or self.rate < 0.5:
            return value
        if self.where == "loss":
            return value * float("nan")
        return value + (self.point.sum() * 0).sqrt()  # finite, with a gradient of 0 / 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("step", [7, 13, 19])
def test_numbers_that_break_are_neither_saved_nor_handed_out(step, where, tmp_path):
    """Also in the very last step; a lower rate then goes on where all was well, and equals a training from there."""
    file, run, good = tmp_path / "a.state.safetensors", BreaksAt(step, where), step // 10 * 10
    with says(ValueError, "a point", where, f"step {step}", f"step {good} is kept"):
        go(run, file, 1.0)
    assert run.point.isfinite().all() and all(each.isfinite().all() for each in load_tensors(file)[0].values())
    steps, again = [], BreaksAt(step, where)
    again.rate = 0.1
    go(again, tmp_path / "b.state.safetensors", 0.1, on_step=lambda step, *_: steps.append(step))
    assert steps == list(range(good, 20)) and again.point.isfinite().all()


def test_a_failed_training_is_no_start_for_another(tmp_path):
    """Neither at the same rate or a higher one, nor with other settings."""
    with says(ValueError, "step 13"):
        go(BreaksAt(13, "loss"), tmp_path / "a.state.safetensors", 1.0)
    for name, rate, run_id in (("b", 2.0, "point"), ("c", 0.1, "another")):
        steps: list[int] = []
        optimize({"point": Run().point}, lambda step: Run().point.sum(), 3, rate, "a point", RunOptions(
            {"name": run_id, "config": {"lr": rate}}, tmp_path / f"{name}.state.safetensors",
            on_step=lambda step, *_, steps=steps: steps.append(step)))
        assert steps == [0, 1, 2]
    with says(ValueError, "step 13"):  # at the same rate it goes on, to the same end
        go(BreaksAt(13, "loss"), tmp_path / "a.state.safetensors", 1.0, on_step=lambda *_: pytest.fail("began anew"))


def test_infinite_results_are_not_handed_out():
    run = Run()
    with says(ValueError, "infinite", "step 2", "lower the learning rate"):
        optimize({"point": run.point}, lambda step: run.point.sum() * 1e-3, 3, AdamW(
            lambda step: float("inf") if step == 2 else 0.0), "a point")
