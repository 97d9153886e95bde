"""`trd serve`: the SGLang servers of a configuration in the foreground, for runs that attach to them."""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from trd_megatron.builtin_models import model_fingerprint, resolve_model
from trd_megatron.config import Config
from trd_megatron.config_checks import check, check_own_gpus
from trd_megatron.engine.base import API_KEY, Weights, api_key
from trd_megatron.engine.engines import is_loopback
from trd_megatron.engine.server import LaunchedServers, start_all, stop_all
from trd_megatron.errors import UserError
from trd_megatron.preflight import check_server_devices
from trd_megatron.progress import console, output, printable
from trd_megatron.run_dir import SERVERS

LOOK_EVERY_S = 1.0


def serve(config: Config, role: str, host: str, port: int) -> None:
    """Starts the servers of a role (student, teacher or both), prints where they are, and watches them until it is interrupted.

    Raises UserError for wrong settings, EngineFailedError if servers do not start or do not come back.
    """
    config = _launching(config)
    paths = {"student": config.model.path} | ({} if config.teacher.path is None else {"teacher": config.teacher.path})
    if role != "both" and role not in paths:
        raise UserError("--role teacher: in mode=opsd the student's servers refine too; there is only --role student")
    roles = list(paths) if role == "both" else [role]
    if config.engine.device == "cuda":
        wanted = {name: getattr(config.engine, name) for name in roles}
        check_own_gpus(wanted, {}, "--role both serves them side by side", "serve one --role at a time")
    key = api_key()
    if not is_loopback(host) and key is None:
        raise UserError(f"--host {host} can be reached from other machines: set {API_KEY} in the environment, or serve at 127.0.0.1")
    logs = Path(config.run_dir) / SERVERS
    groups: list[LaunchedServers] = []
    for name in roles:
        folder = resolve_model(paths[name])
        weights = Weights(folder, 0, model_fingerprint(folder))
        count = getattr(config.engine, name).data_parallel_size
        groups.append(
            LaunchedServers(
                name, weights, config.engine, logs, _say, host=host, ports=range(port, port + count), api_key=key
            )
        )  # fmt: skip
        port += count
    try:
        start_all(groups)
        _show(config, groups, paths)
        while True:
            time.sleep(LOOK_EVERY_S)
            for group in groups:
                group.check()
    finally:
        stop_all(groups)


def _say(line: str) -> None:
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def _launching(config: Config) -> Config:
    """The configuration as if it launched its servers, checked; so it does not matter which engine it names."""
    engine = config.engine
    student, teacher = replace(engine.student, urls=[]), replace(engine.teacher, urls=[])
    config = replace(config, engine=replace(engine, kind="sglang", launch=True, student=student, teacher=teacher))
    check(config)
    check_server_devices(config)
    return config


def _attaching(config: Config, groups: Sequence[LaunchedServers]) -> str:
    """What `trd run` is given besides its experiment. All that shapes results is named: a run's manifests speak of these servers then."""
    words = ["engine.kind=sglang", "engine.launch=false", f"engine.device={config.engine.device}", f"engine.dtype={config.engine.dtype}"]
    if config.engine.deterministic:
        words.append("engine.deterministic=true")
    for group in groups:
        key, servers = f"engine.{group.role}", getattr(config.engine, group.role)
        words.append(f"{key}.urls=[{','.join(group.urls)}]")
        if servers.fp8:
            words.append(f"{key}.fp8=true")
        if servers.extra_args:
            quoted = ",".join(json.dumps(word) for word in servers.extra_args)
            words.append(shlex.quote(f"{key}.extra_args=[{quoted}]"))
    return " ".join(words)


def _show(config: Config, groups: Sequence[LaunchedServers], paths: dict[str, str]) -> None:
    table = Table("role", "model", "url", title="SGLang servers")
    for group in groups:
        for url in group.urls:
            table.add_row(group.role, paths[group.role], url)
    output.print(table)
    output.print(f"For `trd run`:\n  {_attaching(config, groups)}", highlight=False, soft_wrap=True, markup=False)
    console.print("Ctrl-C stops them.", highlight=False)
