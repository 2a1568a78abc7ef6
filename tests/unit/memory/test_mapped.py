"""Tables read from the file that they are mapped from: the same bits, next to nothing resident."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from memlm.errors import CheckpointError
from memlm.memory import EngramConfig, MemoryConfig, MemoryPool, PEERConfig
from memlm.memory.file_rows import file_of
from memlm.memory.mapped import bound_large, bound_residency
from memlm.memory.quantised import FORMATS, QuantisedPool, held_as
from memlm.transformer import Transformer, TransformerConfig

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mapped(state, folder, kind):
    """The same tensors, mapped from a file."""
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors")
        with safe_open(folder / "model.safetensors", "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    torch.save({"state_dict": state}, folder / "last.ckpt")
    return torch.load(folder / "last.ckpt", mmap=True, weights_only=True)["state_dict"]


def reads(slots, tokens, count):
    return torch.randint(slots, (tokens, count), dtype=torch.int32), torch.randn(tokens, count)


@pytest.mark.parametrize("kind", ["safetensors", "checkpoint"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("buffer_bytes", [1, 5000, 2**25])
def test_reads_and_dots_are_the_same_to_the_bit(tmp_path, kind, format, buffer_bytes):
    pool = MemoryPool(700, 24)
    pool.initialise(1.0)
    pool = held_as(pool, format)
    other = copy.deepcopy(pool)
    state = {"filler": torch.randn(1003), **pool.state_dict(), "more": torch.randn(3000)}
    state = mapped(state, tmp_path, kind)
    other.load_state_dict({name: state[name] for name in pool.state_dict()}, assign=True)
    other.requires_grad_(False)
    assert bound_residency(other, buffer_bytes)
    for tokens, count in ((1, 1), (1, 40), (33, 40), (0, 5)):
        slots, weights = reads(700, tokens, count)
        assert torch.equal(other.read(slots, weights), pool.read(slots, weights))
        hidden = torch.randn(tokens, 24)
        assert torch.equal(other.dot(slots.long(), hidden), pool.dot(slots.long(), hidden))


PLANS = {
    "memory": MemoryConfig(half_keys=9, heads=2, reads=4, layers=[0, 1]),
    "peer": PEERConfig(half_keys=9, heads=2, reads=4, key_dim=8, layers=[0, 1]),
    "engram": EngramConfig(slots=300, layers=[0, 1]),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_whole_model_is_the_same_to_the_bit(tmp_path, plan):
    config = TransformerConfig(dim=32, layers=2, heads=2, feed_forward_dim=48)
    model = Transformer(50, config, PLANS[plan])
    model.eval().requires_grad_(False)
    other = copy.deepcopy(model)
    other.load_state_dict(mapped(model.state_dict(), tmp_path, "checkpoint"), assign=True)
    other.requires_grad_(False)
    total = sum(pool.values.nbytes for pool in other.pools.values())
    assert bound_large(other.pools.values(), total) == total
    assert all(pool.file_rows is None for pool in other.pools.values())
    assert bound_large(other.pools.values(), 0) == 0
    assert all(pool.file_rows is not None for pool in other.pools.values())
    tokens = torch.randint(50, (3, 20))
    assert torch.equal(other(tokens), model(tokens))
    assert torch.equal(copy.deepcopy(other)(tokens), model(tokens))


def test_what_is_not_mapped_is_left_as_it_is():
    pool = MemoryPool(10, 4).requires_grad_(False)
    assert file_of(pool.values) is None
    assert not bound_residency(pool)
    assert bound_large([pool], 0) == pool.values.nbytes
    assert pool.file_rows is None


def test_values_that_are_trained_are_refused(tmp_path):
    pool = MemoryPool(10, 4)
    pool.load_state_dict(mapped(pool.state_dict(), tmp_path, "checkpoint"), assign=True)
    pool.requires_grad_(True)
    with pytest.raises(ValueError, match="trained"):
        bound_residency(pool)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_is_another_by_now_is_refused(tmp_path, how):
    pool = MemoryPool(3000, 4).requires_grad_(False)
    pool.load_state_dict(mapped(pool.state_dict(), tmp_path, "checkpoint"), assign=True)
    file = tmp_path / "last.ckpt"
    if how == "deleted":
        file.unlink()
    else:
        (tmp_path / "new.ckpt").write_bytes(b"\1" * file.stat().st_size)
        os.replace(tmp_path / "new.ckpt", file)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: was replaced while it was read"):
        bound_residency(pool.requires_grad_(False))


def test_a_file_that_is_replaced_later_is_read_on(tmp_path):
    """As a run's last.ckpt is while the run goes on."""
    pool = MemoryPool(300, 4)
    pool.initialise(1.0)
    before = copy.deepcopy(pool)
    pool.load_state_dict(mapped(pool.state_dict(), tmp_path, "checkpoint"), assign=True)
    bound_residency(pool.requires_grad_(False))
    (tmp_path / "new.ckpt").write_bytes(b"\1" * 10)
    os.replace(tmp_path / "new.ckpt", tmp_path / "last.ckpt")
    slots, weights = reads(300, 20, 30)
    assert torch.equal(pool.read(slots, weights), before.read(slots, weights))


def test_a_file_that_is_cut_short_is_named(tmp_path):
    pool = MemoryPool(3000, 64).requires_grad_(False)
    pool.load_state_dict(mapped(pool.state_dict(), tmp_path, "checkpoint"), assign=True)
    bound_residency(pool.requires_grad_(False))
    os.truncate(tmp_path / "last.ckpt", 100_000)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: ends before byte"):
        pool.read(torch.tensor([[2999]]), torch.ones(1, 1))


def test_quantised_pools_are_bounded_too(tmp_path):
    pool = QuantisedPool(50, 4, "int8")
    pool.values, pool.scales = torch.randint(-127, 128, (50, 4), dtype=torch.int8), torch.rand(50)
    pool.load_state_dict(mapped(pool.state_dict(), tmp_path, "safetensors"), assign=True)
    assert bound_large([pool], 0) == 0


# What a process holds at most, while it reads a table much larger than that in every way that could hold it.
_READING = """
import json, sys, torch
from memlm.memory import MemoryPool
from memlm.memory.mapped import bound_residency
from memlm.memory.quantised import QuantisedPool

file, rows, dim, bounded = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "bounded"

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

with torch.device("meta"):
    pool = MemoryPool(rows, dim)
storage = torch.UntypedStorage.from_file(file, False, rows * dim * 4)
pool.load_state_dict({"values": torch.tensor([]).set_(storage).view(rows, dim)}, assign=True)
pool.requires_grad_(False)
pool.read(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
before = status("VmRSS")
if bounded:
    assert bound_residency(pool, 2**24)
generator = torch.Generator().manual_seed(0)
total = 0.0
for tokens in (1, 1, 1, 200, 600):  # decoding, and prompts
    slots = torch.randint(rows, (tokens, 128), generator=generator)
    total += float(pool.read(slots, torch.ones(slots.shape)).double().sum())
    total += float(pool.dot(slots, torch.ones(tokens, dim)).double().sum())
print(json.dumps({"before": before, "peak": status("VmHWM"), "total": total}))
"""


def peak(file, rows, dim, how):
    command = [sys.executable, "-c", _READING, str(file), str(rows), str(dim), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_sparse_table_of_8_gb_stays_on_the_disk(tmp_path):
    file = tmp_path / "table"
    with open(file, "wb") as sparse:
        os.truncate(sparse.fileno(), 2**33)
    found = peak(file, 2**23, 256, "bounded")
    assert found["peak"] - found["before"] < 128
    assert found["peak"] < 1536
    assert found["total"] == 0


@pytest.mark.slow
def test_a_table_in_the_kernels_cache_stays_there(tmp_path):
    """Here page faults map what lies around a row, and a plain read makes the whole table resident."""
    file, rows = tmp_path / "table", 300_000
    with open(file, "wb") as table:
        for _ in range(30):
            table.write(torch.randn(rows // 30, 256).numpy().tobytes())
    bounded, plain = peak(file, rows, 256, "bounded"), peak(file, rows, 256, "mapped")
    assert bounded["total"] == plain["total"]
    assert plain["peak"] - plain["before"] > 200  # or this test says nothing
    assert bounded["peak"] - bounded["before"] < 128
