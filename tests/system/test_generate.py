"""``memlm generate`` at a real terminal, and ``memlm predict`` over a file of prompts, on two ranks too."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FIT = ("fit", "--config", "tiny.yaml")
PREDICT = ("predict", "--config", "runs/tiny/config.yaml", "--ckpt_path", "last")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


@pytest.fixture
def fitted(memlm):
    """runs/tiny, ten steps; gives a name that its vocabulary has."""
    assert memlm(*FIT) == 0
    assert memlm(*PREDICT) == 0
    return lines("runs/tiny/predictions.jsonl")[0]["prompt"]


def test_predict_continues_a_file_like_generate(memlm, fitted, capsys):
    words = fitted.split()
    prompts = [" ".join(words[: 1 + number % 3]) for number in range(7)]
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": p, "id": p[::-1]}) + "\n" for p in prompts))
    command = ["--max_new_tokens", "6", "--temperature", "1", "--seed", "4", "--stop", words[-1]]
    assert memlm("generate", "runs/tiny", "--file", "p.jsonl", "--output", "o.jsonl", *command) == 0
    options = [
        *("--prompts.file", "p.jsonl", "--prompts.max_new_tokens", "6", "--prompts.temperature", "1"),
        *("--prompts.seed", "4", f'--prompts.stop=["{words[-1]}"]', "--prompts.batch_size", "3"),
    ]
    assert memlm(*PREDICT, *options) == 0
    records = lines("runs/tiny/predictions.jsonl")
    assert records == lines("o.jsonl")
    assert [(record["prompt"], record["id"]) for record in records] == [(p, p[::-1]) for p in prompts]
    assert len({record["text"] for record in records}) > 1
    assert sorted(path.name for path in Path("runs/tiny").glob("*redictions*")) == ["predictions.jsonl"]
    # The questions of the data are still there.
    assert memlm(*PREDICT) == 0
    assert "answer" in lines("runs/tiny/predictions.jsonl")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts.file", "no.txt"], "no.txt: cannot be read: No such file"),
        (["--prompts.file", "p.txt"], "p.txt:2: the tokenizer"),
        (["--prompts.temperature", "1"], "prompts.file: is needed"),
        (["--prompts.file", "p.txt", "--prompts.top_p", "2"], "prompts.top_p: is 2.0, must be above 0"),
        (["--prompts.file", "p.txt", "--prompts.top_k", "2"], "prompts.top_k: is 2, which does nothing with"),
        (["--prompts.file", "p.txt", "--prompts.samples", "2"], "prompts.samples: is 2, which are all"),
        (["--prompts.file", "p.txt", "--prompts.samples", "0"], "prompts.samples: is 0, must be at least 1"),
        (["--prompts.file", "p.txt", '--prompts.stop=[""]'], "prompts.stop: holds an empty text"),
        (["--prompts.file", "long.txt"], "long.txt:1: is 101 tokens long"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_or_option_is_named_and_earlier_predictions_stay(
    memlm, fitted, capsys, options, message
):
    before = Path("runs/tiny/predictions.jsonl").read_bytes()
    word = fitted.split()[0]
    Path("p.txt").write_text(f"{word}\nnever heard of\n")
    Path("long.txt").write_text(" ".join([word] * 100))
    capsys.readouterr()
    assert memlm(*PREDICT, *options) == 2
    assert message in capsys.readouterr().err
    assert Path("runs/tiny/predictions.jsonl").read_bytes() == before
    assert sorted(path.name for path in Path("runs/tiny").glob("*redictions*")) == ["predictions.jsonl"]


@pytest.mark.slow
def test_two_ranks_predict_what_one_does(memlm, folder):
    assert memlm(*FIT, "--model", "memlm.DenseLM", "--run.name", "dense") == 0
    predict = ["predict", "--config", "runs/dense/config.yaml", "--ckpt_path", "last"]
    assert memlm(*predict) == 0
    word = lines("runs/dense/predictions.jsonl")[0]["prompt"].split()[0]
    Path("p.txt").write_text("".join(f"{' '.join([word] * (1 + number % 4))}\n" for number in range(11)))
    options = ["--prompts.file", "p.txt", "--prompts.batch_size", "2", "--prompts.max_new_tokens", "5"]
    options += ["--prompts.temperature", "1"]
    assert memlm(*predict, *options) == 0
    expected = lines("runs/dense/predictions.jsonl")
    assert [record["prompt"] for record in expected] == Path("p.txt").read_text().split("\n")[:-1]
    Path("runs/dense/predictions.jsonl").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "memlm", *predict, *options, "--trainer.devices=2", "--trainer.strategy=ddp"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
    )
    assert done.returncode == 0, done.stderr
    assert lines("runs/dense/predictions.jsonl") == expected
    assert sorted(path.name for path in Path("runs/dense").glob("*redictions*")) == ["predictions.jsonl"]


GENERATE = [sys.executable, "-m", "memlm", "generate"]


@pytest.mark.slow
def test_a_reader_that_goes_ends_it_without_a_traceback(fitted):
    command = [*GENERATE, "runs/tiny", "--prompt", fitted.split()[0], "--max_new_tokens", "100000"]
    command += ["--temperature", "1", "--samples", "1000", "--batch_size", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert json.loads(process.stdout.readline())["prompt"] == fitted.split()[0]
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(120) == 128 + signal.SIGPIPE


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, command):
        import pty

        self.child, self.terminal = pty.fork()
        if self.child == 0:
            os.environ |= {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a job in the background ignores
            os.execv(command[0], command)
        self.shown = ""

    def type(self, text):
        os.write(self.terminal, text.encode())

    def wait_for(self, text, seconds=120):
        """Reads until ``text`` is shown after what was waited for last."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            left = end - time.monotonic()
            assert left > 0, f"{text!r} was not shown in {seconds} s, but {self.shown[-500:]!r}"
            if select.select([self.terminal], [], [], left)[0]:
                self.shown += os.read(self.terminal, 4096).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def end(self, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(self.child, os.WNOHANG)
            if done:
                os.close(self.terminal)
                return os.waitstatus_to_exitcode(status)
            if select.select([self.terminal], [], [], 0.1)[0]:
                try:
                    os.read(self.terminal, 4096)
                except OSError:  # its other end is closed
                    time.sleep(0.05)
        os.kill(self.child, signal.SIGKILL)
        raise AssertionError("did not end")


@pytest.mark.slow
def test_a_terminal_answers_stops_and_ends(memlm, fitted):
    path = Path("runs/tiny/checkpoints/last.ckpt")
    checkpoint = torch.load(path)
    # The likeliest of all tokens has a logit above 0: greedily, no document ends any more.
    checkpoint["state_dict"]["transformer.output.weight"][-1] = 0
    torch.save(checkpoint, path)
    word = fitted.split()[0]
    terminal = Terminal([*GENERATE, "runs/tiny"])
    terminal.wait_for("> ")
    terminal.type(":max 3\n")
    terminal.wait_for("max_new_tokens 3")
    terminal.wait_for("> ")
    terminal.type(f"{word}\n")
    answer = terminal.wait_for("memlm: 3 tokens in ").replace(word, "", 1)
    assert len(answer.split()) == 3
    terminal.wait_for("> ")
    terminal.type(":max 1000000\n")
    terminal.wait_for("max_new_tokens 1000000")
    terminal.wait_for("> ")
    terminal.type(f"{word}\n")
    terminal.wait_for(answer.split()[0])
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.type(":max 1\n")
    terminal.wait_for("max_new_tokens 1")
    terminal.wait_for("> ")
    terminal.type(f"{word}\n")
    terminal.wait_for("memlm: 1 tokens in ")
    terminal.wait_for("> ")
    terminal.type("half a line\x03")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
