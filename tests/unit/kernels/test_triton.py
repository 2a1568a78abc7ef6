"""The Triton kernels where there is no GPU: their results under the interpreter, and that they compile."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels themselves"),
]


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own: whether kernels are interpreted is settled when triton is imported."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )


def test_results_under_the_interpreter():
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_triton.py")]
    result = run(arguments, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def compile_for_sm90(cases: list[str], cache: Path) -> list[dict]:
    result = run([str(HERE / "triton_on_sm90.py"), *cases], TRITON_CACHE_DIR=str(cache))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check_resources(kernels: list[dict]) -> None:
    for kernel in kernels:
        assert kernel["spilled"] <= 16, kernel
        # 16 warps of a multiprocessor's 64 at the least.
        assert kernel["registers"] <= 128, kernel
        # Rows of a multiple of 16 bytes are loaded 16 bytes a thread at a time.
        dim = kernel["constants"].get("V")
        if dim is not None and dim % 8 == 0:
            assert kernel["wide_loads"] > 0, kernel


def test_kernels_compile_for_an_h100(tmp_path):
    kernels = compile_for_sm90(
        ["reads-1000-bf16", "search-128-16-fp32", "update-4096-bf16-adamw-all"], tmp_path
    )
    assert {kernel["kernel"] for kernel in kernels} == {
        "_weighted_read",
        "_read_weight_gradient",
        "_place_reads",
        "_sum_segments",
        "_add_extras",
        "_best_slots",
        "_update_rows",
    }
    check_resources(kernels)


@pytest.mark.slow
def test_all_cases_compile_for_an_h100(tmp_path):
    kernels = compile_for_sm90([], tmp_path)
    assert len(kernels) > 40
    check_resources(kernels)
