"""Names and shapes of checkpoints' tensors against brute renaming, there and back."""

import pytest
import torch
from safetensors.torch import load, save

from memlm.errors import CheckpointError
from memlm.huggingface import from_hf, to_hf
from memlm.transformer.config import TransformerConfig

D, F, ROWS, HEADS, KV, WIDTH, E = 12, 20, 11, 4, 2, 6, 3


def config(**options) -> TransformerConfig:
    chosen = {"dim": D, "layers": 2, "heads": HEADS, "kv_heads": KV, "head_dim": WIDTH, **options}
    return TransformerConfig(feed_forward_dim=F, **chosen)


def llama(bias=False, tied=False) -> dict[str, torch.Tensor]:
    """A checkpoint of two blocks, written by hand."""
    tensors = {"model.embed_tokens.weight": torch.randn(ROWS, D), "model.norm.weight": torch.randn(D)}
    if not tied:
        tensors["lm_head.weight"] = torch.randn(ROWS, D)
    for block in ("model.layers.0.", "model.layers.1."):
        shapes = {
            "input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (HEADS * WIDTH, D),
            "self_attn.k_proj": (KV * WIDTH, D), "self_attn.v_proj": (KV * WIDTH, D),
            "self_attn.o_proj": (D, HEADS * WIDTH), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }  # fmt: skip
        for name, shape in shapes.items():
            tensors[f"{block}{name}.weight"] = torch.randn(shape)
        if bias:
            for letter, heads in (("q", HEADS), ("k", KV), ("v", KV)):
                tensors[f"{block}self_attn.{letter}_proj.bias"] = torch.randn(heads * WIDTH)
    return tensors


def mixtral(fused=False) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for name, tensor in llama().items() if ".mlp." not in name}
    for block in ("model.layers.0.", "model.layers.1."):
        if fused:
            tensors[f"{block}mlp.gate.weight"] = torch.randn(E, D)
            tensors[f"{block}mlp.experts.gate_up_proj"] = torch.randn(E, 2 * F, D)
            tensors[f"{block}mlp.experts.down_proj"] = torch.randn(E, D, F)
            continue
        tensors[f"{block}block_sparse_moe.gate.weight"] = torch.randn(E, D)
        for expert in range(E):
            prefix = f"{block}block_sparse_moe.experts.{expert}"
            tensors[f"{prefix}.w1.weight"] = torch.randn(F, D)
            tensors[f"{prefix}.w2.weight"] = torch.randn(D, F)
            tensors[f"{prefix}.w3.weight"] = torch.randn(F, D)
    return tensors


def renamed(name: str) -> str:
    """Our name, by text replacement."""
    for old, new in (
        ("model.embed_tokens", "embedding"), ("model.norm", "norm"), ("lm_head", "output"),
        ("model.layers", "blocks"), ("input_layernorm", "attention_norm"), ("self_attn", "attention"),
        ("post_attention_layernorm", "feed_forward_norm"), ("mlp", "feed_forward"), ("q_proj", "query"),
        ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "output"), ("gate_proj", "gate"),
        ("up_proj", "up"), ("down_proj", "down"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_dense_names_there_and_back(bias, tied):
    theirs = llama(bias, tied)
    chosen = config(attention_bias=bias, tie_embeddings=tied)
    ours = from_hf(theirs, chosen)
    assert_same(ours, {renamed(name): tensor for name, tensor in theirs.items()})
    assert_same(to_hf(ours, chosen), theirs)


def test_dense_tensors_are_not_copied():
    theirs = llama()
    ours = from_hf(theirs, config())
    back = to_hf(ours, config())
    for name, tensor in theirs.items():
        assert ours[renamed(name)] is tensor
        assert back[name].data_ptr() == tensor.data_ptr()


def test_experts_are_stacked_and_taken_apart():
    theirs = mixtral()
    ours = from_hf(theirs, config())
    for block in range(2):
        moe = f"model.layers.{block}.block_sparse_moe"
        own = f"blocks.{block}.feed_forward"
        assert torch.equal(ours[f"{own}.router.weight"], theirs[f"{moe}.gate.weight"])
        for expert in range(E):
            w1, w2, w3 = (theirs[f"{moe}.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
            assert torch.equal(ours[f"{own}.gate_up"][expert], torch.cat((w1, w3)))
            assert torch.equal(ours[f"{own}.down"][expert], w2)
    rest = {renamed(name): tensor for name, tensor in theirs.items() if "block_sparse_moe" not in name}
    assert_same({name: ours[name] for name in ours if "feed_forward." not in name}, rest)
    back = to_hf(ours, config())
    assert_same(back, theirs)
    assert_same(load(save(back)), theirs)  # safetensors takes the views


def test_experts_of_another_width_than_the_config_s_are_taken_apart():
    ours = from_hf(mixtral(), config())
    theirs = to_hf(ours, TransformerConfig(D, 2, HEADS, KV, 2 * F, head_dim=WIDTH))
    assert theirs["model.layers.1.block_sparse_moe.experts.2.w3.weight"].shape == (F, D)


def test_fused_experts_of_transformers_5():
    theirs = mixtral(fused=True)
    ours = from_hf(theirs, config())
    for block in range(2):
        for own, name in (("router.weight", "gate.weight"), ("gate_up", "experts.gate_up_proj"),
                          ("down", "experts.down_proj")):  # fmt: skip
            expected = theirs[f"model.layers.{block}.mlp.{name}"]
            assert torch.equal(ours[f"blocks.{block}.feed_forward.{own}"], expected)
    assert_same(from_hf(to_hf(ours, config()), config()), ours)


def test_dtypes_are_kept():
    theirs = {name: tensor.bfloat16() for name, tensor in mixtral().items()}
    ours = from_hf(theirs, config())
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}


def test_rotary_buffers_are_ignored():
    theirs = llama()
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
               "model.rotary_emb.inv_freq": torch.ones(3)}  # fmt: skip
    assert from_hf({**theirs, **buffers}, config()).keys() == from_hf(theirs, config()).keys()


def test_tied_output_layers_that_repeat_the_embedding():
    tied = config(tie_embeddings=True)
    theirs = llama(tied=True)
    both = {**theirs, "lm_head.weight": theirs["model.embed_tokens.weight"].clone()}
    ours = from_hf(both, tied)
    assert "output.weight" not in ours
    assert_same(to_hf({**ours, "output.weight": ours["embedding.weight"]}, tied), theirs)
    both["lm_head.weight"][3, 4] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        from_hf(both, tied)
    with pytest.raises(CheckpointError, match=r"output\.weight differs from embedding\.weight"):
        to_hf({**ours, "output.weight": ours["embedding.weight"] + 1}, tied)


def broken(**changes) -> dict[str, torch.Tensor]:
    tensors = {**llama(), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


Q0 = "model__layers__0__self_attn__q_proj__weight"


@pytest.mark.parametrize(
    "tensors,options,parts",
    [
        (broken(model__norm__weight=None), {}, ["lacks the tensor model.norm.weight"]),
        (broken(model__embed_tokens__weight=None), {}, ["lacks the tensor model.embed_tokens.weight"]),
        (broken(model__embed_tokens__weight=torch.tensor(1.0)), {}, ["shape []", "[0, 12]"]),
        (broken(score__weight=torch.ones(2, D)), {}, ["holds the tensor score.weight", "no place"]),
        (
            broken(lm_head__weight=None, score__weight=torch.ones(2, D)),
            {},
            ["lacks the tensor lm_head.weight and holds the tensor score.weight"],
        ),
        (llama(), {"layers": 1}, ["model.layers.1.input_layernorm.weight", "and 6 more", "no place"]),
        (llama(), {"layers": 3}, ["lacks the tensors model.layers.2.input_layernorm.weight", "and 6 more"]),
        (llama(), {"attention_bias": True}, ["lacks", "model.layers.0.self_attn.k_proj.bias", "and 3 more"]),
        (llama(bias=True), {}, ["holds", "model.layers.0.self_attn.k_proj.bias", "and 3 more"]),
        (llama(tied=True), {}, ["lacks the tensor lm_head.weight"]),
        (
            broken(**{Q0: torch.ones(D, D)}),
            {},
            [
                "tensor model.layers.0.self_attn.q_proj.weight has shape [12, 12]",
                "expected [24, 12] for blocks.0.attention.query.weight",
            ],
        ),
        (llama(), {"vocab_size": 12}, ["model.embed_tokens.weight has shape [11, 12]", "[12, 12]"]),
        (
            broken(**{Q0: torch.ones(24, D, dtype=torch.int8)}),
            {},
            ["model.layers.0.self_attn.q_proj.weight is of type torch.int8", "floating-point"],
        ),
        (broken(**{Q0: torch.ones(24, D).to(torch.float8_e4m3fn)}), {}, ["torch.float8_e4m3fn", "16 bits"]),
    ],
)
def test_errors_name_the_tensors(tensors, options, parts):
    with pytest.raises(CheckpointError) as error:
        from_hf(tensors, config(**options), where="a/folder")
    assert str(error.value).startswith("a/folder: ")
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_errors_of_experts_name_the_tensors():
    missing = mixtral()
    del missing["model.layers.1.block_sparse_moe.experts.1.w2.weight"]
    with pytest.raises(CheckpointError, match=r"lacks the tensor \S+layers\.1\.\S+experts\.1\.w2\.weight$"):
        from_hf(missing, config())
    narrow = mixtral()
    narrow["model.layers.0.block_sparse_moe.experts.2.w3.weight"] = torch.ones(F - 1, D)
    with pytest.raises(
        CheckpointError, match=r"experts\.2\.w3\.weight has shape \[19, 12\]; expected \[20, 12\]"
    ):
        from_hf(narrow, config())
    far = mixtral()
    far["model.layers.0.block_sparse_moe.experts.999999999.w1.weight"] = torch.ones(F, D)
    with pytest.raises(CheckpointError, match=r"experts\.999999999\.w1\.weight, which has no place"):
        from_hf(far, config())


def test_a_state_with_memory_has_no_names():
    ours = from_hf(llama(), config())
    with pytest.raises(CheckpointError) as error:
        to_hf({**ours, "pools.main.values": torch.ones(4, 4)}, config(), where="last.ckpt")
    assert "last.ckpt: holds the tensor pools.main.values" in str(error.value)
    del ours["norm.weight"]
    with pytest.raises(CheckpointError, match=r"^model: lacks the tensor norm\.weight$"):
        to_hf(ours, config())
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \[3\]; expected \[12\]$"):
        to_hf({**ours, "norm.weight": torch.ones(3)}, config())
