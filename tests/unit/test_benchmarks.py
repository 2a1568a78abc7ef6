"""The benchmark scripts at tiny sizes: they run, name every bar, and write what their page is made of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import layer_step, optimizer, read, retrieval
from benchmarks.baselines import DenseGradientMemory, dense_read, kernel_read, public_layers, search
from benchmarks.measure import Report, Setting, times
from memlm.kernels import reference

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"read": read, "retrieval": retrieval, "optimizer": optimizer, "layer_step": layer_step}
BARS = {
    "read": {
        "read_forward": 1.1, "read_backward_full": 0.40, "read_backward_3pct": 0.08,
        "read_backward_3pct_dense_reads": 0.08, "g1_read_forward_512": 0.8, "g1_read_forward_1024": 0.8,
        "g1_read_forward_4096": 0.8, "g1_read_forward_1536": 0.8, "g1_read_forward_1000": 0.8,
        "g1c_vs_embedding_bag": 5, "g2_backward_vs_forward": 2, "g4_skew_penalty": 1.5,
    },
    "retrieval": {"second_stage": 0.33, "g5_retrieval": 3},
    "optimizer": {
        "row_adamw_3pct": 0.09, "row_adamw_12pct": 0.33, "row_adamw_worst": 1.15, "sparse_adam_5pct": 10,
        "bf16_drift": [0.98, 1.02], "g3_row_adamw_bandwidth": 0.7, "g3b_row_vs_dense": 1.4,
    },
    "layer_step": {
        "layer_step": 0.12, "peak_bytes": 0.15, "memory_vs_swiglu": 3.5, "g9_host_syncs": 0,
        "g11_recompiles": 0,
    },
}  # fmt: skip
CPU = {
    "read": lambda report: read.cpu(report, slots=512, dim=24, tokens=20),
    "retrieval": lambda report: retrieval.cpu(report, tokens=8, half_keys=(256, 1024), stage_tokens=8),
    "optimizer": lambda report: optimizer.cpu(report, slots=600, dim=24),
    "layer_step": lambda report: layer_step.cpu(
        report, half_keys=40, dim=24, tokens=8, swiglu_tokens=8, peak_tokens=2
    ),
}
GPU = {
    "read": lambda report: read.gpu(report, slots=512, dims=(512, 1024, 4096, 1536, 1000), tokens=2),
    "retrieval": lambda report: retrieval.gpu(report, tokens=8, half_keys=40),
    "optimizer": lambda report: optimizer.gpu(report, slots=300, dim=40),
    "layer_step": lambda report: layer_step.gpu(report, half_keys=40, dim=24, tokens=60),
}


def report_of(name: str) -> Report:
    setting = Setting(torch.device("cpu"), quick=True, repeats=1, flush_bytes=2**16)
    report = Report(setting, SCRIPTS[name].BARS)
    report.measure_copy(2**16)
    return report


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(content, name, measured):
    """Every bar is there under its name; those of the device have a value, the others say why not."""
    assert {bar: content["ratios"][bar]["bar"] for bar in BARS[name]} == BARS[name]
    for bar, ratio in content["ratios"].items():
        if bar.startswith("g") == (measured == "gpu"):
            assert ratio["value"] >= 0 and isinstance(ratio["met"], bool) and ratio["quick"] is True
            assert ratio["holds"] in ("<=", ">=", "in")
        else:
            assert ratio["value"] is None and ratio["unmeasured"] == "needs a GPU"
    assert content["machine"]["cpu"] and content["machine"]["cores"] >= 1
    if sys.platform == "linux":
        # How many is not bounded here: the kernel counts in ticks of 10 ms, longer than these runs.
        assert isinstance(content["machine"]["cores_used_by_others"], float)
    assert content["versions"]["torch"] == torch.__version__
    assert content["sizes"] and set(content["medians"]) == {row["operation"] for row in content["operations"]}
    assert all(median > 0 for median in content["medians"].values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_bar_of_the_cpu_is_measured_and_written(name, tmp_path, capsys):
    report = report_of(name)
    CPU[name](report)
    report.setting.json = tmp_path / "results" / "out.json"
    report.finish()
    content = json.loads(report.setting.json.read_text())
    check(content, name, "cpu")
    printed = capsys.readouterr().out
    assert all(f"\n{bar} " in printed for bar in BARS[name])


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_gpu_part_runs_on_any_device(name):
    pytest.importorskip("triton")
    report = report_of(name)
    GPU[name](report)
    check(json.loads(json.dumps(report.content())), name, "gpu")
    assert not report.unmeasured
    if name == "layer_step":
        assert report.comparisons["layer_step on the GPU"] > 0


def test_a_part_that_fails_leaves_its_bars_unmeasured():
    report = report_of("read")
    with report.attempt("g4_skew_penalty"):
        raise RuntimeError("out of memory")
    assert report.ratios()["g4_skew_penalty"]["unmeasured"] == "failed: RuntimeError('out of memory')"


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_quick_run_from_the_command_line(name, tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    content = json.loads(path.read_text())
    check(content, name, "cpu")
    assert content["command"] == f"python benchmarks/{name}.py --quick --json {path}"


def test_the_dense_layer_computes_what_ours_computes():
    """Or the comparison would be one of different layers."""
    torch.manual_seed(0)
    dense = DenseGradientMemory(dim=24, half_keys=16, heads=3, reads=4, key_dim=12)
    ours = layer_step.Memlm.like(dense)
    hidden, grad = torch.randn(2, 10, 24)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    outputs = [dense(inputs[0]), ours.layer(inputs[1], [ours.pool])]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    compact = ours.pool.gradient.compact()
    assert 20 < len(compact.rows) < 120
    table = torch.zeros_like(ours.pool.values).index_copy_(0, compact.rows.long(), compact.sums)
    torch.testing.assert_close(table, dense.values.grad)
    torch.testing.assert_close(ours.layer.product_keys.keys.grad, dense.keys.grad.flatten(1, 2))
    torch.testing.assert_close(ours.layer.query.linear.weight.grad, dense.query.weight.grad)


def test_a_step_of_the_dense_layer_moves_it_as_ours():
    """Both clip the table apart, and every row is read, so that lazy and dense AdamW agree."""
    torch.manual_seed(0)
    dense = DenseGradientMemory(dim=8, half_keys=4, heads=2, reads=4, key_dim=8).double()
    ours = layer_step.Memlm.like(dense)
    hidden = torch.randn(200, 8, dtype=torch.float64).requires_grad_()
    grad = torch.randn_like(hidden)
    before = dense.values.detach().clone()
    step = layer_step.dense_step(dense, [dense.values], hidden, grad)
    for group in ours.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1e-3, 1e-2  # torch's own defaults
    for _ in range(3):
        step()
        ours.step(hidden, grad)
    assert (before - dense.values).abs().min() > 0
    assert len(ours.pool.gradient.compact().rows) == 16
    torch.testing.assert_close(ours.pool.values, dense.values)
    torch.testing.assert_close(ours.layer.projection.weight, dense.projection.weight)


def test_the_dense_gradient_of_our_kernels_is_that_of_embedding_bag():
    torch.manual_seed(0)
    slots, grad = torch.randint(50, (9, 7)), torch.randn(9, 12)
    table, given = torch.randn(50, 12), torch.rand(9, 7)
    gradients = []
    for operation in (dense_read, kernel_read):
        values, weights = table.clone().requires_grad_(), given.clone().requires_grad_()
        operation(values, slots, weights).backward(grad)
        gradients.append((values.grad, weights.grad))
    torch.testing.assert_close(*gradients)


def test_all_pairs_find_what_the_pruned_search_finds():
    torch.manual_seed(0)
    first, second = torch.randn(3, 20, 17), torch.randn(3, 20, 23)
    slots, sums = search(first, second, 8)
    expected_slots, expected_sums = reference.best_slots(first, second, 8)
    assert torch.equal(slots.transpose(0, 1), expected_slots.long())
    assert torch.equal(sums.transpose(0, 1), expected_sums)


def test_operations_take_turns_and_only_the_calls_themselves_count():
    calls = []
    setting = Setting(torch.device("cpu"), repeats=3, flush_bytes=2**10)
    operations = {
        "a": (lambda: calls.append("prepare"), lambda: calls.append("a")),
        "b": lambda: calls.append("b"),
    }
    seconds = times(operations, setting)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 3, "b": 3}
    forward, backward = ["prepare", "a", "b"], ["b", "prepare", "a"]
    assert calls == backward + forward + backward + forward + backward


def test_a_public_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "product_key_memory", None)
    monkeypatch.setitem(sys.modules, "PEER_pytorch", None)
    layers = public_layers(dim=8, half_keys=4, heads=2, reads=2, key_dim=8)
    assert set(layers) == {"product-key-memory", "PEER-pytorch"}
    assert all(reason.startswith("not installed") for reason in layers.values())


def test_bars_are_judged_by_their_relation():
    bars = {"low": (1.0, "<="), "high": (2.0, ">="), "range": ((0.9, 1.1), "in"), "absent": (1, "<=")}
    report = Report(Setting(torch.device("cpu")), bars)
    report.values = {"low": 1.5, "high": 2.5, "range": 1.05}
    met = {name: ratio.get("met") for name, ratio in report.ratios().items()}
    assert met == {"low": False, "high": True, "range": True, "absent": None}
    assert "quick" not in report.ratios()["low"]
