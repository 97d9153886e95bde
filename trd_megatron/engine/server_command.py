"""How one SGLang server is started: its Python, its command line, its environment."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from trd_megatron import processes
from trd_megatron.config import EngineConfig, ServersConfig
from trd_megatron.convert.architecture import Architecture
from trd_megatron.engine.base import Weights
from trd_megatron.engine.launch_sglang import KEY
from trd_megatron.errors import UserError

LAUNCHER = Path(__file__).with_name("launch_sglang.py")
VENV_PYTHON = Path(".venv-sglang/bin/python")  # what `make sglang-cpu` builds
CPU_SEQUENCES = 8  # of the whole context that a CPU server's KV cache holds, where that takes no more than
CPU_KV_BYTES = 1 << 30  # taken at the start, whatever is used of it
CPU_MEM_FRACTION = 0.3
# Whoever sends requests needs none of these, and logs and crash reports of a server may show its environment.
SECRET = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")
OF_THIS_PYTHON = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "TRITON_INTERPRET")


def interpreter(engine: EngineConfig) -> str:
    """The Python with SGLang. Raises UserError if SGLang is not installed there."""
    if engine.python is not None:
        python, name = (
            str(Path(engine.python).expanduser().absolute()),
            f"engine.python={engine.python}",
        )  # not resolved: a venv's is a link
    else:
        checkout = Path(__file__).parents[2]
        built = [path for folder in (Path.cwd(), checkout) if (path := folder / VENV_PYTHON).exists()]
        # Never for GPUs: its kernels are stand-ins.
        python = str(built[0]) if built and engine.device == "cpu" else sys.executable
        name = python
    way_out = "`make sglang-cpu` builds an environment for machines without a GPU; for others set engine.python to one with SGLang"
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    try:
        found = subprocess.run([python, "-c", probe], env=environment(engine, [], None), capture_output=True, check=False)
    except OSError as error:
        raise UserError(f"{name} cannot be run ({error.strerror}): {way_out}") from None
    if found.returncode != 0:
        raise UserError(f"{name} has no SGLang: {way_out}")
    return python


def command(python: str, role: str, weights: Weights, engine: EngineConfig, host: str, port: int) -> list[str]:
    """The command line of one server. It holds no secrets: everybody on the machine can read it."""
    servers: ServersConfig = getattr(engine, role)
    line = [python, str(LAUNCHER)]
    line += ["--model-path", str(weights.path.absolute()), "--weight-version", weights.label]
    line += ["--host", host, "--port", str(port), "--device", engine.device, "--dtype", engine.dtype]
    line += ["--tp-size", str(servers.tensor_parallel_size)]
    fraction = servers.mem_fraction_static
    if engine.device == "cpu":
        fraction = fraction or CPU_MEM_FRACTION
        line += ["--attention-backend", "torch_native", "--disable-cuda-graph", "--sleep-on-idle"]
        line += ["--max-total-tokens", str(cpu_kv_tokens(weights.path, engine.dtype, servers.context_length))]
    if fraction is not None:
        line += ["--mem-fraction-static", str(fraction)]
    if servers.context_length is not None:
        line += ["--context-length", str(servers.context_length)]
    if servers.fp8:
        line += ["--quantization", "fp8"]
    if engine.deterministic:
        line += ["--enable-deterministic-inference"]
    return line + servers.extra_args


def cpu_kv_tokens(model: Path, dtype: str, context_length: int | None) -> int:
    """Tokens of the KV cache on a CPU: of CPU_SEQUENCES whole contexts, fewer where they take over CPU_KV_BYTES, of one at least."""
    shape = Architecture.from_hf(model)
    context = context_length or shape.max_position_embeddings
    per_token = 2 * shape.num_layers * shape.num_query_groups * shape.head_dim * (4 if dtype == "float32" else 2)
    return max(context, min(CPU_SEQUENCES * context, CPU_KV_BYTES // per_token))


def environment(engine: EngineConfig, gpus: list[str], api_key: str | None) -> dict[str, str]:
    """The environment of a server on these GPUs (names as in CUDA_VISIBLE_DEVICES; none on a CPU)."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_THIS_PYTHON and not SECRET.search(name)}
    kept |= {
        processes.PARENT: str(os.getpid()),
        "PYTHONSAFEPATH": "1",  # no modules from the folder the user stands in, nor from the launcher's
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",  # logprobs at temperature 1, whatever a request's
    }
    if api_key is not None:
        kept[KEY] = api_key
    if engine.device == "cpu":
        kept |= {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    elif gpus:
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return kept


def thread_settings(servers: int) -> dict[str, str]:
    """CPU: the cores, divided among so many servers. What the user set stays."""
    share = max((os.cpu_count() or 1) // servers, 1)
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(share)}


def gpus_of(role: str, servers: ServersConfig, index: int, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs of server `index`. Numbers count what CUDA_VISIBLE_DEVICES leaves visible, as they do everywhere with CUDA."""
    size = servers.tensor_parallel_size
    numbers = (servers.gpus or list(range(servers.data_parallel_size * size)))[index * size : (index + 1) * size]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in numbers]
    names = [name for name in visible.split(",") if name]
    if max(numbers) >= len(names):
        raise UserError(
            f"engine.{role}: GPU {max(numbers)} is wanted, but CUDA_VISIBLE_DEVICES={visible} shows {len(names)}: "
            f"set engine.{role}.gpus, or fewer servers"
        )
    return [names[number] for number in numbers]
