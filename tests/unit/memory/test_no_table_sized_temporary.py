"""No step allocates anything of the size of the value table besides values and moments."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memlm.memory import MemoryConfig
from memlm.optim import MemoryAdamW, assign, clip_gradients
from memlm.transformer import Transformer, TransformerConfig


class LargestNewTensor(TorchDispatchMode):
    """Records the largest tensor that any operation makes, views and updates of known tensors aside."""

    def __init__(self, known) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements, self.operation = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known and tensor.numel() > self.elements:
                self.elements, self.operation = tensor.numel(), str(func)
        return result


def build(half_keys: int, value_dim: int, **options):
    torch.manual_seed(0)
    config = TransformerConfig(dim=64, layers=2, heads=2, feed_forward_dim=64)
    memory = MemoryConfig(
        half_keys=half_keys, heads=2, reads=8, value_dim=value_dim, layers=[0, 1], **options
    )
    model = Transformer(20, config, memory)
    groups = [
        {"params": parameters, "name": name, "clip": 0.01, "kind": "memory" if name == "values" else "dense"}
        for name, parameters in assign(model.named_parameters()).items()
    ]
    gradients = {pool.values: pool.gradient for pool in model.pools.values()}
    return model, MemoryAdamW(groups, gradients, weight_decay=0.1)


def step(model, optimizer, micro_batches=2) -> None:
    optimizer.zero_grad()
    for _ in range(micro_batches):
        tokens = torch.randint(20, (2, 4))
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    clip_gradients(optimizer, 0.01)
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{}, {"query_norm": "qk"}, {"pre_values": "gelu"}, {"value_expansion": 2, "half_keys": (256, 512)}],
    ids=str,
)
def test_every_operation_of_a_step_and_of_resuming_stays_small(options):
    model, optimizer = build(**{"half_keys": 256, "value_dim": 64, **options})  # 65,536 x 64 values
    tables = [pool.values for pool in model.pools.values()]
    states = [optimizer.state[table] for table in tables]
    saved = [tensor.clone() for state in states for tensor in state.values()]
    saved_state = optimizer.state_dict()
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    before = [table.detach().clone() for table in tables]
    with LargestNewTensor([*tables, *moments, *saved]) as largest:
        step(model, optimizer)
        step(model, optimizer)
        optimizer.load_state_dict(saved_state)
    for table, old in zip(tables, before, strict=True):
        assert table.shape == (65_536, 64)
        assert 0 < (old != table).any(1).sum() < 2_000  # it did train, some rows
    limit = tables[0].numel() // 50
    assert largest.elements < limit, f"{largest.elements} elements by {largest.operation}"


def test_the_recorder_notices_a_dense_gradient():
    table = torch.zeros(500, 8, requires_grad=True)
    with LargestNewTensor([table]) as largest:
        F.embedding_bag(torch.tensor([[1, 2]]), table, mode="sum").sum().backward()
    assert largest.elements == table.numel()


PEAK = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_no_table_sized_temporary import build, step

def status(name):  # not getrusage, whose peak a process inherits from the one that started it
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def growth(action):
    before = status("VmRSS")
    action()
    return status("VmHWM") - before

step(*build(16, 64))  # code that is loaded on first use
model, optimizer = build(1024, 64)
table = model.pools["main"].values
for name in ("exp_avg", "exp_avg_sq"):  # zeros are not resident before they are written
    optimizer.state[table][name].fill_(1e-8)
print(table.nbytes, growth(lambda: step(model, optimizer)), growth(lambda: torch.ones_like(table)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_of_a_step_with_a_table_of_256_mb():
    run = subprocess.run(
        [sys.executable, "-c", PEAK, __file__.rpartition("/")[0]], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    table, growth, control = map(int, run.stdout.split())
    assert table == 2**28
    assert growth < 0.25 * table
    assert control > 0.9 * table  # what one temporary would have cost
