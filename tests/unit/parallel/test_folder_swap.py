"""A folder takes another's place as a whole, also where names cannot be exchanged."""

import os
import signal
import subprocess
import sys
import time

import pytest

from memlm.parallel import folder_swap
from memlm.parallel.folder_swap import beside, copy, fresh_beside, link, put_in_place, recover


def make(target, content):
    folder = fresh_beside(target)
    (folder / "file").write_text(content)
    return folder


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(folder_swap, "_exchange", lambda one, other: False)


def test_takes_the_place_of_nothing_a_folder_and_a_file(tmp_path, exchange):
    target = tmp_path / "last.ckpt"
    put_in_place(make(target, "one"), target)
    put_in_place(make(target, "two"), target)
    assert (target / "file").read_text() == "two"
    other = tmp_path / "file.ckpt"
    other.write_text("a file")
    put_in_place(make(other, "three"), other)
    assert (other / "file").read_text() == "three"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.ckpt", "last.ckpt"]


def test_a_file_takes_the_place_of_a_folder(tmp_path, exchange):
    target = tmp_path / "last.ckpt"
    put_in_place(make(target, "one"), target)
    file = tmp_path / "new"
    file.write_text("two")
    put_in_place(file, target)
    assert target.read_text() == "two"
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_a_kill_are_not_taken_over(tmp_path):
    target = tmp_path / "last.ckpt"
    (make(target, "one") / "stale").write_text("")
    put_in_place(make(target, "two"), target)
    assert [path.name for path in target.iterdir()] == ["file"]
    beside(target).write_text("a file, of a single device that was killed")
    put_in_place(make(target, "three"), target)
    assert (target / "file").read_text() == "three"
    assert list(tmp_path.iterdir()) == [target]


def test_recovers_between_two_renames(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_swap, "_exchange", lambda one, other: False)
    target = tmp_path / "last.ckpt"
    put_in_place(make(target, "old"), target)
    new = make(target, "new")
    rename, calls = os.rename, []

    def killed_at_the_second(*names):
        calls.append(names)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(*names)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed_at_the_second)
        put_in_place(new, target)
    assert not target.exists()
    recover(target)
    assert (target / "file").read_text() == "old"
    put_in_place(make(target, "newer"), target)
    recover(target)
    assert (target / "file").read_text() == "newer"
    assert list(tmp_path.iterdir()) == [target]


def test_linked_files_outlive_their_first_folder(tmp_path):
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    put_in_place(make(last, "one"), last)
    (last / ".hidden").write_text("hidden")
    link(last, best)
    assert os.path.samefile(last / "file", best / "file")
    put_in_place(make(last, "two"), last)
    assert (best / "file").read_text() == "one"
    assert (best / ".hidden").read_text() == "hidden"
    link(last, best)
    assert (best / "file").read_text() == "two"


def test_a_copy_has_files_of_its_own(tmp_path):
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    put_in_place(make(last, "one"), last)
    (last / "below").mkdir()
    (last / "below" / "file").write_text("one")
    copy(last, best)
    (last / "below" / "file").write_text("two")
    assert (best / "below" / "file").read_text() == (best / "file").read_text() == "one"


SWAPS = """
import sys
from pathlib import Path
from memlm.parallel.folder_swap import fresh_beside, put_in_place
target = Path(sys.argv[1])
for number in range(10**9):
    folder = fresh_beside(target)
    for name in ("a", "b"):
        (folder / name).write_text(str(number))
    put_in_place(folder, target)
    if number == 0:
        print("ready", flush=True)
"""


def test_a_kill_leaves_a_whole_folder(tmp_path):
    target = tmp_path / "last.ckpt"
    for round in range(5):
        words = [sys.executable, "-c", SWAPS, str(target)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.01 + 0.007 * round)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        recover(target)
        assert (target / "a").read_text() == (target / "b").read_text()
