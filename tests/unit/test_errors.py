import pickle

import pytest

from memlm.errors import CheckpointError, ConfigError, DataError, UserError


@pytest.mark.parametrize(
    "error",
    [
        DataError("a.jsonl", "is broken", 7),
        DataError("a.jsonl", "is missing"),
        ConfigError("data.key", "is 1; expected 2"),
        CheckpointError("x.ckpt", "is truncated"),
        UserError("anything"),
    ],
)
def test_errors_come_out_of_other_processes_as_they_went_in(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)


def test_a_hint_keeps_the_place():
    assert str(DataError("a.jsonl", "is broken", 7).with_hint("skip it")) == "a.jsonl:7: is broken; skip it"
