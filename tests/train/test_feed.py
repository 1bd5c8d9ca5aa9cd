"""The feed: micro-batches in order, in chunks, with all ranks' counts, and an end that all ranks share."""

import json
import os
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from goal_batches import load, random_batch

from goal_ray.errors import StageError
from goal_ray.goal_batch import count_batch, pack
from goal_ray.train.feed import Feed

CPU = torch.device("cpu")


def packed_batch(tokenizer, seed: int) -> bytes:
    return pack(
        {
            name: tensor.numpy()
            for name, tensor in random_batch(tokenizer, seed)._asdict().items()
            if name != "counts_R4"
        }
    )


@pytest.fixture
def packed(tiny_clip):
    tokenizer = load(tiny_clip).tokenizer
    return [packed_batch(tokenizer, seed) for seed in range(6)]


def test_every_micro_batch_comes_once_in_order_with_its_counts(packed, tiny_clip):
    tokenizer = load(tiny_clip).tokenizer
    fed = list(Feed(iter(packed), 2, 1, CPU, lambda: False))
    assert len(fed) == 6
    for seed, micro_batch in enumerate(fed):
        batch = random_batch(tokenizer, seed)
        assert torch.equal(torch.cat([chunk.images_B3SS for chunk in micro_batch.chunks]), batch.images_B3SS)
        assert micro_batch.counts_R4.tolist() == [count_batch(batch).tolist()]
        assert micro_batch.text_lengths == [
            ids.shape[1] for chunk in micro_batch.chunks for ids in (chunk.text_BL, chunk.sentences_ML) for _ in ids
        ]


@pytest.mark.parametrize(("chunks", "waiting"), [(1, 2), (2, 1)])
def test_in_chunks_one_micro_batch_waits_and_no_more(packed, chunks, waiting):
    feed = Feed(iter(packed), chunks, 1, CPU, lambda: False)
    assert feed.ready.maxsize == waiting
    feed.close()


def test_the_feeds_thread_is_on_the_workers_own_device(monkeypatch):
    called = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: called.append((device, threading.current_thread().name))
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: object())
    assert list(Feed(iter(()), 1, 1, torch.device("cuda", 3), lambda: False)) == []
    assert called == [(torch.device("cuda", 3), "feed")]


def test_a_wish_to_stop_ends_the_feed_after_a_whole_optimizer_step(packed):
    asked = iter([False, False, True, False, False, False])
    assert len(list(Feed(iter(packed), 1, 2, CPU, lambda: next(asked)))) == 4


def test_what_the_reader_raises_reaches_the_step(packed):
    def reader():
        yield packed[0]
        raise StageError("too many unreadable samples")

    feed = iter(Feed(reader(), 1, 1, CPU, lambda: False))
    next(feed)
    with pytest.raises(StageError, match="too many unreadable samples"):
        next(feed)


def test_a_micro_batch_with_fewer_pictures_than_chunks_names_the_remedy(packed):
    with pytest.raises(StageError, match="4 pictures cannot be cut into 5 chunks; mend the data, or raise `chunk`"):
        list(Feed(iter(packed), 5, 1, CPU, lambda: False))


def run_rank(rank: int, folder: str, tiny_clip: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    tokenizer = load(tiny_clip).tokenizer
    asked = iter([False, True, False, False, False, False] if rank == 1 else [False] * 6)
    stream = (packed_batch(tokenizer, seed) for seed in range(6))
    counts = [micro_batch.counts_R4.tolist() for micro_batch in Feed(stream, 1, 1, CPU, lambda: next(asked))]
    with open(os.path.join(folder, f"{rank}.json"), "w") as file:
        json.dump(counts, file)
    dist.barrier()
    dist.destroy_process_group()


def test_when_one_rank_is_asked_to_stop_all_end_after_the_same_step(tiny_clip, tmp_path):
    mp.spawn(run_rank, (str(tmp_path), tiny_clip), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [len(counts) for counts in first] == [2, 2]
