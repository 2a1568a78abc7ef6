"""The benchmark of the mixture of experts at tiny sizes."""

import json

import pytest
import torch

from benchmarks import moe_layer
from benchmarks.measure import Report, Setting


def report() -> Report:
    return Report(Setting(torch.device("cpu"), quick=True, repeats=1, flush_bytes=2**16), moe_layer.BARS)


TINY = [
    moe_layer.Shape(shape.experts, shape.top_k, 16, 8, 2 * shape.experts, shape.routing)
    for shape in moe_layer.CPU
]


@pytest.mark.parametrize("part", ["cpu", "gpu"])
def test_every_bar_is_measured(part, tmp_path, capsys):
    result = report()
    if part == "cpu":
        moe_layer.cpu(result, tuple(TINY))
    else:
        moe_layer.gpu(
            result, tuple(moe_layer.Shape(s.experts, s.top_k, 16, 8, 64, s.routing) for s in moe_layer.GPU)
        )
    bars = {name for name in moe_layer.BARS if name.startswith("g8") == (part == "gpu")}
    assert set(result.values) == bars
    assert not result.unmeasured
    kinds = ("bf16", "autocast") if part == "cpu" else ("autocast",)
    shapes = moe_layer.CPU if part == "cpu" else moe_layer.GPU
    assert set(result.comparisons) == {f"{kind}, {shape.name}" for kind in kinds for shape in shapes}
    result.setting.json = tmp_path / "out.json"
    result.finish()
    content = json.loads(result.setting.json.read_text())
    assert len(content["sizes"]["shapes"]) == len(shapes)
    printed = capsys.readouterr().out
    assert all(f"\n{bar} " in printed for bar in bars)


def test_a_ratio_on_a_gpu_is_one_of_speeds():
    result = report()
    shape = moe_layer.GPU[0]
    tiny = moe_layer.Shape(shape.experts, shape.top_k, 16, 8, 64)
    moe_layer.compare(result, tiny, "bf16", f"g8_{shape.name}")
    experts, dense = result.rows.values()
    assert experts.name.endswith("experts")
    assert result.values[f"g8_{shape.name}"] == dense.median / experts.median


def test_quick_sizes_have_the_bars_of_the_others():
    assert [shape.name for shape in moe_layer.QUICK] == [shape.name for shape in moe_layer.CPU]
    for shape in (*moe_layer.QUICK, *moe_layer.CPU):
        assert shape.tokens * shape.top_k // shape.experts >= 256


@pytest.mark.parametrize("shape", TINY)
def test_both_networks_cost_the_same_a_token(shape):
    """But for the router."""
    made = moe_layer.layers(shape, torch.device("cpu"), torch.float32)
    router = 6 * shape.experts * shape.dim
    dense = 6 * sum(parameter.numel() for parameter in made["dense"].parameters())
    flops = made["experts"].flops(1)
    assert flops.forward + flops.backward - router == dense
