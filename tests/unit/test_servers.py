"""Starting, watching and stopping SGLang servers, with a scripted one (scripted_sglang.py) in its place."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from trd_megatron.config import EngineConfig, ServersConfig, load
from trd_megatron.engine import serve, server, server_command, server_process, sglang
from trd_megatron.engine.base import EngineFailedError, Weights, api_key
from trd_megatron.engine.engines import Engines
from trd_megatron.engine.server import LaunchedServers, start_all, stop_all
from trd_megatron.errors import UserError
from trd_megatron.run_dir import RunDir

ROOT = Path(__file__).parents[2]
FIRST, SECOND = "0-111111111111", "1-222222222222"
KEY = "sk-do-not-show"


def weights(version: int = 0, fingerprint: str = "1" * 64, path: Path = Path("/models/student")) -> Weights:
    return Weights(path, version, fingerprint)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """2 layers with 2 key/value heads of 16: 2 x 2 x 2 x 16 x 4 bytes = 512 a token in float32."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "qwen3", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config |= {"hidden_size": 48, "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def flags(line: list[str]) -> dict[str, str | bool]:
    """The command line after the launcher, as a dictionary."""
    found: dict[str, str | bool] = {}
    for word, following in zip(line, [*line[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word] = True if following.startswith("--") else following
    return found


def test_command_on_a_cpu(model: Path) -> None:
    engine = EngineConfig(kind="sglang", launch=True)
    line = server_command.command("py", "student", weights(path=model), engine, "127.0.0.1", 4000)
    assert line[:2] == ["py", str(server_command.LAUNCHER)]
    assert flags(line) == {
        "--model-path": str(model), "--weight-version": FIRST, "--host": "127.0.0.1", "--port": "4000", "--device": "cpu",
        "--dtype": "float32", "--tp-size": "1", "--attention-backend": "torch_native", "--disable-cuda-graph": True,
        "--sleep-on-idle": True,
        "--max-total-tokens": str(8 * 4096), "--mem-fraction-static": "0.3",
    }  # fmt: skip


def test_command_on_gpus() -> None:
    teacher = ServersConfig(
        tensor_parallel_size=4, mem_fraction_static=0.8, context_length=40960, fp8=True, extra_args=["--kv-cache-dtype", "fp8_e5m2"]
    )
    engine = EngineConfig(kind="sglang", device="cuda", dtype="bfloat16", deterministic=True, teacher=teacher)
    line = server_command.command("py", "teacher", weights(3, "2" * 64), engine, "0.0.0.0", 4001)
    assert flags(line) == {
        "--model-path": "/models/student", "--weight-version": "3-222222222222", "--host": "0.0.0.0", "--port": "4001", "--device": "cuda",
        "--dtype": "bfloat16", "--tp-size": "4", "--mem-fraction-static": "0.8", "--context-length": "40960", "--quantization": "fp8",
        "--enable-deterministic-inference": True, "--kv-cache-dtype": "fp8_e5m2",
    }  # fmt: skip
    plain = flags(server_command.command("py", "student", weights(), engine, "127.0.0.1", 4001))
    assert "--mem-fraction-static" not in plain and "--context-length" not in plain and "--quantization" not in plain


@pytest.mark.parametrize(
    ("dtype", "context", "tokens"),
    [
        ("float32", None, 8 * 4096),
        ("float32", 1000, 8 * 1000),
        ("float32", 1 << 20, (1 << 30) // 512),
        ("bfloat16", 1 << 20, (1 << 30) // 256),
        ("float32", 1 << 23, 1 << 23),
    ],
)
def test_kv_cache_on_a_cpu(model: Path, dtype: str, context: int | None, tokens: int) -> None:
    assert server_command.cpu_kv_tokens(model, dtype, context) == tokens


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SGLANG_API_KEY", "PYTHONPATH", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SGLANG_LOG_GC", "1")
    cpu = server_command.environment(EngineConfig(), [], None)
    assert not {"WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SGLANG_API_KEY", "PYTHONPATH", "VIRTUAL_ENV"} & set(cpu)
    wanted = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    wanted |= {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "SGLANG_LOG_GC": "1", "PATH": os.environ["PATH"]}
    assert wanted.items() <= cpu.items()
    cuda = server_command.environment(EngineConfig(device="cuda"), ["2", "3"], KEY)
    assert (cuda["CUDA_VISIBLE_DEVICES"], cuda["SGLANG_API_KEY"]) == ("2,3", KEY)
    assert "SGLANG_USE_CPU_ENGINE" not in cuda


def test_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [server_command.thread_settings(n)["OMP_NUM_THREADS"] for n in (1, 3, 20)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert server_command.thread_settings(1) == {}


def test_gpus() -> None:
    four = ServersConfig(data_parallel_size=2, tensor_parallel_size=2)
    assert [server_command.gpus_of("student", four, i, {}) for i in (0, 1)] == [["0", "1"], ["2", "3"]]
    named = ServersConfig(data_parallel_size=2, tensor_parallel_size=2, gpus=[4, 5, 6, 7])
    assert [server_command.gpus_of("student", named, i, {}) for i in (0, 1)] == [["4", "5"], ["6", "7"]]
    assert server_command.gpus_of("student", four, 1, {"CUDA_VISIBLE_DEVICES": "1,3,GPU-a,7"}) == ["GPU-a", "7"]
    with pytest.raises(UserError, match=r"engine\.teacher: GPU 3 is wanted, but CUDA_VISIBLE_DEVICES=0,1 shows 2"):
        server_command.gpus_of("teacher", four, 1, {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^engine\.python=.* has no SGLang: `make sglang-cpu`.*engine\.python"):
        server_command.interpreter(EngineConfig(python=sys.executable))
    with pytest.raises(UserError, match=r"^engine\.python=/no/python cannot be run"):
        server_command.interpreter(EngineConfig(python="/no/python"))
    python = tmp_path / ".venv-sglang" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert server_command.interpreter(EngineConfig()) == str(python)
    with pytest.raises(UserError, match="has no SGLang"):  # of this Python: what is built for a CPU has no kernels for GPUs
        server_command.interpreter(EngineConfig(device="cuda"))


@pytest.mark.parametrize("key", ["k'y", "a b", "a\\b", "ü"])
def test_key_that_a_log_would_spell_otherwise(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_API_KEY", key)
    with pytest.raises(UserError, match=r"^SGLANG_API_KEY may hold"):
        api_key()
    monkeypatch.setenv("SGLANG_API_KEY", "")
    assert api_key() is None


def test_serve_wants_gpus_of_its_own_for_each_role(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    config = load(["experiment=opd_qwen3_1_7b", f"run_dir={tmp_path}"])
    with pytest.raises(UserError, match=r"^--role both serves them side by side, but GPU 0 .*engine\.teacher.*one --role at a time"):
        serve.serve(config, "both", "127.0.0.1", 31000)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match=r"^engine\.device=cuda, but this machine has no usable GPU"):
        serve.serve(config, "student", "127.0.0.1", 31000)


def test_serve_leaves_the_folder_to_the_run(tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    RunDir(tmp_path, "smoke")


class Scripted:
    """LaunchedServers whose servers do what `script` says, quickly."""

    def __init__(self, folder: Path) -> None:
        self.file, self.logs = folder / "script.json", folder / "logs"
        self.said: list[str] = []
        self.made: list[LaunchedServers] = []
        self.script()

    def script(self, **script: Any) -> None:
        self.file.write_text(json.dumps(script))

    def servers(self, count: int = 1, **kwargs: Any) -> LaunchedServers:
        engine = EngineConfig(kind="sglang", launch=True, python=sys.executable, start_timeout_s=20)
        engine.student.data_parallel_size = count
        made = LaunchedServers("student", weights(), engine, kwargs.pop("logs", self.logs), self.said.append, **kwargs)
        self.made.append(made)
        return made

    @property
    def starts(self) -> list[dict[str, Any]]:
        file = self.file.with_suffix(".starts")
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def pids(self) -> list[int]:
        return [pid for start in self.starts for pid in start["pids"]]


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            pass
    return found


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def scripted(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr(server_command, "LAUNCHER", Path(__file__).with_name("scripted_sglang.py"))
    monkeypatch.setattr(server_command, "interpreter", lambda engine: engine.python)
    monkeypatch.setattr(server_command, "cpu_kv_tokens", lambda *args: 100)
    monkeypatch.setattr(server, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(server, "BACKOFF_S", 0.01)
    monkeypatch.setattr(server, "TERM_S", 0.5)
    monkeypatch.setenv("SCRIPT", str(tmp_path / "script.json"))
    monkeypatch.setenv("SCRIPTED_ROOT", str(ROOT))
    made = Scripted(tmp_path)
    yield made
    for servers in made.made:
        servers.stop()
    assert not alive(made.pids)


def test_starts_and_stops(scripted: Scripted) -> None:
    servers = scripted.servers(2)
    servers.start()
    assert len(set(servers.urls)) == 2 and all(url.startswith("http://127.0.0.1:") for url in servers.urls)
    assert {start["label"] for start in scripted.starts} == {FIRST}
    rows = json.loads((scripted.logs / "servers.json").read_text())
    assert [(row["role"], row["url"], row["log"]) for row in rows] == [
        ("student", url, str(scripted.logs / f"student-{i}.log")) for i, url in enumerate(servers.urls)
    ]
    assert {row["pid"] for row in rows} == set(scripted.pids)
    assert "starting with weights 0-111111111111" in (scripted.logs / "student-1.log").read_text()
    servers.stop()
    servers.stop()
    assert not alive(scripted.pids)
    assert json.loads((scripted.logs / "servers.json").read_text()) == []
    servers.start()  # as the stages of a run take turns with training
    assert len(scripted.starts) == 4


def test_key_is_neither_on_the_command_line_nor_in_the_log(scripted: Scripted) -> None:
    servers = scripted.servers(api_key=KEY)
    servers.start()
    start = scripted.starts[0]
    assert start["environment"]["SGLANG_API_KEY"] == KEY
    assert KEY not in " ".join(psutil.Process(start["pids"][0]).cmdline())
    servers.stop()
    log = (scripted.logs / "student-0.log").read_text()
    assert KEY not in log and "the key is ***" in log


def test_killed_server_comes_back_with_the_new_weights(scripted: Scripted) -> None:
    servers = scripted.servers(2)
    servers.start()
    urls = list(servers.urls)
    servers.use(weights(1, "2" * 64))
    assert len(scripted.starts) == 2  # running servers get them from the caller
    os.kill(scripted.pids[0], signal.SIGKILL)
    until(lambda: len(scripted.starts) == 3 and servers.healthy == 2)
    assert [start["label"] for start in scripted.starts] == [FIRST, FIRST, SECOND]
    assert servers.urls == urls
    assert "ended with signal 9" in scripted.said[0] and "starting it again" in scripted.said[0]
    until(lambda: any("healthy again" in line for line in scripted.said))
    servers.check()


def test_server_that_is_starting_is_started_anew_with_new_weights(scripted: Scripted) -> None:
    servers = scripted.servers()
    servers.start()
    scripted.script(silent=True)
    os.kill(scripted.pids[0], signal.SIGKILL)
    until(lambda: len(scripted.starts) == 2)
    scripted.script()
    servers.use(weights(1, "2" * 64))
    until(lambda: servers.healthy == 1)
    assert [start["label"] for start in scripted.starts] == [FIRST, FIRST, SECOND]


def test_first_start_fails_at_once_with_the_reason(scripted: Scripted) -> None:
    scripted.script(die="Traceback (most recent call last):\nRuntimeError: Not enough memory\nRuntimeError: scheduler_0 is dead\nbye")
    servers = scripted.servers()
    with pytest.raises(EngineFailedError, match=r"ended with exit code 1: RuntimeError: Not enough memory \(log: .*student-0\.log\)"):
        servers.start()
    assert len(scripted.starts) == 1


def test_wrong_flag_is_the_users_or_the_versions(scripted: Scripted) -> None:
    scripted.script(die="sglang serve: error: unrecognized arguments: --no-such-flag", exit=2)
    with pytest.raises(UserError, match=r"^this SGLang does not know a flag of ours.*engine\.python.*--no-such-flag"):
        scripted.servers().start()
    servers = scripted.servers()
    servers._settings.extra_args.append("--no-such-flag=1")
    with pytest.raises(UserError, match=r"^engine\.student\.extra_args: .*--no-such-flag"):
        servers.start()


def test_server_that_outlives_sigkill_is_an_error(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    servers, other = scripted.servers(), scripted.servers(logs=scripted.logs / "other")
    start_all([servers, other])
    ended = server.end_groups

    def stuck(group: Any, term_s: float) -> None:
        ended(group, term_s)
        if group is servers._servers:
            raise EngineFailedError("servers do not end")  # a process in the kernel's hands cannot be made here

    monkeypatch.setattr(server, "end_groups", stuck)
    with pytest.raises(EngineFailedError, match="do not end"):
        stop_all([other, servers])
    assert not alive(scripted.pids)
    monkeypatch.undo()
    servers._outlived = None  # for the fixture


def test_a_start_ends_when_what_it_is_for_is_gone(scripted: Scripted) -> None:
    scripted.script(silent=True)

    def gone() -> None:
        if scripted.starts:
            raise RuntimeError("node 0 is gone")

    with pytest.raises(RuntimeError, match="node 0 is gone"):
        scripted.servers().start(gone)
    assert scripted.pids and not alive(scripted.pids)


def test_what_serve_prints_is_the_run_of_the_same_results(scripted: Scripted) -> None:
    words = ["experiment=smoke", "engine=sglang_cpu", "engine.dtype=bfloat16", "engine.student.extra_args=[--a,'{\"b\": 1}']"]
    served = load(words)
    run = load(["experiment=smoke", *shlex.split(serve._attaching(served, [scripted.servers()])), "engine.student.urls=['http://a:1']"])
    assert run.engine.student.extra_args == served.engine.student.extra_args
    assert (run.engine.kind, run.engine.launch, run.engine.device, run.engine.dtype) == ("sglang", False, "cpu", "bfloat16")


def test_no_server_lives_while_the_learner_has_the_gpus(scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "SGLangEngine", lambda *args, **kwargs: None)
    config = load(["experiment=smoke", "engine=sglang_cpu", "engine.keep_servers=false", f"engine.python={sys.executable}"])
    with Engines(config, scripted.logs, print) as engines:
        engines.open("student", weights(), tmp_path / "journal")
        (first,) = scripted.pids
        assert alive([first])
        engines.release()
        assert not alive(scripted.pids)
        engines.open("student", weights(1), tmp_path / "journal")
        assert len(alive(scripted.pids)) == 1
    assert not alive(scripted.pids)


def test_one_process_writes_the_logs_of_a_role(scripted: Scripted) -> None:
    first = scripted.servers()
    first.start()
    with pytest.raises(UserError, match=rf"^other student servers write their logs to {scripted.logs}: .*run_dir"):
        scripted.servers().start()
    first.stop()
    scripted.servers().start()


def test_ports_that_cannot_be_had(scripted: Scripted) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"cannot serve at 127\.0\.0\.1:\d+ \(Address already in use\)"):
            scripted.servers(2, ports=[0, taken.getsockname()[1]]).start()
    with pytest.raises(UserError, match=r"cannot serve at 127\.0\.0\.1:65536"):
        scripted.servers(2, ports=range(65535, 65537)).start()
    assert not scripted.starts


def test_never_healthy(scripted: Scripted) -> None:
    scripted.script(silent=True)
    servers = scripted.servers()
    servers._engine.start_timeout_s = 0.5
    with pytest.raises(EngineFailedError, match=r"was not healthy within engine\.start_timeout_s=0\.5"):
        servers.start()


def test_gives_up_on_a_server_that_keeps_dying(scripted: Scripted) -> None:
    servers = scripted.servers(2)
    servers.start()
    scripted.script(die="ValueError: broken")
    os.kill(scripted.pids[0], signal.SIGKILL)
    until(lambda: any("given up" in line for line in scripted.said))
    assert len(scripted.starts) == 2 + server.GIVE_UP_AFTER - 1  # its first death was the kill
    servers.check()  # the other one serves on
    os.kill(scripted.pids[1], signal.SIGKILL)
    until(lambda: servers.failed is not None)
    with pytest.raises(EngineFailedError, match=r"no student server is left: .*ValueError: broken"):
        servers.check()


def test_port_taken_in_between(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))  # without SO_REUSEADDR: nobody else can bind it
        kept = [thief.dup()]
        monkeypatch.setattr(server, "reserve_port", lambda host, port: kept.pop() if kept else server_process.reserve_port(host, port))
        servers = scripted.servers()
        servers.start()
        assert len(scripted.starts) == 2
        assert servers.urls != [f"http://127.0.0.1:{thief.getsockname()[1]}"]


def test_another_server_on_the_port_does_not_count(scripted: Scripted) -> None:
    scripted.servers().start()
    mine = scripted.made[0]._servers[0]
    assert mine.is_healthy()
    scripted.script(silent=True)
    other = server_process.Server(1, "127.0.0.1", mine.kept_port, scripted.logs / "other.log")
    command = server_command.command(sys.executable, "student", weights(), EngineConfig(), "127.0.0.1", other.port)
    other.spawn(command, server_command.environment(EngineConfig(), [], None), weights(), None)
    assert not other.is_healthy()
    server_process.end_groups([other], term_s=0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_stop_kills_what_ignores_sigterm(scripted: Scripted, device: str) -> None:
    scripted.script(child=True)
    servers = scripted.servers()
    servers._engine.device = device
    servers.start()
    assert len(alive(scripted.pids)) == 2
    servers.stop()
    assert not alive(scripted.pids)


def test_a_child_that_outlives_its_server_is_killed_before_the_restart(scripted: Scripted) -> None:
    scripted.script(child=True)
    servers = scripted.servers()
    servers.start()
    old = scripted.pids
    os.kill(old[0], signal.SIGKILL)
    until(lambda: len(scripted.starts) == 2)
    assert not alive(old)


PARENT = """
import sys, time
from pathlib import Path
from trd_megatron.config import EngineConfig
from trd_megatron.engine import server_command
from trd_megatron.engine.base import Weights
from trd_megatron.engine.server import LaunchedServers
server_command.LAUNCHER = Path(sys.argv[1])
server_command.interpreter = lambda engine: engine.python
server_command.cpu_kv_tokens = lambda *args: 100
engine = EngineConfig(kind="sglang", launch=True, python=sys.executable)
LaunchedServers("student", Weights(Path("m"), 0, "1" * 64), engine, Path(sys.argv[2]), print).start()
print("up", flush=True)
time.sleep(600)
"""


def test_dies_with_the_parent(scripted: Scripted) -> None:
    command = [sys.executable, "-c", PARENT, str(server_command.LAUNCHER), str(scripted.logs)]
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        assert alive(scripted.pids)
        parent.kill()
    until(lambda: not alive(scripted.pids))
