import json
import math

import pytest

from memlm.errors import DataError
from memlm.evaluation.estimates import Estimate
from memlm.evaluation.results import read_results, table, write_records, write_results
from memlm.evaluation.task import TaskResult

SWAG = TaskResult(
    "hellaswag",
    {"acc": Estimate(0.25, 0.2, 0.31234, 1200), "acc_norm": Estimate(0.5, 0.4, 0.6, 1200)},
    1200,
    12.345,
    notes={"dropped_shots": 1500, "cut_prompts": 2},
)
BOOK = TaskResult("book", {"perplexity": Estimate(math.inf, None, None, 1)}, 1, 0.5, {"a": {}, "b": {}})


def test_the_table():
    assert table([SWAG, BOOK]).splitlines() == [
        "task       metric       value     95 % interval      n  seconds",
        "---------  ----------  ------  ----------------  -----  -------",
        "hellaswag  acc         0.2500  0.2000 .. 0.3123  1,200     12.3",
        "           acc_norm    0.5000  0.4000 .. 0.6000  1,200",
        "book       perplexity     inf                 -      1      0.5",
        "hellaswag: 1,500 dropped shots, 2 cut prompts (the context was too short)",
    ]


def test_results_of_other_tasks_are_kept_and_of_the_same_replaced(tmp_path):
    path = tmp_path / "tasks.json"
    assert read_results(path) == {}
    write_results(path, [SWAG, BOOK], {"step": 10})
    write_results(
        path, [TaskResult("book", {"perplexity": Estimate(5.0, 4.0, 6.0, 3)}, 3, 1.0)], {"step": 20}
    )
    held = json.loads(path.read_text(), parse_constant=pytest.fail)["tasks"]  # no Infinity, which is not JSON
    assert held == read_results(path)
    assert held["hellaswag"] == {
        "examples": 1200,
        "seconds": 12.345,
        "metrics": {
            "acc": {"value": 0.25, "low": 0.2, "high": 0.31234, "n": 1200},
            "acc_norm": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 1200},
        },
        "notes": {"dropped_shots": 1500, "cut_prompts": 2},
        "step": 10,
    }
    assert held["book"]["metrics"] == {"perplexity": {"value": 5.0, "low": 4.0, "high": 6.0, "n": 3}}
    assert held["book"]["step"] == 20
    write_results(path, [BOOK], {})
    assert read_results(path)["book"]["metrics"]["perplexity"]["value"] == "inf"
    assert [p.name for p in tmp_path.iterdir()] == ["tasks.json"]


@pytest.mark.parametrize("content", ["[1]", "{", '{"task": 1}', '{"tasks": 3}'])
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "tasks.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tasks.json: is not a file of task results"):
        write_results(path, [BOOK], {})
    assert path.read_text() == content


def test_records(tmp_path):
    path = tmp_path / "tasks" / "a.jsonl"
    write_records(path, [{"prompt": "ü\n"}, {"prompt": "b"}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"prompt": "ü\n"},
        {"prompt": "b"},
    ]
    write_records(path, [])
    assert path.read_text() == ""
