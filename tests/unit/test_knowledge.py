"""What experts know: measured as agreement on held-out images, told in words, kept in the bank, and acted upon."""
from dataclasses import replace

import pytest
import torch
from helpers import (
    CLASSES,
    VIEWS,
    disturb,
    images,
    level,
    made_up_trajectories,
    randn,
    same,
    small_guider,
)

from ppap_core.experts.adapters import LoraSpec
from ppap_core.experts.bank import ExpertBank, base_network, with_experts
from ppap_core.experts.checkpoint import load_bank, save_bank
from ppap_core.experts.distill import distill
from ppap_core.experts.examine import Agreements, KnowledgeTest, commonest_answer, measure_knowledge, summarize
from ppap_core.experts.knowledge import Knowledge, describe_knowledge, knowledge_of, remember
from ppap_core.experts.lesson import DistillConfig
from ppap_core.experts.samples import HELD_OUT_SEEDS, SHARD_SIZE, SampleStore, from_uint8, held_out_count
from ppap_core.guiders.guider import clean
from ppap_core.guiders.latents import LatentSpace
from ppap_core.guiders.tasks import TASKS
from ppap_core.rng import seeded_noise
from ppap_core.schedules import ExpertSchedule

EDGES = (0.1, 1.0, 10.0)
IMAGES = torch.arange(64)
KNOWN = Knowledge(0.31, 0.58, 0.12, 0.05, 0.05, 0.05, 64, held_out=True)
CEILING = Knowledge(0.97, 0.97, 0.12, 0.02, 0.02, 0.02, 64, held_out=True)


def made(seeds):
    ends = images(len(seeds), seed=seeds[0] % 2**32)
    return ends, made_up_trajectories(ends, seeds[0] % 1000)


def made_of_latents(seeds):
    return images(len(seeds)), made_up_trajectories(randn(len(seeds), 4, 5, 7), seeds[0] % 1000)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> SampleStore:
    store = SampleStore(tmp_path_factory.mktemp("store"), {"seed": 3})
    store.hold_out().fill(SHARD_SIZE, made)
    store.fill(SHARD_SIZE, made)
    return store


def make_bank(guider, view: str = "denoised", space: LatentSpace | None = None) -> ExpertBank:
    return ExpertBank(base_network(guider), ExpertSchedule(EDGES), LoraSpec(rank=2), view, space=space)


def share_of(right: int) -> torch.Tensor:
    """Agreement of a class for 64 images, of which so many are right."""
    return (IMAGES < right).float()


# Held-out images

def test_held_out_images_are_others_beside_the_store(tmp_path):
    store, asked = SampleStore(tmp_path, {"model": "x", "seed": 3}), []
    assert store.held_out is None
    held_out = store.hold_out()
    held_out.fill(SHARD_SIZE, lambda seeds: asked.extend(seeds) or made(seeds))
    assert asked == [3 + HELD_OUT_SEEDS + i for i in range(SHARD_SIZE)]
    assert len(store) == 0 and len(store.held_out) == SHARD_SIZE
    noise = seeded_noise([3, 3 + HELD_OUT_SEEDS, 3 + 2 * HELD_OUT_SEEDS], (8,))
    assert not torch.equal(noise[0], noise[1]) and torch.equal(noise[0], noise[2]), "torch takes 32 bits of a seed"
    again = SampleStore(tmp_path, {"model": "x", "seed": 3})
    assert torch.equal(again.held_out.images, held_out.images)


@pytest.mark.parametrize("images, count", [(64, 0), (511, 0), (512, 64), (1023, 64), (1024, 128), (4096, 512),
                                           (100_000, 512)])
def test_at_most_an_eighth_is_held_out_in_whole_shards(images, count):
    assert held_out_count(images) == count


def test_held_out_images_change_no_training(store, tmp_path):
    guider, banks = small_guider(), [make_bank(small_guider()) for _ in range(2)]
    alone = SampleStore(tmp_path, {"seed": 3})
    alone.fill(SHARD_SIZE, made)
    config = DistillConfig(steps=2, batch=3)
    losses = [distill(guider, bank, each, config) for bank, each in zip(banks, (store, alone), strict=True)]
    assert losses[0] == losses[1] and same(banks[0].weights(1), banks[1].weights(1))
    assert banks[0].training_info == banks[1].training_info


# The measure

@pytest.mark.parametrize("task", TASKS)
def test_equal_outputs_agree_wholly_and_answers_agree_as_well(task):
    output = small_guider(task).predict(images(), clean(images()))
    agreement, answer = TASKS[task].agreement, TASKS[task].answer
    assert agreement(output, output).tolist() == pytest.approx([1.0] * 3)
    assert agreement(answer(output), output).tolist() == pytest.approx([1.0] * 3)
    other = agreement(output.flip(0), output)
    assert other.shape == (3,) and 0 <= other.min() and other.max() <= 1


def test_agreement_is_equal_top_answers_or_overlap():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    assert TASKS["class"].agreement(logits, torch.tensor([[9.0, 8.0, 0.0], [1.0, 0.0, 0.0]])).tolist() == [1, 0]
    marks = torch.tensor([[1.0, 1.0, -1.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
    assert TASKS["tags"].agreement(marks, torch.tensor([[1.0, -1.0, 1.0, -1.0], [-2.0, -1.0, -1.0, -3.0]])).tolist() == [
        pytest.approx(1 / 3), 1]


def test_the_commonest_class_agrees_as_often_as_it_occurs(store):
    guider, held_out = small_guider(), store.held_out
    image = from_uint8(held_out.images)
    counts = guider.predict(image, clean(image)).argmax(1).bincount(minlength=CLASSES)
    commonest = commonest_answer(guider, held_out, SHARD_SIZE)
    assert commonest.shape == (1, CLASSES) and counts[commonest.argmax(1)] == counts.max()
    measured = measure_knowledge(guider, make_bank(guider), store)[0]
    assert measured.commonest == pytest.approx(int(counts.max()) / SHARD_SIZE, abs=1e-6)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("task", TASKS)
def test_agreement_is_that_of_each_held_out_step(store, task, view):
    guider = small_guider(task)
    bank = make_bank(guider, view)
    disturb(bank, 1)
    untrained, trained = measure_knowledge(guider, bank, store)
    assert untrained.plain == untrained.expert and untrained.gain_error == 0
    held_out, experts, expected = store.held_out, with_experts(guider, bank), []
    inputs = held_out.noisy_vp if view == "noisy" else held_out.denoised
    for number, image in enumerate(from_uint8(held_out.images)):
        for step, sigma in enumerate(held_out.sigmas[number]):
            if sigma >= EDGES[1]:
                one, seen = image[None], inputs[number, step][None].float()
                output = experts.predict(seen, sigma[None])
                expected.append(TASKS[task].agreement(output, guider.predict(one, clean(one))))
    assert trained.expert == pytest.approx(float(torch.cat(expected).mean()), abs=2e-3)
    assert trained.images == SHARD_SIZE and trained.held_out
    if view == "denoised":
        assert trained.possible is None
    else:
        assert trained.possible == measure_knowledge(guider, make_bank(guider, "denoised"), store)[1].plain


def test_without_images_apart_some_of_the_others_are_measured(tmp_path):
    store, guider = SampleStore(tmp_path, {}), small_guider()
    store.fill(2 * SHARD_SIZE, made)
    measured = measure_knowledge(guider, make_bank(guider), store)
    assert [(each.images, each.held_out) for each in measured] == [(64, False)] * 2
    assert not any(each.uses_plain for each in measured)


def test_images_learned_from_are_measured_as_others_are(store):
    """As one finds them by holding the same images out."""
    guider = small_guider("depth")
    bank = make_bank(guider)
    disturb(bank, 1)
    swapped = KnowledgeTest(guider, bank, store)
    swapped.store = store
    known = KnowledgeTest(guider, bank, store).measure(1)
    assert known.learned == pytest.approx(swapped.measure(1).expert) != known.expert
    assert 0 < known.learned_error < 0.2


def test_whether_more_images_would_help_is_said():
    by_heart, general = replace(KNOWN, learned=0.81, learned_error=0.1), replace(CEILING, learned=0.98, learned_error=0.02)
    assert by_heart.is_learned_by_heart and not general.is_learned_by_heart and not KNOWN.is_learned_by_heart
    bank = make_bank(small_guider())
    remember(bank, (general, by_heart))
    assert "More images would help in 1 of 2" in describe_knowledge(bank) and "81% and 58%" in describe_knowledge(bank)
    remember(bank, (general, KNOWN))
    assert "longer training comes before more images" in describe_knowledge(bank)
    remember(bank, (CEILING, KNOWN))
    assert "images would" not in describe_knowledge(bank)


def test_an_interval_without_steps_is_not_measured(store):
    guider = small_guider()
    bank = ExpertBank(base_network(guider), ExpertSchedule((1e-4, 1e-3, 10.0)), LoraSpec(2))
    nothing, something = measure_knowledge(guider, bank, store)
    assert nothing is None and something is not None
    remember(bank, (nothing, something))
    assert knowledge_of(bank) == (nothing, something) and "not measured" in describe_knowledge(bank)


def test_measuring_can_be_stopped(store):
    """It asks before the first batch."""
    class Stop(Exception):
        pass

    def stop():
        raise Stop
    with pytest.raises(Stop):
        measure_knowledge(small_guider(), make_bank(small_guider()), store, stop)


def test_measuring_works_in_inference_mode(store):
    guider = small_guider()
    bank = make_bank(guider)
    with torch.inference_mode():
        assert measure_knowledge(guider, bank, store) == measure_knowledge(guider, bank, store)


def test_errors_are_those_of_differences_over_images():
    """Steps of one image count as one; of independent ones the error is that of a mean."""
    measured = Agreements(share_of(20), share_of(40), share_of(8))
    found = summarize(measured, IMAGES)
    difference = (measured.expert - measured.plain).double()
    assert found.gain_error == pytest.approx(float(difference.std(correction=0)) / 8)
    assert (found.plain, found.expert, found.commonest, found.images) == (20 / 64, 40 / 64, 8 / 64, 64)
    again = summarize(Agreements(*(part.repeat(4) for part in measured[:3])), IMAGES.repeat(4))
    assert again.gain_error == pytest.approx(found.gain_error) and again.images == 64


# What it comes to

@pytest.mark.parametrize("plain, expert, commonest, verdict", [
    (20, 40, 8, "worth it"), (0, 40, 8, "worth it"), (60, 64, 60, "worth it"), (62, 64, 8, "not needed"),
    (64, 64, 8, "not needed"), (40, 40, 8, "not needed"), (40, 20, 8, "not needed"), (36, 38, 8, "train longer"),
    (8, 30, 29, "train longer"), (8, 8, 8, "train longer"), (0, 0, 8, "train longer"), (64, 64, 64, "not needed")])
def test_the_verdict_follows_from_standard_errors(plain, expert, commonest, verdict):
    found = summarize(Agreements(share_of(plain), share_of(expert), share_of(commonest)), IMAGES)
    assert found.verdict == verdict
    assert found.uses_plain == (verdict == "not needed")
    assert not replace(found, held_out=False).uses_plain


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("space", [None, LatentSpace("four", randn(4, 3), randn(3))])
def test_the_plain_network_is_used_where_no_expert_is_needed(store, view, space):
    """To the bit, and the other expert stays as it is."""
    guider = small_guider()
    bank = make_bank(guider, view, space)
    fresh = with_experts(guider, make_bank(guider, view, space))
    for index in range(2):
        disturb(bank, index)
    kept = {name: weight.clone() for name, weight in bank.weights(1).items()}
    remember(bank, (CEILING, KNOWN))
    experts, seen = with_experts(guider, bank), images() if space is None else randn(3, 4, 5, 7)
    low, high = level(0.5, seen), level(5.0, seen)
    answer, plain = (each.predict(each.to_image(seen, low), low) for each in (experts, fresh))
    assert torch.equal(answer, plain) and same(bank.weights(1), kept)
    assert not torch.equal(experts.predict(experts.to_image(seen, high), high), plain)
    if space is None:
        assert torch.equal(plain, guider.predict(seen, low))


def test_experts_of_latents_are_measured_against_the_colours(tmp_path):
    store, guider, space = SampleStore(tmp_path, {}), small_guider(), LatentSpace("four", randn(4, 3), randn(3))
    store.hold_out().fill(SHARD_SIZE, made_of_latents)
    store.fill(SHARD_SIZE, made_of_latents)
    measured = measure_knowledge(guider, make_bank(guider, space=space), store)
    assert all(each and each.gain_error < 0.05 for each in measured), "a new stem shows the colours, but larger"


@pytest.mark.parametrize("held_out", [True, False])
def test_a_bank_keeps_what_it_knows_in_its_file(tmp_path, held_out):
    guider = small_guider()
    bank = make_bank(guider)
    known = tuple(replace(each, held_out=held_out) for each in (CEILING, KNOWN))
    remember(bank, known)
    save_bank(tmp_path / "x.safetensors", bank, guider)
    again = load_bank(tmp_path / "x.safetensors", guider)
    assert knowledge_of(again) == known and describe_knowledge(again) == describe_knowledge(bank)


@pytest.mark.parametrize("info", [{}, {"steps": 5}, {"knowledge": [None]}, {"knowledge": 3}, {"knowledge": [{"a": 1}] * 2},
                                  {"knowledge": None}])
def test_a_bank_that_does_not_know_says_nothing(info):
    bank = make_bank(small_guider())
    bank.training_info = info
    assert knowledge_of(bank) == (None, None) and describe_knowledge(bank) == ""


def test_words_say_each_range_and_what_to_do():
    bank = make_bank(small_guider())
    remember(bank, (CEILING, KNOWN))
    first, second, conclusion, basis = describe_knowledge(bank).splitlines()
    assert first == "sigma 0.1 to 1: plain 97%, expert 97%, commonest answer 12%: not needed, so the plain network is used"
    assert second == "sigma 1 to 10: plain 31%, expert 58%, commonest answer 12%: worth it"
    assert "worth it in 1 of 2" in conclusion and "not needed in 1 of 2" in conclusion
    assert "train longer" not in conclusion and "64 images" in basis and "did not learn from" in basis
    assert "possible" not in conclusion + basis
    remember(bank, (CEILING, replace(KNOWN, possible=0.66)))
    assert "plain 31%, expert 58%, possible at least 66%, commonest answer 12%: worth it" in describe_knowledge(bank)
    assert "denoised view" in describe_knowledge(bank)
    remember(bank, (replace(CEILING, held_out=False), replace(KNOWN, plain=0.1, expert=0.13, held_out=False)))
    text = describe_knowledge(bank)
    assert "train longer in 1 of 2" in text and "look better than they are" in text and "is used" not in text
