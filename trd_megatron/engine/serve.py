"""`trd serve`: the SGLang servers of a configuration in the foreground, for runs that attach to them."""

import ipaddress
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from trd_megatron.builtin_models import model_fingerprint, resolve_model
from trd_megatron.config import Config
from trd_megatron.config_checks import check
from trd_megatron.engine.base import Weights
from trd_megatron.engine.launch_sglang import KEY
from trd_megatron.engine.server import LaunchedServers, start_all
from trd_megatron.errors import UserError
from trd_megatron.progress import console, output, printable

LOOK_EVERY_S = 1.0


def serve(config: Config, role: str, host: str, port: int) -> None:
    """Starts the servers of a role (student, teacher or both), prints where they are, and watches them until it is interrupted.

    Raises UserError for wrong settings, EngineFailedError if servers do not start or do not come back.
    """
    config = _launching(config)
    paths = {"student": config.model.path} | ({} if config.teacher.path is None else {"teacher": config.teacher.path})
    if role != "both" and role not in paths:
        raise UserError("--role teacher: in mode=opsd the student's servers refine too; there is only --role student")
    key = os.environ.get(KEY) or None
    if not _is_loopback(host) and key is None:
        raise UserError(f"--host {host} can be reached from other machines: set {KEY} in the environment, or serve at 127.0.0.1")
    logs = Path(config.run_dir) / "servers"
    groups: list[LaunchedServers] = []
    for name in paths if role == "both" else [role]:
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
        _show(groups, paths)
        while True:
            time.sleep(LOOK_EVERY_S)
            for group in groups:
                group.check()
    finally:
        for group in groups:
            group.stop()


def _say(line: str) -> None:
    console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def _launching(config: Config) -> Config:
    """The configuration as if it launched its servers, checked; so it does not matter which engine it names."""
    engine = config.engine
    student, teacher = replace(engine.student, urls=[]), replace(engine.teacher, urls=[])
    config = replace(config, engine=replace(engine, kind="sglang", launch=True, student=student, teacher=teacher))
    check(config)
    return config


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _show(groups: Sequence[LaunchedServers], paths: dict[str, str]) -> None:
    table = Table("role", "model", "url", title="SGLang servers")
    for group in groups:
        for url in group.urls:
            table.add_row(group.role, paths[group.role], url)
    output.print(table)
    urls = " ".join(f"engine.{group.role}.urls=[{','.join(group.urls)}]" for group in groups)
    output.print(f"For `trd run`:\n  engine=sglang engine.launch=false {urls}", highlight=False, soft_wrap=True, markup=False)
    console.print("Ctrl-C stops them.", highlight=False)
