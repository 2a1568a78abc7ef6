"""How well a model predicts a text: perplexity and bits per byte."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from memlm.errors import DataError
from memlm.evaluation.estimates import Measure
from memlm.evaluation.evaluator import Evaluator
from memlm.evaluation.rows import JSON_SUFFIXES, read_rows, read_text
from memlm.evaluation.task import Outcome, Task

CHARACTERS_AT_ONCE = 1 << 22
"""Texts that are encoded together: enough to fill batches, little enough to bound memory."""


class TextPerplexity(Task[str]):
    """How well a model predicts texts, each a document of its own, from as much of it as the context holds.

    - ``loss``: nats per token; ``perplexity``: e to the power of it. They depend on the tokenizer;
    - ``bits_per_byte``: bits per UTF-8 byte, which does not;
    - ``word_perplexity``: e to the power of the nats per word, where white space separates words.

    Every token is predicted once, the first after the end-of-document token. A text longer than the context
    is predicted in windows. The end of a document is not predicted.

    Args:
        path: A file of texts: JSON lines or parquet, else UTF-8 text (all also compressed, but parquet).
        name: The task's name in tables and files; by default that of the class in lower case.
        text_key: Where a row holds its text.
        separator: What stands between the documents of a text file; by default it is one document.
        limit: Only the first so many documents.
    """

    measures = (
        Measure("loss", "ratio"),
        Measure("perplexity", "ratio", exponential=True),
        Measure("bits_per_byte", "ratio"),
        Measure("word_perplexity", "ratio", exponential=True),
    )

    def __init__(
        self,
        path: str,
        name: str | None = None,
        text_key: str = "text",
        separator: str | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(path, name, limit=limit)
        self.text_key, self.separator = text_key, separator
        if separator == "":
            self.fail("separator", "is empty; expected what stands between documents, or null")

    def read(self, path: str) -> list[str]:
        if set(Path(path).suffixes) & {*JSON_SUFFIXES, ".parquet"}:
            return [row.text(self.text_key) for row in read_rows(path)]
        text = read_text(path)
        texts = [part for part in ([text] if self.separator is None else text.split(self.separator)) if part]
        if not any(part.strip() for part in texts):
            raise DataError(path, "holds no text")
        return texts

    def evaluate(self, evaluator: Evaluator, examples: Sequence[tuple[int, str]]) -> list[Outcome]:
        outcomes = []
        for texts in _portions([text for _, text in examples]):
            for text, scored in zip(texts, evaluator.text_likelihoods(texts), strict=True):
                nats, size = -scored.log_likelihood, len(text.encode())
                values = {
                    "loss": (nats, float(scored.tokens)),
                    "perplexity": (nats, float(scored.tokens)),
                    "bits_per_byte": (nats / math.log(2), float(size)),
                }
                if words := len(text.split()):
                    values["word_perplexity"] = (nats, float(words))
                record = {"text": text, "nats": nats, "tokens": scored.tokens, "bytes": size, "words": words}
                outcomes.append(Outcome(values, record))
        return outcomes


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for text in texts:
        portion.append(text)
        size += len(text)
        if size >= CHARACTERS_AT_ONCE:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
