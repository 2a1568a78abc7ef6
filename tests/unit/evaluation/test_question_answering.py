import json

import pytest
from byte_model import evaluator, greedy, log_likelihood

from memlm.errors import ConfigError, DataError
from memlm.evaluation.answers import f1, normalize
from memlm.evaluation.question_answering import HotpotQA, NQOpen, TriviaQA

NQ = [
    {"question": "who wrote hamlet", "answer": ["William Shakespeare", "Shakespeare"]},
    {"question": "when did it end", "answer": ["1945"]},
    {"question": "what is the capital of france", "answer": ["Paris"]},
    {"question": "how many are there", "answer": [" four ", "4"]},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "NQ-open.dev.jsonl", NQ)


def test_figures_against_brute_force(path):
    ask = evaluator()
    task = NQOpen(path, shots=0, max_new_tokens=12)
    result = task.run(ask, records=True)
    assert (result.name, result.examples, result.notes, result.groups) == ("nqopen", 4, {}, {})
    matches, overlaps, nats = [], [], []
    for row, record in zip(NQ, result.records, strict=True):
        prompt = f"Answer these questions:\n\nQ: {row['question']}?\nA:"
        assert record["prompt"] == prompt
        prediction = greedy(ask.model, prompt, 12).split("\n")[0].strip()
        assert record["prediction"] == prediction
        matches.append(any(normalize(prediction) == normalize(answer) for answer in row["answer"]))
        overlaps.append(max(f1(prediction, answer) for answer in row["answer"]))
        nats.append(-log_likelihood(ask.model, prompt, f" {row['answer'][0].strip()}"))
    assert result.metrics["exact_match"].value == sum(matches) / 4
    assert result.metrics["f1"].value == pytest.approx(sum(overlaps) / 4)
    assert result.metrics["answer_nll"].value == pytest.approx(sum(nats) / 4, abs=1e-4)


class Parrot:
    """In place of a model: writes what it was told for each question."""

    def __init__(self, answers):
        self.answers = answers

    def __call__(self, model, prompts, *args, on_token, **options):
        for number, prompt in enumerate(prompts):
            text = bytes(i for i in prompt if i < 256).decode()
            [answer] = [a for q, a in self.answers.items() if text.endswith(f"{q}?\nA:")]
            for token in answer.encode():
                if on_token(number, token):
                    break


def test_right_answers_count_as_right(path, monkeypatch):
    answers = [" the shakespeare.\nQ:", " 1946", "Paris France", " Four!"]
    told = dict(zip([row["question"] for row in NQ], answers, strict=True))
    monkeypatch.setattr("memlm.evaluation.evaluator.generate", Parrot(told))
    result = NQOpen(path, shots=2).run(evaluator(), records=True)
    assert [record["exact_match"] for record in result.records] == [1, 0, 0, 1]
    assert [record["f1"] for record in result.records] == pytest.approx([1, 0, 2 / 3, 1])
    assert result.records[0]["prediction"] == "the shakespeare."
    assert result.metrics["exact_match"].value == 0.5
    assert result.metrics["f1"].value == pytest.approx(2 / 3)
    stopped = NQOpen(path, shots=0, stop=["sp"]).run(evaluator(), records=True)
    assert stopped.records[0]["prediction"] == "the shake"


def test_shots_are_other_questions_with_their_answers(path):
    task = NQOpen(path, shots=2, seed=1)
    seen = set()
    for number, example in enumerate(task.examples):
        prompt = task.prompt(number, example)
        assert prompt.text().startswith("Answer these questions:\n\nQ: ")
        for shot in prompt.shots:
            question, answer = shot.split("\nA: ")
            [row] = [row for row in NQ if question == f"Q: {row['question']}?"]
            assert answer == f"{row['answer'][0].strip()}\n"
            assert example.text != f"{question}\nA:"
        assert len(set(prompt.shots)) == 2
        seen.add(prompt.shots)
        assert prompt == NQOpen(path, shots=2, seed=1).prompt(number, example)
    assert len(seen) > 1
    other = NQOpen(path, shots=2, seed=2)
    assert any(other.prompt(n, e) != task.prompt(n, e) for n, e in enumerate(task.examples))


def test_shots_of_another_file_leave_out_the_question_that_is_asked(tmp_path, path):
    copies = write(tmp_path / "train.jsonl", [NQ[0], NQ[0], {"question": "new", "answer": ["one"]}])
    task = NQOpen(path, shots=1, shots_path=copies)
    shots = [task.prompt(n, e).shots for n, e in enumerate(task.examples)]
    assert shots[0] == ("Q: new?\nA: one\n",)
    with pytest.raises(
        ConfigError, match=r"NQOpen.shots: is 2, but .*train.jsonl has only 1 examples other than"
    ):
        NQOpen(path, shots=2, shots_path=copies).load()
    NQOpen(path, shots=3).load()
    with pytest.raises(ConfigError, match=r"NQOpen.shots: is 4, but .*NQ-open.dev.jsonl has only 3 examples"):
        NQOpen(path, shots=4).load()


def test_dropped_shots_and_cut_questions_are_told(path):
    result = NQOpen(path, shots=3, max_new_tokens=4).run(evaluator(110))
    assert result.notes["examples_with_dropped_shots"] == 4
    assert 4 <= result.notes["dropped_shots"] <= 12 and "cut_prompts" not in result.notes
    assert NQOpen(path, shots=0, max_new_tokens=4).run(evaluator(40)).notes == {"cut_prompts": 4}


def test_limit(path):
    assert NQOpen(path, shots=1, limit=2, max_new_tokens=2).run(evaluator()).examples == 2


def test_triviaqa_as_released_and_as_rows(tmp_path):
    released = tmp_path / "unfiltered-web-dev.json"
    answer = {
        "Aliases": ["Big Apple", "NYC"],
        "NormalizedAliases": ["big apple", "nyc", ""],
        "Value": "New York",
        "NormalizedValue": "new york",
    }
    questions = [{"Question": "Which city never sleeps?", "QuestionId": "tc_1", "Answer": answer}]
    released.write_text(json.dumps({"Data": questions, "Domain": "unfiltered-web", "Version": 1.0}))
    rows = {
        "question": "Which city never sleeps?",
        "answer": {
            "value": "New York",
            "aliases": answer["Aliases"],
            "normalized_aliases": answer["NormalizedAliases"],
        },
    }
    for path in (str(released), write(tmp_path / "rows.jsonl", [rows])):
        [example] = TriviaQA(path, shots=0).examples
        assert example.text == "Question: Which city never sleeps?\nAnswer:"
        assert example.answers == ("New York", "Big Apple", "NYC", "big apple", "nyc")
    assert TriviaQA(str(released), shots=0, max_new_tokens=2).run(evaluator()).examples == 1


def test_hotpotqa(tmp_path):
    path = tmp_path / "hotpot_dev_fullwiki_v1.json"
    path.write_text(json.dumps([{"_id": "5", "question": "Same country?", "answer": "yes", "context": []}]))
    [example] = HotpotQA(str(path), shots=0).examples
    assert (example.text, example.answers) == ("Question: Same country?\nAnswer:", ("yes",))


@pytest.mark.parametrize(
    ("cls", "rows", "message"),
    [
        (
            NQOpen,
            [NQ[0], {"question": "who"}],
            "a.jsonl:2: has no field 'answer'; expected a list of strings",
        ),
        (NQOpen, [{"question": "who", "answer": "me"}], "a.jsonl:1: field 'answer' is a string"),
        (NQOpen, [{"question": "who", "answer": []}], "a.jsonl:1: field 'answer' has 0 entries"),
        (NQOpen, [{"question": " ", "answer": ["me"]}], "a.jsonl:1: field 'question' is empty"),
        (NQOpen, [{"question": "who", "answer": [""]}], r"a.jsonl:1: field 'answer\[0\]' is empty"),
        (
            TriviaQA,
            [{"question": "who", "answer": {"aliases": []}}],
            "a.jsonl:1: has no field 'answer.value'",
        ),
        (HotpotQA, [{"question": "who", "answer": ["yes"]}], "a.jsonl:1: field 'answer' is a list"),
    ],
)
def test_malformed_rows(tmp_path, cls, rows, message):
    with pytest.raises(DataError, match=message):
        cls(write(tmp_path / "a.jsonl", rows)).load()


def test_options(path):
    for options, message in [
        ({"shots": -1}, "NQOpen.shots: is -1; expected at least 0"),
        ({"limit": 0}, "NQOpen.limit: is 0; expected at least 1"),
        ({"max_new_tokens": 0}, "NQOpen.max_new_tokens: is 0"),
        ({"stop": [""]}, "NQOpen.stop: holds an empty text"),
        ({"name": "a/b"}, "NQOpen.name: is 'a/b'; expected letters"),
        ({"name": ".."}, "NQOpen.name"),
    ]:
        with pytest.raises(ConfigError, match=message):
            NQOpen(path, **options)
    with pytest.raises(ConfigError, match=r"NQOpen.max_new_tokens: is 32; expected less than 32 tokens"):
        NQOpen(path, shots=1).run(evaluator(32))


def test_an_answer_that_does_not_fit_names_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "who", "answer": ["x" * 50]}])
    with pytest.raises(DataError, match=r"a.jsonl: the answer 'x+' has 51 tokens; expected at most 40"):
        NQOpen(path, shots=0, max_new_tokens=4).run(evaluator(40))
