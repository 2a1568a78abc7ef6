"""The same logits as transformers' models, from and to folders that they write and read."""

import json

import pytest
import torch
from safetensors.torch import save_file

from memlm.huggingface import config_json, from_hf, load_pretrained, read_architecture, to_hf
from memlm.transformer import MoEConfig, Transformer
from memlm.transformer.config import RopeScaling, TransformerConfig

transformers = pytest.importorskip("transformers", reason="an oracle only, no dependency")

ROWS = 29
TINY = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "beta_fast": 8.0, "beta_slow": 1.0,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}

CASES = {
    "llama": ("Llama", {}),
    "llama tied, all heads": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama3 scaling": ("Llama", {"rope_parameters": LLAMA3}),
    "linear scaling": ("Llama", {"rope_parameters": LINEAR}),
    "yarn scaling": ("Llama", {"rope_parameters": YARN}),
    "llama head dim": ("Llama", {"head_dim": 10, "rms_norm_eps": 1e-3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral head dim": ("Mistral", {"hidden_size": 30, "head_dim": 10, "sliding_window": 128}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
}


def theirs(family: str, options: dict) -> torch.nn.Module:
    """A model with random values in all its parameters, norms and biases too."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)
    return model


def ours(folder) -> Transformer:
    sections = read_architecture(folder)
    options = dict(sections["transformer"])
    if options["rope_scaling"] is not None:
        options["rope_scaling"] = RopeScaling(**options["rope_scaling"])
    moe = MoEConfig(**sections["moe"]) if "moe" in sections else None
    return Transformer(ROWS - 3, TransformerConfig(**options), moe=moe).eval()


@torch.no_grad()
def assert_same_logits(own, other):
    # Longer than the context that scaled positions are made for.
    tokens = torch.randint(ROWS, (2, 100), generator=torch.Generator().manual_seed(1))
    expected = other(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(own(tokens), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_logits_of_folders_that_transformers_writes(tmp_path, case, sharded):
    other = theirs(*CASES[case])
    other.save_pretrained(tmp_path, max_shard_size="10KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    own = ours(tmp_path)
    load_pretrained(own, tmp_path)
    assert_same_logits(own, other)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_folders_that_transformers_reads(tmp_path, case):
    theirs(*CASES[case]).save_pretrained(tmp_path / "first")
    own = ours(tmp_path / "first")
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    moe = next((layer.config for layer in own.experts.values()), None)
    described = config_json(own.config, ROWS, context=128, moe=moe, eos_id=1)
    (tmp_path / "config.json").write_text(json.dumps(described))
    save_file(to_hf(own.state_dict(), own.config), tmp_path / "model.safetensors", {"format": "pt"})
    other, notes = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["unexpected_keys"]
    # A Mistral without a window is a Llama, unless its dim is no multiple of its heads.
    expected = "Llama" if case == "mistral" else CASES[case][0]
    assert type(other).__name__ == f"{expected}ForCausalLM"
    assert_same_logits(own, other.eval())


@pytest.mark.parametrize("case", CASES)
def test_tensors_in_memory_are_those_of_the_files(tmp_path, case):
    other = theirs(*CASES[case])
    other.save_pretrained(tmp_path)
    own = ours(tmp_path)
    load_pretrained(own, tmp_path)
    state = from_hf(other.state_dict(), own.config)
    expected = dict(own.named_parameters())
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
