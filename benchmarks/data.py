"""Preparing, reading and streaming text against their bars; runs that are killed against runs that are not.

    python benchmarks/data.py --json benchmarks/results/data.json

The text is that of the Python files and pages that are installed here, the standard library's and the
environment's, cut into documents of 0.5 to 16 KB; there are some hundred MB of it, and beyond that the cuts
move on. Takes 25 minutes; needs 12 GB of disk for temporary files (TMPDIR says where).
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from statistics import median

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.commands import (
    ROOT,
    command,
    cpu_seconds,
    digests,
    environment,
    killed,
    memory_of,
    run,
    write_json_lines,
)
from benchmarks.measure import Report, parse
from data_modules.packed_tokens import PackedTokens
from data_modules.prepared.manifest import Manifest, ShardInfo
from data_modules.text_stream import TextStream
from memlm.run_metrics import read_metrics

BARS = {
    "prepare_vs_tokenizers": (0.80, ">="),
    "prepare_memory_gb": (1.5, "<="),
    "read_million_tokens_per_second": (50.0, ">="),
    "startup_seconds": (2.0, "<="),
    "resume_seconds": (2.0, "<="),
    "stream_workers_busy": (0.85, ">="),
    "quickstart_data_wait_share": (0.02, "<="),
    "packed_data_wait_share": (0.02, "<="),
    "prepare_kills_differing": (0, "<="),
    "training_kills_differing": (0, "<="),
}


# -- preparing


_BASELINE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
texts = [json.loads(line)["text"] for line in open(sys.argv[2], encoding="utf-8")]
encode = getattr(tokenizer, sys.argv[3])
start = time.perf_counter()
for first in range(0, len(texts), 1000):
    encode(texts[first : first + 1000], add_special_tokens=False)
print(time.perf_counter() - start)
"""


def baseline(tokenizer: Path, file: Path, method: str) -> float:
    """Seconds that tokenizers' own batch method takes for all documents, in memory, with two threads."""
    done = subprocess.run(
        [sys.executable, "-c", _BASELINE, str(tokenizer), str(file), method],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"RAYON_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "true"},
    )
    return float(done.stdout)


def prepare_words(file: Path, tokenizer: Path, output: Path, *more: str) -> list[str]:
    """The words of a preparation by two workers."""
    return [
        *("prepare", f'--paths=["{file}"]', "--tokenizer", str(tokenizer), "--output", str(output)),
        *("--validation_fraction", "0.01", "--workers", "2", *more),
    ]


def prepare_speed(report: Report, work: Path, megabytes: float, rounds: int) -> None:
    """Whole commands, start-up included, in turns with tokenizers alone."""
    file, tokenizer = work / "speed.jsonl", work / "tokenizer.json"
    write_json_lines(file, megabytes)
    text_bytes = sum(len(json.loads(line)["text"].encode()) for line in file.open(encoding="utf-8"))
    seconds: dict[str, list[float]] = {"encode_batch": [], "encode_batch_fast": [], "memlm prepare": []}
    for _ in range(rounds):
        for method in ("encode_batch", "encode_batch_fast"):
            seconds[method].append(baseline(tokenizer, file, method))
        output = work / "speed"
        seconds["memlm prepare"].append(
            run(*prepare_words(file, tokenizer, output, "--shard_megabytes", str(max(1, megabytes / 8))))
        )
        shutil.rmtree(output)
    middle = {name: median(all_of_it) for name, all_of_it in seconds.items()}
    report.values["prepare_vs_tokenizers"] = middle["encode_batch"] / middle["memlm prepare"]
    report.comparisons["prepare_vs_encode_batch_fast"] = middle["encode_batch_fast"] / middle["memlm prepare"]
    for name, value in middle.items():
        report.comparisons[f"{name}, MB/s"] = text_bytes / 1e6 / value
    report.extra["prepare_seconds"] = seconds | {"text_megabytes": text_bytes / 1e6}


def prepare_memory(report: Report, work: Path, megabytes: float) -> None:
    """Largest memory of a preparation with all its processes, pages of files not counted."""
    file, output = work / "large.jsonl", work / "large"
    write_json_lines(file, megabytes)
    start = time.perf_counter()
    process = subprocess.Popen(
        command(*prepare_words(file, work / "tokenizer.json", output)),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    samples = []
    while process.poll() is None:
        samples.append(memory_of(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"memlm prepare of {file} failed")
    seconds = time.perf_counter() - start
    report.values["prepare_memory_gb"] = max(samples) / 1e9
    counts = Manifest.load(output)
    report.extra["prepare_large"] = {
        "megabytes": file.stat().st_size / 1e6,
        "seconds": seconds,
        "tokens": sum(info.tokens for infos in counts.splits.values() for info in infos),
        "memory_gb_by_tenth": [
            max(samples[len(samples) * i // 10 : len(samples) * (i + 1) // 10 + 1]) / 1e9 for i in range(10)
        ],
    }
    report.comparisons["prepare of the large file, MB/s"] = file.stat().st_size / 1e6 / seconds
    file.unlink()


# -- reading


def reading(report: Report, folder: Path, seconds: float) -> None:
    """Tokens a second of batches of 8 rows of 4,096, in the order of training, from the page cache."""
    for shard in folder.glob("*.tokens"):
        shard.read_bytes()
    for name, options in {
        "in the process": {},
        "one worker": {"num_workers": 1},
        "two workers": {"num_workers": 2},
        "best_fit": {"packing": "best_fit"},
    }.items():
        data = PackedTokens(str(folder), sequence_length=4096, batch_size=8, **options)  # type: ignore[arg-type]
        data.prepare_data()
        data.setup("fit")
        batches = iter(data.train_dataloader())
        for _ in range(20):
            next(batches)
        start, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            count += next(batches)["tokens"].numel()
        if name == "in the process":
            report.values["read_million_tokens_per_second"] = count / elapsed / 1e6
        else:
            report.comparisons[f"read, {name}, million tokens/s"] = count / elapsed / 1e6
        del batches


_START = """
import json, resource, sys, time
from data_modules.packed_tokens import PackedTokens
def anonymous():
    status = open("/proc/self/status").read()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
before, start = anonymous(), time.perf_counter()
data = PackedTokens(sys.argv[1], sequence_length=4096, batch_size=8)
data.prepare_data(); data.setup("fit")
data.advance(int(sys.argv[2]))
batch = next(iter(data.train_dataloader()))
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": anonymous() - before}))
"""


def start(folder: Path, cursor: int) -> dict[str, float]:
    """Seconds and bytes until the first batch from a position on; imports are not counted."""
    words = [sys.executable, "-c", _START, str(folder), str(cursor)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment(), cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def start_up(report: Report, work: Path, folder: Path, billions: float) -> None:
    """A folder of so many tokens in sparse files, from its start and from the middle."""
    large = sparse_folder(Manifest.load(folder), work / "sparse", int(billions * 1e9))
    cold, deep = start(large, 0), start(large, int(billions * 1e9 / 4096 / 2))
    report.values["startup_seconds"] = cold["seconds"]
    report.values["resume_seconds"] = deep["seconds"]
    report.comparisons["start-up memory, MB"] = cold["bytes"] / 1e6
    report.comparisons["start-up of the small folder, s"] = start(folder, 0)["seconds"]
    shutil.rmtree(large)


def sparse_folder(original: Manifest, folder: Path, tokens: int) -> Path:
    """A folder of so many tokens in shards of 64 million, which are holes between a header and an index."""
    per_shard, shards = 64_000_000, []
    folder.mkdir()
    shutil.copy(original.folder / original.tokenizer, folder)
    for number in range(-(-tokens // per_shard)):
        info = ShardInfo(f"train-{number:05}.tokens", 1, per_shard, per_shard, f"{number:064x}")
        header = original.header(info)
        with (folder / info.file).open("wb") as file:
            file.write(header.pack())
            file.seek(header.starts_at)
            file.write(np.array([0, per_shard], "<u8").tobytes())
        shards.append(info)
    replace(original, folder=folder, splits={"train": shards, "validation": []}).save()
    return folder


# -- streaming


def streaming(report: Report, work: Path, megabytes: float, seconds: float) -> None:
    """Two workers that tokenise for a consumer that takes all they give: their CPU time and speed."""
    for number in range(4):
        write_json_lines(work / f"stream-{number}.jsonl", megabytes / 4)
    speeds = {}
    for workers in (0, 2):
        data = TextStream(
            [str(work / "stream-*.jsonl")],
            str(work / "tokenizer.json"),
            sequence_length=1024,
            batch_size=8,
            validation_fraction=0.0,
            num_workers=workers,
            lanes=2,
        )
        batches = iter(data.train_dataloader())
        for _ in range(20):
            next(batches)
        pids = [child.pid for child in active_children() if child.pid is not None]
        busy = {pid: cpu_seconds(pid) for pid in pids}
        start_time, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start_time) < seconds:
            count += next(batches)["tokens"].numel()
        speeds[workers] = count / elapsed
        if workers:
            report.values["stream_workers_busy"] = sum(cpu_seconds(pid) - busy[pid] for pid in pids) / (
                elapsed * workers
            )
        del batches
    report.comparisons["stream, two workers, thousand tokens/s"] = speeds[2] / 1e3
    report.comparisons["stream, two workers over none"] = speeds[2] / speeds[0]


# -- training


def data_wait(report: Report, work: Path, folder: Path, steps: int) -> None:
    """Share of training in which the loop waited for data, as the Throughput callback logs it."""
    for name, words in {
        "quickstart": ["--config", str(ROOT / "configs/quickstart.yaml")],
        "packed": ["--config", str(ROOT / "configs/pretrain.yaml"), f"--data.folders={folder}"],
    }.items():
        steps_here = steps if name == "quickstart" else max(steps // 4, 10)
        run(
            *("fit", *words, "--trainer.max_steps", str(steps_here), "--run.name", name),
            *("--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "1"),
            cwd=work,
        )
        rows = read_metrics(work / "runs" / name / "metrics.csv")
        shares = [row["train/data_wait_share"] for row in rows if "train/data_wait_share" in row]
        report.values[f"{name}_data_wait_share"] = median(shares)


# -- kills


def prepare_kills(report: Report, work: Path, megabytes: float, count: int) -> None:
    """Preparations killed at random moments and started again until they end, against one that was not."""
    file, tokenizer = work / "kills.jsonl", work / "tokenizer.json"
    write_json_lines(file, megabytes)
    more = ("--deduplicate", "true", "--shard_megabytes", str(megabytes / 10))
    whole = run(*prepare_words(file, tokenizer, work / "whole", *more))
    expected, generator = digests(work / "whole"), random.Random(0)
    report.values["prepare_kills_differing"] = 0
    moments: list[float] = []
    while len(moments) < count:
        output = work / "killed"
        words = prepare_words(file, tokenizer, output, *more)
        moment = generator.uniform(0.1, whole)
        if killed(words, work, moment):  # it may have been quicker this time
            moments.append(moment)
        run(*words)
        report.values["prepare_kills_differing"] += digests(output) != expected
        shutil.rmtree(output)
    report.extra["prepare_kills"] = {"seconds_uninterrupted": whole, "killed_after": moments}


def training_kills(report: Report, work: Path, folder: Path, steps: int, count: int) -> None:
    """Runs killed at random moments and resumed until they end: the rows of their metrics are to be equal."""
    config = yaml.safe_load((ROOT / "configs/pretrain.yaml").read_text())
    small = {"dim": 32, "layers": 2, "heads": 2, "feed_forward_dim": 64}
    config["model"]["init_args"] |= {
        "transformer": small,
        "memory": {"half_keys": 16, "heads": 2, "reads": 4, "layers": [1], "query_norm": "qk"},
    }
    config["data"]["init_args"] = {
        "folders": str(folder),
        "sequence_length": 64,
        "batch_size": 4,
        "num_workers": 2,
    }
    config["trainer"] |= {
        "max_steps": steps,
        "val_check_interval": 10,
        "limit_val_batches": 2,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "callbacks": [],
        "logger": None,
    }
    (work / "kill.yaml").write_text(yaml.safe_dump(config))
    words = ["fit", "--config", "kill.yaml", "--run.name"]
    whole = run(*words, "whole", cwd=work)
    expected, generator = read_metrics(work / "runs/whole/metrics.csv"), random.Random(1)
    report.values["training_kills_differing"] = 0
    moments: list[float] = []
    resumed = 0
    while len(moments) < count:
        moment = generator.uniform(0.4 * whole, whole)
        shutil.rmtree(work / "runs/cut", ignore_errors=True)
        if not killed([*words, "cut"], work, moment):
            continue
        moments.append(moment)
        if (work / "runs/cut/checkpoints/last.ckpt").exists():
            resumed += 1
            if read_metrics(work / "runs/cut/metrics.csv")[-1]["step"] < steps:
                run(*words, "cut", "--ckpt_path", "last", cwd=work)
        else:  # killed before the first checkpoint: there is nothing to resume
            shutil.rmtree(work / "runs/cut", ignore_errors=True)
            run(*words, "cut", cwd=work)
        rows = read_metrics(work / "runs/cut/metrics.csv")
        report.values["training_kills_differing"] += rows != expected
    report.extra["training_kills"] = {
        "seconds_uninterrupted": whole,
        "killed_after": moments,
        "resumed_from_a_checkpoint": resumed,
    }


def main() -> None:
    """Measure everything."""
    setting = parse("Preparing, reading and streaming text.", "data.py")
    report = Report(setting, BARS)
    quick = setting.quick
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_json_lines(work / "text.jsonl", 20 if quick else 100)
        run(
            *("tokenizer", "train", f'--paths=["{work}/text.jsonl"]', "--vocab_size", "16384"),
            *("--output", str(work / "tokenizer.json")),
        )
        run(*prepare_words(work / "text.jsonl", work / "tokenizer.json", work / "text"))
        folder = work / "text"
        parts: list[tuple[tuple[str, ...], Callable[[], None]]] = [
            (
                ("prepare_vs_tokenizers",),
                lambda: prepare_speed(report, work, 20 if quick else 100, 1 if quick else 3),
            ),
            (("read_million_tokens_per_second",), lambda: reading(report, folder, 2 if quick else 10)),
            (
                ("startup_seconds", "resume_seconds"),
                lambda: start_up(report, work, folder, 1 if quick else 10),
            ),
            (
                ("stream_workers_busy",),
                lambda: streaming(report, work, 20 if quick else 100, 5 if quick else 20),
            ),
            (
                ("quickstart_data_wait_share", "packed_data_wait_share"),
                lambda: data_wait(report, work, folder, 100 if quick else 400),
            ),
            (
                ("prepare_kills_differing",),
                lambda: prepare_kills(report, work, 10 if quick else 40, 2 if quick else 20),
            ),
            (
                ("training_kills_differing",),
                lambda: training_kills(report, work, folder, 300, 2 if quick else 20),
            ),
            (("prepare_memory_gb",), lambda: prepare_memory(report, work, 100 if quick else 2000)),
        ]
        for bars, part in parts:
            with report.attempt(*bars):
                part()
                print({bar: report.values[bar] for bar in bars}, flush=True)
    report.finish()


if __name__ == "__main__":
    main()
