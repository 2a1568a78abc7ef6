"""Every command of README.md runs as it is printed there."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml
import zstandard
from readme_commands import Block, find_blocks, named_commands, split_commands

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"

PARSED = ("fit", "validate", "test", "predict", "tokenizer", "prepare")
"""Verbs that know --print_config, which checks all options and does nothing else."""

MARKDOWN = """
<!-- ci: install-and-run -->
```bash
python3 -m venv .venv && .venv/bin/memlm fit
```

```python
print("not a command")
```
<!-- a remark -->

```bash
# a comment
memlm fit --config a.yaml \\
    --run.name b  # another

memlm tokenizer train --paths='["a",
"b"]'
```
<!-- no-ci: needs a network -->
```bash
apt-get download x
```
"""


def test_blocks_and_their_marks():
    assert find_blocks(MARKDOWN) == [
        Block(4, "ci", "install-and-run", ["python3 -m venv .venv && .venv/bin/memlm fit"]),
        Block(
            13,
            "",
            "",
            [
                "memlm fit --config a.yaml \\\n    --run.name b  # another",
                'memlm tokenizer train --paths=\'["a",\n"b"]\'',
            ],
        ),
        Block(22, "no-ci", "needs a network", ["apt-get download x"]),
    ]


def test_named_commands_are_unique():
    assert named_commands(MARKDOWN, "install-and-run") == ["python3 -m venv .venv && .venv/bin/memlm fit"]
    with pytest.raises(ValueError, match=r"ci: test -->', found 0"):
        named_commands(MARKDOWN, "test")
    with pytest.raises(ValueError, match="found 2"):
        named_commands(MARKDOWN * 2, "install-and-run")


def test_an_open_quote_is_no_command():
    with pytest.raises(ValueError, match="unfinished"):
        split_commands("memlm fit --data.paths='[\n")


def test_ci_runs_the_setup_commands_of_the_readme():
    """Two commands of one line each do all the set-up, and .ci/run finds both."""
    script = (ROOT / ".ci" / "run").read_text()
    names = re.findall(r"\$\(readme ([\w-]+)\)", script)
    markdown = README.read_text(encoding="utf-8")
    assert names == [block.note for block in find_blocks(markdown) if block.kind == "ci"]
    for name in names:
        command = ROOT / "tests" / "system" / "readme_commands.py"
        printed = subprocess.run(
            [sys.executable, str(command), str(README), name], capture_output=True, text=True, check=True
        )
        assert len(printed.stdout.splitlines()) == 1
        assert ".venv/bin/pip install" in printed.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository in which .venv/bin/memlm is this interpreter's."""
    copy = tmp_path_factory.mktemp("readme") / "memlm"
    hidden = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, copy, ignore=hidden)
    if not Path(sys.prefix, "bin", "memlm").exists():
        pytest.fail(f"there is no memlm command in {sys.prefix}/bin: pip install -e '.[test]'")
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


def bash(command: str, folder: Path) -> None:
    environment = os.environ | {"PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("MEMLM_TRACEBACK", None)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"exit code {done.returncode} of: {command}\n{done.stdout[-4000:]}"


@pytest.mark.slow
def test_commands_run(clone):
    """In order, as the later ones read what the earlier ones wrote."""
    blocks = find_blocks(README.read_text(encoding="utf-8"))
    if trained := os.environ.get("MEMLM_README_RUNS"):
        shutil.copytree(Path(trained, "quickstart"), clone / "runs" / "quickstart")
    else:
        # The part of the setup command behind the installation.
        [command] = named_commands(README.read_text(encoding="utf-8"), "install-and-run")
        bash(command.rsplit("&&", 1)[1], clone)
    commands = [command for block in blocks if not block.kind for command in block.commands]
    assert commands
    for command in commands:
        bash(command, clone)


@pytest.mark.slow
def test_options_of_commands_that_cannot_run_here(clone):
    """A fit's printed config stands in for the one its run would leave to the commands after it."""
    checked = 0
    for block in find_blocks(README.read_text(encoding="utf-8")):
        for command in block.commands if block.kind == "no-ci" else []:
            words = shlex.split(command, comments=True)
            if Path(words[0]).name != "memlm" or words[1] not in PARSED:
                continue
            bash(f"{shlex.join(words)} --print_config > printed.yaml", clone)
            if words[1] == "fit":
                printed = (clone / "printed.yaml").read_text()
                run = clone / "runs" / yaml.safe_load(printed)["run"]["name"]
                run.mkdir(parents=True, exist_ok=True)
                (run / "config.yaml").write_text(printed)
            checked += 1
    assert checked


@pytest.mark.slow
def test_the_five_commands_of_the_data_page(clone):
    """On a small folder laid out like DCLM's, and with fewer steps than a run needs."""
    shutil.rmtree(clone / "runs" / "pretrain", ignore_errors=True)  # what another test left of that name
    texts = [topics[name] for name in sorted(topics)]
    for number in range(4):
        folder = clone / "dclm" / f"global-shard_{number % 2 + 1:02}_of_2" / "local-shard_0_of_1"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"text": text, "url": f"u{i}"}) for i, text in enumerate(texts[number::4])]
        compressed = zstandard.compress("\n".join(lines).encode())
        (folder / f"shard_{number:08}_processed.jsonl.zst").write_bytes(compressed)
    blocks = find_blocks((ROOT / "docs" / "data.md").read_text(encoding="utf-8"))
    [commands] = [block.commands for block in blocks if not block.kind]
    assert [shlex.split(command)[1] for command in commands] == [
        "tokenizer",
        "prepare",
        "verify",
        "fit",
        "test",
    ]
    for command in commands:
        if shlex.split(command)[1] == "fit":
            command += " --trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.limit_val_batches 2"
        bash(command, clone)
    measured = json.loads((clone / "runs" / "pretrain" / "test.json").read_text())
    assert 0 < measured["test/bits_per_byte"] < 20


SHORT = "--trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.accelerator cpu"


def commands_of(page: str) -> list[str]:
    blocks = find_blocks((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return [command.replace("\\\n", " ") for block in blocks if not block.kind for command in block.commands]


@pytest.mark.distributed
def test_the_commands_of_the_scaling_page(clone):
    """Those of one machine train for some steps; of one for several machines the options are checked."""
    launchers = []
    for number, command in enumerate(commands_of("scaling.md")):
        launcher, *words = shlex.split(command)
        launchers.append(launcher)
        if launcher == "memlm":
            bash(f"{command} {SHORT} --run.name scaling{number}", clone)
            assert (clone / "runs" / f"scaling{number}" / "checkpoints" / "last.ckpt").exists()
        else:
            options = shlex.join(words[words.index("fit") :]).replace("C.yaml", "configs/quickstart.yaml")
            bash(f"memlm {options} --print_config", clone)
    assert launchers == ["memlm", "memlm", "torchrun"]


@pytest.mark.distributed
def test_the_commands_of_the_checkpoints_page(clone):
    """From a run on two processes to one file, training on one, text and an exported folder."""
    overlay = "--config configs/parallel/memory_parallel.yaml --trainer.devices 2"
    bash(f"memlm fit --config configs/quickstart.yaml {overlay} {SHORT} --run.name pages", clone)
    commands = commands_of("checkpoints.md")
    assert [shlex.split(command)[1] for command in commands] == ["consolidate", "fit", "generate", "export"]
    for command in commands:
        for placeholder, text in {r"\bNAME\b": "pages", r"\bNEW\b": "pages_on", r"\bN$": "6"}.items():
            command = re.sub(placeholder, text, command)
        bash(command.replace('"..."', '"works as"'), clone)  # words that the run's tokenizer has
    assert (clone / "runs" / "pages_on" / "checkpoints" / "last.ckpt").is_file()
    assert (clone / "exported" / "pages" / "config.json").exists()
