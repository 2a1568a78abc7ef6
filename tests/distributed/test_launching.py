"""Processes that torchrun on two nodes, SLURM, or one command starts train as one process does."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from cli_runs import CONFIG, OVERLAYS, TWO, Place

pytestmark = pytest.mark.distributed

FOUR = [*TWO[:2], "--trainer.devices", "4", "--data.init_args.batch_size", "2"]
SHORT = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4"]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(commands, environments, timeout=240):
    """Codes and outputs of commands that run at the same time."""
    base = os.environ | {"OMP_NUM_THREADS": "1", "MEMLM_KERNELS": "reference"}
    base.pop("PYTEST_XDIST_WORKER", None)
    processes = [
        subprocess.Popen(
            [sys.executable, *words], env=base | own, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for words, own in zip(commands, environments, strict=True)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        return [process.returncode for process in processes], outputs
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With a run of one process on the rows of all."""
    place = Place(tmp_path_factory.mktemp("launching"), CONFIG)
    place.run("fit", "one", "--data.init_args.batch_size", "8", *SHORT)
    return place


def check(place, name):
    assert place.checkpoint(name).is_dir()
    for column in ("train/loss", "val/loss"):
        assert place.column(name, column) == pytest.approx(place.column("one", column), rel=1e-5), column


def nodes(words, port):
    """Two torchrun commands, as on two machines."""
    return [
        ["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1",
         "--master_addr=127.0.0.1", f"--master_port={port}", *words]
        for node in range(2)
    ]  # fmt: skip


def slurm(tasks, port):
    """What srun tells each of the tasks on one node."""
    return [
        {
            "SLURM_NTASKS": str(tasks),
            "SLURM_NTASKS_PER_NODE": str(tasks),
            "SLURM_NNODES": "1",
            "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task),
            "SLURM_NODEID": "0",
            "SLURM_JOB_ID": "1234",
            "SLURM_JOB_NAME": "memlm",
            "SLURM_NODELIST": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for task in range(tasks)
    ]


def test_torchrun_on_two_nodes(place):
    words = place.words(
        "fit", "nodes", *TWO[:2], *SHORT, "--trainer.devices", "1", "--trainer.num_nodes", "2"
    )
    codes, outputs = together(nodes(words, free_port()), [{}, {}])
    assert codes == [0, 0], outputs
    check(place, "nodes")


SRUN = """#!/bin/bash
# As srun on one node: a process for each task. Its own options come first.
while [[ $1 == --* ]]; do shift; done
for task in $(seq 0 $((SLURM_NTASKS_PER_NODE - 1))); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 SLURM_NTASKS=$SLURM_NTASKS_PER_NODE "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait $task || code=$?; done
exit ${code:-0}
"""


def test_slurm(place, tmp_path):
    """The file for sbatch, with a stand-in for srun: it starts a run, and goes on with it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "memlm": f'#!/bin/bash\nexec {sys.executable} -m memlm "$@"\n'}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "configs").symlink_to(OVERLAYS.parent)
    config = tmp_path / "slurm.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    environment = slurm(2, free_port())[0] | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(OVERLAYS.parents[1]),
        "OMP_NUM_THREADS": "1",
        "MEMLM_KERNELS": "reference",
    }
    for key in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS"):
        del environment[key]
    words = ["bash", str(OVERLAYS / "slurm.sh"), str(config), "slurm", "--trainer.val_check_interval", "4"]
    for steps in ("2", "4"):
        done = subprocess.run(
            [*words, "--trainer.max_steps", steps], env=os.environ | environment, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    for column in ("train/loss", "val/loss"):
        found = place.column(tmp_path / "runs" / "slurm", column)
        assert found == pytest.approx(place.column("one", column), rel=1e-5), column


def test_four_processes_by_one_command(place):
    place.run("fit", "four", *FOUR, *SHORT)
    check(place, "four")


def test_slurm_with_another_number_of_tasks(place):
    words = place.words("fit", "tasks", *TWO, "--trainer.devices", "4")
    (code,), (output,) = together([words], slurm(2, free_port())[:1])
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("memlm: error")]
    assert (
        "trainer.devices: is 4, and trainer.num_nodes 1, which makes 4 processes; SLURM has started 2" in line
    )


def test_a_process_that_never_comes(place):
    """Rank 0 says so after the time-out of the strategy."""
    timeout = ["--trainer.strategy.init_args.timeout", "0:00:10"]
    words = place.words("fit", "alone", *TWO, *timeout)
    start = time.monotonic()
    (code,), (output,) = together([words], slurm(2, free_port())[:1])
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("memlm: error")]
    assert line.startswith("memlm: error: trainer.num_nodes: is 1: 2 processes were to meet at 127.0.0.1:"), (
        line
    )
    assert time.monotonic() - start < 200
    assert not (place.runs / "alone").exists()


def test_what_all_refuse_is_said_once(place):
    """Though processes have started: only then do they read the checkpoint."""
    place.run("fit", "damaged", *TWO, *SHORT)
    (place.checkpoint("damaged") / "__1_0.distcp").unlink()
    said = place.run("fit", "damaged", *TWO, "--ckpt_path", "last", code=2)
    (line,) = [line for line in said.splitlines() if line.startswith("memlm: error")]
    assert "__1_0.distcp" in line


def test_one_node_whose_configuration_is_wrong(place):
    """Its process says why; the launcher ends the others."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", "bash", "-c"]
    memlm = " ".join([sys.executable, *place.words("fit", "wrong", *TWO)])
    words.append(f"{memlm} $([ $RANK = 1 ] && echo --trainer.max_steps 0)")
    (code,), (output,) = together([words], [{}])
    assert code == 1, output
    lines = [line for line in output.splitlines() if line.startswith("memlm: error")]
    assert lines == [
        "memlm: error: trainer.max_steps: must be given, at least 1: training streams have no end"
    ]
