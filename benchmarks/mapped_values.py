"""Generation with a table of values in memory, mapped from its file, and read from its file row by row.

    python benchmarks/mapped_values.py --json benchmarks/results/mapped_values.json

A Memory+ model of random parameters: model dim 256, 8 blocks, memory in two of them, 128 reads of 256
elements each, one table of fp32; of 0.3 GB, and of 8.6 GB, which is written (TMPDIR says where) and removed.
Each way of reading is a process of its own: a prompt of 512 tokens, then 64 tokens one by one. "Cold" has the
file put out of the kernel's cache before. Takes five minutes. The most resident memory is the kernel's VmHWM.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.commands import environment
from benchmarks.measure import Report, Row, parse
from memlm import MemoryLM
from memlm.memory import MemoryConfig
from memlm.transformer import TransformerConfig

BARS = {"resident_gb_8gb_table": (1.5, "<=")}
PROMPT, NEW = 512, 64
TRANSFORMER = {"dim": 256, "layers": 8, "heads": 8}
MEMORY = {"heads": 4, "reads": 32, "layers": [3, 6], "query_norm": "qk"}

_CHILD = """
import json, sys, time, torch
from memlm.generation.decoding import Sampling, generate
from memlm.memory.mapped import bound_large
from memlm.trained import load_trained

trained = load_trained(sys.argv[1])
model = trained.model
if sys.argv[2] == "in memory":
    for pool in model.pools.values():
        pool.values = torch.nn.Parameter(pool.values.clone(), requires_grad=False)
elif sys.argv[2] == "rows":
    assert bound_large(model.pools.values(), 0) == 0
generator = torch.Generator().manual_seed(int(sys.argv[5]))
prompt = torch.randint(256, (int(sys.argv[3]),), generator=generator).tolist()
if sys.argv[2] == "in memory":  # a first call compiles; where the table is cold it would warm it
    generate(model, [prompt[:20]], 3)
times = [time.perf_counter()]
generate(model, [prompt], int(sys.argv[4]), Sampling(temperature=1.0, seed=0),
         on_token=lambda *_: times.append(time.perf_counter()))
with open("/proc/self/status") as lines:
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(json.dumps({"peak_bytes": peak * 1024, "times": times}))
"""


def write_run(folder: Path, half_keys: int) -> Path:
    """A run directory of a model with so large a table; gives its checkpoint.

    Written piece by piece, as the table may be larger than memory.
    """
    memory = MemoryConfig(half_keys=half_keys, **MEMORY)
    with torch.device("meta"):
        meta = MemoryLM(257, TransformerConfig(**TRANSFORMER), memory)
    shapes = meta.state_dict()
    with FakeTensorMode():
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            for name, tensor in shapes.items()
        }
        content = {"state_dict": state, "global_step": 0, "architecture": meta.architecture()}
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(content, path)
    small = MemoryLM(257, TransformerConfig(**TRANSFORMER), MemoryConfig(half_keys=64, **MEMORY)).state_dict()
    before = torch.serialization.get_default_mmap_options()
    assert before is not None
    torch.serialization.set_default_mmap_options(1)  # MAP_SHARED: what is written here is written to the file
    stored = torch.load(path, mmap=True, weights_only=True)["state_dict"]
    torch.serialization.set_default_mmap_options(before)
    torch.manual_seed(0)
    for name, tensor in stored.items():
        if name in small and small[name].shape == tensor.shape:
            tensor.copy_(small[name])
        elif name.endswith("keys"):
            tensor.uniform_(-0.1, 0.1)
        else:
            for part in tensor.split(2**16):
                part.normal_(std=1 / 16)
    data = {
        "class_path": "TextStream",
        "init_args": {"paths": ["-"], "tokenizer": "bytes", "sequence_length": 1024},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return path


def put_out_of_cache(path: Path) -> None:
    """The next reads of the file are the disk's."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def generated(run: Path, how: str, seed: int) -> dict[str, Any]:
    """Peak memory and times of one process."""
    command = [sys.executable, "-c", _CHILD, str(run), how, str(PROMPT), str(NEW), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1200)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def main() -> None:
    setting = parse(__doc__ or "", Path(__file__).name)
    report = Report(setting, BARS)
    if setting.quick:
        report.unmeasured = dict.fromkeys(BARS, "needs a run without --quick")
    sizes = {"0.3 GB": 560} if setting.quick else {"0.3 GB": 560, "8.6 GB": 2896}
    report.sizes = {
        "prompt": PROMPT,
        "new": NEW,
        "transformer": TRANSFORMER,
        "memory": MEMORY,
        "half_keys": sizes,
    }
    memory: dict[str, float] = {}
    for size, half_keys in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            checkpoint = write_run(run, half_keys)
            warm = ["rows", "mapped", "in memory"] if size == "0.3 GB" else ["rows", "mapped"]
            for how, cold in [(how, False) for how in warm] + [("rows", True), ("mapped", True)]:
                peaks = []
                tokens: list[float] = []
                for seed in range(1 if cold or setting.quick else 3):
                    if cold:
                        put_out_of_cache(checkpoint)
                    result = generated(run, how, seed)
                    times = result["times"]
                    tokens += [after - time for time, after in pairwise(times[1:])]
                    peaks.append(result["peak_bytes"])
                    prompt = times[1] - times[0]
                name = f"{how}{', cold' if cold else ''}, {size}"
                report.rows[f"prompt, {name}"] = Row(f"prompt, {name}", f"{PROMPT} tokens", [prompt])
                report.rows[f"token, {name}"] = Row(f"token, {name}", "1 token", tokens)
                memory[name] = max(peaks) / 1e9
                print(f"{name:28} most resident {memory[name]:6.2f} GB", flush=True)
                if size == "8.6 GB" and how == "rows":
                    report.values["resident_gb_8gb_table"] = max(
                        memory[name], report.values.get("resident_gb_8gb_table", 0.0)
                    )
    report.extra = {"resident_gb": memory, "options": asdict(MemoryConfig(**MEMORY))}
    for size in sizes:
        report.ratio(f"token_mapped_over_rows_{size}", f"token, mapped, {size}", f"token, rows, {size}")
    report.ratio("token_rows_over_in_memory", "token, rows, 0.3 GB", "token, in memory, 0.3 GB")
    report.finish()


if __name__ == "__main__":
    main()
