"""Ranks that read each other's value columns need equally many tokens in every batch, also the last."""

import json

import pytest

from data_modules import SyntheticFacts, TextStream


def facts(folder, **options):
    return SyntheticFacts(people=7, control=2, name_vocabulary=20, batch_size=3, **options)


def text(folder, **options):
    for name, words in {"train": range(40, 60), "valid": range(1, 12)}.items():
        lines = [json.dumps({"text": "word " * count}) for count in words]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    paths = {"paths": [str(folder / "train.jsonl")], "validation_paths": [str(folder / "valid.jsonl")]}
    return TextStream(**paths, sequence_length=17, batch_size=3, **options)


@pytest.mark.parametrize("world", [2, 3, 4, 5])
@pytest.mark.parametrize("packing", ["documents", "concatenate"])
@pytest.mark.parametrize("make", [facts, text])
def test_every_rank_has_batches_of_the_same_shapes(tmp_path, make, packing, world):
    data = make(tmp_path, packing=packing)
    for source in data.evaluation_sources(test=False).values():
        alone = list(source.batches(data.start(), 1, 0))
        ranks = [list(source.batches(data.start(), world, rank)) for rank in range(world)]
        shapes = [[{key: part.shape for key, part in batch.items()} for batch in own] for own in ranks]
        assert all(own == shapes[0] for own in shapes)
        rows = sum(len(batch["tokens"]) for batch in alone)
        assert sum(shape["tokens"][0] for own in shapes for shape in own) == -(-rows // world) * world
        # What fills the last batch counts for nothing.
        shared = [batch for own in ranks for batch in own]
        counted = [sum((batch["targets"] >= 0).sum() for batch in own) for own in (alone, shared)]
        assert counted[0] == counted[1]
