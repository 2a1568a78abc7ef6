import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

import memlm
from memlm.errors import ConfigError
from memlm.run_directory import RunConfig, RunFiles, _git_state, describe_environment, write_json, write_text


def test_name_comes_from_the_first_config_file():
    files = RunFiles.of_run(RunConfig(), ["configs/quickstart.yaml", "configs/debug.yaml"])
    assert files.directory == Path("runs/quickstart")
    assert files.last == Path("runs/quickstart/checkpoints/last.ckpt")


def test_explicit_name_and_root():
    assert RunFiles.of_run(RunConfig("sweep/seed1", "/data"), ["a.yaml"]).directory == Path(
        "/data/sweep/seed1"
    )


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "a/../../b", "/tmp/x"])
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ConfigError, match=r"run\.name"):
        RunFiles.of_run(RunConfig(name), [])


def test_no_name_at_all():
    with pytest.raises(ConfigError, match=r"run\.name: is needed"):
        RunFiles.of_run(RunConfig(), [])


def test_run_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunFiles.of_checkpoint(Path("runs/a/checkpoints/last.ckpt")).directory == Path("runs/a")
    assert RunFiles.of_checkpoint(Path("downloads/x.ckpt")).directory == Path("downloads")
    monkeypatch.chdir("/")
    assert RunFiles.of_checkpoint(tmp_path / "x.ckpt").directory == tmp_path.relative_to("/")


def test_owns_follows_links(tmp_path):
    run = RunFiles(tmp_path / "run")
    run.claim(fresh=True)
    run.last.touch()
    (tmp_path / "link.ckpt").symlink_to(run.last)
    assert run.owns(run.last)
    assert run.owns(tmp_path / "link.ckpt")
    assert not run.owns(tmp_path / "other" / "checkpoints" / "last.ckpt")


def test_claim(tmp_path):
    run = RunFiles(tmp_path / "run")
    run.check_free()
    assert not run.directory.exists()
    run.directory.mkdir()
    run.check_free()  # an empty folder is free
    run.claim(fresh=True)
    assert run.checkpoints.is_dir()
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        run.claim(fresh=True)
    run.claim(fresh=False)


def test_refusal_says_what_is_there_and_what_to_do(tmp_path):
    for index in range(9):
        (tmp_path / f"file{index}").touch()
    with pytest.raises(ConfigError) as refused:
        RunFiles(tmp_path).check_free()
    message = str(refused.value)
    assert "file0, file1, file2, file3, file4, file5 and 3 more" in message
    assert "--run.name" in message and "remove it" in message
    run = RunFiles(tmp_path)
    run.checkpoints.mkdir()
    run.last.touch()
    with pytest.raises(ConfigError, match="--ckpt_path last"):
        run.check_free()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="not a folder"):
        RunFiles(tmp_path / "run").check_free()


def test_writes_replace_and_leave_no_rest(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    write_json(path, {"new": [1, None]})
    assert json.loads(path.read_text()) == {"new": [1, None]}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_failed_write_keeps_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"


def test_environment_describes_machine_and_versions_but_not_the_host():
    environment = describe_environment(["fit", "--config", "my config.yaml"])
    assert environment["command"] == "memlm fit --config 'my config.yaml'"
    assert environment["memlm"] == memlm.__version__
    assert environment["cores"] >= 1 and environment["memory_gib"] > 0.1
    assert {
        "python",
        "torch",
        "lightning",
        "triton",
        "git_commit",
        "git_dirty",
        "gpus",
        "cpu",
    } <= environment.keys()
    assert socket.gethostname() not in json.dumps(environment).replace(environment["command"], "").split('"')


def test_git_state(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    git("init")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    # Untracked, like an installed copy inside somebody's repository.
    assert _git_state(package) == {"git_commit": None, "git_dirty": None}
    git("add", ".")
    git("commit", "-m", "x")
    state = _git_state(package)
    assert len(state["git_commit"]) == 40 and state["git_dirty"] is False
    (package / "__init__.py").write_text("changed = True\n")
    assert _git_state(package) == {"git_commit": state["git_commit"], "git_dirty": True}
    shutil.rmtree(tmp_path / ".git")
    assert _git_state(package) == {"git_commit": None, "git_dirty": None}
