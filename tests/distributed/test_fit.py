"""``memlm fit`` and ``memlm test`` on two processes, from the command line: losses, checkpoints, errors."""

import json
import os

import pytest
import torch
from cli_runs import CONFIG, GROUP, ONE, OVERLAYS, TWO, Place

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With four runs: 12 steps on one process and on two, and the first 6 of them."""
    place = Place(tmp_path_factory.mktemp("fit"), CONFIG)
    for name, words in {"one": ONE, "two": TWO}.items():
        place.run("fit", name, *words)
        place.run("fit", f"{name}_half", *words, "--trainer.max_steps", "6")
    return place


def assert_equal(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_losses_are_those_of_one_process(place):
    for column in ("train/loss", "val/loss", "train/gradient_norm_dense", "train/gradient_norm_values"):
        assert place.column("two", column) == pytest.approx(place.column("one", column), rel=1e-5), column
    assert place.column("two", "train/tokens") == place.column("one", "train/tokens")


@pytest.mark.parametrize(
    "words", [["--trainer.accumulate_grad_batches", "2"], ["--trainer.precision", "bf16-mixed"]]
)
def test_other_trainer_options(place, words, tmp_path):
    other = Place(tmp_path, CONFIG)
    watched = ["--trainer.callbacks+=Throughput", "--trainer.callbacks+=SlotUsage"]
    other.run("fit", "one", *ONE, *words, *watched)
    other.run("fit", "two", *TWO, *words, *watched)
    # bf16 rounds sums of other summands to other numbers, by which a few of 256 slots are read or not.
    tolerance, of_slots = (2e-3, 0.05) if "bf16-mixed" in words else (1e-5, 1e-4)
    assert other.column("two", "val/loss") == pytest.approx(other.column("one", "val/loss"), rel=tolerance)
    for column in ("memory/main/slots_read", "memory/main/slots_read_in_training"):
        expected = other.column("one", column)
        assert other.column("two", column) == pytest.approx(expected, rel=of_slots), column


def test_continues_on_as_many_bit_for_bit(place):
    place.run("fit", "two_two", *TWO, "--ckpt_path", str(place.checkpoint("two_half")))
    assert_equal(place.tensors("two_two"), place.tensors("two"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("two", ONE),
        ("two", [*ONE, *TWO[:2], "--trainer.devices", "1"]),
        ("two", [*TWO, GROUP, "1"]),
        ("one", TWO),
        ("two", [*TWO, "--trainer.strategy.init_args.save_distributed_checkpoint", "false"]),
    ],
    ids=["two to a single device", "two to one", "other group", "single device to two", "to a single file"],
)
def test_continues_elsewhere(place, source, words, request):
    name = request.node.callspec.id.replace(" ", "_")
    place.run("fit", name, *words, "--ckpt_path", str(place.checkpoint(f"{source}_half")))
    assert_equal(place.tensors(name), place.tensors(source), tolerance=2e-6)


def test_best_is_the_same_files(place):
    last, best = place.checkpoint("two"), place.checkpoint("two", "best")
    assert best.is_dir()
    assert all(os.path.samefile(file, best / file.name) for file in last.iterdir())
    assert not [path for path in last.parent.iterdir() if path not in (last, best)]


def test_measures_the_same_on_two_processes_and_one(place):
    found = []
    for words in (TWO, ONE, [*ONE, *TWO[:2], "--trainer.devices", "1"]):
        place.run("test", "two", *words, "--ckpt_path", "last")
        found.append(json.loads((place.runs / "two" / "test.json").read_text()))
    assert found[0]["step"] == 12
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=1e-6)
            assert other[name] == expected, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([GROUP, "3"], "memory_group: is 3, must divide the number of processes (2)"),
        (
            ["--model.init_args.memory.value_dim", "15"],
            "memory_group: is 2, must divide the 15 elements of a value of pool 'main'",
        ),
    ],
)
def test_refuses_a_mesh_that_does_not_divide(place, words, message):
    said = place.run("fit", "refused", *TWO, *words, code=2)
    errors = [line for line in said.splitlines() if "error" in line]
    assert errors == [f"memlm: error: trainer.strategy.init_args.{message}"]
    assert not (place.runs / "refused").exists()


@pytest.mark.parametrize("overlay", ["ddp", "fsdp", "deepspeed"])
def test_dense_models(tmp_path, overlay):
    options = CONFIG["model"]["init_args"]
    dense = {"transformer": options["transformer"], "optimizer": options["optimizer"]}
    other = Place(tmp_path, CONFIG | {"model": {"class_path": "memlm.DenseLM", "init_args": dense}})
    other.run("fit", "one", *ONE)
    other.run("fit", "two", "--config", str(OVERLAYS / f"{overlay}.yaml"), "--trainer.devices", "2")
    for column in ("train/loss", "val/loss"):
        assert other.column("two", column) == pytest.approx(other.column("one", column), rel=1e-5)


def test_torchrun(place):
    words = place.words("fit", "torchrun", *TWO)
    process = place.start(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words])
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error[-4000:]
    assert_equal(place.tensors("torchrun"), place.tensors("two"))
