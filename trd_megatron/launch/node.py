"""What every node of a job does (`trd node`): the first runs the pipeline, the others lend it their ranks and servers."""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trd_megatron import nodes, pipeline
from trd_megatron.config import Config
from trd_megatron.engine.base import Weights, api_key
from trd_megatron.engine.engines import check_open, of_one_node
from trd_megatron.engine.server import LaunchedServers, stop_all
from trd_megatron.learner.job import LOG, end, torchrun
from trd_megatron.nodes import Leader, Place
from trd_megatron.run_dir import SERVERS

LOOK_EVERY_S = 0.5


def lead(place: Place, run: Callable[[], None]) -> None:
    """`run` with the other nodes at hand; they end with it. Raises NodeFailedError if they do not come."""
    if place.count == 1:
        run()
        return
    nodes.leader, nodes.members = Leader(place), place.count
    try:
        run()
        nodes.leader.end()
    finally:
        nodes.leader, nodes.members = None, 1


def follow(place: Place, config: Config, stages: Sequence[str], say: Callable[[str], None]) -> None:
    """Lends this node to the run of these stages that node 0 leads, until that ends. Raises NodeFailedError when node 0 is gone,
    UserError if this machine lacks what the stages need."""
    helper = _Helper(place, config, say)
    nodes.members = place.count
    try:
        work: dict[str, nodes.Work] = {"train": helper.train, "serve": helper.serve, "use": helper.use, "stop": helper.stop}
        groups = [name.rpartition("/")[2] for name in stages]
        nodes.follow(place, work, helper.check, lambda: pipeline.check_devices(config, groups))
    finally:
        helper.end()
        nodes.members = 1


@dataclass
class _Helper:
    place: Place
    config: Config
    say: Callable[[str], None]
    servers: dict[str, LaunchedServers] = field(default_factory=dict)  # by role

    def train(self, asked: dict[str, Any], check: Callable[[], None]) -> int:
        """Runs this node's ranks. Their exit code; what went wrong node 0 hears from its own."""
        folders = [Path(folder) for folder in asked["folders"]]
        command, environment = torchrun(folders, self.config.learner, self.place, asked["number"])
        self.say(f"node {self.place.rank}: ranks of {folders[0].parent}")
        with (folders[0] / f"node-{self.place.rank}-{LOG}").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            try:
                while process.poll() is None:
                    check()
                    try:
                        process.wait(LOOK_EVERY_S)
                    except subprocess.TimeoutExpired:
                        continue
            finally:
                end(process)
        return process.returncode

    def serve(self, asked: dict[str, Any], check: Callable[[], None]) -> list[str]:
        """Starts this node's share of a role's servers. Their URLs."""
        role, host = asked["role"], self.place.address
        check_open(host)
        logs = Path(self.config.run_dir) / SERVERS / f"node-{self.place.rank}"
        engine = of_one_node(self.config.engine, role)
        self.servers[role] = LaunchedServers(role, _weights(asked), engine, logs, self.say, host=host, api_key=api_key())
        self.servers[role].start(check)
        self.say(f"node {self.place.rank}: {role} servers at {', '.join(self.servers[role].urls)}")
        return self.servers[role].urls

    def use(self, asked: dict[str, Any], check: Callable[[], None]) -> None:
        """What a restart loads from now on."""
        self.servers[asked["role"]].use(_weights(asked))

    def stop(self, asked: dict[str, Any], check: Callable[[], None]) -> None:
        stop_all([self.servers.pop(role) for role in asked["roles"]])

    def check(self) -> None:
        """Raises if servers are lost for good."""
        for servers in self.servers.values():
            servers.check()

    def end(self) -> None:
        stop_all(list(self.servers.values()))


def _weights(asked: dict[str, Any]) -> Weights:
    weights = asked["weights"]
    return Weights(Path(weights["path"]), weights["version"], weights["fingerprint"])
