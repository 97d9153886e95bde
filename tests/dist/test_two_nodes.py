"""Two machines that train together (`trd node`): network namespaces with a cable between them, and two processes on this one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from trd_megatron.learner.checkpoint_files import saved_steps

ONE_NODE = ["experiment=smoke", "learner.tensor_model_parallel_size=2", "learner.sequence_parallel=true", "learner.data_parallel_size=2"]
HOSTS = ("10.77.29.1", "10.77.29.2")


def _node(arguments: Sequence[str], place: dict[str, str], inside: Sequence[str] = ()) -> "subprocess.Popen[str]":
    command = [*inside, sys.executable, "-m", "trd_megatron.cli", "node", *arguments]
    return subprocess.Popen(command, env=os.environ | place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _two(run_dir: Path, head: str, port: int, inside: Sequence[Sequence[str]], *more: str) -> "list[subprocess.Popen[str]]":
    arguments = [*ONE_NODE, f"run_dir={run_dir}", *more, "--stages", "train"]
    places = [{"TRD_NODES": "2", "TRD_NODE_RANK": str(rank), "TRD_HEAD": head, "TRD_PORT": str(port)} for rank in (0, 1)]
    return [_node(arguments, place, words) for place, words in zip(places, inside, strict=True)]


def _metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "train" / "metrics.jsonl").read_text().splitlines()]


def _same(run_dir: Path, other: Path) -> None:
    ours, theirs = _metrics(run_dir), _metrics(other)
    assert len(ours) == len(theirs) >= 5
    for mine, its in zip(ours, theirs, strict=True):
        for key in ("loss", "kl", "grad_norm"):
            assert mine[key] == pytest.approx(its[key], rel=1e-5), key


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of smoke up to its rewrites."""
    run_dir = tmp_path_factory.mktemp("nodes") / "run"
    subprocess.run([sys.executable, "-m", "trd_megatron.cli", "run", "experiment=smoke", f"run_dir={run_dir}", "--until", "refine"], check=True)
    return run_dir


@pytest.fixture(scope="module")
def one_node(rewritten: Path) -> Path:
    """The same trained by four ranks of one node."""
    run_dir = rewritten.with_name("one_node")
    shutil.copytree(rewritten, run_dir)
    node = _node([*ONE_NODE, f"run_dir={run_dir}", "--stages", "train"], {})
    assert node.wait(240) == 0, node.stdout and node.stdout.read()
    return run_dir


@pytest.fixture
def machines() -> Iterator[tuple[str, list[list[str]]]]:
    """(address of the first, words that run a command inside of each) of two network namespaces with a cable between them; where those need
    rights that we lack, of this machine twice."""
    names = [f"trd-test-{os.getpid()}-{rank}" for rank in (0, 1)]
    ends = [f"trd{os.getpid() % 100000}{rank}" for rank in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except (subprocess.CalledProcessError, FileNotFoundError):
            yield "127.0.0.1", [[], []]
            return
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, host in zip(names, ends, HOSTS, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{host}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield HOSTS[0], [["ip", "netns", "exec", name] for name in names]
    finally:
        if shutil.which("ip") is not None:
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_machines_give_the_losses_of_one(
    rewritten: Path, one_node: Path, tmp_path: Path, machines: tuple[str, list[list[str]]]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(rewritten, run_dir)
    head, inside = machines
    nodes = _two(run_dir, head, 29400, inside)
    assert [node.wait(240) for node in nodes] == [0, 0], [node.stdout and node.stdout.read() for node in nodes]
    _same(run_dir, one_node)


def _wait_for_steps(nodes: "list[subprocess.Popen[str]]", metrics: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline and nodes[0].poll() is None, nodes[0].stdout and nodes[0].stdout.read()
        time.sleep(0.1)


def test_when_a_node_is_killed_the_other_ends_and_the_run_goes_on(rewritten: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(rewritten, run_dir)
    metrics = run_dir / "train" / "metrics.jsonl"
    complaints = {1: "node 1 has not been heard of for", 0: "does not reach node 0 at 127.0.0.1:29620"}
    for steps, (killed, complaint) in zip((6, 14), complaints.items(), strict=True):
        nodes = _two(run_dir, "127.0.0.1", 29620, [[], []], "learner.epochs=6")
        _wait_for_steps(nodes, metrics, steps)
        nodes[killed].send_signal(signal.SIGKILL)
        other = nodes[1 - killed]
        assert other.wait(100 if killed else 60) == 1  # a lost node is noticed after 30 s
        assert other.stdout is not None and complaint in other.stdout.read()

    nodes = _two(run_dir, "127.0.0.1", 29630, [[], []], "learner.epochs=6")
    assert [node.wait(240) for node in nodes] == [0, 0], [node.stdout and node.stdout.read() for node in nodes]
    assert [row["step"] for row in _metrics(run_dir)] == list(range(1, 31))


def test_when_all_nodes_are_asked_to_stop_the_ranks_save_together(rewritten: Path, tmp_path: Path) -> None:
    """As a scheduler does before the time is up."""
    run_dir = tmp_path / "run"
    shutil.copytree(rewritten, run_dir)
    nodes = _two(run_dir, "127.0.0.1", 29660, [[], []], "learner.epochs=40", "learner.checkpoint_interval=1000")
    metrics = run_dir / "train" / "metrics.jsonl"
    _wait_for_steps(nodes, metrics, 3)
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    assert [node.wait(100) for node in nodes] == [130, 130], [node.stdout and node.stdout.read() for node in nodes]
    reached = len(metrics.read_text().splitlines())
    assert reached < 200 and saved_steps(run_dir / "train" / "checkpoints") == [reached]


def test_ranks_that_cannot_be_dealt_to_the_nodes_are_refused(rewritten: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(rewritten, run_dir)
    nodes = _two(run_dir, "127.0.0.1", 29640, [[], []], "learner.tensor_model_parallel_size=1", "learner.sequence_parallel=false", "learner.data_parallel_size=1")
    assert nodes[0].wait(120) == 2
    assert nodes[1].wait(60) == 1
    assert nodes[0].stdout is not None
    assert "learner ranks" in (said := nodes[0].stdout.read()) and "dealt evenly to 2 nodes" in said
