"""What a task asks of a model, in texts: how likely continuations are, and what it writes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from memlm.errors import ConfigError, UserError
from memlm.evaluation.likelihood import Scored, score, score_texts
from memlm.generation.decoding import Sampling, generate
from memlm.generation.streamed_text import StreamedText
from memlm.tokenizers import Tokenizer

Item = TypeVar("Item")


class AnswerTooLong(UserError):
    """An answer whose likelihood is asked for has more tokens than the model's context."""

    def __init__(self, answer: str, tokens: int, context: int) -> None:
        super().__init__(
            f"the answer {answer.strip()[:40]!r} has {tokens} tokens; expected at most {context}, the "
            "model's context"
        )


@dataclass(frozen=True)
class Prompt:
    """What comes before an answer.

    Args:
        question: What is to be continued.
        shots: Solved examples before it, each with all that separates it from the next.
        description: What stands before the shots.
    """

    question: str
    shots: tuple[str, ...] = ()
    description: str = ""

    def text(self, dropped: int = 0) -> str:
        """The whole text, without so many of the first shots."""
        return self.description + "".join(self.shots[dropped:]) + self.question


@dataclass(frozen=True)
class Reply:
    """What a model made of a prompt.

    Args:
        prompt: The text that the model saw, before any cut.
        scores: Of each continuation asked for.
        texts: What it wrote.
        dropped_shots: How many of the first shots were left out for want of room in the context.
        cut: Whether the question alone left no room: its beginning was cut away.
    """

    prompt: str
    scores: tuple[Scored, ...] = ()
    texts: tuple[str, ...] = ()
    dropped_shots: int = 0
    cut: bool = False


class Evaluator:
    """A model with its tokenizer, as this process of several asks it.

    A prompt begins with the end-of-document token, as documents did in training. The tokens of a continuation
    are those that it has in the joined text, if there the prompt's tokens are the same as alone, else those
    that it has by itself. White space at the end of a prompt is taken to belong to the continuation, as
    tokenizers join a word to the space before it (so does lm-evaluation-harness).

    Where a prompt does not fit into the context together with what follows, its first shots are dropped, as
    many as need be; where even the question does not, its beginning is cut away. Both are told in the reply.

    Args:
        model: Gives logits ``[B, T, vocab]`` for tokens ``[B, T]``; a Transformer.
        tokenizer: The tokenizer it was trained with.
        context: Most tokens that it can look at.
        batch_tokens: Tokens, padding included, that likelihoods are computed of at once.
        batch_size: Prompts that are continued at once.
        rank: Number of this process.
        world: Number of processes; each evaluates every ``world``-th example.
        apart: What all processes enter before they ask, each what it likes, and leave before they meet again.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        context: int,
        *,
        batch_tokens: int = 4096,
        batch_size: int = 16,
        rank: int = 0,
        world: int = 1,
        apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.context = context
        self.batch_tokens, self.batch_size = batch_tokens, batch_size
        self.rank, self.world, self.apart = rank, world, apart

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of the items."""
        return list(items[self.rank :: self.world])

    def gather(self, items: list[Item]) -> list[Item]:
        """All items in order, of what each process made of its `share`; all processes must call it."""
        if self.world == 1:
            return items
        parts: list[list[Item]] = [[] for _ in range(self.world)]
        torch.distributed.all_gather_object(parts, items)
        longest = max(map(len, parts))
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def log_likelihoods(self, requests: Sequence[tuple[Prompt, Sequence[str]]]) -> list[Reply]:
        """The log-likelihood (nats) of every continuation of every prompt.

        Args:
            requests: Prompts, each with its continuations, none of them empty.

        Raises:
            AnswerTooLong: A continuation is longer than the context.
        """
        replies, pairs = [], []
        for prompt, continuations in requests:
            reply, prompt_pairs = self._fit_continuations(prompt, continuations)
            replies.append(reply)
            pairs.append(prompt_pairs)
        scored = iter(score(self.model, [p for part in pairs for p in part], self.context, self.batch_tokens))
        return [
            Reply(reply.prompt, tuple(next(scored) for _ in part), (), reply.dropped_shots, reply.cut)
            for reply, part in zip(replies, pairs, strict=True)
        ]

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        sampling: Sampling = Sampling(),
        samples: int = 1,
    ) -> list[Reply]:
        """What the model writes after every prompt.

        Args:
            prompts: The prompts.
            max_new_tokens: Most tokens of a continuation.
            stop: Texts at which a continuation ends; they are not part of it.
            sampling: How tokens are chosen; by default the likeliest.
            samples: Continuations of each prompt.

        Raises:
            ConfigError: ``max_new_tokens`` leaves no room for a prompt in the context.
        """
        if max_new_tokens >= self.context:
            raise ConfigError(
                "max_new_tokens",
                f"is {max_new_tokens}; expected less than the context of {self.context} tokens",
            )
        replies, ids = [], []
        for prompt in prompts:
            reply, tokens = self._fit_prompt(prompt, self.context + 1 - max_new_tokens)
            replies.append(reply)
            ids += [tokens] * samples
        streams = [StreamedText(self.tokenizer, stop, context) for context in ids]

        def take(number: int, token: int) -> bool:
            streams[number].push(token)
            return streams[number].stopped

        generate(
            self.model,
            ids,
            max_new_tokens,
            sampling,
            eos_id=self.tokenizer.eos_id,
            on_token=take,
            batch_size=self.batch_size,
        )
        for stream in streams:
            stream.finish()
        texts = [stream.text for stream in streams]
        return [
            Reply(
                reply.prompt,
                (),
                tuple(texts[i * samples : (i + 1) * samples]),
                reply.dropped_shots,
                reply.cut,
            )
            for i, reply in enumerate(replies)
        ]

    def text_likelihoods(self, texts: Sequence[str]) -> list[Scored]:
        """The log-likelihood (nats) of whole texts of any length, each a document of its own."""
        ids = [self.tokenizer.encode(text) for text in texts]
        return score_texts(self.model, ids, self.context, self.tokenizer.eos_id, self.batch_tokens)

    # -- fitting into the context

    def encode_pair(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt, the end-of-document token first, and of its continuation."""
        end = len(prompt.rstrip())
        prompt, continuation = prompt[:end], prompt[end:] + continuation
        encode = self.tokenizer.encode
        before, joined = encode(prompt), encode(prompt + continuation)
        stable = len(joined) > len(before) and joined[: len(before)] == before
        after = joined[len(before) :] if stable else encode(continuation)
        return [self.tokenizer.eos_id, *before], after

    def _fit_continuations(
        self, prompt: Prompt, continuations: Sequence[str]
    ) -> tuple[Reply, list[tuple[list[int], list[int]]]]:
        for dropped in range(len(prompt.shots) + 1):
            text = prompt.text(dropped)
            pairs = [self.encode_pair(text, continuation) for continuation in continuations]
            # The last token of a continuation is predicted, and never looked at.
            fits = all(len(before) + len(after) - 1 <= self.context for before, after in pairs)
            if fits:
                break
        for continuation, (_, after) in zip(continuations, pairs, strict=True):
            if len(after) > self.context:
                raise AnswerTooLong(continuation, len(after), self.context)
        return Reply(text, dropped_shots=dropped, cut=not fits), pairs

    def _fit_prompt(self, prompt: Prompt, room: int) -> tuple[Reply, list[int]]:
        for dropped in range(len(prompt.shots) + 1):
            text = prompt.text(dropped)
            ids = [self.tokenizer.eos_id, *self.tokenizer.encode(text)]
            fits = len(ids) <= room
            if fits:
                break
        return Reply(text, dropped_shots=dropped, cut=not fits), ids[-room:]
