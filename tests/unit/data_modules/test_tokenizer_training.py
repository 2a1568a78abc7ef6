import json
from pydoc_data.topics import topics

import pytest

from data_modules.tokenizer_training import main
from memlm.errors import ConfigError, DataError
from memlm.tokenizers import ByteTokenizer, FileTokenizer, train_bpe

TEXTS = [topics[name] for name in sorted(topics)[:30]]


@pytest.fixture
def folder(tmp_path):
    """Two files of JSON lines below a folder, and one that is hidden."""
    below = tmp_path / "data" / "more"
    below.mkdir(parents=True)
    for path, texts in ((below / "a.jsonl", TEXTS[:20]), (below.parent / "b.jsonl", TEXTS[20:])):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (below / ".hidden.jsonl").write_text("{")
    return below.parent


def arguments(verb, folder, **options):
    words = [verb, "--paths", json.dumps([str(folder)])]
    return words + [str(word) for key, value in options.items() for word in (f"--{key}", value)]


def test_a_folder_trains_as_its_texts_do(folder, tmp_path, capsys):
    output = tmp_path / "t.json"
    main(arguments("train", folder, vocab_size=400, output=output))
    captured = capsys.readouterr()
    assert captured.out == f"{output}: 400 tokens, trained on 2 files\n"
    assert "reading" in captured.err
    train_bpe(TEXTS, 400, tmp_path / "expected.json")
    assert output.read_bytes() == (tmp_path / "expected.json").read_bytes()


def test_a_sample_is_smaller_and_always_the_same(folder, tmp_path, capsys):
    outputs = [tmp_path / name for name in ("all.json", "one.json", "two.json")]
    main(arguments("train", folder, vocab_size=400, output=outputs[0]))
    for output in outputs[1:]:
        main(arguments("train", folder, vocab_size=400, output=output, sample_megabytes=0.02))
    assert f"{outputs[2]}: 400 tokens, trained on up to 0.02 MB of 2 files\n" in capsys.readouterr().out
    whole, one, two = (output.read_bytes() for output in outputs)
    assert one == two != whole


@pytest.mark.parametrize("megabytes", [0, -1])
def test_a_sample_of_nothing_is_refused(folder, tmp_path, megabytes):
    words = arguments("train", folder, output=tmp_path / "t.json", sample_megabytes=megabytes)
    with pytest.raises(ConfigError, match=rf"sample_megabytes: is {megabytes}.*; expected a positive number"):
        main(words)
    assert not (tmp_path / "t.json").exists()


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none: paths: "):
        main(arguments("train", tmp_path / "none", output=tmp_path / "t.json"))


def test_show(folder, tmp_path, capsys):
    main(["show", "--tokenizer", "bytes"])
    assert capsys.readouterr().out == (
        "kind             ByteTokenizer\n"
        "entries          257\n"
        "end of document  256\n"
        f"hash             {ByteTokenizer.hash}\n"
    )
    path = tmp_path / "t.json"
    train_bpe(TEXTS, 400, path)
    main(arguments("show", folder, tokenizer=path))
    tokenizer = FileTokenizer(path)
    size = sum(len(text.encode()) for text in TEXTS)
    tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    shown = capsys.readouterr().out
    assert tokenizer.hash in shown
    assert f"bytes per token  {size / tokens:.3f} ({size:,} bytes)\n" in shown
    with pytest.raises(DataError, match=r"nowhere.json: no such file"):
        main(["show", "--tokenizer", str(tmp_path / "nowhere.json")])
