import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.random_state import random_state
from callbacks.run_directory import RunDirectory
from callbacks.samples import Samples
from memlm.errors import ConfigError
from memlm.generation.decoding import Sampling, generate
from memlm.loggers import MetricsLogger, TensorBoard
from memlm.run_directory import RunFiles
from memlm.tokenizers import ByteTokenizer


def sections(path):
    """Samples by step."""
    found = {}
    for line in path.read_text().splitlines():
        if line.startswith("step "):
            found[int(line.removeprefix("step "))] = []
        else:
            found[max(found)].append(line)
    return found


@pytest.fixture
def name(facts):
    """Two words of a name."""
    return facts.tokenizer.decode([10, 11])


def test_samples_of_every_validation(facts, model, trainer, tmp_path, name, capsys):
    samples = Samples(["", name], max_new_tokens=5, temperature=0.7, top_k=20, seed=4)
    trainer(samples).fit(model, datamodule=facts)
    written = sections(tmp_path / "samples.txt")
    assert list(written) == [3, 6]
    eos = facts.tokenizer.eos_id
    # The weights are those of step 6 still.
    ids = generate(model.transformer, [[eos], [eos, 10, 11]], 5, Sampling(0.7, 20, seed=4), eos_id=eos)
    assert written[6] == [
        f"    [] {facts.tokenizer.decode(ids[0])}",
        f"    [{name}] {facts.tokenizer.decode(ids[1])}",
    ]
    assert "\n".join(["step 6", *written[6]]) in capsys.readouterr().out


def test_training_is_not_disturbed(facts, model, trainer, name):
    def fit(module, *callbacks):
        facts.advance(facts.start())
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        trainer(*callbacks).fit(module, datamodule=facts)
        assert module.training
        return module.state_dict(), random_state(torch.device("cpu"))

    twin = type(model)(facts.vocab_size, *model.sections.values())
    twin.load_state_dict(model.state_dict())
    weights, state = fit(model, Samples([name]))
    other_weights, other_state = fit(twin)
    assert all(torch.equal(weights[key], other_weights[key]) for key in weights)
    assert torch.equal(state.pop("torch"), other_state.pop("torch"))
    assert state == other_state


def test_files_go_to_the_run_directory_and_tensorboard(facts, dense, trainer, tmp_path, name):
    files = RunFiles(tmp_path / "run")
    loggers = [MetricsLogger(files.metrics), TensorBoard(files.directory)]
    callbacks = [RunDirectory(files), Samples([name], max_new_tokens=3)]
    trainer(*callbacks, logger=loggers, default_root_dir=tmp_path / "elsewhere").fit(dense, datamodule=facts)
    written = sections(files.directory / "samples.txt")
    assert not (tmp_path / "elsewhere").exists()
    events = EventAccumulator(str(files.directory))
    events.Reload()
    shown = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("samples/text_summary")
    }
    assert shown == {step: "\n".join(lines) for step, lines in written.items()}
    assert list(shown) == [3, 6]


def test_a_resumed_run_repeats_no_samples(facts, dense, trainer, tmp_path):
    first = trainer(Samples([""]))
    first.fit(dense, datamodule=facts)
    first.save_checkpoint(tmp_path / "last.ckpt")
    written = (tmp_path / "samples.txt").read_text()
    with (tmp_path / "samples.txt").open("a") as file:
        file.write("step 9\n    [] lost with the machine\n    step 12\n")
    again = trainer(Samples([""]), max_steps=9)
    again.fit(dense, datamodule=facts, ckpt_path=tmp_path / "last.ckpt")
    text = (tmp_path / "samples.txt").read_text()
    assert text.startswith(written)
    assert list(sections(tmp_path / "samples.txt")) == [3, 6, 9]
    assert "lost" not in text


def test_a_run_that_starts_again_from_zero_keeps_nothing(facts, dense, trainer, tmp_path):
    (tmp_path / "samples.txt").write_text("step 3\n    [] from before\n")
    trainer(Samples([""]), max_steps=2).fit(dense, datamodule=facts)
    assert (tmp_path / "samples.txt").read_text() == ""


def test_nothing_is_written_by_a_test_run(facts, dense, trainer, tmp_path, capsys):
    samples = Samples([""])
    trainer(samples, fast_dev_run=2).fit(dense, datamodule=facts)
    assert "step 2\n    []" in capsys.readouterr().out
    trainer(samples).validate(dense, datamodule=facts, verbose=False)
    assert "step" not in capsys.readouterr().out
    assert not (tmp_path / "samples.txt").exists()


def test_lines_of_a_sample_are_indented(facts, dense, trainer, tmp_path, monkeypatch):
    facts.tokenizer = ByteTokenizer()
    monkeypatch.setattr("callbacks.samples.generate", lambda *args, **options: [list(b"lo\nstep 7\n\nend")])
    samples = Samples(["hel"])
    samples.setup(pl.Trainer, dense, "validate")  # needs no tokenizer yet
    trainer(samples, max_steps=3).fit(dense, datamodule=facts)
    expected = "step 3\n    [hel] lo\n    step 7\n    \n    end\n"
    assert (tmp_path / "samples.txt").read_text() == expected


def test_an_unknown_word_names_the_key_and_the_word(facts, dense, trainer, name):
    message = rf"trainer.callbacks: Samples.prompts: '{name} Napoleon' has words .* not know: Napoleon$"
    with pytest.raises(ConfigError, match=message):
        trainer(Samples(["", f"{name} Napoleon"])).fit(dense, datamodule=facts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "trainer.callbacks: Samples.prompts: is empty"),
        ({"max_new_tokens": 0}, "trainer.callbacks: Samples.max_new_tokens: is 0, must be at least 1"),
        ({"temperature": -1.0}, "trainer.callbacks: Samples.temperature: is -1.0, must be at least 0"),
        ({"top_k": 0}, "trainer.callbacks: Samples.top_k: is 0, must be at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        Samples(**({"prompts": [""]} | options))
