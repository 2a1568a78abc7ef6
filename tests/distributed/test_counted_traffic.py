"""Bytes that processes really send and hold in a step are those of the formulas."""

import pytest

from benchmarks.traffic import EACH_BATCH, EXPERTS, MODELS, NARROW, difference, launch


@pytest.mark.distributed
@pytest.mark.parametrize("ranks,groups", [(2, [1, 2]), (4, [1, 2, 4])])
def test_counted_bytes_are_those_of_the_formulas(ranks, groups):
    rows = launch(ranks, groups)
    assert len(rows) == len(groups) * (len(MODELS) + len(NARROW) + len(EACH_BATCH) + len(EXPERTS))
    for row in rows:
        name = f"{row['model']}, {ranks} ranks in groups of {row['memory_group']}"
        for of_rank in row["by_rank"]:
            sent, held = of_rank["sent"], of_rank["held"]
            assert difference(sent, "passes") < 1e-3, name
            assert difference(sent, "step") < 0.02, name
            assert held["counted"]["row_gradients"] <= held["formula"]["row_gradients"], name
        for part in ("dense_weights", "dense_gradients", "dense_state", "values", "values_state"):
            most = max(of_rank["held"]["counted"][part] for of_rank in row["by_rank"])
            assert most == row["by_rank"][0]["held"]["formula"][part], f"{name}: {part}"
