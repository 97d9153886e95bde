"""The jobs of a launched run: which stages belong together, on how many nodes and GPUs, and what each job runs. Knows no scheduler."""

import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trd_megatron.config import Config, ServersConfig, parse, quoted
from trd_megatron.errors import UserError
from trd_megatron.pipeline import GROUPS, Stage, roles, wanted

TOGETHER = (("prepare",), ("rollout",), ("refine",), ("train", "export"), ("evaluate", "report"))  # what is short goes with its neighbour
SECRETS_PLACE = "/run/secrets/trd"
CODE_ROOT = "/nemo_run"


@dataclass(frozen=True)
class Job:
    """One job. stages: as `trd node --stages` takes them. gpus: of each node. trains: it wants the learner's image, else the servers'."""

    name: str
    stages: tuple[str, ...]
    nodes: int = 1
    gpus: int = 0
    trains: bool = False


def jobs(config: Config, stages: Sequence[str] | None = None) -> list[Job]:
    """All jobs in order, each to begin when the one before has ended well. stages: only those of these groups.

    Raises UserError for a stage that the run does not have, and for ranks or servers that cannot be dealt evenly to nodes.
    """
    for name in stages or ():
        if name not in GROUPS:
            raise UserError(f"no stage '{name}': stages are {', '.join(GROUPS)}")
    found = []
    for number in range(config.rounds):
        for groups in TOGETHER:
            named = tuple(_named(config, number, groups, stages))
            if named:
                name = "-".join(part.replace("/", "-") for part in named[:1])
                found.append(Job(name, named, *_size(config, named[0].rpartition("/")[2]), groups[0] == "train"))
    if not found:
        raise UserError(f"{', '.join(stages or ())}: this run has no such stage")
    return found


def _named(config: Config, number: int, groups: Sequence[str], chosen: Sequence[str] | None) -> Iterator[str]:
    """The stages of a round that the run has, as the command line names them."""
    for group in groups:
        of_group: list[Stage] = [stage for stage in wanted(config) if stage.group == group and number in stage.rounds_of(config)]
        if of_group and (chosen is None or group in chosen):
            several = config.rounds > 1 and any(stage.rounds == "each" for stage in of_group)
            yield f"{number}/{group}" if several else group


def _size(config: Config, group: str) -> tuple[int, int]:
    """(nodes, GPUs of each)."""
    if group == "train":
        learner = config.learner
        if learner.device != "cuda":
            return 1, 0
        nodes, gpus = _deal(config, "learner ranks", learner.ranks)
        if gpus % learner.tensor_model_parallel_size:
            raise UserError(
                f"learner.tensor_model_parallel_size={learner.tensor_model_parallel_size} does not fit into a node's {gpus} ranks: "
                "tensor parallelism stays inside a node"
            )
        return nodes, gpus
    engine = config.engine
    asked = roles(config, group)
    if not asked or engine.device != "cuda" or (engine.kind == "sglang" and not engine.launch):
        return 1, 0
    if engine.kind == "local":
        return 1, 1
    sizes = {role: _servers(config, role, getattr(engine, role)) for role in asked}
    nodes = max(count for count, _ in sizes.values())
    if len({count for count, _ in sizes.values()}) > 1:
        raise UserError(
            f"engine.student and engine.teacher need {sizes['student'][0]} and {sizes['teacher'][0]} nodes in one job: make them equal"
        )
    return nodes, max(gpus for _, gpus in sizes.values())


def _servers(config: Config, role: str, servers: ServersConfig) -> tuple[int, int]:
    key = f"engine.{role}"
    if servers.tensor_parallel_size > config.cluster.gpus_per_node:
        raise UserError(
            f"{key}.tensor_parallel_size={servers.tensor_parallel_size} is more than cluster.gpus_per_node={config.cluster.gpus_per_node}: "
            "a server stays inside a node"
        )
    nodes, _ = _deal(
        config, f"{key}: GPUs (data_parallel_size x tensor_parallel_size)", servers.data_parallel_size * servers.tensor_parallel_size
    )
    if servers.data_parallel_size % nodes:
        raise UserError(
            f"{key}.data_parallel_size={servers.data_parallel_size} servers cannot be dealt evenly to {nodes} nodes: choose a multiple"
        )
    return nodes, servers.data_parallel_size // nodes * servers.tensor_parallel_size


def _deal(config: Config, what: str, total: int) -> tuple[int, int]:
    """(nodes, GPUs of each) of so many GPUs."""
    nodes = -(-total // config.cluster.gpus_per_node)
    if total % nodes:
        raise UserError(f"{total} {what} cannot be dealt evenly to {nodes} nodes of cluster.gpus_per_node={config.cluster.gpus_per_node}")
    return nodes, total // nodes


def check_trd(config: Config, jobs: Sequence[Job]) -> None:
    """Raises UserError if a job that runs in no container would not find cluster.trd; cluster.setup may bring it along."""
    cluster = config.cluster
    bare = cluster.kind == "local" or any((cluster.learner_image if job.trains else cluster.rollout_image) is None for job in jobs)
    command = (shlex.split(cluster.trd) or [""])[0]
    if bare and cluster.kind in ("local", "slurm") and not cluster.setup and shutil.which(command) is None:
        where = "this machine" if cluster.kind == "local" else "the file system that the nodes share"
        raise UserError(f"cluster.trd={cluster.trd}: there is no such command here; give the path of an environment's trd on {where}")


def script(config: Config, overrides: Sequence[str], job: Job, workdir: Path) -> str:
    """What every node of a job runs, in bash. workdir: where the overrides' relative paths count from; pods have no such folder.

    Raises UserError for what NeMo-Run would change or break.
    """
    cluster = config.cluster
    lines = ["set -e", "export TERM=dumb COLUMNS=140  # srun's unbuffered output looks like a terminal"]
    if cluster.kind == "docker" and cluster.secrets_file is not None:
        lines += ["set -a", f". {SECRETS_PLACE}", "set +a"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    own = [*cluster.setup] + ([] if cluster.kind == "kubernetes" else [f"cd {shlex.quote(str(workdir))}"])
    words = [*shlex.split(cluster.trd), "node", *_kept(config, overrides, workdir), "--stages", ",".join(job.stages)]
    own.append(f"exec {shlex.join(words)}")
    if any(CODE_ROOT in line for line in [*lines, *own]):
        raise UserError(f"NeMo-Run has a folder {CODE_ROOT} of its own in every job: use no path with {CODE_ROOT} in it")
    if cluster.package == "git":
        lines.append(f"export PYTHONPATH={CODE_ROOT}/code")  # NeMo-Run puts the folder's true place here, outside of containers
    return "\n".join([*lines, *own]) + "\n"


def _kept(config: Config, overrides: Sequence[str], workdir: Path) -> list[str]:
    """The user's settings; the run directory by its absolute path, and not the scheduler's."""
    run_dir = str(workdir / config.run_dir)
    if config.cluster.kind == "slurm" and any(letter.isspace() for letter in run_dir):
        raise UserError(f"run_dir={run_dir}: sbatch and srun take no path with a blank in it, choose another")
    kept = [text for text in overrides if parse(text).key_or_group.split(".")[0] not in ("cluster", "run_dir")]
    return [*kept, f"run_dir={quoted(run_dir)}"]
