import json
import random
from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import pytest
import torch

from data_modules.fact_questions import FactQuestions
from data_modules.real_facts.fact_sources import Fact
from data_modules.real_facts.stated_facts import StatedFacts
from memlm.errors import ConfigError, DataError
from memlm.metrics import FactRecall
from memlm.tokenizers import ByteTokenizer, train_bpe

PHRASINGS = [
    "The colour of {question} is",
    "{question} has the colour",
    "Whoever sees {question} sees",
    "{question}:",
]
COLOURS = ["red", "red", "dark red", "green", "blue", "light blue", "white"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """80 things with colours, in the phrasings of the option."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("facts") / "colours.jsonl"
    names = [f"{a}{b}" for a in "bdgklm" for b in ("ana", "o-o", "ist", "urn")]
    things = [f"{a} {b}" for a in names for b in names][::7][:80]
    lines = [{"question": thing, "answer": rng.choice(COLOURS)} for thing in things]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A tokenizer whose tokens cross the border of prompt and answer, and that of answer and full stop."""
    text = [f"the colour is {colour}." for colour in COLOURS] * 9 + [": red.", "sees red."] * 20
    output = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return str(output), train_bpe(text, 330, output)


def make(path, **options):
    small = {"phrasings": PHRASINGS, "control": 0.1, "batch_size": 8, "evaluation_facts": 20}
    return FactQuestions(str(path), **(small | options))


def batches(module, count, world=1, rank=0, cursor=0, **workers):
    return list(islice(module.training_source().batches(cursor, world, rank, **workers), count))


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if key != "cursor" else a[key] == b[key] for key in a
    )


def parse(sentence):
    """(phrasing, question, answer) of a sentence, by matching the templates."""
    for phrasing in PHRASINGS:
        before, after = phrasing.split("{question}")
        if sentence.startswith(before) and f"{after} " in sentence and sentence.endswith("."):
            question, answer = sentence.removeprefix(before).removesuffix(".").split(f"{after} ")
            return phrasing, question, answer
    raise AssertionError(sentence)


def sentences(module, epochs):
    """Every sentence of some epochs, cut from the rows that a model would see."""
    count, found = epochs * len(module.training_source().occurrences), []
    rest = []  # tokens of a sentence that a row has cut off
    for batch in module.training_source().batches(0, 1, 0):
        for row in batch["tokens"].tolist():
            *whole, rest = split([*rest, *row], module.tokenizer.eos_id)
            found += [module.tokenizer.decode(tokens) for tokens in whole if tokens]
            if module.packing == "documents":
                found += [module.tokenizer.decode(rest)] * bool(rest)
                rest = []
        if len(found) >= count:
            break
    return found[:count]


def split(tokens, eos):
    parts = [[]]
    for token in tokens:
        if token == eos:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


@pytest.mark.parametrize("packing", ["documents", "concatenate"])
def test_training_states_facts_truly_and_never_in_a_held_out_phrasing(path, packing):
    module = make(path, packing=packing, held_out_phrasings=2, sequence_length=64)
    truth = {record["question"]: record["answer"] for record in map(json.loads, path.open())}
    seen, asked = defaultdict(set), defaultdict(set)
    for sentence in sentences(module, epochs=40):
        phrasing, question, answer = parse(sentence)
        assert truth[question] == answer
        seen[question].add(phrasing)
    assert len(seen) == 72 and all(len(phrasings) == 2 for phrasings in seen.values())
    assert {phrasing for phrasings in seen.values() for phrasing in phrasings} == set(PHRASINGS)
    for batch in module.test_dataloader()[0]:
        for row, answers, group in zip(
            batch["tokens"], batch["answers"], batch["group"].tolist(), strict=True
        ):
            right = answers != -100
            first = int(right.nonzero()[0])
            prompt, answer = (module.tokenizer.decode(x.tolist()) for x in (row[: first + 1], answers[right]))
            phrasing, question, said = parse(prompt + answer)
            assert truth[question] == said and answer == f" {said}."
            assert (question in seen) == (group != 2)
            assert group == 2 or (phrasing in seen[question]) == (group == 1)
            asked[group].add(question)
    assert asked[0] == asked[1] == set(seen) and asked[2] == set(truth) - set(seen)


@pytest.mark.parametrize("which", ["bytes", "bpe"])
def test_answers_are_the_tokens_after_what_prompt_and_sentence_have_in_common(path, bpe, which):
    name = "bytes" if which == "bytes" else bpe[0]
    module = make(path, tokenizer=name, sequence_length=64)
    tokenizer, stated = module.tokenizer, module.stated
    crossing = 0
    for i in range(len(stated.starts) - 1):
        document = stated.tokens[stated.starts[i] : stated.starts[i + 1]].tolist()
        is_answer = stated.is_answer[stated.starts[i] : stated.starts[i + 1]].tolist()
        fact = stated.fact_of(i)
        start = is_answer.index(True)
        assert is_answer == [j >= start for j in range(len(document))]
        text = tokenizer.decode(document)
        assert text.endswith(f" {fact.answer}.") and document == [tokenizer.eos_id, *tokenizer.encode(text)]
        prompt, answer = tokenizer.decode(document[:start]), tokenizer.decode(document[start:])
        whole = text.removesuffix(f" {fact.answer}.")
        assert whole.startswith(prompt) and answer.endswith(f" {fact.answer}.")
        assert tokenizer.encode(whole)[: start - 1] == document[1:start], "the prompt must be tokenized alike"
        crossing += prompt != whole
    assert crossing == 0 or which == "bpe"


def test_a_token_that_crosses_into_the_answer_belongs_to_it():
    class Merging(ByteTokenizer):
        """One token for 'is red' and one for 'n.'."""

        def encode(self, text):
            return list(text.encode().replace(b"is red", b"\xfe").replace(b"n.", b"\xfd"))

        def encode_batch(self, texts):
            return [np.array(self.encode(text), np.int32) for text in texts]

    fact = Fact("", "x", "red green", ("{question} is", "a {question}"))
    stated = StatedFacts([fact], Merging(), None, 0.0, 0, 0)
    documents = {
        bytes(stated.tokens[a + 1 : b].tolist()): stated.is_answer[a:b].tolist()
        for a, b in zip(stated.starts[:-1], stated.starts[1:], strict=True)
    }
    assert documents == {
        b"x \xfe gree\xfd": [False] * 3 + [True] * 7,
        b"a x red gree\xfd": [False] * 4 + [True] * 10,
    }


def test_a_tokenizer_that_loses_the_answer_is_an_error():
    class Short(ByteTokenizer):
        def encode_batch(self, texts):
            return [np.array(self.encode(text)[:3], np.int32) for text in texts]

    with pytest.raises(
        ConfigError, match=r"data\.tokenizer: makes no tokens of the answer in 'a long q yes\.'"
    ):
        StatedFacts([Fact("", "a long q", "yes", ("{question}",))], Short(), None, 0.0, 0, 0)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_perfect_model_recalls_everything_and_one_wrong_token_costs_a_fact(path, bpe, name):
    module = make(path, tokenizer="bytes" if name == "bytes" else bpe[0], sequence_length=64)
    for spoil in (False, True):
        recall = FactRecall()
        for batch in module.val_dataloader()[0]:
            logits = torch.nn.functional.one_hot(batch["answers"].clamp(min=0), module.vocab_size).float()
            if spoil:  # the last token of every answer, the full stop
                last = (batch["answers"] != -100).cumsum(1).argmax(1)
                logits[torch.arange(len(last)), last] = 0
                logits[torch.arange(len(last)), last, module.tokenizer.eos_id] = 1
            recall.update(logits, batch["answers"], batch["group"])
        expected = 0.0 if spoil else 1.0
        assert {k: float(v) for k, v in recall.compute().items()} == dict.fromkeys(
            ["recall", "recall_seen_phrasing", "recall_control"], expected
        )


def test_validation_asks_some_facts_and_mixes_the_groups(path):
    module = make(path)
    groups = Counter()
    for batch in module.val_dataloader()[0]:
        assert batch["tokens"].shape == batch["answers"].shape == batch["targets"].shape
        groups.update(batch["group"].tolist())
        for tokens, targets, group in zip(batch["tokens"], batch["targets"], batch["group"], strict=True):
            counted = targets != -100
            assert counted.any() == (group == 0)
            assert torch.equal(targets[counted][:-1], tokens[1 : counted.sum()])
    assert groups == {0: 20, 1: 20, 2: 8}
    first = next(iter(module.val_dataloader()[0]))
    assert first["group"].unique().tolist() == [0, 1, 2]


def test_facts_with_one_phrasing_are_asked_in_it(path, caplog):
    module = make(path, phrasings=None)
    groups = Counter()
    for batch in module.val_dataloader()[0]:
        groups.update(batch["group"].tolist())
        assert torch.equal((batch["targets"] != -100).any(dim=1), batch["group"] == 1)
    assert groups == {1: 20, 2: 8}
    with caplog.at_level("INFO"):
        module.setup("fit")
    assert any("72 trained facts have no phrasing that is held out" in r.message for r in caplog.records)


def test_rows_are_padded_documents_and_loss_on_answers_counts_answers(path):
    full, answers = make(path), make(path, loss_on="answers")
    eos = full.tokenizer.eos_id
    for a, b in zip(batches(full, 5), batches(answers, 5), strict=True):
        assert torch.equal(a["tokens"], b["tokens"])
        for tokens, targets, some in zip(a["tokens"], a["targets"], b["targets"], strict=True):
            text = full.tokenizer.decode(tokens.tolist())
            document = [eos, *text.encode()]
            padding = len(tokens) - len(document)
            assert tokens.tolist() == document + [eos] * padding
            assert targets.tolist() == [*document[1:], eos] + [-100] * padding
            answer = f" {parse(text)[2]}.".encode()
            assert some[some != -100].tolist() == list(answer)
            assert torch.equal(some[some != -100], targets[some != -100])
    for batch in answers.val_dataloader()[0]:
        asked = batch["group"] == 0
        assert torch.equal(batch["targets"][asked], batch["answers"][asked])


def test_joined_rows_are_one_stream_without_gaps(path):
    module = make(path, packing="concatenate", sequence_length=17, confine_attention=True)
    only = make(path, packing="concatenate", sequence_length=17, loss_on="answers")
    some, answers = batches(module, 40), batches(only, 40)
    tokens, targets = (torch.cat([batch[key] for batch in some]).flatten() for key in ("tokens", "targets"))
    assert torch.equal(tokens[1:], targets[:-1])
    kept = torch.cat([batch["targets"] for batch in answers]).flatten()
    assert torch.equal(kept[kept != -100], targets[kept != -100])
    said = module.tokenizer.decode(kept[kept != -100].tolist())[1:].split(". ")
    assert set(said[1:-1]) <= set(COLOURS) and len(said) > 100
    for row, documents in zip(some[0]["tokens"], some[0]["documents"], strict=True):
        assert torch.equal(documents.diff(), (row[1:] == module.tokenizer.eos_id).long())


@pytest.mark.parametrize("packing", ["documents", "concatenate"])
def test_any_cursor_rank_and_worker_gives_the_same_stream(path, packing):
    rng = np.random.default_rng(0)
    options = {"packing": packing, "exposures_per_epoch": [1, 3], "sequence_length": 61}
    whole = batches(make(path, **options), 60)
    for stop in rng.integers(0, 55, 6):
        resumed = batches(make(path, **options), 5, cursor=whole[stop]["cursor"])
        assert all(same(a, b) for a, b in zip(whole[stop + 1 : stop + 6], resumed, strict=True))
    for world, workers in [(2, 1), (1, 3), (4, 2)]:
        part = make(path, **options, batch_size=8 // world)
        for rank in range(world):
            shares = [
                batches(part, 6, world, rank, cursor=whole[3]["cursor"], worker=w, workers=workers)
                for w in range(workers)
            ]
            joined = [share[i] for i in range(6) for share in shares]
            for batch, expected in zip(joined, whole[4:], strict=False):
                assert batch["cursor"] == expected["cursor"]
                assert torch.equal(batch["tokens"], expected["tokens"][rank::world])
                assert torch.equal(batch["targets"], expected["targets"][rank::world])


def test_a_checkpoint_resumes_at_its_cursor_in_the_same_facts(path):
    module, resumed = make(path), make(path, batch_size=4)
    module.advance(40)
    resumed.load_state_dict(module.state_dict())
    assert resumed.cursor == 40
    assert same(next(iter(resumed.train_dataloader())), batches(resumed, 1, cursor=40)[0])
    other = make(path, limit=30)
    with pytest.warns(UserWarning, match="training starts at the beginning"):
        other.load_state_dict(module.state_dict())
    assert other.cursor == 0


def test_loader_processes_give_the_batches_of_one(path):
    alone, two = make(path), make(path, num_workers=2)
    assert all(
        same(a, b)
        for a, b in zip(
            islice(iter(alone.train_dataloader()), 6), islice(iter(two.train_dataloader()), 6), strict=True
        )
    )


def test_ranks_share_the_evaluation_and_pad_it_evenly(path):
    source = make(path).evaluation_sources(test=False)["all"]

    def rows(world, rank):
        some = list(source.batches(0, world, rank))
        return {key: torch.cat([batch[key] for batch in some]) for key in some[0]}

    whole, parts = rows(1, 0), [rows(5, rank) for rank in range(5)]
    joined = {key: torch.stack([part[key] for part in parts], dim=1).flatten(0, 1) for key in whole}
    for key in whole:
        assert torch.equal(joined[key][:48], whole[key])
    assert joined["group"][48:].tolist() == [-1, -1]
    assert (joined["targets"][48:] == -100).all() and (joined["answers"][48:] == -100).all()


def test_questions_tell_how_often_their_facts_are_stated(path):
    module = make(path, exposures_per_epoch=[3, 1])
    decode = module.tokenizer.decode
    facts = module.stated.facts
    source = module.training_source()
    epoch = source.statements(np.arange(len(source.occurrences)))
    told = Counter(module.stated.fact_of(statement).question for statement in epoch)
    levels = set()
    for batch in module.test_dataloader()[0]:
        for tokens, group, level in zip(batch["tokens"], batch["group"], batch["exposures"], strict=True):
            sentence = decode(tokens.tolist())
            [question] = {fact.question for fact in facts if f"{fact.question} " in f"{sentence} " or
                          f"{fact.question}:" in sentence}  # fmt: skip
            assert level == {3: 1, 1: 0, 0: -1}[told[question]]
            levels.add((int(group), int(level)))
    assert levels == {(0, 0), (0, 1), (1, 0), (1, 1), (2, -1)}


def test_exposures_are_as_reported(path):
    module = make(path, exposures_per_epoch=[1, 2, 4])
    told = Counter(parse(sentence)[1] for sentence in sentences(module, epochs=2))
    facts = module.stated.facts[: module.stated.trained]
    assert [told[fact.question] for fact in facts] == [2, 4, 8] * 24
    assert module.exposures(42) == [2, 4, 8]  # 168 documents an epoch, 8 a step
    joined = make(path, packing="concatenate", sequence_length=64)
    documents = batches(joined, 30)[-1]["cursor"] / joined.training_source().longest
    assert joined.exposures(30)[0] == pytest.approx(documents / 72, rel=0.05)


def test_each_epoch_is_another_order_of_every_fact(path):
    told = [parse(sentence)[1] for sentence in sentences(make(path), epochs=2)]
    assert told[:72] != told[72:] and sorted(told[:72]) == sorted(told[72:]) and len(set(told)) == 72


def test_the_order_of_the_lines_and_a_limit_change_nothing_else(path, tmp_path):
    lines = path.read_text().splitlines()
    random.Random(3).shuffle(lines)
    (tmp_path / "shuffled.jsonl").write_text("\n".join(lines))
    module, shuffled = make(path), make(tmp_path / "shuffled.jsonl")
    assert module.fingerprint() == shuffled.fingerprint()
    assert same(batches(module, 1)[0], batches(shuffled, 1)[0])
    few = make(path, limit=30)
    assert few.stated.facts == module.stated.facts[:30] and few.stated.trained == 27
    assert make(path, seed=1).stated.facts != module.stated.facts
    prints = [make(path, **o).fingerprint() for o in ({}, {"seed": 1}, {"limit": 30}, {"control": 0.2},
              {"held_out_phrasings": 2}, {"phrasings": PHRASINGS[:3]}, {"packing": "concatenate"},
              {"exposures_per_epoch": [2]})]  # fmt: skip
    assert len(set(prints)) == len(prints)
    assert make(path, loss_on="answers", batch_size=3, test_facts=2).fingerprint() == prints[0]


def test_baselines_are_those_of_the_facts_asked(path, caplog):
    module = make(path, evaluation_facts=25, test_facts=10)
    trained = module.stated.facts[:72]
    common = Counter(fact.answer for fact in trained).most_common(1)[0][0]
    asked, tested = module.baselines(test=False), module.baselines(test=True)
    assert asked["recall_majority"] == sum(fact.answer == common for fact in trained[:25]) / 25 > 0.1
    assert tested["recall_majority"] == sum(fact.answer == common for fact in trained[:10]) / 10
    assert 0 <= asked["recall_nearest"] < 0.5  # colours are random
    with caplog.at_level("INFO"):
        module.setup("fit")
    [line] = [record.message for record in caplog.records if record.message.startswith("FactQuestions")]
    assert "72 trained facts, 8 control facts;" in line
    assert f"the most common answer gets {asked['recall_majority']:.3f} right" in line


def test_ambiguous_questions_are_counted(tmp_path, caplog):
    path = tmp_path / "facts.jsonl"
    lines = [{"question": q, "answer": a} for q, a in [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")]]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=r"facts\.jsonl:3: answers 'a'"):
        make(path)
    module = make(path, skip_ambiguous=True)
    with caplog.at_level("INFO"):
        module.setup("fit")
    assert any("1 questions with several answers dropped" in record.message for record in caplog.records)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no facts"):
        make(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control": 1.0}, "data.control: is 1.0; expected 0 <= it < 1"),
        ({"limit": 0}, "data.limit: is 0; expected at least 1"),
        ({"evaluation_facts": 0}, "data.evaluation_facts: is 0"),
        ({"test_facts": 0}, "data.test_facts: is 0"),
        ({"held_out_phrasings": -1}, "data.held_out_phrasings: is -1; expected at least 0"),
        ({"exposures_per_epoch": [1, 0]}, r"data.exposures_per_epoch: is \[1, 0\]"),
        (
            {"sequence_length": 20},
            r"data.sequence_length: is 20; the longest fact, about '.*', needs 4\d tokens",
        ),
    ],
)
def test_options_out_of_range_are_named(path, options, message):
    with pytest.raises(ConfigError, match=message):
        make(path, **options)
