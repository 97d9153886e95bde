"""Text to token ids: chat template, budgets, response mask. The only module that calls a tokenizer."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from trd_megatron import prompts
from trd_megatron.config import Config
from trd_megatron.errors import UserError


@dataclass(frozen=True)
class Sequence:
    """One training sequence. ids: prompt then response, [P + R]; mask: True on the R response ids, [P + R]."""

    ids: list[int]
    mask: list[bool]

    @property
    def response_length(self) -> int:
        return sum(self.mask)


def sequence(prompt_ids: Collection[int], response_ids: Collection[int]) -> Sequence:
    """Joins the ids that the engine saw and sampled. The hidden state at position t - 1 predicts the id at t."""
    if not prompt_ids:
        raise ValueError("a sequence needs at least one prompt id: nothing predicts its first response id")
    return Sequence([*prompt_ids, *response_ids], [False] * len(prompt_ids) + [True] * len(response_ids))


class Chat:
    """A model's tokenizer with one prompt format and one role's chat_template_kwargs.

    Raises UserError if the folder has no usable tokenizer, or no chat template where one is needed.
    """

    def __init__(self, model_path: Path, prompt_format: str, chat_template_kwargs: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(model_path), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{model_path} has no usable tokenizer: {str(error).splitlines()[0]}") from None
        if prompt_format == "chat" and not self._tokenizer.chat_template:
            raise UserError(f"the tokenizer in {model_path} has no chat template: set data.prompt_format=plain or another model")
        self._path = model_path
        self._format = prompt_format
        self._kwargs = dict(chat_template_kwargs)

    def encode(self, text: str) -> list[int]:
        """Ids of bare text, without special tokens. Raises UserError for a word that a vocabulary without <unk> lacks."""
        try:
            return self._ids(text)
        except Exception as error:
            if type(error) is not Exception:  # tokenizers raises this bare class for what its model cannot encode
                raise
            raise UserError(
                f"the tokenizer in {self._path} cannot encode {self._unknown(text)!r}: task, data and model must fit"
            ) from error

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _unknown(self, text: str) -> str:
        """The first word of `text` that cannot be encoded alone, or else all of it."""
        for word in text.split():
            try:
                self._ids(word)
            except Exception:
                return word
        return text

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """Text of ids, for reading and verifying only; it is never encoded again."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=not special))

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids that the engine sees for a one-turn prompt."""
        if self._format == "plain":
            return self.encode(prompt + "\n")
        messages = [{"role": "user", "content": prompt}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self._kwargs)
        return self.encode(text)

    def solution_ids(self, solution: str) -> list[int]:
        """Ids of a worked solution as a response: its text and the end of turn. Raises UserError if the tokenizer has none."""
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer in {self._path} has no end of turn (eos_token), which solutions to train on need")
        return [*self.encode(solution), int(self._tokenizer.eos_token_id)]

    def epistemic_ids(self, task: str) -> list[int]:
        """First ids of prompts.epistemic_words, bare and after a space, each once."""
        return sorted({self.encode(prefix + word)[0] for word in prompts.epistemic_words(task) for prefix in ("", " ")})

    def vocabulary(self) -> dict[str, int]:
        """Token to id, to compare two tokenizers."""
        return dict(self._tokenizer.get_vocab())

    def cut(self, text: str, tokens: int) -> str:
        """`text` if it has at most `tokens` tokens, else its beginning with a visible notice, together at most `tokens`."""
        ids = self.encode(text)
        if len(ids) <= tokens:
            return text
        room = tokens - len(self.encode(prompts.TRUNCATED))
        return self.decode(ids[: max(room, 0)], special=True).rstrip("\ufffd") + prompts.TRUNCATED


def teacher_prompt_ids(config: Config, chat: Chat, problem: dict[str, Any], initial_response: str | None) -> list[int] | None:
    """Ids of a teacher prompt within refine.max_prompt_tokens; None if even the shortest form is over the budget.

    initial_response None: the vanilla prompt. Otherwise the refine prompt, in which the initial solution is cut from its
    tail first, then the reference solution, each with a visible notice (RECIPE_FACTS.md, Generation).
    """
    mode, task, budget = config.mode, problem["task"], config.refine.max_prompt_tokens
    reference = None
    if mode == "opsd":
        # Most of DeepScaleR has only a short answer, which then is the reference (paper, section B.1).
        reference = chat.cut(problem["reference_solution"] or problem["answer"], config.refine.max_reference_tokens)

    if initial_response is None:

        def build_vanilla(shown: str) -> str:
            return prompts.vanilla_teacher_prompt(mode, task, problem["problem"], shown, problem["starter_code"])

        return _fit(chat, build_vanilla, reference or "", budget)

    initial = prompts.initial_solution(initial_response, config.refine.initial_solution)

    def build(shown: str, shown_reference: str | None = reference) -> str:
        return prompts.refine_prompt(mode, task, problem["problem"], shown, shown_reference)

    ids = _fit(chat, build, initial, budget)
    if ids is None and reference is not None:
        ids = _fit(chat, lambda shown: build(prompts.TRUNCATED.strip(), shown), reference, budget)
    return ids


def _fit(chat: Chat, build: Callable[[str], str], block: str, budget: int) -> list[int] | None:
    """Ids of build(block) with the tail of `block` cut as far as needed; None if cutting all of it is not enough."""
    ids = chat.prompt_ids(build(block))
    over, room = len(ids) - budget, len(chat.encode(block))
    while over > 0:
        # Cutting text may shift token borders by a few tokens, so measure again until it fits.
        room -= over
        if room < len(chat.encode(prompts.TRUNCATED)):
            return None
        ids = chat.prompt_ids(build(chat.cut(block, room)))
        over = len(ids) - budget
    return ids


def coloured(chat: Chat, sample: Sequence) -> Text:
    """One training sequence for a terminal: prompt dim, response green, token borders as a thin bar."""
    text = Text()
    for token, is_response in zip(sample.ids, sample.mask, strict=True):
        # Sampled text may hold escape sequences that a terminal would obey.
        shown = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in chat.decode([token], special=True))
        text.append(shown, style="green" if is_response else "dim")
        text.append("|", style="bright_black")
    return text
