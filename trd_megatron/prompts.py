"""The prompt templates of the paper (section C.4) and of its reference implementation. Text only: budgets need a tokenizer (chat.py)."""

from trd_megatron import lab_text

MATH_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
CODE_INSTRUCTION = (
    "You will be given a programming problem. Write a correct Python program that solves it. "
    "Return only the code inside a single ```python code block."
)
TRUNCATED = "\n[... truncated ...]"

_MATH_REFINE: dict[str, tuple[str, tuple[str, ...]]] = {
    "opd": (
        "Your task is to rewrite your mathematical solution.",
        (
            "Preserve the overall structure and reasoning path of your original solution",
            "Identify and fix errors in computation or logic",
            "Keep correct intermediate steps and meaningful work",
            "Output ONLY the rewritten solution",
        ),
    ),
    "opsd": (
        "Your task is to rewrite your mathematical solution using the reference solution as guidance.",
        (
            "Review the reference solution to understand the target reasoning and method",
            "Rewrite your solution so it is consistent with the reference solution",
            "Keep useful parts of your original structure and style when appropriate",
            "Output ONLY the rewritten solution",
        ),
    ),
}
_CODE_REFINE = {
    "opd": "Your task is to rewrite your Python solution.",
    "opsd": "Your task is to rewrite your Python solution using the reference solution as guidance.",
}
_CODE_REFINE_STEPS = (
    "Fix correctness issues and edge cases",
    "Preserve useful parts of the original approach when appropriate",
    "Output ONLY the rewritten Python solution",
)
_CODE_REFINE_INSTRUCTION = "Return only the corrected Python code inside a single ```python code block."


def student_prompt(task: str, problem: str, starter_code: str | None = None) -> str:
    """The initial-response prompt, shared by OPD and OPSD."""
    if task == "lab":
        return lab_text.student_prompt(problem)
    if task == "math":
        return f"{problem} {MATH_INSTRUCTION}"
    starter = f"\n\nStarter code:\n```python\n{starter_code}\n```" if starter_code else ""
    return f"{problem}{starter}\n\n{CODE_INSTRUCTION}"


def vanilla_teacher_prompt(mode: str, task: str, problem: str, reference: str | None, starter_code: str | None = None) -> str:
    """What the teacher sees while it scores y_o: OPD the student's prompt, OPSD the reference solution as well."""
    if task == "lab":
        return lab_text.vanilla_teacher_prompt(mode, problem, reference)
    if mode == "opd":
        return student_prompt(task, problem, starter_code)
    if task == "math":
        return (
            f"{problem}\n\nHere is a reference solution:\n{reference}\n\n"
            "After understanding the reference solution, please try to solve this problem using your own approach below:\n\nAnswer:"
        )
    return (
        f"{problem}\n\nHere is a reference Python solution:\n```python\n{reference}\n```\n\n"
        "After understanding the reference solution, write your own correct Python solution below."
    )


def refine_prompt(mode: str, task: str, problem: str, initial_solution: str, reference: str | None) -> str:
    """The prompt under which the teacher rewrites y_o into y_r; OPSD shows the reference solution, OPD hides it."""
    if task == "lab":
        return lab_text.refine_prompt(mode, problem, initial_solution, reference)
    steps: tuple[str, ...]
    if task == "math":
        opening, steps = _MATH_REFINE[mode]
        closing = MATH_INSTRUCTION
        shown_reference = reference
    else:
        opening, steps = _CODE_REFINE[mode], _CODE_REFINE_STEPS
        closing = _CODE_REFINE_INSTRUCTION
        shown_reference = f"```python\n{reference}\n```"
    blocks = [opening, f"**Problem:**\n{problem}"]
    if mode == "opsd":
        blocks.append(f"**Reference Solution:**\n{shown_reference}")
    blocks.append(f"**Your Initial Solution:**\n{initial_solution}")
    numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    blocks.append(f"**Instructions:**\n{numbered}\n{closing}")
    return "\n\n".join(blocks)


def initial_solution(response: str, keep: str) -> str:
    """The part of y_o that is shown: all of it (keep "full"), or what follows the last </think> (keep "after_think")."""
    if keep == "after_think" and "</think>" in response:
        return response.rsplit("</think>", 1)[1].strip()
    return response


# Words with which a model takes back or doubts what it wrote (section 5 of the paper).
EPISTEMIC_WORDS = (
    "Wait", "Actually", "However", "Alternatively", "Oops", "Wrong", "Error", "Incorrect", "Correction", "Sorry", "Hmm", "Oh", "Hold",
    "Pause", "Uh", "Um",
)  # fmt: skip


def epistemic_words(task: str) -> tuple[str, ...]:
    """The words of a task's language with which a model takes back or doubts what it wrote."""
    return lab_text.EPISTEMIC_WORDS if task == "lab" else EPISTEMIC_WORDS
