"""The paper's templates, word for word, and their budgets under a tokenizer."""

from pathlib import Path
from typing import Any

import pytest

from trd_megatron import prompts
from trd_megatron.builtin_models import resolve_model
from trd_megatron.chat import Chat, coloured, sequence, teacher_prompt_ids
from trd_megatron.config import load
from trd_megatron.errors import UserError

MATH_OPSD = """Your task is to rewrite your mathematical solution using the reference solution as guidance.

**Problem:**
P

**Reference Solution:**
R

**Your Initial Solution:**
Y

**Instructions:**
1. Review the reference solution to understand the target reasoning and method
2. Rewrite your solution so it is consistent with the reference solution
3. Keep useful parts of your original structure and style when appropriate
4. Output ONLY the rewritten solution
Please reason step by step, and put your final answer within \\boxed{}."""
MATH_OPD = """Your task is to rewrite your mathematical solution.

**Problem:**
P

**Your Initial Solution:**
Y

**Instructions:**
1. Preserve the overall structure and reasoning path of your original solution
2. Identify and fix errors in computation or logic
3. Keep correct intermediate steps and meaningful work
4. Output ONLY the rewritten solution
Please reason step by step, and put your final answer within \\boxed{}."""
CODE_OPSD = """Your task is to rewrite your Python solution using the reference solution as guidance.

**Problem:**
P

**Reference Solution:**
```python
R
```

**Your Initial Solution:**
Y

**Instructions:**
1. Fix correctness issues and edge cases
2. Preserve useful parts of the original approach when appropriate
3. Output ONLY the rewritten Python solution
Return only the corrected Python code inside a single ```python code block."""


def test_student_prompts() -> None:
    assert prompts.student_prompt("math", "P") == "P Please reason step by step, and put your final answer within \\boxed{}."
    code = prompts.student_prompt("code", "P", "def f():")
    assert code.startswith("P\n\nStarter code:\n```python\ndef f():\n```\n\nYou will be given a programming problem.")
    assert code.endswith("Return only the code inside a single ```python code block.")
    assert "Starter code" not in prompts.student_prompt("code", "P")


@pytest.mark.parametrize(
    ("mode", "task", "expected"), [("opsd", "math", MATH_OPSD), ("opd", "math", MATH_OPD), ("opsd", "code", CODE_OPSD)]
)
def test_refine_prompts(mode: str, task: str, expected: str) -> None:
    assert prompts.refine_prompt(mode, task, "P", "Y", "R" if mode == "opsd" else None) == expected


def test_opd_hides_the_reference() -> None:
    for task in ("math", "code"):
        assert "SECRET" not in prompts.refine_prompt("opd", task, "P", "Y", "SECRET")
        assert "SECRET" not in prompts.vanilla_teacher_prompt("opd", task, "P", "SECRET")
        assert prompts.vanilla_teacher_prompt("opd", task, "P", None) == prompts.student_prompt(task, "P")


def test_vanilla_opsd_prompts() -> None:
    assert prompts.vanilla_teacher_prompt("opsd", "math", "P", "R") == (
        "P\n\nHere is a reference solution:\nR\n\n"
        "After understanding the reference solution, please try to solve this problem using your own approach below:\n\nAnswer:"
    )
    assert prompts.vanilla_teacher_prompt("opsd", "code", "P", "R") == (
        "P\n\nHere is a reference Python solution:\n```python\nR\n```\n\n"
        "After understanding the reference solution, write your own correct Python solution below."
    )


def test_what_is_shown_of_the_initial_solution() -> None:
    thought = "<think>hm</think>\n so 4"
    assert prompts.initial_solution(thought, "full") == thought
    assert prompts.initial_solution(thought, "after_think") == "so 4"
    assert prompts.initial_solution("no thought", "after_think") == "no thought"


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("builtin:tiny-qwen3")


@pytest.fixture(scope="module")
def chat(model: Path) -> Chat:
    return Chat(model, "chat", {})


def test_chat_and_plain_prompts(chat: Chat, model: Path) -> None:
    assert chat.decode(chat.prompt_ids("hi"), special=True) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    plain = Chat(model, "plain", {})
    assert plain.decode(plain.prompt_ids("hi"), special=True) == "hi\n"


def test_a_folder_without_a_chat_template_is_named(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        if "template" not in file.name:
            text = file.read_bytes()
            (tmp_path / file.name).write_bytes(text)
    with pytest.raises(UserError, match=r"no chat template: set data\.prompt_format=plain"):
        Chat(tmp_path, "chat", {})
    Chat(tmp_path, "plain", {})


def test_kwargs_reach_the_template(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}{% if enable_thinking is false %} no thinking{% endif %}")
    for kwargs, text in (({}, "hi"), ({"enable_thinking": False}, "hi no thinking")):
        chat = Chat(tmp_path, "chat", kwargs)
        assert chat.decode(chat.prompt_ids("hi")) == text


PROBLEM: dict[str, Any] = {
    "task": "math",
    "problem": "What is 2 + 2?",
    "reference_solution": "R" * 300,
    "answer": "4",
    "starter_code": None,
}


def shown(chat: Chat, initial: str | None, budget: int, problem: dict[str, Any] = PROBLEM, **changes: Any) -> str | None:
    overrides = [f"refine.max_prompt_tokens={budget}", *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())]
    config = load(["experiment=smoke", *overrides])
    ids = teacher_prompt_ids(config, chat, problem, initial)
    assert ids is None or len(ids) <= budget
    return None if ids is None else chat.decode(ids)


def test_the_initial_solution_is_cut_first_from_its_tail(chat: Chat) -> None:
    full = shown(chat, "Y" * 200, 2000)
    assert full is not None
    assert "Y" * 200 in full
    assert "truncated" not in full
    size = len(chat.encode(full)) + 12  # the template's own tokens are decoded away
    text = shown(chat, "Y" * 200, size - 100)
    assert text is not None
    assert "Y" * 60 + "\n[... truncated ...]" in text
    assert "Y" * 200 not in text
    assert "R" * 300 in text
    assert text.rstrip().endswith("\\boxed{}.\nassistant") or "\\boxed{}." in text


def test_then_the_reference_is_cut(chat: Chat) -> None:
    text = shown(chat, "Y" * 200, 800)
    assert text is not None
    assert "**Your Initial Solution:**\n[... truncated ...]" in text
    assert "YY" not in text
    assert "R" * 20 in text
    assert "R" * 300 not in text
    assert text.count("truncated") == 2


def test_a_prompt_that_cannot_fit_is_none(chat: Chat) -> None:
    assert shown(chat, "Y", 200) is None
    assert shown(chat, None, 100) is None


def test_the_references_own_budget(chat: Chat) -> None:
    text = shown(chat, "Y", 2000, refine__max_reference_tokens=50)
    assert text is not None
    assert "R" * 25 in text
    assert "R" * 51 not in text
    assert text.count("truncated") == 1


def test_the_answer_stands_in_for_a_missing_reference(chat: Chat) -> None:
    text = shown(chat, "Y", 2000, PROBLEM | {"reference_solution": None})
    assert text is not None
    assert "**Reference Solution:**\n4\n" in text


def test_the_vanilla_prompt_is_cut_at_the_reference(chat: Chat) -> None:
    whole = shown(chat, None, 2000)
    assert whole is not None
    assert "R" * 300 in whole
    text = shown(chat, None, 400)
    assert text is not None
    assert "truncated" in text
    assert "Answer:" in text


def test_ids_and_mask() -> None:
    one = sequence([5, 6], [7, 8, 9])
    assert (one.ids, one.mask, one.response_length) == ([5, 6, 7, 8, 9], [False, False, True, True, True], 3)
    with pytest.raises(ValueError, match="at least one prompt id"):
        sequence([], [1])


def test_the_coloured_sample_hides_escape_sequences(chat: Chat) -> None:
    text = coloured(chat, sequence(chat.encode("a"), chat.encode("\x1b[31mred")))
    assert "\x1b" not in text.plain
    assert "\\x1b" in text.plain
    assert [str(span.style) for span in text.spans[:3]] == ["dim", "bright_black", "green"]
