"""`trd bench engine`: who is asked for what, what is counted, and what is said of sides that cannot be measured."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.unit.test_cli import trd
from trd_megatron.bench import client, engine, engine_report, engine_sides
from trd_megatron.bench.engine_report import Row
from trd_megatron.bench.engine_sides import SIDES, Prompts, Settings
from trd_megatron.engine.base import EngineFailedError, Generation
from trd_megatron.errors import UserError

TINY = Settings("builtin:tiny-qwen3", concurrency=[1, 3], prompts=5, lengths=[3, 4], max_new_tokens=5, repeats=2, threads=1)


class Scripted:
    """Notes what it is asked for; draws `short` tokens too few after it was asked `after` times."""

    def __init__(self, name: str, calls: list[Any], short: int = 0, after: int = 0) -> None:
        self.name, self.calls, self.short, self.after, self.asked = name, calls, short, after, 0

    def prepare(self, concurrency: int) -> None:
        self.concurrency = concurrency

    def draw(self, prompts: Prompts, new_tokens: int) -> int:
        self.asked += 1
        self.calls.append((self.name, self.concurrency, prompts, new_tokens))
        return len(prompts) * new_tokens - (self.short if self.asked > self.after else 0)

    def close(self) -> None:
        self.calls.append((self.name, "closed"))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Puts scripted sides in place of the real ones and returns the list of their calls."""

    def place(**sides: dict[str, int] | Exception) -> list[Any]:
        calls: list[Any] = []

        def maker(name: str, how: dict[str, int] | Exception) -> Callable[..., Scripted]:
            def make(*_: Any) -> Scripted:
                if isinstance(how, Exception):
                    raise how
                return Scripted(name, calls, **how)

            return make

        for name, how in sides.items():
            monkeypatch.setitem(SIDES, name, maker(name, how))
        return calls

    return place


def test_sides_take_turns_on_the_same_prompts(scripted: Callable[..., list[Any]], tmp_path: Path) -> None:
    calls = scripted(sglang={}, local={}, plain={})
    rows = engine.benchmark(TINY, tmp_path)
    assert [(row.side, row.concurrency, row.responses, row.tokens, len(row.seconds)) for row in rows] == [
        (side, concurrency, responses, 5 * responses, 2) for concurrency, responses in ((1, 4), (3, 5)) for side in SIDES
    ]
    drawn = calls[:-3]
    assert [call[0] for call in drawn[:9]] == ["plain", "local", "sglang", "sglang", "local", "plain", "plain", "local", "sglang"]
    rounds = [drawn[start : start + 3] for start in range(0, len(drawn), 3)]
    for one in rounds:
        assert all(call[1:] == one[0][1:] for call in one)
    assert len({str(one[0][2][:4]) for one in rounds}) == 6  # new prompts in each round: a server keeps those that it has seen
    assert [len(prompt) for prompt in rounds[0][0][2]] == [3, 4, 3, 4]
    assert calls[-3:] == [("sglang", "closed"), ("local", "closed"), ("plain", "closed")]
    record = json.loads((tmp_path / "bench_engine.json").read_text())
    assert record["results"] == [row.json() for row in rows]
    assert record["settings"]["max_new_tokens"] == 5
    assert (tmp_path / "bench_engine.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on(scripted: Callable[..., list[Any]], tmp_path: Path) -> None:
    calls = scripted(sglang=UserError("no SGLang here"), local={"short": 1, "after": 3}, plain={})
    rows = engine.benchmark(TINY, tmp_path)
    found = {(row.side, row.concurrency): (row.status, row.error, len(row.seconds)) for row in rows}
    assert found["sglang", 1] == found["sglang", 3] == ("failed", "no SGLang here", 0)
    assert found["local", 1] == ("measured", None, 2)
    assert found["local", 3] == ("failed", "it drew 24 tokens, not 25", 0)
    assert found["plain", 1] == found["plain", 3] == ("measured", None, 2)
    assert calls.count(("local", "closed")) == 1
    text = shown(rows)
    assert "sglang was not measured: no SGLang here; local was not measured: it drew 24 tokens, not 25" in text


def shown(rows: list[Row]) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(engine_report.table(rows, "title"))
    return console.export_text()


def test_table_and_plot(tmp_path: Path) -> None:
    rows = [
        Row("sglang", 1, 4, 100, seconds=[1.0, 2.0, 4.0]),
        Row("plain", 1, 4, 100, seconds=[2.0, 2.0, 2.5]),
        Row("sglang", 8, 32, 800, seconds=[2.0]),
        Row("plain", 8, 32, 800, "failed", "gone"),
    ]
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown(rows).splitlines() if line.startswith("│")]
    assert lines == [["1", "4", "50 (25-100)", "50 (40-50)", "1.00"], ["8", "32", "400 (400-400)", "–", "–"]]
    assert rows[0].json()["tokens_per_second"] == 50
    assert rows[3].json()["tokens_per_second"] is None
    engine_report.plot([rows[3]], "title", tmp_path / "nothing.png")
    assert (tmp_path / "nothing.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sides": ["vllm"]}, "--sides vllm: it is one of sglang, local, plain"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"device": "tpu"}, "--device tpu"),
        ({"sides": ["local"], "urls": ["http://127.0.0.1:1"]}, "sglang is not among --sides"),
    ],
)
def test_settings_that_cannot_be_measured(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        engine.benchmark(replace(TINY, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The two sides in this process, for real: every response has all its tokens, whatever ends a turn."""
    sizes = ["--concurrency", "1", "3", "--prompts", "3", "--lengths", "3", "5", "--max-new-tokens", "4", "--repeats", "1"]
    arguments = ["bench", "engine", "--model", "builtin:tiny-qwen3", "--sides", "local", "plain", *sizes, "--out", str(tmp_path)]
    code, out, err = trd(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    assert "local ÷ plain" in out
    results = json.loads((tmp_path / "bench_engine.json").read_text())["results"]
    assert [(r["side"], r["concurrency"], r["responses"], r["tokens"], r["status"]) for r in results] == [
        (side, concurrency, 3, 12, "measured") for concurrency in (1, 3) for side in ("local", "plain")
    ]


def test_the_client_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(client, "benchmark", lambda quiet: {"cpu_ms_per_request": 0.5, "requests_per_second": 1500.0})
    code, out, _ = trd("bench", "engine", "--client", "--out", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert [line.split()[-1] for line in out.splitlines()] == ["0.5", "1,500"]
    assert json.loads((tmp_path / "bench_client.json").read_text())["results"]["requests_per_second"] == 1500


def test_no_side_at_all(scripted: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    scripted(sglang=EngineFailedError("it did not start"))
    arguments = ["bench", "engine", "--model", "builtin:tiny-qwen3", "--sides", "sglang", "--out", str(tmp_path)]
    code, _, err = trd(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 1
    assert err.rstrip().endswith("error: no side could be measured")


def test_a_failing_side_says_why() -> None:
    class Engine:
        name, facts = "sglang", {}

        def generate(self, shards: Any, sampling: Any) -> Any:
            fine, bad = Generation([1], [-1.0], "stop"), Generation([], [], "abort", 0, "http://a: HTTP 500: sick")
            yield 0, [fine, bad, replace(bad, abort_reason="other")]

        def close(self) -> None: ...

    with pytest.raises(EngineFailedError, match=r"^2 of 3 requests failed: http://a: HTTP 500: sick$"):
        engine_sides._drawn(Engine(), [[1], [2], [3]], 1)  # type: ignore[arg-type]
