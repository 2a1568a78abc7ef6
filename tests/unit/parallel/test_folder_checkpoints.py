"""What a strategy does around its checkpoints."""

import threading

from memlm.parallel.background_save import BackgroundSave
from memlm.parallel.strategy import MemoryParallelStrategy


def test_a_checkpoint_goes_only_when_the_one_that_replaces_it_is_in_place(tmp_path):
    """As a callback has it that keeps the latest few."""
    earlier, may_write = tmp_path / "earlier.ckpt", threading.Event()
    earlier.mkdir()
    strategy = MemoryParallelStrategy(asynchronous_save=True)
    strategy._saving = BackgroundSave(lambda: may_write.wait(10) and None)
    strategy.remove_checkpoint(earlier)
    assert earlier.exists()
    may_write.set()
    strategy.finish_saving()
    assert not earlier.exists()

    earlier.write_text("nothing is being saved now")
    strategy.remove_checkpoint(earlier)
    assert not earlier.exists()


def test_options_of_saving_are_compared_between_ranks():
    """Ranks of which one writes a folder and another a file would wait for each other."""
    options = vars(MemoryParallelStrategy(save_distributed_checkpoint=False))
    assert options["save_distributed_checkpoint"] is False
    assert options["asynchronous_save"] is False
