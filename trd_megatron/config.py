"""The configuration: dataclasses are the schema, conf/ holds the values (Hydra groups), `load` puts both together.

A field made with `opt(..., layout=True)` says how the work is laid out on the machine (ranks, chunk sizes, intervals), not
what is computed: changing it never makes a finished stage stale.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trd_megatron.errors import UserError


def opt(default: Any, help: str, *, choices: Sequence[str] | None = None, layout: bool = False) -> Any:
    """A configuration field with its help text. Mutable defaults are copied per instance."""
    metadata = {"help": help, "choices": choices, "layout": layout}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    path: str = opt(MISSING, "Student: a Hugging Face folder, a hub id, or builtin:NAME (see README).")


@dataclass
class StudentConfig:
    chat_template_kwargs: dict[str, Any] = opt({}, "Passed to the student's chat template, e.g. {enable_thinking: false}.")


@dataclass
class TeacherConfig:
    path: str | None = opt(None, "OPD: the teacher's model. OPSD: must stay null, the teacher is the student without adapters.")
    chat_template_kwargs: dict[str, Any] = opt({}, "Passed to the chat template of every teacher prompt.")


@dataclass
class DataConfig:
    source: str = opt("file", "Where problems come from.", choices=("file", "deepscaler", "arithmetic"))
    path: str | None = opt(None, "source=file: your .parquet or .jsonl. source=deepscaler: a local copy (null: the hub).")
    train_problems: int | None = opt(None, "Take this many training problems (null: all).")
    test_problems: int = opt(0, "Problems held out for evaluation; never trained on.")
    prompt_format: str = opt("chat", "chat: the model's chat template. plain: prompt + newline.", choices=("chat", "plain"))


@dataclass
class SamplingConfig:
    temperature: float = opt(0.6, "Sampling temperature; 0 is greedy.")
    top_p: float = opt(0.95, "Nucleus mass, applied after top_k.")
    top_k: int = opt(20, "Candidates per token; -1: the whole vocabulary.")
    max_prompt_tokens: int = opt(2048, "Prompt budget in tokens. A student prompt over it is skipped and counted.")
    max_response_tokens: int = opt(16384, "Response budget in tokens.")


@dataclass
class RolloutConfig(SamplingConfig):
    samples_per_problem: int = opt(1, "Attempts per problem.")
    shard_size: int = opt(256, "Samples per parquet shard, the unit of resumption.")


@dataclass
class RefineConfig(SamplingConfig):
    max_prompt_tokens: int = opt(22528, "Budget of the refine prompt; over it, the initial solution's tail is cut first.")
    max_reference_tokens: int = opt(4096, "Budget of the reference solution inside the refine prompt (OPSD).")
    initial_solution: str = opt(
        "full", "full: the whole y_o goes into the prompt. after_think: what follows </think>.", choices=("full", "after_think")
    )
    shard_size: int = opt(256, "Samples per parquet shard, the unit of resumption.")


@dataclass
class DivergenceConfig:
    kind: str = opt("forward", "forward: KL(teacher||student). reverse: KL(student||teacher).", choices=("forward", "reverse", "jsd"))
    beta: float = opt(0.5, "jsd only: weight of the teacher in the mixture.")
    top_k: int | None = opt(None, "Renormalise both sides on the teacher's top K ids (null: full vocabulary).")
    clip: float | None = opt(None, "Cap of the per-token value (null: none).")
    temperature: float = opt(1.0, "Divides both logits.")


@dataclass
class MethodConfig:
    name: str = opt(MISSING, "Row of the results table.")
    trajectory: str = opt("refined", "What is trained on: y_o (rollout) or y_r (refined).", choices=("rollout", "refined"))
    teacher_prompt: str = opt("refine", "What the teacher sees while it scores.", choices=("vanilla", "refine"))
    divergence: DivergenceConfig = opt(DivergenceConfig, "The per-token loss.")


@dataclass
class EngineConfig:
    kind: str = opt("local", "local: embedded generation with transformers.", choices=("local",))
    device: str = opt("cpu", "Where the engine runs.", choices=("cpu", "cuda"))
    dtype: str = opt("float32", "Weights and activations of the engine.", choices=("float32", "bfloat16"))
    batch_size: int = opt(32, "local: sequences decoded together.")


@dataclass
class VerifyConfig:
    timeout_s: float = opt(10.0, "Wall-clock limit per graded answer, in seconds.")
    workers: int = opt(2, "Grading processes.", layout=True)


@dataclass
class LoraConfig:
    rank: int = opt(64, "Rank of the adapters.")
    alpha: float = opt(128.0, "The adapters' output is scaled by alpha / rank.")
    dropout: float = opt(0.0, "Share of the adapters' inputs that are dropped in training.")
    targets: list[str] = opt(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "Linear layers that get an adapter."
    )


@dataclass
class LearnerConfig:
    device: str = opt("cuda", "cpu (gloo) or cuda (nccl).", choices=("cpu", "cuda"))
    dtype: str = opt(
        "bfloat16", "Base weights and activations; adapters are float32 (float64 with it).", choices=("float64", "float32", "bfloat16")
    )
    tensor_model_parallel_size: int = opt(1, "Ranks that share every layer.", layout=True)
    sequence_parallel: bool = opt(False, "Also split activations between layers over these ranks.", layout=True)
    context_parallel_size: int = opt(1, "Ranks that share every sequence: attention over long ones.", layout=True)
    data_parallel_size: int = opt(1, "Copies of the model that share a global batch.", layout=True)
    max_tokens_per_micro_batch: int = opt(38912, "Tokens packed into one forward of the teacher or the student.", layout=True)
    peak_tflops: float | None = opt(
        None, "Peak of one device in TFLOP/s, for mfu (null: of NVIDIA's data sheet, where the GPU is known).", layout=True
    )
    trainable: str = opt("lora", "lora: adapters on a frozen model. full: every parameter.", choices=("lora", "full"))
    transformer_impl: str = opt(
        "auto",
        "What the layers are made of. auto: Transformer Engine on cuda in bfloat16 where it is installed, else local.",
        choices=("auto", "transformer_engine", "local"),
        layout=True,
    )
    fp8: str = opt(
        "none",
        "Linear layers in fp8 (Transformer Engine), by this scaling recipe. delayed forgets its scales when a run is resumed.",
        choices=("none", "delayed", "current", "blockwise", "mxfp8"),
    )
    fp8_bf16_layers: int = opt(0, "fp8: so many layers at each end of the model stay in bfloat16. Not with fp8=delayed.")
    recompute: str = opt(
        "full",
        "What backward computes again instead of keeping it. full: the student's layers. selective: their MLPs only.",
        choices=("none", "selective", "full"),
        layout=True,
    )
    teacher_offload: bool = opt(
        False, "A teacher with weights of its own stays in host memory but for its forwards, one per optimizer step.", layout=True
    )
    kl_chunk_tokens: int = opt(512, "Rows of logits held at once by the loss.", layout=True)
    kl_backend: str = opt(
        "auto", "Row kernels of the loss; auto: triton on cuda, torch on cpu.", choices=("auto", "torch", "triton"), layout=True
    )
    global_batch_size: int = opt(128, "Sequences per optimizer step.")
    epochs: int = opt(1, "Passes over the trajectories.")
    max_steps: int | None = opt(None, "Stop after this many steps (null: all epochs).")
    learning_rate: float = opt(5e-6, "Peak of AdamW's learning rate.")
    min_learning_rate_ratio: float = opt(0.1, "The cosine ends at this share of the peak.")
    warmup_ratio: float = opt(0.1, "Share of the steps that warm up linearly.")
    weight_decay: float = opt(0.005, "AdamW's decoupled weight decay.")
    adam_beta1: float = opt(0.9, "AdamW's first beta.")
    adam_beta2: float = opt(0.95, "AdamW's second beta.")
    clip_grad: float = opt(1.0, "Global gradient norm is clipped to this.")
    lora: LoraConfig = opt(LoraConfig, "Adapters.")
    held_out_samples: int = opt(64, "Trajectories never trained on; their KL is train/summary.json's fixed batch.")
    eval_interval: int = opt(20, "Steps between held-out KL measurements.")
    checkpoint_interval: int = opt(20, "Steps between checkpoints; the last step is always one.")
    max_restarts: int = opt(3, "Times that the ranks go on from the last checkpoint after one of them was lost.", layout=True)
    async_checkpoint: bool = opt(True, "Write a checkpoint's files while training goes on.", layout=True)
    keep_checkpoints: int = opt(4, "Checkpoints kept, the best (held-out KL) and the last always among them.")

    @property
    def ranks(self) -> int:
        """Processes that the learner runs in."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.data_parallel_size


@dataclass
class ExportConfig:
    checkpoint: str = opt("last", "last, best (lowest held-out KL), or a step number.")


@dataclass
class EvaluateConfig(SamplingConfig):
    benchmarks: list[str] = opt(["test"], "test: the run's held-out problems; or paths of .parquet/.jsonl files.")
    samples: int = opt(16, "Samples per problem; Avg@k and Pass@k use k = samples.")
    top_k: int = opt(-1, "Candidates per token; -1: the whole vocabulary.")
    max_prompt_tokens: int = opt(4096, "Prompt budget in tokens.")
    max_response_tokens: int = opt(38912, "Response budget in tokens.")
    shard_size: int = opt(256, "Samples per parquet shard, the unit of resumption.")


@dataclass
class LoggingConfig:
    wandb_project: str | None = opt(
        None,
        "Weights & Biases: the project that training is logged to (null: off). The key: WANDB_API_KEY, in the environment.",
        layout=True,
    )
    wandb_mode: str = opt("online", "offline: stays in train/wandb until `wandb sync`.", choices=("online", "offline"), layout=True)


@dataclass
class Config:
    name: str = opt(MISSING, "Name of the experiment.")
    run_dir: str = opt("runs/${name}", "Folder of the run.", layout=True)
    seed: int = opt(0, "Seed of everything that is drawn.")
    task: str = opt("math", "What kind of problems.", choices=("math",))
    mode: str = opt("opsd", "opsd: self-distillation under the reference solution. opd: another model teaches.", choices=("opd", "opsd"))
    model: ModelConfig = opt(ModelConfig, "Student.")
    student: StudentConfig = opt(StudentConfig, "Student's prompt.")
    teacher: TeacherConfig = opt(TeacherConfig, "Teacher.")
    data: DataConfig = opt(DataConfig, "Problems.")
    rollout: RolloutConfig = opt(RolloutConfig, "Stage 1: y_o.")
    refine: RefineConfig = opt(RefineConfig, "Stage 2: y_r.")
    method: MethodConfig = opt(MethodConfig, "Row of the results table.")
    engine: EngineConfig = opt(EngineConfig, "Generation.")
    verify: VerifyConfig = opt(VerifyConfig, "Grading.")
    learner: LearnerConfig = opt(LearnerConfig, "Training.")
    export: ExportConfig = opt(ExportConfig, "Which checkpoint becomes hf/.")
    evaluate: EvaluateConfig = opt(EvaluateConfig, "Benchmarks.")
    logging: LoggingConfig = opt(LoggingConfig, "Where training is logged besides train/.")


def conf_dir() -> Path:
    """The folder of the configuration groups: inside an installed wheel, else at the top of the checkout."""
    package = Path(__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def groups() -> list[str]:
    """The names of the configuration groups."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def options(group: str) -> list[str]:
    """The files of a group, e.g. options("experiment") -> ["quickstart", "smoke"]."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def leaves(schema: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yields (dotted key, field) of every setting."""
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + f.name, f


def _nearest(word: str, known: Sequence[str]) -> str:
    """The known word that the user most likely meant. For dotted keys the last part alone is tried as well."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:
        by_leaf = {key.rsplit(".", 1)[-1]: key for key in known}
        close = [by_leaf[leaf] for leaf in difflib.get_close_matches(word.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.6)]
    return f"did you mean {close[0]}?" if close else "`trd run --keys` lists all keys"


def _check_key(key: str) -> None:
    known = dict(leaves())
    if key in known:
        return
    if any(str(f.type).startswith("dict") and key.startswith(f"{name}.") for name, f in known.items()):
        return
    inner = [name for name in known if name.startswith(key + ".")]
    if inner:
        raise UserError(f"{key} is a section; set one of its keys, e.g. {inner[0]}=...")
    raise UserError(f"unknown key {key}: {_nearest(key, list(known))}")


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def load(overrides: Sequence[str]) -> Config:
    """Composes conf/ with `overrides` ("experiment=smoke", "learner.learning_rate=1e-4") and checks the result.

    Raises UserError with one line that names the key and the nearest valid one.
    """
    chosen: list[str] = []
    values: dict[str, Any] = {}
    group_names = groups()
    for text in overrides:
        if "=" not in text:
            raise UserError(f"'{text}' is not key=value, e.g. experiment=smoke")
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise UserError(f"cannot read '{text}': {_one_line(error)}") from None
        key = override.key_or_group
        if override.is_delete() or override.is_add():
            raise UserError(f"'{text}': write key=value; keys are neither added nor deleted")
        if override.package is not None:
            raise UserError(f"'{text}': write group=option, without a package")
        if key in group_names:
            if any(earlier.startswith(f"{key}=") for earlier in chosen):
                raise UserError(f"{key} is given twice: keep one")
            if str(override.value()) not in options(key):
                nearest = difflib.get_close_matches(str(override.value()), options(key), n=1)
                hint = f"did you mean {nearest[0]}? " if nearest else ""
                raise UserError(f"no {key} named '{override.value()}': {hint}known: {', '.join(options(key))}")
            chosen.append(text)
        else:
            _check_key(key)
            values[key] = override.value()
    if not any(text.startswith("experiment=") for text in chosen):
        raise UserError(f"say which experiment: experiment=NAME, one of {', '.join(options('experiment'))}")

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        try:
            composed = compose("config", overrides=chosen)
        except HydraException as error:
            raise UserError(f"the files in {conf_dir()} do not compose: {_one_line(error)}") from None
    return _build(OmegaConf.to_container(composed), values)


def from_dict(values: dict[str, Any]) -> Config:
    """Rebuilds the configuration that `to_dict` wrote. Raises UserError as `load` does."""
    return _build(values, {})


def _build(container: Any, values: dict[str, Any]) -> Config:
    merged = OmegaConf.structured(Config)
    try:
        merged = OmegaConf.merge(merged, container)
        for key, value in values.items():
            OmegaConf.update(merged, key, value, force_add=True)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        known = dict(leaves())
        if key in known:
            raise UserError(f"{key}: {_one_line(error)}") from None
        raise UserError(f"unknown key {key}: {_nearest(str(key), list(known))}") from None
    assert isinstance(config, Config)
    check(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values, as written to config.yaml. There are no secrets in it: those come from the environment."""
    return dataclasses.asdict(config)


def get(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def benchmark_name(benchmark: str) -> str:
    """How results of a benchmark are called: test, or the file's name without its ending."""
    return benchmark if benchmark == "test" else Path(benchmark).stem


POSITIVE = (
    "rollout.max_prompt_tokens", "rollout.max_response_tokens", "rollout.samples_per_problem", "rollout.shard_size",
    "refine.max_prompt_tokens", "refine.max_response_tokens", "refine.max_reference_tokens", "refine.shard_size",
    "evaluate.max_prompt_tokens", "evaluate.max_response_tokens", "evaluate.samples", "evaluate.shard_size",
    "engine.batch_size", "verify.timeout_s", "verify.workers", "method.divergence.temperature",
    "learner.tensor_model_parallel_size", "learner.context_parallel_size", "learner.data_parallel_size",
    "learner.max_tokens_per_micro_batch", "learner.kl_chunk_tokens", "learner.global_batch_size", "learner.epochs",
    "learner.learning_rate", "learner.clip_grad",
    "learner.lora.rank", "learner.lora.alpha", "learner.held_out_samples", "learner.eval_interval",
    "learner.checkpoint_interval", "learner.keep_checkpoints",
)  # fmt: skip
OPTIONAL_POSITIVE = (
    "data.train_problems", "learner.max_steps", "learner.peak_tflops", "method.divergence.top_k", "method.divergence.clip",
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
    if config.data.source == "file" and config.data.path is None:
        raise UserError("data.source=file needs data.path, a .parquet or .jsonl file")
    if config.data.source == "arithmetic" and config.data.path is not None:
        raise UserError("data.source=arithmetic makes its problems: leave data.path out, or set data.source=file")
    if config.data.source == "arithmetic" and config.data.train_problems is None:
        raise UserError("data.source=arithmetic makes as many problems as you ask for: set data.train_problems")
    if config.data.test_problems < 0:
        raise UserError("data.test_problems must be 0 or above")
    if config.data.test_problems == 0 and "test" in config.evaluate.benchmarks:
        raise UserError("evaluate.benchmarks has 'test', which needs data.test_problems above 0")
    names = [benchmark_name(benchmark) for benchmark in config.evaluate.benchmarks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"evaluate.benchmarks has two benchmarks named '{name}': rename one of the files")


def _check_learner(config: Config) -> None:
    learner = config.learner
    if learner.sequence_parallel and learner.tensor_model_parallel_size == 1:
        raise UserError("learner.sequence_parallel=true needs learner.tensor_model_parallel_size above 1")
    trained = config.refine if config.method.trajectory == "refined" else config.rollout
    prompt = max(config.refine.max_prompt_tokens, config.rollout.max_prompt_tokens)
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


def check(config: Config) -> None:
    """Cross-checks. Raises UserError that names the key to change."""
    for key, f in leaves():
        value = get(config, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value}: must be finite")
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"{key}={value}: must be one of {', '.join(choices)}; {_nearest(str(value), choices)}")
        if value == MISSING:
            raise UserError(f"{key} is not set: {f.metadata['help']}")
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
    _check_data(config)
    _check_learner(config)
    divergence = config.method.divergence
    if not 0 < divergence.beta < 1:
        raise UserError(f"method.divergence.beta={divergence.beta}: must lie between 0 and 1, both excluded")
    if divergence.kind == "jsd" and divergence.top_k is not None:
        raise UserError("method.divergence.kind=jsd needs method.divergence.top_k=null")
    if config.export.checkpoint not in ("last", "best") and not config.export.checkpoint.isdigit():
        raise UserError(f"export.checkpoint={config.export.checkpoint}: must be last, best or a step number")
