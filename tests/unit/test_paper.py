"""Every row of the paper's tables composes, with the recipe's numbers, which are written here anew."""

from pathlib import Path
from typing import Any

import pytest

from trd_megatron import paper, sweep
from trd_megatron.config import Config, get, load, options

NAMES = {  # as the tables have them
    "forward_kl": "Forward KL", "forward_kl_clip": "Forward KL w/ Clip", "reverse_kl": "Reverse KL",
    "reverse_kl_topk": "Reverse KL w/ Top-K", "trd": "TRD",
}  # fmt: skip
METHODS = tuple(NAMES)
ROWS = [
    *((name, task) for name in ("opd_qwen3_1_7b", "opd_qwen3_4b_instruct") for task in ("math", "code")),
    ("opsd_qwen3_4b_instruct", "math"),
    ("opsd_qwen3_8b", "math"),
]
STUDENTS = {"qwen3_1_7b": "Qwen/Qwen3-1.7B", "qwen3_4b_instruct": "Qwen/Qwen3-4B-Instruct-2507", "qwen3_8b": "Qwen/Qwen3-8B"}
RECIPE: dict[str, Any] = {
    # Generation
    **{f"{stage}.{key}": value for stage in ("rollout", "refine") for key, value in
       (("temperature", 0.6), ("top_p", 0.95), ("top_k", 20), ("max_response_tokens", 16_384))},
    "rollout.samples_per_problem": 1, "rollout.max_prompt_tokens": 2048, "refine.max_reference_tokens": 4096,
    "refine.initial_solution": "full",
    "data.train_problems": None, "data.filter": "all", "data.prompt_format": "chat",
    # Learner
    "learner.trainable": "lora", "learner.lora.rank": 64, "learner.lora.alpha": 128.0, "learner.lora.dropout": 0.05,
    "learner.lora.targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "learner.adam_beta1": 0.9, "learner.adam_beta2": 0.95, "learner.learning_rate": 5e-6, "learner.weight_decay": 0.005,
    "learner.warmup_ratio": 0.1, "learner.min_learning_rate_ratio": 0.1, "learner.clip_grad": 1.0, "learner.dtype": "bfloat16",
    "learner.recompute": "full", "learner.epochs": 1, "learner.max_steps": None, "learner.global_batch_size": 128,
    "learner.kl_chunk_tokens": 512, "learner.ranks": 8, "method.divergence.temperature": 1.0,
    # Evaluation
    "evaluate.samples": 16, "evaluate.temperature": 0.6, "evaluate.top_p": 0.95, "evaluate.top_k": -1,
    "engine.kind": "sglang", "rounds": 1,
}  # fmt: skip
OF_TASK: dict[str, dict[str, Any]] = {
    "math": {"data.source": "deepscaler", "evaluate.max_prompt_tokens": 4096, "evaluate.max_response_tokens": 38_912,
             "evaluate.benchmarks": ["aime24", "aime25", "hmmt25", "beyondaime", "amobench"]},
    "code": {"data.source": "taco", "evaluate.max_prompt_tokens": 2048, "evaluate.max_response_tokens": 16_384,
             "evaluate.benchmarks": ["humaneval_plus", "mbpp_plus", "livecodebench_v6"]},
}  # fmt: skip
OF_MODE: dict[str, dict[str, Any]] = {
    # the longest training sequence: OPD y_r 34,816, OPSD y_r 38,912
    "opd": {"teacher.path": "Qwen/Qwen3-8B", "refine.max_prompt_tokens": 18_432, "learner.max_tokens_per_micro_batch": 34_816},
    "opsd": {"teacher.path": None, "refine.max_prompt_tokens": 22_528, "learner.max_tokens_per_micro_batch": 38_912},
}
OF_METHOD: dict[str, tuple[str, str, str, float | None, int | None]] = {
    "forward_kl": ("rollout", "vanilla", "forward", None, None),
    "forward_kl_clip": ("rollout", "vanilla", "forward", 0.1, None),
    "reverse_kl": ("rollout", "vanilla", "reverse", None, None),
    "reverse_kl_topk": ("rollout", "vanilla", "reverse", None, 32),
    "trd": ("refined", "refine", "forward", None, None),
}
THINKS = {"qwen3_1_7b": {"enable_thinking": True}, "qwen3_4b_instruct": {}, "qwen3_8b": {"enable_thinking": True}}


def _row(name: str, task: str, method: str, *more: str) -> Config:
    return load([f"experiment={name}", f"task={task}", f"method={method}", *more])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "task"), ROWS)
def test_every_row_has_the_recipes_numbers(name: str, task: str, method: str) -> None:
    config = _row(name, task, method)
    mode, _, student = name.partition("_")
    wanted = RECIPE | OF_TASK[task] | OF_MODE[mode] | {"mode": mode, "task": task, "model.path": STUDENTS[student]}
    assert {key: get(config, key) for key in wanted} == wanted
    of = config.method
    assert (of.trajectory, of.teacher_prompt, of.divergence.kind, of.divergence.clip, of.divergence.top_k) == OF_METHOD[method]
    assert config.student.chat_template_kwargs == THINKS[student]
    assert config.teacher.chat_template_kwargs == (THINKS["qwen3_8b"] if mode == "opd" else THINKS[student])
    found = paper.row(config)
    five = method == "trd" and student == "qwen3_4b_instruct" and task == "math"
    tables = {"opd": "1, 2 and 5" if five else "1 and 2", "opsd": "3, 4 and 5" if five else "3 and 4"}[mode]
    assert found == f"tables {tables}: {mode.upper()}, {STUDENTS[student].removeprefix('Qwen/')}, {task}, {NAMES[method]}"
    assert paper.departures(config) == []


def test_there_are_no_other_presets_of_the_paper() -> None:
    assert {name for name, _ in ROWS} == set(paper.PRESETS.values()) == {name for name in options("experiment") if name.startswith("op")}


@pytest.mark.parametrize(
    ("method", "filters", "table"), [("forward_kl", "fail,succ", 6), ("reverse_kl", "fail,succ", 7), ("trd", "fail,succ,fail_to_succ", 8)]
)
def test_filters_are_rows_of_tables_of_their_own(method: str, filters: str, table: int) -> None:
    for chosen in filters.split(","):
        place = paper.row(_row("opsd_qwen3_8b", "math", method, f"data.filter={chosen}"))
        assert (
            place is not None
            and place.startswith(f"table {table}: OPSD, Qwen3-8B, math, ")
            and place.endswith(f"({chosen.replace('_', ' ')})")
        )
        assert paper.row(_row("opsd_qwen3_4b_instruct", "math", method, f"data.filter={chosen}")) is None


def test_other_combinations_run_and_are_marked() -> None:
    assert paper.describe(_row("opsd_qwen3_8b", "code", "trd")) == "not in the paper"
    assert paper.describe(_row("opsd_qwen3_8b", "math", "forward_kl_clip", "data.filter=fail")) == "not in the paper"
    assert paper.describe(_row("opsd_qwen3_8b", "math", "reverse_kl_top8")) == "not in the paper"
    changed = _row("opsd_qwen3_8b", "math", "trd", "learner.learning_rate=1e-5", "engine.student.data_parallel_size=16", "seed=3")
    assert paper.describe(changed) == "the paper's tables 3 and 4: OPSD, Qwen3-8B, math, TRD, but learner.learning_rate=1e-05"
    local = load(["experiment=opsd_qwen3_8b", "name=mine", "model.path=/models/Qwen3-8B"])
    assert paper.describe(local) == "the paper's tables 3 and 4: OPSD, Qwen3-8B, math, TRD, but model.path=/models/Qwen3-8B"
    for other in (["model.path=Qwen/Qwen3-32B"], ["mode=opd", "teacher.path=Qwen/Qwen3-32B"], ["job=sft"], ["method.name=mine"]):
        assert paper.describe(load(["experiment=opsd_qwen3_8b", *other])) == "not in the paper"
    assert paper.describe(load(["experiment=smoke"])) is None


def test_the_rows_can_be_swept(tmp_path: Path) -> None:
    words = ["experiment=opd_qwen3_1_7b,opd_qwen3_4b_instruct", "task=math,code", f"method={','.join(METHODS)}", f"run_dir={tmp_path}"]
    _, members = sweep.members(words)
    assert len({member.label for member in members}) == len(members) == 20
    assert all((paper.row(member.config) or "").startswith(("tables 1 and 2:", "tables 1, 2 and 5:")) for member in members)
    assert {member.config.name for member in members} == {
        "opd_qwen3_1_7b_math", "opd_qwen3_1_7b_code", "opd_qwen3_4b_instruct_math", "opd_qwen3_4b_instruct_code",
    }  # fmt: skip
    words = ["experiment=opsd_qwen3_8b", "method=trd", "data.filter=all,fail,succ,fail_to_succ", f"run_dir={tmp_path}"]
    assert [member.label for member in sweep.members(words)[1]] == ["all", "fail", "succ", "fail_to_succ"]
