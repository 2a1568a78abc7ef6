"""Text to be had on any machine, and memlm commands as processes: timed, watched and killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


# -- text


def documents(megabytes: float) -> Iterator[str]:
    """Documents of so many megabytes in all, always the same for the same environment."""
    rest, shift = megabytes * 1e6, 0
    paths = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")}
    files = sorted(
        {f for p in paths for suffix in ("py", "md", "rst", "txt") for f in p.rglob(f"*.{suffix}")},
        key=lambda file: hashlib.sha256(file.name.encode() + str(file.stat().st_size).encode()).digest(),
    )
    while rest > 0:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            generator = random.Random(f"{file.name} {shift}")
            at = generator.randrange(4000) if shift else 0
            while at < len(text) and rest > 0:
                size = int(500 * 2 ** generator.uniform(0, 5))
                document = text[at : at + size]
                at += size
                if document.strip():
                    rest -= len(document.encode())
                    yield document
            if rest <= 0:
                return
        shift += 1


def write_json_lines(path: Path, megabytes: float) -> None:
    """Documents as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(documents(megabytes)):
            file.write(json.dumps({"id": number, "text": text}) + "\n")


# -- processes


def command(*words: str) -> list[str]:
    """memlm as a process of its own."""
    return [sys.executable, "-m", "memlm", *words]


def run(*words: str, **options: Any) -> float:
    """Seconds that a command takes; its output is shown only if it fails."""
    start = time.perf_counter()
    done = subprocess.run(command(*words), capture_output=True, text=True, env=environment(), **options)
    if done.returncode:
        raise RuntimeError(f"memlm {' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def environment() -> dict[str, str]:
    """The environment of commands: this project first."""
    return os.environ | {"PYTHONPATH": str(ROOT)}


def memory_of(pid: int) -> int:
    """Bytes that a process and its descendants hold, shared pages counted once (PSS)."""
    total, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        try:
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += int(line.split()[1]) * 1024
            for task in Path(f"/proc/{process}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def killed(words: list[str], cwd: Path, after: float) -> bool:
    """Start a command and kill it with SIGKILL after so many seconds; whether it still ran."""
    process = subprocess.Popen(
        command(*words), cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(after)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
