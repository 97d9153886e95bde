"""Which node this is, and how the first asks the others."""

import contextlib
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trd_megatron import nodes
from trd_megatron.config import LearnerConfig
from trd_megatron.errors import UserError
from trd_megatron.learner import job
from trd_megatron.learner.job import run_ranks
from trd_megatron.nodes import Leader, NodeFailedError, Place


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place()),
        ({"TRD_NODE_RANK": "0", "TRD_NODES": "1"}, Place()),
        ({"TRD_NODE_RANK": "1", "TRD_NODES": "2", "TRD_HEAD": "a", "TRD_PORT": "5"}, Place(1, 2, "a", 5)),
        ({"SLURM_NODEID": "3", "SLURM_STEP_NUM_NODES": "4", "TRD_HEAD": "n0"}, Place(3, 4, "n0")),
        ({"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n0"}, Place()),
        ({"SLURM_NODEID": "0"}, Place()),  # not in a step
        ({"PET_NODE_RANK": "1", "PET_NNODES": "2", "PET_MASTER_ADDR": "pod-0"}, Place(1, 2, "pod-0")),
        (
            {"TRD_NODE_RANK": "0", "TRD_NODES": "2", "TRD_HEAD": "a", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2"},
            Place(0, 2, "a"),
        ),
    ],
)
def test_the_place_comes_from_the_scheduler(variables: dict[str, str], place: Place) -> None:
    assert Place.find(variables) == place


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"TRD_NODE_RANK": "2", "TRD_NODES": "2", "TRD_HEAD": "a"}, "none of the nodes 0 to 1"),
        ({"TRD_NODE_RANK": "x", "TRD_NODES": "2", "TRD_HEAD": "a"}, "whole numbers"),
        ({"TRD_NODE_RANK": "0", "TRD_NODES": "2"}, "TRD_HEAD"),
    ],
)
def test_variables_that_do_not_fit_are_refused(variables: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Place.find(variables)


def test_an_address_leads_to_its_interface() -> None:
    assert nodes.interface_of("127.0.0.1") == "lo"
    assert nodes.interface_of("203.0.113.7") is None


def test_the_leader_asks_and_every_other_node_answers_in_order() -> None:
    port = free_port()
    ended: list[int] = []

    def follower(rank: int) -> None:
        def add(asked: dict[str, Any], check: Any) -> int:
            check()
            return int(asked["a"]) + rank

        def fail(asked: dict[str, Any], check: Any) -> None:
            raise UserError(f"no such thing on {rank}")

        nodes.follow(Place(rank, 3, "127.0.0.1", port), {"add": add, "fail": fail}, lambda: None)
        ended.append(rank)

    threads = [threading.Thread(target=follower, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    leader = Leader(Place(0, 3, "127.0.0.1", port))
    first, second = leader.ask("add", a=10), leader.ask("add", a=20)
    assert leader.answers(second, 20) == [21, 22]
    assert leader.answers(first, 20) == [11, 12]
    with pytest.raises(NodeFailedError, match="node 1: no such thing on 1"):
        leader.answers(leader.ask("fail"), 20)
    leader.end()
    for thread in threads:
        thread.join(20)
    assert sorted(ended) == [1, 2]


def test_a_node_that_never_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MEET_S", 1.0)
    with pytest.raises(NodeFailedError, match=r"here/1"):
        Leader(Place(0, 2, "127.0.0.1", free_port()))
    with pytest.raises(NodeFailedError, match="node 1 of 2 does not reach node 0"):
        nodes.follow(Place(1, 2, "127.0.0.1", free_port()), {}, lambda: None)


def test_the_leader_hears_at_once_what_another_node_lacks() -> None:
    port = free_port()
    raised: list[str] = []

    def follower() -> None:
        def check() -> None:
            raise UserError("no GPUs here")

        try:
            nodes.follow(Place(1, 2, "127.0.0.1", port), {}, lambda: None, check)
        except UserError as error:
            raised.append(str(error))

    thread = threading.Thread(target=follower)
    thread.start()
    with pytest.raises(NodeFailedError, match="node 1: no GPUs here"):
        Leader(Place(0, 2, "127.0.0.1", port))
    thread.join(20)
    assert raised == ["no GPUs here"]


def test_the_leader_hears_of_what_ends_another_node() -> None:
    port = free_port()

    def follower() -> None:
        with contextlib.suppress(ZeroDivisionError):
            nodes.follow(Place(1, 2, "127.0.0.1", port), {"divide": lambda asked, check: 1 // 0}, lambda: None)

    thread = threading.Thread(target=follower)
    thread.start()
    leader = Leader(Place(0, 2, "127.0.0.1", port))
    with pytest.raises(NodeFailedError, match="node 1: ZeroDivisionError"):
        leader.answers(leader.ask("divide"), 10)
    thread.join(20)
    assert not thread.is_alive()


def test_a_node_that_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "SILENT_S", 1.0)
    monkeypatch.setattr(nodes, "BEAT_EVERY_S", 0.1)
    port, leave = free_port(), threading.Event()

    def idle() -> None:
        if leave.is_set():
            raise ZeroDivisionError

    def follower() -> None:
        with contextlib.suppress(ZeroDivisionError):
            nodes.follow(Place(1, 2, "127.0.0.1", port), {}, idle)

    thread = threading.Thread(target=follower)
    thread.start()
    leader = Leader(Place(0, 2, "127.0.0.1", port))
    until = time.monotonic() + 2.5  # longer than a node may be silent
    while time.monotonic() < until:
        leader.check()
        time.sleep(0.05)
    leave.set()
    thread.join(20)
    leader.check()
    monkeypatch.setattr(nodes, "AWAY_S", 0.5)
    time.sleep(1.5)  # as if node 0 had been suspended: it gives the others time to be heard of again
    leader.check()
    with pytest.raises(NodeFailedError, match="node 1 has not been heard of for 1 s"):
        leader.answers(leader.ask("nothing"), 20)


def test_answers_can_be_looked_at_before_all_are_there() -> None:
    port, go_on = free_port(), threading.Event()

    def work(asked: dict[str, Any], check: Any) -> int:
        assert go_on.wait(20)
        return 7

    follower = threading.Thread(target=lambda: nodes.follow(Place(1, 2, "127.0.0.1", port), {"work": work}, lambda: None))
    follower.start()
    leader = Leader(Place(0, 2, "127.0.0.1", port))
    number = leader.ask("work")
    assert leader.early_answers(number) == {}
    go_on.set()
    assert leader.answers(number, 20) == [7] and leader.early_answers(number) == {1: 7}
    leader.end()
    follower.join(20)


def test_ranks_that_wait_for_those_of_another_node_in_vain_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "ALONE_S", 0.3)
    port = free_port()
    follower = threading.Thread(
        target=lambda: nodes.follow(Place(1, 2, "127.0.0.1", port), {"train": lambda asked, check: 3}, lambda: None)
    )
    follower.start()
    leader = Leader(Place(0, 2, "127.0.0.1", port))
    waiting, lost = subprocess.Popen(["sleep", "60"], text=True), list[NodeFailedError]()
    job._watch(leader, leader.ask("train"), waiting, lost)
    assert waiting.poll() == -signal.SIGTERM
    assert [str(error) for error in lost] == ["the ranks of node 1 failed: its log is node-1-learner.log"]
    leader.end()
    follower.join(20)


def test_only_what_can_be_dealt_evenly_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nodes.share("x", 3) == 3
    monkeypatch.setattr(nodes, "members", 2)
    assert nodes.share("x", 4) == 2
    with pytest.raises(UserError, match="x=3 cannot be dealt evenly to 2 nodes"):
        nodes.share("x", 3)


def test_tensor_parallelism_across_nodes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nodes, "members", 2)
    config = LearnerConfig(tensor_model_parallel_size=2, data_parallel_size=1)
    with pytest.raises(UserError, match="does not fit into a node's 1 ranks"):
        next(run_ranks(tmp_path, config))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
