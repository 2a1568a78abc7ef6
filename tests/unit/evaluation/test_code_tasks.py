"""Programs that a model writes: prompts, what is run, and pass@k."""

import ast
import gzip
import itertools
import json
import random
import sys
from pathlib import Path

import pytest
from byte_model import evaluator, greedy

from memlm.errors import ConfigError, DataError, UserError
from memlm.evaluation import code_tasks
from memlm.evaluation.code_tasks import MBPP, HumanEval, pass_at_k
from memlm.evaluation.evaluator import Evaluator, Reply
from memlm.evaluation.sandbox.execution import Sandbox, SandboxUnavailable
from memlm.generation.decoding import Sampling

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

ADD = {
    "task_id": "Test/0",
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
}
TWICE = {
    "task_id": "Test/1",
    "prompt": "import math\n\ndef root(x: float) -> float:\n",
    "entry_point": "root",
    "canonical_solution": "    return math.sqrt(x)\n",
    "test": "\n\nMETADATA = {}\n\ndef check(candidate):\n    assert candidate(4.0) == 2\n",
}
BASIC = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add_{number}(x):\r\n  return x + {number}",
        "test_setup_code": "",
        "test_list": [f"assert add_{number}({i}) == {number + i}" for i in range(3)],
        "challenge_test_list": [],
    }
    for number in (1, 2, 3, 4, 10, 11, 12, 510, 511)
]


def written(path: Path, rows: list[dict]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def human_eval(folder: Path, rows=(ADD, TWICE), **options) -> HumanEval:
    options = {"allow_execution": True, "max_new_tokens": 8, "workers": 2} | options
    return HumanEval(written(folder / "HumanEval.jsonl.gz", list(rows)), **options)


def mbpp(folder: Path, rows=BASIC, **options) -> MBPP:
    options = {"allow_execution": True, "max_new_tokens": 8, "workers": 2} | options
    return MBPP(written(folder / "mbpp.jsonl", list(rows)), **options)


def until(text: str, stop: list[str]) -> str:
    return text[: min([place for word in stop if (place := text.find(word)) >= 0], default=len(text))]


class Writer(Evaluator):
    """A model that writes what it is told to, of each prompt the next texts."""

    def __init__(self, *texts: list[str]) -> None:
        super().__init__(evaluator().model, evaluator().tokenizer, 600)
        self.texts = list(texts)
        self.asked: list = []

    def generate(self, prompts, max_new_tokens, stop=(), sampling=Sampling(), samples=1):
        self.asked.append((prompts, max_new_tokens, list(stop), sampling, samples))
        assert all(len(texts) == samples for texts in self.texts)
        return [
            Reply(prompt.text(), (), tuple(until(text, stop) for text in texts))
            for prompt, texts in zip(prompts, self.texts, strict=True)
        ]


# -- pass@k


def test_pass_at_k_is_the_share_of_all_choices_of_samples():
    for n in range(1, 8):
        for right in range(n + 1):
            for k in range(1, n + 1):
                choices = list(itertools.combinations(range(n), k))
                expected = sum(min(choice) < right for choice in choices) / len(choices)
                assert pass_at_k(n, right, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_unbiased():
    chance, n, k = 0.3, 10, 4
    mean = sum(
        pass_at_k(n, c, k)
        * chance**c
        * (1 - chance) ** (n - c)
        * len(list(itertools.combinations(range(n), c)))
        for c in range(n + 1)
    )
    assert mean == pytest.approx(1 - (1 - chance) ** k, rel=1e-12)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(100_000, 1, 1) == pytest.approx(1e-5)
    assert pass_at_k(100_000, 99_999, 2) == 1


# -- what is run


def test_solutions_pass_and_wrong_programs_do_not(tmp_path):
    task = human_eval(tmp_path, samples=3, k=[1, 2, 3])
    right = [row["canonical_solution"] for row in (ADD, TWICE)]
    model = Writer(
        [right[0], "    return a - b\n", "    return a +\n"],
        [right[1], right[1] + "\ndef other():\n    break", "    while True: pass\n"],
    )
    task.seconds = 1.0
    result = task.run(model, records=True)
    assert {name: figure.value for name, figure in result.metrics.items()} == pytest.approx(
        {"pass@1": (1 / 3 + 2 / 3) / 2, "pass@2": (2 / 3 + 1) / 2, "pass@3": 1.0, "stopped": 1 / 6}
    )
    samples = [[sample["verdict"] for sample in record["samples"]] for record in result.records]
    assert samples == [["passed", "failed", "failed"], ["passed", "passed", "timeout"]]
    assert result.records[0]["samples"][1]["detail"] == "AssertionError"
    assert result.records[0]["samples"][2]["detail"].startswith("SyntaxError")
    assert result.records[1]["samples"][1]["completion"] == right[1]  # ended at a stop
    assert result.records[0]["task_id"] == "Test/0" and result.records[0]["prompt"] == ADD["prompt"]
    ((_, tokens, stop, sampling, count),) = model.asked
    assert (tokens, stop, count) == (8, ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], 3)
    assert sampling == Sampling(0.2, top_p=0.95, seed=0)


def test_a_single_sample_is_a_share_with_wilsons_interval(tmp_path):
    from memlm.evaluation.intervals import wilson

    result = human_eval(tmp_path).run(Writer([ADD["canonical_solution"]], ["    return 0\n"]))
    figure = result.metrics["pass@1"]
    assert (figure.value, figure.n) == (0.5, 2)
    assert (figure.low, figure.high) == pytest.approx(wilson(1, 2))


def test_where_no_sample_passes_the_interval_has_a_width(tmp_path):
    wrong = ["    return 0\n"] * 2
    figure = human_eval(tmp_path, samples=2, k=[2]).run(Writer(wrong, wrong)).metrics["pass@2"]
    assert figure.value == figure.low == 0 and figure.high > 0.5


def test_a_program_that_ends_before_its_tests_does_not_pass(tmp_path):
    body = "    import os; os._exit(0)\n"
    assert human_eval(tmp_path, [ADD]).run(Writer([body])).metrics["pass@1"].value == 0


def test_basic_programs_with_setup_and_imports(tmp_path):
    rows = [
        *BASIC,
        BASIC[0]
        | {
            "task_id": 20,
            "code": "class Node:\n  def __init__(self, x): self.x = x\ndef value(n): return n.x",
            "test_setup_code": "root = Node(5) \r\n",
            "test_list": ["assert value(root) == 5"],
        },
        {
            "task_id": 21,
            "prompt": "Write a function to halve.",
            "code": "def half(x):\n  return x / 2",
            "test_imports": ["import math"],
            "test_list": ["assert math.isclose(half(1), 0.5)"],
        },
    ]
    task = mbpp(tmp_path, rows)
    assert [problem.name for problem in task.examples] == ["11", "12", "510", "20", "21"]
    solutions = [[problem.solution + "\n[DONE]\n\nYou are"] for problem in task.examples]
    result = task.run(Writer(*solutions), records=True)
    assert result.metrics["pass@1"].value == 1
    assert result.records[0]["samples"][0]["completion"] == "def add_11(x):\r\n  return x + 11\n"
    wrong = task.run(Writer(*solutions[::-1]))
    assert wrong.metrics["pass@1"].value == pytest.approx(1 / 5)  # that in the middle


def test_what_a_model_writes_is_run(tmp_path):
    """With the real generation: greedy programs of a tiny model, none of which is a program."""
    task = human_eval(tmp_path, temperature=0.0, stop=["e"])
    model = evaluator()
    result = task.run(model, records=True)
    for row, record in zip((ADD, TWICE), result.records, strict=True):
        (sample,) = record["samples"]
        assert sample["completion"] == until(greedy(model.model, row["prompt"], 8), ["e"])
        assert sample["verdict"] == "failed"
    assert result.metrics["pass@1"].value == 0 and result.examples == 2


def test_samples_depend_on_the_seed_alone(tmp_path):
    def texts(seed):
        task = human_eval(tmp_path, samples=4, temperature=1.0, seed=seed)
        return [record["samples"] for record in task.run(evaluator(), records=True).records]

    def completions(samples):
        return [[sample["completion"] for sample in problem] for problem in samples]

    first, again, other = texts(0), texts(0), texts(1)
    assert completions(first) == completions(again) != completions(other)
    assert len(set(completions(first)[0])) > 1


# -- prompts


def test_basic_prompts_show_the_shots_in_their_order(tmp_path):
    task = mbpp(tmp_path, random.Random(0).sample(BASIC, len(BASIC)))
    task.load()
    problem = next(problem for problem in task.examples if problem.name == "12")
    expected = ""
    for number in (2, 3, 4, 12):
        row = next(row for row in BASIC if row["task_id"] == number)
        expected += f"You are an expert Python programmer, and here is your task: {row['text']} "
        expected += "Your code should pass these tests:\n\n" + "\n".join(row["test_list"]) + "\n[BEGIN]\n"
        if number != 12:
            expected += row["code"] + "\n[DONE]\n\n"
    assert task.full_prompt(problem).text() == expected


def test_basic_prompts_are_those_of_lm_eval(tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="optional: memlm[lm-eval]")
    jinja2, yaml = pytest.importorskip("jinja2"), pytest.importorskip("yaml")
    folder = Path(lm_eval.__file__).parent / "tasks" / "mbpp"

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda *_: None)
    settings = yaml.load((folder / "mbpp.yaml").read_text(), Loader)
    tree = ast.parse((folder / "utils.py").read_text())
    listing = next(
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples"
    )
    shots = ast.literal_eval(listing.body[0].value)  # type: ignore[attr-defined]
    row = BASIC[5]
    render = jinja2.Environment(keep_trailing_newline=True).from_string
    expected = "".join(
        render(settings["doc_to_text"]).render(**shot)
        + render(settings["doc_to_target"]).render(**shot)
        + "\n\n"
        for shot in shots
    )
    expected += render(settings["doc_to_text"]).render(**row)
    task = mbpp(tmp_path, [row], shots_path=written(tmp_path / "shots.jsonl", shots))
    task.load()
    assert task.full_prompt(task.examples[0]).text() == expected
    assert list(task.stop) == settings["generation_kwargs"]["until"]
    # Their solutions pass their tests.
    for problem in map(task.problem, code_tasks.read_rows(tmp_path / "shots.jsonl")):
        assert task.judge(problem, problem.solution).passed
        assert not task.judge(problem, "pass").passed


def test_human_eval_stops_are_those_of_lm_eval():
    lm_eval = pytest.importorskip("lm_eval", reason="optional: memlm[lm-eval]")
    text = (Path(lm_eval.__file__).parent / "tasks" / "humaneval" / "humaneval.yaml").read_text()
    assert all(f"- {json.dumps(stop)}" in text for stop in HumanEval.stops)
    assert text.count('- "\\n') == len(HumanEval.stops)


def test_other_shots_and_problems(tmp_path):
    assert len(mbpp(tmp_path, task_ids=(511, 600)).examples) == 1
    everything = mbpp(tmp_path, task_ids=None, shot_ids=[10, 2])
    assert [problem.name for problem in everything.examples] == ["1", "3", "4", "11", "12", "510", "511"]
    assert [shot.count("add 10") for shot in everything.solved] == [1, 0]
    assert mbpp(tmp_path, shot_ids=[]).solved == ()
    assert len(mbpp(tmp_path, limit=2).examples) == 2


# -- what is wrong


def test_nothing_is_generated_or_run_without_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(code_tasks, "Sandbox", lambda *_: pytest.fail("made a sandbox"))
    for task in (human_eval(tmp_path, allow_execution=False), mbpp(tmp_path, allow_execution=False)):
        writer = Writer()
        with pytest.raises(ConfigError, match="allow_execution: is false; this task runs programs") as caught:
            task.run(writer)
        assert not writer.asked and "\n" not in str(caught.value)


def test_a_system_without_sandboxes_is_told_before_anything_is_generated(tmp_path, monkeypatch):
    monkeypatch.setattr(code_tasks, "Sandbox", lambda *_: Sandbox(layers=()))
    writer = Writer()
    with pytest.raises(SandboxUnavailable, match="cannot be run safely"):
        human_eval(tmp_path).run(writer)
    assert not writer.asked


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "HumanEval.samples: is 0; expected at least 1"),
        ({"samples": 2, "k": [1, 3]}, r"HumanEval.k: is \[1, 3\]; expected .* from 1 to samples, which is 2"),
        ({"k": []}, r"HumanEval.k: is \[\]"),
        ({"k": [0]}, r"HumanEval.k: is \[0\]"),
        ({"samples": 2, "temperature": 0.0}, "HumanEval.samples: is 2, but all are the same"),
        ({"temperature": -1.0}, "HumanEval: temperature is -1"),
        ({"top_p": 2.0}, "HumanEval: top_p is 2"),
        ({"max_new_tokens": 0}, "HumanEval.max_new_tokens: is 0"),
        ({"seconds": 0}, "HumanEval.seconds: is 0"),
        ({"memory_mb": 10}, "HumanEval.memory_mb: is 10; expected at least 128"),
        ({"workers": 0}, "HumanEval.workers: is 0"),
        ({"stop": [""]}, "HumanEval.stop: holds an empty text"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        human_eval(tmp_path, **options)


def test_no_room_for_a_problem(tmp_path):
    with pytest.raises(ConfigError, match=r"HumanEval.max_new_tokens: is 600; expected less than 600 tokens"):
        human_eval(tmp_path, max_new_tokens=600).run(evaluator())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": None}, "jsonl.gz:2: has no field 'prompt'; expected a string"),
        ({"test": ""}, "jsonl.gz:2: field 'test' is empty"),
        ({"entry_point": "a b"}, "jsonl.gz:2: field 'entry_point' is 'a b'; expected the name of a function"),
        ({"task_id": 3}, "jsonl.gz:2: field 'task_id' is a number; expected a string"),
    ],
)
def test_faults_of_a_row(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        human_eval(tmp_path, [ADD, TWICE | change]).load()


def test_faults_of_a_basic_row(tmp_path):
    for change, message in (
        ({"text": None}, "jsonl:1: has no field 'prompt'"),
        ({"test_list": []}, "jsonl:1: field 'test_list' has 0 entries; expected at least 1"),
        ({"test_list": "assert"}, "jsonl:1: field 'test_list' is a string; expected a list"),
        ({"code": 1}, "jsonl:1: field 'code' is a number"),
        ({"task_id": "x"}, "jsonl:1: field 'task_id' is 'x'; expected a number"),
    ):
        with pytest.raises(DataError, match=message):
            mbpp(tmp_path, [BASIC[5] | change], shot_ids=[]).load()


def test_problems_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"MBPP.shot_ids: has 3, but .*mbpp.jsonl has no problem with that"):
        mbpp(tmp_path, [row for row in BASIC if row["task_id"] != 3]).load()
    with pytest.raises(ConfigError, match=r"MBPP.task_ids: is \(600, 700\), but .* with a task_id from 600"):
        mbpp(tmp_path, task_ids=(600, 700)).load()
    with pytest.raises(ConfigError, match=r"HumanEval.path: is .*has several problems with task_id Test/0"):
        human_eval(tmp_path, [ADD, ADD]).load()


def test_every_fault_is_one_that_users_can_mend():
    assert issubclass(SandboxUnavailable, UserError)
