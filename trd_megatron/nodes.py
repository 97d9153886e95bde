"""The machines of one run. `trd node` runs on each of them: the first leads, the others do what it asks for.

A scheduler tells every node its place (Slurm, Kubeflow's and torchrun's variables), or the user does (TRD_NODE_RANK, TRD_NODES,
TRD_HEAD). The leader runs the pipeline; it asks the others, through a TCPStore of PyTorch's, for learner ranks and for servers. What
travels there are paths and numbers, never code; like every store of PyTorch's it is open to the cluster's network.
"""

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
from torch.distributed import TCPStore

from trd_megatron.errors import UserError

PORT = 29400
MEET_S = 600.0  # for all nodes to be there: containers are pulled meanwhile
LEAVE_S = 60.0
LOOK_EVERY_S = 0.2
BEAT_EVERY_S = 1.0
SILENT_S = 30.0  # a node that has not been heard of for so long is lost
AWAY_S = 10.0  # after so long without a look, silence counts anew


class NodeFailedError(RuntimeError):
    """Another node of the run failed, or is not to be reached any more."""


@dataclass(frozen=True)
class Place:
    """This machine among `count` of a run. head: the address of node 0, port: where it listens for the others (the next is torchrun's)."""

    rank: int = 0
    count: int = 1
    head: str = "127.0.0.1"
    port: int = PORT

    @staticmethod
    def find(variables: Mapping[str, str] = os.environ) -> "Place":
        """From the user's variables, else from those of Slurm's or Kubeflow's. Raises UserError if they do not fit together."""
        for rank, count, head in (
            ("TRD_NODE_RANK", "TRD_NODES", "TRD_HEAD"),
            ("SLURM_NODEID", "SLURM_STEP_NUM_NODES", "TRD_HEAD"),  # of a step, which srun starts
            ("PET_NODE_RANK", "PET_NNODES", "PET_MASTER_ADDR"),
        ):
            if rank in variables and count in variables:
                return _place(variables, rank, count, head)
        return Place()

    @property
    def address(self) -> str:
        """Where the other nodes reach this one: TRD_ADDRESS, else what this machine would call the head from."""
        if self.rank == 0:
            return self.head
        own = os.environ.get("TRD_ADDRESS")
        if own:
            return own
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((self.head, self.port))
            return str(probe.getsockname()[0])


def _place(variables: Mapping[str, str], rank: str, count: str, head: str) -> Place:
    try:
        place = Place(int(variables[rank]), int(variables[count]), variables.get(head, ""), int(variables.get("TRD_PORT", PORT)))
    except ValueError:
        raise UserError(f"{rank}={variables[rank]}, {count}={variables[count]}, TRD_PORT: must be whole numbers") from None
    if not 0 <= place.rank < place.count:
        raise UserError(f"{rank}={place.rank} is none of the nodes 0 to {place.count - 1} ({count}={place.count})")
    if place.count > 1 and not place.head:
        place = Place(place.rank, place.count, _slurm_head(variables), place.port)
    return place if place.count > 1 else Place()


def _slurm_head(variables: Mapping[str, str]) -> str:
    names = variables.get("SLURM_JOB_NODELIST")
    if names is None:
        raise UserError("several nodes need TRD_HEAD in the environment: the address of node 0")
    found = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True)
    return found.stdout.split()[0]


def interface_of(address: str) -> str | None:
    """The network interface that has `address`, or whose address its name resolves to; None: none has."""
    numeric = {str(info[4][0]) for info in socket.getaddrinfo(address, None)}
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address in numeric for each in addresses):
            return name
    return None


class Link:
    """A node's end of the store. NodeFailedError: it is not to be reached (any more)."""

    def __init__(self, place: Place) -> None:
        self.place = place
        if place.rank:
            self._wait_for_head()
        self._store: TCPStore = self._try(lambda: TCPStore(place.head, place.port, None, place.rank == 0, timedelta(seconds=MEET_S)))

    def put(self, key: str, value: Any) -> None:
        self._try(lambda: self._store.set(key, json.dumps(value)))

    def get(self, key: str) -> Any:
        """None: not there yet."""
        return json.loads(self._try(lambda: self._store.get(key))) if self._try(lambda: self._store.check([key])) else None

    def check(self) -> None:
        """Raises if node 0 is gone."""
        self._try(lambda: self._store.check(["work/0"]))

    def wait(self, key: str, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """What somebody puts there. Raises NodeFailedError after so many seconds."""
        until = time.monotonic() + seconds
        while (found := self.get(key)) is None:
            if time.monotonic() > until:
                raise NodeFailedError(f"node {self.place.rank} has waited {seconds:.0f} s for another node ({key})")
            meanwhile()
            time.sleep(LOOK_EVERY_S)
        return found

    def _wait_for_head(self) -> None:
        """Until node 0 listens. PyTorch would wait as well, but not end on Ctrl-C."""
        until = time.monotonic() + MEET_S
        while True:
            try:
                socket.create_connection((self.place.head, self.place.port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > until:
                    raise self._lost(str(error)) from None
            time.sleep(LOOK_EVERY_S)

    def _lost(self, why: str) -> NodeFailedError:
        place = self.place
        return NodeFailedError(f"node {place.rank} of {place.count} does not reach node 0 at {place.head}:{place.port}: {why}")

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:  # all of the store's are
            raise self._lost(str(error).splitlines()[0]) from None


class Leader:
    """Node 0 of several: asks the others, all of them alike."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._link = Link(place)
        self._asked = 0
        self._heard: dict[int, tuple[int | None, float]] = {}  # of each other node: its newest beat, and when that was first seen
        self._looked = 0.0  # when `check` last ended
        for rank in range(1, place.count):
            self._value(rank, self._link.wait(f"here/{rank}", MEET_S))

    def ask(self, kind: str, **details: Any) -> int:
        """Returns the number that `answers` takes."""
        self._link.put(f"work/{self._asked}", {"kind": kind, "number": self._asked} | details)
        self._asked += 1
        return self._asked - 1

    def answers(self, number: int, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> list[Any]:
        """Of every other node, in order. Raises NodeFailedError with what one of them met, or if one is lost or does not answer in time."""

        def while_waiting() -> None:
            meanwhile()
            self.check()

        found = []
        for rank in range(1, self.place.count):
            found.append(self._value(rank, self._link.wait(f"answer/{number}/{rank}", seconds, while_waiting)))
        return found

    def early_answers(self, number: int) -> dict[int, Any]:
        """Those that are there by now, by rank. Raises NodeFailedError with what a node met."""
        found = {rank: self._link.get(f"answer/{number}/{rank}") for rank in range(1, self.place.count)}
        return {rank: self._value(rank, answer) for rank, answer in found.items() if answer is not None}

    def check(self) -> None:
        """Raises NodeFailedError if a node is lost: killed, or out of reach. To be called again and again."""
        if time.monotonic() - self._looked > AWAY_S:
            self._heard.clear()  # nobody has looked for a while: rollouts were drawn, or this machine was suspended, with the others
        for rank in range(1, self.place.count):
            beat, now = self._link.get(f"alive/{rank}"), time.monotonic()
            last, since = self._heard.get(rank, (None, now))
            if beat != last or rank not in self._heard:
                self._heard[rank] = beat, now
            elif now - since > SILENT_S:
                raise NodeFailedError(f"node {rank} has not been heard of for {SILENT_S:.0f} s: it was killed, or the network is gone")
        self._looked = time.monotonic()

    def _value(self, rank: int, answer: dict[str, Any]) -> Any:
        if "error" in answer:
            raise NodeFailedError(f"node {rank}: {answer['error']}")
        return answer.get("value")

    def end(self) -> None:
        """The others leave; returns when they have, since the store goes with this process."""
        self.answers(self.ask("end"), LEAVE_S)


# Set by `trd node` for its process.
leader: Leader | None = None  # on node 0 of several
members = 1


def count() -> int:
    """The nodes of the run that this process belongs to."""
    return members


def share(what: str, total: int) -> int:
    """How many of `total` one node takes. Raises UserError that names the setting if they cannot be dealt evenly."""
    if total % count():
        raise UserError(f"{what}={total} cannot be dealt evenly to {count()} nodes: choose a multiple, or other nodes")
    return total // count()


@contextlib.contextmanager
def _beating(place: Place) -> Iterator[None]:
    """Tells node 0 that this one is there, from a thread: work may take hours."""
    ended = threading.Event()

    def beat() -> None:
        with contextlib.suppress(NodeFailedError):  # `follow` meets the same
            link, number = Link(place), 0
            while True:
                link.put(f"alive/{place.rank}", number)
                number += 1
                if ended.wait(BEAT_EVERY_S):
                    return

    thread = threading.Thread(target=beat, daemon=True, name="beat")
    thread.start()
    try:
        yield
    finally:
        ended.set()


Work = Callable[[dict[str, Any], Callable[[], None]], Any]  # (what is asked, raises when the leader is gone: to be called while it takes)


def follow(place: Place, work: Mapping[str, Work], idle: Callable[[], None], check: Callable[[], None] = lambda: None) -> None:
    """The life of every node but the first: does what it is asked for until the leader ends. idle: called while nothing is asked.

    What `work` raises becomes the answer; but for UserError and RuntimeError it ends this node too. check: before the first of it;
    what it raises as UserError the leader hears, and so does the caller. Raises NodeFailedError when the leader is gone.
    """
    link = Link(place)
    try:
        check()
    except UserError as error:
        link.put(f"here/{place.rank}", {"error": str(error)})
        raise
    with _beating(place):
        link.put(f"here/{place.rank}", {})
        _serve(place, link, work, idle)


def _serve(place: Place, link: Link, work: Mapping[str, Work], idle: Callable[[], None]) -> None:
    number = 0
    while True:
        asked = link.wait(f"work/{number}", float("inf"), idle)
        try:
            answer = {"value": None if asked["kind"] == "end" else work[asked["kind"]](asked, link.check)}
        except NodeFailedError:
            raise
        except (UserError, RuntimeError) as error:
            answer = {"error": str(error)}
        except Exception as error:  # a mistake of ours, or a full disk: node 0 need not wait until its time is up
            link.put(f"answer/{number}/{place.rank}", {"error": f"{type(error).__name__}: {error}"})
            raise
        link.put(f"answer/{number}/{place.rank}", answer)
        if asked["kind"] == "end":
            return
        number += 1
