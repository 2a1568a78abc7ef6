"""``memlm export``: a trained model as a folder that Hugging Face's ``transformers`` loads."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.usage_errors import UsageError
from memlm.verb_parser import VerbParser, positive

if TYPE_CHECKING:
    from memlm.trained import TrainedModel

_DESCRIPTION = """\
Write a Hugging Face folder: config.json, safetensors, tokenizer, generation config and a model card.

MODEL is a run directory (its last checkpoint), a .ckpt file or an exported folder; OUT must be new or empty.
Dense models load as LlamaForCausalLM (Mistral, Qwen2), mixtures of experts as MixtralForCausalLM where that
computes the same; all others bring their code, modeling_memlm.py, and load with trust_remote_code=True."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def main(arguments: list[str]) -> int:
    """Runs ``memlm export``."""
    options = _parser().parse_args(arguments)
    # Seconds of imports, which --help need not wait for.
    from memlm.huggingface.export import check_free, export
    from memlm.huggingface.model_card import loss_table
    from memlm.trained import load_trained

    check_free(options.out)
    trained = load_trained(options.model, tokenizer=options.tokenizer)
    losses = None
    if options.measure:
        losses = _measure(trained, options.values, options.measure)
        print(loss_table(losses))
    export(
        trained,
        options.out,
        dtype=options.dtype,
        values=options.values,
        shard_bytes=options.shard_size,
        losses=losses,
    )
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"Written to {options.out}: {size / 1e6:,.1f} MB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser("memlm export", _DESCRIPTION)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="run directory, .ckpt file or exported folder")
    add("out", type=Path, metavar="OUT", help="folder to write; must be new or empty")
    # As memlm.huggingface.export.DTYPES and memlm.memory.quantised.FORMATS, whose modules import torch.
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all parameters but the value tables [as they were saved]",
    )
    add(
        "--values",
        choices=("float32", "bfloat16", "int8", "fp8"),
        help="format of the value tables; int8 and fp8 have a scale for each row [as they were saved]",
    )
    add(
        "--shard_size",
        type=_bytes,
        default=5 * 10**9,
        metavar="SIZE",
        help="most bytes of a safetensors file, e.g. 500MB; a larger tensor has a file of its own [5GB]",
    )
    add(
        "--measure",
        type=positive,
        metavar="N",
        help="also measure the loss on N batches of the run's validation data, with the values as they were "
        "saved and as they are exported",
    )
    add("--tokenizer", metavar="NAME", help="bytes or a tokenizer's file [the run's]")
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.upper())
    if match is None or float(match[1]) * _UNITS[match[2]] < 1:
        raise argparse.ArgumentTypeError(f"is {text}, must be a size such as 500MB or 5GB")
    return round(float(match[1]) * _UNITS[match[2]])


def _measure(trained: "TrainedModel", values: str | None, number: int) -> dict[str, float]:
    """Loss (nats a token) on the run's validation data, by format of the values: as they are, as exported."""
    from itertools import chain, islice

    from memlm.evaluation.quantisation_loss import measure_loss
    from memlm.huggingface.export import values_format
    from memlm.memory.quantised import QUANTISED

    own = values_format(trained.model)
    if own is None or values is None or values == own:
        raise UsageError(
            "--measure: the values are exported as they are, which costs nothing; give another --values"
        )
    if own in QUANTISED:
        raise UsageError(
            f"--measure: {trained.source} holds {own} values; measure the run that they come from"
        )
    batches = list(islice(chain.from_iterable(_validation_data(trained)), number))
    return measure_loss(trained.model, batches, [own, values])


def _validation_data(trained: "TrainedModel") -> Any:
    """The loaders of the run's validation data."""
    import yaml

    import data_modules
    from data_modules.base import LanguageDataModule
    from memlm.discovery import import_all
    from memlm.errors import DataError
    from memlm.meta_model import instantiate

    if trained.run is None or not trained.run.config.exists():
        raise UsageError(f"--measure: {trained.source} belongs to no run whose validation data could be read")
    import_all(data_modules)
    try:
        section = yaml.safe_load(trained.run.config.read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise DataError(trained.run.config, f"has no readable data section: {error}") from error
    data = instantiate(LanguageDataModule, section)
    data.prepare_data()
    data.setup("validate")
    return data.val_dataloader()
