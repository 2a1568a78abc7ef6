"""How many threads a tokenizer may use, by the variables that the package ``tokenizers`` obeys."""

import os


def batch_threads() -> int:
    """Threads for a batch: one if TOKENIZERS_PARALLELISM is off, else RAYON_NUM_THREADS, else all cores."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("0", "false", "off", "no", "n", "f"):
        return 1
    wanted = os.environ.get("RAYON_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
