"""Ranks that were started differently are told which key differs, and which of them has what."""

import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from memlm.errors import ConfigError, DataError, UserError
from memlm.parallel.agreement import agree, claims_of, said_before


def outcomes(claims, seconds=20):
    """What becomes of each rank: None, or its error."""
    store, found = dist.HashStore(), [None] * len(claims)

    def rank(number):
        def own():
            if isinstance(claims[number], Exception):
                raise claims[number]
            return claims[number]

        try:
            agree(store, number, len(claims), own, timedelta(seconds=seconds))
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(claims))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_those_that_are_alike_go_on():
    assert outcomes([{"a": 1, "b": [1, None]}] * 3) == [None] * 3
    assert outcomes([{"a": 1, "b": 2}, {"b": 2, "a": 1}]) == [None] * 2


def test_the_first_key_that_differs_is_named_on_all_ranks():
    claims = [{"same": 0, "model.dim": 16, "lr": number} for number in range(5)]
    claims[3] = claims[3] | {"model.dim": 32}
    found = outcomes(claims)
    assert all(type(error) is ConfigError for error in found)
    assert {str(error) for error in found} == {
        "model.dim: differs between the processes, which must be started alike: it is 16 on ranks 0-2, 4, "
        "32 on rank 3; so do lr"
    }


def test_a_key_that_some_lack():
    found = outcomes([{"a": None}, {}])
    assert "a: differs between" in str(found[1])
    assert "null on rank 0, not set on rank 1" in str(found[1])


def test_long_values_are_cut():
    found = outcomes([{"a": "x" * 1000}, {"a": "y"}])
    assert len(str(found[0])) < 400


def test_an_error_of_one_is_all_ranks_error():
    failing = DataError("shard.bin", "does not exist")
    found = outcomes([{}, failing, {}])
    assert found[1] is failing
    for other in (found[0], found[2]):
        assert type(other) is UserError
        assert str(other) == "rank 1: shard.bin: does not exist"


def test_a_rank_that_does_not_come_is_not_waited_for_without_end():
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError):
        agree(store, 0, 2, dict, timedelta(seconds=0.2))


def test_claims_of_a_trainer():
    trainer = SimpleNamespace(
        lightning_module=object(),
        datamodule=SimpleNamespace(
            fingerprint=lambda: "abc", sequence_length=8, batch_size=4, tokenizer=SimpleNamespace(hash="h")
        ),
        ckpt_path=None, max_steps=3, precision="32-true", accumulate_grad_batches=1, gradient_clip_val=None,
        val_check_interval=2, limit_val_batches=1.0, world_size=2,
    )  # fmt: skip
    strategy = SimpleNamespace(memory_group=2, _own_rank=1, model=object())
    claims = claims_of(trainer, strategy, {"model.dim": 16})
    assert claims["model.dim"] == 16
    assert claims["trainer.max_steps"] == 3
    assert claims["trainer.strategy.init_args.memory_group"] == 2
    assert claims["data (fingerprint of its files and options)"] == "abc"
    assert not any("_own_rank" in key or key.endswith(".model") for key in claims)
    assert list(claims)[:2] == ["memlm", "torch"]
    assert claims["ckpt_path"] is None
    assert claims_of(trainer, strategy, {"ckpt_path": "last.ckpt"})["ckpt_path"] == "last.ckpt"


def test_said_before(monkeypatch):
    assert not said_before("line")  # no launcher
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert [said_before(line) for line in ("line", "line", "another", "line")] == [False, True, False, True]
