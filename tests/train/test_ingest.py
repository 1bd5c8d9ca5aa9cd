"""What the workers read: the scan of the shards, and the stream of micro-batches."""

import json
from dataclasses import replace

import numpy as np
import pytest
from paired_shards import write_shards

from goal_ray.errors import ShardError
from goal_ray.goal_batch import unpack
from goal_ray.model import load_model
from goal_ray.order import BatchOrder
from goal_ray.settings import LossConfig, ModelConfig
from goal_ray.shard_urls import expand_shards
from goal_ray.tars import write_tar
from goal_ray.train import ingest, scan
from goal_ray.train.config import DataConfig, TrainConfig
from goal_ray.train.ingest import BatchReader, pickled, stream_batches
from goal_ray.train.loop import build_examples
from goal_ray.train.scan import read_sample, scan_shard, scan_shards

BATCH = 4


def make_reader(folder, tiny_clip, rank=0, ranks=1, pairs=1, loss=None, accumulate=1, **fields) -> BatchReader:
    urls = tuple(expand_shards(str(folder)))
    loss = loss or LossConfig()
    config = TrainConfig(ModelConfig(tiny_clip), DataConfig(str(folder), pairs_per_image=pairs), loss)
    counts = tuple(len(scan_shard(url, loss.needs_pairs)) for url in urls)
    order = BatchOrder(counts, BATCH * ranks * accumulate, seed=3, window_shards=16)
    builder = pickled(build_examples(config, load_model(config.model)))
    return BatchReader(urls, order, rank, ranks, accumulate, builder, **fields)


def captions(batch) -> list[bytes]:
    """Every picture's caption, as bytes without their padding."""
    return sorted(np.trim_zeros(row.numpy(), "b").tobytes() for row in batch.text_BL)


def read(reader, first, last):
    return [packed for packed, _ in stream_batches(reader, first, last)]


@pytest.mark.usefixtures("cluster")
def test_a_stream_spans_epochs_and_may_start_anywhere(tmp_path, tiny_clip):
    reader = make_reader(write_shards(tmp_path), tiny_clip)
    whole = read(reader, 0, 20)  # 9 micro-batches an epoch
    assert len(whole) == 20
    assert captions(unpack(whole[0])) != captions(unpack(whole[9]))
    assert read(reader, 7, 20) == whole[7:]


@pytest.mark.usefixtures("cluster")
def test_a_stream_is_the_reader_s_batches_byte_for_byte_whoever_found_the_samples(tmp_path, tiny_clip, monkeypatch):
    monkeypatch.setattr(ingest, "SAMPLES_PER_TASK", 3 * BATCH)  # 3 micro-batches a task, so that the last has only 2
    folder = write_shards(tmp_path)
    alone = make_reader(folder, tiny_clip)
    found = scan_shards(alone.urls, needs_pairs=True)
    shared = replace(alone, indexes=found.indexes)
    expected = [alone({"id": number})["batch"] for number in range(2, 13)]
    assert list(found.counts) == [20, 17]
    for reader in (alone, shared):
        assert read(reader, 2, 13) == expected


@pytest.mark.usefixtures("cluster")
def test_a_stream_longer_than_one_execution_goes_on_without_a_gap(tmp_path, tiny_clip, monkeypatch):
    monkeypatch.setattr(ingest, "SAMPLES_PER_TASK", BATCH)
    monkeypatch.setattr(ingest, "STREAM_TASKS", 3)
    reader = make_reader(write_shards(tmp_path), tiny_clip)
    expected = [reader({"id": number})["batch"] for number in range(5)]
    assert read(reader, 0, 5) == expected


def test_texts_of_a_batch_are_as_long_as_a_multiple_says(tmp_path, tiny_clip):
    reader = make_reader(write_shards(tmp_path), tiny_clip, text_multiple=32)
    assert unpack(reader({"id": 0})["batch"]).text_BL.shape[1] == 32


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_sample_is_read_with_the_members_that_training_uses(place, tmp_path, request):
    folder = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    members = {"mask.npy": b"m" * 700, "JPG": b"picture", "seg.png": b"s" * 10, "txt": b"A cat.", "pairs.json": b"{}"}
    samples = [("a", {"png": b"p", "txt": b"A."}), ("ä/b", {**members, "json": b"[]"}), ("bad", {"txt": b"B."})]
    write_tar(f"{folder}/one.tar", iter(samples))
    index = scan_shard(f"{folder}/one.tar", needs_pairs=False)
    assert [index.key(number) for number in range(len(index))] == ["a", "ä/b"]
    assert [record["key"] for record in index.bad] == ["bad"]
    first, second = (read_sample(f"{folder}/one.tar", index, number) for number in range(2))
    assert (first.key, first.members) == ("a", {"png": b"p", "txt": b"A."})
    assert second.members == {"jpg": b"picture", "txt": b"A cat.", "pairs.json": b"{}"}


def test_an_index_takes_less_than_a_hundred_bytes_a_sample(tmp_path):
    write_tar(str(tmp_path / "x.tar"), ((f"sample-{n:09d}", {"jpg": b"p", "txt": b"t"}) for n in range(200)))
    index = scan_shard(str(tmp_path / "x.tar"), needs_pairs=False)
    arrays = (index.keys_S, index.members_SM, index.places_SM2)
    assert sum(array.nbytes for array in arrays) < 100 * len(index)


def test_two_workers_see_the_batch_that_one_sees(tmp_path, tiny_clip):
    folder = write_shards(tmp_path)
    layouts = {(ranks, accumulate): [] for ranks, accumulate in ((1, 2), (2, 1))}
    for (ranks, accumulate), seen in layouts.items():
        for rank in range(ranks):
            reader = make_reader(folder, tiny_clip, rank, ranks, accumulate=accumulate)
            for part in range(accumulate):
                seen += captions(unpack(reader({"id": 5 * accumulate + part})["batch"]))
    assert len(layouts[1, 2]) == 2 * BATCH
    assert sorted(layouts[1, 2]) == sorted(layouts[2, 1])


def test_every_picture_brings_as_many_pairs_as_asked(tmp_path, tiny_clip):
    batch = unpack(make_reader(write_shards(tmp_path), tiny_clip, pairs=2)({"id": 0})["batch"])
    assert batch.sample_index_M.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(batch.crops_M3SS) == len(batch.sentences_ML) == 2 * BATCH
    assert (batch.spans_M2[:, 1] > batch.spans_M2[:, 0]).all()


def test_without_local_terms_pairs_are_neither_needed_nor_read(tmp_path, tiny_clip):
    loss = LossConfig(weight_local=0, weight_tsl_image=0, weight_tsl_text=0)
    reader = make_reader(write_shards(tmp_path, without="pairs.json"), tiny_clip, loss=loss)
    batch = unpack(reader({"id": 0})["batch"])
    assert len(batch.images_B3SS) == BATCH
    assert len(batch.sample_index_M) == 0


def test_unreadable_samples_are_left_out_of_their_batch_and_named(tmp_path, tiny_clip):
    broken = ["0-3", "1-5"]
    reader = make_reader(write_shards(tmp_path, undecodable=broken), tiny_clip)
    results = [reader({"id": number}) for number in range(9)]
    bad = [record for result in results for record in json.loads(result["bad"])]
    missing = sum(BATCH - len(unpack(result["batch"]).images_B3SS) for result in results)
    assert {record["key"] for record in bad} <= set(broken)
    assert len(bad) == missing >= 1
    assert all(record["stage"] == "decode" and "picture" in record["reason"] for record in bad)


@pytest.mark.usefixtures("cluster")
def test_the_scan_counts_usable_samples_and_names_the_others(tmp_path):
    folder = write_shards(tmp_path / "shards", (3,))
    write_tar(str(folder / "train-1.tar"), iter([("no-picture", {"txt": b"A cat."}), ("no-text", {"png": b"..."})]))
    found = scan_shards(expand_shards(str(folder)), needs_pairs=False)
    assert found.counts == [3, 0]
    assert [record["key"] for record in found.bad] == ["no-picture", "no-text"]


@pytest.mark.usefixtures("cluster")
def test_the_scan_of_unpaired_shards_says_to_run_lism(tmp_path):
    found = scan_shards(expand_shards(str(write_shards(tmp_path, (3,), without="pairs.json"))), needs_pairs=True)
    assert found.counts == [0]
    assert len(found.bad) == 3
    assert all("goal-ray lism" in record["reason"] for record in found.bad)


@pytest.mark.usefixtures("cluster")
def test_a_truncated_tar_is_refused(tmp_path):
    folder = write_shards(tmp_path)
    tar = folder / "train-1.tar"
    tar.write_bytes(tar.read_bytes()[:-3000])
    with pytest.raises(ShardError, match=r"train-1\.tar: corrupt or truncated tar"):
        scan_shards(expand_shards(str(folder)), needs_pairs=True)


def test_the_scan_leaves_out_a_sample_with_a_member_that_is_too_large(tmp_path, monkeypatch):
    write_tar(
        str(tmp_path / "x.tar"), iter([("a", {"jpg": b"p" * 4001, "txt": b"A."}), ("b", {"jpg": b"p", "txt": b"B."})])
    )
    monkeypatch.setattr(scan, "LARGEST_MEMBER_BYTES", 4000)
    index = scan_shard(str(tmp_path / "x.tar"), needs_pairs=False)
    assert [index.key(number) for number in range(len(index))] == ["b"]
    assert [record["key"] for record in index.bad] == ["a"]


def test_the_scan_leaves_out_a_sample_whose_members_stand_far_apart(tmp_path, monkeypatch):
    far, near = {"jpg": b"p", "mp4": b"v" * 4000, "txt": b"A."}, {"jpg": b"p", "txt": b"B.", "mp4": b"v" * 4000}
    write_tar(str(tmp_path / "x.tar"), iter([("a", far), ("b", near)]))
    monkeypatch.setattr(scan, "LARGEST_MEMBER_BYTES", 2000)
    index = scan_shard(str(tmp_path / "x.tar"), needs_pairs=False)
    assert [index.key(number) for number in range(len(index))] == ["b"]
    assert "side by side" in index.bad[0]["reason"]
