"""Fits small models under the Trainer, on one process or several; rank 0 prints what was logged as JSON.

    torchrun --nproc_per_node 2 tests/distributed/options.py '{"folder": "/tmp/x", "cases": {"plain": {}}}'

A case is options of :func:`run`. All ranks together see the same batches, whatever their number; each case
runs in a folder of its own below ``folder``.
"""

import hashlib
import json
import os
import random
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers.logger import DummyLogger

import memlm
from benchmarks.counting import counted
from callbacks import ExpertLoad, Samples, SlotUsage, Throughput
from callbacks.run_directory import RunDirectory
from callbacks.tasks import Tasks
from data_modules import TextStream
from data_modules.prompts import PromptsConfig, PromptSource
from memlm.evaluation.multiple_choice import PIQA
from memlm.evaluation.question_answering import NQOpen
from memlm.evaluation.text_likelihood import TextPerplexity
from memlm.huggingface import read_architecture
from memlm.memory import EngramConfig, MemoryConfig, PEERConfig
from memlm.memory.pool import values_without_memory
from memlm.optim import OptimizerConfig, ScheduleConfig, ValuesOptimizerConfig
from memlm.parallel.deepspeed_strategy import MemoryDeepSpeedStrategy
from memlm.parallel.strategy import MemoryDDPStrategy, MemoryParallelStrategy
from memlm.pretrained import PretrainedConfig
from memlm.run_directory import RunFiles
from memlm.trainer_rules import quiet
from memlm.transformer import MoEConfig, TransformerConfig

STRATEGIES = {
    "memory_parallel": MemoryParallelStrategy,
    "memory_ddp": MemoryDDPStrategy,
    "memory_deepspeed": MemoryDeepSpeedStrategy,
}
MEMORIES = {"MemoryLM": MemoryConfig, "PEERLM": PEERConfig, "EngramLM": EngramConfig}
SMALL = {"half_keys": 9, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]}
CONSTANT = ScheduleConfig(shape="constant")
WORDS = ["one", "river", "runs", "over", "stones", "and", "never", "ends"]


class Kept(DummyLogger):
    """Keeps what is logged, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, list[float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(float(value))


class Initial(pl.Callback):
    """Keeps checksums of the parameters before the first step."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > 0:
            return
        self.checksums = {
            name: hashlib.sha256(whole.contiguous().view(torch.uint8).numpy()).hexdigest()
            for name, whole in parameters(pl_module).items()
        }


def model_of(case: dict[str, Any], vocab_size: int) -> memlm.LanguageModel:
    """The model of a case."""
    kind = case.get("kind", "MemoryLM")
    options: dict[str, Any] = {"optimizer": OptimizerConfig(learning_rate=0.01, schedule=CONSTANT)}
    if kind in MEMORIES:
        options["memory"] = MEMORIES[kind](**case.get("memory", SMALL))
        options["values_optimizer"] = ValuesOptimizerConfig(
            learning_rate=0.01, schedule=CONSTANT, **case.get("values", {})
        )
    if "moe" in case:
        options["moe"] = MoEConfig(**case["moe"])
    sizes = {"dim": 16, "layers": 2, "heads": 2, "feed_forward_dim": 32}
    if "pretrained" in case:
        options["pretrained"] = PretrainedConfig(**case["pretrained"])
        sizes = read_architecture(case["pretrained"]["folder"])["transformer"]
    transformer = TransformerConfig(**sizes | case.get("transformer", {}))
    return getattr(memlm, kind)(vocab_size, transformer, compile=case.get("compile", False), **options)


def data_of(folder: Path, batch_size: int) -> TextStream:
    """Text, of which validation has 7 batches and a bit."""
    draw = random.Random(0)
    for name, lines in {"train": 60, "valid": 11}.items():
        texts = [json.dumps({"text": " ".join(draw.choices(WORDS, k=30))}) for _ in range(lines)]
        (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n")
    return TextStream(
        [str(folder / "train.jsonl")],
        sequence_length=24,
        batch_size=batch_size,
        validation_paths=[str(folder / "valid.jsonl")],
    )


def tasks_of(folder: Path) -> list[Any]:
    """Tasks of an odd number of examples: ranks have unequal shares, of unequal lengths."""
    rows = [
        {"goal": f"go {'on ' * n}", "sol1": "left", "sol2": "far right", "label": n % 2} for n in range(5)
    ]
    (folder / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"question": f"who {n}", "answer": ["me"]} for n in range(3)]
    (folder / "nq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "book.txt").write_text("A river runs over stones. " * 9)
    return [
        PIQA(str(folder / "piqa.jsonl")),
        NQOpen(str(folder / "nq.jsonl"), shots=1, max_new_tokens=4),
        TextPerplexity(str(folder / "book.txt"), name="book"),
    ]


def run(case: dict[str, Any], folder: Path, rank: int, world: int) -> dict[str, Any]:
    """What was logged, and sums of the parameters after training.

    Options of a case: ``kind``, ``transformer``, ``memory``, ``values``, ``moe``, ``pretrained``, ``compile``
    and ``backend`` are the model's; ``strategy``, ``of_strategy``, ``precision``, ``accumulate`` and
    ``steps`` the Trainer's; ``callbacks``: whether to have all; ``also``: whether to validate, test and
    predict, too; ``count``: whether to count bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if world > 1:
        dist.barrier()
    pl.seed_everything(0, verbose=False)
    strategy: Any = "auto"
    if world > 1:
        strategy = STRATEGIES[case.get("strategy", "memory_parallel")](**case.get("of_strategy", {}))
    accumulate = case.get("accumulate", 1)
    data = data_of(folder, 8 // world // accumulate) if rank == 0 or world == 1 else None
    if world > 1:
        dist.barrier()
    data = data or data_of(folder, 8 // world // accumulate)
    if strategy == "auto":
        model = model_of(case, data.vocab_size)
    else:
        with values_without_memory():
            model = model_of(case, data.vocab_size)
    if "backend" in case:  # inductor's own part takes a C++ compiler a minute
        compiled = partial(model.transformer.compile, backend=case["backend"])
        model.transformer.compile = compiled  # type: ignore[method-assign]
    kept, initial = Kept(), Initial()
    callbacks: list[Any] = [initial]
    if case.get("callbacks"):
        callbacks += [
            RunDirectory(RunFiles(folder / "run"), fresh=False),
            Samples(["a river", ""], max_new_tokens=6),
            Tasks(tasks_of(folder), every_n_steps=3, records=True),
            Throughput(every_n_steps=2),
            SlotUsage(every_n_steps=1),
            ExpertLoad(every_n_steps=1),
        ]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        precision=case.get("precision", "32-true"),
        accumulate_grad_batches=accumulate,
        max_steps=case.get("steps", 6),
        max_epochs=-1,
        val_check_interval=3 * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        logger=kept,
        callbacks=callbacks,
        default_root_dir=folder,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with counted() as sent:
        trainer.fit(model, datamodule=data)
    result: dict[str, Any] = {
        "logged": kept.metrics, "initial": initial.checksums, "sums": sums(model), "dtypes": dtypes(trainer),
    }  # fmt: skip
    if case.get("count"):
        result["sent"] = sent.bytes
    if case.get("also"):
        kept.metrics = {}
        result["validated"] = trainer.validate(model, datamodule=data, verbose=False)
        result["tested"] = trainer.test(model, datamodule=data, verbose=False)
        prompts = folder / "prompts.txt"
        if rank == 0:
            prompts.write_text("a river\nover the stones\nnever\n")
        if world > 1:
            dist.barrier()
        config = PromptsConfig(str(prompts), max_new_tokens=5, batch_size=1)
        data.prompts = PromptSource(config, data.tokenizer, data.sequence_length)
        trainer.predict(model, datamodule=data, return_predictions=False)
        files = ("predictions.jsonl", "samples.txt", "test.json", "tasks.json")
        names = [*(folder / "run" / name for name in files), folder / "samples.txt"]
        result["files"] = {path.name: path.read_text() for path in names if path.exists()}
    return result


def sums(model: memlm.LanguageModel) -> dict[str, float]:
    """Of the absolute values of each parameter."""
    return {name: whole.double().abs().sum().item() for name, whole in parameters(model).items()}


def parameters(model: memlm.LanguageModel) -> dict[str, torch.Tensor]:
    """Whole, wherever their parts are."""
    found = {}
    for name, parameter in model.transformer.named_parameters():
        with gathered(parameter):
            whole: Any = parameter.detach().clone()
        found[name] = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    return found


def gathered(parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """Within it a parameter is whole that ZeRO has split."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameter)


def dtypes(trainer: pl.Trainer) -> list[str]:
    """Of the optimizer's state."""
    optimizer = trainer.optimizers[0]
    return sorted(
        {f"{kind} {tensor.dtype}" for _, state in optimizer.states() for kind, tensor in state.items()}
    )


def main(options: dict[str, Any]) -> None:
    """Runs all cases."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    quiet()
    if world > 1:
        dist.init_process_group("gloo")
    found = {}
    for number, (name, case) in enumerate(options["cases"].items()):
        print(f"rank {rank}: {name}", file=sys.stderr, flush=True)
        found[name] = run(case, Path(options["folder"]) / str(number), rank, world)
    if rank == 0:
        print(json.dumps(found))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
