"""Options of the Trainer, callbacks, tasks and predictions on two ranks: what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("options.py")

SMALL = {"half_keys": 9, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]}
PEER = SMALL | {"query_norm": "none"}
BESIDE = SMALL | {"mode": "beside", "start_at_zero": True}
EXPERTS = {"routing": "token_choice", "experts": 4, "top_k": 2, "balance_rate": 0.01, "z_loss": 0.01}
RECOMPUTED = {"transformer": {"activation_checkpointing": True}}
ALL = {"callbacks": True, "also": True}
DDP = {"strategy": "memory_ddp"}
COMPILED = {"compile": True, "backend": "aot_eager", "steps": 3}
ONE_GROUP_EACH = {"of_strategy": {"memory_group": 1}}
CASES = {
    "all": ALL,
    "all, groups of one": ALL | ONE_GROUP_EACH,
    "all, ddp": ALL | DDP,
    "all, ddp, one group": ALL | DDP | {"of_strategy": {"memory_group": 2}},
    "all, peer": ALL | {"kind": "PEERLM", "memory": PEER},
    "all, expanded": ALL | {"memory": SMALL | {"half_keys": 8, "value_expansion": 4}},
    "all, engram": ALL
    | {"kind": "EngramLM", "memory": {"slots": 300, "heads": 2, "layers": [1], "value_dim": 8}},
    "all, experts": ALL | {"kind": "MoELM", "moe": EXPERTS},
    "recomputed": RECOMPUTED,
    "recomputed, ddp": RECOMPUTED | DDP,
    "recomputed, peer": RECOMPUTED | {"kind": "PEERLM", "memory": PEER},
    "recomputed, experts": RECOMPUTED | {"kind": "MoELM", "moe": EXPERTS},
    "recomputed, batch norm": RECOMPUTED | {"memory": SMALL | {"query_norm": "batch"}},
    "accumulated": {"accumulate": 2, "count": True},
    "accumulated, parts": {"accumulate": 2, "count": True, "of_strategy": {"whole_gradients": False}},
    "accumulated, recomputed": RECOMPUTED | {"accumulate": 2},
    "accumulated, ddp": DDP | {"accumulate": 2, "count": True},
    "at once": {"count": True},
    "at once, ddp": DDP | {"count": True},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-true, ddp": DDP | {"precision": "bf16-true"},
    "compiled": COMPILED,
    "compiled, ddp": DDP | COMPILED,
    "compiled, recomputed": RECOMPUTED | COMPILED,
    "compiled, callbacks": COMPILED | {"callbacks": True},
    "pretrained": {"memory": BESIDE},
    "pretrained, memory": {"memory": BESIDE, "train": "memory"},
    "pretrained, memory, ddp": DDP | {"memory": BESIDE, "train": "memory"},
}
TIMED = {
    f"train/{name}" for name in ("seconds", "tokens_per_second", "value_bytes_per_second", "data_wait_share")
}


def tolerance(name, metric="loss"):
    """How far a case's metric may be from that of one process, relative; None for as far as it likes."""
    if metric in TIMED or (name.startswith("bf16") and "loss" not in metric):
        return None
    if name.startswith("bf16"):  # sums of other summands, rounded to 8 bits
        return 2e-3
    if "experts/" in metric and not metric.endswith("training"):
        return None  # rows that fill the last batch choose experts too
    # A bias before BatchNorm has no gradient but rounding errors, which Adam makes steps of.
    return 1e-4 if name.endswith("norm") else 1e-5


def start(cases, folder, ranks):
    options = json.dumps({"folder": str(folder), "cases": cases})
    words = [sys.executable, str(SCRIPT), options]
    if ranks > 1:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MEMLM_KERNELS": "reference"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=environment, **pipes)


def results_of(process):
    try:
        out, error = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, error[-4000:]
    return json.loads(out.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each case gave on one process, and on two."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    llama = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(llama)
    cases = {}
    for name, case in CASES.items():
        train = case.get("train", "everything")
        more = {"pretrained": {"folder": str(llama), "train": train}} if name.startswith("pre") else {}
        cases[name] = case | more
    one, two = (start(cases, tmp_path_factory.mktemp(str(ranks)), ranks) for ranks in (1, 2))
    return results_of(one), results_of(two)


def close(found, expected, name, metric="loss"):
    """Numbers within the tolerance, in lists and dicts of any depth; all else the same."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            close(found[key], value, name, key)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs, name, metric)
    elif not isinstance(expected, float):
        assert found == expected
    elif (rel := tolerance(name, metric)) is not None:
        assert found == pytest.approx(expected, rel=rel, abs=1e-7), metric


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(runs, name):
    one, two = (run[name] for run in runs)
    assert two["initial"] == one["initial"]
    assert two["dtypes"] == one["dtypes"]
    for part in ("logged", "validated", "tested"):
        close(two.get(part), one.get(part), name)
    if not name.endswith("norm") and not name.startswith("bf16"):
        close(two["sums"], one["sums"], name)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "also" in case])
def test_files_are_those_of_one_process(runs, name):
    one, two = (run[name]["files"] for run in runs)
    assert two["predictions.jsonl"] == one["predictions.jsonl"]
    assert len(one["predictions.jsonl"].splitlines()) == 3
    assert two["samples.txt"] == one["samples.txt"]
    close(json.loads(two["test.json"]), json.loads(one["test.json"]), name)
    tasks = [json.loads(files["tasks.json"])["tasks"] for files in (two, one)]
    for task in (task for run in tasks for task in run.values()):
        assert task.pop("seconds") >= 0
    close(*tasks, name)
    assert tasks[0]["piqa"]["examples"] == 5  # not as many on each rank


def test_recomputation_changes_nothing(runs):
    for run in runs:
        for metric in ("train/loss", "val/loss"):
            assert run["recomputed"]["logged"][metric] == pytest.approx(
                run["at once"]["logged"][metric], rel=1e-6
            )


def test_gradients_of_accumulated_batches_are_sent_once(runs):
    sent = {name: run["sent"] for name, run in runs[1].items() if "sent" in run}
    # Rows are sent once in any case, and DDP's own buckets are none of these collectives.
    for kind in ("reduce_scatter_single", "all_to_all_single"):
        assert sent["accumulated"].get(kind) == pytest.approx(sent["at once"].get(kind), rel=0.02)
    assert sent["accumulated, ddp"] == pytest.approx(sent["at once, ddp"], rel=0.02)
    assert (
        sent["accumulated, parts"]["reduce_scatter_single"] > 1.5 * sent["at once"]["reduce_scatter_single"]
    )
