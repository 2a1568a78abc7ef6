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
    assert last == [min(told.values()) + 1] * ranks


def test_nobody_ends_untold():
    ending = Ending(dist.HashStore())
    assert not any(ending.agreed(False) for _ in range(50))
