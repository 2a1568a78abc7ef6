"""``memlm generate`` on tiny random models; the oracle recomputes every token from the whole sequence."""

import copy
import io
import json
import sys
from collections import Counter

import pytest
import torch
from tiny_runs import ARCHITECTURES, greedy, write_run

from memlm.errors import DataError, UserError
from memlm.generation.verb import main
from memlm.tokenizers import ByteTokenizer
from memlm.usage_errors import UsageError

PROMPTS = ["hello", "a much longer prompt than the others", "né", "x"]
decode = ByteTokenizer().decode


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories and their models, by architecture."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: (str(folder / name), write_run(folder / name, name)) for name in ARCHITECTURES}


@pytest.fixture
def dense(runs):
    return runs["dense"]


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def oracle(model, text, count=12):
    ids = [256, *text.encode()]
    return decode([*ids, *greedy(model, ids, count)])[len(text) :]


def record_of(model, text, count=12):
    new = greedy(model, [256, *text.encode()], count)
    finish = "eos" if new[-1] == 256 else "length"
    return {"prompt": text, "text": oracle(model, text, count), "tokens": len(new), "finish": finish}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_is_continued_like_by_brute_force(runs, name, capsys):
    run, model = runs[name]
    assert main([run, "--prompt", "hello", "--max_new_tokens", "12"]) == 0
    printed = capsys.readouterr()
    assert printed.out == oracle(model, "hello") + "\n"
    assert printed.err.startswith("memlm: 12 tokens in ")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_is_continued_like_by_brute_force_whatever_the_batch(runs, name, tmp_path, capsys):
    run, model = runs[name]
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    for size in ("3", "1"):
        output = tmp_path / f"{size}.jsonl"
        command = [run, "--file", str(tmp_path / "p.txt"), "--output", str(output), "--batch_size", size]
        assert main([*command, "--max_new_tokens", "12"]) == 0
        records = lines(output.read_text())
        assert records == [record_of(model, text) for text in PROMPTS]
        tokens = sum(record["tokens"] for record in records)
        assert f"Written to {output}: 4 answers, {tokens} tokens in " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jsonl", "3.jsonl", "p.txt"]


def test_several_prompts_are_json_lines_and_keep_their_fields(dense, tmp_path, capsys):
    run, model = dense
    assert main([run, "--prompt", "a", "--prompt", "", "--max_new_tokens", "3"]) == 0
    assert [(r["prompt"], r["text"]) for r in lines(capsys.readouterr().out)] == [
        (text, oracle(model, text, 3)) for text in ("a", "")
    ]
    (tmp_path / "p.jsonl").write_text('{"id": [7], "prompt": "a", "née": null}\n')
    assert main([run, "--file", str(tmp_path / "p.jsonl"), "--max_new_tokens", "3"]) == 0
    [record] = lines(capsys.readouterr().out)
    assert list(record.items())[:3] == [("prompt", "a"), ("id", [7]), ("née", None)]


def test_lines_of_the_standard_input_are_prompts(dense, monkeypatch, capsys):
    run, model = dense
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("né\nb\n".encode())))
    assert main([run, "--max_new_tokens", "3"]) == 0
    assert [r["text"] for r in lines(capsys.readouterr().out)] == [oracle(model, t, 3) for t in ("né", "b")]


def stop_in(text):
    """A string in the middle of a text, which nothing before it contains."""
    for start in range(2, len(text) - 2):
        if text.find(text[start : start + 2]) == start and "\ufffd" not in text[start : start + 2]:
            return text[start : start + 2], text[:start]
    raise AssertionError(f"no part of {text!r} can be a stop")


def test_a_stop_string_ends_the_text_and_is_not_printed(dense, tmp_path, capsys):
    run, model = dense
    stop, expected = stop_in(oracle(model, "hello", 60))
    command = [run, "--max_new_tokens", "60", "--stop", "never there", "--stop", stop]
    assert main([*command, "--prompt", "hello"]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected + "\n"
    assert ", stop" in printed.err
    output = tmp_path / "o.jsonl"
    assert main([*command, "--prompt", "x", "--prompt", "hello", "--output", str(output)]) == 0
    record = lines(output.read_text())[1]
    assert (record["text"], record["finish"]) == (expected, "stop")
    assert record["tokens"] < 60


def test_the_end_of_a_document_ends_the_text(tmp_path, capsys):
    model = write_run(tmp_path / "run", "dense")
    # Whatever comes, the end of the document is likelier after an "e".
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    state = checkpoint["state_dict"]
    hidden = model.hidden_states(torch.tensor([[256, 101]]))[0, -1]
    state["transformer.output.weight"][256] = hidden * 100
    torch.save(checkpoint, tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert main([str(tmp_path / "run"), "--prompt", "e", "--prompt", "e"]) == 0
    for record in lines(capsys.readouterr().out):
        assert record == {"prompt": "e", "text": "", "tokens": 1, "finish": "eos"}


def test_a_single_answer_streams_as_it_comes(dense, monkeypatch, capsys):
    run, model = dense
    written = []
    monkeypatch.setattr(sys.stdout, "write", lambda text: written.append(text))
    command = [run, "--prompt", "hello", "--max_new_tokens", "20"]
    assert main(command) == 0
    streamed, written[:] = list(written), []
    assert main([*command, "--no_stream"]) == 0
    assert "".join(streamed) == "".join(written) == oracle(model, "hello", 20) + "\n"
    assert len(streamed) > 6 > len(written)


def sampled(capsys, run, *more):
    assert main([run, "--prompt", "a", "--prompt", "b", "--max_new_tokens", "8", *more]) == 0
    return lines(capsys.readouterr().out)


def test_seeds_repeat_samples_and_are_written_down(dense, capsys):
    run, _ = dense
    first = sampled(capsys, run, "--temperature", "1", "--seed", "3", "--samples", "4")
    assert [(r["prompt"], r["sample"], r["seed"]) for r in first] == [
        (prompt, sample, 3) for prompt in "ab" for sample in range(4)
    ]
    assert len({r["text"] for r in first}) > 4
    again = sampled(capsys, run, "--temperature", "1", "--seed", "3", "--samples", "4", "--batch_size", "3")
    assert again == first
    drawn = sampled(capsys, run, "--temperature", "1")
    assert drawn != sampled(capsys, run, "--temperature", "1")
    repeated = sampled(capsys, run, "--temperature", "1", "--seed", str(drawn[0]["seed"]))
    assert repeated == drawn


def test_samples_do_not_depend_on_how_a_file_is_cut_into_parts(dense, tmp_path, capsys):
    run, _ = dense
    (tmp_path / "p.txt").write_text("a\n" * 20)
    results = []
    for size in ("1", "16"):
        command = [run, "--file", str(tmp_path / "p.txt"), "--batch_size", size, "--temperature", "1"]
        assert main([*command, "--seed", "5", "--max_new_tokens", "4"]) == 0
        results.append([r["text"] for r in lines(capsys.readouterr().out)])
    assert results[0] == results[1]
    assert len(set(results[0])) > 10


def test_sampling_draws_from_the_models_distribution_within_its_limits(dense, capsys):
    run, model = dense
    likely = model(torch.tensor([[256, 97]]))[0, -1].softmax(-1).topk(3)
    expected = {decode([token]) for token in likely.indices.tolist()}
    command = [run, "--prompt", "a", "--max_new_tokens", "1", "--samples", "200", "--temperature", "1"]
    assert main([*command, "--seed", "0", "--top_k", "3"]) == 0
    counts = Counter(record["text"] for record in lines(capsys.readouterr().out))
    assert set(counts) <= expected
    assert len(counts) > 1
    assert main([*command, "--seed", "0", "--top_p", "0.0001"]) == 0
    assert {r["text"] for r in lines(capsys.readouterr().out)} == {decode([int(likely.indices[0])])}
    assert main([*command, "--seed", "0", "--min_p", "1"]) == 0
    assert {r["text"] for r in lines(capsys.readouterr().out)} == {decode([int(likely.indices[0])])}


def test_values_can_stay_on_the_disk(runs, capsys):
    run, model = runs["memory_plus"]
    assert main([run, "--prompt", "hello", "--max_new_tokens", "12", "--values_memory", "0"]) == 0
    assert capsys.readouterr().out == oracle(model, "hello") + "\n"
    with pytest.raises(UsageError, match="--values_memory: the model has no memory"):
        main([runs["dense"][0], "--prompt", "a", "--values_memory", "0"])


def test_other_types_are_those_of_the_parameters(dense, capsys):
    run, model = dense
    assert main([run, "--prompt", "hello", "--max_new_tokens", "4", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    model = copy.deepcopy(model).to(torch.bfloat16)
    assert out == oracle(model, "hello", 4) + "\n"


def test_too_long_a_prompt_is_refused_unless_allowed(dense, tmp_path, capsys):
    run, model = dense
    long = "a" * 70
    (tmp_path / "p.txt").write_text(f"b\n{long}\n")
    output = tmp_path / "o.jsonl"
    with pytest.raises(DataError) as caught:
        main([run, "--file", str(tmp_path / "p.txt"), "--output", str(output)])
    assert "p.txt:2: is 71 tokens long" in str(caught.value)
    assert "more than the 64 of the context" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
    assert main([run, "--prompt", long, "--long_context", "--max_new_tokens", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out == oracle(model, long, 3) + "\n"
    assert "beyond the context of 64 tokens" in printed.err


def test_answers_beyond_the_context_are_counted_once(dense, capsys):
    run, _ = dense
    assert main([run, "--prompt", "a", "--prompt", "a" * 60, "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().err == (
        "memlm: warning: 1 answers go beyond the context of 64 tokens that the model was trained with\n"
    )
    assert main([run, "--prompt", "a", "--prompt", "b", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().err == ""


def test_nothing_is_overwritten_and_a_part_is_not_taken_for_the_whole(dense, tmp_path, monkeypatch, capsys):
    run, _ = dense
    output = tmp_path / "o.jsonl"
    (tmp_path / "p.txt").write_text("a\n" * 20)
    command = [run, "--file", str(tmp_path / "p.txt"), "--output", str(output), "--batch_size", "1"]

    from memlm.generation import continuations

    generate, calls = continuations.generate, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(continuations, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([*command, "--max_new_tokens", "2"])
    assert f"not finished; 16 answers are in {output}.partial" in capsys.readouterr().err
    partial = tmp_path / "o.jsonl.partial"
    assert not output.exists()
    assert len(lines(partial.read_text())) == 16
    with pytest.raises(UsageError, match=r"o\.jsonl\.partial exists already"):
        main(command)
    assert len(lines(partial.read_text())) == 16
    partial.rename(output)
    with pytest.raises(UsageError, match=r"o\.jsonl exists already; expected a new name"):
        main(command)
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        main([*command[:4], str(tmp_path / "nowhere" / "o.jsonl")])
    assert len(lines(output.read_text())) == 16


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--file", "p.txt"], "--file: does not go with --prompt"),
        (["--stop", ""], "--stop: is empty"),
        (["--top_k", "3"], "--top_k: does nothing with --temperature 0"),
        (["--seed", "3"], "--seed: does nothing with --temperature 0"),
        (["--samples", "3"], "--samples: does nothing with --temperature 0"),
        (["--temperature", "-1"], "argument --temperature: is -1, must be a number of at least 0"),
        (["--temperature", "nan"], "argument --temperature: is nan, must be a number of at least 0"),
        (["--top_p", "0"], "argument --top_p: is 0, must be above 0 and at most 1"),
        (["--min_p", "1.5"], "argument --min_p: is 1.5, must be between 0 and 1"),
        (["--max_new_tokens", "0"], "argument --max_new_tokens: is 0, must be an integer of at least 1"),
        (["--batch_size", "0"], "argument --batch_size: is 0, must be an integer of at least 1"),
        (["--device", "nonsense"], "--device: nonsense cannot be used: Expected one of cpu, cuda"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--nonsense"], "--nonsense: is not an option of memlm generate"),
        (["--tokenizer", "no.json"], "no.json"),
    ],
)
def test_a_wrong_option_is_named(dense, more, message):
    with pytest.raises(UserError) as caught:
        main([dense[0], "--prompt", "a", *more])
    assert message in str(caught.value)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        main([str(tmp_path / "nowhere"), "--prompt", "a"])
    (tmp_path / "a.ckpt").write_text("no checkpoint")
    with pytest.raises(UserError, match=r"a\.ckpt"):
        main([str(tmp_path / "a.ckpt"), "--prompt", "a"])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_without_prompts_is_a_prompt_line(dense, monkeypatch, capsys):
    run, model = dense
    monkeypatch.setattr("sys.stdin", Terminal())
    typed = iter([":max 5", "hello", "a" * 70, ":temperature 1", ":seed 4", "a", "a", ":quit"])
    monkeypatch.setattr("builtins.input", lambda shown: next(typed))
    assert main([run, "--stop", "never there"]) == 0
    out = capsys.readouterr().out.split("\n")
    assert out[:2] == ["max_new_tokens 5", oracle(model, "hello", 5)]
    assert out[2].startswith("error: prompt 'aaaa")
    assert out[3:5] == ["temperature 1.0", "seed 4"]
    assert out[5] == out[6]
    with pytest.raises(UsageError, match="--output: needs --prompt or --file"):
        main([run, "--output", "o.jsonl"])


def test_what_would_command_a_terminal_is_only_shown(monkeypatch):
    from memlm.generation.verb import _terminal_writer

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    _terminal_writer()("a\x1b[2J\r\nb\x9b\tü")
    assert terminal.getvalue() == "a␛[2J␍\nb\ufffd\tü"
    plain = io.StringIO()
    monkeypatch.setattr("sys.stdout", plain)
    _terminal_writer()("a\x1b")
    assert plain.getvalue() == "a\x1b"


def test_help_needs_no_heavy_imports(tmp_path):
    import subprocess

    code = (
        "import sys\nfrom memlm.generation.verb import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'numpy', 'tqdm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: memlm generate")
    assert done.stdout.endswith("[]\n")
