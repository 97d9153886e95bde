"""NeMo-Run's executor of each scheduler, for one job. The only module, with launcher.py, that imports NeMo-Run."""

import os
from pathlib import Path
from typing import Any

import nemo_run
from nemo_run.core.execution.kubeflow import KubeflowExecutor

from trd_megatron.config import ClusterConfig
from trd_megatron.errors import UserError
from trd_megatron.launch.jobs import SECRETS_PLACE, Job

STOP_EARLIER_S = 120  # of the time limit: training writes a checkpoint meanwhile
HEAD = "$head_node"  # NeMo-Run's script of a Slurm job has the first node's name there


def executor(cluster: ClusterConfig, job: Job, folder: Path) -> Any:
    """For `job`; `folder` is where NeMo-Run keeps its files. Raises UserError if the scheduler lacks a setting."""
    make = {"local": _local, "docker": _docker, "slurm": _slurm, "kubernetes": _kubernetes}
    return make[cluster.kind](cluster, job, folder)


def _packager(cluster: ClusterConfig) -> Any:
    return nemo_run.GitArchivePackager() if cluster.package == "git" else nemo_run.Packager()


def _image(cluster: ClusterConfig, job: Job) -> str:
    key = "learner_image" if job.trains else "rollout_image"
    image = getattr(cluster, key)
    if image is None:
        raise UserError(f"cluster={cluster.kind} runs job {job.name} in a container: set cluster.{key} (docker/ builds them)")
    return str(image)


def _local(cluster: ClusterConfig, job: Job, folder: Path) -> Any:
    return nemo_run.LocalExecutor(packager=_packager(cluster))


def _docker(cluster: ClusterConfig, job: Job, folder: Path) -> Any:
    mounts = list(cluster.mounts)
    if cluster.secrets_file is not None:
        mounts.append(f"{Path(cluster.secrets_file).absolute()}:{SECRETS_PLACE}:ro")
    return nemo_run.DockerExecutor(
        container_image=_image(cluster, job),
        num_gpus=job.gpus or None,
        runtime="nvidia" if job.gpus else None,
        ipc_mode="host" if job.gpus else None,  # NCCL's shared memory
        network="host",  # servers and learner talk at the loopback address
        volumes=mounts,
        packager=_packager(cluster),
    )


def _slurm(cluster: ClusterConfig, job: Job, folder: Path) -> Any:
    image = cluster.learner_image if job.trains else cluster.rollout_image
    return nemo_run.SlurmExecutor(
        account=cluster.account,
        partition=cluster.partition,
        job_name_prefix="trd-",
        time=cluster.time_limit,
        nodes=job.nodes,
        ntasks_per_node=1,
        gpus_per_node=job.gpus or None,
        signal=f"TERM@{STOP_EARLIER_S}",  # to the steps: ours save and end, and the script puts the job back
        additional_parameters={"kill_on_invalid_dep": "yes"} | cluster.sbatch,
        container_image=image,
        container_mounts=list(cluster.mounts),
        container_env=[name for name in cluster.secrets if name in os.environ] if image else None,
        env_vars={"TRD_HEAD": HEAD} if job.nodes > 1 else {},
        retries=cluster.retries,
        packager=_packager(cluster),
        tunnel=nemo_run.LocalTunnel(job_dir=str(folder / "experiments")),
        poll_estimated_start_time=False,
    )


def _kubernetes(cluster: ClusterConfig, job: Job, folder: Path) -> Any:
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    for index, mount in enumerate(cluster.mounts):
        claim, _, target = mount.partition(":")
        volumes.append({"name": f"trd-{index}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"trd-{index}", "mountPath": target})
    if job.gpus:  # NCCL's shared memory: a container's own has 64 MiB
        volumes.append({"name": "trd-shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "trd-shm", "mountPath": "/dev/shm"})
    secrets = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": cluster.secret_name, "key": name, "optional": True}}}
        for name in (cluster.secrets if cluster.secret_name is not None else [])
    ]
    from kubernetes.config import ConfigException

    try:
        return KubeflowExecutor(
            image=_image(cluster, job),
            namespace=cluster.namespace,
            num_nodes=job.nodes,
            nprocs_per_node=1,  # our process starts the ranks
            gpus_per_node=job.gpus or None,
            volumes=volumes,
            volume_mounts=mounts,
            env_list=secrets,
            train_job_basename=f"trd-{job.name}",
        )
    except ConfigException as error:
        raise UserError(f"cluster=kubernetes finds no access to a cluster (KUBECONFIG, ~/.kube/config): {error}") from None
