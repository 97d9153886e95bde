"""The SGLang client when the fault is not one request's, or only one request's: outages, poison, lost servers, other models."""
# ruff: noqa: F811

import json
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_server import ScriptedServer
from tests.unit.test_sglang_client import FAST, SAMPLING, Client, _quick_backoff, check, make_shards, model, two, wait_for  # noqa: F401
from trd_megatron.engine.admission import same_model
from trd_megatron.engine.base import EngineFailedError, Generation, Request, Weights
from trd_megatron.engine.client_options import ClientOptions
from trd_megatron.engine.journal import Journal
from trd_megatron.engine.sglang import SGLangEngine
from trd_megatron.engine.suspicion import Suspicion
from trd_megatron.errors import UserError


def in_time(work: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What `work` returns or raises, in a thread of its own: a hang fails the test."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append((True, work()))
        except BaseException as error:
            result.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    fine, value = result[0]
    if not fine:
        raise value
    return value


def only(*seeds: int, status: int = 500) -> Callable[[dict[str, Any]], tuple[int, str] | None]:
    return lambda request: (status, "always me") if request["sampling_params"]["sampling_seed"] in seeds else None


def reasons(found: dict[int, list[Generation]]) -> list[str]:
    return [str(g.abort_reason) for row in found.values() for g in row if g.finish_reason == "abort"]


# Errors in callbacks of timers


@pytest.mark.parametrize("count", [2, 4])
def test_all_requests_fail(model: Path, count: int) -> None:
    with ScriptedServer() as server:
        server.refuse = lambda request: (500, "sick")
        with Client([server], model, attempts=3) as client:
            with pytest.raises(UserError, match=r"last 32 requests all failed.*sick"):
                in_time(lambda: client.draw(make_shards(count)))
            assert len(client.said) < 10


def test_errors_that_a_timer_finds(model: Path) -> None:
    """A request is given up in a timer, and the next shard is pulled from there."""
    bad = [[Request([1], 0)], [Request([2], 1)]]

    def source() -> Iterator[list[Request]]:
        yield from bad
        raise KeyError("mine")

    with ScriptedServer() as server:
        server.refuse = lambda request: (500, "sick")
        with Client([server], model, attempts=1, max_outstanding=1) as client, pytest.raises(KeyError, match="mine"):
            in_time(lambda: client.draw(source()))
        server.context = 40
        long = [Request([5] * 33, 1000)]
        with Client([server], model, attempts=1, max_outstanding=1) as client, pytest.raises(UserError, match=r"40 tokens.*need 43"):
            in_time(lambda: client.draw(iter([*bad, long])))


def test_few_requests_that_all_fail(two: list[ScriptedServer], model: Path) -> None:
    """Nothing is recorded; once something was answered, the same requests are recorded as aborted."""
    for server in two:
        server.refuse = only(*range(20), status=400)
    shards = make_shards(1, size=20)
    with Client(two, model, max_outstanding=64) as client:
        generator = client.engine.generate(shards, SAMPLING)
        with pytest.raises(UserError, match=r"last 20 requests all failed.*always me"):
            in_time(lambda: list(generator))
    with Client(two, model, max_outstanding=64) as client:
        found = in_time(lambda: client.draw([*shards, [Request([1], 77)]]))
        check(found, [*shards, [Request([1], 77)]], aborts=20)
    with Client(two, model, max_outstanding=64) as client:  # a run that was cut off and goes on with the poisoned ones alone
        check(in_time(lambda: client.draw(shards)), shards, aborts=20)


def test_all_requests_fail_from_some_time_on(model: Path) -> None:
    shards = make_shards(20)
    with ScriptedServer(delay_s=0.01) as server, Client([server], model, attempts=2) as client:
        generator = client.engine.generate(shards, SAMPLING)
        found = dict([next(generator)])
        server.refuse = lambda request: (500, "sick now")
        with pytest.raises(UserError, match=r"last 32 requests all failed.*sick now"):
            in_time(lambda: found.update(generator))
        assert not reasons(found)
        server.refuse = lambda request: None
    with ScriptedServer() as server, Client([server], model) as client:
        check(in_time(lambda: client.draw(shards)), shards)


# Whose fault a failure is


@pytest.mark.parametrize("everything", [True, False])
def test_outage_behind_one_url(model: Path, everything: bool) -> None:
    """502 to all requests, and to health checks or not: no request is given up, whatever attempts they have."""
    shards = make_shards(30)
    with ScriptedServer(delay_s=0.02) as server, Client([server], model, attempts=1) as client:
        generator = client.engine.generate(shards, SAMPLING)
        found = dict([next(generator)])
        server.refuse_probe = lambda: (502, "Bad Gateway")
        server.refuse, server.healthy = (lambda request: (502, "Bad Gateway")), not everything

        def recover() -> None:
            server.refuse, server.healthy, server.refuse_probe = (lambda request: None), True, lambda: None

        threading.Timer(0.6, recover).start()
        in_time(lambda: found.update(generator))
        assert any("is out" in text for text in client.said)
    check(found, shards)


@pytest.mark.parametrize("status", [429, 503, 404])
def test_request_that_is_always_refused(two: list[ScriptedServer], model: Path, status: int) -> None:
    shards = make_shards(4)
    for servers in (two, two[:1]):
        for server in servers:
            server.refuse = only(5, status=status)
        with Client(servers, model, attempts=3) as client:
            found = in_time(lambda client=client: client.draw(shards))
            client.journal.unlink()
        check(found, shards, aborts=1)
        assert f"HTTP {status}: always me" in reasons(found)[0]
        assert not any("is out" in text for text in client.said)
        assert sum("given up" in text for text in client.said) == 1


def test_server_that_refuses_all_for_a_while(model: Path) -> None:
    shards = make_shards(4)
    with ScriptedServer() as server, Client([server], model, attempts=1, give_up_after_s=10) as client:
        server.refuse, server.refuse_probe = (lambda request: (503, "not now")), lambda: (503, "not now")
        threading.Timer(0.5, lambda: (setattr(server, "refuse", only()), setattr(server, "refuse_probe", lambda: None))).start()
        check(in_time(lambda: client.draw(shards)), shards)
        assert any("a small request failed too: HTTP 503: not now" in text for text in client.said)
        server.refuse, server.refuse_probe = (lambda request: (503, "not now")), lambda: (503, "not now")
        with pytest.raises(EngineFailedError, match=r"no healthy server.*HTTP 503: not now"):
            in_time(lambda: Client([server], model, give_up_after_s=0.5))


def test_server_that_holds_less_than_it_gets(model: Path) -> None:
    """Its queue is full, it refuses more: that counts against nobody, and soon no more is sent than it holds."""
    shards = make_shards(12)
    with ScriptedServer(delay_s=0.02) as server, Client([server], model, attempts=2, max_outstanding=64, health_interval_s=0.3) as client:
        server.holds = 16
        check(in_time(lambda: client.draw(shards)), shards)
        assert server.most_at_once == 16
        assert len(server.seen) < 192 + 300
        assert not any("is out" in text for text in client.said)


def test_rejected_by_the_servers_that_are_there(two: list[ScriptedServer], model: Path) -> None:
    """HTTP 400 by one: the other one, which is away for a moment, takes it."""
    two[0].refuse = only(*range(8), status=400)
    with Client(two, model) as client:
        two[1].stop()
        wait_for(lambda: any(f"{two[1].url} is out" in text or _pull(client) for text in client.said) or _pull(client))
        threading.Timer(0.5, two[1].start).start()
        shards = make_shards(2)
        check(in_time(lambda: client.draw(shards)), shards)


def _pull(client: Client) -> bool:
    """Messages come while a call waits for shards."""
    list(client.engine.generate([[]], SAMPLING))
    return False


def test_key_that_is_refused_once(model: Path) -> None:
    """401 to one request is a failure like another; the API key was right when the server was let in."""
    times = iter([True])
    with ScriptedServer() as server, Client([server], model) as client:
        server.refuse = lambda request: (401, "who are you") if next(times, False) else None
        shards = make_shards(2)
        check(in_time(lambda: client.draw(shards)), shards)


def test_server_that_is_healthy_and_generates_nothing(model: Path) -> None:
    """That is no request's fault either: it is out until it generates again."""
    shards = make_shards(1)
    with ScriptedServer() as server, Client([server], model, request_timeout_s=0.3, health_timeout_s=0.1, attempts=1) as client:
        server.stuck = True
        threading.Timer(1.5, lambda: setattr(server, "stuck", False)).start()
        check(in_time(lambda: client.draw(shards)), shards)
        assert any("is out: it answers nothing any more" in text for text in client.said)


# Servers that are lost


def test_servers_lost_twice_cost_no_parallelism(model: Path) -> None:
    shards = make_shards(16)
    with ScriptedServer(delay_s=0.2) as server, Client([server], model, max_outstanding=64) as client:

        def die() -> None:
            for _ in range(2):
                wait_for(lambda: server.now >= 40)
                server.stop()
                wait_for(lambda: server.now == 0)
                server.start()

        helper = threading.Thread(target=die)
        helper.start()
        before = len(server.seen)
        check(in_time(lambda: client.draw(shards)), shards)
        helper.join()
        assert before == 0 and len(server.seen) <= 256 + 2 * 64 + 64
        assert server.deaths == 0


def test_suspects_run_in_ever_smaller_groups() -> None:
    suspicion, server = Suspicion(64), object()
    items: list[Any] = [object() for _ in range(64)]
    killer = items[37]
    in_flight, deaths = items, 0
    while suspicion.lost(server, set(in_flight)) is not killer:  # type: ignore[arg-type]
        deaths += 1
        in_flight = [killer] if suspicion.admits(killer, server) else []  # type: ignore[arg-type]
        suspicion.begins(killer, server)  # type: ignore[arg-type]
        for item in items:
            if item is not killer and suspicion.admits(item, server):  # type: ignore[arg-type]
                suspicion.begins(item, server)  # type: ignore[arg-type]
                in_flight.append(item)
        assert len(in_flight) == max(1, 64 >> deaths)
    assert deaths == 6
    suspicion.convict()
    assert items[0] not in suspicion and suspicion.admits(items[0], server)  # type: ignore[arg-type]


def test_killer_behind_a_full_window(model: Path) -> None:
    """With 64 in flight it is found after 6 losses of company and `attempts` alone; nobody else is blamed."""
    shards = make_shards(12)
    over = threading.Event()
    with ScriptedServer(delay_s=0.02) as server:
        server.kills = lambda request: request["sampling_params"]["sampling_seed"] == 50

        def nurse() -> None:
            while not over.wait(0.02):
                server.start()

        helper = threading.Thread(target=nurse)
        helper.start()
        try:
            with Client([server], model, attempts=2, max_outstanding=64) as client:
                found = in_time(lambda: client.draw(shards), 60)
        finally:
            over.set()
            helper.join()
        check(found, shards, aborts=1)
        assert "was lost while it ran" in reasons(found)[0] or "connection broke" in reasons(found)[0]
        assert server.deaths <= 6 + 2


def test_no_connection_is_no_loss(model: Path) -> None:
    """A server that takes no connections is out; what waited for one is not suspected."""
    with ScriptedServer(delay_s=0.1) as server, Client([server], model, max_outstanding=16) as client:
        for start in range(0, 400, 100):
            server.stop()
            server.most_at_once = 0
            threading.Timer(0.2, server.start).start()
            shards = [[Request([3, 4], start + k) for k in range(16)]]
            check(in_time(lambda shards=shards: client.draw(shards)), shards)
            assert server.most_at_once > 8


def test_next_call_after_one_that_was_left_in_a_check(model: Path) -> None:
    with ScriptedServer() as server, Client([server], model, health_interval_s=30.0, health_timeout_s=60.0) as client:
        control = server._control
        server._control = lambda method, path, order, writer: (  # type: ignore[method-assign, assignment]
            server._loop.call_later(1.0, lambda: control(method, path, order, writer))
            if path == "/health"
            else control(method, path, order, writer)
        )
        server._next_fault = lambda: "close"  # type: ignore[method-assign]
        generator = client.engine.generate([[], [Request([1, 2, 3], 1)]], SAMPLING)
        next(generator)
        wait_for(lambda: client.engine._fleet.servers[0].doubted)
        generator.close()
        server._next_fault = lambda: None  # type: ignore[method-assign]
        shards = [[Request([1, 2, 3], 900 + k) for k in range(4)]]
        check(in_time(lambda: client.draw(shards)), shards)


# What a server serves


def test_server_started_by_hand_with_another_model(two: list[ScriptedServer], model: Path) -> None:
    for server in two:
        server.model_path = "/models/something-else"
    with pytest.raises(UserError, match=rf"of the model /models/something-else, the teacher's are .* of {model}"):
        Client(two[:1], model, update=False)
    assert not two[0].orders
    with Client(two[:1], model) as client:
        assert [path for path, _ in two[0].orders] == ["/update_weights_from_disk"]
        assert any("in place of the weights 'default' of the model /models/something-else" in text for text in client.said)


def test_server_of_another_shape_is_left_alone(two: list[ScriptedServer], model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"hidden_size": 64}))
    two[0].model_path = str(other)
    with pytest.raises(UserError, match=rf"runs the model {other}, of another shape than {model} \(hidden_size 64, not None\).*urls"):
        Client(two[:1], model)
    assert not two[0].orders


def test_server_that_ends_whenever_it_loads_our_weights(two: list[ScriptedServer], model: Path) -> None:
    server = two[0]
    server.model_path = "/models/something-else"
    control = server._control

    def breaks(method: str, path: str, order: Any, writer: Any) -> None:
        if path == "/update_weights_from_disk":
            server.orders.append((path, order))
            writer.transport.abort()
        else:
            control(method, path, order, writer)

    server._control = breaks  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"ended twice while it loaded .* in place of .*something-else.*its log says why"):
        Client([server], model, give_up_after_s=20.0)
    assert len(server.orders) == 2


def test_same_model(tmp_path: Path) -> None:
    def weights(path: str | Path) -> Weights:
        return Weights(Path(path), 0, "f" * 64)

    cached = "/cache/models--Qwen--Qwen3-1.7B/snapshots/"
    assert same_model(weights(cached + "abc"), "Qwen/Qwen3-1.7B")
    assert same_model(weights(cached + "abc"), "/elsewhere/models--Qwen--Qwen3-1.7B/snapshots/abc/")
    assert same_model(weights("/data/Qwen3-1.7B"), "/mnt/Qwen3-1.7B/")
    assert not same_model(weights(cached + "abc"), cached + "def")
    assert not same_model(weights(cached + "abc"), "Qwen/Qwen3-4B")
    assert not same_model(weights("/data/Qwen3-1.7B"), None) and not same_model(weights("/data/x"), "")
    for name in ("a", "b"):
        (tmp_path / name / "hf").mkdir(parents=True)
    assert same_model(weights(tmp_path / "a" / "hf"), str(tmp_path / "a" / ".." / "a" / "hf"))
    assert not same_model(weights(tmp_path / "a" / "hf"), str(tmp_path / "b" / "hf"))  # both are here, and not the same


def test_logprobs_that_are_not_finite(model: Path) -> None:
    with ScriptedServer() as server:
        server.probe_logprobs = [float("nan")] * 3
        with pytest.raises(EngineFailedError, match="logprobs that are not finite"):
            Client([server], model, give_up_after_s=0.3)


def test_role_in_messages(model: Path) -> None:
    with ScriptedServer() as server:
        server.model_path = "other"
        with pytest.raises(UserError, match=r"the benchmark's are .*correct --url$"):
            SGLangEngine(
                [server.url],
                Weights(model, 0, "f" * 64),
                ClientOptions(**FAST),  # type: ignore[arg-type]
                journal=model.parent / "journal.bin",
                may_update=False,
                say=print,
                role="benchmark",
            )


# Journal


def test_damaged_journal_keeps_what_is_good(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "j"
    with closing(Journal(path)) as journal:
        places = [journal.append(bytes([i]) * 32, array("i", [i] * 9), array("f", [-0.5] * 9), "stop") for i in range(5)]
    whole = path.read_bytes()
    for at in (places[2] + 3, places[2] + 37, places[2] + 60):  # key, crc, ids of the third
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        said: list[str] = []
        with closing(Journal(path, said.append)) as journal:
            assert len(journal) == 2
            assert journal.find(bytes([1]) * 32) == places[1] and journal.find(bytes([3]) * 32) is None
            journal.append(bytes([9]) * 32, array("i", [1]), array("f", [-1.0]), "length")
        assert len(said) == 1 and f"damaged at byte {places[2]}: the 2 samples before it are kept" in said[0]
        assert path.with_name("j.damaged").stat().st_size == len(whole)
        with closing(Journal(path, said.append)) as journal:
            assert len(journal) == 3 and len(said) == 1
    path.unlink()
    with ScriptedServer() as server:
        shards = make_shards(2)
        with Client([server], model) as client:
            client.draw(shards)
        content = client.journal.read_bytes()
        client.journal.write_bytes(content[:300] + b"\x55" + content[301:])
        with Client([server], model) as client:
            assert any("is damaged at byte" in text for text in client.said)
            check(client.draw(shards), shards)
        assert 32 < len(server.seen) < 64
