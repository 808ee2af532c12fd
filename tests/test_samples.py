"""The store of generated images: resumable, whole shards only, one recipe for each folder."""
import pytest
import torch
from helpers import full_disk, randn, says

from ppap_core.samples import SHARD, SampleStore, from_uint8, to_uint8
from ppap_core.sampling import karras_sigmas, sample_heun, seeded_noise

SHAPE = (3, 5, 7)
RECIPE = {"model": "gaussian", "steps": 4, "seed": 11}


def generate(seeds: list[int]) -> torch.Tensor:
    """A real sampling, of a Gaussian around zero."""
    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x * (0.2 / (0.2 + sigma**2))[:, None, None, None]
    return sample_heun(denoise, seeded_noise(seeds, SHAPE) * 5.0, karras_sigmas(4, 0.1, 5.0))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_byte_value_survives_the_way_to_an_image_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)
    assert from_uint8(values)[[0, 255]].tolist() == [-1.0, 1.0]
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.999, 1.0, 9.0])).tolist() == [0, 0, 255, 255, 255]


def test_a_store_is_filled_by_whole_shards_with_the_images_of_its_seeds(tmp_path):
    store, asked = SampleStore(tmp_path / "a", RECIPE), []
    store.fill(SHARD + 1, lambda seeds: asked.extend(seeds) or generate(seeds))
    assert len(store) == 2 * SHARD and asked == list(range(11, 11 + 2 * SHARD))
    assert store.images.shape == (2 * SHARD, *SHAPE) and store.images.dtype == torch.uint8
    torch.testing.assert_close(from_uint8(store.images), generate(asked).clamp(-1, 1), rtol=0, atol=1 / 127)


def test_an_image_depends_on_its_seed_and_not_on_the_size_of_the_batch():
    together = generate(list(range(5)))
    for seed in range(5):
        torch.testing.assert_close(generate([seed])[0], together[seed], rtol=0, atol=1e-6)


def test_a_store_that_holds_enough_generates_nothing(tmp_path):
    SampleStore(tmp_path, RECIPE).fill(SHARD, generate)
    def fail(seeds):
        raise AssertionError("generated again")
    SampleStore(tmp_path, RECIPE).fill(SHARD, fail)


@pytest.mark.parametrize("where", ["in a shard", "after a shard", "while writing"])
def test_a_fill_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, where, monkeypatch):
    SampleStore(tmp_path / "straight", RECIPE).fill(2 * SHARD, generate)
    store = SampleStore(tmp_path / "stopped", RECIPE)

    def stop(*_):
        raise InterruptedError
    with pytest.raises((InterruptedError, OSError)):
        if where == "after a shard":
            store.fill(2 * SHARD, generate, on_shard=stop)
        else:
            store.fill(SHARD, generate)
            if where == "while writing":
                monkeypatch.setattr("ppap_core.files.os.replace", stop)
            store.fill(2 * SHARD, stop if where == "in a shard" else generate)
    monkeypatch.undo()
    assert len(store) == SHARD and len(contents(tmp_path / "stopped")) == 2
    again = SampleStore(tmp_path / "stopped", RECIPE)
    again.fill(2 * SHARD, generate)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def test_a_fill_reports_each_shard_after_it_is_safe(tmp_path):
    store, seen = SampleStore(tmp_path, RECIPE), []
    store.fill(2 * SHARD, generate, on_shard=lambda count, new: seen.append((count, len(new), len(store))))
    assert seen == [(SHARD, SHARD, SHARD), (2 * SHARD, SHARD, 2 * SHARD)]


def test_images_added_later_are_seen(tmp_path):
    store = SampleStore(tmp_path, RECIPE)
    store.fill(SHARD, generate)
    assert len(store.images) == SHARD
    store.fill(2 * SHARD, generate)
    assert len(store.images) == 2 * SHARD


@pytest.mark.parametrize("other, words", [
    (RECIPE | {"steps": 5}, ["steps is 4, expected 5"]),
    (RECIPE | {"cfg": 7.0}, ["cfg is None, expected 7.0"]),
    ({"model": "gaussian", "steps": 4}, ["seed is 11, expected None"]),
])
def test_a_folder_of_another_recipe_is_refused_and_left_alone(tmp_path, other, words):
    SampleStore(tmp_path / "mine", RECIPE).fill(SHARD, generate)
    kept = contents(tmp_path / "mine")
    with says(ValueError, "mine", *words):
        SampleStore(tmp_path / "mine", other)
    assert contents(tmp_path / "mine") == kept


@pytest.mark.parametrize("recipe", [{"size": (20, 28), "seed": 0}, {"sigma_max": 80.0}, {"nested": {"a": [1, (2, 3)]}}])
def test_a_store_knows_its_own_recipe_again(tmp_path, recipe):
    assert SampleStore(tmp_path, recipe).recipe == SampleStore(tmp_path, recipe).recipe


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\x00\xff"])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin1"))
    with says(ValueError, "manifest.json", "JSON"):
        SampleStore(tmp_path, RECIPE)


def test_an_empty_store_is_refused(tmp_path):
    with says(ValueError, "empty", "no images"):
        SampleStore(tmp_path / "empty", RECIPE).batch(0, 4, 0)


def test_a_truncated_shard_is_refused_by_name(tmp_path):
    store = SampleStore(tmp_path, RECIPE)
    store.fill(SHARD, generate)
    shard = next(tmp_path.glob("shard_*"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with says(ValueError, shard.name, "cannot be read"):
        SampleStore(tmp_path, RECIPE).batch(0, 4, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_not_stored(tmp_path, value):
    def broken(seeds):
        out = generate(seeds)
        out[3, 1, 2, 2] = value
        return out
    store = SampleStore(tmp_path, RECIPE)
    with says(ValueError, "NaN", "precision"):
        store.fill(SHARD, broken)
    assert len(store) == 0 and not list(tmp_path.glob("shard_*"))


def test_a_batch_is_a_function_of_step_size_and_seed(tmp_path):
    store = SampleStore(tmp_path, RECIPE)
    store.fill(2 * SHARD, generate)
    first = store.batch(3, 6, 5)
    assert first.shape == (6, *SHAPE) and first.abs().max() <= 1
    store.batch(4, 6, 5)
    assert torch.equal(SampleStore(tmp_path, RECIPE).batch(3, 6, 5), first)
    for other in (store.batch(4, 6, 5), store.batch(3, 6, 6)):
        assert not torch.equal(other, first)


def test_batches_reach_every_image(tmp_path):
    store = SampleStore(tmp_path, RECIPE)
    images = torch.arange(2 * SHARD, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1) / 127.5 - 1
    store.fill(2 * SHARD, lambda seeds: images[[seed - 11 for seed in seeds]])
    drawn = torch.cat([store.batch(step, 32, 0) for step in range(60)])[:, 0, 0, 0]
    assert len(to_uint8(drawn).unique()) == 2 * SHARD


@pytest.mark.parametrize("seed", [2**32 - 1, 2**63, 2**64 - 1])
def test_any_seed_that_comfyui_gives_fills_a_store_and_draws_batches(tmp_path, seed):
    store = SampleStore(tmp_path, RECIPE | {"seed": seed})
    store.fill(SHARD, generate)
    assert not torch.equal(store.batch(0, 4, seed), store.batch(0, 4, seed - 1))


def test_nothing_of_a_shard_is_left_behind_when_the_disk_is_full(tmp_path):
    store = SampleStore(tmp_path, RECIPE)
    with full_disk(), says(OSError, "shard_00000", "Free some disk space"):
        store.fill(SHARD, generate)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_stored_images_are_the_ones_generated_up_to_rounding(tmp_path):
    store = SampleStore(tmp_path, RECIPE)
    store.fill(SHARD, lambda seeds: randn(len(seeds), *SHAPE, seed=seeds[0]).tanh())
    assert (from_uint8(store.images) - randn(SHARD, *SHAPE, seed=11).tanh()).abs().max() <= 0.5 / 127.5 + 1e-6
