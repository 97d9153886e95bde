"""The configuration: dataclasses are the schema, conf/ holds the values (Hydra groups), `load` puts both together.

A field made with `opt(..., layout=True)` says how the work is laid out on the machine (ranks, chunk sizes, intervals), not
what is computed: changing it never makes a finished stage stale.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

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
    source: str = opt(
        "file", "Where problems come from.", choices=("file", "deepscaler", "taco", "human_eval", "champ", "arithmetic", "lab")
    )
    world: str = opt(
        "lab",
        "source=lab: which world. lab_mini is smaller; in lab_control there is nothing to repair.",
        choices=("lab", "lab_mini", "lab_control"),
    )
    path: str | None = opt(
        None, "source=file: your .parquet or .jsonl. Other sources: a local copy, taco also a folder (null: the hub, or the package)."
    )
    train_problems: int | None = opt(None, "Take this many training problems (null: all).")
    test_problems: int = opt(0, "Problems held out for evaluation; never trained on.")
    exclude_benchmarks: list[str] = opt(
        [], "Problems that occur in one of these benchmarks are left out: names or files, as in evaluate.benchmarks."
    )
    filter: str = opt(
        "all",
        "Trajectories trained on, by verdict. fail, succ: y_o failed, passed. fail_to_succ: y_o failed and its y_r passed.",
        choices=("all", "fail", "succ", "fail_to_succ"),
    )
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
class ServersConfig:
    """The SGLang servers of one role. What they are asked for never changes the ids' distribution, but for fp8 and extra_args."""

    urls: list[str] = opt(
        [], "engine.launch=false: servers that already run, e.g. [http://127.0.0.1:30000], or one sglang-router.", layout=True
    )
    data_parallel_size: int = opt(1, "Copies of the model, each a server of its own.", layout=True)
    tensor_parallel_size: int = opt(1, "GPUs that share one server's model.", layout=True)
    gpus: list[int] = opt([], "GPUs of these servers (empty: from the first on, as many as they need).", layout=True)
    mem_fraction_static: float | None = opt(
        None, "Share of a GPU's memory for weights and KV cache (null: SGLang's own choice).", layout=True
    )
    context_length: int | None = opt(None, "Longest prompt and response together (null: the model's own).", layout=True)
    fp8: bool = opt(False, "Weights in fp8, quantised when they are loaded.")
    extra_args: list[str] = opt([], "Further flags of sglang.launch_server, e.g. [--kv-cache-dtype, fp8_e5m2].")


@dataclass
class EngineConfig:
    kind: str = opt(
        "local", "sglang: SGLang servers, over HTTP. local: embedded generation with transformers.", choices=("local", "sglang")
    )
    device: str = opt("cpu", "Where the engine, or the servers it launches, run.", choices=("cpu", "cuda"))
    dtype: str = opt("float32", "Weights and activations of the engine.", choices=("float32", "bfloat16"))
    batch_size: int = opt(32, "local: sequences decoded together.")
    launch: bool = opt(False, "sglang: start and stop servers (false: attach to engine.student.urls, engine.teacher.urls).", layout=True)
    keep_servers: bool = opt(
        False,
        "launch: servers stay up while the learner trains, on GPUs of their own (false: they give their GPUs back before training).",
        layout=True,
    )
    python: str | None = opt(
        None,
        "launch: Python of the environment with SGLang (null: this one; on cpu .venv-sglang/bin/python if it is there).",
        layout=True,
    )
    deterministic: bool = opt(
        False, "launch on cuda: --enable-deterministic-inference, so that a sample's seed decides its ids, whatever else is in the batch."
    )
    max_outstanding: int = opt(256, "sglang: requests in flight per server.", layout=True)
    attempts: int = opt(5, "sglang: a request that failed so often, on every server, is recorded as abort with its reason.", layout=True)
    connect_timeout_s: float = opt(10.0, "sglang: seconds until a connection stands.", layout=True)
    read_timeout_s: float = opt(60.0, "sglang: seconds between two pieces of an answer once it has begun.", layout=True)
    request_timeout_s: float = opt(3600.0, "sglang: seconds for one request, queueing in the server included.", layout=True)
    start_timeout_s: float = opt(1800.0, "launch: seconds until a server must be healthy.", layout=True)
    give_up_after_s: float = opt(600.0, "sglang: seconds without any healthy server after which the run ends.", layout=True)
    student: ServersConfig = opt(ServersConfig, "Servers of the student; in OPSD they refine too.")
    teacher: ServersConfig = opt(ServersConfig, "OPD: servers of the teacher.")


@dataclass
class CodeVerifyConfig:
    timeout_s: float = opt(10.0, "Wall-clock limit of one test of a program, in seconds.", layout=True)
    total_timeout_s: float = opt(120.0, "Wall-clock limit of all tests of a program together, in seconds.", layout=True)
    memory_mb: int = opt(1024, "Memory that a program may take, in MB.", layout=True)
    allow_unsandboxed: bool = opt(
        False, "Run generated programs where this machine gives no full sandbox (`trd doctor` says what is missing).", layout=True
    )


@dataclass
class VerifyConfig:
    """How responses are graded. A change makes nothing stale: it is for what is generated from then on, and for `trd grade`."""

    timeout_s: float = opt(10.0, "Wall-clock limit per graded answer, in seconds.", layout=True)
    workers: int = opt(2, "Grading processes.", layout=True)
    code: CodeVerifyConfig = opt(CodeVerifyConfig, "Grading of programs.")


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
    cpu_threads: int | None = opt(None, "device=cpu: threads of each rank (null: the machine's cores, shared out).", layout=True)
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
    decay_when: dict[str, float] = opt(
        {},
        "job=sft: {SOURCE: P}, the rate stays at its peak until the held-out responses of each source have mean probability P, then falls "
        "over learner.decay_steps and training ends ({}: it falls over all steps).",
    )
    decay_steps: int = opt(300, "With learner.decay_when: steps over which the rate falls.")
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
    teacher: bool = opt(False, "OPD: the teacher is evaluated too, under the student's prompts.")
    samples: int = opt(16, "Samples per problem; Avg@k uses k = samples, Pass@k every k up to it.")
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
class ClusterConfig:
    """Where `trd launch` runs the stages, and what `trd plan` reckons with. Nothing of it changes a result."""

    kind: str = opt(
        "none", "Which scheduler (cluster=NAME sets it).", choices=("none", "local", "docker", "slurm", "kubernetes"), layout=True
    )
    gpu: str = opt(
        "H100", "Which GPUs a node has, for `trd plan`.", choices=("A100-40GB", "A100-80GB", "H100", "H200", "B200"), layout=True
    )
    gpus_per_node: int = opt(8, "GPUs of a node.", layout=True)
    trd: str = opt("trd", "How a job calls us, e.g. /shared/trd_megatron/.venv/bin/trd.", layout=True)
    package: str = opt(
        "installed",
        "What a job runs. installed: what cluster.trd finds. git (slurm, docker): the commit that you stand on, brought along.",
        choices=("installed", "git"),
        layout=True,
    )
    setup: list[str] = opt([], "Lines of shell before a job's command, e.g. [module load cuda].", layout=True)
    env: dict[str, str] = opt({}, "Variables of every job. No secrets: these are written down.", layout=True)
    secrets: list[str] = opt(
        ["HF_TOKEN", "WANDB_API_KEY", "SGLANG_API_KEY"],
        "Names of variables that jobs get by reference. slurm, local: from your environment; kubernetes: keys of cluster.secret_name.",
        layout=True,
    )
    secret_name: str | None = opt(None, "kubernetes: the Secret that holds cluster.secrets (null: none is passed).", layout=True)
    secrets_file: str | None = opt(None, "docker: a file of NAME=VALUE lines, mounted into the containers.", layout=True)
    learner_image: str | None = opt(None, "Container of the jobs that train (docker/learner.Dockerfile).", layout=True)
    rollout_image: str | None = opt(None, "Container of the jobs that generate (docker/rollout.Dockerfile).", layout=True)
    mounts: list[str] = opt([], "SOURCE:TARGET in containers; kubernetes: CLAIM:TARGET, of persistent volume claims.", layout=True)
    time_limit: str = opt("04:00:00", "slurm: of each job. It is asked to stop two minutes earlier, and put back.", layout=True)
    partition: str | None = opt(None, "slurm: partition of the jobs (null: Slurm's default).", layout=True)
    account: str | None = opt(None, "slurm: account that pays (null: yours).", layout=True)
    sbatch: dict[str, str] = opt({}, "slurm: further options of sbatch, e.g. {qos: high, reservation: r1}.", layout=True)
    retries: int = opt(3, "slurm: times that a job that failed or ran out of time is put back into the queue.", layout=True)
    namespace: str = opt("default", "kubernetes: namespace of the TrainJobs.", layout=True)


@dataclass
class Config:
    name: str = opt(MISSING, "Name of the experiment.")
    job: str = opt(
        "distill",
        "distill: the whole pipeline. sft: training on worked solutions. evaluate: only benchmarks, of the model at model.path.",
        choices=("distill", "sft", "evaluate"),
    )
    run_dir: str = opt("runs/${name}", "Folder of the run.", layout=True)
    seed: int = opt(0, "Seed of everything that is drawn.")
    rounds: int = opt(1, "Times that rollout, refine and train are repeated, each time with the newest student.")
    task: str = opt(
        "math", "What kind of problems: math has answers, code has tests, lab is the toy of docs/lab.md.", choices=("math", "code", "lab")
    )
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
    cluster: ClusterConfig = opt(ClusterConfig, "Where a launched run's stages run.")


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


def nearest(word: str, known: Sequence[str]) -> str:
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
    raise UserError(f"unknown key {key}: {nearest(key, list(known))}")


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def parse(text: str) -> Override:
    """KEY=VALUE as Hydra reads it. Raises UserError if it is nothing else."""
    if "=" not in text:
        raise UserError(f"'{text}' is not key=value, e.g. experiment=smoke")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise UserError(f"cannot read '{text}': {_one_line(error)}") from None
    if override.is_delete() or override.is_add():
        raise UserError(f"'{text}': write key=value; keys are neither added nor deleted")
    if override.package is not None:
        raise UserError(f"'{text}': write group=option, without a package")
    return override


def quoted(text: str) -> str:
    """`text` as an override's value, or in a list of them, so that `parse` reads exactly that, whatever is in it."""
    if re.fullmatch(r"[\w./-]+", text) and parse(f"key={text}").value() == text:
        return text
    # Hydra takes a backslash as one but before a quote.
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def _own_task(experiment: str) -> list[str]:
    """The task that an experiment is made for, if it names one: conf/config.yaml's, which comes last, would win over it."""
    task = yaml.safe_load((conf_dir() / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")).get("task")
    return [] if task is None else [f"task={task}"]


def load(overrides: Sequence[str]) -> Config:
    """Composes conf/ with `overrides` ("experiment=smoke", "learner.learning_rate=1e-4") and checks the result.

    Raises UserError with one line that names the key and the nearest valid one.
    """
    chosen: list[str] = []
    values: dict[str, Any] = {}
    group_names = groups()
    for text in overrides:
        override = parse(text)
        key = override.key_or_group
        if override.is_sweep_override():
            raise UserError(f"{key} has several values: `trd run --multirun` makes a run of each")
        if key in group_names:
            if any(earlier.startswith(f"{key}=") for earlier in chosen):
                raise UserError(f"{key} is given twice: keep one")
            if str(override.value()) not in options(key):
                close = difflib.get_close_matches(str(override.value()), options(key), n=1)
                hint = f"did you mean {close[0]}? " if close else ""
                raise UserError(f"no {key} named '{override.value()}': {hint}known: {', '.join(options(key))}")
            chosen.append(text)
        else:
            _check_key(key)
            values[key] = override.value()
    if not any(text.startswith("experiment=") for text in chosen):
        raise UserError(f"say which experiment: experiment=NAME, one of {', '.join(options('experiment'))}")

    if not any(text.startswith("task=") for text in chosen):
        chosen += _own_task(next(text for text in chosen if text.startswith("experiment=")).partition("=")[2])

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        try:
            composed = compose("config", overrides=chosen)
        except HydraException as error:
            raise UserError(f"the files in {conf_dir()} do not compose: {_one_line(error)}") from None
    return _build(OmegaConf.to_container(composed), values)


def from_dict(values: dict[str, Any], overrides: Sequence[str] = (), section: str = "") -> Config:
    """Rebuilds the configuration that `to_dict` wrote, with changes to one section of it. Raises UserError as `load` does."""
    changes = {}
    for text in overrides:
        override = parse(text)
        if not override.key_or_group.startswith(f"{section}."):
            raise UserError(f"'{text}': only {section}.* can be changed here")
        _check_key(override.key_or_group)
        changes[override.key_or_group] = override.value()
    return _build(values, changes)


def of_run(path: Path, overrides: Sequence[str] = (), section: str = "") -> Config:
    """The configuration of an existing run, with changes to one section of it. Raises UserError if `path` is no run."""
    from trd_megatron.run_dir import read_config

    values = read_config(path)
    try:
        config = from_dict(values)
    except UserError as error:
        raise UserError(f"{path / 'config.yaml'}: {error}") from None
    return from_dict(values, overrides, section) if overrides else config


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
        if isinstance(error, MissingMandatoryValue):
            raise UserError(f"{key} is not set: {known[key].metadata['help']}") from None
        if key in known and isinstance(get(Config(), key), list) and isinstance(values.get(key), str):
            raise UserError(f"{key} is a list: write {key}=[{values[key]}]") from None
        if key in known:
            raise UserError(f"{key}: {_one_line(error)}") from None
        raise UserError(f"unknown key {key}: {nearest(str(key), list(known))}") from None
    assert isinstance(config, Config)
    from trd_megatron.config_checks import check  # which imports this module

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
