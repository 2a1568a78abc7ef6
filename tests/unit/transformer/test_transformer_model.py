"""The decoder: causality, documents, tied embeddings, and the same logits as Llama."""

import pytest
import torch

from memlm.memory import MemoryConfig
from memlm.transformer import Transformer, TransformerConfig


def build(memory=False, dtype=torch.float64, **options) -> Transformer:
    torch.manual_seed(0)
    chosen = {"dim": 16, "layers": 3, "heads": 4, "kv_heads": 2, "feed_forward_dim": 20, **options}
    placed = MemoryConfig(half_keys=6, heads=2, reads=3, layers=[1]) if memory else None
    return Transformer(13, TransformerConfig(**chosen), placed).to(dtype)


@pytest.mark.parametrize("memory", [False, True])
def test_a_token_changes_no_logits_before_it(memory):
    model = build(memory)
    tokens = torch.randint(13, (2, 10))
    before = model(tokens)
    for position in (0, 4, 9):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 13
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=1e-12, atol=1e-12)
        assert ((after - before)[:, position:].abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("memory", [False, True])
def test_packed_documents_have_the_logits_of_each_alone(memory):
    model = build(memory)
    parts = [torch.randint(13, (1, length)) for length in (4, 1, 7)]
    documents = torch.cat([torch.full_like(part, 5 - i) for i, part in enumerate(parts)], 1)
    packed = model(torch.cat(parts, 1), documents)
    # Positions run on, but attention knows only differences of positions.
    alone = torch.cat([model(part) for part in parts], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    assert (model(torch.cat(parts, 1)) - alone)[:, 4:].abs().max() > 1e-3


def test_one_document_equals_no_documents():
    model, tokens = build(), torch.randint(13, (2, 8))
    torch.testing.assert_close(model(tokens, torch.zeros_like(tokens)), model(tokens))


def test_tied_embeddings_are_one_parameter_with_both_gradients():
    tied, untied = build(tie_embeddings=True), build()
    assert tied.output.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 13 * 16
    untied.load_state_dict(tied.state_dict())
    tokens = torch.randint(13, (2, 5))
    assert torch.equal(tied(tokens), untied(tokens))
    for model in (tied, untied):
        model(tokens).square().sum().backward()
    both = untied.output.weight.grad + untied.embedding.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both)


def test_bf16_autocast_is_close_to_fp32():
    model, tokens = build(dtype=torch.float32), torch.randint(13, (4, 30))
    exact = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(tokens).float()
    assert (exact - rounded).norm() / exact.norm() < 0.02


def test_compiled_graph_equals_eager_with_memory():
    model, tokens = build(memory=True, dtype=torch.float32), torch.randint(13, (2, 8))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))
    compiled(tokens).sum().backward()
    assert model.pools["main"].gradient.norm() > 0
