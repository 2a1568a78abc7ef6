import json
from pathlib import Path

import pytest
import yaml

from memlm.compare import compare, main, table
from memlm.errors import DataError
from memlm.run_metrics import Series, read_metrics

CSV = """step,train/loss,train/tokens,train/seconds,val/loss,val/bits_per_byte,val/recall,val/recall_control
1,5.0,1000,0.5,,,,
2,4.0,2000,1.5,,,,
2,,2000,,4.5,2.5,0.25,0.0625
3,3.0,3000,2.5,,,,
4,3.0,4000,4.0,,,,
4,,4000,,3.25,1.75,0.75,0.03125
5,2.0,5000,5.0,,,,
"""
MODEL = {
    "total": 1234567,
    "active": 4567,
    "flops_per_token": 8910,
    "values_read_per_token": 64,
    "sequence_length": 8,
}
TEST = {"test/loss": 3.5, "test/recall": 0.5, "checkpoint": "runs/a/checkpoints/best.ckpt", "step": 4}


def make(root: Path, name: str, *, metrics=CSV, model=MODEL, environment=None, test=None, data=None) -> str:
    run = root / name
    run.mkdir()
    (run / "metrics.csv").write_text(metrics)
    for file, content in (("model", model), ("environment", environment), ("test", test)):
        if content is not None:
            (run / f"{file}.json").write_text(json.dumps(content))
    if data is not None:
        (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return str(run)


def line(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).split()


def test_values_of_the_last_validation(tmp_path):
    environment = {"tokens": 5000, "train_seconds": 4.0}
    comparison = compare([make(tmp_path, "a", environment=environment)])
    assert comparison["measured_on"] == "validation"
    assert comparison["warnings"] == []
    assert comparison["runs"] == [
        {
            "run": str(tmp_path / "a"),
            "measured": "validation, step 4",
            "parameters_total": 1234567,
            "parameters_active": 4567,
            "flops_per_token": 8910,
            "values_read_per_token": 64,
            "steps": 5,
            "tokens": 5000,
            "tokens_per_second": 1250,
            "train_seconds": 4.0,
            "val/loss": 3.25,
            "val/bits_per_byte": 1.75,
            "val/recall": 0.75,
            "val/recall_seen_phrasing": None,
            "val/recall_control": 0.03125,
            "val/recall_majority": None,
        }
    ]


def test_a_killed_run_is_described_by_its_metrics(tmp_path):
    run = compare([make(tmp_path, "a", environment={"started": "x"})])["runs"][0]
    assert (run["tokens"], run["train_seconds"], run["tokens_per_second"]) == (5000, 5, 1000)


def test_missing_values_print_as_dashes(tmp_path):
    text = table(compare([make(tmp_path, "a", metrics="step,train/loss\n1,2.0\n", model=None)]))
    for name in (
        "total parameters",
        "tokens seen, padding included",
        "val/loss (nats per token)",
        "val/recall_control (never trained)",
    ):
        assert line(text, name) == ["-"]
    assert line(text, "measured on") == ["not", "validated"]


def test_table_has_a_column_for_each_run(tmp_path):
    runs = [make(tmp_path, "a"), make(tmp_path, "b", model=MODEL | {"total": 99})]
    text = table(compare(runs))
    assert line(text, "total parameters") == ["1,234,567", "99"]
    assert line(text, "val/recall (held-out phrasing)") == ["0.750", "0.750"]
    assert len({len(row) for row in text.splitlines()[:2]}) == 1


def test_test_results_are_used_when_every_run_has_them(tmp_path):
    runs = [make(tmp_path, name, test=TEST) for name in "ab"]
    comparison = compare(runs)
    assert comparison["measured_on"] == "test"
    assert [run["test/loss"] for run in comparison["runs"]] == [3.5, 3.5]
    assert comparison["runs"][0]["measured"] == "test, best.ckpt, step 4"
    outdated = "was tested at step 4 and trained to step 5: test it again"
    assert comparison["warnings"] == [f"a {outdated}", f"b {outdated}"]


def test_test_and_validation_are_never_mixed(tmp_path):
    comparison = compare([make(tmp_path, "a", test=TEST), make(tmp_path, "b")])
    assert [run["val/loss"] for run in comparison["runs"]] == [3.25, 3.25]
    assert comparison["warnings"] == ["test results of a are left aside, since b has none"]


def test_several_evaluation_sets_have_a_row_each(tmp_path):
    web, both = {"test/web/bits_per_byte": 1.25}, {"test/web/bits_per_byte": 1.5, "test/a/b/bits_per_byte": 2}
    comparison = compare(
        [make(tmp_path, "a", test=TEST | web), make(tmp_path, "b", test=TEST | both | {"test/web/loss": 3.0})]
    )
    text = table(comparison)
    assert line(text, "test/web/bits_per_byte") == ["1.2500", "1.5000"]
    assert line(text, "test/a/b/bits_per_byte") == ["-", "2.0000"]
    assert "web/loss" not in text


def test_different_data_are_pointed_out(tmp_path, capsys):
    runs = [
        make(
            tmp_path, name, data={"class_path": "SyntheticFacts", "init_args": {"people": people, "seed": 0}}
        )
        for name, people in (("a", 10), ("b", 20), ("c", 10))
    ]
    assert compare(runs)["warnings"] == ["a and b were trained on different data: people 10 and 20"]
    assert main(runs) == 0
    assert "warning: a and b were trained on different data" in capsys.readouterr().out


def test_how_data_are_loaded_is_no_difference(tmp_path):
    options = [{"num_workers": workers, "verify": workers == 2, "seed": 0} for workers in (0, 2)]
    runs = [
        make(tmp_path, name, data={"class_path": "PackedTokens", "init_args": some})
        for name, some in zip("ab", options, strict=True)
    ]
    assert compare(runs)["warnings"] == []


def test_command_writes_picture_and_json(tmp_path, capsys):
    runs = [make(tmp_path, "a"), make(tmp_path, "b")]
    assert main([*runs, "--json", str(tmp_path / "new" / "c.json")]) == 0
    assert json.loads((tmp_path / "new" / "c.json").read_text()) == compare(runs)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert str(tmp_path / "compare.png") in printed
    assert "total parameters" in printed
    assert main([runs[0], "--png", str(tmp_path / "deep" / "x.png")]) == 0
    assert (tmp_path / "deep" / "x.png").stat().st_size > 10_000


def test_picture_without_recall_or_seconds(tmp_path):
    metrics = "step,train/tokens,val/loss\n1,100,2.0\n2,200,1.5\n"
    assert main([make(tmp_path, "a", metrics=metrics)]) == 0
    assert (tmp_path / "compare.png").exists()


def test_a_validation_row_takes_the_latest_counter_before_it(tmp_path):
    rows = read_metrics(Path(make(tmp_path, "a")) / "metrics.csv")
    assert Series.of(rows, "val/recall", "train/seconds") == Series([1.5, 4.0], [0.25, 0.75])
    assert Series.of(rows, "val/recall", "train/nothing") == Series([], [])


def test_torn_last_row_is_left_out(tmp_path):
    rows = read_metrics(Path(make(tmp_path, "a", metrics=CSV + "6,1.")) / "metrics.csv")
    assert rows[-1]["step"] == 5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "metrics.csv").unlink(), "metrics.csv: is missing"),
        (
            lambda run: (run / "metrics.csv").write_text("step,x\n1,2\n2,abc\n"),
            "metrics.csv:3: is not a row of numbers",
        ),
        (
            lambda run: (run / "metrics.csv").write_text("x\n2\n"),
            "metrics.csv:2: is not a row of numbers with a step",
        ),
        (lambda run: (run / "model.json").write_text("{"), "model.json: is not valid JSON"),
        (lambda run: (run / "test.json").write_text("[1]"), "test.json: is not a JSON object"),
        (lambda run: (run / "config.yaml").write_text("[1"), "config.yaml: is not the YAML"),
    ],
)
def test_broken_run_directories(tmp_path, spoil, message):
    run = make(tmp_path, "a")
    spoil(Path(run))
    with pytest.raises(DataError) as error:
        compare([run, make(tmp_path, "b")])
    assert message in str(error.value)


def test_no_such_run(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        compare([str(tmp_path / "absent")])


def test_tasks_and_recall_by_exposures(tmp_path):
    csv = (
        "step,val/loss,val/recall_4x,tasks/piqa/acc,tasks/book/loss\n"
        "1,,,0.25,3.5\n2,3.0,0.75,,\n3,,,0.5,\n4,2.5,0.875,,\n"
    )
    both = [make(tmp_path, "a", metrics=csv), make(tmp_path, "b")]
    text = table(compare(both))
    assert line(text, "val/recall_4x") == ["0.8750", "-"]
    assert line(text, "tasks/piqa/acc") == ["0.5000", "-"]
    assert line(text, "tasks/book/loss") == ["3.5000", "-"]

    result = {"metrics": {"acc": {"value": 0.625}, "perplexity": {"value": "inf"}}, "step": 9}
    tested = make(tmp_path, "c", metrics=csv, test=TEST | {"test/recall_seen_phrasing_1x": 0.5})
    (tmp_path / "c" / "tasks.json").write_text(json.dumps({"tasks": {"piqa": result}}))
    comparison = compare([tested])
    text = table(comparison)
    assert line(text, "tasks/piqa/acc") == ["0.6250"]
    assert line(text, "tasks/piqa/perplexity") == ["inf"]
    assert line(text, "test/recall_seen_phrasing_1x") == ["0.5000"]
    assert "tasks/book/loss" not in text and "val/recall_4x" not in text
    assert "c was tested at step 4 and evaluated on piqa at step 9" in comparison["warnings"]


def test_a_run_that_was_only_tested_is_compared_too(tmp_path, capsys):
    """As an imported one is: there are no metrics of its training."""
    tested = make(tmp_path, "tested", test=TEST)
    (tmp_path / "tested" / "metrics.csv").unlink()
    assert main([make(tmp_path, "trained", test=TEST), tested]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("test/loss"))
    assert line.split()[-1] == line.split()[-2] != "-"
    assert (tmp_path / "compare.png").stat().st_size > 1000
