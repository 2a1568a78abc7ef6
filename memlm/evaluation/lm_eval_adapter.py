"""A memlm model for lm-evaluation-harness: ``lm_eval.simple_evaluate(model=MemlmLM.of("runs/x"), ...)``."""

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from memlm.errors import ConfigError, DataError
from memlm.evaluation.likelihood import score, score_texts
from memlm.evaluation.lm_eval_generation import GenerationOptions
from memlm.generation.decoding import generate
from memlm.generation.streamed_text import StreamedText
from memlm.trained import TrainedModel, load_trained

_MAX_NEW_TOKENS = 256
"""Of tasks that do not say, as in lm-eval's ``hf`` model."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_OF = ("path", "tokenizer", "dtype", "device")
_OPTIONS = ("add_bos_token", "max_length", "batch_tokens", "batch_size")


@register_model("memlm")
class MemlmLM(TemplateLM):
    """A trained model as the harness sees one; importing this module registers it as ``memlm``.

    Likelihoods are batched by length, and what several requests begin with (a question with its choices, the
    solved examples of a task) is computed once. Prompts are continued in batches of any lengths with a cache.
    All figures are those of lm-eval's ``hf`` model on the exported model, with one exception: there a rolling
    log-likelihood with ``add_bos_token`` counts the first token's own likelihood too, here never.

    Args:
        trained: The model.
        add_bos_token: Whether the end-of-document token, which documents begin after in training, stands
            before every prompt. An empty prompt is that token alone in either case, and a text of a rolling
            log-likelihood always comes after it.
        max_length: Most tokens that the model looks at; by default those it was trained with. Of longer
            prompts the beginning is cut away.
        batch_tokens: Tokens, padding included, that likelihoods are computed of at once.
        batch_size: Prompts that are continued at once.

    Raises:
        ConfigError: A number is not positive.
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        add_bos_token: bool = True,
        max_length: int | None = None,
        batch_tokens: int = 4096,
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        self.trained = trained
        self.add_bos_token = add_bos_token
        # A prompt has at least one token, and so has its continuation.
        self._max_length = trained.context if max_length is None else _whole("max_length", max_length, 2)
        self.batch_tokens = _whole("batch_tokens", batch_tokens, 1)
        self.batch_size = _whole("batch_size", batch_size, 1)
        self._device = trained.model.embedding.weight.device

    @classmethod
    def of(
        cls,
        path: str | Path,
        *,
        tokenizer: str | None = None,
        dtype: str | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> "MemlmLM":
        """The model of a run directory, a checkpoint or an exported folder.

        Args:
            path: Of the model.
            tokenizer: Its tokenizer, where the model does not say.
            dtype: Of the computation, ``float32`` or ``bfloat16``; by default that of the file.
            device: Where it runs.
            **options: See the class.

        Raises:
            ConfigError: An option is unknown or out of range.
            CheckpointError: There is no such model, or it cannot be read.
            DataError: The tokenizer cannot be read.
        """
        unknown = options.keys() - set(_OPTIONS)
        if unknown:
            names = ", ".join((*_OF, *_OPTIONS))
            raise ConfigError(min(unknown), f"is not an option of a memlm model; expected one of {names}")
        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError("dtype", f"is {dtype!r}; expected one of {', '.join(_DTYPES)}")
        parameters = None if dtype is None else _DTYPES[dtype]
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError("device", f"{device} cannot be used: {str(error).splitlines()[0]}") from None
        return cls(load_trained(path, tokenizer=tokenizer, dtype=parameters, device=device), **options)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "MemlmLM":
        """What the harness makes of ``model="memlm", model_args="path=runs/x,add_bos_token=False"``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "MemlmLM":
        """The same with ``model_args`` as a dictionary.

        Raises:
            ConfigError: See :meth:`of`; or there is no ``path``.
        """
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        # A limit for sizes that other models find by trying; here memory does not depend on a request.
        given.pop("max_batch_size", None)
        if str(given.get("batch_size", "")).startswith("auto"):
            del given["batch_size"]
        elif isinstance(given.get("batch_size"), str) and given["batch_size"].isdecimal():
            given["batch_size"] = int(given["batch_size"])
        options = {**arg_dict, **given}
        if "path" not in options:
            raise ConfigError("model_args.path", "is missing; expected the model: path=runs/x")
        return cls.of(**options)

    # -- what the harness asks about the model

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token, which also stands before every document."""
        return self.trained.tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """Most tokens that the model looks at."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens for a task that does not say how many: 256, or half of a shorter context."""
        return min(_MAX_NEW_TOKENS, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes caches of requests."""
        return self.trained.tokenizer.hash

    def get_model_info(self) -> dict[str, Any]:
        """What the results say about the model."""
        parameters = list(self.trained.model.parameters())
        return {
            "model_source": str(self.trained.source),
            "model_step": self.trained.step,
            "model_tokens": self.trained.tokens,
            "model_num_parameters": sum(parameter.numel() for parameter in parameters),
            "model_dtype": str(parameters[0].dtype).removeprefix("torch."),
            "add_bos_token": self.add_bos_token,
            "max_length": self.max_length,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; what spells the end-of-document token is encoded as ordinary text.

        Args:
            string: The text.
            add_special_tokens: Whether the end-of-document token comes first; None: as ``add_bos_token``.
        """
        ids = self.trained.tokenizer.encode(string)
        first = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id, *ids] if first else ids

    # -- what it computes

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods (nats) of continuations, and whether each is the likeliest.

        Raises:
            DataError: A continuation is empty or longer than the context.
        """
        for request in requests:
            if not request.args[1]:
                raise DataError(_place(request), "has an empty continuation, which has no likelihood")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = []
        for (context, text), before, after in requests:
            if not after or len(after) > self.max_length:
                raise DataError(
                    f"continuation {_shown(text)} of {_shown(context, end=True)}",
                    f"has {len(after)} tokens of its own; expected 1 to {self.max_length}, the context",
                )
            # Nothing but spaces, which have become part of the continuation, leaves an empty prompt.
            pairs.append((before or [self.prefix_token_id], after))
        with tqdm(total=len(pairs), desc="Log-likelihoods", disable=disable_tqdm) as bar:
            scored = score(self.trained.model, pairs, self.max_length, self.batch_tokens, bar.update)
        answers = [(found.log_likelihood, found.greedy) for found in scored]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods (nats) of whole texts of any length, each token predicted once."""
        texts = [request.args[0] for request in requests]
        encode = self.trained.tokenizer.encode
        ids = [encode(text) for text in tqdm(texts, desc="Tokenizing", disable=disable_tqdm)]
        windows = sum(-(-len(text) // self.max_length) for text in ids)
        with tqdm(total=windows, desc="Windows of texts", disable=disable_tqdm) as bar:
            scored = score_texts(
                self.trained.model, ids, self.max_length, self.prefix_token_id, self.batch_tokens, bar.update
            )
        answers = [found.log_likelihood for found in scored]
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, the end of the document, or the most tokens wanted.

        Samples depend on the seed (``seed`` among the ``generation_kwargs``, else the harness's seed of
        torch) and on the place of a request among those of the same options.

        Raises:
            ConfigError: An option of a task's ``generation_kwargs`` is unknown or out of range, or the tokens
                wanted leave no room for a prompt.
        """
        groups: dict[GenerationOptions, list[int]] = {}
        for number, request in enumerate(requests):
            options = GenerationOptions.of(request.args[1], self.max_gen_toks, torch.initial_seed())
            if options.max_new_tokens >= self.max_length:
                raise ConfigError(
                    "generation_kwargs.max_gen_toks",
                    f"of task {request.task_name} is {options.max_new_tokens}; expected less than the "
                    f"context of {self.max_length} tokens",
                )
            groups.setdefault(options, []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="Generations", disable=disable_tqdm) as bar:
            for options, numbers in groups.items():
                contexts = [requests[number].args[0] for number in numbers]
                for number, text in zip(numbers, self._continue(contexts, options, bar), strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _continue(self, contexts: list[str], options: GenerationOptions, bar: tqdm) -> list[str]:
        room = self.max_length - options.max_new_tokens
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        tokenizer = self.trained.tokenizer
        streams = [StreamedText(tokenizer, options.stops) for _ in prompts]
        lengths = [0] * len(prompts)

        def take(number: int, token: int) -> bool:
            lengths[number] += 1
            streams[number].push(token)
            ended = token == self.eot_token_id or streams[number].stopped
            bar.update(ended or lengths[number] == options.max_new_tokens)
            return ended

        written = generate(
            self.trained.model,
            prompts,
            options.max_new_tokens,
            options.sampling,
            eos_id=self.eot_token_id,
            on_token=take,
            batch_size=self.batch_size,
        )
        # Of all tokens at once, as the harness does: bytes that are no text may decode otherwise in parts.
        texts = [tokenizer.decode(new) for new in written]
        return [
            min((text.split(stop, 1)[0] for stop in options.stops), key=len, default=text) for text in texts
        ]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Refuses: models of this kind are no chat models.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("apply_chat_template", "is set, but a memlm model has no chat template")


def _place(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _shown(text: str, end: bool = False) -> str:
    if len(text) > 60:
        text = f"...{text[-57:]}" if end else f"{text[:57]}..."
    return repr(text)


def _whole(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(name, f"is {value!r}; expected a whole number of at least {least}")
    return value
