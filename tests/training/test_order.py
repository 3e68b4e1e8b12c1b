"""What an epoch shows, and how often: exact counts, whatever the weights and however shards are grouped."""

import fcntl
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import write_shards

from lodeset.pipeline.errors import LodesetError
from lodeset.training.cache import ShardCache
from lodeset.training.config import CacheConfig, TrainingConfig, identity_of
from lodeset.training.data import Batches, load_batches
from lodeset.training.index import Shards, open_index, weights_of
from lodeset.training.launch import train_inline
from lodeset.training.order import Blocks, Order, times


def test_an_epoch_is_a_permutation_without_its_incomplete_batch() -> None:
    order = Order(images=22, batch=8, seed=3)
    epochs = [np.concatenate([order.rows(2 * epoch + s) for s in range(2)]) for epoch in range(2)]
    for rows in epochs:
        assert len(set(rows.tolist())) == 16
    assert not np.array_equal(epochs[0], epochs[1])
    assert sorted(order.epoch(0).tolist()) == list(range(22))


def test_weights_say_how_often_an_epoch_shows_an_image() -> None:
    weights = np.array([0.0, 0.25, 1.0, 1.5, 3.0] * 40)
    shown = np.stack([times(weights, np.random.default_rng(seed)) for seed in range(400)])
    assert (shown >= np.floor(weights)).all() and (shown <= np.ceil(weights)).all()
    assert set(shown.sum(axis=1)) == {230}
    deviation = np.sqrt(0.25 / 400)  # of a mean over 400 epochs of what is rounded up half of the time
    assert np.abs(shown.mean(axis=0) - weights).max() < 5 * deviation

    order = Order(200, 10, 0, weights)
    assert order.steps == 23  # 5.75 of every five images
    rows = Counter(order.epoch(1).tolist())
    assert sum(rows.values()) == order.places == 230 and all(rows[i] == 3 for i in range(4, 200, 5))


def test_what_is_over_of_the_sum_of_weights_is_left_out() -> None:
    weights = np.array([1.0] * 100 + [0.5, 0.1, 0.1])
    shown = np.stack([times(weights, np.random.default_rng(seed)) for seed in range(300)])
    assert (shown[:, :100] == 1).all() and not shown[:, 100:].any() and Order(103, 7, 0, weights).places == 100
    many = np.full(1000, 0.1)  # whose sum is 99.99999999999986
    assert times(many, np.random.default_rng(0)).sum() == Order(1000, 7, 0, many).places == 100


def test_weights_of_one_are_no_weights() -> None:
    one = Order(50, 8, 7, np.ones(50))
    assert np.array_equal(one.epoch(3), Order(50, 8, 7).epoch(3))


@pytest.mark.parametrize("weighed", [False, True])
def test_blocks_are_whole_shards_that_fit_and_each_is_shuffled(weighed: bool) -> None:
    rng = np.random.default_rng(0)
    shard = rng.integers(0, 12, 600).astype(np.int32)
    sizes = np.array([30] * 11 + [500])  # the last one is larger than a block may be
    weights = np.full(600, 1.5) if weighed else None
    order = Order(600, 16, 1, weights, Blocks(shard, sizes, limit_bytes=100))
    epochs = [order.epoch(e) for e in range(3)]
    for rows in epochs:
        seen = Counter(rows.tolist())
        assert len(seen) == 600 and set(seen.values()) <= ({1, 2} if weighed else {1})
        blocks: list[set[int]] = []
        for one in shard[rows].tolist():  # a new block begins where a shard comes that was not in the last one
            if not blocks or one not in blocks[-1]:
                start = not blocks or sum(sizes[list(blocks[-1])]) + sizes[one] > 100
                blocks.append(set()) if start else None
                blocks[-1].add(one)
        assert sorted(one for block in blocks for one in block) == list(range(12))  # none comes twice
        assert all(sum(sizes[list(block)]) <= 100 or len(block) == 1 for block in blocks)
    assert not np.array_equal(epochs[0], epochs[1])


def test_blocks_come_with_the_one_after_them() -> None:
    shard = np.repeat(np.arange(6, dtype=np.int32), 10)
    order = Order(60, 5, 0, None, Blocks(shard, np.full(6, 40), limit_bytes=80))
    for step in range(order.steps):
        now, soon = order.shards_at(step)
        assert set(shard[order.rows(step)[:1]]) <= set(now) and not set(now) & set(soon)
        later = order.shards_at(step + 4)[0]  # four steps are a block
        assert np.array_equal(soon, later)


def test_every_image_has_the_weight_of_the_most_generous_set_that_wants_it(
    tmp_path: Path, index_url: str, payloads: list[bytes]
) -> None:
    index = open_index([index_url])
    ids = [index.image_id(row) for row in range(4)] + ["f" * 32]  # the last one is in no shard
    rows = [
        (ids[0], "a"),
        (ids[0], "b"),
        (ids[1], "b"),
        (ids[2], "c"),
        (ids[3], "none"),
        (ids[2], "none"),
        (ids[4], "a"),
    ]
    columns = dict(zip(("image_id", "set"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "selected.parquet")
    weights = weights_of(index, [str(tmp_path / "selected.parquet")], {"a": 2.0, "b": 0.5, "c": 0.0})
    assert weights.tolist() == [2.0, 0.5, 1.0] + [1.0] * 19  # the third one is wanted by a set that is shown once
    muted = weights_of(index, [str(tmp_path / "selected.parquet")], {"c": 0.0, "none": 0.5})
    assert muted.tolist() == [1.0, 1.0, 0.5, 0.5] + [1.0] * 18
    assert weights_of(index, [str(tmp_path / "selected.parquet")], {"z": 2.0}).tolist() == [1.0] * 22
    with pytest.raises(LodesetError, match="selected"):
        weights_of(index, [], {"a": 2.0})
    with pytest.raises(LodesetError, match="nowhere"):
        weights_of(index, [str(tmp_path / "nowhere.parquet")], {"a": 2.0})


def test_a_run_with_weights_shows_what_they_say_and_is_another_run(
    tmp_path: Path, shards: Shards, small: TrainingConfig
) -> None:
    index = open_index(shards.index)
    told = {"image_id": [index.image_id(row) for row in range(16)], "set": ["loud"] * 8 + ["mute"] * 8}
    pq.write_table(pa.table(told), tmp_path / "selected.parquet")
    weighed = small.model_copy(update={"mix": {"loud": 3.0, "mute": 0.0}})
    data = Shards(index=shards.index, selected=(str(tmp_path / "selected.parquet"),))
    weights = weights_of(index, data.selected, weighed.mix)
    batches = Batches(index, weighed, 0, 1, weights)
    assert batches.order.places == 30 and batches.order.steps == 3
    assert not set(np.concatenate([batches.order.rows(s) for s in range(6)]).tolist()) & set(range(8, 16))
    sizes = index.size_bytes.copy()
    sizes[7] = 10  # the last loud one; what follows in the index is mute
    damaged = Batches(replace(index, size_bytes=sizes), weighed, 0, 1, weights)
    stand_ins = [damaged.load(step).image_ids for step in range(3)]
    assert any(damaged.load(step).skipped for step in range(3))
    assert not {index.image_id(row) for row in range(8, 16)} & {one for ids in stand_ins for one in ids}
    assert train_inline(weighed, data, tmp_path / "run")["images_seen"] == 48
    with pytest.raises(LodesetError, match="other settings"):
        train_inline(small, data, tmp_path / "run")
    nothing = np.where(np.arange(22) < 7, 1.0, 0.0)
    with pytest.raises(
        LodesetError, match=r"7 images \(22 of them, weighted by training.mix\) are fewer than one batch"
    ):
        Batches(index, weighed, 0, 1, nothing)


def waited(cache: ShardCache) -> None:
    copying = cache._copying
    if copying is not None:
        copying.join(timeout=60)
        assert not copying.is_alive()


def test_a_cache_holds_two_blocks_and_changes_no_batch(
    tmp_path: Path, payloads: list[bytes], small: TrainingConfig
) -> None:
    far = open_index([write_shards(tmp_path / "far", payloads, shards=8)])
    largest = int(far.extents().max())
    config = small.model_copy(
        update={"cache": CacheConfig(folder=str(tmp_path / "near"), size_gb=4.5 * largest / 2**30)}
    )
    batches = Batches(far, config, 0, 1)
    assert batches.order.blocks is not None and batches.cache is not None
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "other").write_text("left alone")
    seen = []
    for step in range(6):
        before = batches.load(step)  # what is not here yet comes from the source
        waited(batches.cache)
        after = batches.load(step)
        assert before.image_ids == after.image_ids and before.global_crops.equal(after.global_crops)
        now, soon = batches.order.shards_at(step)
        expected = {batches.cache.path(int(shard)).name for shard in (*now, *soon)} | {"other"}
        assert {path.name for path in (tmp_path / "near").iterdir()} == expected
        assert sum(path.stat().st_size for path in (tmp_path / "near").glob("*.shard")) <= 4.5 * largest + 8 * 10240
        seen.append(before)
    loaded = config.model_copy(update={"loader_processes": 2})
    again = list(load_batches(Batches(far, loaded, 0, 1), 0))
    assert all(a.global_crops.equal(b.global_crops) for a, b in zip(again, seen, strict=True))

    # A run goes on only where its blocks are the same; where all fits, the cache says nothing of the order.
    train_inline(config, Shards(index=(str(tmp_path / "far/index.parquet"),)), tmp_path / "run")
    repacked = write_shards(tmp_path / "repacked", payloads, shards=6)
    with pytest.raises(LodesetError, match=r"other settings .*blocks"):
        train_inline(config, Shards(index=(repacked,)), tmp_path / "run")

    # Once it is here, the source is not needed.
    roomy = config.model_copy(update={"cache": CacheConfig(folder=str(tmp_path / "near"), size_gb=1)})
    whole = Batches(far, roomy, 0, 1)
    assert np.array_equal(whole.order.epoch(0), Batches(far, small, 0, 1).order.epoch(0))
    assert identity_of(roomy) == identity_of(small)
    assert whole.order.blocks is None and whole.cache is not None
    first = whole.load(0)
    waited(whole.cache)
    for path in (tmp_path / "far").glob("*.tar"):
        path.unlink()
    assert whole.load(0).global_crops.equal(first.global_crops)


def test_a_cache_passes_over_what_others_copy_and_what_was_cut_short(tmp_path: Path, payloads: list[bytes]) -> None:
    far = open_index([write_shards(tmp_path / "far", payloads)])
    cache = ShardCache(tmp_path / "near", far.shards, far.extents().tolist())
    (tmp_path / "near").mkdir()
    cache.path(0).with_suffix(".part").write_bytes(b"half of a shard, from a process that was killed")
    with open(cache.path(1).with_suffix(".part"), "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        cache.want([0, 1], [])
        waited(cache)
        assert cache.path(0).read_bytes() == fsspec.open(far.shards[0]).open().read()
        rewritten = [size + (shard == 0) for shard, size in enumerate(far.extents().tolist())]
        assert ShardCache(tmp_path / "near", far.shards, rewritten).read(0, 0, 10) is None
        assert not cache.path(1).exists() and cache.read(1, 0, 10) is None
    cache.want([1], [])
    waited(cache)
    assert cache.path(1).exists() and not cache.path(0).exists()


def test_a_cache_that_cannot_be_written_is_none(
    tmp_path: Path, index_url: str, small: TrainingConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    config = small.model_copy(update={"cache": CacheConfig(folder=str(tmp_path / "file" / "near"), size_gb=1)})
    batches = Batches(open_index([index_url]), config, 0, 1)
    plain = Batches(open_index([index_url]), small, 0, 1)
    assert batches.load(0).global_crops.equal(plain.load(0).global_crops)
    assert batches.cache is not None
    waited(batches.cache)
    assert "shards are currently not copied to" in caplog.text
