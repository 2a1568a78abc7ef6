"""Memory for a pretrained model: configs/retrofit.yaml on a tiny Llama in the Hugging Face format."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import yaml

from memlm import DenseLM, MemoryLM
from memlm.__main__ import main
from memlm.huggingface import load_pretrained, read_architecture
from memlm.memory import MemoryConfig
from memlm.pretrained import PretrainedConfig, is_memory
from memlm.transformer import TransformerConfig
from memlm.transformer.config import RopeScaling

transformers = pytest.importorskip("transformers")

CONFIG = str(Path(__file__).parents[2] / "configs" / "retrofit.yaml")


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A folder of a tiny Llama 3 of random weights, and text, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMLM_TRACEBACK", raising=False)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained("llama", max_shard_size="30KB")
    assert len(list(Path("llama").glob("*.safetensors"))) > 1
    lines = [json.dumps({"text": text[:400]}) for text in list(topics.values())[:30]]
    Path("text.jsonl").write_text("\n".join(lines))
    return model


def fit(*more: str, steps: int = 2, name: str = "two") -> int:
    return main(
        [
            *("fit", "--config", CONFIG, "--model.pretrained.folder", "llama", "--run.name", name),
            *("--data.paths=[text.jsonl]", "--data.tokenizer", "bytes", "--data.sequence_length", "32"),
            *("--model.memory.half_keys", "16", "--trainer.val_check_interval", "2"),
            *("--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "1"),
            *("--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"),
            *("--trainer.enable_progress_bar", "false", *more),
        ]
    )


def weights(name: str = "two") -> dict[str, torch.Tensor]:
    checkpoint = torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)
    return {key.removeprefix("transformer."): value for key, value in checkpoint["state_dict"].items()}


def test_outputs_are_unchanged_before_training(llama):
    transformer = TransformerConfig(**read_architecture("llama")["transformer"])
    transformer.rope_scaling = RopeScaling(**transformer.rope_scaling)
    tokens = torch.randint(300, (2, 50))
    expected = llama(tokens).logits
    for options in ({}, {"projection": False}, {"gate": "none", "pre_values": "silu"}):
        memory = MemoryConfig(half_keys=16, reads=8, mode="beside", start_at_zero=True, stride=1, **options)
        model = MemoryLM(258, transformer, memory)
        load_pretrained(model.transformer, "llama")
        assert (model(tokens) - expected).abs().max() < 1e-5
        assert any(
            (parameter != 0).any()
            for name, parameter in model.transformer.named_parameters()
            if is_memory(name)
        )


def test_training_moves_the_memory_alone_and_goes_on_without_the_folder(llama):
    assert fit() == 0
    trained = weights()
    renamed = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    state = llama.state_dict()
    for block in range(4):
        for ours, theirs in renamed.items():
            expected = state[f"model.layers.{block}.self_attn.{theirs}.weight"]
            assert torch.equal(trained[f"blocks.{block}.attention.{ours}.weight"], expected)
    assert torch.equal(trained["embedding.weight"], state["model.embed_tokens.weight"])
    moved = [name for name, value in trained.items() if is_memory(name) and "projection.weight" in name]
    assert moved and all((trained[name] != 0).any() for name in moved)
    # The run's config says what was built, and needs no more of the folder.
    model = yaml.safe_load(Path("runs/two/config.yaml").read_text())["model"]["init_args"]
    assert model["transformer"]["rope_scaling"]["kind"] == "llama3"
    assert model["transformer"]["kv_heads"] == 2
    Path("llama").rename("gone")
    command = ["--config", "runs/two/config.yaml", "--ckpt_path", "last"]
    assert main(["fit", *command, "--trainer.max_steps", "4"]) == 0
    assert main(["validate", *command]) == 0
    again = weights()
    assert torch.equal(again["embedding.weight"], trained["embedding.weight"])
    assert not torch.equal(again["pools.main.values"], trained["pools.main.values"])


def test_a_run_goes_on_with_what_it_trained(llama, capsys):
    assert fit() == 0
    capsys.readouterr()
    command = ["fit", "--config", "runs/two/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "4"]
    assert main([*command, "--model.pretrained.train", "everything"]) == 2
    error = capsys.readouterr().err
    assert "last.ckpt: was written with model.pretrained.train: memory, which is everything now" in error


def test_everything_can_be_trained(llama):
    assert fit("--model.pretrained.train", "everything") == 0
    assert not torch.equal(weights()["embedding.weight"], llama.state_dict()["model.embed_tokens.weight"])


def error(capsys, *more: str) -> str:
    assert fit(*more) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert not list(Path("runs").rglob("*.*"))  # no file of a run
    return line


def test_what_contradicts_the_pretrained_model_is_named(llama, capsys):
    line = error(capsys, "--model.transformer.dim", "64")
    assert "model.transformer.dim" in line and "64" in line and "32" in line and "llama" in line
    assert "model.memory.mode" in error(capsys, "--model.memory.mode", "replace")
    assert "model.memory.start_at_zero" in error(capsys, "--model.memory.start_at_zero", "false")
    assert "model.moe" in error(capsys, "--model.moe.experts", "4")
    balanced = ("--model.moe.routing", "token_choice", "--model.moe.balance_rate", "0.1")
    assert "model.moe.balance_rate" in error(capsys, *balanced)
    Path("llama/config.json").write_text("{")
    assert "llama/config.json" in error(capsys)
    assert "nowhere" in error(capsys, "--model.pretrained.folder", "nowhere")


def test_a_mixture_of_experts_is_no_dense_model(llama, capsys):
    content = json.loads(Path("llama/config.json").read_text())
    content |= {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    Path("llama/config.json").write_text(json.dumps(content))
    command = ["fit", "--model", "memlm.DenseLM", "--model.pretrained.folder", "llama", "--run.name", "dense"]
    assert main([*command, "--data", "SyntheticFacts"]) == 2
    assert "memlm: error: model.class_path: is DenseLM, but llama" in capsys.readouterr().err


def test_a_missing_shard_is_named_before_anything_is_written(llama, capsys):
    shard = sorted(Path("llama").glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in error(capsys)


def test_a_dense_model_has_no_memory_to_train():
    with pytest.raises(Exception, match=r"model\.pretrained\.train"):
        DenseLM(10, pretrained=PretrainedConfig("folder", train="memory"))
