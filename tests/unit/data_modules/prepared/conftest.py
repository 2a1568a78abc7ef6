import gzip
import json
import random
from pydoc_data.topics import topics

import pytest
import zstandard

from data_modules.prepared.plan import Options, Plan
from data_modules.prepared.preparation import Preparation
from data_modules.prepared.reading import Faults
from data_modules.readers import find_files
from memlm.tokenizers import load_tokenizer, train_bpe


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """The path of a small tokenizer."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe([topics[name] for name in sorted(topics)[:6]], 400, path)
    return path


@pytest.fixture(scope="session")
def documents():
    """Documents of very different lengths; some are equal, not all are ASCII."""
    draw = random.Random(3)
    words = [*topics["strings"].split(), "Zürich", "日本", "😀", "\n\n"]
    texts = [" ".join(draw.choices(words, k=int(draw.expovariate(1 / 60)) + 1)) for _ in range(400)]
    return [draw.choice(texts[:i]) if i > 5 and draw.random() < 0.2 else texts[i] for i in range(400)]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, documents):
    """A folder with the documents, in order, in files of several kinds and sizes."""
    folder = tmp_path_factory.mktemp("inputs")

    def lines(texts):
        return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()

    (folder / "a.jsonl").write_bytes(lines(documents[:150]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines(documents[150:250])))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines(documents[250:260])))
    (folder / "sub").mkdir()
    for i, text in enumerate(documents[260:300]):
        (folder / "sub" / f"{i:03}.txt").write_text(text)
    (folder / "z.json").write_bytes(lines(documents[300:]))
    return folder


@pytest.fixture
def prepare():
    """Prepares a folder in worker processes of this one."""

    def run(output, *paths, tokenizer="bytes", workers=2, **options):
        faults = Faults(**{key: options.pop(key) for key in list(options) if key.startswith("skip_")})
        used = load_tokenizer(str(tokenizer))
        chosen = {
            "text_key": "text",
            "document_separator": None,
            "validation_fraction": 0.1,
            "seed": 0,
            "deduplicate": False,
            "compress": False,
            "shard_megabytes": 0.02,
        } | options
        files = find_files([str(path) for path in paths], "paths")
        plan = Plan.of(files, Options(**chosen), used, faults.skip_unreadable)
        return Preparation(plan, output, used, faults, workers).run()

    return run


@pytest.fixture
def contents():
    """All files of a folder by name."""

    def read(folder):
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }

    return read
