import os
from pathlib import Path

import pytest
import torch

from memlm.errors import CheckpointError, ConfigError
from memlm.resume import (
    architecture_overrides,
    check_architecture,
    flatten,
    read_checkpoint,
    resolve_checkpoint,
)
from memlm.run_directory import RunFiles

ARCHITECTURE = {
    "class_path": "memlm.MemoryLM",
    "vocab_size": 257,
    "transformer": {"dim": 64, "layers": 4, "kv_heads": 2},
    "memory": {"reads": 8, "layers": [1, 2]},
}


def write(path, step=1, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "global_step": step, "architecture": ARCHITECTURE, **more}, path)
    return path


@pytest.fixture
def run(tmp_path):
    return RunFiles(tmp_path / "run")


def test_last_is_the_newest_by_step_not_by_time(run):
    write(run.last, step=20)
    old = write(run.checkpoints / "step-10.ckpt", step=10)
    os.utime(old, (2e9, 2e9))
    assert resolve_checkpoint("last", run) == run.last
    newer = write(run.checkpoints / "step-30.ckpt", step=30)
    assert resolve_checkpoint("last", run) == newer


def test_last_wins_a_tie(run):
    write(run.checkpoints / "zzz.ckpt", step=20)
    write(run.last, step=20)
    assert resolve_checkpoint("last", run) == run.last


def test_a_damaged_best_does_not_stop_a_run_from_continuing(run):
    write(run.last)
    run.best.write_bytes(b"")
    assert resolve_checkpoint("last", run) == run.last


def test_best_alone_can_be_continued(run):
    write(run.best)
    assert resolve_checkpoint("last", run) == run.best


def test_a_damaged_newest_checkpoint_is_named(run):
    write(run.last)
    (run.checkpoints / "step-30.ckpt").write_bytes(run.last.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step-30\.ckpt: is truncated"):
        resolve_checkpoint("last", run)


@pytest.mark.parametrize("kind", ["last", "best", "some/file.ckpt"])
def test_no_checkpoint(run, kind):
    with pytest.raises(CheckpointError):
        resolve_checkpoint(kind, run)


def test_path_is_taken_as_it_is(run, tmp_path):
    path = write(tmp_path / "elsewhere" / "x.ckpt")
    assert resolve_checkpoint(str(path), run) == path


def test_reading_does_not_copy_tensors(tmp_path):
    path = write(tmp_path / "x.ckpt", state_dict={"values": torch.arange(6.0)})
    checkpoint = read_checkpoint(path)
    assert checkpoint["architecture"] == ARCHITECTURE
    assert torch.equal(checkpoint["state_dict"]["values"], torch.arange(6.0))
    assert str(path) in Path("/proc/self/maps").read_text()  # mapped, not read


def test_sharded_checkpoint(tmp_path):
    write(tmp_path / "x.ckpt" / "meta.pt", step=3)
    assert read_checkpoint(tmp_path / "x.ckpt")["global_step"] == 3


def test_not_memlms(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="lacks global_step, architecture"):
        read_checkpoint(tmp_path / "x.ckpt")
    torch.save([1, 2], tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="lacks state_dict"):
        read_checkpoint(tmp_path / "x.ckpt")


def overrides(explicit, class_path="memlm.language_models.MemoryLM"):
    return architecture_overrides(ARCHITECTURE, {"class_path": class_path}, explicit, "x.ckpt")


def test_checkpoint_supplies_what_was_not_set():
    assert overrides({}) == {"transformer": ARCHITECTURE["transformer"], "memory": ARCHITECTURE["memory"]}
    explicit = {"init_args": {"transformer": {"dim": 64}, "optimizer": {"learning_rate": 1.0}}}
    assert overrides(explicit)["transformer"] == {"layers": 4, "kv_heads": 2}
    assert "optimizer" not in overrides(explicit)


def test_equal_settings_are_no_conflict():
    result = overrides({"init_args": {"memory": {"layers": (1, 2)}, "transformer": {"kv_heads": None}}})
    assert result == {"transformer": {"dim": 64, "layers": 4}, "memory": {"reads": 8}}


@pytest.mark.parametrize(
    ("explicit", "parts"),
    [
        ({"transformer": {"dim": 128}}, ["model.transformer.dim", "128", "64"]),
        ({"memory": {"layers": [1]}}, ["model.memory.layers", "[1]", "[1, 2]"]),
    ],
)
def test_conflict_names_key_file_and_both_values(explicit, parts):
    with pytest.raises(ConfigError) as conflict:
        overrides({"init_args": explicit})
    for part in (*parts, "x.ckpt"):
        assert part in str(conflict.value)


def test_another_class():
    with pytest.raises(ConfigError, match=r"model\.class_path: is set to 'DenseLM'.*'memlm.MemoryLM'"):
        overrides({}, class_path="DenseLM")


def test_built_model_is_compared_as_a_whole():
    full_path = {"class_path": "memlm.language_models.MemoryLM"}
    check_architecture(ARCHITECTURE | full_path, ARCHITECTURE, "x.ckpt")
    with pytest.raises(ConfigError, match=r"vocab_size.*300.*257"):
        check_architecture(ARCHITECTURE | {"vocab_size": 300}, ARCHITECTURE, "x.ckpt")
    with pytest.raises(ConfigError, match=r"model\.memory\.gate: is set to 'silu'.*None"):
        memory = ARCHITECTURE["memory"] | {"gate": "silu"}
        check_architecture(ARCHITECTURE | {"memory": memory}, ARCHITECTURE, "x.ckpt")


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
