"""Programs that the model writes and tests judge: HumanEval and MBPP, pass@k."""

import math
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from memlm.errors import ConfigError
from memlm.evaluation.estimates import Measure
from memlm.evaluation.evaluator import Evaluator, Prompt
from memlm.evaluation.rows import Row, read_rows
from memlm.evaluation.sandbox.execution import Result, Sandbox
from memlm.evaluation.task import Outcome, Task
from memlm.generation.decoding import Sampling
from memlm.tokenizers import Tokenizer


@dataclass(frozen=True)
class Problem:
    """A program that is asked for.

    Args:
        name: The problem's id in its file.
        prompt: What the model continues.
        before: Source that a program begins with, before what the model writes.
        tests: Source that raises an exception if the program is wrong.
        solution: A right continuation.
    """

    name: str
    prompt: str
    before: str
    tests: str
    solution: str


class CodeTask(Task[Problem]):
    """Programs that the model writes, run with the problem's tests in a sandbox.

    - ``pass@k``: probability that of k samples at least one passes, estimated without bias from ``samples``
      of them, mean over the problems;
    - ``stopped``: share of the samples that the sandbox stopped, by a limit or as they tried what is not
      permitted, instead of the tests judging them.

    Args:
        path: The file of the problems.
        name: The task's name in tables and files; by default that of the class in lower case.
        limit: Ask for the first so many programs only.
        seed: Of the sampling.
        samples: Programs that the model writes for each problem.
        k: Of pass@k; none more than ``samples``.
        temperature: Of the sampling; 0 for the one likeliest program.
        top_p: Only the fewest likeliest tokens whose probabilities sum to this at least.
        max_new_tokens: Most tokens of a program.
        stop: Texts at which a program ends.
        allow_execution: Whether what the model writes may be run on this machine; nothing is without it.
        seconds: Time limit of a program and its tests, by the clock.
        memory_mb: Their address space (MiB).
        workers: Programs that run at once; null: as many as there are cores.

    Raises:
        ConfigError: An option is out of range.
    """

    stops: ClassVar[tuple[str, ...]] = ()
    """Where a program ends, if ``stop`` says nothing else."""

    def __init__(
        self,
        path: str,
        name: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        samples: int = 1,
        k: list[int] = [1],  # noqa: B006 (a tuple would read worse in a YAML)
        temperature: float = 0.2,
        top_p: float = 0.95,
        max_new_tokens: int = 512,
        stop: list[str] | None = None,
        allow_execution: bool = False,
        seconds: float = 10.0,
        memory_mb: int = 512,
        workers: int | None = None,
    ) -> None:
        super().__init__(path, name, limit=limit, seed=seed)
        self.samples, self.k = samples, sorted(set(k))
        self.max_new_tokens = max_new_tokens
        self.stop = list(self.stops if stop is None else stop)
        self.allow_execution = allow_execution
        self.seconds, self.memory_mb = seconds, memory_mb
        self.workers = _cores() if workers is None else workers
        self.check_least("samples", samples, 1)
        self.check_least("max_new_tokens", max_new_tokens, 1)
        self.check_least("seconds", seconds, 0.1)
        self.check_least("memory_mb", memory_mb, 128)
        self.check_least("workers", self.workers, 1)
        if not self.k or self.k[0] < 1 or self.k[-1] > samples:
            self.fail("k", f"is {k}; expected at least one number from 1 to samples, which is {samples}")
        if "" in self.stop:
            self.fail("stop", "holds an empty text, at which everything would end")
        if temperature == 0 and samples > 1:
            self.fail("samples", f"is {samples}, but all are the same at temperature 0; expected 1")
        try:
            self.sampling = Sampling(temperature, top_p=top_p, seed=seed)
        except ValueError as error:
            raise ConfigError(type(self).__name__, str(error)) from None

    @property
    def measures(self) -> Sequence[Measure]:
        # Values between 0 and 1 vary less than values of 0 and 1 with the same mean: of several samples the
        # interval of a share is rather too wide, but has a width even where no problem was solved.
        return [Measure(name, "share") for name in (*(f"pass@{k}" for k in self.k), "stopped")]

    def load(self) -> None:
        if not self.allow_execution:
            self.fail(
                "allow_execution",
                "is false; this task runs programs that the model writes, on this machine, in a sandbox "
                "without network and without access to files, with limits of time and memory. Expected true, "
                "to allow it",
            )
        super().load()
        _ = self.sandbox

    @cached_property
    def sandbox(self) -> Sandbox:
        """Where programs run.

        Raises:
            SandboxUnavailable: This system does not give what that takes.
        """
        return Sandbox(self.seconds, self.memory_mb)

    def check(self, tokenizer: Tokenizer, context: int) -> None:
        if self.max_new_tokens >= context:
            self.fail(
                "max_new_tokens",
                f"is {self.max_new_tokens}; expected less than {context} tokens, the model's context, to "
                "leave room for a problem",
            )

    def read(self, path: str) -> list[Problem]:
        problems = [self.problem(row) for row in self.rows(path)]
        twice = [name for name, count in Counter(problem.name for problem in problems).items() if count > 1]
        if twice:
            self.fail("path", f"is {path}, which has several problems with task_id {twice[0]}")
        return problems

    def rows(self, path: str) -> list[Row]:
        """The rows of a file that are problems to be asked."""
        return read_rows(path)

    @abstractmethod
    def problem(self, row: Row) -> Problem:
        """The problem of a row."""

    def full_prompt(self, problem: Problem) -> Prompt:
        """What the model continues, with what stands before it."""
        return Prompt(problem.prompt)

    def evaluate(self, evaluator: Evaluator, examples: Sequence[tuple[int, Problem]]) -> list[Outcome]:
        problems = [problem for _, problem in examples]
        prompts = [self.full_prompt(problem) for problem in problems]
        replies = evaluator.generate(prompts, self.max_new_tokens, self.stop, self.sampling, self.samples)
        jobs = [
            (problem, text) for problem, reply in zip(problems, replies, strict=True) for text in reply.texts
        ]
        with ThreadPoolExecutor(self.workers) as threads:
            results = iter(list(threads.map(lambda job: self.judge(*job), jobs)))
        outcomes = []
        for problem, reply in zip(problems, replies, strict=True):
            judged = [(text, next(results)) for text in reply.texts]
            right = sum(result.passed for _, result in judged)
            stopped = sum(result.verdict not in ("passed", "failed") for _, result in judged)
            values = {f"pass@{k}": pass_at_k(self.samples, right, k) for k in self.k}
            values["stopped"] = stopped / self.samples
            samples = [
                {
                    "completion": text,
                    "verdict": result.verdict,
                    "detail": result.detail,
                    "seconds": result.seconds,
                }
                for text, result in judged
            ]
            record = {"task_id": problem.name, "prompt": reply.prompt, "samples": samples}
            outcomes.append(Outcome(values, record | values, (reply,)))
        return outcomes

    def judge(self, problem: Problem, continuation: str) -> Result:
        """What becomes of a program, run with its tests."""
        return self.sandbox.check(problem.before + continuation, problem.tests)


class HumanEval(CodeTask):
    """HumanEval: rows of ``task_id``, ``prompt``, ``entry_point``, ``test``, ``canonical_solution``
    (HumanEval.jsonl.gz), asked without shots.

    Source: Chen et al. (2021), arXiv 2107.03374, section 2.2; where a function ends: section 2.1.
    """

    stops = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

    def problem(self, row: Row) -> Problem:
        prompt, entry_point = row.text("prompt"), row.text("entry_point")
        if not entry_point.isidentifier():
            raise row.fault(f"field 'entry_point' is {entry_point!r}; expected the name of a function")
        tests = f"{row.text('test')}\ncheck({entry_point})\n"
        solution = row.text("canonical_solution") if row.has("canonical_solution") else ""
        return Problem(row.text("task_id"), prompt, prompt, tests, solution)


class MBPP(CodeTask):
    """MBPP: rows of ``task_id``, ``text`` (or ``prompt``), ``code``, ``test_list``, and ``test_setup_code``
    or ``test_imports`` (mbpp.jsonl, sanitized-mbpp.json).

    Source: Austin et al. (2021), arXiv 2108.07732, section 2.1: prompts, shots and the ids of the test set.

    Args:
        path: The file of the problems.
        task_ids: First and last id of the problems that are asked; null: all but the shots.
        shot_ids: The ids of the solved problems in every prompt, in order; [] for none.
        shots_path: File that those are in; by default the file of the problems.
        options: As of every `CodeTask`.
    """

    stops = ("[DONE]",)

    def __init__(
        self,
        path: str,
        task_ids: tuple[int, int] | None = (11, 510),
        shot_ids: list[int] = [2, 3, 4],  # noqa: B006 (a tuple would read worse in a YAML)
        shots_path: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, **options)
        self.task_ids, self.shot_ids, self.shots_path = task_ids, list(shot_ids), shots_path

    def load(self) -> None:
        super().load()
        _ = self.solved

    @cached_property
    def solved(self) -> tuple[str, ...]:
        """The solved problems before every other, in the order of ``shot_ids``."""
        path = self.path if self.shots_path is None else self.shots_path
        found = {self._id(row): row for row in read_rows(path)} if self.shot_ids else {}
        for shot in self.shot_ids:
            if shot not in found:
                self.fail("shot_ids", f"has {shot}, but {path} has no problem with that task_id")
        problems = [self.problem(found[shot]) for shot in self.shot_ids]
        return tuple(f"{problem.prompt}{problem.solution}\n[DONE]\n\n" for problem in problems)

    def rows(self, path: str) -> list[Row]:
        rows = read_rows(path)
        if self.task_ids is None:
            # The solutions of the shots stand in the prompt.
            shots = self.shot_ids if self.shots_path is None else []
            asked = [row for row in rows if self._id(row) not in shots]
        else:
            first, last = self.task_ids
            asked = [row for row in rows if first <= self._id(row) <= last]
        if not asked:
            which = "but the shots" if self.task_ids is None else f"with a task_id from {first} to {last}"
            self.fail("task_ids", f"is {self.task_ids}, but {path} has no problem {which}")
        return asked

    def problem(self, row: Row) -> Problem:
        text = row.text("text" if row.has("text") else "prompt")
        tests = row.texts("test_list")
        setup = row.texts("test_imports", least=0) if row.has("test_imports") else []
        if row.has("test_setup_code"):
            setup.append(row.text("test_setup_code", empty=True))
        prompt = (
            f"You are an expert Python programmer, and here is your task: {text} Your code should pass these "
            "tests:\n\n" + "\n".join(tests) + "\n[BEGIN]\n"
        )
        return Problem(str(self._id(row)), prompt, "", "\n".join([*setup, *tests]), row.text("code"))

    def full_prompt(self, problem: Problem) -> Prompt:
        return Prompt(problem.prompt, self.solved)

    @staticmethod
    def _id(row: Row) -> int:
        return row.index("task_id", 1_000_000)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that of k of the samples, drawn without replacement, at least one is right.

    Its mean over draws of the samples is the probability for k samples of the model.

    Args:
        samples: Number of samples (n).
        right: How many of them are right (c).
        k: How many are drawn, at most ``samples``.

    Source: Chen et al. (2021), arXiv 2107.03374, equation 1: ``1 - C(n - c, k) / C(n, k)``.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
