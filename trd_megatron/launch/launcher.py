"""`trd launch`: hands a run's jobs to NeMo-Run."""

import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nemo_run
import yaml
from torchx.specs.api import AppState

from trd_megatron.config import Config
from trd_megatron.engine.base import API_KEY
from trd_megatron.errors import UserError
from trd_megatron.launch import slurm
from trd_megatron.launch.executors import executor
from trd_megatron.launch.jobs import Job, script
from trd_megatron.launch.records import JobFailedError, Launched, LaunchedJob
from trd_megatron.run_dir import LAUNCH


def launch(config: Config, overrides: Sequence[str], jobs: Sequence[Job]) -> Launched:
    """Submits the jobs. slurm: returns when all are in the queue, each waiting for the one before; else runs one after the other.

    Raises UserError for what the scheduler refuses, JobFailedError where a job that was waited for failed.
    """
    folder = (Path(config.run_dir) / LAUNCH).absolute()
    if config.cluster.kind == "slurm" and any(job.nodes > 1 for job in jobs):
        os.environ.setdefault(API_KEY, secrets.token_urlsafe(32))  # sbatch hands it on; nothing writes it down
    launched = Launched(config.cluster.kind, folder, [])
    together = [list(jobs)] if config.cluster.kind == "slurm" else [[job] for job in jobs]
    for group in together:
        with _refusals(config.cluster.kind), _experiment(config, overrides, group, folder) as experiment:
            try:
                experiment.run(detach=config.cluster.kind == "slurm", tail_logs=config.cluster.kind != "slurm")
            except Exception:
                if config.cluster.kind == "slurm":  # nobody would know of those that are in the queue already
                    slurm.cancel([_app_id(job) for job in experiment.jobs if job.launched])
                raise
            for job, of_nemo in zip(group, experiment.jobs, strict=True):
                launched.jobs.append(LaunchedJob(job.name, _app_id(of_nemo), job.stages, job.nodes, job.gpus, of_nemo.executor.job_dir))
            launched.write()
        if config.cluster.kind != "slurm":  # it was waited for
            state, last = experiment.jobs[0].state, launched.jobs.pop()
            launched.jobs.append(replace(last, ended=state.name.lower()))
            launched.write()
            if state != AppState.SUCCEEDED:
                raise JobFailedError(f"job {last.name} ended with {state.name.lower()}; its log lies in {last.folder}")
    return launched


def dry_run(config: Config, overrides: Sequence[str], jobs: Sequence[Job]) -> Iterator[tuple[str, str]]:
    """(title, text) of everything that would be handed over, exactly as it would be. Nothing is submitted, nothing is left behind."""
    home, kind = str((Path(config.run_dir) / LAUNCH).absolute()), config.cluster.kind
    with tempfile.TemporaryDirectory() as place, _experiment(config, overrides, jobs, Path(place)) as experiment:
        experiment.dryrun(log=False, delete_exp_dir=False)
        for job, of_nemo in zip(jobs, experiment.jobs, strict=True):
            request = of_nemo._dryrun_info.request
            if kind == "slurm":
                words = [*request.launch_cmd, *(f"--dependency=afterok:<id of {name}>" for name in of_nemo.dependencies)]
                yield f"{job.name}: {' '.join(words)}", request.materialize().replace(place, home)
            elif kind == "kubernetes":
                body = of_nemo.executor.get_job_body(of_nemo.executor._trainjob_name(job.name), request.cmd)
                yield f"{job.name}: TrainJob", yaml.safe_dump(body, sort_keys=False)
            elif kind == "docker":
                yield f"{job.name}: container", yaml.safe_dump(_container(request.containers[0]), sort_keys=False)
            if kind != "kubernetes":
                [file] = Path(of_nemo.executor.job_dir).glob("scripts/*.sh")
                what = f"what each of its {job.nodes} nodes runs" if job.nodes > 1 else "what it runs"
                yield f"{job.name}: {what}", file.read_text(encoding="utf-8").replace(place, home)


def _container(container: Any) -> dict[str, Any]:
    of = container.executor
    return {
        "image": of.container_image, "command": container.command, "volumes": of.volumes,
        "gpus": of.num_gpus, "runtime": of.runtime, "ipc": of.ipc_mode, "network": of.network,
    }  # fmt: skip


@contextlib.contextmanager
def _experiment(config: Config, overrides: Sequence[str], jobs: Sequence[Job], folder: Path) -> Iterator[Any]:
    """NeMo-Run's experiment of these jobs, each depending on the one before."""
    experiment = nemo_run.Experiment(
        config.name,
        id=f"{config.name}_{time.time_ns()}",
        base_dir=str(folder),
        log_level="WARNING",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    )
    with experiment:
        before: list[str] = []
        for job in jobs:
            text = script(config, overrides, job, Path.cwd())
            if config.cluster.kind == "kubernetes":  # there is no folder that NeMo-Run and the pods share
                task = nemo_run.Script(path="-c", args=[text], entrypoint="bash")
            else:
                task = nemo_run.Script(inline=text)
            before = [experiment.add(task, executor=executor(config.cluster, job, folder), name=job.name, dependencies=before)]
        yield experiment


@contextlib.contextmanager
def _refusals(kind: str) -> Iterator[None]:
    """What a scheduler says against a job, as a UserError."""
    from docker.errors import DockerException
    from invoke.exceptions import UnexpectedExit
    from kubernetes.client.rest import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except UnexpectedExit as error:
        raise UserError(f"{kind} refused: {' '.join(error.result.stderr.split())} (`{error.result.command}`)") from None
    except ApiException as error:
        raise UserError(f"{kind} refused: {error.status} {error.reason}: {' '.join(str(error.body).split())[:300]}") from None
    except (DockerException, HTTPError) as error:
        raise UserError(f"{kind} is not to be reached: {' '.join(str(error).split())[:300]}") from None


def _app_id(job: Any) -> str:
    """The scheduler's own id in NeMo-Run's handle, scheduler://session/id."""
    return str(job.handle.rpartition("/")[2])
