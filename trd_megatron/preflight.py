"""What can be checked before any work is done, so that an hour of generation does not end in a wrong model or layout."""

import os
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path

import torch

from trd_megatron import nodes
from trd_megatron.builtin_models import resolve_model
from trd_megatron.chat import Chat
from trd_megatron.config import Config
from trd_megatron.convert.architecture import Architecture
from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks
from trd_megatron.learner import versions
from trd_megatron.learner.stack import Installed, check_shapes, choose
from trd_megatron.verify import sandbox

CONTEXT_MARGIN = 2  # SGLang stops so many tokens before the end of the context


def check_devices(config: Config, roles: Collection[str] = ("student", "teacher"), *, learner: bool = True) -> None:
    """Raises UserError if this machine (with the others of its run) has fewer GPUs than these roles' engines, and the learner, use."""
    check_server_devices(config, roles)
    gpus, ranks = torch.cuda.device_count(), config.learner.ranks
    if learner and config.learner.device == "cuda" and gpus * nodes.count() < ranks:
        have = f"this machine has {gpus} usable GPUs" if nodes.count() == 1 else f"{nodes.count()} nodes of {gpus} GPUs have fewer"
        raise UserError(
            f"learner.device=cuda with {ranks} ranks (learner.tensor_model_parallel_size x context_parallel_size x data_parallel_size), "
            f"but {have}: choose learner=cpu{', or fewer ranks' if gpus else ''}"
        )


def check_server_devices(config: Config, roles: Collection[str] = ("student", "teacher")) -> None:
    """Raises UserError if this machine has fewer GPUs than these roles' engines generate on."""
    if not roles:
        return
    gpus = torch.cuda.device_count()
    engine = config.engine
    if engine.device == "cuda" and not gpus and (engine.kind == "local" or engine.launch):
        way_out = (
            "set engine.device=cpu" if engine.kind == "local" else "attach to servers elsewhere (engine.launch=false), or engine=sglang_cpu"
        )
        raise UserError(f"engine.device=cuda, but this machine has no usable GPU: {way_out}")
    if engine.kind == "sglang" and engine.launch and engine.device == "cuda":
        for role, servers in {"student": engine.student, "teacher": engine.teacher}.items():
            last = max(servers.gpus, default=servers.data_parallel_size * servers.tensor_parallel_size // nodes.count() - 1)
            if role in roles and last >= gpus and (role == "student" or config.teacher.path is not None):
                raise UserError(
                    f"engine.{role} wants GPU {last} (data_parallel_size x tensor_parallel_size, or gpus), but this machine has {gpus}, "
                    "counted from 0: ask for fewer"
                )


def check_training(config: Config) -> None:
    """Raises UserError if megatron-core was not tested, or if what the learner's layers or logging.wandb_project need is not there."""
    choose(config.learner, Installed.find())
    versions.check(versions.installed())
    project, mode = config.logging.wandb_project, config.logging.wandb_mode
    if project is None:
        return
    try:
        metadata.version("wandb")
    except metadata.PackageNotFoundError:
        raise UserError(f"logging.wandb_project={project} needs the package wandb: pip install 'trd_megatron[wandb]'") from None
    if mode == "online" and not os.environ.get("WANDB_API_KEY"):
        raise UserError(
            f"logging.wandb_project={project} needs the environment variable WANDB_API_KEY: set it, or logging.wandb_mode=offline"
        )


def check_grading(config: Config) -> None:
    """Raises UserError if programs are to be run to grade them, and this machine cannot shut them in."""
    own = config.job == "distill" or "test" in config.evaluate.benchmarks
    others = (spec for spec in config.evaluate.benchmarks if spec != "test")
    if (own and config.task == "code") or any(problem["task"] == "code" for spec in others for problem in benchmarks.texts(spec)):
        sandbox.require(config.verify.code.allow_unsandboxed)


def check_inputs(config: Config) -> None:
    """Checks models, tokenizers, the parallel layout and the benchmarks' files. Raises UserError that names the key to change."""
    for benchmark in config.evaluate.benchmarks:
        if benchmark != "test":
            benchmarks.texts(benchmark)
    student_path = resolve_model(config.model.path)
    of_student = ("rollout", "evaluate", *(() if config.teacher.path else ("refine",))) if config.job == "distill" else ("evaluate",)
    _check_context(config, "student", student_path, of_student)
    student = Chat(student_path, config.data.prompt_format, config.student.chat_template_kwargs)
    if config.job == "evaluate":  # any model will do that the engine can load
        return
    if config.job == "distill":
        student.epistemic_ids(config.task)  # the learner asks for them: a model that lacks the task's words is refused here
    tp = config.learner.tensor_model_parallel_size
    student_architecture = Architecture.from_hf(student_path)
    student_architecture.check_student(f"model.path={config.model.path}")
    student_architecture.check_tensor_parallel_size(tp, config.model.path)
    check_shapes(config.learner, student_architecture, config.model.path)
    if config.teacher.path is None:
        return
    teacher_path = resolve_model(config.teacher.path)
    _check_context(config, "teacher", teacher_path, ("refine", "evaluate") if config.evaluate.teacher else ("refine",))
    teacher_architecture = Architecture.from_hf(teacher_path)
    teacher_architecture.check_tensor_parallel_size(tp, config.teacher.path)
    check_shapes(config.learner, teacher_architecture, config.teacher.path)
    teacher = Chat(teacher_path, config.data.prompt_format, config.teacher.chat_template_kwargs)
    ours, theirs = student.vocabulary(), teacher.vocabulary()
    if ours != theirs:
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise UserError(
            f"teacher.path={config.teacher.path} has another vocabulary than model.path={config.model.path} "
            f"({len(differing)} tokens differ, e.g. {differing[0]!r}): full-vocabulary KL needs the same one"
        )
    rows = [architecture.vocab_size for architecture in (student_architecture, teacher_architecture)]
    if rows[0] != rows[1]:
        raise UserError(
            f"teacher.path={config.teacher.path} has {rows[1]} vocabulary rows, model.path={config.model.path} has {rows[0]}: "
            "full-vocabulary KL needs as many"
        )


def _check_context(config: Config, role: str, model: Path, sections: Sequence[str]) -> None:
    """Raises UserError if a server's context has no room for any prompt beside a stage's responses. A prompt that is too long for what
    is left is found when the stage begins."""
    engine = config.engine
    if engine.kind != "sglang" or not engine.launch:
        return
    context = getattr(engine, role).context_length or Architecture.from_hf(model).max_position_embeddings
    for section in sections:
        response = getattr(config, section).max_response_tokens
        if response + CONTEXT_MARGIN >= context:
            raise UserError(
                f"{section}.max_response_tokens={response} leaves no room for a prompt in the {role} servers' context of {context} tokens: "
                f"lower it, or raise engine.{role}.context_length"
            )
