"""The few-step student of the tiny flow, its training, and the benchmark of few steps."""
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import randn
from torch import Tensor

from benchmarks.few_steps import FewStepBench, LatentDistillation, few_sigmas, load_few_step_world, rows, table
from benchmarks.training import options
from benchmarks.turbo import Turbo, Ways, _ways_of_batch, follow, load_turbo, shifted, turbo_loss
from ppap_core.tinyworld.latents import load_flow
from ppap_core.tinyworld.loaders import condition


class Straight(torch.nn.Module):
    """A flow whose every way leads straight to one latent, which the class shifts."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return (x - 0.5 - pooled.sum(1)[:, None, None, None]) / t[:, None, None, None].clamp_min(1e-3)


def test_the_teacher_follows_the_flow_to_its_end():
    """With guidance 2 of the class: twice its shift."""
    found = follow(Straight(), randn(3, 16, 4, 4), torch.tensor([1.0, 0.7, 0.4]), torch.tensor([-1, 2, -1]))
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.tensor([0.5, 2.5, 0.5]), atol=0.05, rtol=0)


def test_times_are_shifted_as_samplers_ask_for_them():
    assert shifted(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.0, 0.75, 1.0]
    sigmas = few_sigmas(4)
    torch.testing.assert_close(sigmas[1:], torch.tensor([9.0, 3.0, 1.0, 0.0]))
    assert sigmas[0] == pytest.approx(999, rel=1e-3)


@pytest.mark.slow
def test_ways_end_where_the_teacher_does():
    """Both kinds: at its beginning the straight way is the teacher's state, and at its end the teacher's latent."""
    fresh, again = _ways_of_batch(load_flow(), 7, 2)
    for ways in (fresh, again):
        time = ways.start[:, None, None, None]
        state = (1 - time) * ways.latent + time * ways.noise
        torch.testing.assert_close(follow(load_flow(), state, ways.start, ways.label), ways.latent, rtol=0.05, atol=0.05)
    assert (fresh.start == 1).all() and (again.start < 1).all() and (fresh.label[::2] == -1).all()


def test_the_student_begins_as_the_flow_and_learns():
    student, x = Turbo(), randn(2, 16, 8, 8)
    t, given = torch.tensor([0.3, 0.9]), condition(torch.tensor([-1, 4]))
    assert torch.equal(student(x, t, given[:, None], given), load_flow()(x, t, given[:, None], given))
    ways = Ways(randn(2, 16, 8, 8, seed=1), x, torch.tensor([-1, 4]), torch.ones(2))
    turbo_loss(student, ways, torch.Generator().manual_seed(0)).sum().backward()
    assert all(up.grad.abs().max() > 0 for up in student.up)
    assert not any(parameter.requires_grad for parameter in student.flow[0].parameters())


def test_a_perfect_student_has_no_loss():
    ways = Ways(randn(2, 16, 8, 8, seed=1), randn(2, 16, 8, 8), torch.tensor([-1, 4]), torch.tensor([1.0, 0.5]))
    loss = turbo_loss(lambda *inputs: ways.noise - ways.latent, ways, torch.Generator().manual_seed(0))
    assert loss.tolist() == [0, 0]


def test_the_bundled_student_is_the_flow_with_its_lora():
    flow, turbo = load_flow().state_dict(), load_turbo().state_dict()
    changed = {name for name in flow if not torch.equal(flow[name], turbo[name])}
    assert changed == {name for name in flow if name.endswith("weight")}


@pytest.mark.slow
def test_the_bundled_student_needs_few_steps():
    """Nearer in four steps to where the flow comes from the same noise in many."""
    flow, turbo = load_few_step_world("flow"), load_few_step_world("turbo")
    seeds = range(400, 416)
    many, few, student = flow.sample(seeds, 40), flow.sample(seeds, 4), turbo.sample(seeds, 4)
    assert (student - many).square().mean() < 0.8 * (few - many).square().mean()


# The benchmark

def test_rows_look_as_often_in_any_number_of_steps():
    bench = FewStepBench(looks=16)
    looks = {steps: {row.points[0].get("substeps", 1) * steps for row in rows(bench, steps) if "sub-steps" in row.name}
             for steps in (4, 8, 16)}
    assert looks == {4: {16}, 8: {16}, 16: set()}
    assert all(row.steps == 4 for row in rows(bench, 4)) and len(rows(bench, 16)) == 5


def test_experts_of_as_few_steps_are_rows_of_their_own():
    bench = FewStepBench()
    four, eight = ([row.name for row in rows(bench, steps) if row.training == bench.own] for steps in (4, 8))
    assert eight == [] and four == [f"of 4-step images: experts, {where}, sub-steps"
                                    for where in ("in the prediction", "through the model")]


def test_few_step_experts_are_named_by_what_differs():
    assert options(LatentDistillation()) == {"latents": True}
    assert options(LatentDistillation(own_steps=16)) == {"latents": True, "own_steps": 16}


def test_the_table_has_a_column_for_each_number_of_steps():
    def result(row: str, steps: int) -> dict[str, Any]:
        return {"model": "flow", "row": row, "steps": steps, "score": steps / 100, "frechet": 12.3}
    text = table([result("unguided", 4), result("unguided", 8), result("plain", 8)])
    assert "| flow | unguided | 4% / 12 | 8% / 12 |" in text and "| flow | plain |  | 8% / 12 |" in text


@pytest.mark.slow
def test_latents_are_judged_as_images():
    world = load_few_step_world("flow")
    small = replace(world.evaluator(64), batch=2)
    scores = small.evaluate(lambda numbers, scenes: world.sample(numbers, 1), range(6))
    assert scores.images == 6 and scores.frechet > 0
