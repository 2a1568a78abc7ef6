"""lm-evaluation-harness gives the same through our adapter as its own ``hf`` model on the same weights."""

import json
import os
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import yaml

from memlm.__main__ import main
from memlm.export_verb import main as export

for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # before the packages are imported
    os.environ[variable] = "1"
pytest.importorskip("transformers", reason="an oracle only, no dependency")
pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
lm_eval = pytest.importorskip("lm_eval", reason="optional: memlm[lm-eval]")

CONTEXT = 96
TEXTS = [text for name in sorted(topics) if len((text := " ".join(topics[name].split())).split()) > 210]

CONFIG = {
    "run": {"name": "text"},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 150,
        "val_check_interval": 150,
        "limit_val_batches": 1,
        "enable_progress_bar": False,
        "logger": None,
    },
    "model": {
        "class_path": "memlm.DenseLM",
        "init_args": {
            "transformer": {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "feed_forward_dim": 64},
            "optimizer": {"learning_rate": 0.01, "schedule": {"warmup_steps": 5}},
        },
    },
    "data": {
        "class_path": "TextStream",
        "init_args": {
            "paths": ["text.jsonl"],
            "tokenizer": "tokenizer.json",
            "sequence_length": CONTEXT,
            "batch_size": 8,
            "validation_fraction": 0.1,
        },
    },
}


def write_lines(file: str, rows: list[dict]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(text: str, start: int, count: int) -> str:
    return " ".join(text.split()[start : start + count])


def write_task(name: str, rows: list[dict], **options) -> None:
    """A task YAML over a file of rows, as a user writes it."""
    write_lines(f"tasks/{name}.jsonl", rows)
    files = {"test": f"tasks/{name}.jsonl"}
    Path(f"tasks/{name}.yaml").write_text(
        yaml.safe_dump(
            {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": files},
                "test_split": "test",
                "fewshot_split": "test",
                **options,
            }
        )
    )


def metrics(*names: str) -> list[dict]:
    return [{"metric": name} for name in names]


def write_tasks(greedy) -> None:
    """Five task types; some of the prompts and texts are longer than the context."""
    Path("tasks").mkdir()
    choices = []
    for i in range(24):
        text, other = TEXTS[i], TEXTS[-1 - i]
        length = (4, 12, 100)[i % 3]
        answers = [words(text, length, 3), words(other, 2, 2), words(other, 9, 6), words(text, 1, 1)]
        choices.append(
            {"question": words(text, 0, length), "choices": answers[: 2 + i % 3], "gold": i % (2 + i % 3)}
        )
    multiple = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": metrics("acc", "acc_norm"),
    }
    write_task("choices", choices, **multiple)
    write_task("few_shot", choices, **multiple, num_fewshot=3)
    rows = []
    for i, length in enumerate([3, 7, 20, 150] * 4):
        text = words(TEXTS[i], 0, length)
        # What the model would say itself, of every other one: it is the likeliest.
        rows.append({"text": text, "last": greedy(text, 2) if i % 2 else " " + words(TEXTS[i], length, 2)})
    write_task(
        "last_words",
        rows,
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target="{{last}}",
        target_delimiter="",
        metric_list=metrics("perplexity", "acc"),
    )
    write_task(
        "whole_texts",
        [
            {"text": text}
            for text in [*(words(text, 0, 200) for text in TEXTS[:6]), "a", "Ünïcode 你好 \n  two  spaces"]
        ],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
    )
    prompts = [words(TEXTS[i], 5, (2, 30, 200)[i % 3]) for i in range(15)]
    write_task(
        "continuations",
        # A match is no accident.
        [
            {"prompt": p, "answer": greedy(p, 24).split(".")[0] if i % 2 else "something else"}
            for i, p in enumerate(prompts)
        ],
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n\n", "."], "max_gen_toks": 24, "do_sample": False},
        metric_list=metrics("exact_match"),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a trained run, the tasks, and the same model as transformers reads it."""
    from memlm.tokenizers.training import train_bpe
    from memlm.trained import load_trained

    folder = tmp_path_factory.mktemp("lm_eval")
    before = Path.cwd()
    os.chdir(folder)
    write_lines("text.jsonl", [{"text": text} for text in TEXTS])
    train_bpe(TEXTS, 600, "tokenizer.json")
    Path("fit.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["fit", "--config", "fit.yaml"]) == 0
    own = load_trained("runs/text")

    assert export(["runs/text", "exported"]) == 0
    tokenizer = own.tokenizer

    @torch.no_grad()
    def greedy(prompt: str, tokens: int) -> str:
        """Recomputed from all tokens each time, without a cache."""
        ids = [tokenizer.eos_id, *tokenizer.encode(prompt)][-(CONTEXT - tokens) :]
        new: list[int] = []
        while len(new) < tokens and tokenizer.eos_id not in new:
            new.append(int(own.model(torch.tensor([ids + new]))[0, -1].argmax()))
        return tokenizer.decode(new)

    write_tasks(greedy)
    yield own
    os.chdir(before)


def evaluate(model, tasks: list[str], **options) -> dict:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path="tasks", include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )


def theirs(add_bos_token: bool):
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained="exported", device="cpu", dtype="float32", batch_size=4, add_bos_token=add_bos_token
    )


def ours(own, add_bos_token: bool, **options):
    from memlm.evaluation.lm_eval_adapter import MemlmLM

    return MemlmLM(own, add_bos_token=add_bos_token, **options)


def responses(results: dict, task: str) -> list:
    """What the model said to each request of a task: (log-likelihood, greedy), log-likelihood or text."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for (response,) in sample["resps"]]


@pytest.mark.slow
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_same_accuracies_likelihoods_and_generations(trained, add_bos_token):
    tasks = ["choices", "few_shot", "last_words", "continuations"]
    own = evaluate(ours(trained, add_bos_token, batch_tokens=500, batch_size=4), tasks)
    other = evaluate(theirs(add_bos_token), tasks)
    for task in ("choices", "few_shot"):
        for metric in ("acc,none", "acc_norm,none"):
            assert own["results"][task][metric] == other["results"][task][metric]
        assert 0 < own["results"][task]["acc,none"] < 1
    assert own["results"]["last_words"]["acc,none"] == other["results"]["last_words"]["acc,none"]
    assert own["results"]["last_words"]["perplexity,none"] == pytest.approx(
        other["results"]["last_words"]["perplexity,none"], rel=1e-4
    )
    for task in ("choices", "few_shot", "last_words"):
        mine, expected = responses(own, task), responses(other, task)
        assert len(mine) == len(expected) > 15
        worst = max(abs(a[0] - b[0]) for a, b in zip(mine, expected, strict=True))
        assert worst < 1e-4
        assert [a[1] for a in mine] == [b[1] for b in expected]
    assert responses(own, "choices") != responses(own, "few_shot")
    assert {greedy for _, greedy in responses(own, "last_words")} == {True, False}
    assert len(set(responses(own, "continuations"))) > 5
    assert responses(own, "continuations") == responses(other, "continuations")
    matched = own["results"]["continuations"]["exact_match,none"]
    assert matched == other["results"]["continuations"]["exact_match,none"]
    if add_bos_token:
        assert matched == 7 / 15  # all whose answer is the model's own


@pytest.mark.slow
def test_same_perplexities(trained):
    own = evaluate(ours(trained, False, batch_tokens=500), ["whole_texts"])
    other = evaluate(theirs(False), ["whole_texts"])
    for metric in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
        assert own["results"]["whole_texts"][metric] == pytest.approx(
            other["results"]["whole_texts"][metric], rel=1e-5
        )
    mine, expected = responses(own, "whole_texts"), responses(other, "whole_texts")
    assert len(mine) == 8
    assert max(abs(a - b) for a, b in zip(mine, expected, strict=True)) < 1e-4


@pytest.mark.slow
def test_a_text_is_not_charged_for_the_token_before_it(trained):
    """With a leading token ``hf`` also counts that token after itself, which never happened in training."""
    texts = [" ".join(TEXTS[i].split()[:20]) for i in range(5)]
    write_task(
        "short_texts",
        [{"text": text} for text in texts],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=metrics("bits_per_byte"),
    )
    own = responses(evaluate(ours(trained, True), ["short_texts"]), "short_texts")
    without = responses(evaluate(ours(trained, False), ["short_texts"]), "short_texts")
    other = responses(evaluate(theirs(True), ["short_texts"]), "short_texts")
    eos = trained.tokenizer.eos_id

    @torch.no_grad()
    def likelihood(ids: list[int]) -> float:
        """Of all tokens but the first."""
        scores = trained.model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
        return float(scores[range(len(ids) - 1), ids[1:]].sum())

    encoded = [trained.tokenizer.encode(text) for text in texts]
    expected = [likelihood([eos, *ids]) for ids in encoded]
    assert own == without
    assert own == pytest.approx(expected, abs=1e-4)
    assert other == pytest.approx([likelihood([eos, eos, *ids]) for ids in encoded], abs=1e-4)
    assert all(a - b > 1 for a, b in zip(own, other, strict=True))


@pytest.mark.slow
def test_by_its_name_and_from_the_command_line(trained, capsys):
    import memlm.evaluation.lm_eval_adapter  # noqa: F401  registers the name

    by_name = evaluate(
        "memlm", ["choices"], model_args="path=runs/text,add_bos_token=False", batch_size="auto"
    )
    assert by_name["results"]["choices"] == evaluate(ours(trained, False), ["choices"])["results"]["choices"]
    assert by_name["config"]["model_num_parameters"] == sum(p.numel() for p in trained.model.parameters())

    from memlm.evaluation.lm_eval_verb import main as verb

    words = "--tasks choices,whole_* --include_path tasks --add_bos_token false --limit 7 --bootstrap_iters 0"
    assert verb(["runs/text", *words.split(), "--output", "out.json", "--log_samples"]) == 0
    printed = capsys.readouterr().out
    assert "|choices" in printed and "acc_norm" in printed and "|whole_texts" in printed
    written = json.loads(Path("out.json").read_text())
    assert "samples" not in written
    expected = evaluate(ours(trained, False), ["choices", "whole_texts"], limit=7)
    for task in ("choices", "whole_texts"):
        assert written["results"][task] == json.loads(json.dumps(expected["results"][task]))
    records = [json.loads(line) for line in Path("out.samples.jsonl").read_text().splitlines()]
    assert [r["task"] for r in records] == ["choices"] * 7 + ["whole_texts"] * 7
    assert records[3]["doc"]["question"] == words_of("choices", 3)["question"]


@pytest.mark.slow
def test_the_task_of_the_documentation(trained, capsys):
    from memlm.evaluation.lm_eval_verb import main as verb

    page = (Path(__file__).parents[2] / "docs/lm_eval.md").read_text()
    task, rest = page.split("```yaml\n")[1].split("```", 1)
    row = json.loads(rest.split("`")[1])
    Path("my_tasks").mkdir()
    Path("my_tasks/my_questions.yaml").write_text(task)
    write_lines("my_tasks/questions.jsonl", [row] * 3)
    assert verb(["runs/text", "--tasks", "my_questions", "--include_path", "my_tasks"]) == 0
    table = capsys.readouterr().out
    assert "|my_questions|" in table and "acc_norm" in table


def words_of(task: str, number: int) -> dict:
    return json.loads(Path(f"tasks/{task}.jsonl").read_text().splitlines()[number])
