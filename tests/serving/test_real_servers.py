"""LaunchedServers and `trd serve` with the real SGLang."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import StudentServer
from trd_megatron.builtin_models import model_fingerprint
from trd_megatron.config import EngineConfig, load
from trd_megatron.engine.base import Weights
from trd_megatron.engine.server_process import group_members
from trd_megatron.run_dir import RunDir

pytestmark = pytest.mark.slow
KEY = "sk-do-not-show"


def ask(url: str, body: dict[str, Any] | None = None, key: str | None = None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def generate(url: str, key: str | None = None) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    return ask(f"{url}/generate", {"input_ids": [40, 41, 42], "sampling_params": sampling, "return_logprob": True}, key)


def served(server: StudentServer) -> Any:
    return generate(server.url)["meta_info"]["weight_version"]


def test_serves_labelled_weights(student_server: StudentServer) -> None:
    answer = generate(student_server.url)
    assert len(answer["output_ids"]) == 4
    assert answer["meta_info"]["weight_version"] == student_server.weights.label
    info = ask(f"{student_server.url}/server_info")
    assert (info["dtype"], info["device"], info["model_path"]) == ("float32", "cpu", str(student_server.weights.path))
    assert info["max_total_num_tokens"] == 8 * 4096  # cpu_kv_tokens of 4096 positions


def test_logprobs_are_at_temperature_1(student_server: StudentServer) -> None:
    found = []
    for temperature in (0.5, 2.0):
        body = {"input_ids": [40, 41, 42], "sampling_params": {"temperature": temperature, "max_new_tokens": 1}}
        answer = ask(f"{student_server.url}/generate", body | {"return_logprob": True, "top_logprobs_num": 3})
        found.append([row[:2] for row in answer["meta_info"]["output_top_logprobs"][0]])
    assert [row[1] for row in found[0]] == [row[1] for row in found[1]]
    assert [row[0] for row in found[0]] == pytest.approx([row[0] for row in found[1]], abs=1e-5)


def test_killed_server_returns_with_the_weights_in_use(student_server: StudentServer, tmp_path: Path) -> None:
    folder = tmp_path / "newer"
    shutil.copytree(student_server.weights.path, folder)
    newer = Weights(folder, 1, model_fingerprint(folder))
    servers, url = student_server.servers, student_server.url
    servers.use(newer)
    ask(f"{url}/update_weights_from_disk", {"model_path": str(folder), "weight_version": newer.label})
    assert served(student_server) == newer.label
    group = servers._servers[0].process.pid  # type: ignore[union-attr]
    old = group_members(group)
    assert len(old) >= 3  # the scheduler and the detokenizer are processes of their own
    os.killpg(group, signal.SIGKILL)
    wait_for(lambda: servers.healthy == 0)
    wait_for(lambda: servers.healthy == 1)
    assert student_server.url == url
    assert served(student_server) == newer.label
    assert ask(f"{url}/model_info")["model_path"] == str(folder)
    assert not any(process.is_running() and process.status() != "zombie" for process in old)
    assert "ended with signal 9" in student_server.said[-2] and "healthy again" in student_server.said[-1]
    servers.use(student_server.weights)
    first = {"model_path": str(student_server.weights.path), "weight_version": student_server.weights.label}
    ask(f"{url}/update_weights_from_disk", first)
    assert served(student_server) == student_server.weights.label


def wait_for(condition: Any, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def test_serve_command(sglang_engine: EngineConfig, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trd_megatron.cli", "serve", "experiment=smoke", f"run_dir={tmp_path}", "--role", "student"]
    command += [f"engine.python={sglang_engine.python}", "--port", "31870"]
    environment = dict(os.environ) | {"SGLANG_API_KEY": KEY}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        shown = ""
        try:
            while "Ctrl-C stops them" not in shown:
                line = process.stdout.readline()
                assert line, shown
                shown += line
            (attach,) = re.findall(r"^ +(engine\.kind=.*)$", shown, re.MULTILINE)
            attached = load(["experiment=smoke", f"run_dir={tmp_path}", *attach.split()])  # the run of this folder
            assert attached.engine.student.urls == ["http://127.0.0.1:31870"]
            assert (attached.engine.device, attached.engine.dtype) == ("cpu", "float32")
            RunDir(tmp_path, attached.name)
            (row,) = json.loads((tmp_path / "servers" / "servers.json").read_text())
            members = group_members(row["pid"])
            assert len(members) >= 3
            assert len(generate(row["url"], KEY)["output_ids"]) == 4
            with pytest.raises(urllib.error.HTTPError, match="401"):
                generate(row["url"])
            assert not any(KEY in word for member in members for word in member.cmdline())
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "all servers are stopped" in rest
    assert not group_members(row["pid"])
    log = (tmp_path / "servers" / "student-0.log").read_text()
    assert KEY not in log and KEY not in shown + rest
    assert "'api_key': '***'" in log  # SGLang logs all its arguments
    assert not (tmp_path / "config.yaml").exists()
