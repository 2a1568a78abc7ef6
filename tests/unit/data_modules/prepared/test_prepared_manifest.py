import json
import multiprocessing
import os
import time

import pytest

from data_modules.prepared.manifest import Counts, Manifest, ShardInfo, expand
from data_modules.prepared.shard import Header
from memlm import __main__ as entry
from memlm.errors import DataError
from memlm.tokenizers import ByteTokenizer


@pytest.fixture
def folder(tmp_path, prepare, inputs, bpe):
    prepare(tmp_path / "o", inputs, tokenizer=bpe)
    return tmp_path / "o"


@pytest.fixture
def compressed(tmp_path, prepare, inputs):
    prepare(tmp_path / "c", inputs, compress=True)
    return tmp_path / "c"


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_manifest_that_is_missing_or_broken(tmp_path):
    with pytest.raises(DataError, match="gone: no such folder; expected one made by memlm prepare"):
        Manifest.load(tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds no manifest.json; .* run the same memlm prepare again"):
        Manifest.load(tmp_path)
    for content in ["{", "[]", "{}", '{"format": "memlm prepared tokens, version 1", "splits": {}}']:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match=r"manifest.json: is not a manifest"):
            Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "memlm prepared tokens, version 2"}')
    with pytest.raises(DataError, match=r"manifest.json: has another format; expected"):
        Manifest.load(tmp_path)


def test_another_tokenizer_in_the_folder(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer.json: is another tokenizer \(\w+\) than that of"):
        Manifest.load(folder).load_tokenizer()


def test_missing_truncated_and_altered_shards_are_named(folder, capsys):
    manifest = Manifest.load(folder)
    path = manifest.path(manifest.shards("train")[1])
    whole = path.read_bytes()

    def expect(message, checked=True):
        if checked:
            with pytest.raises(DataError, match=message):
                manifest.check()
        with pytest.raises(DataError, match=message):
            manifest.verify()
        assert entry.main(["verify", str(folder)]) == 2
        assert "train-00001.tokens" in capsys.readouterr().err

    path.unlink()
    expect(r"train-00001.tokens: no such file")
    path.write_bytes(whole[:-8])
    expect(r"train-00001.tokens: is truncated")
    path.write_bytes((folder / "train-00002.tokens").read_bytes())
    expect(r"train-00001.tokens: is altered: it holds \d+ documents of [\d,]+ uint16 tokens; manifest")
    path.write_bytes(whole)
    manifest.verify()
    flip(path, 140)
    manifest.check()
    expect(r"train-00001.tokens: is altered: its content has the SHA-256 \w+; manifest", checked=False)


def test_verify_names_every_fault(folder, capsys):
    assert entry.main(["verify", str(folder)]) == 0
    assert "shards are as they were made" in capsys.readouterr().out
    (folder / "train-00000.tokens").unlink()
    flip(folder / "train-00002.tokens", 150)
    assert entry.main(["verify", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "train-00000.tokens: no such file" in err and "train-00002.tokens: is altered" in err
    assert "2 of " in err.splitlines()[-1]


def test_verify_names_a_tokenizer_that_is_gone(folder, capsys):
    (folder / "tokenizer.json").unlink()
    assert entry.main(["verify", str(folder)]) == 2
    assert "tokenizer.json: no such file" in capsys.readouterr().err


def test_compressed_shards_are_expanded_once(compressed, contents):
    before = contents(compressed)
    manifest = Manifest.load(compressed)
    expand(compressed)
    after = contents(compressed)
    shards = [info.file for split in manifest.splits.values() for info in split]
    assert after.keys() - before.keys() == set(shards)
    times = {name: (compressed / name).stat().st_mtime_ns for name in shards}
    expand(compressed)
    assert {name: (compressed / name).stat().st_mtime_ns for name in shards} == times
    manifest.verify()
    flip(compressed / shards[0], 150)
    with pytest.raises(DataError, match=f"{shards[0]}: is altered"):
        manifest.verify()


@pytest.mark.parametrize("kept", [0, 3, 10, -10, -1])
def test_a_truncated_compressed_shard_is_named_and_not_expanded(compressed, kept, contents):
    path = compressed / "train-00001.tokens.zst"
    path.write_bytes(path.read_bytes()[:kept])
    for check in [Manifest.load(compressed).verify, lambda: expand(compressed)]:
        with pytest.raises(DataError, match=r"train-00001.tokens.zst: is truncated"):
            check()
    assert not (compressed / "train-00001.tokens").exists()
    assert not [name for name in contents(compressed) if "partial" in name]


def test_missing_and_altered_compressed_shards_are_named(compressed):
    manifest = Manifest.load(compressed)
    path, other = compressed / "train-00001.tokens.zst", compressed / "train-00002.tokens.zst"
    whole = path.read_bytes()
    path.unlink()
    for check in [manifest.check, manifest.verify, lambda: expand(compressed)]:
        with pytest.raises(DataError, match=r"train-00001.tokens.zst: no such file"):
            check()
    path.write_bytes(other.read_bytes())
    for check in [manifest.check, manifest.verify, lambda: expand(compressed)]:
        with pytest.raises(DataError, match=r"train-00001.tokens.zst: is altered"):
            check()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole)
        flip(path, at)
        with pytest.raises(DataError, match=r"train-00001.tokens.zst: "):
            manifest.verify()
        with pytest.raises(DataError, match=r"train-00001.tokens.zst: "):
            expand(compressed)
        assert not (compressed / "train-00001.tokens").exists()
    path.write_bytes(whole + b"more")
    with pytest.raises(DataError, match=r"train-00001.tokens.zst: is altered: something follows"):
        manifest.verify()


def test_several_processes_expand_at_once(compressed, contents):
    (compressed / ".train-00000.tokens.partial").write_bytes(b"left by a process that was killed")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=expand, args=(compressed,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    Manifest.load(compressed).verify()
    assert not [name for name in contents(compressed) if "partial" in name]


@pytest.mark.slow
def test_checking_many_shards_is_fast_and_reads_no_content(tmp_path):
    """Ten thousand shards of a million tokens each, which are holes in files."""
    info = ShardInfo("", 1, 1_000_000, 0, "")
    manifest = Manifest(
        tmp_path, "bytes", ByteTokenizer.hash, 257, 256, "uint16", False, {"train": [], "validation": []},
        Counts(10_000, 10**10, 0),
    )  # fmt: skip
    header: Header = manifest.header(info)
    for number in range(10_000):
        name = f"train-{number:05}.tokens"
        with open(tmp_path / name, "wb") as file:
            file.write(header.pack())
            file.truncate(header.file_bytes)
        manifest.splits["train"].append(ShardInfo(name, 1, 1_000_000, 0, ""))
    manifest.save()
    times = []
    for _ in range(3):
        began = time.process_time()
        Manifest.load(tmp_path).check()
        times.append(time.process_time() - began)
    assert min(times) < 1
    os.truncate(tmp_path / "train-09999.tokens", 5000)
    with pytest.raises(DataError, match=r"train-09999.tokens: is truncated: 5,000 bytes"):
        Manifest.load(tmp_path).check()
