import sys
from types import ModuleType

import pytest
from jsonargparse import ArgumentParser

import data_modules
from memlm import DenseLM, MemoryLM
from memlm.cli import CommandLine
from memlm.discovery import import_all
from memlm.run_directory import RunConfig

import_all(data_modules)

CLASSES = [DenseLM, MemoryLM, data_modules.SyntheticFacts, data_modules.TextStream, RunConfig]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_has_help(cls):
    parser = ArgumentParser()
    parser.add_class_arguments(cls, "x")
    options = [action for action in parser._actions if action.dest.startswith("x.")]
    assert options
    assert [action.dest for action in options if not action.help] == []


def test_only_the_verb_at_hand_is_built(monkeypatch):
    built = []

    def build(self, klass, subcommand, **kwargs):
        built.append(subcommand)
        raise RuntimeError

    monkeypatch.setattr(CommandLine, "_prepare_subcommand_parser", build)
    with pytest.raises(RuntimeError):
        CommandLine("test", [])
    assert built == ["test"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package dropped_in with the given modules."""

    def make(**modules: str) -> ModuleType:
        folder = tmp_path / "dropped_in"
        folder.mkdir()
        (folder / "__init__.py").touch()
        for name, source in modules.items():
            (folder / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.split(".")[0] == "dropped_in"]:
            monkeypatch.delitem(sys.modules, name)
        import dropped_in

        return dropped_in

    return make


def test_dropped_in_modules_are_imported(package):
    import_all(package(first="VALUE = 3\n"))
    assert sys.modules["dropped_in.first"].VALUE == 3


def test_a_missing_optional_dependency_is_a_warning(package):
    dropped = package(needy="import a_package_nobody_has\n", other="VALUE = 4\n")
    with pytest.warns(UserWarning, match=r"dropped_in\.needy is not available: No module named"):
        import_all(dropped)
    assert sys.modules["dropped_in.other"].VALUE == 4


def test_a_bug_in_a_dropped_in_module_is_shown(package):
    with pytest.raises(ZeroDivisionError):
        import_all(package(broken="1 / 0\n"))
