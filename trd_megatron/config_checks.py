"""Cross-checks of a configuration: what the schema alone cannot say."""

import math

from trd_megatron.config import Config, LearnerConfig, LoraConfig, ServersConfig, get, leaves, nearest
from trd_megatron.errors import UserError
from trd_megatron.evaluate import benchmarks

POSITIVE = (
    "rollout.max_prompt_tokens", "rollout.max_response_tokens", "rollout.samples_per_problem", "rollout.shard_size",
    "refine.max_prompt_tokens", "refine.max_response_tokens", "refine.max_reference_tokens", "refine.shard_size",
    "evaluate.max_prompt_tokens", "evaluate.max_response_tokens", "evaluate.samples", "evaluate.shard_size",
    "rounds", "engine.batch_size", "engine.max_outstanding", "engine.attempts", "engine.connect_timeout_s", "engine.read_timeout_s",
    "engine.request_timeout_s", "engine.start_timeout_s", "engine.give_up_after_s", "engine.student.data_parallel_size",
    "engine.student.tensor_parallel_size", "engine.teacher.data_parallel_size", "engine.teacher.tensor_parallel_size",
    "verify.timeout_s", "verify.workers", "verify.code.timeout_s", "verify.code.total_timeout_s", "verify.code.memory_mb",
    "method.divergence.temperature",
    "learner.tensor_model_parallel_size", "learner.context_parallel_size", "learner.data_parallel_size",
    "learner.max_tokens_per_micro_batch", "learner.kl_chunk_tokens", "learner.global_batch_size", "learner.epochs",
    "learner.learning_rate", "learner.clip_grad",
    "learner.lora.rank", "learner.lora.alpha", "learner.held_out_samples", "learner.eval_interval",
    "learner.checkpoint_interval", "learner.keep_checkpoints", "learner.decay_steps",
    "cluster.gpus_per_node",
)  # fmt: skip
OPTIONAL_POSITIVE = (
    "data.train_problems", "learner.max_steps", "learner.peak_tflops", "learner.cpu_threads", "engine.student.context_length",
    "engine.teacher.context_length", "method.divergence.top_k", "method.divergence.clip",
)  # fmt: skip
UNIT_INTERVAL = (
    "rollout.top_p",
    "refine.top_p",
    "evaluate.top_p",
    "learner.warmup_ratio",
    "learner.min_learning_rate_ratio",
    "learner.adam_beta1",
    "learner.adam_beta2",
)
SOURCE_TASKS = {
    "deepscaler": "math", "champ": "math", "arithmetic": "math", "taco": "code", "human_eval": "code", "lab": "lab",
}  # fmt: skip  # file: any
MADE = ("arithmetic", "lab")  # sources that make their problems
OWN_FLAGS = (
    "--model-path", "--model", "--host", "--port", "--device", "--dtype", "--tp", "--tp-size", "--tensor-parallel-size",
    "--mem-fraction-static", "--context-length", "--quantization", "--weight-version", "--api-key", "--enable-deterministic-inference",
)  # fmt: skip
SECRET_FLAGS = ("--admin-api-key", "--ssl-keyfile-password")  # everybody on the machine can read a command line
RESERVED_KWARGS = ("conversation", "tokenize", "add_generation_prompt", "chat_template", "return_dict", "return_tensors")  # fmt: skip


def _check_lora(lora: LoraConfig) -> None:
    if lora.rank < 1:
        raise UserError("learner.lora.rank must be at least 1")
    if not 0 <= lora.dropout < 1:
        raise UserError(f"learner.lora.dropout={lora.dropout}: must be 0 or above and below 1")
    known = LoraConfig().targets
    for target in lora.targets:
        if target not in known:
            raise UserError(f"learner.lora.targets: no layer named '{target}'; known: {', '.join(known)}")
    if not lora.targets or len(set(lora.targets)) < len(lora.targets):
        raise UserError("learner.lora.targets needs at least one layer, each once")


def _check_precision(learner: LearnerConfig) -> None:
    engine = learner.device == "cuda" and learner.dtype == "bfloat16"
    if learner.transformer_impl == "transformer_engine" and not engine:
        raise UserError(
            "learner.transformer_impl=transformer_engine needs learner.device=cuda and learner.dtype=bfloat16: "
            "set learner.transformer_impl=auto"
        )
    if learner.fp8 != "none" and engine and learner.transformer_impl == "local":
        raise UserError(f"learner.fp8={learner.fp8} needs Transformer Engine: set learner.transformer_impl=auto, or learner.fp8=none")
    if learner.fp8 != "none" and not engine:
        raise UserError(
            f"learner.fp8={learner.fp8} needs learner.device=cuda, learner.dtype=bfloat16 and Transformer Engine: set learner.fp8=none"
        )
    if learner.fp8_bf16_layers < 0:
        raise UserError(f"learner.fp8_bf16_layers={learner.fp8_bf16_layers}: must be 0 or above")
    if learner.fp8_bf16_layers and learner.fp8 in ("none", "delayed"):
        raise UserError(f"learner.fp8_bf16_layers needs learner.fp8=current, blockwise or mxfp8, not {learner.fp8}")


def _check_data(config: Config) -> None:
    source = config.data.source
    if source != "file" and config.task != SOURCE_TASKS[source]:
        fitting = ", ".join(name for name, task in SOURCE_TASKS.items() if task == config.task)
        raise UserError(
            f"data.source={source} has {SOURCE_TASKS[source]} problems: set task={SOURCE_TASKS[source]}, or for task={config.task} choose "
            f"data=NAME, one of file, {fitting}"
        )
    for benchmark in config.data.exclude_benchmarks:
        benchmarks.check(benchmark)
    if config.data.exclude_benchmarks and source in MADE:
        raise UserError(f"data.source={source} makes its problems, which are in no benchmark: set data.exclude_benchmarks=[]")
    if config.data.source == "file" and config.data.path is None:
        raise UserError("data.source=file needs data.path, a .parquet or .jsonl file")
    if source in MADE and config.data.path is not None:
        raise UserError(f"data.source={source} makes its problems: leave data.path out, or set data.source=file")
    if source in MADE and config.data.train_problems is None:
        raise UserError(f"data.source={source} makes as many problems as you ask for: set data.train_problems")
    if config.job == "distill" and config.data.filter == "fail_to_succ" and config.method.trajectory != "refined":
        raise UserError(
            f"data.filter=fail_to_succ asks whether y_r passes, but method={config.method.name} trains on y_o alone, which is never "
            "refined: set data.filter=fail, or method=trd"
        )
    if config.data.test_problems < 0:
        raise UserError("data.test_problems must be 0 or above")


def _check_cluster(config: Config) -> None:
    cluster = config.cluster
    if cluster.retries < 0:
        raise UserError(f"cluster.retries={cluster.retries}: must be 0 or above")
    if cluster.package == "git" and cluster.kind in ("local", "kubernetes"):
        raise UserError(f"cluster.package=git: cluster={cluster.kind} brings no code along, it runs what cluster.trd finds")
    if cluster.secrets_file is not None and cluster.kind != "docker":
        raise UserError("cluster.secrets_file is for cluster=docker: elsewhere see cluster.secrets and cluster.secret_name")
    for mount in cluster.mounts:
        if ":" not in mount:
            raise UserError(f"cluster.mounts: '{mount}' is not SOURCE:TARGET")
    for name in cluster.env:
        if name in cluster.secrets:
            raise UserError(f"cluster.env.{name} would be written down: leave it out, cluster.secrets passes it by reference")


def _check_evaluate(config: Config) -> None:
    held_out = "test" in config.evaluate.benchmarks
    if config.evaluate.teacher and (config.teacher.path is None or config.job != "distill"):
        raise UserError("evaluate.teacher=true needs the teacher of mode=opd and job=distill: set evaluate.teacher=false")
    if config.task == "lab":
        if config.job == "evaluate":
            raise UserError("task=lab has no benchmarks but a run's own test problems: job=evaluate needs task=math or task=code")
        if any(benchmark != "test" for benchmark in config.evaluate.benchmarks):
            raise UserError("task=lab is evaluated on its own problems alone: set evaluate.benchmarks=[test]")
    if config.job == "evaluate":
        if held_out:
            raise UserError(
                "evaluate.benchmarks has 'test', the held-out problems of a training run, which job=evaluate has not: "
                "name benchmarks or files, e.g. a run's problems in a .jsonl"
            )
        if not config.evaluate.benchmarks:
            raise UserError("job=evaluate needs benchmarks: set evaluate.benchmarks=[NAME_OR_FILE, ...]")
        if config.rounds > 1:
            raise UserError(f"rounds={config.rounds}: job=evaluate trains nothing, it has one round")
    elif held_out and config.data.test_problems == 0:
        raise UserError("evaluate.benchmarks has 'test', which needs data.test_problems above 0")
    names = []
    for benchmark in config.evaluate.benchmarks:
        if benchmark != "test":
            benchmarks.check(benchmark)
        names.append(benchmarks.name(benchmark))
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"evaluate.benchmarks has two benchmarks named '{name}': rename a file, or leave one out")


def _check_learner(config: Config) -> None:
    learner = config.learner
    if learner.sequence_parallel and learner.tensor_model_parallel_size == 1:
        raise UserError("learner.sequence_parallel=true needs learner.tensor_model_parallel_size above 1")
    refined = config.method.trajectory == "refined" and config.job == "distill"
    trained = config.refine if refined else config.rollout
    prompt = max(config.refine.max_prompt_tokens if config.job == "distill" else 0, config.rollout.max_prompt_tokens)
    longest = prompt + trained.max_response_tokens
    if learner.max_tokens_per_micro_batch < longest:
        raise UserError(
            f"learner.max_tokens_per_micro_batch={learner.max_tokens_per_micro_batch} is below the longest sequence, "
            f"the prompt budget plus {'refine' if trained is config.refine else 'rollout'}.max_response_tokens = {longest}"
        )
    if learner.kl_backend == "triton" and (learner.device == "cpu" or learner.dtype == "float64"):
        raise UserError("learner.kl_backend=triton needs learner.device=cuda and float32 or bfloat16: set learner.kl_backend=auto")
    if learner.max_restarts < 0:
        raise UserError(f"learner.max_restarts={learner.max_restarts}: must be 0 or above")
    _check_lora(learner.lora)
    _check_precision(learner)
    if learner.teacher_offload and (learner.device == "cpu" or (config.mode == "opsd" and learner.trainable == "lora")):
        raise UserError(
            "learner.teacher_offload=true needs learner.device=cuda and a teacher with weights of its own (mode=opd, or "
            "learner.trainable=full): set it to false"
        )
    for key in ("learner.adam_beta1", "learner.adam_beta2"):
        if get(config, key) == 1:
            raise UserError(f"{key}=1: must be below 1")
    if learner.weight_decay < 0:
        raise UserError(f"learner.weight_decay={learner.weight_decay}: must be 0 or above")


def _check_supervised(config: Config) -> None:
    if config.teacher.path is not None:
        raise UserError("job=sft has no teacher: set teacher.path=null and mode=opsd")
    if config.rounds > 1:
        raise UserError(f"rounds={config.rounds}: job=sft has one round, its worked solutions stay the same")
    if config.data.filter != "all":
        raise UserError(f"data.filter={config.data.filter} chooses by the student's own attempts, and job=sft has none: set it to all")
    for source, bound in config.learner.decay_when.items():
        if not 0 <= bound <= 1:
            raise UserError(f"learner.decay_when.{source}={bound}: must lie between 0 and 1")


def _check_servers(config: Config) -> None:
    engine = config.engine
    if engine.kind == "local":
        if engine.launch:
            raise UserError("engine.launch=true starts SGLang servers: set engine.kind=sglang too")
        return
    roles = {"student": engine.student} if config.teacher.path is None else {"student": engine.student, "teacher": engine.teacher}
    for role, servers in roles.items():
        key = f"engine.{role}"
        if engine.launch and servers.urls:
            raise UserError(f"{key}.urls names servers that already run, engine.launch=true starts its own: give one of them")
        if not engine.launch and not servers.urls:
            raise UserError(f"{key}.urls is empty: name the servers that run, or set engine.launch=true to start them")
        for url in servers.urls:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"{key}.urls: '{url}' is no URL, e.g. http://127.0.0.1:30000")
            if "@" in url:
                raise UserError(f"{key}.urls: names and passwords in a URL would be written to config.yaml: use SGLANG_API_KEY instead")
        if len(set(servers.urls)) < len(servers.urls):
            raise UserError(f"{key}.urls names a server twice")
        needed = servers.data_parallel_size * servers.tensor_parallel_size
        if servers.gpus and len(servers.gpus) != needed:
            raise UserError(
                f"{key}.gpus names {len(servers.gpus)} GPUs, but {key}.data_parallel_size x tensor_parallel_size needs {needed}"
            )
        if len(set(servers.gpus)) < len(servers.gpus):
            raise UserError(f"{key}.gpus names a GPU twice")
        fraction = servers.mem_fraction_static
        if fraction is not None and not 0 < fraction < 1:
            raise UserError(f"{key}.mem_fraction_static={fraction}: must lie between 0 and 1, both excluded")
        if servers.fp8 and engine.device == "cpu":
            raise UserError(f"{key}.fp8=true needs engine.device=cuda")
        for flag in servers.extra_args:
            if flag.split("=")[0] in OWN_FLAGS:
                raise UserError(f"{key}.extra_args: {flag.split('=')[0]} is set by another key of engine: leave it out")
            if flag.split("=")[0] in SECRET_FLAGS:
                raise UserError(f"{key}.extra_args: {flag.split('=')[0]} is a secret, which a command line would show: leave it out")
    if engine.launch and engine.keep_servers and engine.device == "cuda":
        learner = range(config.learner.ranks if config.learner.device == "cuda" else 0)
        way_out = "set engine.keep_servers=false to share GPUs in time"
        check_own_gpus(roles, dict.fromkeys(learner, "the learner"), "engine.keep_servers=true", way_out)
    if engine.deterministic and engine.device == "cpu":
        raise UserError("engine.deterministic=true needs engine.device=cuda: SGLang has no deterministic attention on a CPU")


def check_own_gpus(roles: dict[str, ServersConfig], taken: dict[int, str], why: str, way_out: str) -> None:
    """Raises UserError if servers that run side by side want the same GPU. taken: GPU -> who has it already."""
    taken = dict(taken)
    for role, servers in roles.items():
        for gpu in servers.gpus or range(servers.data_parallel_size * servers.tensor_parallel_size):
            if gpu in taken:
                raise UserError(
                    f"{why}, but GPU {gpu} is wanted by {taken[gpu]} and by engine.{role}: name others in engine.{role}.gpus, or {way_out}"
                )
            taken[gpu] = f"engine.{role}"


def check(config: Config) -> None:
    """Cross-checks. Raises UserError that names the key to change."""
    for key, f in leaves():
        value = get(config, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value}: must be finite")
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"{key}={value}: must be one of {', '.join(choices)}; {nearest(str(value), choices)}")
    for key in POSITIVE:
        if get(config, key) <= 0:
            raise UserError(f"{key}={get(config, key)}: must be above 0")
    for key in OPTIONAL_POSITIVE:
        if get(config, key) is not None and get(config, key) <= 0:
            raise UserError(f"{key}={get(config, key)}: must be above 0 or null")
    for key in UNIT_INTERVAL:
        if not 0 <= get(config, key) <= 1:
            raise UserError(f"{key}={get(config, key)}: must lie between 0 and 1")
    for section in ("rollout", "refine", "evaluate"):
        if get(config, f"{section}.temperature") < 0:
            raise UserError(f"{section}.temperature must be 0 (greedy) or above")
        if get(config, f"{section}.top_p") == 0:
            raise UserError(f"{section}.top_p=0: must be above 0 (temperature 0 is greedy)")
        top_k = get(config, f"{section}.top_k")
        if top_k < 1 and top_k != -1:
            raise UserError(f"{section}.top_k={top_k}: must be at least 1, or -1 for the whole vocabulary")

    for role in ("student", "teacher"):
        for name in get(config, f"{role}.chat_template_kwargs"):
            if name in RESERVED_KWARGS:
                raise UserError(f"{role}.chat_template_kwargs.{name} is not the template's but ours: leave it out")

    if config.mode == "opd" and config.teacher.path is None:
        raise UserError("mode=opd needs a teacher: set teacher.path, or mode=opsd")
    if config.mode == "opsd" and config.teacher.path is not None:
        raise UserError("mode=opsd teaches with the student itself: set teacher.path=null, or mode=opd")
    _check_evaluate(config)
    if config.job == "sft":
        _check_supervised(config)
    elif config.learner.decay_when:
        raise UserError("learner.decay_when needs job=sft")
    if config.job != "evaluate":
        _check_data(config)
        _check_learner(config)
    _check_servers(config)
    _check_cluster(config)
    divergence = config.method.divergence
    if not 0 < divergence.beta < 1:
        raise UserError(f"method.divergence.beta={divergence.beta}: must lie between 0 and 1, both excluded")
    if divergence.kind == "jsd" and divergence.top_k is not None:
        raise UserError("method.divergence.kind=jsd needs method.divergence.top_k=null")
    if config.export.checkpoint not in ("last", "best") and not config.export.checkpoint.isdigit():
        raise UserError(f"export.checkpoint={config.export.checkpoint}: must be last, best or a step number")
