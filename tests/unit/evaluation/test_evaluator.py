import random
import string

import pytest
import torch
from byte_model import EOS, evaluator, greedy, log_likelihood

from memlm.errors import ConfigError
from memlm.evaluation.evaluator import AnswerTooLong, Evaluator, Prompt
from memlm.generation.decoding import Sampling
from memlm.tokenizers import ByteTokenizer, train_bpe


def words(draw, n):
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 7))) for _ in range(n))


def test_likelihoods_against_each_text_alone():
    ask, draw = evaluator(), random.Random(0)
    requests = [
        (Prompt(words(draw, draw.randint(1, 9)), ("Shot. ", "é "), "Say:\n"), [f" {words(draw, 2)}", " ü"])
        for _ in range(8)
    ]
    for (prompt, continuations), reply in zip(requests, ask.log_likelihoods(requests), strict=True):
        assert reply.prompt == f"Say:\nShot. é {prompt.question}" and not reply.cut
        for text, scored in zip(continuations, reply.scores, strict=True):
            expected = log_likelihood(ask.model, reply.prompt, text)
            assert scored.log_likelihood == pytest.approx(expected, abs=1e-4)
            assert scored.tokens == len(text.encode())


def test_white_space_at_the_end_of_a_prompt_belongs_to_the_answer(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat"] * 9, 290, tmp_path / "tokenizer.json")
    ask = Evaluator(evaluator().model, tokenizer, 100)
    assert tokenizer.encode(" cat") != tokenizer.encode(" ") + tokenizer.encode("cat")
    eos = tokenizer.eos_id
    for pair in [("the", " cat"), ("the ", "cat")]:
        assert ask.encode_pair(*pair) == ([eos, *tokenizer.encode("the")], tokenizer.encode(" cat"))
    # "ma" and "t" would be one token together: then each is encoded for itself.
    assert len(tokenizer.encode("mat")) < len(tokenizer.encode("ma") + tokenizer.encode("t"))
    before, after = ask.encode_pair("the ma", "t")
    assert (before, after) == ([eos, *tokenizer.encode("the ma")], tokenizer.encode("t"))


def test_generation_against_recomputing_and_stop_strings():
    ask = evaluator()
    prompts = [Prompt("Where"), Prompt("Q: and then?\nA:"), Prompt("")]
    free = ask.generate(prompts, 30)
    for prompt, reply in zip(prompts, free, strict=True):
        assert reply.texts == (greedy(ask.model, prompt.question, 30),)
    text = free[1].texts[0]
    stop = text[7:9]
    [reply] = ask.generate(prompts[1:2], 30, ["never there", stop])
    assert reply.texts == (text[: text.index(stop)],)


def test_samples_differ_and_repeat():
    ask = evaluator()
    sampling = Sampling(temperature=1.0, seed=3)
    one, other = (ask.generate([Prompt("a"), Prompt("b")], 8, (), sampling, samples=3) for _ in range(2))
    assert one == other
    assert [len(reply.texts) for reply in one] == [3, 3]
    assert len({text for reply in one for text in reply.texts}) == 6


def test_shots_are_dropped_from_the_left_until_the_prompt_fits():
    shots, question = ("first. ", "second. ", "third. "), "why?"
    for context in range(5, 40):
        ask = evaluator(context)
        # End-of-document token, prompt, and the answer but for its last token, which nothing follows.
        room = context - 1 - len(" no") + 1
        kept = [k for k in range(4) if len("".join(shots[3 - k :]) + question) <= room]
        [reply] = ask.log_likelihoods([(Prompt(question, shots), [" no", " ha"])])
        [written] = ask.generate([Prompt(question, shots)], 3)
        for got in (reply, written):
            assert got.cut == (not kept)
            assert got.dropped_shots == 3 - max(kept, default=0)
            assert got.prompt == "".join(shots[got.dropped_shots :]) + question


def test_a_question_that_does_not_fit_loses_its_beginning():
    ask = evaluator(10)
    question = "abcdefghijklmnop"
    [reply] = ask.log_likelihoods([(Prompt(question), [" x", " longer"])])
    assert reply.cut
    # Ten tokens are looked at, the answer's last one not among them; no end-of-document token is left.
    for text, scored in zip([" x", " longer"], reply.scores, strict=True):
        kept = question[-(11 - len(text)) :]
        assert scored.log_likelihood == pytest.approx(without_eos(ask.model, kept, text), abs=1e-4)
    written_by = evaluator(10)
    [written] = written_by.generate([Prompt(question)], 4)
    assert written.cut
    ids = list(question.encode())[-7:]  # and three new tokens are looked at
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(written_by.model(torch.tensor([ids]))[0, -1].argmax()))
    assert written.texts == (ByteTokenizer().decode(ids[7:]),)


def without_eos(model, prompt, continuation):
    ids = [*prompt.encode(), *continuation.encode()]
    with torch.no_grad():
        chances = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(float(chances[p - 1, ids[p]]) for p in range(len(prompt), len(ids)))


def test_an_answer_longer_than_the_context_is_an_error():
    with pytest.raises(AnswerTooLong, match=r"the answer 'abcdefgh' has 9 tokens; expected at most 8"):
        evaluator(8).log_likelihoods([(Prompt("q"), [" abcdefgh"])])
    with pytest.raises(ConfigError, match=r"max_new_tokens: is 8; expected less than the context of 8"):
        evaluator(8).generate([Prompt("q")], 8)


def test_whole_texts_in_windows():
    ask, draw = evaluator(20), random.Random(1)
    short, long = "ab cde", words(draw, 30)
    one, other = ask.text_likelihoods([short, long])
    assert one.log_likelihood == pytest.approx(log_likelihood(ask.model, "", short), abs=1e-4)
    assert (one.tokens, other.tokens) == (len(short), len(long))
    assert other.log_likelihood != pytest.approx(log_likelihood(ask.model, "", long), abs=1e-2)


def test_shares_come_together_in_order():
    items = list(range(11))
    parts = [evaluator(rank=rank, world=3).share(items) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items
    assert evaluator().share(items) == evaluator().gather(items) == items
    assert ByteTokenizer.eos_id == EOS
