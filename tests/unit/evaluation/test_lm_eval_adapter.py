"""The model of lm-evaluation-harness: against whole passes of the model, and its errors."""

import json
import os
import random
import re
import string
from functools import partial
from pathlib import Path

import pytest
import torch

for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # before the packages are imported
    os.environ[variable] = "1"
pytest.importorskip("lm_eval", reason="optional: memlm[lm-eval]")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from memlm.errors import CheckpointError, ConfigError, DataError  # noqa: E402
from memlm.evaluation import lm_eval_verb  # noqa: E402
from memlm.evaluation.lm_eval_adapter import MemlmLM  # noqa: E402
from memlm.evaluation.lm_eval_generation import GenerationOptions  # noqa: E402
from memlm.generation.decoding import Sampling  # noqa: E402
from memlm.memory import MemoryConfig, PEERConfig  # noqa: E402
from memlm.tokenizers.byte_tokenizer import ByteTokenizer  # noqa: E402
from memlm.trained import TrainedModel  # noqa: E402
from memlm.transformer import MoEConfig, Transformer, TransformerConfig  # noqa: E402
from memlm.usage_errors import UsageError  # noqa: E402

CONTEXT = 40
EOS = ByteTokenizer.eos_id
PARTS = {
    "dense": {},
    "experts": {"moe": MoEConfig(experts=4, top_k=2)},
    "memory": {"memory": MemoryConfig(half_keys=8, heads=2, reads=4, key_dim=8, layers=[1])},
    "PEER": {"memory": PEERConfig(half_keys=8, heads=2, reads=4, key_dim=8, layers=[1])},
}


def trained(parts: str = "dense") -> TrainedModel:
    torch.manual_seed(7)
    config = TransformerConfig(dim=16, layers=2, heads=2, feed_forward_dim=24)
    model = Transformer(257, config, **PARTS[parts]).double().eval().requires_grad_(False)
    for parameter in model.parameters():  # likelihoods far from uniform
        if parameter.dim() > 1:
            parameter.mul_(6)
    return TrainedModel(model, ByteTokenizer(), {}, context=CONTEXT, source=Path("here"))


@pytest.fixture
def adapter() -> MemlmLM:
    return MemlmLM(trained())


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(kind, {}, given, idx=0, metadata=("quiz", number, 1))
        for number, given in enumerate(arguments)
    ]


def alone(own: TrainedModel, before: list[int], after: list[int]) -> tuple[float, bool]:
    """By one pass over the whole sequence."""
    ids = (before + after)[-CONTEXT - 1 :]
    scores = own.model(torch.tensor([ids[:-1]]))[0, -len(after) :].double().log_softmax(-1)
    return float(scores[range(len(after)), after].sum()), scores.argmax(-1).tolist() == after


def answers_of(own: TrainedModel, before: list[int], count: int) -> list[int]:
    """The likeliest tokens up to the end of the document, each by one pass over the whole sequence."""
    new: list[int] = []
    while len(new) < count and EOS not in new:
        new.append(int(own.model(torch.tensor([before + new]))[0, -1].argmax()))
    return new


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("parts", PARTS)
def test_likelihoods(parts, add_bos_token):
    own = trained(parts)
    first = [EOS] if add_bos_token else []
    model = MemlmLM(own, add_bos_token=add_bos_token, batch_tokens=90)
    letters = random.Random(1)
    questions = ("".join(letters.choices(string.ascii_letters, k=20)) for _ in range(500))
    asked = ((question, answers_of(own, first + list(question.encode()), 1)) for question in questions)
    # A byte that is a text by itself.
    question, likeliest = next((question, chr(ids[0])) for question, ids in asked if ids[0] < 128)
    requests = [
        (question, " no"), (question, " yes, it is"), ("", "from nothing"), (question, likeliest),
        ("x" * 70, " after a long one"), ("spaces go over  ", "to this"), ("   ", "only spaces"),
        (question, "b" * CONTEXT),
    ]  # fmt: skip
    found = model.loglikelihood(ask("loglikelihood", *requests), disable_tqdm=True)
    expected = []
    for context, text in requests:
        stripped = context.rstrip()
        before = ([EOS] if not stripped and not add_bos_token else first) + list(stripped.encode())
        before = [EOS] if context == "" else before
        expected.append(alone(own, before, list((context[len(stripped) :] + text).encode())))
    assert [log for log, _ in found] == pytest.approx([log for log, _ in expected], abs=1e-8)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[3][1] and not found[1][1]


def test_rolling_likelihoods_of_texts_longer_than_the_context():
    own = trained()
    texts = ["", "a", "b" * CONTEXT, "to and fro " * 9]
    for add_bos_token in (True, False):
        model = MemlmLM(own, add_bos_token=add_bos_token)
        found = model.loglikelihood_rolling(
            ask("loglikelihood_rolling", *[(t,) for t in texts]), disable_tqdm=True
        )
        ids = [EOS, *texts[3].encode()]
        assert len(ids) == 100
        windows = [(ids[:1], ids[1:41]), (ids[40:41], ids[41:81]), (ids[59:81], ids[81:])]
        expected = [0.0, *(alone(own, [EOS], list(t.encode()))[0] for t in texts[1:3])]
        expected.append(sum(alone(own, *window)[0] for window in windows))
        assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_generations(add_bos_token):
    own = trained("memory")
    model = MemlmLM(own, add_bos_token=add_bos_token, batch_size=2)
    first = [EOS] if add_bos_token else []
    prompts = ["one", "", "a much longer prompt than the others, cut on the left", "two"]
    decode = own.tokenizer.decode
    expected = []
    for prompt in prompts:
        ids = (first + list(prompt.encode()))[-(CONTEXT - 12) :] or [EOS]
        expected.append(decode(answers_of(own, ids, 12)))
    stop = expected[3][5:7]
    options = {"until": [], "max_gen_toks": 12}
    requests = [(prompt, options) for prompt in prompts] + [("two", {"until": ["", stop], "max_tokens": 12})]
    found = model.generate_until(ask("generate_until", *requests), disable_tqdm=True)
    assert found == [*expected, expected[3].split(stop)[0]]
    assert len(set(found)) == 5


def test_a_document_that_ends_ends_the_generation(adapter):
    with torch.no_grad():
        adapter.trained.model.output.weight[EOS] = 100 * adapter.trained.model.norm.weight
    ids = answers_of(adapter.trained, [EOS, *b"go"], 12)
    assert EOS in ids
    text = adapter.trained.tokenizer.decode(ids[: ids.index(EOS)])
    assert adapter.generate_until(ask("generate_until", ("go", {"max_gen_toks": 12}))) == [text]


def test_samples_follow_the_seed_and_the_place(adapter):
    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "max_gen_toks": 10}
    same = ask("generate_until", *[("go", options)] * 4)
    torch.manual_seed(3)  # as the harness does with its own seed
    first = adapter.generate_until(same)
    torch.randn(5)
    assert adapter.generate_until(same) == first
    assert len(set(first)) == 4
    torch.manual_seed(4)
    assert adapter.generate_until(same) != first
    seeded = adapter.generate_until(ask("generate_until", *[("go", {**options, "seed": 3})] * 4))
    assert seeded == first


def test_length_of_generations(adapter):
    assert adapter.max_gen_toks == CONTEXT // 2
    assert MemlmLM(trained(), max_length=1000).max_gen_toks == 256
    message = re.escape(
        "generation_kwargs.max_gen_toks: of task quiz is 40; expected less than the context of 40"
    )
    with pytest.raises(ConfigError, match=message):
        adapter.generate_until(ask("generate_until", ("go", {"max_gen_toks": CONTEXT})))


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ("q", "", "task quiz, document 0: has an empty continuation"),
        ("", "", "task quiz, document 0: has an empty continuation"),
        ("why", "x" * 41, "continuation 'xxx.* of 'why': has 41 tokens of its own; expected 1 to 40"),
    ],
)
def test_impossible_continuations(adapter, context, continuation, message):
    with pytest.raises(DataError, match=message):
        adapter.loglikelihood(ask("loglikelihood", (context, continuation)))


def test_a_continuation_that_merges_into_the_prompt_is_named(adapter, monkeypatch):
    monkeypatch.setattr(adapter.trained.tokenizer, "encode", lambda text: [ord(c) for c in text[::2]])
    with pytest.raises(DataError, match="continuation 'y' of 'abx': has 0 tokens of its own"):
        adapter.loglikelihood(ask("loglikelihood", ("abx", "y")))


def test_answers_are_cached_by_the_harness(adapter, tmp_path, monkeypatch):
    cached = CachingLM(adapter, str(tmp_path / "answers.db"))
    requests = {
        "loglikelihood": [("a", "b"), ("c", "d")],
        "loglikelihood_rolling": [("some text",)],
        "generate_until": [("go", {"max_gen_toks": 5})],
    }
    first = {kind: getattr(cached, kind)(ask(kind, *given)) for kind, given in requests.items()}
    monkeypatch.setattr(adapter.trained, "model", None)
    again = {kind: getattr(cached, kind)(ask(kind, *given)) for kind, given in requests.items()}
    assert again == first


def test_options_agree_with_the_harness():
    """As far as its own models take them: what they call greedy, and how long."""
    cases = [
        {}, {"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}, {"temperature": 0.5},
        {"do_sample": True, "temperature": 2, "top_k": 5}, {"until": "\n", "max_tokens": 7},
        {"until": ["a", "b"], "max_new_tokens": 8, "max_tokens": 7}, {"max_gen_toks": 3, "max_new_tokens": 8},
        {"max_completion_tokens": 6, "do_sample": False},
    ]  # fmt: skip
    for given in cases:
        theirs = normalize_gen_kwargs(given, 256)
        own = GenerationOptions.of(given, 256, seed=1)
        assert own.max_new_tokens == theirs["max_gen_toks"]
        assert list(own.stops) == theirs["until"]
        sampled = theirs["do_sample"] and theirs.get("temperature", 0)
        assert own.sampling.temperature == (theirs["temperature"] if sampled else 0)
    given = {"do_sample": True, "top_k": 9, "top_p": 0.5, "min_p": 0.1, "num_beams": 1, "seed": 5}
    assert GenerationOptions.of(given, 4, seed=1) == GenerationOptions(
        (), 4, Sampling(temperature=1.0, top_k=9, top_p=0.5, min_p=0.1, seed=5)
    )
    assert GenerationOptions.of({"temperature": 1, "top_k": 0}, 4, seed=1).sampling == Sampling(1.0, seed=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"temprature": 1},
            "generation_kwargs.temprature: is not an option; expected one of until, do_sample",
        ),
        ({"num_beams": 4}, "generation_kwargs.num_beams: is 4; expected 1"),
        ({"do_sample": "yes"}, "generation_kwargs.do_sample: is 'yes'; expected true or false"),
        (
            {"do_sample": True, "temperature": 0.0},
            "generation_kwargs.temperature: is 0; expected more than 0",
        ),
        ({"temperature": "hot"}, "generation_kwargs.temperature: is 'hot'; expected a number from 0 on"),
        ({"temperature": -1}, "generation_kwargs.temperature: is -1; expected a number from 0 on"),
        ({"temperature": 1, "top_p": 1.5}, "generation_kwargs.top_p: is 1.5; expected a number from 0 to 1"),
        ({"temperature": 1, "top_p": 0}, "generation_kwargs.top_p: is 0; expected more than 0"),
        ({"temperature": 1, "top_k": 2.5}, "generation_kwargs.top_k: is 2.5; expected a whole number"),
        ({"max_gen_toks": 0}, "generation_kwargs.max_gen_toks: is 0; expected a whole number of at least 1"),
        ({"until": [3]}, r"generation_kwargs.until: is \[3\]; expected a text or a list of texts"),
        ({"temperature": 1, "seed": -1}, "generation_kwargs.seed: is -1"),
    ],
)
def test_wrong_options_of_generations(given, message):
    with pytest.raises(ConfigError, match=message):
        GenerationOptions.of(given, 16, seed=0)


def test_options_of_the_model(tmp_path):
    registered = get_model("memlm")
    assert registered is MemlmLM
    with pytest.raises(ConfigError, match=r"model_args.path: is missing; expected the model: path=runs/x"):
        registered.create_from_arg_string("add_bos_token=False")
    with pytest.raises(
        ConfigError, match="add_bos: is not an option of a memlm model; expected one of path, "
    ):
        registered.create_from_arg_string("path=x,add_bos=False")
    with pytest.raises(ConfigError, match="dtype: is 'int3'; expected one of float32, bfloat16"):
        registered.create_from_arg_obj({"path": "x", "dtype": "int3"})
    with pytest.raises(ConfigError, match="device: cda cannot be used: "):
        registered.create_from_arg_obj({"path": "x"}, {"device": "cda"})
    with pytest.raises(CheckpointError, match="nowhere: does not exist"):
        registered.create_from_arg_obj({"path": tmp_path / "nowhere"}, {"batch_size": "auto"})
    with pytest.raises(ConfigError, match="batch_size: is 0; expected a whole number of at least 1"):
        MemlmLM(trained(), batch_size=0)
    with pytest.raises(ConfigError, match="max_length: is 1; expected a whole number of at least 2"):
        MemlmLM(trained(), max_length=1)
    with pytest.raises(
        ConfigError, match="apply_chat_template: is set, but a memlm model has no chat template"
    ):
        MemlmLM(trained()).apply_chat_template([{"role": "user", "content": "hello"}])


# -- the verb


@pytest.fixture
def fails(tmp_path, monkeypatch):
    """Runs the verb in a folder with an empty tasks/, without the harness's own tasks; gives the error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    Path("tasks").mkdir()

    def run(*words: str) -> str:
        with pytest.raises((UsageError, DataError, ConfigError, CheckpointError)) as caught:
            lm_eval_verb.main(list(words))
        return str(caught.value)

    return run


def write_task(name: str, rows: str, **options) -> None:
    Path(f"tasks/{name}.jsonl").write_text(rows)
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"tasks/{name}.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{last}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **options,
    }
    Path(f"tasks/{name}.yaml").write_text(json.dumps(content))  # JSON is YAML


GOOD = '{"text": "a", "last": " b"}\n'


def test_usage(fails, monkeypatch):
    assert fails("m").startswith("--tasks: needed, but not set")
    assert fails("m", "--tasks", " , ").startswith("--tasks: needed, but not set")
    assert "MODEL" in fails("--tasks", "a")
    assert fails("m", "--tasks", "a", "--include_path", "no") == (
        "no: is not a folder; expected one of task YAMLs (--include_path)"
    )
    assert fails("m", "--tasks", "a", "--gen_kwargs", "greedy").startswith(
        "--gen_kwargs: is 'greedy'; expected"
    )
    assert fails("m", "--tasks", "a", "--gen_kwargs", "beams=3").startswith(
        "generation_kwargs.beams: is not an"
    )
    assert "--log_samples: needs --output" in fails("m", "--tasks", "a", "--log_samples")
    for words in (["--limit", "0"], ["--limit", "1.5"], ["--limit", "few"]):
        assert "must be a number of examples, or a share below 1" in fails("m", "--tasks", "a", *words)
    assert "--batch_size: is 0, must be" in fails("m", "--tasks", "a", "--batch_size", "0")
    assert "a/out.json: cannot be written: there is no folder a" in fails(
        "m", "--tasks", "a", "--output", "a/out.json"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fails("m", "--tasks", "a") == (
        "memlm lm-eval needs the package lm_eval: pip install 'memlm[lm-eval]'"
    )


@pytest.mark.parametrize("there", ["out.json", "out.samples.jsonl"])
def test_results_are_never_overwritten(fails, there):
    Path(there).write_text("kept")
    error = fails("m", "--tasks", "a", "--output", "out.json", "--log_samples")
    assert error == f"{there}: exists already; choose another --output or remove it"
    assert Path(there).read_text() == "kept"


def test_tasks_that_are_not_there(fails):
    write_task("capitals", GOOD)
    path = ("--include_path", "tasks")
    assert fails("m", "--tasks", "capitols", *path) == (
        "--tasks: no task, group or tag 'capitols' is known; did you mean capitals?"
    )
    assert "'xyz_*' is known; --include_path DIR adds" in fails("m", "--tasks", "xyz_*", *path)
    assert fails("m", "--tasks", "no.yaml", *path) == "no.yaml: is missing; expected the YAML of a task"
    # All is well with the task: the model is what is missing.
    assert fails("m", "--tasks", "capitals", *path).startswith("m: does not exist; expected a run directory")
    assert fails("m", "--tasks", "tasks/capitals.yaml").startswith("m: does not exist")


def test_tasks_that_cannot_be_run(fails):
    path = ("--include_path", "tasks")
    write_task("far", GOOD, dataset_path="somebody/something", dataset_kwargs={})
    error = fails("m", "--tasks", "far", *path)
    assert error.startswith("task far: needs what is not on this machine: ") and "somebody/something" in error
    write_task("lost", GOOD)
    Path("tasks/lost.jsonl").unlink()
    error = fails("m", "--tasks", "lost", *path)
    assert error.startswith("task lost: needs what is not on this machine: ") and "tasks/lost.jsonl" in error
    write_task("wrong_field", GOOD, doc_to_text="{{txet}}")
    error = fails("m", "--tasks", "wrong_field", *path)
    assert error.startswith("task wrong_field: cannot be loaded: ") and "txet" in error
    write_task("wrong_split", GOOD, test_split="validation")
    assert fails("m", "--tasks", "wrong_split", *path).startswith("task wrong_split: cannot be loaded: ")
    write_task("broken", "{not json\n")
    assert fails("m", "--tasks", "broken", *path).startswith("task broken: cannot be loaded: ")
    write_task("code", GOOD, unsafe_code=True)
    assert fails("m", "--tasks", "code", *path) == (
        "--tasks: code runs code that the model writes, which is not done here"
    )


@pytest.mark.slow
def test_the_harness_s_own_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="'hellaswagg' is known; did you mean hellaswag"):
        lm_eval_verb.main(["m", "--tasks", "hellaswagg"])
    with pytest.raises(
        DataError, match=r"task hellaswag: needs what is not on this machine: .*Rowan/hellaswag"
    ):
        lm_eval_verb.main(["m", "--tasks", "hellaswag"])
