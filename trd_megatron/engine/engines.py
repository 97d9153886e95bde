"""The engines of one run: loaded into this process, or SGLang servers that are launched or attached to.

One node is shared in time: the servers of one role give their GPUs back before the other role's start, and all do before training.
With engine.keep_servers they have GPUs of their own and stay. Over several nodes (`trd node`) each starts its share of the servers.
"""

import ipaddress
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from trd_megatron import nodes
from trd_megatron.builtin_models import model_fingerprint, resolve_model
from trd_megatron.config import Config, EngineConfig
from trd_megatron.engine.base import API_KEY, Engine, Weights, api_key
from trd_megatron.errors import UserError
from trd_megatron.run_dir import RunDir

if TYPE_CHECKING:
    from trd_megatron.engine.server import LaunchedServers

Role = Literal["student", "teacher"]
STOP_S = 120.0  # for other nodes to stop their servers


def weights_of(path: Path, version: int) -> Weights:
    """The model in a folder, as `version`."""
    return Weights(path, version, model_fingerprint(path))


def student_weights(config: Config, run_dir: RunDir) -> Weights:
    """The student that a round starts with."""
    return weights_of(resolve_model(config.model.path), run_dir.round)


def trained_weights(run_dir: RunDir) -> Weights:
    """The student that a round has trained; the next round starts with it."""
    return weights_of(run_dir.hf, run_dir.round + 1)


def teacher_version(config: Config, run_dir: RunDir) -> int:
    """A teacher of its own never changes; in OPSD it is the round's student."""
    return 0 if config.teacher.path else run_dir.round


def teacher_weights(config: Config, run_dir: RunDir) -> Weights:
    """OPD: the fixed teacher. OPSD: the weights that the round starts with."""
    return weights_of(resolve_model(config.teacher.path or config.model.path), teacher_version(config, run_dir))


class Engines:
    """Opens engines and, as a context, stops at its end what was launched for them.

    logs: the folder for the servers' logs. say: hears what happens to servers, one line each.
    """

    def __init__(self, config: Config, logs: Path, say: Callable[[str], None]) -> None:
        self._config, self._logs, self._say = config, logs, say
        self._launched: dict[str, LaunchedServers] = {}
        self._elsewhere: dict[str, list[str]] = {}  # URLs of the other nodes' servers
        self.start_seconds = 0.0  # spent waiting for servers to start

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:  # the run ends with it, and the other nodes with the run: they may be too busy to answer
            self._stop_own(list(self._launched))
        else:
            self._stop(list(self._launched))

    def open(self, role: Role, weights: Weights, journal: Path) -> Engine:
        """An engine that serves `weights`.

        journal: a file in which SGLang's client keeps finished samples until the caller has them all.
        Raises UserError or EngineFailedError if the model cannot be loaded or its servers cannot be had.
        """
        engine = self._config.engine
        if engine.kind == "local":
            from trd_megatron.engine.local import LocalEngine

            return LocalEngine(
                weights.path,
                device=engine.device,  # type: ignore[arg-type]
                dtype=engine.dtype,  # type: ignore[arg-type]
                batch_size=engine.batch_size,
                weight_version=weights.version,
            )
        from trd_megatron.engine.sglang import ClientOptions, SGLangEngine

        urls = self._launch(role, weights) if engine.launch else getattr(engine, role).urls
        return SGLangEngine(
            urls,
            weights,
            ClientOptions.from_config(engine),
            journal=journal,
            may_update=role == "student",
            say=self._say,
            api_key=api_key(),
            check=self._launched[role].check if engine.launch else None,
        )

    def release(self) -> None:
        """Gives GPUs back that training needs."""
        if not self._config.engine.keep_servers:
            self._stop(list(self._launched))

    def _launch(self, role: Role, weights: Weights) -> list[str]:
        """URLs of the role's servers, started now or before; their client brings them the weights, if they have others."""
        if not self._config.engine.keep_servers:
            self._stop([other for other in self._launched if other != role])
        if role not in self._launched:
            began = time.monotonic()
            try:
                self._start(role, weights)
            finally:
                self.start_seconds += time.monotonic() - began
        self._launched[role].use(weights)
        if nodes.leader is not None:
            nodes.leader.ask("use", role=role, weights=as_dict(weights))
        return self._launched[role].urls + self._elsewhere[role]

    def _start(self, role: Role, weights: Weights) -> None:
        from trd_megatron.engine.server import LaunchedServers

        engine = of_one_node(self._config.engine, role)
        self._elsewhere[role] = []
        if nodes.leader is None:
            servers = LaunchedServers(role, weights, engine, self._logs, self._say, api_key=api_key())
        else:
            host = nodes.leader.place.address
            check_open(host)
            number = nodes.leader.ask("serve", role=role, weights=as_dict(weights))
            servers = LaunchedServers(role, weights, engine, self._logs, self._say, host=host, api_key=api_key())
        self._launched[role] = servers  # before they start: whatever interrupts us, they are stopped
        servers.start()
        if nodes.leader is not None:
            answers = nodes.leader.answers(number, engine.start_timeout_s + nodes.LEAVE_S, servers.check)
            self._elsewhere[role] = [url for urls in answers for url in urls]

    def _stop(self, roles: list[str]) -> None:
        number = nodes.leader.ask("stop", roles=roles) if nodes.leader is not None and roles else None
        self._stop_own(roles)
        if nodes.leader is not None and number is not None:
            nodes.leader.answers(number, STOP_S)

    def _stop_own(self, roles: list[str]) -> None:
        """Those on this machine."""
        from trd_megatron.engine.server import stop_all

        stop_all([self._launched.pop(role) for role in roles])


def as_dict(weights: Weights) -> dict[str, str | int]:
    """For other nodes, which see the folder under the same path."""
    return {"path": str(weights.path.absolute()), "version": weights.version, "fingerprint": weights.fingerprint}


def of_one_node(engine: EngineConfig, role: str) -> EngineConfig:
    """The settings of the servers that each node starts. Raises UserError if they cannot be dealt evenly."""
    servers = getattr(engine, role)
    count = nodes.share(f"engine.{role}.data_parallel_size", servers.data_parallel_size)
    return replace(engine, **{role: replace(servers, data_parallel_size=count)})


def check_open(host: str) -> None:
    """Raises UserError if servers at `host` could be reached from other machines without a key."""
    if not is_loopback(host) and api_key() is None:
        raise UserError(f"servers at {host} can be reached from other machines: set {API_KEY} in the environment of every node")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
