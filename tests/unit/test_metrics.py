"""Loss, bits per byte and recall against hand computation."""

import math

import pytest
import torch

from memlm.metrics import FactRecall, TokenLoss, summed_loss

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")


def batches(count=3, vocab=7):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        logits = torch.randn(4, 6, vocab, generator=generator)
        targets = torch.randint(vocab, (4, 6), generator=generator)
        targets[torch.rand(4, 6, generator=generator) < 0.4] = -100
        yield logits, targets


def test_token_loss_over_batches_by_hand():
    token_bytes = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    metric = TokenLoss(token_bytes)
    nats = tokens = size = 0.0
    for logits, targets in batches():
        metric.update(logits, targets)
        for row, row_targets in zip(logits.double(), targets, strict=True):
            for scores, target in zip(row, row_targets, strict=True):
                if target != -100:
                    nats -= math.log(math.exp(scores[target]) / scores.exp().sum())
                    tokens += 1
                    size += int(target)  # the tokens' bytes are their ids here
    result = metric.compute()
    assert result["loss"].item() == pytest.approx(nats / tokens, rel=1e-6)
    assert result["perplexity"].item() == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert result["bits_per_byte"].item() == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_a_uniform_model_needs_eight_bits_a_byte():
    metric = TokenLoss(torch.ones(256, dtype=torch.int64))
    metric.update(torch.zeros(2, 5, 256), torch.randint(256, (2, 5)))
    assert metric.compute()["bits_per_byte"].item() == pytest.approx(8)


def test_without_token_bytes_there_are_no_bits_per_byte():
    metric = TokenLoss()
    metric.update(*next(batches()))
    assert set(metric.compute()) == {"loss", "perplexity"}


def test_without_counted_targets_there_is_nothing_and_reset_forgets():
    metric = TokenLoss(torch.ones(7, dtype=torch.int64))
    ignored = torch.full((4, 6), -100)
    metric.update(torch.randn(4, 6, 7), ignored)
    assert metric.compute() == {}
    metric.update(*next(batches()))
    assert metric.compute()
    metric.reset()
    assert metric.compute() == {}


def test_summed_loss_of_no_target_is_zero_with_zero_gradient():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    loss = summed_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("dtype,result", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_summed_loss_is_at_least_fp32(dtype, result):
    assert summed_loss(torch.randn(1, 2, 7, dtype=dtype), torch.tensor([[1, 2]])).dtype == result


def logits_for(predictions: list[list[int]], vocab=9) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predictions), vocab).float()


def test_recall_needs_every_answer_token_and_is_kept_by_group():
    metric = FactRecall()
    answers = torch.tensor([[-100, 3, 4], [-100, 3, 4], [5, -100, -100], [-100, -100, 6], [1, -100, 2]])
    predicted = [[0, 3, 4], [7, 3, 5], [5, 0, 0], [0, 0, 7], [1, 8, 2]]
    metric.update(logits_for(predicted), answers, torch.tensor([0, 0, 0, 1, 2]))
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result == {"recall": pytest.approx(2 / 3), "recall_seen_phrasing": 0.0, "recall_control": 1.0}
    metric.update(logits_for([[0, 0, 6]]), torch.tensor([[-100, -100, 6]]), torch.tensor([1]))
    assert metric.compute()["recall_seen_phrasing"] == 0.5


def test_groups_that_were_not_asked_are_left_out():
    metric = FactRecall()
    assert metric.compute() == {}
    metric.update(logits_for([[1]]), torch.tensor([[1]]), torch.tensor([2]))
    assert metric.compute() == {"recall_control": 1.0}


def test_padding_rows_do_not_count():
    metric = FactRecall()
    answers = torch.tensor([[-100, 3], [-100, -100], [-100, -100]])
    metric.update(logits_for([[0, 4], [0, 0], [1, 1]]), answers, torch.tensor([0, -1, -1]))
    assert metric.compute() == {"recall": 0.0}
    assert metric.asked.sum(1).tolist() == [1, 0, 0]
    metric.update(logits_for([[0, 0]]), torch.tensor([[-100, -100]]), torch.tensor([0]))  # asks nothing
    assert metric.asked.sum(1).tolist() == [1, 0, 0]


def test_recall_by_exposures_against_counting_them():
    torch.manual_seed(0)
    levels = (1, 4, 9)
    metric = FactRecall(levels)
    counted: dict[str, list[bool]] = {}
    for _ in range(5):
        group = torch.randint(-1, 3, (12,))
        exposures = torch.where((group == 0) | (group == 1), torch.randint(0, 3, (12,)), -1)
        answers = torch.where(group < 0, -100, torch.randint(0, 2, (12,))).unsqueeze(1)
        predicted = torch.randint(0, 2, (12, 1))
        metric.update(logits_for(predicted.tolist()), answers, group, exposures)
        for g, level, right in zip(group.tolist(), exposures.tolist(), predicted == answers, strict=True):
            if g >= 0:
                name = ("recall", "recall_seen_phrasing", "recall_control")[g]
                counted.setdefault(name, []).append(bool(right))
                if level >= 0:
                    counted.setdefault(f"{name}_{levels[level]}x", []).append(bool(right))
    assert len(counted) == 9
    expected = {name: pytest.approx(sum(right) / len(right)) for name, right in counted.items()}
    assert {name: float(value) for name, value in metric.compute().items()} == expected


def test_facts_of_one_exposure_are_not_told_apart():
    metric = FactRecall([3])
    metric.update(logits_for([[1]]), torch.tensor([[1]]), torch.tensor([0]), torch.tensor([0]))
    assert metric.compute() == {"recall": 1.0}


def test_several_sets_have_their_own_figures_and_common_ones():
    token_bytes = torch.arange(7)
    together, apart = TokenLoss(token_bytes, ["web", "books"]), [TokenLoss(token_bytes) for _ in range(2)]
    everything = TokenLoss(token_bytes)
    for number, batch in enumerate(batches(5)):
        together.update(*batch, index=number % 2)
        apart[number % 2].update(*batch)
        everything.update(*batch)
    expected = everything.compute()
    for name, metric in zip(["web", "books"], apart, strict=True):
        expected |= {f"{name}/{key}": value for key, value in metric.compute().items()}
    result = together.compute()
    assert result.keys() == expected.keys() and len(result) == 9
    for key, value in result.items():
        assert value.item() == pytest.approx(expected[key].item(), rel=1e-6)
    assert result["web/loss"] != result["books/loss"]
