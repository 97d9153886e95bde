"""`trd launch` against the real NeMo-Run: what it would submit to each scheduler, and a run on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.launching import ROOT, Trd

KUBECONFIG = {
    "apiVersion": "v1", "kind": "Config", "current-context": "here",
    "clusters": [{"name": "here", "cluster": {"server": "https://127.0.0.1:1"}}],
    "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    "users": [{"name": "me", "user": {"token": "t"}}],
}  # fmt: skip
THREE_KINDS_OF_NODES = [
    "experiment=opd_qwen3_1_7b", "engine.student.data_parallel_size=16", "engine.teacher.data_parallel_size=8",
    "learner.data_parallel_size=16",
]  # fmt: skip


def _dry(trd: Trd, *arguments: str, **variables: str) -> dict[str, str]:
    """{title: text} of a dry run, which leaves nothing behind."""
    done = trd("launch", *arguments, "--dry-run", **variables)
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("# === ")[1:]
    return {part.splitlines()[0]: part.partition("\n")[2] for part in parts}


def test_slurm_gets_a_script_for_each_job_with_its_own_nodes(trd: Trd, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    found = _dry(
        trd, *THREE_KINDS_OF_NODES, "cluster=slurm", "cluster.partition=h100", "cluster.account=me", "cluster.sbatch={qos: high}",
        "cluster.time_limit=01:30:00", "cluster.retries=5", "cluster.trd=/shared/trd", "cluster.env={NCCL_DEBUG: INFO}",
        "cluster.learner_image='nvcr.io#learner:1'", "cluster.mounts=[/shared:/shared]", f"run_dir={run_dir}",
        HF_TOKEN="a secret that is written nowhere",
    )  # fmt: skip
    titles = list(found)
    assert titles[0] == "prepare: sbatch --requeue --parsable"
    assert titles[2] == "rollout: sbatch --requeue --parsable --dependency=afterok:<id of prepare>"
    scripts = {title.split(":")[0]: text for title, text in found.items() if "sbatch" in title}
    assert list(scripts) == ["prepare", "rollout", "refine", "train", "evaluate"]
    for name, nodes in {"prepare": 1, "rollout": 2, "refine": 1, "train": 4, "evaluate": 2}.items():
        text = scripts[name]
        assert f"#SBATCH --nodes={nodes}\n" in text and "#SBATCH --ntasks-per-node=1\n" in text, name
        for option in ("partition=h100", "account=me", "qos=high", "time=01:30:00", "signal=TERM@120", "kill-on-invalid-dep=yes"):
            assert f"#SBATCH --{option}\n" in text, (name, option)
        assert ("#SBATCH --gpus-per-node=8\n" in text) == (name != "prepare")
        assert ("export TRD_HEAD=$head_node\n" in text) == (nodes > 1)
        assert "export TORCHX_MAX_RETRIES=5\n" in text
        assert ("--container-image nvcr.io#learner:1" in text) == (name == "train")
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert "--container-mounts /shared:/shared," in scripts["train"] and "--container-env HF_TOKEN" in scripts["train"]
    assert found["train: what each of its 4 nodes runs"].rstrip().endswith(f"run_dir={run_dir} --stages train,export")
    assert "export NCCL_DEBUG=INFO\n" in found["train: what each of its 4 nodes runs"]
    assert "written nowhere" not in str(found)
    assert not run_dir.exists()


def test_kubernetes_gets_a_trainjob_with_claims_and_secrets_by_reference(trd: Trd, tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(KUBECONFIG))
    found = _dry(
        trd, *THREE_KINDS_OF_NODES, "cluster=kubernetes", "cluster.learner_image=l:1", "cluster.rollout_image=r:1", "cluster.namespace=lab",
        "cluster.mounts=[runs:/runs]", "cluster.secret_name=keys", "run_dir=/runs/x", KUBECONFIG=str(kubeconfig), HF_TOKEN="a secret",
    )  # fmt: skip
    bodies: dict[str, Any] = {title.split(":")[0]: yaml.safe_load(text) for title, text in found.items()}
    trainer = bodies["train"]["spec"]["trainer"]
    assert bodies["train"]["kind"] == "TrainJob" and bodies["train"]["metadata"]["namespace"] == "lab"
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("l:1", 4, 1)
    assert bodies["rollout"]["spec"]["trainer"]["image"] == "r:1" and bodies["rollout"]["spec"]["trainer"]["numNodes"] == 2
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}
    assert trainer["command"][:2] == ["bash", "-c"] and "--stages train,export" in trainer["command"][2]
    token = next(variable for variable in trainer["env"] if variable["name"] == "HF_TOKEN")
    assert token == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "HF_TOKEN", "optional": True}}}
    pod = bodies["train"]["spec"]["podTemplateOverrides"][0]["spec"]
    assert {"name": "trd-0", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]
    assert {"name": "trd-0", "mountPath": "/runs"} in pod["containers"][0]["volumeMounts"]
    assert "a secret" not in str(bodies)


def test_docker_gets_containers_with_gpus_and_a_file_of_secrets(trd: Trd, tmp_path: Path) -> None:
    found = _dry(
        trd, "experiment=single_gpu", "cluster=docker", "cluster.learner_image=l:1", "cluster.rollout_image=r:1", "cluster.mounts=[/d:/d]",
        f"cluster.secrets_file={tmp_path / 'keys'}",
    )  # fmt: skip
    container = yaml.safe_load(found["train: container"])
    assert (container["image"], container["gpus"], container["ipc"]) == ("l:1", 1, "host")
    assert "/d:/d" in container["volumes"] and f"{tmp_path / 'keys'}:/run/secrets/trd:ro" in container["volumes"]
    assert "exec trd node experiment=single_gpu" in found["train: what it runs"]


def test_git_packs_the_commit_that_one_stands_on(trd: Trd, tmp_path: Path) -> None:
    found = _dry(trd, "experiment=smoke", "cluster=slurm", "cluster.package=git", f"run_dir={tmp_path / 'run'}")
    text = found["train: what it runs"]
    assert f"export PYTHONPATH={tmp_path / 'run'}/launch/" in text and "/train/code\n" in text


def test_a_container_without_an_image_is_one_line(trd: Trd) -> None:
    done = trd("launch", "experiment=smoke", "cluster=docker", "--dry-run")
    assert done.returncode == 2 and "set cluster.rollout_image" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_kubernetes_without_access_to_a_cluster_is_one_line(trd: Trd, tmp_path: Path) -> None:
    done = trd(
        "launch", "experiment=smoke", "cluster=kubernetes", "cluster.rollout_image=r:1", "cluster.learner_image=l:1", "--dry-run",
        KUBECONFIG=str(tmp_path / "none"), HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 2 and "finds no access to a cluster" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_smoke_runs_on_this_machine_job_by_job(trd: Trd, nemo_home: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["experiment=smoke", "cluster=local", f"cluster.trd={sys.executable} -m trd_megatron.cli", f"run_dir={run_dir}"]
    done = trd("launch", *arguments, "--stages", "prepare,rollout", HF_TOKEN="a-secret", SGLANG_API_KEY="a-secret")
    assert done.returncode == 0, done.stderr
    written = [path for folder in (run_dir, nemo_home) for path in folder.rglob("*") if path.is_file()]
    assert written and not [path for path in written if b"a-secret" in path.read_bytes()]
    assert json.loads((run_dir / "rollouts" / "manifest.json").read_text())["status"] == "done"
    status = trd("status", str(run_dir))
    assert "Jobs on local" in status.stdout and "rollout" in status.stdout and status.stdout.count("succeeded") == 2


def test_a_job_that_fails_ends_the_launch(trd: Trd, tmp_path: Path) -> None:
    arguments = ["experiment=smoke", "cluster=local", f"cluster.trd={sys.executable} -m trd_megatron.cli", f"run_dir={tmp_path / 'run'}"]
    done = trd("launch", *arguments, f"data.path={tmp_path / 'missing.jsonl'}")
    assert done.returncode == 1, done.stdout
    assert "job prepare ended with failed" in done.stderr
    assert not (tmp_path / "run" / "rollouts").exists()


def test_the_nemo_style_entry_is_the_same(launch_python: Path, nemo_home: Path, tmp_path: Path) -> None:
    command = [str(launch_python), "tools/nemo_launcher.py", "experiment=smoke", "stages=[rollout,train]", "cluster.partition=debug",
               f"base_results_dir={tmp_path}", "dry_run=true"]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"NEMORUN_HOME": str(nemo_home), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#SBATCH --partition=debug") == 2
    assert f"run_dir={tmp_path}/smoke --stages train" in done.stdout


def test_a_scheduler_that_is_not_there_is_one_line(trd: Trd, tmp_path: Path) -> None:
    images = ["cluster.learner_image=l:1", "cluster.rollout_image=r:1", f"run_dir={tmp_path / 'run'}"]
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(KUBECONFIG))
    places = {"docker": {"DOCKER_HOST": "tcp://127.0.0.1:1"}, "kubernetes": {"KUBECONFIG": str(kubeconfig)}}
    for kind, variables in places.items():
        done = trd("launch", "experiment=smoke", f"cluster={kind}", *images, **variables)
        assert done.returncode == 2 and f"{kind} is not to be reached" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_what_was_submitted_before_a_refusal_is_taken_back(trd: Trd, tmp_path: Path) -> None:
    """A queue that has room for two jobs: commands in the place of Slurm's."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "sbatch").write_text(
        f"#!/bin/sh\necho x >> {tmp_path}/asked; n=$(wc -l < {tmp_path}/asked)\n"
        'if [ "$n" -gt 2 ]; then echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; fi; echo "70$n"\n'
    )
    (commands / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/cancelled\n')
    for file in commands.iterdir():
        file.chmod(0o755)
    done = trd(
        "launch",
        "experiment=smoke",
        "cluster=slurm",
        "cluster.trd=bash",
        f"run_dir={tmp_path / 'run'}",
        PATH=f"{commands}:{os.environ['PATH']}",
    )
    assert done.returncode == 2 and "QOSMaxSubmitJobPerUserLimit" in done.stderr, done.stderr
    assert (tmp_path / "cancelled").read_text().split() == ["701", "702"]
    assert not (tmp_path / "run" / "launch" / "jobs.json").exists()
