"""The benchmark of PEER at a tiny size, and that both of its layers are the same one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peer
from benchmarks.measure import Report, Setting

ROOT = Path(__file__).resolve().parents[2]


def report() -> Report:
    report = Report(Setting(torch.device("cpu"), quick=True, repeats=1, flush_bytes=2**16), {})
    report.measure_copy(2**16)
    return report


def test_both_layers_have_one_output_and_one_gradient():
    """Or the comparison would be one of different layers."""
    pytest.importorskip("PEER_pytorch", exc_type=ImportError)
    torch.manual_seed(0)
    module, _ = peer.package_layer(half_keys=20, dim=12)
    with torch.no_grad():
        module.keys.normal_()
    ours = peer.Ours.build(half_keys=20, dim=12)
    ours.take(module)
    hidden, grad = torch.randn(2, 1, 30, 12)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    outputs = [ours.layer(inputs[0], ours.pools), module(inputs[1])]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for output in outputs:
        output.backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-3)
    for pool, table in zip(ours.pools, (module.weight_up_embed, module.weight_down_embed), strict=True):
        compact = pool.gradient.compact()
        dense = torch.zeros_like(pool.values).index_copy_(0, compact.rows.long(), compact.sums)
        torch.testing.assert_close(dense, table.weight.grad, rtol=1e-3, atol=1e-3)
    keys = module.keys.grad.transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(ours.layer.product_keys.keys.grad, keys, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_every_size_is_compared_in_time_and_memory(tmp_path, capsys):
    pytest.importorskip("PEER_pytorch", exc_type=ImportError)
    result = report()
    peer.compare(result, 16, dims=(8,), tokens=(4,))
    assert set(result.comparisons) == {
        f"{what}, 8, 4 tokens" for what in ("time", "peak of step", "peak of all")
    }
    assert set(result.rows) == {"copy", "read only", "PEER step, 8, 4 tokens", "PEER-pytorch, 8, 4 tokens"}
    peaks = result.extra["peaks"]["8, 4 tokens"]
    assert set(peaks) == {"memlm", "PEER-pytorch"}
    result.setting.json = tmp_path / "out.json"
    result.finish()
    assert json.loads(result.setting.json.read_text())["comparisons"] == result.comparisons
    assert "time, 8, 4 tokens" in capsys.readouterr().out


def test_without_the_package_ours_is_measured_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "PEER_pytorch", None)
    result = report()
    peer.compare(result, 16, dims=(8,), tokens=(4,))
    assert "PEER step, 8, 4 tokens" in result.rows
    assert not result.comparisons
    assert result.extra["skipped_packages"]["PEER-pytorch"].startswith("not installed")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_peak_of_a_step_is_less_than_its_tables():
    """1,024 of 65,536 rows a pool, at most, in a step of 8 tokens; a dense gradient would be two tables."""
    code = "from benchmarks.peer import peak; peak('memlm', 256, 64, 8)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    tables = 2 * 65_536 * 64 * 4
    peaks = json.loads(run.stdout)
    assert peaks["step"] < 0.5 * tables
    assert 3 * tables < peaks["all"] < 3.5 * tables


@pytest.mark.slow
def test_quick_run_from_the_command_line(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/peer.py", "--quick", "--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(path.read_text())["command"] == f"python benchmarks/peer.py --quick --json {path}"
