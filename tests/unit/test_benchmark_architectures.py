"""The comparison of architectures: its table, its page, and one run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.architectures import END, NAMES, START, into_page, table

ROOT = Path(__file__).resolve().parents[2]


def result(recalls: list[float], speed: float) -> dict:
    runs = [{"val/recall": recall, "val/loss": 2.0, "tokens_per_second": speed} for recall in recalls]
    return {"model": {"total": 1_500_000, "active": 250_000, "flops_per_token": 4321}, "runs": runs}


def test_a_row_for_each_model_with_its_speed_against_dense():
    rows = table({"dense": result([0.1, 0.3], 200.0), "moe": result([0.5], 50.0)}).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[2] == ["dense", "1.500M", "0.250M", "4,321", "0.100, 0.300", "0.200", "2.000", "200", "1.00"]
    assert cells[3][-2:] == ["50", "0.25"]
    assert table({"moe": result([0.5], 50.0)}).splitlines()[2].endswith("| - |")


def test_the_table_of_a_page_is_replaced_and_nothing_else():
    page = into_page(f"before\n{START}\nold\n{END}\nafter\n", "new")
    assert page == f"before\n{START}\nnew\n{END}\nafter\n"
    assert into_page(page, "new") == page
    with pytest.raises(SystemExit, match="no <!-- table -->"):
        into_page("no marks", "new")


def test_every_small_config_is_compared_and_all_share_data_and_steps():
    contents = {
        file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / "configs/small").glob("*.yaml")
    }
    assert set(contents) == set(NAMES)
    base = contents["dense"]
    for content in contents.values():
        assert content["data"] == base["data"]
        assert content["trainer"]["max_steps"] == base["trainer"]["max_steps"]


@pytest.mark.slow
def test_a_run_of_two_configs(tmp_path):
    flags = ["--flag=--trainer.max_steps=2", "--flag=--trainer.val_check_interval=2"]
    flags += ["--flag=--trainer.limit_val_batches=1", "--rates", "0.001", "0.002"]
    page = tmp_path / "page.md"
    page.write_text(f"{START}\n{END}\n")
    command = [
        sys.executable,
        "benchmarks/architectures.py",
        "--only",
        "dense",
        "moe",
        "--seeds",
        "1",
        *flags,
    ]
    command += ["--json", str(tmp_path / "found.json"), "--docs", str(page)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["command"].startswith("python benchmarks/architectures.py --only dense moe")
    assert set(found["results"]["dense"]["tried"]) == {"0.001", "0.002"}
    assert [run["steps"] for run in found["results"]["moe"]["runs"]] == [2]
    assert "| dense |" in page.read_text()
