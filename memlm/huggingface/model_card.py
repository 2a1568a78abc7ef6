"""The README.md of an exported folder: what the model is, what it cost, what it reached, how to load it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import yaml
from torch import Tensor, nn

from memlm.errors import DataError
from memlm.flops import count
from memlm.huggingface.exported_tokenizer import end_of_document
from memlm.run_directory import RunFiles
from memlm.run_metrics import read_metrics
from memlm.trained import TrainedModel

_HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- memlm
# license: fill in the license under which you publish this model
---
"""


def model_card(
    trained: TrainedModel, config: Mapping[str, Any], losses: Mapping[str, float], title: str
) -> str:
    """The text of a model card.

    Args:
        trained: The model.
        config: Content of the folder's ``config.json``.
        losses: Validation loss (nats a token) by format of the values; empty if it was not measured.
        title: Name of the model.
    """
    sections = [
        f"{_HEADER}\n# {title}",
        _summary(trained, config),
        "## Use\n\n" + _use(trained, config, title),
        "## Size and cost\n\n" + _costs(trained, config),
    ]
    if losses:
        sections.append("## What the format of the values costs\n\n" + loss_table(losses))
    if results := _results(trained.run, trained.step):
        sections.append("## Results of the run\n\n" + results)
    architecture = yaml.safe_dump(_plain(trained.architecture), sort_keys=False).rstrip()
    sections.append(f"## Architecture\n\n```yaml\n{architecture}\n```")
    sections.append(
        "## License\n\nNot stated. Fill it in here and in the header before you publish this model."
    )
    return "\n\n".join(sections) + "\n"


def loss_table(losses: Mapping[str, float]) -> str:
    """A table in Markdown of losses by format of the values; the first is what the others are compared to."""
    baseline = next(iter(losses.values()))
    rows = [
        (name, f"{loss:.6f}", "" if index == 0 else f"{loss - baseline:+.6f}")
        for index, (name, loss) in enumerate(losses.items())
    ]
    return _table(("values", "validation loss, nats a token", "difference"), rows)


def _summary(trained: TrainedModel, config: Mapping[str, Any]) -> str:
    kind = str(trained.architecture["class_path"]).rsplit(".", 1)[-1]
    steps = "" if trained.step is None else f" in {trained.step:,} steps"
    tokens = "" if not trained.tokens else f" on {trained.tokens:,} tokens{steps}"
    return (
        f"A language model ({kind}) trained by memlm{tokens}, in sequences of {trained.context:,} tokens. "
        f"Here it is a `{config['architectures'][0]}`."
    )


def _use(trained: TrainedModel, config: Mapping[str, Any], title: str) -> str:
    own = config["model_type"] == "memlm"
    remote = ", trust_remote_code=True" if own else ""
    eos = end_of_document(trained.tokenizer)
    note = (
        "The model was trained on documents joined by the end-of-document token: a prompt begins with it."
        + (
            " `modeling_memlm.py` in this folder is the code of the model; read it before you trust it."
            if own
            else ""
        )
    )
    lines = [
        "```python",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if eos else ''}",
        "",
    ]
    lines.append(f'model = AutoModelForCausalLM.from_pretrained("{title}"{remote})')
    if eos is not None:
        lines += [
            f'tokenizer = AutoTokenizer.from_pretrained("{title}"{remote})',
            f"prompt = {json.dumps(eos)}  # and the beginning of a text",
            'inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)',
            "output = model.generate(**inputs, max_new_tokens=32)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    else:
        file = config["memlm_tokenizer"]
        note += f" Its tokenizer, `{file}`, is not in a format that `AutoTokenizer` reads; memlm reads it."
    lines.append("```")
    return note + "\n\n" + "\n".join(lines) + "\n\nIn memlm: `memlm generate`, `memlm import`."


def _costs(trained: TrainedModel, config: Mapping[str, Any]) -> str:
    counts = count(trained.model, trained.context)
    # Quantised values are no parameters of a module, and have not been counted in the total.
    tables = [cast(Tensor, pool.values) for pool in trained.model.pools.values()]
    apart = sum(table.numel() for table in tables if not isinstance(table, nn.Parameter))
    rows = [
        ("parameters", f"{counts.total + apart:,}"),
        ("of them in value tables", f"{counts.memory:,}"),
        ("used by a token", f"{counts.active:,}"),
        ("forward FLOPs a token", f"{counts.flops_per_token:,}"),
        ("value rows read by a token", f"{counts.values_read_per_token:,}"),
        ("parameters stored as", config["torch_dtype"]),
    ]
    if counts.memory:
        rows.append(("values stored as", config["values_format"]))
    return _table(("", ""), rows)


def _results(run: RunFiles | None, step: int | None) -> str:
    """The last validation of a run until a step, and its test."""
    if run is None:
        return ""
    parts = []
    try:
        rows = read_metrics(run.metrics) if run.metrics.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(run.metrics, f"cannot be read: {error}") from error
    validated = [row for row in rows if any(name.startswith("val/") for name in row)]
    validated = [row for row in validated if step is None or row["step"] <= step]
    if validated:
        last = validated[-1]
        found = [(name, f"{value:.6g}") for name, value in last.items() if name.startswith("val/")]
        parts.append(f"Validation at step {last['step']:,.0f}:\n\n" + _table(("metric", "value"), found))
    if run.test.exists():
        try:
            tested = json.loads(run.test.read_text(encoding="utf-8"))
            found = [(name, f"{value:.6g}") for name, value in tested.items() if name.startswith("test/")]
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(run.test, f"is not the JSON of a test: {error}") from error
        where = f" at step {tested['step']:,}" if isinstance(tested.get("step"), int) else ""
        parts.append(f"Test{where}:\n\n" + _table(("metric", "value"), found))
    return "\n\n".join(parts)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(value: Any) -> Any:
    """With tuples as lists, which YAML knows."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
