"""Folders that take the place of others at once: a kill leaves the old one or the new one, never a part."""

import ctypes
import os
import shutil
from contextlib import suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def fresh_beside(target: Path) -> Path:
    """An empty folder beside a name, for what is to become ``target`` by :func:`put_in_place`."""
    folder = beside(target)
    remove(folder)
    folder.mkdir(parents=True)
    return folder


def beside(target: Path) -> Path:
    """Where what is to become ``target`` is written; a kill may leave a file or a folder there."""
    return target.with_name(f".{target.name}.tmp")


def put_in_place(folder: Path, target: Path) -> None:
    """Give a folder the name ``target``; a file or folder of that name is removed.

    Where the file system can exchange two names, there is no moment without ``target``. Elsewhere there is
    one between two renames, after which :func:`recover` finds the old content.
    """
    if not target.exists():
        os.rename(folder, target)
    elif _exchange(folder, target):
        remove(folder)
    else:
        old = _old(target)
        remove(old)
        os.rename(target, old)
        os.rename(folder, target)
    remove(_old(target))


def recover(target: Path) -> None:
    """If a kill fell between the two renames of :func:`put_in_place`, give the old content its name back."""
    old = _old(target)
    if old.exists() and not target.exists():
        with suppress(FileNotFoundError):  # another process of the same run has done it
            os.rename(old, target)


def link(source: Path, target: Path) -> None:
    """Make ``target`` a second folder of the same files, copies where the file system has no links."""
    folder = fresh_beside(target)
    for file in source.iterdir():
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)
    put_in_place(folder, target)


def copy(source: Path, target: Path) -> None:
    """Make ``target`` a copy of a folder."""
    folder = fresh_beside(target)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    put_in_place(folder, target)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one operation (Linux's renameat2); False where that cannot be."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
