"""The hand-over to the learner's ranks (of the train stage, of score.py), and how they are started. Imports no Megatron."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trd_megatron import nodes, processes
from trd_megatron.config import LearnerConfig
from trd_megatron.errors import UserError
from trd_megatron.learner.packing import Sample
from trd_megatron.nodes import Leader, NodeFailedError, Place
from trd_megatron.records import SAMPLE
from trd_megatron.run_dir import packed_ids, read_groups, write_json

JOB, SAMPLES, ERROR, LOG = "job.json", "samples.parquet", "error.json", "learner.log"
TOKEN_COLUMNS = ["student_prompt_ids", "teacher_prompt_ids", "response_ids"]
LOOK_EVERY_S = 0.5
ALONE_S = 20.0  # for our own ranks to end as well, when those of another node have failed
NODE_RANK = "TRD_LEARNER_NODE"  # environment variable of the ranks


Objective = Literal["distill", "sft"]


@dataclass(frozen=True)
class Job:
    """Everything a rank needs besides samples.parquet.

    work "score": of the model at student_path, see score.py. objective "sft": cross entropy of the responses, without a teacher
    (teacher_path None, the samples' teacher_prompt_ids empty). held_out: the last so many samples are the fixed batch (0:
    learner.held_out_samples are drawn).
    """

    config: dict[str, Any]
    student_path: str
    teacher_path: str | None
    epistemic_ids: list[int]
    work: Literal["train", "score"] = "train"
    objective: Objective = "distill"
    held_out: int = 0

    @staticmethod
    def read(folder: Path) -> "Job":
        return Job(**json.loads((folder / JOB).read_text(encoding="utf-8")))

    def write(self, folder: Path) -> None:
        write_json(folder / JOB, asdict(self))

    def samples(self, folder: Path) -> list[Sample]:
        """The trajectories in the order of the parquet file. Every rank holds all of them: 4 bytes for each token."""
        samples = []
        for table in read_groups(folder / SAMPLES, SAMPLE):
            ids = [packed_ids(table[name]) for name in TOKEN_COLUMNS]
            rows = table.drop_columns(TOKEN_COLUMNS).to_pylist()
            samples += [Sample(**row, **dict(zip(TOKEN_COLUMNS, of_row, strict=True))) for row, *of_row in zip(rows, *ids, strict=True)]
        return samples


class LearnerFailedError(RuntimeError):
    """A rank of the learner ended with an error."""


def run_ranks(folder: Path, config: LearnerConfig) -> Iterator[dict[str, Any]]:
    """`run_all` of one job: yields the metrics of its steps."""
    return (metrics for _, metrics in run_all([folder], config))


def torchrun(folders: Sequence[Path], config: LearnerConfig, place: Place, number: int) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of the ranks of one node. number: which meeting of the nodes this is, where there are several."""
    ranks = config.ranks // place.count
    command = [sys.executable, "-m", "trd_megatron.learner.torchrun", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"]
    if place.count == 1:
        command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        command += [f"--nnodes={place.count}", f"--rdzv-endpoint={place.head}:{place.port + 1}", f"--rdzv-id=trd-{number}"]
        command += [f"--rdzv-conf=is_host={'false' if place.rank else 'true'}", f"--local-addr={place.address}"]
    command += [f"--max-restarts={config.max_restarts}", "-m", "trd_megatron.learner", *map(str, folders)]
    threads = max((os.cpu_count() or 1) // ranks, 1) if config.device == "cpu" else 1
    own = {} if config.cpu_threads is None else {"OMP_NUM_THREADS": str(config.cpu_threads)}
    environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"} | dict(os.environ) | own
    environment |= {"PYTHONSAFEPATH": "1", processes.PARENT: str(os.getpid())}  # no modules from the folder the user stands in
    if place.count > 1:
        environment[NODE_RANK] = str(place.rank)
        # What the backends would guess is often another network, or none that others reach.
        interface = nodes.interface_of(place.address)
        if interface is not None:
            environment = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} | environment
    elif config.device == "cpu":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if config.device == "cuda" and config.tensor_model_parallel_size > 1 and config.context_parallel_size == 1:
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron: so that communication starts before the product beside it
    return command, environment


def end(process: "subprocess.Popen[Any]") -> None:
    """Ends torchrun, if it still runs. Its ranks are asked to save a checkpoint first: on every node, since they do it together."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()  # its ranks die with it
            process.wait()


def _watch(leader: Leader, number: int, process: "subprocess.Popen[str]", lost: list[NodeFailedError]) -> None:
    """Ends node 0's ranks once another node cannot come back to them: torchrun would wait ten minutes for it."""
    alone_since: float | None = None  # when the ranks of another node were first seen to have failed
    try:
        while process.poll() is None:
            leader.check()
            failed = [rank for rank, code in leader.early_answers(number).items() if code]
            if failed and alone_since is None:
                alone_since = time.monotonic()
            if alone_since is not None and time.monotonic() - alone_since > ALONE_S:
                raise NodeFailedError(f"the ranks of node {failed[0]} failed: its log is node-{failed[0]}-{LOG}")
            time.sleep(LOOK_EVERY_S)
    except NodeFailedError as error:
        lost.append(error)
        end(process)


def run_all(folders: Sequence[Path], config: LearnerConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """Starts the ranks with torchrun, who do the jobs of these folders one after the other, and yields (index of the job, metrics) of each
    step as it ends (of work "score": nothing). `config`: of one of them; all need as many ranks, on the same device.

    Raises UserError for what the user can mend, LearnerFailedError (with the path of the log, which lies in the first folder) for the
    rest; the jobs before are done then. The ranks are killed when the caller stops reading or dies.
    """
    for folder in folders:
        (folder / ERROR).unlink(missing_ok=True)
    of_node = nodes.share("learner ranks (tensor_model_parallel_size x context_parallel_size x data_parallel_size)", config.ranks)
    if of_node % config.tensor_model_parallel_size:
        raise UserError(
            f"learner.tensor_model_parallel_size={config.tensor_model_parallel_size} does not fit into a node's {of_node} ranks: "
            "tensor parallelism stays inside a node"
        )
    place = Place() if nodes.leader is None else nodes.leader.place
    number = 0 if nodes.leader is None else nodes.leader.ask("train", folders=[str(folder.absolute()) for folder in folders])
    command, environment = torchrun(folders, config, place, number)
    log_file = folders[0] / LOG
    with log_file.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        lost: list[NodeFailedError] = []
        if nodes.leader is not None:
            threading.Thread(target=_watch, args=(nodes.leader, number, process, lost), daemon=True, name="watch").start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    metrics = json.loads(line)
                    yield metrics.pop("job"), metrics
                else:
                    log.write(line)
            code = process.wait()
        finally:
            end(process)
    if code == 0:
        return
    found = [folder / ERROR for folder in folders if (folder / ERROR).exists()]
    if found:
        error = json.loads(found[0].read_text(encoding="utf-8"))
        if error["kind"] == UserError.__name__:
            raise UserError(error["message"])
        raise LearnerFailedError(error["message"])
    if lost:
        raise lost[0]
    raise LearnerFailedError(f"the learner ended with exit code {code}: see {log_file}")
