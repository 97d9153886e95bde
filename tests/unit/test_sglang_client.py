"""The SGLang client against scripted servers: faults, lost servers, weights, the journal, memory."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_server import FAULTS, VOCAB_SIZE, ScriptedServer, response
from trd_megatron.bench.client import benchmark
from trd_megatron.engine import dispatch
from trd_megatron.engine.base import EngineFailedError, Generation, Request, SamplingParams, Weights
from trd_megatron.engine.client_options import ClientOptions
from trd_megatron.engine.journal import Journal
from trd_megatron.engine.sglang import SGLangEngine
from trd_megatron.errors import UserError

ROOT = Path(__file__).parents[2]
SAMPLING = SamplingParams(0.6, 0.95, 20, 8)
FAST = {"health_interval_s": 0.05, "health_timeout_s": 2.0, "give_up_after_s": 20.0, "connect_timeout_s": 2.0, "max_outstanding": 16}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": VOCAB_SIZE}}))
    return folder


@pytest.fixture
def two() -> Iterator[list[ScriptedServer]]:
    with ScriptedServer(seed=1) as one, ScriptedServer(seed=2) as other:
        yield [one, other]


@pytest.fixture(autouse=True)
def _quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_BACKOFF_S", 0.005)
    monkeypatch.setattr(dispatch, "_LONGEST_BACKOFF_S", 0.05)


class Client:
    """An engine with what it said."""

    def __init__(
        self, servers: list[ScriptedServer], model: Path, *, version: int = 0, update: bool = True, key: str | None = None, **options: Any
    ) -> None:
        self.said: list[str] = []
        self.weights = Weights(model, version, "0123456789abcdef")
        self.journal = model.parent / "journal.bin"
        self.engine = SGLangEngine(
            [server.url for server in servers],
            self.weights,
            ClientOptions(**{**FAST, **options}),
            journal=self.journal,
            may_update=update,
            say=self.said.append,
            api_key=key,
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def draw(self, shards: Any, sampling: SamplingParams = SAMPLING) -> dict[int, list[Generation]]:
        found: dict[int, list[Generation]] = {}
        for index, generations in self.engine.generate(shards, sampling):
            assert index not in found
            found[index] = generations
        return found


def make_shards(count: int, size: int = 16, length: int = 20) -> list[list[Request]]:
    return [[Request([(i * size + k) % 997, *range(1, length - k % 7)], i * size + k) for k in range(size)] for i in range(count)]


def check(found: dict[int, list[Generation]], shards: list[list[Request]], sampling: SamplingParams = SAMPLING, aborts: int = 0) -> None:
    """Every sample is there once, and is the answer to its own prompt."""
    assert sorted(found) == list(range(len(shards)))
    for index, shard in enumerate(shards):
        assert len(found[index]) == len(shard)
        for request, generation in zip(shard, found[index], strict=True):
            if generation.finish_reason == "abort":
                aborts -= 1
                assert not generation.token_ids and generation.abort_reason and "\n" not in generation.abort_reason
                continue
            ids, logprobs = response(request.prompt_ids, request.seed, sampling.max_new_tokens)
            assert (list(generation.token_ids), list(generation.logprobs)) == (ids, logprobs)
            assert generation.finish_reason == ("length" if len(ids) == sampling.max_new_tokens else "stop")
    assert aborts == 0


def test_plain(two: list[ScriptedServer], model: Path) -> None:
    shards = [*make_shards(6), []]
    tokens: list[int] = []
    two[0].delay_s = two[1].delay_s = 0.005
    with Client(two, model, max_outstanding=4) as client:
        found = dict(client.engine.generate(iter(shards), SAMPLING, tokens.append))
        assert client.engine.facts == {"sglang": "0.5.23", "deterministic": False, "servers": [s.url for s in two]}
        assert {s.label for s in two} == {client.weights.label}  # "default" was named
        check(client.draw(shards), shards)  # all of it from the journal
        client.engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.draw(shards)
    check(found, shards)
    assert sum(tokens) == sum(len(g.token_ids) for row in found.values() for g in row)
    assert sum((s.drawn for s in two), start=type(two[0].drawn)()).total() == 96
    assert all(len(s.seen) > 20 and 2 <= s.most_at_once <= 4 for s in two)
    sent = two[0].seen[0]
    assert sent["return_logprob"] is True and "stream" not in sent
    assert {k: v for k, v in sent["sampling_params"].items() if k != "sampling_seed"} == {
        "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 8,
    }  # fmt: skip


def test_does_not_import_torch() -> None:
    code = "import sys, trd_megatron.engine.sglang; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_long_prompts_first_and_bounded_window(model: Path) -> None:
    pulled = []

    def source() -> Iterator[list[Request]]:
        for i, shard in enumerate(make_shards(40, size=4)):
            pulled.append(i)
            yield shard

    with ScriptedServer(delay_s=0.01) as server, Client([server], model, max_outstanding=4) as client:
        generator = client.engine.generate(source(), SAMPLING)
        next(generator)
        assert len(pulled) < 20  # 2 x 4 requests are open, and a caller that is slow does not stop the rest
        lengths = [len(request["input_ids"]) for request in server.seen[:4]]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] == 20 and lengths[1] == 20
        generator.close()


def test_servers_work_while_the_caller_is_busy(model: Path) -> None:
    with ScriptedServer() as server, Client([server], model) as client:
        shards = make_shards(10)
        generator = client.engine.generate(shards, SAMPLING)
        first = next(generator)
        wait_for(lambda: server.drawn.total() == 160)  # the caller takes nothing meanwhile
        check(dict([first, *generator]), shards)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_thousand_faults(two: list[ScriptedServer], model: Path) -> None:
    two[0].faults.update({kind: 150 for kind in FAULTS})
    two[1].faults = two[0].faults
    two[0].fault_rate = two[1].fault_rate = 0.8
    shards = make_shards(100, size=16)
    options = {"request_timeout_s": 1.0, "read_timeout_s": 0.5, "attempts": 40, "max_outstanding": 64}
    with Client(two, model, **options) as client:
        check(client.draw(shards), shards)
    injected = {kind: sum(server.injected[kind] for server in two) for kind in FAULTS}
    assert sum(injected.values()) >= 1000 and min(injected.values()) >= 100, injected
    assert any("is out" in text for text in client.said) and any("is back" in text for text in client.said)
    assert len(Journal(client.journal)) == 1600


CLIENT_PROCESS = """
import json, sys
from contextlib import closing
from pathlib import Path
from tests.unit.test_sglang_client import FAST, SAMPLING, make_shards
from trd_megatron.engine.base import Weights
from trd_megatron.engine.client_options import ClientOptions
from trd_megatron.engine.sglang import SGLangEngine
model = Path(sys.argv[1])
weights = Weights(model, 0, "0123456789abcdef")
with closing(SGLangEngine(sys.argv[2:], weights, ClientOptions(**FAST), journal=model.parent / "j", may_update=True, say=print)) as engine:
    for index, generations in engine.generate(make_shards(40), SAMPLING):
        print(json.dumps([index, [[list(g.token_ids), list(g.logprobs), g.finish_reason] for g in generations]]), flush=True)
"""


def test_killed_client_draws_nothing_twice(two: list[ScriptedServer], model: Path) -> None:
    for server in two:
        server.delay_s = 0.02
    command = [sys.executable, "-c", CLIENT_PROCESS, str(model), *(s.url for s in two)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    journal = model.parent / "j"
    wait_for(lambda: journal.exists() and journal.stat().st_size > 15_000)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = len(Journal(journal))
    assert 50 < kept < 640
    wait_for(lambda: not any(s.now for s in two))  # these do not notice at once that nobody waits
    before = sum(s.drawn.total() for s in two)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {}
    for line in done:
        if line.startswith("["):
            index, row = json.loads(line)
            assert index not in found
            found[index] = [Generation(*sample) for sample in row]
    check(found, make_shards(40))
    assert sum(s.drawn.total() for s in two) - before == 640 - kept


def test_poisoned_request(two: list[ScriptedServer], model: Path) -> None:
    """One fails everywhere, one is refused everywhere, one only by one server."""
    shards = make_shards(3)
    bad, refused, half = shards[0][3].seed, shards[1][0].seed, shards[2][5].seed

    def say(request: dict[str, Any], first: bool) -> tuple[int, str] | None:
        seed = request["sampling_params"]["sampling_seed"]
        if seed == bad:
            return 500, "bad\nday"
        return (400, "too odd") if seed == refused or (seed == half and first) else None

    two[0].refuse, two[1].refuse = lambda request: say(request, True), lambda request: say(request, False)
    with Client(two, model, attempts=3) as client:
        found = client.draw(shards)
        check(found, shards, aborts=2)
    assert found[0][3].abort_reason is not None and "HTTP 500: bad day" in found[0][3].abort_reason
    assert found[1][0].abort_reason is not None and "HTTP 400: too odd" in found[1][0].abort_reason
    seen = [[r["sampling_params"]["sampling_seed"] for r in s.seen] for s in two]
    assert [s.count(refused) for s in seen] == [1, 1]
    assert sum(s.count(bad) for s in seen) == 3 and min(s.count(bad) for s in seen) >= 1


def test_request_that_kills_servers(two: list[ScriptedServer], model: Path) -> None:
    shards = make_shards(8)
    killer = shards[4][4].seed
    over = threading.Event()

    def nurse() -> None:  # restarts what died
        while not over.wait(0.02):
            for server in two:
                server.start()

    for server in two:
        server.delay_s = 0.005
        server.kills = lambda request: request["sampling_params"]["sampling_seed"] == killer
    helper = threading.Thread(target=nurse)
    helper.start()
    try:
        with Client(two, model, attempts=4, max_outstanding=32) as client:
            found = client.draw(shards)
    finally:
        over.set()
        helper.join()
    check(found, shards, aborts=1)
    assert found[4][4].finish_reason == "abort"
    assert sum(s.deaths for s in two) >= 4 and min(s.deaths for s in two) >= 1
    with closing(Journal(client.journal)) as journal:
        assert len(journal) == 127


def test_all_servers_gone(two: list[ScriptedServer], model: Path) -> None:
    shards = make_shards(20)
    two[0].delay_s = two[1].delay_s = 0.05  # or all is done before they are stopped
    with Client(two, model, give_up_after_s=0.5) as client:
        generator = client.engine.generate(shards, SAMPLING)
        found = dict([next(generator)])
        for server in two:
            server.stop()
        with pytest.raises(EngineFailedError, match="no healthy server") as error:
            found.update(generator)
    assert all(server.url in str(error.value) for server in two)
    drawn = sum(s.drawn.total() for s in two)
    for server in two:
        server.start()
    with Client(two, model) as client:
        check(client.draw(shards), shards)
    # What was in flight when they died can have been answered and not have arrived.
    assert sum(s.drawn.total() for s in two) <= 320 + 2 * 16 and drawn > 16


def test_no_server_at_the_start(model: Path) -> None:
    server = ScriptedServer()
    with pytest.raises(EngineFailedError, match="no healthy server"):
        Client([server], model, give_up_after_s=0.3)
    threading.Timer(0.3, server.start).start()
    with Client([server], model) as client:
        assert any("waiting for" in text for text in client.said)
    server.stop()


def test_frozen_and_unhealthy_servers(two: list[ScriptedServer], model: Path) -> None:
    shards = make_shards(30)
    two[0].delay_s = two[1].delay_s = 0.01
    with Client(two, model, health_timeout_s=0.4) as client:
        generator = client.engine.generate(shards, SAMPLING)
        found = dict([next(generator)])
        two[0].frozen = True
        while not any(f"{two[0].url} is out" in text for text in client.said):
            found.update([next(generator)])
        two[0].frozen = False
        two[1].healthy = False
        found.update(generator)
        two[1].healthy = True
    check(found, shards)


def test_weights(two: list[ScriptedServer], model: Path) -> None:
    two[0].label = "0-of-another-run"
    two[1].label = "default"
    with Client(two, model, version=1) as client:
        label = client.weights.label
        order = ("/update_weights_from_disk", {"model_path": str(model.resolve()), "weight_version": label})
        assert [s.orders for s in two] == [[order], [order]]
        shards = make_shards(4)
        found = client.draw(shards)
        check(found, shards)
        assert found[0][0].weight_version == 1
        two[0].label = "2-other"  # somebody else loads other weights
        shards = [[Request(r.prompt_ids, r.seed + 1000) for r in shard] for shard in make_shards(4)]
        check(client.draw(shards), shards)
        wait_for(lambda: two[0].orders == [order, order])  # the other one may have done all the work meanwhile
        assert any("'2-other'" in text for text in client.said)
    two[0].label, two[0].takes_updates = "2-other", False
    with pytest.raises(UserError, match=r"does not take the weights .* \(no such folder\)"):
        Client([two[0]], model, version=1)
    with pytest.raises(UserError, match=rf"{two[0].url} serves the weights '2-other' of .*, the teacher's are '0-0123456789ab'"):
        Client([two[0]], model, update=False)
    assert len(two[0].orders) == 3


def test_server_that_lies_about_its_weights(two: list[ScriptedServer], model: Path) -> None:
    def lie(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        answer["meta_info"]["weight_versions"] = [{"version": "x", "start": 0, "end": 1}]
        return answer

    two[0].change = lie
    with Client(two[:1], model) as client, pytest.raises(UserError, match="wrong weights"):
        client.draw(make_shards(2))


def test_api_key(two: list[ScriptedServer], model: Path) -> None:
    two[0].api_key = "secret"
    with pytest.raises(UserError, match=r"401.*SGLANG_API_KEY"):
        Client(two[:1], model, key="wrong")
    with Client(two[:1], model, key="secret") as client:
        shards = make_shards(1)
        check(client.draw(shards), shards)
        two[0].api_key = "another"
        with pytest.raises(UserError, match="SGLANG_API_KEY"):
            client.draw([[Request([1], 5)]])


def test_logprobs_after_temperature(two: list[ScriptedServer], model: Path) -> None:
    two[1].original_logprobs = False
    with pytest.raises(UserError, match="SGLANG_RETURN_ORIGINAL_LOGPROB=1"), Client(two, model) as client:
        client.draw(make_shards(4))


def test_budget_and_prompts(two: list[ScriptedServer], model: Path) -> None:
    two[0].context = 30
    with Client(two[:1], model) as client:
        check(client.draw([[Request(list(range(20)), 1)]]), [[Request(list(range(20)), 1)]])
        with pytest.raises(ValueError, match="empty"):
            client.draw([[Request([], 1)]])
        with pytest.raises(UserError, match=r"id 1000.*1000"):
            client.draw([[Request([1], 2)], [Request([1, 1000], 3)]])
        with pytest.raises(UserError, match="id -1"):
            client.draw([[Request([1, -1], 3)]])
        seen = len(two[0].seen)
        with pytest.raises(UserError, match=r"30 tokens.*21.*need 31.*context_length"):
            client.draw([[Request(list(range(21)), 4)]])
        assert len(two[0].seen) == seen == 1


def test_first_requests_all_fail(two: list[ScriptedServer], model: Path) -> None:
    for server in two:
        server.refuse = lambda request: (400, "no such thing")
    with Client(two, model) as client:
        generator = client.engine.generate(make_shards(20, size=2), SAMPLING)
        with pytest.raises(UserError, match=r"last 32 requests all failed.*no such thing"):
            next(generator)


BROKEN: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "another request": lambda r, a: a["meta_info"].update(id=None),
    "no meta_info": lambda r, a: a.update(meta_info=[]),
    "prompt tokens": lambda r, a: a["meta_info"].update(prompt_tokens=1),
    "completion_tokens": lambda r, a: a["meta_info"].update(completion_tokens=True),
    "finish reason": lambda r, a: a["meta_info"].update(finish_reason="stop"),
    "aborted it": lambda r, a: a["meta_info"].update(finish_reason={"type": "abort", "message": "x"}),
    "not a list of ids": lambda r, a: a.update(output_ids=[1.5]),
    "but no logprobs": lambda r, a: a["meta_info"].pop("output_token_logprobs"),
    "logprob, id, text": lambda r, a: a["meta_info"].update(output_token_logprobs=[None] * len(a["output_ids"])),
    "other ids": lambda r, a: a["output_ids"].__setitem__(0, (a["output_ids"][0] + 1) % VOCAB_SIZE),
    "not a number": lambda r, a: a["meta_info"]["output_token_logprobs"][0].__setitem__(0, None),
    "not finite": lambda r, a: a["meta_info"]["output_token_logprobs"][0].__setitem__(0, float("nan")),
    "a logprob of 1": lambda r, a: a["meta_info"]["output_token_logprobs"][0].__setitem__(0, 1.0),
    "is not finite": lambda r, a: a["meta_info"]["output_token_logprobs"][0].__setitem__(0, 10**400),
    "vocabulary": lambda r, a: (a["output_ids"].__setitem__(0, 5000), a["meta_info"]["output_token_logprobs"][0].__setitem__(1, 5000)),
    "context is too short": lambda r, a: a["meta_info"].update(finish_reason={"type": "length"}),
    "more than 5696 bytes": lambda r, a: a.update(text="x" * 10_000_000),
    "not a JSON object": lambda r, a: json.dumps([a]).encode(),
    "not JSON": lambda r, a: b'{"a": ' + b"[" * 5000,
}


@pytest.mark.parametrize("reason", BROKEN)
def test_broken_answer(model: Path, reason: str) -> None:
    """It costs an attempt, names what is wrong, and the others get through."""
    shards = make_shards(1, size=8)
    bad = next(r.seed for r in shards[0] if len(response(r.prompt_ids, r.seed, 8)[0]) < 8)

    def change(request: dict[str, Any], answer: dict[str, Any]) -> Any:
        if request["sampling_params"]["sampling_seed"] != bad:
            return answer
        changed = BROKEN[reason](request, answer)
        return changed if isinstance(changed, bytes) else answer

    with ScriptedServer() as server, Client([server], model, attempts=2) as client:
        server.change = change
        found = client.draw(shards)
        check(found, shards, aborts=1)
        assert reason in str(found[0][bad].abort_reason)
        assert [r["sampling_params"]["sampling_seed"] for r in server.seen].count(bad) == 2


def test_leaving_early_and_going_on(two: list[ScriptedServer], model: Path) -> None:
    shards = make_shards(20)
    two[0].delay_s = two[1].delay_s = 0.02
    with Client(two, model) as client:
        for index, _ in client.engine.generate(shards, SAMPLING):
            assert index >= 0
            break
        check(client.draw(shards), shards)
        generator = client.engine.generate(shards, SamplingParams(0.5, 1.0, -1, 8))
        next(generator)
        client.engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            list(generator)
    assert not [t for t in threading.enumerate() if t.name == "sglang-client"]


def test_errors_of_the_source_reach_the_caller(two: list[ScriptedServer], model: Path) -> None:
    def source() -> Iterator[list[Request]]:
        yield from make_shards(1)
        raise KeyError("mine")

    with Client(two, model) as client, pytest.raises(KeyError, match="mine"):
        client.draw(source())


def test_ctrl_c(model: Path) -> None:
    with ScriptedServer(delay_s=30) as server, Client([server], model) as client:
        threading.Thread(target=lambda: (wait_for(lambda: len(server.seen) == 16), os.kill(os.getpid(), signal.SIGINT))).start()
        with pytest.raises(KeyboardInterrupt):
            client.draw(make_shards(4))


def test_memory_and_cost() -> None:
    """The client alone with 10,000 prompts of 1,000 tokens: the bound on memory is the promise, the one on CPU is far from it."""
    figures = benchmark(prompts=10_000, prompt_tokens=1_000, response_tokens=32, quiet=True)
    assert figures["peak_rss_mb"] < 500
    assert figures["cpu_ms_per_request"] < 5


# Journal


def write(path: Path, count: int) -> Journal:
    from array import array

    journal = Journal(path)
    for i in range(count):
        journal.append(bytes([i]) * 32, array("i", range(i + 1)), array("f", [-0.5] * (i + 1)), "stop" if i % 2 else "length")
    return journal


def test_journal(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j"
    write(path, 5).close()
    whole = path.read_bytes()
    for cut in itertools.chain(range(len(whole) - 84, len(whole)), range(3)):  # torn anywhere in the last record, or the first line
        path.write_bytes(whole[:cut])
        with closing(Journal(path)) as journal:
            assert len(journal) == (4 if cut > 3 else 0)
    path.write_bytes(whole + b"\0" * 200)  # after a power failure
    with closing(Journal(path)) as journal:
        place = journal.find(bytes([2]) * 32)
        assert place is not None
        ids, logprobs, finish = journal.read(place)
        assert (ids.tolist(), logprobs.tolist(), finish) == ([0, 1, 2], [-0.5] * 3, "length")
        assert journal.find(b"x" * 32) is None
    assert path.read_bytes() == whole
    path.write_text("something else")
    with pytest.raises(UserError, match="not a journal"):
        Journal(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk(two: list[ScriptedServer], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(two, model) as client:
        shards = make_shards(2)
        check(client.draw(shards), shards)
        size, full = client.journal.stat().st_size, os.open("/dev/full", os.O_WRONLY)
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(full, data, 0))  # the kernel's own ENOSPC
        with pytest.raises(OSError, match="No space left"):
            client.draw(make_shards(4))
        client.engine.close()
        monkeypatch.undo()
        os.close(full)
    assert client.journal.stat().st_size == size
    with Client(two, model) as client:
        check(client.draw(shards), shards)
