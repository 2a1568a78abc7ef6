"""Sharded checkpoints as one file: every bit as the ranks had it, in little memory, and nothing half done."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from memlm.__main__ import main
from memlm.errors import CheckpointError, DataError
from memlm.parallel import consolidate as module
from memlm.parallel import sharded_checkpoint
from memlm.parallel.consolidate import consolidate
from memlm.parallel.folder_swap import put_in_place
from memlm.parallel.sharded_checkpoint import StoredTensor, read_tensors

SCRIPT = Path(__file__).with_name("write_folder.py")
sys.path.insert(0, str(SCRIPT.parent))

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
ARCHITECTURE = {"class_path": "memlm.MemoryLM", "vocab_size": 7, "transformer": {"tie_embeddings": False}}
META = {"global_step": 5, "architecture": ARCHITECTURE, "tokens_seen": 9, "optimizer_groups": []}


def launch(options, ranks):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += [str(SCRIPT), json.dumps(options)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def saved(folder, tensors, **meta):
    """A folder that one process has written."""
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    torch.save(META | meta, folder / "meta.pt")
    return folder


@pytest.fixture
def folder(tmp_path):
    tensors = {
        "state_dict.a": torch.randn(6, 4),
        "optimizer_0.state.a.exp_avg": torch.randn(6, 4),
        "optimizer_0.state.a.step": torch.tensor(5.0),
    }
    return saved(tmp_path / "last.ckpt", tensors, optimizer_groups=[{"name": "values", "params": ["a"]}])


CASES = {
    "memory": (2, {"group": 2}),
    "replicas, uneven rows": (2, {"group": 1, "values": {"weight_decay": 0.1, "moments": "caught_up"}}),
    "tied": (2, {"group": 2, "transformer": {"tie_embeddings": True}}),
    "bf16, masters": (
        2,
        {"group": 2, "memory": {"values_dtype": "bfloat16"}, "values": {"rounding": "master"}},
    ),
    "four ranks": (4, {"group": 2, "values": {"method": "adamw_rowwise"}}),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_as_the_ranks_had_it(tmp_path, name):
    from write_folder import build, optimizer_of, step

    ranks, options = CASES[name]
    launch(options | {"folder": str(tmp_path / "last.ckpt")}, ranks)
    consolidate(tmp_path / "last.ckpt", tmp_path / "one.ckpt")
    found = torch.load(tmp_path / "one.ckpt", weights_only=True)
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)

    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for key, tensor in expected["state_dict"].items():
        assert found["state_dict"][key].dtype == tensor.dtype
        assert torch.equal(found["state_dict"][key], tensor), key
    assert len(found["random_state"]) == ranks
    assert found["lr_schedulers"] == [{"last_epoch": 3}]

    # One process goes on as the ranks did.
    model = build(options)
    model.load_state_dict(found["state_dict"])
    optimizer = optimizer_of(model, options)
    optimizer.load_state_dict(found["optimizer_states"][0])
    for parameter_name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert state.keys() == expected["state"][parameter_name].keys()
        for kind, tensor in expected["state"][parameter_name].items():
            assert torch.equal(state[kind], tensor), (parameter_name, kind)
    assert float(step(model, optimizer, 100)) == pytest.approx(float(expected["loss"]), rel=1e-6)


MEASURE = """
import sys
from pathlib import Path

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

from memlm.parallel.consolidate import consolidate
consolidate(Path(sys.argv[2]), Path(sys.argv[3]))  # imports what torch imports late
before = status("VmHWM")
consolidate(Path(sys.argv[1]), Path(sys.argv[4]))
print(status("VmHWM") - before)
"""


MEASURE_PART = (
    MEASURE.split("from memlm")[0]
    + """
import torch
from memlm.parallel.sharded_checkpoint import read_tensors
stored = read_tensors(Path(sys.argv[1]))
small = stored["state_dict.transformer.embedding.weight"]
small.fill(torch.empty(small.shape), (0, 0))
values = stored["state_dict.transformer.pools.main.values"]
assert len(values.parts) == 2
before = status("VmHWM")
part = torch.empty(values.shape[0], values.shape[1] // 4)
values.fill(part, (0, values.shape[1] // 4))
print(status("VmHWM") - before, part.nbytes)
"""
)


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux reports resident memory")
def test_memory_is_that_of_some_rows(tmp_path, folder):
    options = {"group": 2, "values": {"method": "sgd"}, "memory": {"half_keys": 2200}, "steps": 1}
    launch(options | {"folder": str(tmp_path / "large"), "compare": False}, 2)
    paths = [tmp_path / "large", folder, tmp_path / "small.ckpt", tmp_path / "large.ckpt"]
    words = [sys.executable, "-c", MEASURE, *map(str, paths)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "large.ckpt").stat().st_size > 300e6
    assert int(done.stdout) * 1024 < 60e6

    # A rank of four that reads what two have written takes its quarter, and no more.
    words = [sys.executable, "-c", MEASURE_PART, str(tmp_path / "large")]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    grown, part = map(int, done.stdout.split())
    assert part > 70e6
    assert grown * 1024 < part + 60e6


def test_verb(folder, tmp_path, capsys):
    assert main(["consolidate", str(folder), str(tmp_path / "one.ckpt")]) == 0
    assert "step 5, 1 tensors" in capsys.readouterr().out
    found = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert found["optimizer_states"][0]["param_groups"] == [{"name": "values", "params": [0]}]
    assert "optimizer_groups" not in found
    assert float(found["optimizer_states"][0]["state"][0]["step"]) == 5


def test_any_shape_and_order(tmp_path):
    """Tensors that are not contiguous, empty, of other types or part of a larger one."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(10):
        shape = torch.randint(1, 9, (int(torch.randint(1, 4, (), generator=generator)),), generator=generator)
        tensor = torch.randn(*shape.tolist(), 5, generator=generator)
        tensors = {
            "plain": tensor,
            "turned": tensor.transpose(0, -1),
            "rows": tensor[len(tensor) // 2 :],
            "bf16": tensor.bfloat16(),
            "int": (tensor * 9).int(),
            "bool": tensor > 0,
            "number": torch.tensor(trial, dtype=torch.float64),
            "empty": torch.empty(0, 3),
        }
        folder = saved(tmp_path / str(trial), {f"state_dict.{key}": value for key, value in tensors.items()})
        consolidate(folder, tmp_path / f"{trial}.ckpt")
        found = torch.load(tmp_path / f"{trial}.ckpt", weights_only=True)["state_dict"]
        for key, value in tensors.items():
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value), key


def test_chunks_of_any_size(folder):
    stored = read_tensors(folder)["state_dict.a"]
    whole = torch.cat(list(stored.chunks(1 << 20)))
    for size in (1, 16, 40, 64, 96, 1000):
        assert torch.equal(torch.cat(list(stored.chunks(size))), whole)


@pytest.mark.parametrize("seed", range(10))
def test_any_block_is_read(tmp_path, seed, monkeypatch):
    """From parts that several ranks have written, whatever their borders."""
    monkeypatch.setattr(sharded_checkpoint, "_READ_AT_ONCE", 100)
    generator = torch.Generator().manual_seed(seed)

    def some(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows, columns = some(1, 40), some(1, 12)
    tensor = torch.randn(rows, columns, generator=generator)
    folder = saved(
        tmp_path / "x",
        {"left": tensor[:, : columns // 2].clone(), "right": tensor[:, columns // 2 :].clone()},
    )
    stored = read_tensors(folder)
    left, right = stored["left"].parts, stored["right"].parts
    for part in right:
        part.offsets = (0, columns // 2)
    whole = StoredTensor(tensor.shape, tensor.dtype, left + right)
    for _ in range(20):
        first = some(0, rows - 1), some(0, columns - 1)
        sizes = some(1, rows - first[0]), some(1, columns - first[1])
        expected = tensor[first[0] : first[0] + sizes[0], first[1] : first[1] + sizes[1]]
        target = torch.full(sizes, torch.nan, dtype=torch.float64)
        whole.fill(target, first)
        assert torch.equal(target, expected.double())


def test_nothing_is_overwritten(folder, tmp_path):
    (tmp_path / "one.ckpt").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        consolidate(folder, tmp_path / "one.ckpt")
    assert (tmp_path / "one.ckpt").read_text() == "mine"


def test_no_folder_for_the_file(folder, tmp_path, capsys):
    assert main(["consolidate", str(folder), str(tmp_path / "nowhere" / "one.ckpt")]) == 2
    assert "one.ckpt: cannot be written (No such file or directory)" in capsys.readouterr().err


def test_a_folder_replaced_meanwhile_is_not_mixed(folder, tmp_path, monkeypatch):
    """A run that goes on saves its next checkpoint under the same name."""
    newer = shutil.copytree(folder, tmp_path / "newer")
    write = module._write

    def replaced(*arguments):
        write(*arguments)
        put_in_place(newer, folder)

    monkeypatch.setattr(module, "_write", replaced)
    with pytest.raises(CheckpointError, match="was replaced"):
        consolidate(folder, tmp_path / "one.ckpt")
    assert not (tmp_path / "one.ckpt").exists()


def _truncate(folder):
    file = next(folder.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 10)


def _overwrite(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(b"x" * file.stat().st_size)


def _forget_groups(folder):
    torch.save({key: value for key, value in META.items() if key != "optimizer_groups"}, folder / "meta.pt")


class _Code:
    def __reduce__(self):
        return (os.system, ("touch SHOULD_NOT_EXIST",))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / ".metadata").unlink(), "lacks .metadata"),
        (lambda folder: (folder / "meta.pt").unlink(), "lacks meta.pt"),
        (lambda folder: next(folder.glob("*.distcp")).unlink(), "lacks its file"),
        (_truncate, "is truncated"),
        (_overwrite, "is damaged"),
        (lambda folder: (folder / ".metadata").write_bytes(b"nonsense"), "is damaged"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(_Code())), "no checkpoint needs"),
        (lambda folder: torch.save({"global_step": 1}, folder / "meta.pt"), "lacks architecture"),
        (
            lambda folder: torch.save(META | {"optimizer_groups": None}, folder / "meta.pt"),
            "optimizer_groups",
        ),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_damaged_folders(folder, tmp_path, damage, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        consolidate(folder, tmp_path / "one.ckpt")
    assert not any(path.name.endswith((".tmp", "one.ckpt", "EXIST")) for path in tmp_path.iterdir())


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "x.ckpt").write_text("")
    assert main(["consolidate", str(tmp_path / "x.ckpt"), str(tmp_path / "y.ckpt")]) == 2
    assert "is a single file already" in capsys.readouterr().err


def test_a_run_directory_is_no_checkpoint(folder, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    folder.rename(tmp_path / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"its run's last is .*checkpoints/last\.ckpt"):
        consolidate(tmp_path / "run", tmp_path / "one.ckpt")
