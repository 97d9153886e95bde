"""What can be checked before any work is done, so that an hour of generation does not end in a wrong model or layout."""

import torch

from trd_megatron.builtin_models import resolve_model
from trd_megatron.chat import Chat
from trd_megatron.config import Config
from trd_megatron.convert.architecture import Architecture
from trd_megatron.errors import UserError


def check(config: Config) -> None:
    """Checks devices, models, tokenizers and the parallel layout. Raises UserError that names the key to change."""
    for key, device in (("engine.device", config.engine.device), ("learner.device", config.learner.device)):
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError(f"{key}=cuda, but this machine has no usable GPU: set {key}=cpu, or choose learner=cpu engine=local")
    student_path = resolve_model(config.model.path)
    student = Chat(student_path, config.data.prompt_format, config.student.chat_template_kwargs)
    tp = config.learner.tensor_model_parallel_size
    Architecture.from_hf(student_path).check_tensor_parallel_size(tp, config.model.path)
    if config.teacher.path is None:
        return
    teacher_path = resolve_model(config.teacher.path)
    Architecture.from_hf(teacher_path).check_tensor_parallel_size(tp, config.teacher.path)
    teacher = Chat(teacher_path, config.data.prompt_format, config.teacher.chat_template_kwargs)
    ours, theirs = student.vocabulary(), teacher.vocabulary()
    if ours != theirs:
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise UserError(
            f"teacher.path={config.teacher.path} has another vocabulary than model.path={config.model.path} "
            f"({len(differing)} tokens differ, e.g. {differing[0]!r}): full-vocabulary KL needs the same one"
        )
