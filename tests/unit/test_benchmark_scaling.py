"""docs/scaling.md has the worked examples that benchmarks/scaling.py prints."""

from pathlib import Path

import pytest

from benchmarks import scaling

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.mark.slow
def test_the_page_has_the_tables_that_the_script_prints():
    page = PAGE.read_text(encoding="utf-8")
    for table in scaling.tables().split("\n\n"):
        assert table in page


def test_a_line_of_the_page():
    """One of them in every run of the tests, as far as it is a matter of bytes and seconds."""
    [head, rule, line] = scaling.meshes([scaling.calculate("8b_memory_plus", 256, 64)]).splitlines()
    page = PAGE.read_text(encoding="utf-8").splitlines()
    start = page.index("### 8b, Memory+, 16M values (76.5B parameters)")
    assert page[start + 2 : start + 4] == [head, rule]
    assert line in page[start + 4 : start + 14]


def test_share_of_the_step():
    sent = {"reads_forward": 30, "reads_backward": 20, "row_gradients": 7, "rows": 3}
    sent |= {"dense_weights": 20, "dense_gradients": 20}
    sent = {name: size * 10**9 for name, size in sent.items()}
    example = scaling.Example(64, 64, {}, sent, calculation=1.0)
    assert example.seconds == {"reads": 1.0, "rows": 0.2, "dense": 0.8, "calculation": 1.0}
    assert example.share == pytest.approx(1.2 / 3)
    assert scaling.Example(64, 8, {}, sent, 1.0).seconds["reads"] == pytest.approx(50 / 450)
