"""Asks a model the tasks of a suite, several at once, turn by turn. Knows no metric."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from exl_runtime.errors import PromptTooLong
from exl_runtime.sampling.params import SamplingParams

from .suite import Task

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime

BATCH = 8  # conversations at once
MAX_TOKENS = 256
THOUGHT_END = "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How replies are drawn. samples: per task. temperature: 0 is greedy; no other cut of the distribution is made."""

    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = MAX_TOKENS

    def sampling(self, task: Task, sample: int) -> SamplingParams:
        """Parameters of one conversation. Its seed depends on nothing but `seed`, the task's id and the sample."""
        digest = hashlib.blake2b(f"{self.seed}\n{sample}\n{task.id}".encode(), digest_size=8).digest()
        return SamplingParams(temperature=self.temperature, min_p=0.0, seed=int.from_bytes(digest, "little"))


@dataclass(slots=True)
class Conversation:
    """One sample of one task. replies: to the turns so far. error: why it could not be asked to its end."""

    task: Task
    sample: int
    replies: list[str] = field(default_factory=list)
    stop_reason: str = ""
    tokens: int = 0
    error: str | None = None

    @property
    def verdict_text(self) -> str:
        """What is judged: the last reply, without the thoughts in front of it; "" when there is none."""
        if self.error is not None or not self.replies:
            return ""
        return answer_part(self.replies[-1])


def answer_part(reply: str) -> str:
    """What stands behind the thoughts of a model that thinks aloud between <think> and </think>; else the reply."""
    return reply.rsplit(THOUGHT_END, 1)[-1].strip()


def ask(runtime: "Runtime", tasks: Sequence[Task], settings: Settings) -> Iterator[list[Conversation]]:
    """The samples of each task, in order, as they are done. A prompt that does not fit the context becomes an error.

    Conversations go through the model in batches of `BATCH`, each turn of all of them together. Raises ExlError.
    """
    waiting = [Conversation(task, sample) for task in tasks for sample in range(settings.samples)]
    done: list[Conversation] = []
    for start in range(0, len(waiting), BATCH):
        batch = waiting[start : start + BATCH]
        for turn in range(max(len(one.task.turns) for one in batch)):
            _turn(runtime, [one for one in batch if turn < len(one.task.turns) and one.error is None], settings)
        done += batch
        while len(done) >= settings.samples:
            yield done[: settings.samples]
            del done[: settings.samples]


def prompt_of(one: Conversation, chat: bool) -> str | list[dict[str, str]]:
    """What the model sees next: messages, or (chat=False) the same as running text, blank lines between turns."""
    said: list[dict[str, str]] = []
    if one.task.system is not None:
        said.append({"role": "system", "content": one.task.system})
    for turn, reply in zip(one.task.turns, [*one.replies, None], strict=False):
        said.append({"role": "user", "content": turn})
        if reply is not None:
            said.append({"role": "assistant", "content": reply})
    return said if chat else "\n\n".join(message["content"] for message in said)


def _turn(runtime: "Runtime", conversations: Sequence[Conversation], settings: Settings) -> None:
    """One reply for each. Limits of a call hold for all of its prompts, so those with equal limits go together."""
    chat = runtime.template is not None
    groups: dict[tuple[int, tuple[str, ...]], list[Conversation]] = {}
    for one in conversations:
        groups.setdefault((one.task.max_tokens or settings.max_tokens, one.task.stop), []).append(one)
    for (max_tokens, stop), group in groups.items():
        prompts = [prompt_of(one, chat) for one in group]
        sampling = [settings.sampling(one.task, one.sample) for one in group]
        limits: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop}
        try:
            results = runtime.generate(prompts, sampling=sampling, **limits)
        except PromptTooLong:
            results = [
                _alone(runtime, prompt, sampling=s, **limits) for prompt, s in zip(prompts, sampling, strict=True)
            ]
        for one, result in zip(group, results, strict=True):
            if isinstance(result, str):
                one.error = result
                continue
            one.replies.append(result.text)
            one.stop_reason = result.stop_reason
            one.tokens += result.generated_tokens


def _alone(runtime: "Runtime", prompt: Any, **options: Any) -> Any:
    """A result, or what does not fit."""
    try:
        return runtime.generate(prompt, **options)
    except PromptTooLong as err:
        return err.problem
