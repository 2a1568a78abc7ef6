"""Ranks end after the same batch, whoever is told to end, and when."""

import random
import threading

import pytest
import torch.distributed as dist

from memlm.parallel.ending import Ending


@pytest.mark.parametrize("seed", range(20))
def test_all_end_after_the_same_batch(seed):
    chance = random.Random(seed)
    ranks = chance.randint(2, 5)
    told = {rank: chance.randint(1, 10) for rank in chance.sample(range(ranks), chance.randint(1, ranks))}
    store, together = dist.HashStore(), threading.Barrier(ranks)
    last = [0] * ranks

    def train(rank):
        ending = Ending(dist.PrefixStore("ending", store))
        for batch in range(1, 20):
            together.wait(timeout=20)  # as the batch's collectives do
            if ending.agreed(batch >= told.get(rank, 100)):
                last[rank] = batch
                return

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert last == [min(told.values()) + 2] * ranks


@pytest.mark.parametrize("seed", range(50))
def test_a_rank_may_be_ahead_of_another_that_has_only_launched_a_batch(seed):
    """As where batches are queued: one's collectives complete once all ranks have ended the one before."""
    chance = random.Random(seed)
    ranks, store = chance.randint(2, 4), dist.HashStore()
    told = {chance.randrange(ranks): chance.randint(1, 8)}
    endings = [Ending(dist.PrefixStore("ending", store)) for _ in range(ranks)]
    asked, last = [0] * ranks, [0] * ranks
    while not all(last):
        able = [rank for rank in range(ranks) if not last[rank] and asked[rank] + 1 <= min(asked) + 2]
        rank = chance.choice(able)
        asked[rank] += 1
        if endings[rank].agreed(asked[rank] >= told.get(rank, 100)):
            last[rank] = asked[rank]
    assert len(set(last)) == 1


def test_nobody_ends_untold():
    ending = Ending(dist.HashStore())
    assert not any(ending.agreed(False) for _ in range(50))
