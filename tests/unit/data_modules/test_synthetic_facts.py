from collections import Counter, defaultdict
from itertools import islice

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from data_modules import SyntheticFacts
from data_modules.made_up_facts.facts import PHRASINGS, made_up_word
from memlm.errors import CheckpointError, ConfigError
from memlm.language_models import DenseLM
from memlm.transformer import TransformerConfig

SMALL = {
    "people": 60,
    "control": 20,
    "attributes": 3,
    "values": 7,
    "name_vocabulary": 20,
    "batch_size": 8,
    "evaluation_facts": 30,
}


def batches(module, count, world=1, rank=0, cursor=None):
    source = module.training_source()
    return list(islice(source.batches(module.start() if cursor is None else cursor, world, rank), count))


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if key != "cursor" else a[key] == b[key] for key in a
    )


def biographies(module, epochs=1):
    """Every biography of some epochs of training, as words; cut from the rows that a model would see."""
    source = module.training_source()
    count = epochs * len(source.occurrences) // module.batch_size
    rows = torch.cat([batch["tokens"] for batch in batches(module, count)])
    if module.packing == "concatenate":
        rows = rows.reshape(1, -1)
    for row in rows:
        for text in module.tokenizer.decode(row.tolist()).split(" .")[:-1]:
            yield text.split()


def statements(module, epochs=1):
    """(name, attribute, phrasing, value) of every clause of some epochs of training."""
    for words in biographies(module, epochs):
        name, clauses = words[: module.facts.name_words], " ".join(words[module.facts.name_words :])
        for clause in clauses.split(" , "):
            yield parse(module, [*name, *clause.split()])


def parse(module, words):
    """(name, attribute, phrasing, value) of a name and a clause, by matching the English phrasings."""
    name, phrase, value = words[: module.facts.name_words], words[module.facts.name_words : -1], words[-1]
    assert all(word[0].isupper() for word in [*name, value]), words
    for attribute, phrasings in enumerate(PHRASINGS.values()):
        if " ".join(phrase) in phrasings:
            return " ".join(name), attribute, phrasings.index(" ".join(phrase)), value
    raise AssertionError(words)


def names(module):
    return [module.tokenizer.decode(row) for row in module.facts.names.tolist()]


@pytest.fixture(scope="module")
def small():
    return SyntheticFacts(**SMALL)


def test_made_up_words_are_distinct():
    words = [made_up_word(i) for i in range(50_000)]
    assert len(set(words)) == 50_000
    assert all(word.isalpha() and word[0].isupper() for word in words)


def test_names_are_distinct_and_control_names_are_made_of_trained_words(small):
    all_names = names(small)
    assert len(set(all_names)) == 80
    for column in small.facts.names.T:
        assert set(column[60:].tolist()) <= set(column[:60].tolist())


@pytest.mark.parametrize("packing", ["documents", "concatenate"])
def test_training_states_each_fact_truly_in_trained_phrasings_only(packing):
    module = SyntheticFacts(**SMALL, packing=packing, held_out_phrasings=2)
    facts, person_of = module.facts, {name: i for i, name in enumerate(names(module))}
    seen = defaultdict(set)
    for name, attribute, phrasing, value in statements(module, epochs=20):
        person = person_of[name]
        assert value == module.tokenizer.decode([int(facts.values_of[person, attribute])])
        seen[person, attribute].add(phrasing)
    assert {person for person, _ in seen} == set(range(60)), "control people must never be mentioned"
    for (person, attribute), phrasings in seen.items():
        held_out = set(facts.held_out[person, attribute].tolist())
        assert len(held_out) == 2
        assert phrasings == {0, 1, 2, 3} - held_out
    for attribute in range(3):  # each phrasing is held out for some and trained for others
        for phrasing in range(4):
            told = [phrasing in seen[person, attribute] for person in range(60)]
            assert 10 < sum(told) < 50


def test_prompts_ask_what_their_group_promises(small):
    facts, person_of = small.facts, {name: i for i, name in enumerate(names(small))}
    groups, asked = Counter(), defaultdict(set)
    for batch in small.val_dataloader()[0]:
        assert batch["tokens"].shape == batch["answers"].shape == batch["targets"].shape
        for tokens, targets, answers, group in zip(
            batch["tokens"], batch["targets"], batch["answers"], batch["group"].tolist(), strict=True
        ):
            assert tokens[0] == small.tokenizer.eos_id
            (place,) = torch.nonzero(answers != -100).flatten().tolist()
            prompt = small.tokenizer.decode(tokens[: place + 1].tolist()).split()
            answer = small.tokenizer.decode([int(answers[place])])
            name, attribute, phrasing, _ = parse(small, [*prompt, answer])
            person = person_of[name]
            assert facts.values_of[person, attribute] == answers[place]
            assert (person >= 60) == (group == 2)
            assert (phrasing in facts.held_out[person, attribute]) == (group != 1)
            if group == 0:
                counted = targets != -100
                assert torch.equal(targets[counted][:-1], tokens[1 : counted.sum()])
                assert counted.sum() == place + 1 and targets[place] == answers[place]
            else:
                assert (targets == -100).all()
            groups[group] += 1
            asked[group].add((person, attribute))
    assert groups == {0: 30, 1: 30, 2: 30}
    assert asked[0] == asked[1] and [len(asked[g]) for g in range(3)] == [30, 30, 30]


def test_every_evaluation_batch_mixes_the_groups(small):
    for batch in small.val_dataloader()[0]:
        assert batch["group"].unique().tolist() == [0, 1, 2]


def test_test_asks_everything_unless_told_otherwise(small):
    assert sum(len(batch["group"]) for batch in small.test_dataloader()[0]) == 2 * 180 + 60
    few = SyntheticFacts(**SMALL, test_facts=5)
    assert sum(len(batch["group"]) for batch in few.test_dataloader()[0]) == 15
    assert sum(len(batch["group"]) for batch in few.predict_dataloader()[0]) == 15
    alone = SyntheticFacts(**{**SMALL, "control": 0})
    assert {int(g) for batch in alone.test_dataloader()[0] for g in batch["group"]} == {0, 1}


def test_rows_are_what_the_tokenizer_makes_of_the_text(small):
    batch = batches(small, 1)[0]
    eos = small.tokenizer.eos_id
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        text = small.tokenizer.decode(tokens)
        document = [eos, *small.tokenizer.encode(text)]
        assert tokens == document + [eos] * (len(tokens) - len(document))
        assert targets == [*document[1:], eos] + [-100] * (len(tokens) - len(document))
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64


def test_joined_rows_are_one_stream_without_gaps():
    module = SyntheticFacts(**SMALL, packing="concatenate", sequence_length=17, confine_attention=True)
    some = batches(module, 40)
    tokens = torch.cat([batch["tokens"] for batch in some]).flatten()
    targets = torch.cat([batch["targets"] for batch in some]).flatten()
    assert torch.equal(tokens[1:], targets[:-1])
    for row, documents in zip(some[0]["tokens"], some[0]["documents"], strict=True):
        assert documents[0] == 0
        assert torch.equal(documents.diff(), (row[1:] == module.tokenizer.eos_id).long())


def test_loss_on_answers_counts_the_values_only():
    for packing in ["documents", "concatenate"]:
        module = SyntheticFacts(**SMALL, loss_on="answers", packing=packing)
        everything = SyntheticFacts(**SMALL, packing=packing)
        for batch, full in zip(batches(module, 5), batches(everything, 5), strict=True):
            counted = batch["targets"] != -100
            assert torch.equal(batch["tokens"], full["tokens"])
            assert torch.equal(batch["targets"][counted], full["targets"][counted])
            values = set(module.facts.values_of.flatten().tolist())
            assert torch.equal(counted, torch.isin(full["targets"], torch.tensor(sorted(values))))
            assert packing != "documents" or (counted.sum(dim=1) == 3).all()
        for batch in module.val_dataloader()[0]:
            trained = batch["group"] == 0
            assert torch.equal(batch["targets"][trained], batch["answers"][trained])


@pytest.mark.parametrize("packing", ["documents", "concatenate"])
def test_a_seed_makes_everything(packing):
    a, b = (SyntheticFacts(**SMALL, packing=packing) for _ in range(2))
    assert all(same(x, y) for x, y in zip(batches(a, 12), batches(b, 12), strict=True))
    assert all(same(x, y) for x, y in zip(a.val_dataloader()[0], b.val_dataloader()[0], strict=True))
    other = SyntheticFacts(**SMALL, packing=packing, seed=1)
    assert not same(batches(a, 1)[0], batches(other, 1)[0])
    assert (other.facts.values_of != a.facts.values_of).any()
    assert other.tokenizer.hash == a.tokenizer.hash, "the vocabulary must not depend on the seed"
    assert SyntheticFacts(**{**SMALL, "values": 8}).tokenizer.hash != a.tokenizer.hash


def test_pinned_facts_of_seed_0(small):
    """Guards published numbers: the same seed means the same facts on every machine and version."""
    batch = batches(small, 1)[0]
    assert small.tokenizer.decode(batch["tokens"][0].tolist()) == (
        "Zugezi Tesuri Rerene left Somanu , practises as Mimegu , reports to Moguji ."
    )


@pytest.mark.parametrize("packing", ["documents", "concatenate"])
def test_any_cursor_continues_the_same_stream(packing):
    module = SyntheticFacts(**SMALL, packing=packing, exposures_per_epoch=[1, 3])
    whole = batches(module, 40)
    for stop in np.random.default_rng(0).integers(0, 35, 12):
        resumed = batches(
            SyntheticFacts(**SMALL, packing=packing, exposures_per_epoch=[1, 3]),
            5,
            1,
            0,
            whole[stop]["cursor"],
        )
        assert all(same(x, y) for x, y in zip(whole[stop + 1 : stop + 6], resumed, strict=True))


@pytest.mark.parametrize("packing", ["documents", "concatenate"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_of_one(packing, world):
    shared = SyntheticFacts(**SMALL, packing=packing)
    alone = SyntheticFacts(**{**SMALL, "batch_size": 8 * world}, packing=packing)
    parts = [batches(shared, 10, world, rank) for rank in range(world)]
    for i, whole in enumerate(batches(alone, 10)):
        for rank in range(world):
            assert parts[rank][i]["cursor"] == whole["cursor"]
            assert torch.equal(parts[rank][i]["tokens"], whole["tokens"][rank::world])
            assert torch.equal(parts[rank][i]["targets"], whole["targets"][rank::world])


def test_ranks_share_the_evaluation_and_pad_it_evenly(small):
    def rows(world, rank):
        some = list(small.evaluation_sources(test=False)["all"].batches(0, world, rank))
        return {key: torch.cat([batch[key] for batch in some]) for key in some[0]}

    whole, parts = rows(1, 0), [rows(4, rank) for rank in range(4)]
    assert [len(part["tokens"]) for part in parts] == [23] * 4  # 90 rows and 2 of padding
    joined = {key: torch.stack([part[key] for part in parts], dim=1).flatten(0, 1) for key in whole}
    for key in whole:
        assert torch.equal(joined[key][:90], whole[key])
    assert joined["group"][90:].tolist() == [-1, -1]
    assert (joined["targets"][90:] == -100).all() and (joined["answers"][90:] == -100).all()


def test_exposures_are_as_reported():
    module = SyntheticFacts(**SMALL, exposures_per_epoch=[1, 2, 4])
    assert module.exposures(35) == [2, 4, 8]  # 140 documents an epoch, 8 a step
    count = Counter(name for name, *_ in statements(module, epochs=2))
    told = [count[name] / 3 for name in names(module)]  # three facts a biography
    assert told == [2, 4, 8] * 20 + [0] * 20
    joined = SyntheticFacts(**SMALL, packing="concatenate")
    rows = np.array([len(batch["tokens"]) for batch in batches(joined, 10)]).sum()
    documents = batches(joined, 10)[-1]["cursor"] / joined.training_source().longest
    assert rows == 80 and joined.exposures(10)[0] == pytest.approx(documents / 60, rel=0.05)


def test_questions_tell_how_often_their_facts_are_trained():
    module = SyntheticFacts(**SMALL, exposures_per_epoch=[4, 1, 2, 1], test_facts=None)
    assert module.exposure_levels == (1, 2, 4)
    told = Counter(name for name, *_ in statements(module, epochs=1))
    seen = set()
    for batch in module.test_dataloader()[0]:
        for tokens, group, level in zip(batch["tokens"], batch["group"], batch["exposures"], strict=True):
            name = module.tokenizer.decode(tokens[1:4].tolist())
            expected = told[name] // 3  # three facts a biography
            assert level == (-1 if group == 2 else module.exposure_levels.index(expected))
            seen.add((int(group), expected))
    assert seen == {(group, times) for group in (0, 1) for times in (1, 2, 4)} | {(2, 0)}
    alike = SyntheticFacts(**SMALL, exposures_per_epoch=[2, 2])
    assert "exposures" not in next(iter(alike.val_dataloader()[0]))


def test_recall_by_exposures_is_reported():
    module = SyntheticFacts(**SMALL, exposures_per_epoch=[1, 4])
    model = DenseLM(module.vocab_size, TransformerConfig(16, 1, 2, feed_forward_dim=16))
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False)
    [metrics] = trainer.test(model, datamodule=module, verbose=False)
    names = {name for name in metrics if "recall" in name and "control" not in name and "major" not in name}
    both = {"test/recall", "test/recall_seen_phrasing"}
    assert names == both | {f"{name}_{times}x" for name in both for times in (1, 4)}


def test_each_epoch_shuffles_afresh(small):
    source = small.training_source()
    first, second = (source.documents(np.arange(start, start + 60)) for start in (0, 60))
    assert (first != second).any(axis=1).mean() > 0.9
    decoded = [[small.tokenizer.decode(row[row >= 0].tolist()) for row in rows] for rows in (first, second)]
    told = [[" ".join(text.split()[: small.facts.name_words]) for text in texts] for texts in decoded]
    assert told[0] != told[1] and sorted(told[0]) == sorted(told[1]) == sorted(names(small)[:60])


def test_majority_baseline_counts_the_most_common_values(small):
    values = small.facts.values_of[:60]
    expected = sum(Counter(column.tolist()).most_common(1)[0][1] for column in values.T) / 180
    assert small.majority_baseline == pytest.approx(expected)
    assert small.chance == 1 / 7 < small.majority_baseline < 0.4


def test_values_are_uniform():
    facts = SyntheticFacts(people=20_000, values=10).facts
    counts = np.stack([np.bincount(c - c.min(), minlength=10) for c in facts.values_of.T])
    # Chi-square with 9 degrees of freedom: 27.9 at 0.1 %.
    assert (((counts - 2025) ** 2 / 2025).sum(axis=1) < 27.9).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"people": 0}, "data.people: is 0; expected at least 1"),
        ({"attributes": 9}, "data.attributes: is 9; expected 1 to 8"),
        ({"values": 1}, "data.values: is 1; expected at least 2"),
        ({"phrasings": 6}, "data.phrasings: is 6; expected 2 to 5"),
        ({"held_out_phrasings": 4}, "data.held_out_phrasings: is 4; expected 1 to 3"),
        ({"held_out_phrasings": 0}, "data.held_out_phrasings: is 0; expected 1 to 3"),
        ({"name_words": 4}, "data.name_words: is 4; expected 2 to 3"),
        ({"control": -1}, "data.control: is -1; expected at least 0"),
        (
            {"name_words": 2},
            "data.name_vocabulary: 20 makes only 400 names of 2 words; expected at least twice",
        ),
        ({"people": 3}, "data.control: 20 more names cannot be made of the words in 3 names"),
        ({"values": 200_000}, "data.values: name words and values are 600060; at most 421875 words exist"),
        ({"exposures_per_epoch": []}, r"data.exposures_per_epoch: is \[\]"),
        (
            {"exposures_per_epoch": [1, 0]},
            r"data.exposures_per_epoch: is \[1, 0\]; expected numbers of at least",
        ),
        ({"sequence_length": 15}, "data.sequence_length: is 15; the longest biography needs 16 tokens"),
        ({"sequence_length": 0, "packing": "concatenate"}, "data.sequence_length: is 0; expected at least 1"),
        ({"batch_size": 0}, "data.batch_size: is 0; expected at least 1"),
        ({"evaluation_facts": 0}, "data.evaluation_facts: is 0; expected at least 1"),
        ({"test_facts": 0}, "data.test_facts: is 0; expected at least 1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    wide = {"people": 200} if "name_words" in options else {}
    with pytest.raises(ConfigError, match=message):
        SyntheticFacts(**{**SMALL, **wide, **options})


class Counting(LightningModule):
    """Remembers the tokens it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.evaluated = [], 0

    def training_step(self, batch, index):
        self.seen.append(batch["tokens"])
        return self.weight * 1.0

    def validation_step(self, batch, index):
        self.evaluated += len(batch["group"])

    test_step = validation_step

    def predict_step(self, batch, index):
        return batch["tokens"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(steps, root, **options):
    return Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
                   enable_model_summary=False, default_root_dir=root, **options)  # fmt: skip


def test_a_run_resumes_at_its_checkpoint_and_not_at_what_was_read_ahead(tmp_path, small):
    whole, first, second = Counting(), Counting(), Counting()
    trainer(9, tmp_path, enable_checkpointing=False).fit(whole, datamodule=SyntheticFacts(**SMALL))
    run = trainer(4, tmp_path, limit_train_batches=3, limit_val_batches=1)  # crosses Lightning's epoch
    run.fit(first, datamodule=SyntheticFacts(**SMALL))
    run.save_checkpoint(tmp_path / "4.ckpt")
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)["SyntheticFacts"]
    assert saved["cursor"] == 4 * 8 and saved["tokenizer_hash"] == small.tokenizer.hash
    trainer(9, tmp_path, enable_checkpointing=False).fit(
        second, datamodule=SyntheticFacts(**SMALL), ckpt_path=tmp_path / "4.ckpt"
    )
    assert len(whole.seen) == 9 and first.evaluated > 0
    assert all(torch.equal(a, b) for a, b in zip(whole.seen, first.seen + second.seen, strict=True))


def test_lightning_evaluates_and_predicts_everything_once(tmp_path, small):
    model, run = Counting(), trainer(1, tmp_path, enable_checkpointing=False)
    run.test(model, datamodule=small, verbose=False)
    assert model.evaluated == 420
    assert sum(len(tokens) for tokens in run.predict(model, datamodule=SyntheticFacts(**SMALL))) == 420


def test_fit_reports_what_will_be_learned(tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer(15, tmp_path, enable_checkpointing=False).fit(Counting(), datamodule=SyntheticFacts(**SMALL))
    line = next(r.message for r in caplog.records if r.message.startswith("SyntheticFacts"))
    assert "180 trained facts (60 people x 3), 60 control facts; 2.0 exposures of each by step 15" in line
    assert "chance 0.143" in line


def test_checkpoints_of_other_data(small):
    state = small.state_dict() | {"cursor": 40}
    other = SyntheticFacts(**{**SMALL, "values": 8})
    with pytest.raises(CheckpointError) as caught:
        other.load_state_dict(state)
    assert small.tokenizer.hash in str(caught.value) and other.tokenizer.hash in str(caught.value)
    reseeded = SyntheticFacts(**SMALL, seed=3)
    with pytest.warns(UserWarning, match="training starts at the beginning"):
        reseeded.load_state_dict(state)
    assert reseeded.cursor == 0
    fitting = SyntheticFacts(**{**SMALL, "batch_size": 4})
    fitting.load_state_dict(state)
    assert fitting.cursor == 40
    assert same(next(iter(fitting.train_dataloader())), batches(fitting, 1, cursor=40)[0])
