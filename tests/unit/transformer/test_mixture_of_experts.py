"""The layer against loops over tokens and experts, against transformers, and what it promises of itself."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from memlm.transformer.feed_forward import SwiGLU
from memlm.transformer.mixture_of_experts import MixtureOfExperts
from memlm.transformer.moe_config import MoEConfig

TOKENS = {"routing": "token_choice"}


def build(dim=16, width=24, dtype=torch.float64, **options) -> MixtureOfExperts:
    layer = MixtureOfExperts(MoEConfig(**({"experts": 5} | options)), dim, width)
    with torch.no_grad():
        layer.initialise(0.7)
        if layer.shared is not None:
            for parameter in layer.shared.parameters():
                torch.nn.init.normal_(parameter, std=dim**-0.5)
    return layer.to(dtype)


def by_hand(layer: MixtureOfExperts, hidden: torch.Tensor) -> torch.Tensor:
    """The layer's output, by a loop over each token and each of its experts."""
    config, tokens = layer.config, hidden.flatten(0, 1)
    logits = tokens @ layer.router.weight.T
    scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
    number, experts = scores.shape
    weights = torch.zeros_like(scores)
    if config.routing == "expert_choice" and layer.training:
        capacity = math.ceil(number * config.top_k / experts)
        for e in range(experts):
            for n in scores[:, e].argsort(descending=True)[:capacity]:
                weights[n, e] = scores[n, e]
    else:
        biased = scores if layer.balance_bias is None else scores + layer.balance_bias
        for n in range(number):
            chosen = biased[n].argsort(descending=True)[: config.top_k]
            total = scores[n, chosen].sum() if config.normalise_weights else 1
            for e in chosen:
                weights[n, e] = scores[n, e] / total
    rows = []
    for n in range(number):
        row = torch.zeros_like(tokens[n])
        for e in range(experts):
            if weights[n, e] != 0:
                gate, up = (layer.gate_up[e] @ tokens[n]).chunk(2)
                row = row + weights[n, e] * (layer.down[e] @ (F.silu(gate) * up))
        if layer.shared is not None:
            shared = layer.shared
            inner = F.silu(shared.gate.weight @ tokens[n]) * (shared.up.weight @ tokens[n])
            row = row + shared.down.weight @ inner
        rows.append(row)
    return torch.stack(rows).view_as(hidden)


CASES = [
    {"top_k": 1},
    {"top_k": 2, "score": "sigmoid"},
    {"top_k": 5, "shared_experts": 1},
    {**TOKENS, "top_k": 1},
    {**TOKENS, "top_k": 2, "normalise_weights": True},
    {**TOKENS, "top_k": 3, "score": "sigmoid", "shared_experts": 2, "expert_dim": 8},
    {**TOKENS, "top_k": 2, "score": "sigmoid", "normalise_weights": True, "balance_rate": 0.1},
    {**TOKENS, "top_k": 5},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", CASES)
def test_output_and_gradients_against_loops(options, training):
    for seed in range(3):
        torch.manual_seed(seed)
        layer = build(**options).train(training)
        if layer.balance_bias is not None:
            layer.balance_bias.normal_()
        shape = (int(torch.randint(1, 4, ())), int(torch.randint(1, 7, ())), 16)
        inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_()]
        inputs.append(inputs[0].detach().clone().requires_grad_())
        twin = copy.deepcopy(layer)
        output, expected = layer(inputs[0]), by_hand(twin, inputs[1])
        assert output.shape == shape
        torch.testing.assert_close(output, expected)
        grad = torch.randn_like(output)
        output.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        for (name, ours), theirs in zip(layer.named_parameters(), twin.parameters(), strict=True):
            wanted = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(ours.grad, wanted, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck():
    torch.manual_seed(0)
    layer = build(dim=8, width=8, **TOKENS, top_k=2, normalise_weights=True)
    hidden = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, hidden)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("routing", ["token_choice", "expert_choice"])
def test_grouped_products_agree_with_float64(kind, routing):
    torch.manual_seed(0)
    layer = build(dim=32, width=40, dtype=torch.float32, routing=routing, top_k=2, shared_experts=1)
    hidden, grad = torch.randn(2, 2, 20, 32)
    if kind == "bfloat16":
        layer, hidden, grad = layer.bfloat16(), hidden.bfloat16(), grad.bfloat16()
    exact = copy.deepcopy(layer).double()
    inputs = [hidden.clone().requires_grad_(), hidden.double().requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        output = layer(inputs[0])
    assert output.dtype == (torch.float32 if kind == "float32" else torch.bfloat16)
    expected = exact(inputs[1])
    output.backward(grad.to(output.dtype))
    expected.backward(grad.double())
    # What bf16 rounds: 8 bits, errors of some products of them. The choice is made in fp32 and the same.
    tolerance = 1e-5 if kind == "float32" else 0.02
    results = [(output, expected), (inputs[0].grad, inputs[1].grad)]
    results += [(a.grad, b.grad) for a, b in zip(layer.parameters(), exact.parameters(), strict=True)]
    for ours, theirs in results:
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < tolerance
    assert inputs[0].grad.dtype == hidden.dtype
    assert all(p.grad.dtype == p.dtype for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("routing", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_few_tokens_or_none(shape, routing, dtype):
    balance = {"auxiliary_loss": 0.1} if routing == "token_choice" else {}
    layer = build(dtype=dtype, routing=routing, z_loss=0.1, **balance)
    hidden = torch.randn(*shape, 16, dtype=dtype, requires_grad=True)
    output = layer(hidden)
    assert output.shape == hidden.shape
    (output.sum() + sum(layer.take_losses().values())).backward()
    assert hidden.grad.shape == hidden.shape
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    layer.balance()


@pytest.mark.parametrize("dim,width,experts,top_k", [(16, 24, 4, 1), (32, 8, 6, 2), (24, 64, 3, 3)])
def test_mixtral_of_transformers(dim, width, experts, top_k):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(
        hidden_size=dim, intermediate_size=width, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    _agrees_with(mixtral.MixtralSparseMoeBlock(config), normalise_weights=True)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("dim,width,experts,top_k", [(16, 24, 4, 1), (32, 8, 16, 5)])
def test_olmoe_of_transformers(dim, width, experts, top_k, normalise):
    olmoe = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
    config = olmoe.OlmoeConfig(
        hidden_size=dim,
        intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=normalise,
    )
    config._experts_implementation = "eager"
    _agrees_with(olmoe.OlmoeSparseMoeBlock(config), normalise_weights=normalise)


def _agrees_with(theirs: torch.nn.Module, normalise_weights: bool) -> None:
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    experts, dim, width = theirs.experts.down_proj.shape
    options = {"experts": experts, "top_k": theirs.gate.top_k, "normalise_weights": normalise_weights}
    ours = build(dim, width, torch.float32, **TOKENS, **options)
    parameters = [theirs.gate.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj]
    for name, value in zip(("router.weight", "gate_up", "down"), parameters, strict=True):
        ours.get_parameter(name).data.copy_(value)
    inputs = [torch.randn(2, 15, dim).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = ours(inputs[0]), theirs(inputs[1])
    assert outputs[0].abs().max() > 0.1
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    for name, value in zip(("router.weight", "gate_up", "down"), parameters, strict=True):
        torch.testing.assert_close(ours.get_parameter(name).grad, value.grad, rtol=1e-4, atol=1e-4)


def test_expert_choice_sees_the_future_in_training_and_not_in_evaluation():
    torch.manual_seed(0)
    layer = build(experts=2)
    hidden = torch.randn(1, 8, 16, dtype=torch.float64)
    other = hidden.clone()
    with torch.no_grad():
        # The last token suits expert 0 worse than any other, or better.
        hidden[0, -1], other[0, -1] = -10 * layer.router.weight[0], 10 * layer.router.weight[0]
        earlier = [layer(x)[0, :-1] for x in (hidden, other)]
        layer.eval()
        in_evaluation = [layer(x)[0, :-1] for x in (hidden, other)]
    assert not torch.equal(*earlier)
    torch.testing.assert_close(*in_evaluation, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_token_choice_never_sees_another_token(training):
    torch.manual_seed(0)
    layer = build(**TOKENS, top_k=2).train(training)
    hidden = torch.randn(1, 8, 16, dtype=torch.float64)
    other = torch.cat((hidden[:, :5], torch.randn(1, 3, 16, dtype=torch.float64)), dim=1)
    torch.testing.assert_close(layer(hidden)[:, :5], layer(other)[:, :5], rtol=1e-12, atol=1e-14)


def test_results_are_the_same_to_the_bit():
    torch.manual_seed(0)
    layer = build(dtype=torch.float32, **TOKENS, top_k=3)
    hidden = torch.randn(2, 50, 16)
    results = []
    for _ in range(2):
        x = hidden.clone().requires_grad_()
        layer.zero_grad()
        output = layer(x)
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -- balance


def test_losses_are_those_of_the_last_training_forward_and_taken_once():
    torch.manual_seed(0)
    layer = build(**TOKENS, top_k=2, auxiliary_loss=0.01, z_loss=0.5)
    assert layer.take_losses() == {}
    layer(torch.randn(1, 9, 16, dtype=torch.float64))
    hidden = torch.randn(1, 30, 16, dtype=torch.float64)
    layer(hidden)
    layer.eval()(torch.randn(1, 9, 16, dtype=torch.float64))
    losses = layer.take_losses()
    assert losses.keys() == {"auxiliary", "z"}
    assert layer.take_losses() == {}

    logits = hidden[0] @ layer.router.weight.T
    scores = logits.softmax(-1)
    share = F.one_hot(scores.topk(2).indices, 5).double().sum(1).mean(0) / 2
    expected = 0.01 * 5 * (share * scores.mean(0)).sum(), 0.5 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close((losses["auxiliary"], losses["z"]), expected)
    wanted = torch.autograd.grad(sum(expected), layer.router.weight)
    torch.testing.assert_close(torch.autograd.grad(sum(losses.values()), layer.router.weight), wanted)


def test_no_coefficient_no_loss():
    layer = build(**TOKENS)
    layer(torch.randn(1, 9, 16, dtype=torch.float64))
    assert layer.take_losses() == {}


def test_the_bias_moves_by_its_rate_towards_an_even_load():
    layer = build(experts=4, dim=8, width=8, **TOKENS, top_k=1, balance_rate=0.25)
    layer.router.weight.data = torch.eye(4, 8, dtype=torch.float64)
    # Expert 0 gets 4 tokens, expert 1 and 2 two each, expert 3 none: the mean is 2.
    hidden = torch.eye(4, 8, dtype=torch.float64)[[0, 0, 0, 0, 1, 1, 2, 2]].unsqueeze(0)
    layer(hidden[:, :3])
    layer(hidden[:, 3:])
    layer.eval()(hidden[:, :1])
    torch.testing.assert_close(layer.load(), torch.tensor([0.5, 0.25, 0.25, 0]))
    layer.balance()
    assert layer.balance_bias.tolist() == [-0.25, 0, 0, 0.25]
    assert layer.load().tolist() == [0, 0, 0, 0]
    layer.balance()  # nothing was counted
    assert layer.balance_bias.tolist() == [-0.25, 0, 0, 0.25]


def test_the_bias_moves_by_the_counts_of_all_ranks():
    layer = build(experts=2, **TOKENS, balance_rate=0.5)
    layer(torch.randn(1, 9, 16, dtype=torch.float64))
    own = layer.counts.clone()
    given = []

    def sum_over_ranks(counts):
        given.append(counts.clone())
        return torch.tensor([100, 1])

    layer.balance(sum_over_ranks)
    assert torch.equal(given[0], own)
    assert layer.balance_bias.tolist() == [-0.5, 0.5]


def test_the_load_of_skewed_data_becomes_even():
    torch.manual_seed(0)
    layer = build(experts=8, **TOKENS, top_k=2, balance_rate=0.001)
    centre = layer.router.weight[:2].sum(0).detach()  # most tokens look alike, and suit two experts
    hidden = 0.3 * torch.randn(1, 512, 16, dtype=torch.float64) + centre
    loads = []
    with torch.no_grad():
        for _ in range(200):
            layer(hidden)
            loads.append(layer.load().max().item() * 8)
            layer.balance()
    assert loads[0] > 3
    assert max(loads[-5:]) < 1.1


def test_tokens_that_no_expert_chose():
    torch.manual_seed(0)
    layer = build(experts=4, top_k=1)
    assert layer.unchosen() == 0
    chosen = []
    for _ in range(2):
        hidden = torch.randn(1, 16, 16, dtype=torch.float64)
        output = layer(hidden)
        chosen += (output[0] != 0).any(-1).tolist()  # a token without experts is left as it is
    assert layer.unchosen().item() == pytest.approx(1 - sum(chosen) / 32)
    assert 0 < layer.unchosen() < 1
    torch.testing.assert_close(layer.load(), torch.full((4,), 0.25))
    layer.balance()
    assert layer.unchosen() == 0


def test_observers_see_the_tokens_of_each_expert():
    torch.manual_seed(0)
    layer = build(experts=4, top_k=1)
    seen = []
    layer.observers.append(seen.append)
    hidden = torch.randn(2, 10, 16, dtype=torch.float64)
    layer(hidden)
    layer.eval()(hidden)
    best = (hidden.flatten(0, 1) @ layer.router.weight.T).argmax(-1)
    assert seen[0].tolist() == [5, 5, 5, 5]
    assert seen[1].tolist() == [(best == e).sum() for e in range(4)]
    assert not any(counts.requires_grad for counts in seen)


# -- state


def test_parameters_and_state_dict():
    layer = MixtureOfExperts(MoEConfig(experts=5, expert_dim=8, shared_experts=2), 16, 24)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "router.weight": (5, 16), "gate_up": (5, 16, 16), "down": (5, 16, 8),
        "shared.gate.weight": (16, 16), "shared.up.weight": (16, 16), "shared.down.weight": (16, 16),
    }  # fmt: skip
    assert "balance_bias" in build(**TOKENS, balance_rate=0.1).state_dict()


@pytest.mark.parametrize(
    "convert", [lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.double()]
)
def test_the_bias_stays_in_fp32(convert):
    layer = build(dtype=torch.float32, **TOKENS, balance_rate=0.1)
    layer.balance_bias += 1.0001
    convert(layer)
    assert layer.balance_bias.dtype == torch.float32
    assert (layer.balance_bias == torch.tensor(1.0001)).all()
    assert layer.gate_up.dtype != torch.float32
    assert layer.counts.dtype == torch.int64


def test_construction_on_the_meta_device_costs_nothing():
    with torch.device("meta"):
        layer = MixtureOfExperts(MoEConfig(experts=1024, **TOKENS, balance_rate=0.1), 8192, 32768)
    assert layer.gate_up.is_meta
    layer.bfloat16()
    assert layer.balance_bias.is_meta and layer.balance_bias.dtype == torch.float32
    assert layer.active_parameters() == 1024 * 8192 + 3 * 8192 * 32768


def test_a_layer_from_the_meta_device_is_filled():
    with torch.device("meta"):
        layer = MixtureOfExperts(MoEConfig(experts=4, **TOKENS, balance_rate=0.1), 16, 24)
    layer.to_empty(device="cpu")
    for value in (*layer.parameters(), layer.balance_bias):
        value.data.fill_(float("nan"))
    layer.counts.fill_(7)
    layer.initialise(1.0)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    assert layer.balance_bias.tolist() == [0] * 4
    assert layer.counts.sum() == 0


def test_initial_values():
    torch.manual_seed(0)
    layer = build(dim=64, width=96, dtype=torch.float32, experts=6, shared_experts=1)
    before = layer.shared.down.weight.clone()
    layer.initialise(0.3)
    for name, std in (("router.weight", 1 / 8), ("gate_up", 1 / 8), ("down", 96**-0.5 * 0.3)):
        parameter = layer.get_parameter(name)
        # The deviation of n draws is known to about 1 / sqrt(2 n).
        assert parameter.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * parameter.numel()))
    assert torch.equal(layer.shared.down.weight, before)  # its own to fill


def test_a_copy_has_no_losses():
    layer = build(**TOKENS, z_loss=0.1)
    layer(torch.randn(1, 9, 16, dtype=torch.float64))
    twin = copy.deepcopy(layer)
    assert twin.take_losses() == {}
    assert layer.take_losses().keys() == {"z"}
    assert torch.equal(twin.counts, layer.counts)


# -- cost


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 3, "shared_experts": 2, "score": "sigmoid"}])
def test_flops_are_those_that_torch_counts(options):
    layer = build(dim=64, width=48, dtype=torch.float32, experts=6, **TOKENS, **options)
    hidden = torch.randn(2, 30, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = layer(hidden)
    counted = layer.flops(30)
    assert counter.get_total_flops() == pytest.approx(60 * counted.forward, rel=0.02)
    with FlopCounterMode(display=False) as counter:
        output.backward(torch.ones_like(output))
    assert counter.get_total_flops() == pytest.approx(60 * counted.backward, rel=0.02)


def test_flops_of_expert_choice_in_training_are_those_that_torch_counts():
    layer = build(dim=64, width=48, dtype=torch.float32, experts=6, top_k=2)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 30, 64))
    assert counter.get_total_flops() == pytest.approx(60 * layer.flops(30).forward, rel=0.02)


def test_active_parameters_by_hand():
    layer = build(dim=16, width=24, experts=5, top_k=2, shared_experts=1)
    assert layer.active_parameters() == 5 * 16 + 2 * 3 * 16 * 24 + 3 * 16 * 24
    dense = SwiGLU(16, 24)
    assert build(dim=16, width=24).active_parameters() - 5 * 16 == sum(p.numel() for p in dense.parameters())


# -- in company


@pytest.mark.parametrize("options", [{"top_k": 2}, {**TOKENS, "top_k": 2, "auxiliary_loss": 0.1}])
def test_activation_checkpointing_changes_nothing_but_the_count(options):
    torch.manual_seed(0)
    layer = build(**options, z_loss=0.1)
    twin = copy.deepcopy(layer)
    inputs = [torch.randn(1, 20, 16, dtype=torch.float64).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = checkpoint(layer, inputs[0], use_reentrant=False), twin(inputs[1])
    for output, module in zip(outputs, (layer, twin), strict=True):
        (output.square().sum() + sum(module.take_losses().values())).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(layer.counts, 2 * twin.counts)
    assert torch.equal(layer.load(), twin.load())
    assert torch.equal(layer.unchosen(), twin.unchosen())


@pytest.mark.parametrize(
    "options,dtype",
    [
        ({"top_k": 2}, torch.bfloat16),
        ({**TOKENS, "top_k": 2, "balance_rate": 0.1}, torch.bfloat16),
        ({**TOKENS, "top_k": 2, "balance_rate": 0.1}, torch.float32),
    ],
)
def test_a_compiled_layer_has_the_same_results(options, dtype):
    torch.manual_seed(0)
    layer = build(dtype=dtype, shared_experts=1, z_loss=0.1, **options)
    twin = copy.deepcopy(layer)
    seen = []
    if dtype == torch.float32:
        layer.observers.append(seen.append)
    # torch compiles grouped products of bf16 alone; others interrupt the graph, as do observers.
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=dtype == torch.bfloat16)
    for length in (12, 20):
        inputs = [torch.randn(2, length, 16).to(dtype).requires_grad_()]
        inputs.append(inputs[0].detach().clone().requires_grad_())
        outputs = []
        for x, call, module in zip(inputs, (compiled, twin), (layer, twin), strict=True):
            outputs.append(call(x))
            (outputs[-1].square().sum() + sum(module.take_losses().values())).backward()
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(*outputs, **tolerance)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        assert ((ours.grad - theirs.grad).norm() / theirs.grad.norm()).item() < 1e-2
    assert torch.equal(layer.counts, twin.counts)
    if dtype == torch.float32:
        assert torch.equal(sum(seen), layer.counts)


def test_description():
    assert "experts=5, dim=16, expert_dim=24, token_choice, top_k=2" in repr(build(**TOKENS, top_k=2))
