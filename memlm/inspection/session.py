"""A loaded model that is looked into: texts to tokens, and results to tables and plain values."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from memlm.errors import DataError
from memlm.evaluation.evaluator import Evaluator
from memlm.inspection.ablation import AblationReport, ablate
from memlm.inspection.corpus import SlotReport, look_through
from memlm.inspection.reads import LayerReads, memory_blocks, reads_of
from memlm.inspection.slots import Slot, check_slots, slots_of
from memlm.inspection.text import ablation_text, reads_text, slots_text, token_label
from memlm.trained import TrainedModel, load_trained
from memlm.usage_errors import UsageError

Result = tuple[str, dict[str, Any]]
"""A text to print, and the same as plain values, for JSON."""


class Session:
    """A model with memory, ready to be looked into.

    Args:
        path: Run directory, checkpoint or exported folder.
        tokenizer: File of its tokenizer, None for the one that belongs to it.
        device: Where to run it.
        width: Columns of the terminal.

    Raises:
        UsageError: The model has no memory, or the device does not exist.
        CheckpointError: It cannot be loaded.
    """

    def __init__(
        self, path: str, tokenizer: str | None = None, device: str = "cpu", width: int = 120
    ) -> None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"--device: {device} cannot be used: {str(error).splitlines()[0]}") from None
        self.trained: TrainedModel = load_trained(path, tokenizer=tokenizer, device=device)
        self.model, self.tokenizer, self.width = self.trained.model, self.trained.tokenizer, width
        try:
            self.places = memory_blocks(self.model)
        except ValueError as error:
            kind = str(self.trained.architecture.get("class_path", "")).rpartition(".")[2] or "a model"
            raise UsageError(f"{path}: is {kind}: {error}; expected a model with memory") from None

    def reads(self, prompt: str, top: int, last: int | None, png: Path | None = None) -> Result:
        """What every token of a prompt reads: in the text ``top`` slots of each head, in the values all."""
        ids = self._encode(prompt, "--prompt")
        labels = self._labels(ids)
        layers = reads_of(self.model, ids)
        if png is not None:
            from memlm.inspection.picture import draw_reads

            draw_reads(layers, labels, png)
        values = {**self._described(prompt, ids), "layers": [_layer_values(layer) for layer in layers]}
        return reads_text(layers, labels, top, last, self.width), values

    def chosen(
        self,
        rows: Sequence[int] | None,
        prompt: str | None,
        pool: str | None,
        count: int,
        last: int | None,
    ) -> list[Slot]:
        """The slots named by number, or the ``count`` heaviest of a prompt.

        Raises:
            UsageError: A pool or slot does not exist, or the pool is not said and there are several.
        """
        pools = list(dict.fromkeys(place.pool for place in self.places))
        if pool is not None and pool not in pools:
            raise UsageError(f"--pool: {pool!r} is no pool of values; the model has {', '.join(pools)}")
        if rows is None:
            assert prompt is not None
            return slots_of(self.model, self._encode(prompt, "--slots_of"), count, pool, last)
        if pool is None and len(pools) > 1:
            raise UsageError(f"--pool: is needed with --slot: the model has the pools {', '.join(pools)}")
        slots = [Slot(pool or pools[0], row) for row in dict.fromkeys(rows)]
        try:
            check_slots(self.model, slots)
        except ValueError as error:
            raise UsageError(f"--slot: {error}") from None
        return slots

    def slots(self, slots: Sequence[Slot], documents: Iterable[str], top: int) -> Result:
        """What slots answer to in a corpus."""
        ids = self._corpus(documents)
        context, vocabulary = self.trained.context, self.tokenizer.vocab_size
        reports = look_through(self.model, ids, slots, context, vocabulary, top)
        values = {"model": str(self.trained.source), "slots": [self._slot_values(each) for each in reports]}
        return slots_text(reports, self.places, self.tokenizer, self.width), values

    def ablation(
        self,
        prompt: str,
        answer: str,
        remove: int,
        last: int | None,
        renormalise: bool,
        draws: int,
        seed: int,
        png: Path | None = None,
    ) -> Result:
        """What becomes of an answer's likelihood when slots are removed."""
        self._encode(prompt, "--prompt")
        if not answer.strip():
            raise UsageError("--answer: is empty; expected the text that follows the prompt")
        between = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
        evaluator = Evaluator(self.model, self.tokenizer, self.trained.context)
        try:
            before, after = evaluator.encode_pair(prompt, between + answer)
        except DataError as error:
            raise UsageError(f"--answer: the tokenizer {error}") from None
        if len(before) + len(after) - 1 > self.trained.context:
            raise UsageError(
                f"--answer: has {len(after):,} tokens after the {len(before):,} of the prompt; together more "
                f"than the {self.trained.context + 1:,} that the model's context has room for"
            )
        try:
            report = ablate(
                self.model, before, after, self.trained.context, remove, last, renormalise, draws, seed
            )
        except ValueError as error:
            raise UsageError(f"--renormalise: {error}") from None
        if png is not None:
            from memlm.inspection.picture import draw_ablation

            draw_ablation(report, png)
        values = {
            **self._described(prompt, before),
            "answer": answer,
            "answer_tokens": self._token_values(after),
            "renormalise": renormalise,
            "seed": seed,
            **_ablation_values(report),
        }
        return ablation_text(report, self._labels(after)), values

    # -- texts

    def _encode(self, text: str, option: str) -> list[int]:
        """A prompt as a document's beginning: after the end of the one before it."""
        try:
            ids = self.tokenizer.encode(text)
        except DataError as error:
            raise UsageError(f"{option}: the tokenizer {error}") from None
        if not ids:
            raise UsageError(f"{option}: is empty; expected some text")
        if len(ids) + 1 > self.trained.context:
            raise UsageError(
                f"{option}: has {len(ids) + 1:,} tokens with the one that begins a document, more than the "
                f"{self.trained.context:,} of the model's context"
            )
        return [self.tokenizer.eos_id, *ids]

    def _corpus(self, documents: Iterable[str]) -> Iterator[list[int]]:
        for number, text in enumerate(documents):
            try:
                yield [self.tokenizer.eos_id, *self.tokenizer.encode(text)]
            except DataError as error:
                raise UsageError(f"--corpus: document {number} (from 0): the tokenizer {error}") from None

    def _labels(self, ids: list[int]) -> list[str]:
        return [token_label(self.tokenizer, token) for token in ids]

    # -- plain values

    def _token_values(self, ids: list[int]) -> list[dict[str, Any]]:
        return [{"id": token, "text": label} for token, label in zip(ids, self._labels(ids), strict=True)]

    def _described(self, prompt: str, ids: list[int]) -> dict[str, Any]:
        return {"model": str(self.trained.source), "prompt": prompt, "tokens": self._token_values(ids)}

    def _slot_values(self, report: SlotReport) -> dict[str, Any]:
        names = {place.block: place.heads for place in self.places}
        return {
            "pool": report.slot.pool,
            "slot": report.slot.row,
            "tokens": report.tokens,
            "readers": report.readers,
            "weight": report.weight,
            "reads": [
                {"block": block, "head": names[block][head], "count": count}
                for (block, head), count in sorted(report.reads.items())
            ],
            "contexts": [
                {
                    "document": found.document,
                    "position": found.position,
                    "token": token_label(self.tokenizer, found.tokens[found.position]),
                    "before": self.tokenizer.decode(found.tokens[: found.position]),
                    "after": self.tokenizer.decode(found.tokens[found.position + 1 :]),
                    "block": found.block,
                    "head": names[found.block][found.head],
                    "weight": found.weight,
                }
                for found in report.contexts
            ],
            "pushes": [
                {
                    "block": push.block,
                    "virtual_table": push.table,
                    "gate": "mean in the corpus" if push.in_corpus else "open",
                    "tokens": [
                        {"id": token, "text": token_label(self.tokenizer, token), "deviations": score}
                        for token, score in push.tokens
                    ],
                }
                for push in report.pushes
            ],
        }


def _layer_values(layer: LayerReads) -> dict[str, Any]:
    activations = {} if layer.activations is None else {"activations": layer.activations.tolist()}
    virtual = {"virtual_tables": layer.tables.tolist()} if layer.place.virtual_tables > 1 else {}
    return {
        "block": layer.place.block,
        "pool": layer.place.pool,
        "pool_slots": layer.place.slots,
        "heads": list(layer.place.heads),
        "slots": layer.rows.tolist(),
        **virtual,
        "weights": layer.weights.tolist(),
        **activations,
        "entropy": layer.entropy.tolist(),
        "effective_slots": layer.effective.tolist(),
    }


def _ablation_values(report: AblationReport) -> dict[str, Any]:
    intact = report.intact
    rows = []
    for found in report.ablations:
        slot = {} if found.slot is None else {**found.slot.slot._asdict(), "weight": found.slot.weight}
        rows.append(
            {
                "removed": found.kind,
                "block": found.block,
                "head": found.head_name,
                **slot,
                "slots": found.slots,
                "log_likelihood": found.scored.log_likelihood,
                "change": found.scored.log_likelihood - intact.log_likelihood,
                "greedy": found.scored.greedy,
                "controls": [
                    {"of": c.what, "slots": c.slots, "log_likelihoods": c.log_likelihoods, "mean": c.mean}
                    for c in found.controls
                ],
            }
        )
    return {"log_likelihood": intact.log_likelihood, "greedy": intact.greedy, "ablations": rows}
