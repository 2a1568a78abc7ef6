import pytest
import torch
import yaml

from data_modules.synthetic_facts import SyntheticFacts
from memlm import DenseLM, EngramLM, MemoryLM, MoELM
from memlm.errors import CheckpointError, DataError
from memlm.memory import EngramConfig, MemoryConfig
from memlm.memory.tucker import TuckerConfig
from memlm.trained import load_trained
from memlm.transformer import MoEConfig, TransformerConfig

TRANSFORMER = {"dim": 16, "layers": 2, "heads": 2, "feed_forward_dim": 16}
MEMORY = {"half_keys": 8, "heads": 2, "reads": 4, "key_dim": 8, "layers": [1]}
MODELS = {
    "dense": (DenseLM, {}),
    "tied": (DenseLM, {"transformer": TransformerConfig(**TRANSFORMER, tie_embeddings=True)}),
    "experts": (MoELM, {"moe": MoEConfig(experts=4, top_k=2)}),
    "memory": (MemoryLM, {"memory": MemoryConfig(**MEMORY, values_dtype="bfloat16")}),
    "tucker": (MemoryLM, {"memory": MemoryConfig(**MEMORY, tucker=TuckerConfig(rank=2))}),
    "engram": (EngramLM, {"memory": EngramConfig(slots=200, heads=2, layers=[1])}),
}
FACTS = {"people": 20, "control": 4, "values": 10, "name_vocabulary": 20, "batch_size": 4}


@pytest.fixture(scope="module")
def facts():
    return SyntheticFacts(**FACTS)


@pytest.fixture
def saved(tmp_path, facts):
    """Writes a run directory as training leaves it; gives the model and the folder."""

    def save(name="dense"):
        cls, options = MODELS[name]
        model = cls(facts.vocab_size, **{"transformer": TransformerConfig(**TRANSFORMER), **options}).eval()
        folder = tmp_path / "run"
        (folder / "checkpoints").mkdir(parents=True)
        data = {"class_path": "data_modules.SyntheticFacts", "init_args": FACTS}
        (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
        content = {
            "state_dict": model.state_dict(),
            "architecture": model.architecture(),
            "global_step": 7,
            "tokens_seen": 70,
            "SyntheticFacts": facts.state_dict(),
        }
        torch.save(content, folder / "checkpoints" / "last.ckpt")
        return model, folder

    return save


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_run_is_loaded_as_it_was_saved(saved, facts, name):
    model, folder = saved(name)
    trained = load_trained(folder)
    tokens = torch.randint(facts.vocab_size, (2, 9))
    assert torch.equal(trained.model(tokens), model(tokens))
    assert not any(module.training for module in trained.model.modules())
    assert not any(parameter.requires_grad for parameter in trained.model.parameters())
    assert trained.tokenizer.hash == facts.tokenizer.hash
    assert trained.context == facts.sequence_length
    assert (trained.step, trained.tokens) == (7, 70)
    assert trained.architecture == model.architecture()
    assert trained.run is not None
    assert trained.run.directory.resolve() == folder.resolve()
    tied = trained.model.output.weight is trained.model.embedding.weight
    assert tied == (name == "tied")


def test_a_file_is_loaded_too(saved):
    _, folder = saved()
    trained = load_trained(folder / "checkpoints" / "last.ckpt")
    assert trained.source == folder / "checkpoints" / "last.ckpt"


def test_values_are_mapped_and_not_copied(saved):
    _, folder = saved("memory")
    values = load_trained(folder).model.pools["main"].values
    start = values.data_ptr()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        spans = [line.split() for line in maps]
    owner = next(s for s in spans if int(s[0].split("-")[0], 16) <= start < int(s[0].split("-")[1], 16))
    assert owner[-1].endswith("last.ckpt")


def test_another_dtype_is_not_that_of_the_values(saved):
    _, folder = saved("memory")
    model = load_trained(folder, dtype=torch.float64).model
    assert model.pools["main"].values.dtype == torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if not name.startswith("pools.")} == {
        torch.float64
    }


def test_a_tokenizer_of_another_name(saved, facts, tmp_path):
    _, folder = saved()
    name = facts.tokenizer.save(tmp_path)
    assert load_trained(folder, tokenizer=str(tmp_path / name)).tokenizer.hash == facts.tokenizer.hash
    with pytest.raises(DataError, match=r"last\.ckpt: was trained with another tokenizer"):
        load_trained(folder, tokenizer="bytes")


def test_no_checkpoint(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"nowhere: does not exist; expected a run directory"):
        load_trained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither a run directory"):
        load_trained(tmp_path)
    _, folder = saved()
    (folder / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_trained(folder)
    (tmp_path / "text.ckpt").write_text("no")
    with pytest.raises(CheckpointError, match=r"text\.ckpt: is truncated, or is not a checkpoint at all"):
        load_trained(tmp_path / "text.ckpt")


def change(folder, **changes):
    path = folder / "checkpoints" / "last.ckpt"
    torch.save(torch.load(path) | changes, path)


def test_a_checkpoint_that_does_not_fit_itself(saved):
    model, folder = saved()
    change(folder, state_dict={k: v for k, v in model.state_dict().items() if "norm" not in k})
    with pytest.raises(CheckpointError, match=r"last\.ckpt: does not fit its own architecture: Missing"):
        load_trained(folder)


def test_an_architecture_that_is_none(saved):
    model, folder = saved()
    change(folder, architecture=model.architecture() | {"transformer": TRANSFORMER | {"dim": -1}})
    with pytest.raises(CheckpointError, match=r"last\.ckpt: describes no possible model: .*dim"):
        load_trained(folder)


def test_the_data_are_not_described(saved):
    _, folder = saved()
    (folder / "config.yaml").write_text("model: {}\n")
    with pytest.raises(DataError, match=r"config\.yaml: has no data section"):
        load_trained(folder)
    (folder / "config.yaml").write_text("data: {class_path: Nothing}\n")
    with pytest.raises(DataError, match=r"config\.yaml: describes data that cannot be made"):
        load_trained(folder)
    (folder / "config.yaml").write_text("data: [\n")
    with pytest.raises(DataError, match=r"config\.yaml: cannot be read"):
        load_trained(folder)
