"""Fine-tuning beside the weights: it learns the images, resumes as if it had never stopped, and leaves the network alone."""
from dataclasses import replace

import pytest
import torch
from helpers import images, says
from torch import nn

from ppap_core.io.files import load_tensors, save_tensors
from ppap_core.noise import expand
from ppap_core.training.finetune import FineTune, as_lora, fine_tune, initial_updates
from ppap_core.training.loop import RunOptions
from ppap_core.training.lora import LoraUpdate, with_adapters

CONFIG = FineTune(steps=60, rank=2, batch=3, lr=0.02)


class Net(nn.Module):
    """A small denoiser; its depthwise layer cannot be adapted."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.mix, self.last = nn.Linear(8, 8), nn.Conv2d(8, 3, 1)
        self.requires_grad_(False)

    def forward(self, x):
        h = torch.relu(self.deep(torch.relu(self.first(x))))
        return self.last(torch.relu(self.mix(h.movedim(1, -1))).movedim(-1, 1))


def task(net: Net):
    """Bright images under noise of levels from 0.1 to 2."""
    def predict(chosen, noise, share):
        sigma = 0.1 * 20**share
        return net(chosen + expand(sigma, chosen) * noise), sigma
    return predict, images(5).abs()


def tuned(net: Net, config: FineTune = CONFIG, **options):
    predict, shown = task(net)
    return fine_tune(net, predict, shown, config, 1.0, RunOptions({"model": "net"}, **options))


def error(net: Net, changes: dict) -> float:
    predict, shown = task(net)
    noise = torch.randn(shown.shape, generator=torch.Generator().manual_seed(77))
    with with_adapters(net, {name: [change] for name, change in changes.items()}):
        return float((predict(shown, noise, torch.linspace(0, 1, 5))[0] - shown).square().mean())


def test_it_learns_the_images_and_leaves_the_network_as_it_was():
    net, untouched = Net(), Net()
    changes, losses = tuned(net)
    assert set(changes) == {"first", "mix", "last"} and len(losses) == 60
    assert error(net, changes) < 0.7 * error(net, {}) and sum(losses[-10:]) < sum(losses[:10])
    assert all(torch.equal(*each) for each in zip(net.state_dict().values(), untouched.state_dict().values(), strict=True))
    assert not any(part.requires_grad for change in changes.values() for part in (change.up, change.down))


def test_a_learning_rate_of_zero_changes_nothing():
    net = Net()
    changes, _ = tuned(net, replace(CONFIG, lr=0.0, steps=3))
    assert error(net, changes) == error(net, {})


def test_more_training_and_a_higher_rank_make_a_better_sibling():
    net = Net()
    good, bad = (tuned(net, replace(CONFIG, steps=steps, rank=rank))[0] for steps, rank in ((120, 4), (8, 1)))
    assert error(net, good) < error(net, bad) < error(net, {})


@pytest.mark.parametrize("stop", [0, 9, 10, 37])
def test_a_resumed_training_equals_one_without_a_stop(stop, tmp_path):
    expected, losses = tuned(Net())
    state = tmp_path / "state.safetensors"

    def cancel(step, loss, changes):
        if step == stop:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        tuned(Net(), state_file=state, on_step=cancel)
    assert len(load_tensors(state)[1]["losses"]) == stop + 1
    again, more = tuned(Net(), state_file=state)
    assert more == losses
    for name, change in expected.items():
        assert torch.equal(change.up, again[name].up) and torch.equal(change.down, again[name].down)


def test_the_state_of_another_training_is_refused(tmp_path):
    state = tmp_path / "state.safetensors"
    tuned(Net(), replace(CONFIG, steps=3), state_file=state)
    with says(ValueError, "state of another training", "config is"):
        tuned(Net(), replace(CONFIG, steps=4), state_file=state)


def test_a_state_without_the_trained_tensors_is_refused(tmp_path):
    state = tmp_path / "state.safetensors"
    tuned(Net(), replace(CONFIG, steps=3), state_file=state)
    tensors, about = load_tensors(state)
    save_tensors(state, {name: tensor for name, tensor in tensors.items() if name != "trained.mix.up"}, about)
    with says(ValueError, "holds 5 of 6", "delete it"):
        tuned(Net(), replace(CONFIG, steps=3), state_file=state)


def test_every_step_is_reported_with_what_was_learned_so_far():
    seen = []
    changes, losses = tuned(Net(), replace(CONFIG, steps=4), on_step=lambda step, loss, so_far: seen.append(
        (step, loss, {name: each.up.detach().clone() for name, each in so_far.items()})))
    assert [(step, loss) for step, loss, _ in seen] == list(enumerate(losses))
    assert all(torch.equal(seen[-1][2][name], change.up) for name, change in changes.items())
    assert not torch.equal(seen[0][2]["mix"], changes["mix"].up)


def test_it_works_under_inference_mode():
    expected, _ = tuned(Net(), replace(CONFIG, steps=5))
    net = Net()
    with torch.inference_mode():
        found, _ = tuned(net, replace(CONFIG, steps=5))
    assert all(torch.equal(found[name].up, change.up) for name, change in expected.items())


def test_the_file_has_the_names_and_shapes_of_a_lora():
    changes = {"a.b": LoraUpdate(torch.ones(5, 2), torch.ones(2, 3)),
               "c": LoraUpdate(torch.ones(5, 4), torch.ones(4, 3, 3, 3))}
    found = {name: tuple(tensor.shape) for name, tensor in as_lora(changes, "net.").items()}
    assert found == {"net.a.b.lora_up.weight": (5, 2), "net.a.b.lora_down.weight": (2, 3), "net.a.b.alpha": (),
                     "net.c.lora_up.weight": (5, 4, 1, 1), "net.c.lora_down.weight": (4, 3, 3, 3), "net.c.alpha": ()}
    assert as_lora(changes, "net.")["net.c.alpha"] == 4


def test_layers_that_cannot_be_changed_are_left_out():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 3, groups=4),
                        nn.Linear(5, 6))
    changes = initial_updates(net, 2, 0, torch.device("cpu"))
    assert [*changes] == ["2"]
    with with_adapters(net, {name: [change] for name, change in changes.items()}):
        net(torch.zeros(1, 3, 7, 7))


def test_a_network_without_layers_to_tune_is_refused():
    with says(ValueError, "Identity", "fine-tuned"):
        fine_tune(nn.Identity(), task(Net())[0], images(2), CONFIG)
