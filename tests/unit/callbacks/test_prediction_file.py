import json
import threading

import pytest

from callbacks.prediction_file import PredictionFile


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batches", [0, 1, 4, 7])
def test_parts_are_joined_in_the_order_in_which_batches_are_dealt(tmp_path, world, batches):
    path = tmp_path / "predictions.jsonl"
    path.write_text("earlier\n")
    dealt = [
        [{"name": f"{number}.{row}", "text": "\u2028né\x85\n"} for row in range(number % 3)]
        for number in range(batches)
    ]
    files = [PredictionFile(path, rank, world) for rank in range(world)]
    for number, batch in enumerate(dealt):
        files[number % world].write(batch)
    assert path.read_text() == "earlier\n"
    barrier = threading.Barrier(world)
    ranks = [threading.Thread(target=file.finish, args=(lambda: barrier.wait(30),)) for file in files]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        record for batch in dealt for record in batch
    ]
    assert [found.name for found in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_abandoned_parts_leave_what_was_there(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("earlier\n")
    files = [PredictionFile(path, rank, 2) for rank in range(2)]
    for file in files:
        file.write([{"name": "a"}])
        file.abandon()
    assert path.read_text() == "earlier\n"
    assert [found.name for found in tmp_path.iterdir()] == ["predictions.jsonl"]
