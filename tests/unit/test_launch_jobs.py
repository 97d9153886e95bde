"""Which jobs a run has, on how many nodes, and what each runs."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trd_megatron import nodes
from trd_megatron.config import load, quoted
from trd_megatron.errors import UserError
from trd_megatron.launch import nemo_style
from trd_megatron.launch.jobs import Job, check_trd, jobs, script
from trd_megatron.launch.records import Launched, LaunchedJob
from trd_megatron.pipeline import check_devices

OPD = ["experiment=opd_qwen3_1_7b", "cluster=slurm"]


def test_a_run_has_a_job_for_each_stage_and_its_small_neighbour() -> None:
    assert jobs(load(["experiment=smoke", "cluster=slurm"])) == [
        Job("prepare", ("prepare",)),
        Job("rollout", ("rollout",)),
        Job("refine", ("refine",)),
        Job("train", ("train", "export"), trains=True),
        Job("evaluate", ("evaluate", "report")),
    ]


def test_a_method_without_rewrites_has_no_job_for_them_and_stages_can_be_chosen() -> None:
    config = load(["experiment=smoke", "method=forward_kl"])
    assert [job.name for job in jobs(config)] == ["prepare", "rollout", "train", "evaluate"]
    assert jobs(config, ["export", "report"]) == [Job("export", ("export",), trains=True), Job("report", ("report",))]
    with pytest.raises(UserError, match="no stage 'refined'"):
        jobs(config, ["refined"])
    with pytest.raises(UserError, match="refine: this run has no such stage"):
        jobs(config, ["refine"])


def test_every_round_has_jobs_of_its_own() -> None:
    found = jobs(load(["experiment=smoke", "rounds=2"]))
    assert [job.name for job in found] == [
        "prepare", "0-rollout", "0-refine", "0-train", "0-evaluate", "1-rollout", "1-refine", "1-train", "1-evaluate",
    ]  # fmt: skip
    assert found[3].stages == ("0/train", "0/export")
    assert found[4].stages == ("0/evaluate",)
    assert found[8].stages == ("1/evaluate", "report")


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        # (nodes, GPUs of each) of rollout, refine, train, evaluate; TP 2 x DP 4 ranks are the preset's
        ([], [(1, 8), (1, 8), (1, 8), (1, 8)]),
        (["engine.student.data_parallel_size=16"], [(2, 8), (1, 8), (1, 8), (2, 8)]),
        (["engine.teacher.data_parallel_size=8", "engine.teacher.tensor_parallel_size=4"], [(1, 8), (4, 8), (1, 8), (1, 8)]),
        (["learner.data_parallel_size=32"], [(1, 8), (1, 8), (8, 8), (1, 8)]),
        (["learner.data_parallel_size=32", "cluster.gpus_per_node=4"], [(2, 4), (2, 4), (16, 4), (2, 4)]),
        (["engine.student.data_parallel_size=2", "learner.data_parallel_size=1"], [(1, 2), (1, 8), (1, 2), (1, 2)]),
        (["engine.launch=false", "engine.student.urls=[http://a:1]", "engine.teacher.urls=[http://b:1]"], [(1, 0), (1, 0), (1, 8), (1, 0)]),
    ],
)
def test_servers_and_learner_get_nodes_by_their_sizes(settings: list[str], sizes: list[tuple[int, int]]) -> None:
    found = {job.name: (job.nodes, job.gpus) for job in jobs(load([*OPD, *settings]))}
    assert [found[name] for name in ("rollout", "refine", "train", "evaluate")] == sizes
    assert found["prepare"] == (1, 0)


def test_what_neither_trains_nor_generates_gets_no_gpu() -> None:
    assert [(job.stages, job.gpus) for job in jobs(load(OPD), ["export", "report"])] == [(("export",), 0), (("report",), 0)]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["engine.student.data_parallel_size=9"], "cannot be dealt evenly to 2 nodes"),
        (["engine.student.tensor_parallel_size=16", "engine.student.data_parallel_size=1"], "a server stays inside a node"),
        (
            ["learner.tensor_model_parallel_size=1", "learner.sequence_parallel=false", "learner.data_parallel_size=17"],
            "17 learner ranks cannot be dealt evenly to 3 nodes",
        ),
        (["learner.data_parallel_size=5"], "does not fit into a node's 5 ranks"),
        (["learner.tensor_model_parallel_size=8", "learner.data_parallel_size=1", "cluster.gpus_per_node=4"], "stays inside a node"),
        (["engine.teacher.data_parallel_size=16", "evaluate.teacher=true"], "need 1 and 2 nodes"),
    ],
)
def test_what_cannot_be_dealt_to_nodes_is_refused(settings: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        jobs(load([*OPD, *settings]))


def test_a_job_needs_no_gpus_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load([*OPD, "engine.student.data_parallel_size=16", "learner.data_parallel_size=16"])  # 1 to 4 nodes
    for job in jobs(config):
        monkeypatch.setattr(torch.cuda, "device_count", lambda job=job: job.gpus)
        monkeypatch.setattr(nodes, "members", job.nodes)
        check_devices(config, job.stages)
        if job.gpus:
            monkeypatch.setattr(torch.cuda, "device_count", lambda job=job: job.gpus - 1)
            with pytest.raises(UserError, match="GPU"):
                check_devices(config, job.stages)


def test_a_job_runs_trd_node_where_the_user_stood_with_what_the_user_said() -> None:
    overrides = ["experiment=smoke", "cluster=local", "cluster.trd=/shared/venv/bin/trd", "cluster.setup=[module load cuda]", "run_dir=r",
                 "data.path=a b.jsonl"]  # fmt: skip
    config = load(overrides)
    text = script(config, overrides, jobs(config)[3], Path("/home/me/work dir"))
    assert text.splitlines()[-3:] == [
        "module load cuda",
        "cd '/home/me/work dir'",
        "exec /shared/venv/bin/trd node experiment=smoke 'data.path=a b.jsonl' "
        + shlex.quote("run_dir='/home/me/work dir/r'") + " --stages train,export",
    ]  # fmt: skip


@pytest.mark.parametrize("folder", ["it's", 'two "quotes"', "a,b", "[x]", "$HOME", "a\\b", "a=b", "new\nline", "#1"])
def test_whatever_is_in_a_path_or_a_variable_arrives(folder: str, tmp_path: Path) -> None:
    """The script as bash reads it, and the override as Hydra does."""
    (tmp_path / folder).mkdir()
    overrides = ["experiment=smoke", "cluster=local", f"cluster.trd={sys.executable} {tmp_path}/show.py", f"data.path={quoted(folder)}",
                 f"cluster.env={{lower_case: {quoted(folder)}}}"]  # fmt: skip
    (tmp_path / "show.py").write_text("import json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ['lower_case'], os.getcwd()]))")
    config = load(overrides)
    text = script(config, overrides, jobs(config)[0], tmp_path / folder)
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, check=True)
    words, variable, where = json.loads(done.stdout)
    assert (words[0], words[-2:], variable, where) == ("node", ["--stages", "prepare"], folder, str(tmp_path / folder))
    again = load(words[1:-2])
    assert (again.data.path, again.run_dir) == (folder, str(tmp_path / folder / config.run_dir))


def test_pods_have_no_folder_that_the_user_stood_in() -> None:
    overrides = ["experiment=smoke", "cluster=kubernetes", "run_dir=/runs/x"]
    config = load(overrides)
    assert "cd " not in script(config, overrides, jobs(config)[0], Path("/home/me"))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["cluster=slurm", "run_dir=a b"], "no path with a blank"),
        (["cluster=slurm", "run_dir=/shared/nemo_runs/x"], "NeMo-Run has a folder /nemo_run"),
        (["cluster=local", "cluster.package=git"], "cluster=local brings no code along"),
        (["cluster=slurm", "cluster.secrets_file=keys"], r"cluster\.secrets_file is for cluster=docker"),
    ],
)
def test_what_nemo_run_would_break_or_leave_out_is_refused(settings: list[str], complaint: str) -> None:
    def make() -> str:
        config = load(["experiment=smoke", *settings])
        return script(config, settings, jobs(config)[0], Path("/w"))

    with pytest.raises(UserError, match=complaint):
        make()


def test_secrets_are_read_from_a_file_in_the_container_and_the_code_is_what_git_packed() -> None:
    overrides = ["experiment=smoke", "cluster=docker", "cluster.secrets_file=/me/keys", "cluster.package=git"]
    config = load(overrides)
    text = script(config, overrides, jobs(config)[0], Path("/w"))
    assert "set -a\n. /run/secrets/trd\nset +a" in text
    assert "PYTHONPATH=/nemo_run/code" in text
    assert "/me/keys" not in text


def test_what_was_launched_is_written_and_read(tmp_path: Path) -> None:
    assert Launched.read(tmp_path) is None
    launched = Launched("local", tmp_path / "launch", [LaunchedJob("train", "7", ["train"], 2, 8, "/logs")])
    launched.write()
    assert Launched.read(tmp_path) == launched
    (tmp_path / "launch" / "jobs.json").write_text("{")
    with pytest.raises(UserError, match=r"jobs\.json is damaged"):
        Launched.read(tmp_path)


@pytest.mark.parametrize("settings", [["cluster=slurm"], ["cluster=local"], ["cluster=slurm", "cluster.learner_image=l:1"]])
def test_a_trd_that_no_job_would_find_is_refused(settings: list[str]) -> None:
    config = load(["experiment=smoke", *settings, "cluster.trd=/nowhere/trd --verbose"])
    with pytest.raises(UserError, match=r"^cluster\.trd=: there is no such command here"):
        check_trd(load(["experiment=smoke", *settings, "cluster.trd=''"]), jobs(config))
    with pytest.raises(UserError, match=r"cluster\.trd=/nowhere/trd --verbose: there is no such command here; give the path"):
        check_trd(config, jobs(config))


@pytest.mark.parametrize(
    "settings",
    [
        ["cluster=slurm", "cluster.trd=/nowhere/trd", "cluster.setup=[module load trd]"],
        ["cluster=slurm", "cluster.trd=/nowhere/trd", "cluster.learner_image=l:1", "cluster.rollout_image=r:1"],
        ["cluster=docker", "cluster.trd=/nowhere/trd", "cluster.learner_image=l:1", "cluster.rollout_image=r:1"],
        ["cluster=local", f"cluster.trd={quoted(f'{sys.executable} -m trd_megatron.cli')}"],
    ],
)
def test_a_trd_that_is_there_or_may_be_is_not(settings: list[str]) -> None:
    config = load(["experiment=smoke", *settings])
    check_trd(config, jobs(config))


def test_a_nemo_launchers_configuration_becomes_ours() -> None:
    values = {
        "experiment": "smoke",
        "overrides": {"method": "forward_kl", "run_dir": "x y", "learner": {"lora": {"rank": 8}}, "learner.epochs": 2,
                      "student": {"chat_template_kwargs": {}}},
        "stages": ["rollout", "train"],
        "base_results_dir": "/r",
        "container": "a:1", "rollout_container": None, "container_mounts": ["/d:/d"],
        "env_vars": {"A": "b c", "B": "true", "C": "x\\y"}, "dry_run": True,
        "cluster": {"type": "bcm", "partition": "p", "account": None, "sbatch": {"qos": "high"}, "time_limit": "04:00:00"},
    }  # fmt: skip
    words = nemo_style.arguments(values)
    assert words[-3:] == ["--stages", "rollout,train", "--dry-run"]
    config = load(words[:-3])
    assert (config.cluster.kind, config.cluster.partition, config.cluster.account) == ("slurm", "p", None)
    assert (config.cluster.learner_image, config.cluster.rollout_image) == ("a:1", "a:1")
    assert config.cluster.env == {"A": "b c", "B": "true", "C": "x\\y"}
    assert (config.learner.lora.rank, config.learner.epochs) == (8, 2)
    assert "student.chat_template_kwargs={}" in words
    assert config.cluster.sbatch == {"qos": "high"} and config.cluster.mounts == ["/d:/d"]
    assert (config.method.name, config.run_dir, config.cluster.time_limit) == ("forward_kl", "x y", "04:00:00")
    with pytest.raises(ValueError, match=r"cluster\.type=pbs"):
        nemo_style.arguments(values | {"cluster": {"type": "pbs"}})
