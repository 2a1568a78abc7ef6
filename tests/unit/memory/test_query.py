"""The query network and its normalisations."""

import pytest
import torch

from memlm.memory import QueryNetwork


def network(norm: str) -> QueryNetwork:
    torch.manual_seed(0)
    query = QueryNetwork(10, 3, 4, norm)
    if query.qk_gain is not None:
        query.qk_gain.data = torch.rand(3, 2, 1) + 0.5
    return query


def test_without_normalisation_it_is_a_linear_map_with_bias():
    query = network("none")
    hidden = torch.randn(7, 10)
    expected = (hidden @ query.linear.weight.T + query.linear.bias).view(7, 3, 2, 4)
    torch.testing.assert_close(query(hidden), expected)
    keys = torch.randn(3, 2, 5, 4)
    assert query.normalise_keys(keys) is keys
    assert [name for name, _ in query.named_parameters()] == ["linear.weight", "linear.bias"]


def test_batch_norm_standardises_every_element_over_tokens():
    queries = network("batch")(5 * torch.randn(400, 10) + 3)
    torch.testing.assert_close(queries.mean(0), torch.zeros(3, 2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(queries.std(0, correction=0), torch.ones(3, 2, 4), atol=1e-4, rtol=0)


def test_qk_norm_gives_each_half_the_gain_as_its_root_mean_square():
    query = network("qk")
    rms = query(100 * torch.randn(7, 10)).square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(rms, query.qk_gain.expand(7, 3, 2, 1), rtol=1e-4, atol=0)
    keys = query.normalise_keys(torch.randn(3, 2, 5, 4))
    torch.testing.assert_close(keys.square().mean(-1), torch.ones(3, 2, 5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", ["none", "batch", "qk"])
def test_bf16_autocast_keeps_queries_close(norm):
    query, hidden = network(norm), torch.randn(64, 10)
    exact = query(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = query(hidden)
    assert (exact - rounded).norm() / exact.norm() < 0.02
