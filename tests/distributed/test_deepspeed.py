"""DeepSpeed's ZeRO for the dense parameters: losses of one process, and checkpoints of any strategy."""

import json
from pathlib import Path

import pytest
from cli_runs import CONFIG, ONE, TWO, Place
from test_fit import assert_equal
from test_options import close, results_of, start

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("several_runs.py")
STRATEGY = "memlm.parallel.deepspeed_strategy.MemoryDeepSpeedStrategy"
STRATEGY_OPTIONS = "--trainer.strategy.init_args."
STEPS, HALF = 20, 10
HALF_WAY = ["--trainer.max_steps", str(HALF)]
MODEL = "--model.init_args."
# Else the parameters of so small a model would stay whole on every rank.
SPLIT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
EXPERTS = {"experts": 4, "routing": "token_choice", "top_k": 2, "balance_rate": 0.01}
OPTIONS = {
    "accumulated": ["--trainer.accumulate_grad_batches", "2"],
    "clipped_together": [f"{MODEL}values_optimizer.clip", "global", "--trainer.gradient_clip_val", "0.3"],
    "recomputed": [f"{MODEL}transformer.activation_checkpointing", "true"],
    "experts": [f"{MODEL}moe", json.dumps(EXPERTS | {"layers": [0]})],
    "schedule": [f"{MODEL}optimizer.schedule", '{"shape": "cosine", "warmup_steps": 3}'],
    "bf16": ["--trainer.precision", "bf16-mixed"],
}
SHORT = ["--trainer.max_steps", "6", "--trainer.val_check_interval", "6"]


def zero(stage, group=None, config=None):
    prefix = STRATEGY_OPTIONS
    words = ["--trainer.devices", "2", "--trainer.strategy", STRATEGY, f"{prefix}stage", str(stage)]
    if group is not None:
        words += [f"{prefix}memory_group", str(group)]
    if config is not None:
        words += [f"{prefix}config", json.dumps(config)]
    return words


STAGES = {"zero1": zero(1), "zero2": zero(2, 1), "zero3": zero(3, config=SPLIT_ALL), "zero3_kept": zero(3, 1)}


class Runs(Place):
    """Runs of several verbs in one start of so many processes."""

    def several(self, ranks, runs):
        words = [[verb, *self.words(verb, name, *more)[3:]] for verb, name, *more in runs]
        start = [str(SCRIPT), json.dumps(words)]
        if ranks > 1:
            start[:0] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        process = self.start(start)
        out, error = process.communicate(timeout=500)
        assert process.returncode == 0, error[-4000:]
        return out + error

    def resume(self, name):
        return ["--ckpt_path", str(self.checkpoint(name))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of one process, of each stage, and of the first half of each."""
    trainer = CONFIG["trainer"] | {"max_steps": STEPS, "val_check_interval": HALF}
    runs = Runs(tmp_path_factory.mktemp("deepspeed"), CONFIG | {"trainer": trainer})
    runs.several(1, [["fit", "one", *ONE], ["fit", "one_half", *ONE, *HALF_WAY]])
    kinds = STAGES | {"fsdp": TWO}
    halves = [["fit", f"{name}_half", *words, *HALF_WAY] for name, words in kinds.items()]
    runs.several(2, [["fit", name, *words] for name, words in STAGES.items()] + halves)
    return runs


def assert_same_losses(runs, found, expected, tolerance=1e-5):
    columns = {"train/loss", "val/loss", "train/gradient_norm_dense", "train/gradient_norm_values"}
    for column in columns:
        assert runs.column(found, column) == pytest.approx(runs.column(expected, column), rel=tolerance), (
            found,
            column,
        )


@pytest.mark.parametrize("name", STAGES)
def test_losses_are_those_of_one_process(runs, name):
    assert_same_losses(runs, name, "one")
    assert len(runs.column(name, "train/loss")) == STEPS
    assert_equal(runs.tensors(name), runs.tensors("one"), tolerance=2e-5)


def test_continues_bit_for_bit(runs):
    runs.several(2, [["fit", f"{name}_on", *STAGES[name], *runs.resume(f"{name}_half")] for name in STAGES])
    for name in STAGES:
        assert_equal(runs.tensors(f"{name}_on"), runs.tensors(name))


def test_continues_under_other_strategies(runs):
    runs.several(
        2,
        [
            ["fit", "zero3_to_fsdp", *TWO, *runs.resume("zero3_half")],
            ["fit", "fsdp_to_zero3", *STAGES["zero3"], *runs.resume("fsdp_half")],
            ["fit", "one_to_zero2", *STAGES["zero2"], *runs.resume("one_half")],
            ["fit", "asynchronous", *STAGES["zero3"], f"{STRATEGY_OPTIONS}asynchronous_save", "true"],
            ["fit", "to_a_file", *STAGES["zero3"], f"{STRATEGY_OPTIONS}save_distributed_checkpoint", "false"],
            ["fit", "zero2_to_zero3", *STAGES["zero3_kept"], *runs.resume("zero2_half")],
            ["test", "zero1", *STAGES["zero1"], "--ckpt_path", "last"],
            ["test", "zero3", *STAGES["zero3"], "--ckpt_path", "last"],
        ],
    )
    runs.several(
        1,
        [
            ["fit", "zero1_to_one", *ONE, *runs.resume("zero1_half")],
            ["fit", "zero3_to_one", *ONE, *runs.resume("zero3_half")],
            ["test", "one", *ONE, "--ckpt_path", "last"],
        ],
    )
    expected = runs.tensors("one")
    for name in (
        *("zero3_to_fsdp", "fsdp_to_zero3", "one_to_zero2"),
        *("zero2_to_zero3", "zero1_to_one", "zero3_to_one", "asynchronous", "to_a_file"),
    ):
        assert_equal(runs.tensors(name), expected, tolerance=2e-5)
    found = {name: json.loads((runs.runs / name / "test.json").read_text()) for name in ("zero1", "zero3")}
    one = json.loads((runs.runs / "one" / "test.json").read_text())
    for measured in found.values():
        assert measured["test/loss"] == pytest.approx(one["test/loss"], rel=1e-5)


def test_other_options(runs):
    runs.several(1, [["fit", name, *ONE, *SHORT, *words] for name, words in OPTIONS.items()])
    kinds = {name: ["zero2", "zero3"] if name in ("accumulated", "bf16") else ["zero3"] for name in OPTIONS}
    kinds["accumulated"] += ["zero1"]
    kinds["clipped_together"] += ["zero1"]
    pairs = [(name, kind) for name, of_option in kinds.items() for kind in of_option]
    runs.several(
        2, [["fit", f"{name}_{kind}", *STAGES[kind], *SHORT, *OPTIONS[name]] for name, kind in pairs]
    )
    for name, kind in pairs:
        # There, dense parameters are rounded to bf16, and not only what is computed.
        if name == "bf16":
            found, expected = (runs.column(run, "val/loss") for run in (f"{name}_{kind}", name))
            assert found == pytest.approx(expected, rel=1e-2)
        else:
            assert_same_losses(runs, f"{name}_{kind}", name)


@pytest.mark.parametrize("group", [1, 2])
def test_tasks_of_which_ranks_have_unequal_shares(tmp_path, group):
    options = {"stage": 3, "memory_group": group, "config": SPLIT_ALL}
    case = {"callbacks": True, "strategy": "memory_deepspeed", "of_strategy": options}
    one, two = (results_of(start({"tasks": case}, tmp_path / str(ranks), ranks))["tasks"] for ranks in (1, 2))
    assert any(metric.startswith("piqa") or "piqa/" in metric for metric in one["logged"])
    close(two["logged"], one["logged"], "tasks")


def test_a_pretrained_model_is_needed_only_at_the_start(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    options = {key: value for key, value in CONFIG["model"]["init_args"].items() if key != "transformer"}
    options["memory"] = options["memory"] | {"mode": "beside", "start_at_zero": True}
    options["pretrained"] = {"folder": str(folder), "train": "everything"}
    runs = Runs(tmp_path, CONFIG | {"model": {"class_path": "memlm.MemoryLM", "init_args": options}})
    steps = [f"--trainer.{key}" for key in ("max_steps", "val_check_interval")]
    half, whole = ([word for step in steps for word in (step, number)] for number in ("2", "4"))
    runs.several(1, [["fit", "one", *ONE, *whole]])
    runs.several(2, [["fit", "half", *STAGES["zero3"], *half]])
    folder.rename(tmp_path / "elsewhere")
    runs.several(2, [["fit", "on", *STAGES["zero3"], *whole, *runs.resume("half")]])
    assert runs.column("half", "train/loss") + runs.column("on", "train/loss") == pytest.approx(
        runs.column("one", "train/loss"), rel=1e-5
    )


def test_dense_models(tmp_path):
    options = CONFIG["model"]["init_args"]
    dense = {"transformer": options["transformer"], "optimizer": options["optimizer"]}
    other = Runs(tmp_path, CONFIG | {"model": {"class_path": "memlm.DenseLM", "init_args": dense}})
    tied = [f"{MODEL}transformer.tie_embeddings", "true"]
    other.several(1, [["fit", "one", *ONE], ["fit", "one_tied", *ONE, *tied]])
    runs = [["fit", name, *words] for name, words in STAGES.items()]
    runs += [["fit", f"{name}_tied", *STAGES[name], *tied] for name in ("zero1", "zero3")]
    other.several(2, runs)
    for _, name, *_ in runs:
        expected = "one_tied" if name.endswith("_tied") else "one"
        for column in ("train/loss", "val/loss"):
            assert other.column(name, column) == pytest.approx(other.column(expected, column), rel=1e-5), name
