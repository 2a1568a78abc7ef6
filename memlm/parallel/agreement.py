"""Ranks that were started with different settings, data or versions: found out before anything is built.

They would train different models, or wait for one another without end. Each rank lays down what it was
started with in the store at which the ranks met; the first compares, and all read what it found.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import memlm
from memlm.errors import ConfigError, UserError
from memlm.resume import flatten, plain

_LONGEST = 120
"""Characters of a value in a message."""


def agree(
    store: dist.Store, rank: int, world: int, claims: Callable[[], dict[str, Any]], timeout: timedelta
) -> None:
    """Compare what all ranks claim.

    Args:
        store: That all ranks have, used for this alone.
        rank: Of this process.
        world: Number of ranks.
        claims: Gives plain values by dotted key, those that are likelier at fault first.
        timeout: For which to wait for a rank.

    Raises:
        ConfigError: On all ranks, where a value is not the same on all: names the key, the values, and who
            has them.
        UserError: The claims of some rank could not be made.
    """
    failure: UserError | None = None
    try:
        said = json.dumps(claims(), default=str)
    except UserError as error:
        failure, said = error, json.dumps({_FAILED: str(error)})
    store.set(f"claims/{rank}", said)
    if rank == 0:
        store.wait([f"claims/{other}" for other in range(world)], timeout)
        found = _compare([store.get(f"claims/{other}").decode() for other in range(world)])
        store.set("verdict", json.dumps(found))
    store.wait(["verdict"], timeout)
    verdict = json.loads(store.get("verdict"))
    if failure is not None:
        raise failure
    if verdict is not None:
        key, message = verdict
        raise ConfigError(key, message) if key != _FAILED else UserError(message)


_FAILED = "failed"


def _compare(texts: list[str]) -> tuple[str, str] | None:
    """The first key in which what the ranks say differs, and how; None if they say the same."""
    if len(set(texts)) == 1:
        return None
    claims: list[dict[str, Any]] = [json.loads(text) for text in texts]
    for rank, claim in enumerate(claims):
        if _FAILED in claim:
            return _FAILED, f"rank {rank}: {claim[_FAILED]}"
    keys = list(dict.fromkeys(key for claim in claims for key in claim))
    differing = [key for key in keys if len({_shown(claim, key) for claim in claims}) > 1]
    if not differing:  # in their order alone
        return None
    key, *others = differing
    holders: dict[str, list[int]] = {}
    for rank, claim in enumerate(claims):
        holders.setdefault(_shown(claim, key), []).append(rank)
    values = ", ".join(f"{_cut(value)} on {_named(ranks)}" for value, ranks in holders.items())
    more = f"; so do {', '.join(others[:5])}" if others else ""
    more += f" and {len(others) - 5} others" if len(others) > 5 else ""
    return key, f"differs between the processes, which must be started alike: it is {values}{more}"


def _shown(claim: dict[str, Any], key: str) -> str:
    return json.dumps(claim[key]) if key in claim else "not set"


def _cut(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."


def _named(ranks: list[int]) -> str:
    """``rank 1``, ``ranks 0-2, 5``."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    return f"rank{'s' * (len(ranks) > 1)} {', '.join('-'.join(map(str, part)) for part in parts)}"


def claims_of(trainer: Any, strategy: Any, config: dict[str, Any]) -> dict[str, Any]:
    """What a rank was started with.

    Args:
        trainer: With the module and the data that it is to run.
        strategy: Its strategy: its options, which are its plain public attributes, must be alike.
        config: Dotted keys of the whole configuration; empty where there is none.
    """
    claims: dict[str, Any] = {
        "memlm": f"{memlm.__version__}, source {_source_digest()}",
        "torch": torch.__version__,
        **config,
        **_of_module(trainer.lightning_module),
    }
    claims |= {f"trainer.{key}": getattr(trainer, key) for key in _OF_TRAINER}
    claims["trainer.strategy"] = type(strategy).__name__
    for key, value in sorted(vars(strategy).items()):
        if not key.startswith("_") and (value is None or isinstance(value, (bool, int, float, str))):
            claims[f"trainer.strategy.init_args.{key}"] = value
    seed = os.environ.get("PL_GLOBAL_SEED")
    # The Trainer knows what fit has been given only once it loads it.
    checkpoint = trainer.ckpt_path or config.get("ckpt_path")
    claims |= {"ckpt_path": checkpoint, "seed_everything": seed and int(seed)}
    return claims | _of_data(trainer.datamodule)


_OF_TRAINER = (
    "max_steps",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "val_check_interval",
    "limit_val_batches",
    "world_size",
)


def _of_module(module: Any) -> dict[str, Any]:
    if not hasattr(module, "architecture"):
        return {}
    sections = module.architecture() | {
        "optimizer": asdict(module.dense_options),
        "values_optimizer": module.values_options and asdict(module.values_options),
    }
    return {f"model.{key}": plain(value) for key, value in flatten(sections).items()}


def _of_data(data: Any) -> dict[str, Any]:
    """Not the paths: the same files may lie elsewhere, unless a configuration names them."""
    if not hasattr(data, "fingerprint"):
        return {}
    return {
        "data": type(data).__name__,
        "data.sequence_length": data.sequence_length,
        "data.batch_size": data.batch_size,
        "data.tokenizer (hash)": data.tokenizer.hash,
        "data (fingerprint of its files and options)": data.fingerprint(),
    }


@cache
def _source_digest() -> str:
    """Of memlm's own modules: a machine may have another state of them under the same version."""
    digest = hashlib.sha256()
    root = Path(memlm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def said_before(message: str) -> bool:
    """Whether another process that torchrun has started has ended with the same message before the ranks met.

    Elsewhere there is no place yet at which processes could tell: each then says it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=5),
        )
        return store.add(f"memlm_said_{attempt}/{digest_of([message])}", 1) > 1
    except (RuntimeError, KeyError, ValueError):
        return False


def digest_of(words: Iterable[str]) -> str:
    """A short name of some words."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
