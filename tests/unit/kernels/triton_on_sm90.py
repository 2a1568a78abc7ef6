"""A script: compiles every Triton kernel for an H100 (sm_90), which needs no GPU, and prints what each takes.

Each launch that the backend makes on small CPU tensors becomes a compilation with exactly the launch's types
and constants. Prints one JSON object a line: kernel, constants, registers a thread, spilled bytes, seconds.
Arguments: names of the cases to compile (default all).
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from memlm.kernels import triton as backend
from memlm.kernels.interface import RowState, RowSums, RowUpdate

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_launch(kernel: JITFunction, *args, grid, warmup, num_warps=4, **constants) -> None:
    """Stands in for JITFunction.run."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    signature, constexprs, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = triton.runtime.jit.mangle_type(value)
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type or triton.runtime.jit.mangle_type(value)
    start = time.perf_counter()
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    seconds = time.perf_counter() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    ptx = compiled.asm["ptx"]
    report = {
        "kernel": kernel.__name__,
        "types": [kind for name, kind in signature.items() if name in ("values", "grad_output", "first")],
        "constants": {k: v for k, v in constexprs.items() if v is not None} | {"num_warps": num_warps},
        "registers": int(numbers["REG"]),
        "spilled": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v[48]\.b32", ptx)),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(report), flush=True)


def reads(dim: int, dtype: torch.dtype) -> None:
    values, grad = torch.zeros(9, dim, dtype=dtype), torch.zeros(200, dim, dtype=dtype)
    slots, weights = torch.zeros(200, 2, dtype=torch.int32), torch.zeros(200, 2)
    backend.weighted_read(values, slots, weights)
    backend.read_weight_gradient(values, slots, grad)
    backend.read_backward(values, slots, weights, grad)
    backend.row_sums(slots.flatten(), weights.flatten(), slots.flatten(), grad, 9)


def search(columns: int, keep: int, dtype: torch.dtype) -> None:
    backend.best_slots(torch.zeros(2, 3, columns, dtype=dtype), torch.zeros(2, 3, columns, dtype=dtype), keep)


def update(dim: int, dtype: torch.dtype, method: str, *, everything: bool) -> None:
    def table() -> Tensor:
        return torch.zeros(9, dim)

    rowwise = method == "adamw_rowwise"
    state = RowState(
        exp_avg=table() if everything else None,
        exp_avg_sq=torch.zeros(9) if rowwise else table(),
        last_step=torch.zeros(9, dtype=torch.int32) if everything else None,
        decayed_at=torch.zeros(9, dtype=torch.float64) if everything else None,
        master=table() if everything and dtype == torch.bfloat16 else None,
    )
    gradient = RowSums(torch.arange(9, dtype=torch.int32), table(), torch.zeros(9), torch.tensor(9))
    step = RowUpdate(method, 1, 0.1, betas=(0.9 if everything else 0.0, 0.95))  # type: ignore[arg-type]
    backend.update_rows(torch.zeros(9, dim, dtype=dtype), state, gradient, torch.ones(()), step)


CASES: dict[str, Callable[[], None]] = {
    "reads-1024-bf16": lambda: reads(1024, torch.bfloat16),
    "reads-1000-bf16": lambda: reads(1000, torch.bfloat16),
    "reads-4096-bf16": lambda: reads(4096, torch.bfloat16),
    "reads-1536-bf16": lambda: reads(1536, torch.bfloat16),
    "reads-1024-fp32": lambda: reads(1024, torch.float32),
    "reads-17-fp32": lambda: reads(17, torch.float32),
    "search-1024-32-bf16": lambda: search(1024, 32, torch.bfloat16),
    "search-1024-32-fp32": lambda: search(1024, 32, torch.float32),
    "search-128-16-fp32": lambda: search(128, 16, torch.float32),
    "search-5000-100-fp32": lambda: search(5000, 100, torch.float32),
    "search-1-1-fp32": lambda: search(1, 1, torch.float32),
    "update-1024-bf16-adamw": lambda: update(1024, torch.bfloat16, "adamw", everything=False),
    "update-4096-bf16-adamw-all": lambda: update(4096, torch.bfloat16, "adamw", everything=True),
    "update-1000-fp32-rowwise-all": lambda: update(1000, torch.float32, "adamw_rowwise", everything=True),
    "update-1024-bf16-rowwise": lambda: update(1024, torch.bfloat16, "adamw_rowwise", everything=False),
    "update-1024-fp32-sgd": lambda: update(1024, torch.float32, "sgd", everything=False),
}


if __name__ == "__main__":
    JITFunction.run = compile_launch
    for name in sys.argv[1:] or CASES:
        CASES[name]()
