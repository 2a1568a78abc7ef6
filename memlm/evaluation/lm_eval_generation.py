"""What a task of lm-evaluation-harness may ask of a generation: its ``generation_kwargs``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from memlm.errors import ConfigError
from memlm.generation.decoding import Sampling

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the same thing; the first of them that is given counts, as in the harness."""

_ONLY = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1}
"""Options of other libraries that tasks set to the value that changes nothing."""

_KNOWN = ("until", "do_sample", "temperature", "top_k", "top_p", "min_p", "seed", *_LENGTHS)


@dataclass(frozen=True)
class GenerationOptions:
    """How a request is continued.

    Args:
        stops: Texts at which a continuation ends; they are not part of it.
        max_new_tokens: Most tokens of a continuation.
        sampling: How tokens are chosen.
    """

    stops: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def of(cls, given: Mapping[str, Any], max_new_tokens: int, seed: int) -> "GenerationOptions":
        """Read ``generation_kwargs`` as lm-eval's own models do.

        Without ``do_sample`` tokens are sampled if a temperature above 0 is given; with ``do_sample: false``
        never, whatever the temperature. ``do_sample: true`` alone means a temperature of 1.

        Args:
            given: The task's ``generation_kwargs``, those of ``--gen_kwargs`` among them.
            max_new_tokens: If they do not say.
            seed: Of the sampling, if they do not say.

        Raises:
            ConfigError: An option is unknown, or its value is out of range.
        """
        for key, value in given.items():
            if key in _ONLY:
                if value is not None and value != _ONLY[key]:
                    _refuse(key, value, f"{_ONLY[key]}: nothing else is supported")
            elif key not in _KNOWN:
                raise ConfigError(
                    f"generation_kwargs.{key}", f"is not an option; expected one of {', '.join(_KNOWN)}"
                )
        length = next((key for key in _LENGTHS if given.get(key) is not None), None)
        most = max_new_tokens if length is None else _whole(given, length, 1)
        seed = seed if given.get("seed") is None else _whole(given, "seed", 0)
        return cls(_stops(given), most, _sampling(given, seed))


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    until = given.get("until")
    texts = [until] if isinstance(until, str) else [] if until is None else until
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        _refuse("until", until, "a text or a list of texts")
    # The harness takes an empty one for none.
    return tuple(dict.fromkeys(text for text in texts if text))


def _sampling(given: Mapping[str, Any], seed: int) -> Sampling:
    do_sample = given.get("do_sample")
    if not (do_sample is None or isinstance(do_sample, bool)):
        _refuse("do_sample", do_sample, "true or false")
    temperature = _number(given, "temperature", 0.0, float("inf"))
    if do_sample is None:
        do_sample = bool(temperature)
    if not do_sample:
        return Sampling()  # greedy, whatever else is set
    if temperature == 0:
        _refuse("temperature", 0, "more than 0, as do_sample is true")
    top_p = _number(given, "top_p", 0.0, 1.0)
    if top_p == 0:
        _refuse("top_p", 0, "more than 0 and at most 1")
    # 0 and -1 are other libraries' words for no limit.
    off = given.get("top_k") in (None, 0, -1)
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_k=None if off else _whole(given, "top_k", 1),
        top_p=top_p,
        min_p=_number(given, "min_p", 0.0, 1.0),
        seed=seed,
    )


def _whole(given: Mapping[str, Any], key: str, least: int) -> int:
    value = given[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        _refuse(key, value, f"a whole number of at least {least}")
    return value


def _number(given: Mapping[str, Any], key: str, least: float, most: float) -> float | None:
    value = given.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        _refuse(key, value, f"a number from {least:g}" + (f" to {most:g}" if most < float("inf") else " on"))
    return float(value)


def _refuse(key: str, value: Any, expected: str) -> NoReturn:
    raise ConfigError(f"generation_kwargs.{key}", f"is {value!r}; expected {expected}")
