"""What activation checkpointing saves of a training step's memory, and what time it costs.

    python benchmarks/recomputation.py

Prints the peak memory of a process that makes some steps, less what it had before them, and seconds a step.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS, ROWS, LENGTH, VOCAB = 3, 8, 512, 1000


def measure(recomputed: bool) -> tuple[float, float]:
    """Peak MB and seconds of a step, of this process."""
    import torch

    from memlm.memory import MemoryConfig
    from memlm.metrics import summed_loss
    from memlm.transformer import Transformer, TransformerConfig

    torch.manual_seed(0)
    config = TransformerConfig(256, 8, 4, activation_checkpointing=recomputed)
    model = Transformer(VOCAB, config, MemoryConfig(half_keys=64, heads=4, reads=32, layers=[2, 5]))
    tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1))
    before, start = _peak(), 0.0
    for step in range(STEPS + 1):  # the first compiles kernels
        start = time.perf_counter() if step == 1 else start
        summed_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        model.zero_grad()
        for pool in model.pools.values():
            pool.gradient.clear()
    return _peak() - before, (time.perf_counter() - start) / STEPS


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print("{:.0f} MB, {:.2f} s a step".format(*measure(sys.argv[1] == "recomputed")))
    else:
        for kind in ("kept", "recomputed"):
            words = [sys.executable, __file__, kind]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            print(f"{kind}: {done.stdout.strip()}")
