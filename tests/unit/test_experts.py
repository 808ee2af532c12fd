"""One frozen network and an adapter for each interval: nothing leaks between experts, into the base or out of a block."""
import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import B, SmallNet, disturb, fixed_weights, level, randn, same, says, small_guider, snapshot
from torch import nn

from ppap_core.experts.adapters import LoraSpec, default_targets
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.guiders.guider import IgnoreSigma
from ppap_core.guiders.tasks import TASKS
from ppap_core.io.hashing import fingerprint_network
from ppap_core.schedules import ExpertSchedule

SCHEDULE = ExpertSchedule((0.1, 0.5, 2.0, 10.0))
INSIDE = (0.3, 1.0, 5.0)  # a noise level of each expert
PICTURE = randn(B, 3, 12, 16)


def make_bank(base: nn.Module | None = None, **settings) -> ExpertBank:
    return ExpertBank(base or fixed_weights(SmallNet()).eval(), SCHEDULE, LoraSpec(rank=2), **settings)


def answers(bank: ExpertBank) -> list[torch.Tensor]:
    """The output of each expert."""
    with torch.no_grad():
        return [bank(PICTURE, level(sigma, PICTURE)) for sigma in INSIDE]


@pytest.mark.parametrize("dense", [False, True])
def test_a_new_bank_equals_the_plain_network_bit_for_bit(dense):
    """Every expert of a new bank gives the plain network's output bit for bit."""
    base = fixed_weights(SmallNet(dense=dense)).eval()
    with torch.no_grad():
        plain = base(PICTURE)
    assert all(torch.equal(answer, plain) for answer in answers(make_bank(base)))


def test_training_an_expert_leaves_all_others_alone():
    """Neither the other experts nor the plain network change."""
    base = fixed_weights(SmallNet()).eval()
    bank = make_bank(base)
    kept, plain = snapshot(base), base(PICTURE)
    before = answers(bank)
    disturb(bank, 1)
    after = answers(bank)
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert not torch.allclose(after[1], before[1])
    assert same(snapshot(base), kept) and torch.equal(base(PICTURE), plain)


def test_switching_there_and_back_gives_the_same_answers():
    bank = make_bank()
    for index in range(3):
        disturb(bank, index, seed=10 * index)
    first = answers(bank)
    assert len({tuple(answer.flatten().tolist()) for answer in first}) == 3
    for sigma, expected in [(5.0, 2), (0.3, 0), (1.0, 1), (0.3, 0), (5.0, 2)]:
        with torch.no_grad():
            assert torch.equal(bank(PICTURE, level(sigma, PICTURE)), first[expected])


def test_an_expert_is_the_network_with_its_low_rank_update():
    """The weight of an adapted layer is W + alpha / rank * B A."""
    base = fixed_weights(SmallNet()).eval()
    bank = ExpertBank(base, SCHEDULE, LoraSpec(rank=2, alpha=3.0, targets=("mix", "head")))
    disturb(bank, 2)
    weights, merged = bank.weights(2), copy.deepcopy(base)
    with torch.no_grad():
        for name in ("mix", "head"):
            a, b = (next(value for key, value in weights.items() if f"{name}.lora_{part}" in key) for part in "AB")
            layer = merged.get_submodule(name)
            layer.weight += 3.0 / 2 * (b.flatten(1) @ a.flatten(1)).reshape(layer.weight.shape)
        torch.testing.assert_close(bank(PICTURE, level(INSIDE[2], PICTURE)), merged(PICTURE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma, index", [(0.0, 0), (0.05, 0), (0.4999, 0), (0.5, 1), (1.9999, 1), (2.0, 2), (9.0, 2),
                                          (10.0, 2), (500.0, 2)])
def test_the_expert_of_the_interval_answers_also_on_an_edge(sigma, index):
    bank = make_bank()
    for each in range(3):
        disturb(bank, each, seed=10 * each)
    with torch.no_grad():
        assert torch.equal(bank(PICTURE, level(sigma, PICTURE)), answers(bank)[index])
    bank(PICTURE, level(sigma, PICTURE))
    assert bank.active == index


def test_a_batch_may_hold_several_levels_of_an_interval():
    bank = make_bank()
    with torch.no_grad():
        assert torch.equal(bank(PICTURE, torch.tensor([0.5, 1.0, 1.9])), answers(bank)[1])


def test_a_batch_over_two_intervals_is_refused():
    with says(ValueError, "experts 0 and 2", "split"):
        make_bank()(PICTURE, torch.tensor([0.2, 1.0, 5.0]))


def test_a_noise_level_that_is_not_a_number_is_refused():
    with says(ValueError, "NaN"):
        make_bank()(PICTURE, torch.tensor([1.0, math.nan, 1.0]))


@pytest.mark.parametrize("index", [-1, 3, 99])
@pytest.mark.parametrize("use", [lambda bank, index: bank.select(index),
                                 lambda bank, index: bank.trainable(index).__enter__()])
def test_an_expert_that_the_bank_does_not_have_is_refused(use, index):
    with says(IndexError, f"no expert {index}", "has 3"):
        use(make_bank(), index)


def requires_grad(net: nn.Module) -> list[str]:
    return [name for name, parameter in net.named_parameters() if parameter.requires_grad]


def test_only_the_expert_in_training_requires_grad():
    bank = make_bank()
    assert not requires_grad(bank)
    with bank.trainable(1) as parameters:
        names = requires_grad(bank)
        assert len(names) == len(parameters) == len(bank.weights(1)) and all(".expert_1." in name for name in names)
        assert bank.active == 1
    assert not requires_grad(bank)
    answers(bank)
    assert not requires_grad(bank)


def test_no_weight_requires_grad_after_an_exception_in_training():
    bank = make_bank()
    with pytest.raises(InterruptedError), bank.trainable(2):
        raise InterruptedError
    assert not requires_grad(bank)


def test_asking_other_experts_does_not_end_a_training():
    """A preview in the middle of a training asks experts of other noise levels."""
    bank = make_bank()
    with bank.trainable(1):
        answers(bank)
        bank(PICTURE, level(INSIDE[1], PICTURE)).sum().backward()
        assert all(".expert_1." in name for name in requires_grad(bank)) and requires_grad(bank)
    assert not requires_grad(bank)


def test_an_expert_in_training_gets_a_gradient_and_the_base_none():
    base = fixed_weights(SmallNet()).eval()
    bank = make_bank(base)
    with bank.trainable(1) as parameters:
        bank(PICTURE, level(INSIDE[1], PICTURE)).square().sum().backward()
    names = [name for name, parameter in bank.named_parameters() if parameter.grad is not None]
    assert len(names) == len(parameters) and all(".expert_1." in name for name in names)
    assert any(parameter.grad.abs().max() > 0 for parameter in parameters)
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("told_to_train", [False, True])
def test_batch_norms_keep_their_statistics(told_to_train):
    """Batch norms keep their statistics whatever a bank is asked."""
    base = fixed_weights(SmallNet()).train()
    bank = make_bank(base)
    kept = snapshot(base)
    if told_to_train:
        bank.train()
    with bank.trainable(0):
        bank(10 * PICTURE, level(0.3, PICTURE)).sum().backward()
    assert any("num_batches_tracked" in name for name in kept) and same(snapshot(base), kept)
    assert not any(module.training for module in bank.modules())


def test_the_base_shares_weights_and_gets_no_adapters():
    base = fixed_weights(SmallNet()).eval()
    names = [name for name, _ in base.named_modules()]
    bank = make_bank(base)
    own = {parameter.data_ptr() for parameter in base.parameters()}
    merged = {plain.data_ptr() for _, plain in bank.adapted.merged}
    assert own - merged <= {parameter.data_ptr() for parameter in bank.parameters()}
    assert [name for name, _ in base.named_modules()] == names and type(base.mix) is nn.Conv2d
    assert not hasattr(base, "peft_config")


def test_two_banks_on_one_network_do_not_know_of_each_other():
    base = fixed_weights(SmallNet()).eval()
    first, second = make_bank(base), make_bank(base, view="noisy")
    before = answers(second)
    disturb(first, 0)
    assert all(torch.equal(a, b) for a, b in zip(answers(second), before, strict=True))


# Numbers of experts and seeds

def test_a_bank_tells_the_second_expert_from_the_twelfth():
    bank = ExpertBank(fixed_weights(SmallNet()).eval(), ExpertSchedule.log_spaced(12, 0.1, 10.0), LoraSpec(rank=1))
    kept = {index: {name: value.clone() for name, value in bank.weights(index).items()} for index in range(12)}
    assert len({len(weights) for weights in kept.values()}) == 1
    disturb(bank, 1)
    assert [index for index in range(12) if not same(bank.weights(index), kept[index])] == [1]


def test_an_expert_s_start_depends_on_seed_and_number_only():
    torch.manual_seed(1)
    first = make_bank(seed=5)
    torch.manual_seed(2)
    base, schedule = fixed_weights(SmallNet(), seed=9).eval(), ExpertSchedule.log_spaced(5, 0.1, 10.0)
    longer = ExpertBank(base, schedule, LoraSpec(rank=2), seed=5)
    assert all(same(first.weights(index), longer.weights(index)) for index in range(3))
    assert not same(first.weights(0), first.weights(1))
    assert not same(first.weights(0), make_bank(seed=6).weights(0))


def test_building_a_bank_draws_nothing_from_the_global_generator():
    base = fixed_weights(SmallNet()).eval()
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    make_bank(base)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("seed", [2**32 - 1, 2**64 - 1])
def test_any_seed_that_comfyui_gives_makes_a_bank(seed):
    assert not same(make_bank(seed=seed).weights(0), make_bank(seed=seed - 1).weights(0))


# Weights of one expert

def test_weights_move_an_expert_to_another_bank():
    """The other bank then gives the same output."""
    first, second = make_bank(), make_bank(seed=7)
    disturb(first, 1)
    second.load(1, first.weights(1))
    assert torch.equal(answers(second)[1], answers(first)[1]) and same(second.weights(1), first.weights(1))


def wrong_weights(weights: dict, how: str) -> dict:
    names = sorted(weights)
    if how == "missing":
        return {name: weights[name] for name in names[:-1]}
    if how == "unexpected":
        return weights | {"another.lora_A.weight": torch.zeros(1)}
    return weights | {names[-1]: torch.zeros(1, 2)}


@pytest.mark.parametrize("how, words", [
    ("missing", ["misses 1", "mix.lora_B.weight"]),
    ("unexpected", ["unexpected", "another.lora_A.weight"]),
    ("shape", ["mix.lora_B.weight", "(1, 2)", "expected"]),
])
def test_unfitting_weights_leave_the_expert_whole(how, words):
    """They are refused."""
    bank = make_bank()
    disturb(bank, 1)
    kept = {name: value.clone() for name, value in bank.weights(1).items()}
    bad = wrong_weights({name: value + 1 for name, value in kept.items()}, how)
    with says(ValueError, "expert 1", *words):
        bank.load(1, bad)
    assert same(bank.weights(1), kept)


def test_weights_of_another_rank_are_refused():
    other = ExpertBank(fixed_weights(SmallNet()).eval(), SCHEDULE, LoraSpec(rank=3))
    with says(ValueError, "shape", "rank"):
        make_bank().load(0, other.weights(0))


# Where adapters go

def test_adapters_skip_the_head_and_grouped_convolutions():
    """Adapters go to every layer but the head and grouped convolutions."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4, 6),
                        nn.ReLU(), nn.Linear(6, 2))
    assert default_targets(net) == ("0", "2", "4")


def test_a_layer_named_like_another_is_not_adapted():
    bank = ExpertBank(fixed_weights(SmallNet()).eval(), SCHEDULE, LoraSpec(rank=2, targets=("mix",)))
    assert {name.split(".lora_")[0] for name in bank.weights(0)} == {"mix"}
    net = nn.Sequential()
    for name in ("mix", "mixer", "premix"):
        net.add_module(name, nn.Linear(4, 4))
    bank = ExpertBank(net, SCHEDULE, LoraSpec(rank=2, targets=("mix",)))
    assert {name.split(".lora_")[0] for name in bank.weights(0)} == {"mix"}


@pytest.mark.parametrize("net", [nn.Sequential(nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(4, 2))])
def test_a_network_without_layers_to_adapt_is_refused(net):
    with says(ValueError, "Sequential", "at least two"):
        ExpertBank(net, SCHEDULE)


def test_an_unknown_view_is_refused():
    with says(ValueError, "'latent'", "noisy", "denoised"):
        make_bank(view="latent")


# Guiders and memory

@pytest.mark.parametrize("task", TASKS)
def test_new_experts_keep_the_energy_and_set_the_view(task):
    guider = small_guider(task, "denoised")
    bank = ExpertBank(base_network(guider), SCHEDULE, LoraSpec(rank=2), view="noisy")
    expert = with_experts(guider, bank)
    image = randn(B, 3, 20, 28).tanh()
    assert expert.view == "noisy" and guider.view == "denoised" and isinstance(guider.net, IgnoreSigma)
    assert torch.equal(expert.energy(image, level(1.0, image)), guider.energy(image, level(1.0, image)))


def test_experts_are_made_from_a_plain_guider_only():
    guider = small_guider()
    with says(ValueError, "small/class", "not a plain guider"):
        base_network(with_experts(guider, make_bank(base_network(guider))))
    with says(ValueError, "not a plain guider"):
        base_network(replace(guider, net=lambda image, sigma: image))


def test_the_fingerprint_covers_weights_and_statistics():
    """A change of any weight or statistic changes the fingerprint."""
    net = fixed_weights(SmallNet())
    first = fingerprint_network(net)
    assert len(first) == 16
    assert fingerprint_network(copy.deepcopy(net)) == fingerprint_network(fixed_weights(SmallNet())) == first
    for change in (lambda net: net.head.bias.data[0].add_(1e-6), lambda net: net.norm_1.running_mean[0].add_(1e-6),
                   lambda net: net.norm_2.num_batches_tracked.add_(1)):
        other = copy.deepcopy(net)
        change(other)
        assert fingerprint_network(other) != first
    assert fingerprint_network(copy.deepcopy(net).bfloat16()) != first


def test_the_fingerprint_of_given_numbers_stays():
    """The hash is written down here, so that files of today fit tomorrow."""
    net = nn.Linear(3, 2)
    net.load_state_dict({"weight": torch.arange(6.0).reshape(2, 3) / 8, "bias": torch.tensor([0.5, -1.0])})
    assert fingerprint_network(net) == "08f314c3943a705e"


@pytest.mark.parametrize("rank", [4, 8])
def test_ten_experts_take_at_most_a_quarter_more_memory(rank):
    """Ten experts of a ResNet-50 take at most a quarter more memory than the plain network."""
    timm = pytest.importorskip("timm")
    net = timm.create_model("resnet50", pretrained=False).eval()
    bank = ExpertBank(net, ExpertSchedule.log_spaced(10, 0.02, 80.0), LoraSpec(rank))
    distinct = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for model in (net, bank)
                for tensor in (*model.parameters(), *model.buffers())}
    plain = sum(tensor.numel() * tensor.element_size() for tensor in (*net.parameters(), *net.buffers()))
    assert plain * (1 + 10 * bank.trainable_share()) < sum(distinct.values()) <= 1.25 * plain


@pytest.mark.parametrize("dense", [False, True])
def test_a_merged_expert_equals_the_adapter_beside_weights(dense, monkeypatch):
    base = fixed_weights(SmallNet(dense=dense)).eval()
    merged = make_bank(base)
    monkeypatch.setattr("ppap_core.experts.adapters.SPARE_SHARE", 0.0)
    monkeypatch.setattr("ppap_core.experts.adapters.SPARE_BYTES", 0)
    beside = make_bank(base)
    for index in range(len(merged.schedule)):
        disturb(merged, index)
        beside.load(index, merged.weights(index))
    assert merged.adapted.merged and not beside.adapted.merged
    for a, b in zip(answers(merged), answers(beside), strict=True):
        assert torch.allclose(a, b, atol=1e-5) and not torch.equal(a, base(PICTURE))
