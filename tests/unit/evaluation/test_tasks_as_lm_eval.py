"""Prompts and metrics are those of lm-evaluation-harness: its tasks run on the same rows and model."""

import json
import os
import random
from pathlib import Path

import pytest
import yaml
from byte_model import evaluator, greedy, log_likelihood

for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # before the packages are imported
    os.environ[variable] = "1"
lm_eval = pytest.importorskip("lm_eval", reason="optional: memlm[lm-eval]")

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.tasks.hellaswag import utils as hellaswag_utils  # noqa: E402

from memlm.evaluation.multiple_choice import ARC, MMLU, PIQA, HellaSwag, OpenBookQA  # noqa: E402
from memlm.evaluation.question_answering import NQOpen  # noqa: E402

TASKS = Path(lm_eval.__file__).parent / "tasks"
WORDS = ["red", "green", "[step]", "Bridge", "over", "the", "a river.", "Who", "is", "Ünter"]


class WholePasses(LM):
    """A model that computes every request by itself, from the whole sequence."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def loglikelihood(self, requests, disable_tqdm=False):
        scored = []
        for request in requests:
            prompt, continuation = request.args
            end = len(prompt.rstrip())  # as lm-evaluation-harness's own models do
            nats = log_likelihood(self.model, prompt[:end], prompt[end:] + continuation)
            scored.append((nats, False))
        return scored

    def generate_until(self, requests, disable_tqdm=False):
        texts = []
        for request in requests:
            prompt, options = request.args
            text = greedy(self.model, prompt, options["max_gen_toks"])
            for stop in options["until"]:
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def say(draw, most=5):
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def run_lm_eval(monkeypatch, tmp_path, name, rows, **changes):
    """Figures of one of lm-evaluation-harness's tasks on rows of ours, without shots."""
    loader = yaml.SafeLoader(open(TASKS / name, encoding="utf-8"))  # noqa: SIM115
    loader.add_constructor("!function", lambda _, node: node.value)
    config = loader.get_single_data()
    for key in ("tag", "include", "process_docs", "dataset_path", "dataset_name", "training_split",
                "validation_split", "test_split", "fewshot_split", "fewshot_config", "metadata"):  # fmt: skip
        config.pop(key, None)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
    }
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = ConfigurableTask(config={**config, **data, **changes, "task": "own"})
    task.set_config("num_fewshot", 0)
    results = evaluate(WholePasses(evaluator().model), {"own": task}, bootstrap_iters=0)
    samples = sorted(results["samples"]["own"], key=lambda sample: sample["doc_id"])
    figures = {key.split(",")[0]: value for key, value in results["results"]["own"].items()}
    return figures, samples, str(path)


def check_choices(task, figures, samples):
    result = task.run(evaluator(), records=True)
    for record, sample in zip(result.records, samples, strict=True):
        assert (
            [(record["prompt"], f" {choice}") for choice in record["choices"]]
            == [(arguments["arg_0"], arguments["arg_1"]) for arguments in sample["arguments"].values()]
            if isinstance(sample["arguments"], dict)
            else [tuple(a) for a in sample["arguments"]]
        )
        scores = [float(response[0][0]) for response in sample["resps"]]
        assert record["log_likelihoods"] == pytest.approx(scores, abs=1e-4)
        assert (record["acc"], record.get("acc_norm")) == (sample["acc"], sample.get("acc_norm"))
    for metric in {"acc", "acc_norm"} & set(figures):
        assert result.metrics[metric].value == pytest.approx(figures[metric])
    assert len({record["acc"] for record in result.records}) == 2  # right ones and wrong ones


def test_hellaswag(monkeypatch, tmp_path):
    draw = random.Random(0)
    rows = [
        {
            "activity_label": say(draw),
            "ctx_a": f"{say(draw)} [title] {say(draw)}",
            "ctx_b": say(draw),
            "endings": [f"{say(draw)} [substeps]  {say(draw, 9)}" for _ in range(4)],
            "label": str(draw.randrange(4)),
        }
        for _ in range(16)
    ]
    got = run_lm_eval(
        monkeypatch, tmp_path, "hellaswag/hellaswag.yaml", rows, process_docs=hellaswag_utils.process_docs
    )
    check_choices(HellaSwag(got[2]), *got[:2])


def test_piqa(monkeypatch, tmp_path):
    draw = random.Random(1)
    rows = [
        {"goal": say(draw), "sol1": say(draw), "sol2": say(draw), "label": draw.randrange(2)}
        for _ in range(12)
    ]
    got = run_lm_eval(monkeypatch, tmp_path, "piqa/piqa.yaml", rows)
    check_choices(PIQA(got[2]), *got[:2])


@pytest.mark.parametrize(
    ("cls", "name", "stem"),
    [(ARC, "arc/arc_easy.yaml", "question"), (OpenBookQA, "openbookqa/openbookqa.yaml", "question_stem")],
)
def test_arc_and_openbookqa(monkeypatch, tmp_path, cls, name, stem):
    draw = random.Random(2)
    rows = [
        {
            stem: say(draw),
            "choices": {"text": [say(draw, 8) for _ in range(4)], "label": list("ABCD")},
            "answerKey": draw.choice("ABCD"),
        }
        for _ in range(12)
    ]
    got = run_lm_eval(monkeypatch, tmp_path, name, rows)
    check_choices(cls(got[2]), *got[:2])


def test_mmlu(monkeypatch, tmp_path):
    draw = random.Random(3)
    rows = [
        {
            "question": f" {say(draw)} {number}?\n",
            "subject": "high_school_law",
            "choices": [say(draw) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for number in range(12)
    ]
    description = "The following are multiple choice questions (with answers) about high school law.\n\n"
    got = run_lm_eval(
        monkeypatch, tmp_path, "mmlu/default/_default_template_yaml", rows, description=description
    )
    check_choices(MMLU(got[2]), *got[:2])


def test_nq_open(monkeypatch, tmp_path):
    draw = random.Random(4)
    rows = [{"question": f"{say(draw)} {number}", "answer": [say(draw, 1)]} for number in range(6)]
    options = {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 6}
    # What the model writes is the answer of every second question.
    prompts = [f"Answer these questions:\n\nQ: {row['question']}?\nA:" for row in rows]
    model = evaluator().model
    for row, prompt in list(zip(rows, prompts, strict=True))[::2]:
        text = greedy(model, prompt, 6)
        for stop in options["until"]:
            text = text.split(stop)[0]
        row["answer"] = ["The " + text.strip().upper() or "x"]
    figures, samples, path = run_lm_eval(
        monkeypatch, tmp_path, "nq_open/nq_open.yaml", rows, generation_kwargs=options
    )
    result = NQOpen(path, shots=0, max_new_tokens=6, stop=options["until"]).run(evaluator(), records=True)
    for record, sample in zip(result.records, samples, strict=True):
        assert record["prediction"] == sample["filtered_resps"][0].strip()
        assert record["exact_match"] == sample["exact_match"]
    assert 0 < result.metrics["exact_match"].value == pytest.approx(figures["exact_match"])
