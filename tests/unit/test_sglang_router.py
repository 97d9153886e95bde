"""The SGLang client and an sglang-router, which is one URL with servers behind it."""
# ruff: noqa: F811

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scripted_server import ScriptedRouter, ScriptedServer
from tests.unit.test_sglang_client import SAMPLING, Client, _quick_backoff, check, make_shards, model, two, wait_for  # noqa: F401
from tests.unit.test_sglang_trouble import _pull, in_time
from trd_megatron.engine.base import EngineFailedError, Request
from trd_megatron.errors import UserError


@pytest.fixture
def router(two: list[ScriptedServer]) -> Iterator[ScriptedRouter]:
    with ScriptedRouter(two) as one:
        yield one


def test_weights_go_to_the_workers(router: ScriptedRouter, two: list[ScriptedServer], model: Path) -> None:
    two[0].context = 100
    with Client([router], model, version=1) as client:
        assert [[path for path, _ in worker.orders] for worker in two] == [["/update_weights_from_disk"]] * 2
        shards = make_shards(6)
        found = in_time(lambda: client.draw(shards))
        check(found, shards)
        assert found[0][0].weight_version == 1
        assert all(len(worker.seen) > 20 for worker in two) and not router.orders
        with pytest.raises(UserError, match=rf"{router.url} has room for 100 tokens"):  # the smallest of its workers
            client.draw([[Request([1] * 95, 1)]])


def test_workers_are_probed(router: ScriptedRouter, two: list[ScriptedServer], model: Path) -> None:
    two[1].original_logprobs = False
    with pytest.raises(UserError, match=rf"{two[1].url} gives logprobs after temperature"):
        Client([router], model)


def test_router_that_is_not_ready(router: ScriptedRouter, two: list[ScriptedServer], model: Path) -> None:
    """No other answer of /workers than 404 and 405 means a plain server."""
    router.workers_status = 502
    with pytest.raises(EngineFailedError, match=r"/workers: HTTP 502"):
        Client([router], model, give_up_after_s=0.3)
    router.workers_status, router.workers = 200, [(worker, False) for worker in two]
    with pytest.raises(EngineFailedError, match="the router has no healthy worker"):
        Client([router], model, give_up_after_s=0.3)
    router.workers = [(worker, True) for worker in two]
    for worker in two:
        worker.refuse_probe = lambda: (503, "busy")
    with pytest.raises(EngineFailedError, match=r"no healthy worker \(.*HTTP 503: busy"):
        Client([router], model, give_up_after_s=0.3)


def test_worker_that_joins_later(router: ScriptedRouter, two: list[ScriptedServer], model: Path) -> None:
    """It gets the weights and is probed; the others are not probed again."""
    router.workers = [(two[0], True)]
    with Client([router], model, version=1) as client:
        shards = make_shards(2)
        check(in_time(lambda: client.draw(shards)), shards)
        probes = two[0].probes
        router.workers = [(worker, True) for worker in two]
        wait_for(lambda: two[1].label == client.weights.label and two[1].probes == 2)
        shards = [[Request(r.prompt_ids, r.seed + 1000) for r in shard] for shard in shards]
        check(in_time(lambda: client.draw(shards)), shards)
        assert two[0].probes <= probes + 1  # one that was meant for the router, if an answer came from two[1] before
        assert two[1].drawn.total() > 0
    with ScriptedServer() as third, Client([router], model, version=1) as client:
        third.original_logprobs = False
        router.workers.append((third, True))
        with pytest.raises(UserError, match=rf"{third.url} gives logprobs after temperature"):
            wait_for(lambda: _pull(client))
        router.workers.pop()


def test_worker_that_restarts_is_probed_again(router: ScriptedRouter, two: list[ScriptedServer], model: Path) -> None:
    with Client([router], model) as client:
        wait_for(lambda: len(client.engine._fleet.servers[0].facts.workers) == 2)  # type: ignore[union-attr, arg-type]
        two[0].stop()
        two[0].label, two[0].original_logprobs = "default", False  # somebody starts it by hand
        two[0].start()
        with pytest.raises(UserError, match=rf"{two[0].url} gives logprobs after temperature"):
            wait_for(lambda: _pull(client))


def test_worker_that_dies(router: ScriptedRouter, two: list[ScriptedServer], model: Path) -> None:
    """The router goes on with the other one before it has seen that it died, and so does the client."""
    for worker in two:
        worker.delay_s = 0.01
    shards = make_shards(20)
    with Client([router], model, attempts=1) as client:
        generator = client.engine.generate(shards, SAMPLING)
        found = dict([next(generator)])
        two[1].stop()
        in_time(lambda: found.update(generator))
        check(found, shards)
        assert not any("is out" in text for text in client.said)
        wait_for(lambda: {url for url, _ in client.engine._fleet.servers[0].facts.workers} == {two[0].url})  # type: ignore[union-attr]
        two[1].start()  # and comes back
        wait_for(lambda: len(client.engine._fleet.servers[0].facts.workers) == 2)  # type: ignore[union-attr, arg-type]
        two[0].stop()
        two[1].stop()
        shards = [[Request([1, 2], 5000 + k) for k in range(4)]]
        threading.Timer(0.3, two[0].start).start()
        check(in_time(lambda: client.draw(shards)), shards)
        assert any("is out" in text for text in client.said)


def test_workers_too_busy_for_a_health_check(router: ScriptedRouter, two: list[ScriptedServer], model: Path) -> None:
    """As long as the router answers requests it stays in."""
    shards = make_shards(60)
    with Client([router], model, health_timeout_s=0.3) as client:
        asked = []
        for worker in two:
            worker.delay_s = 0.02
            worker._control = lambda method, path, order, writer: asked.append(path)  # type: ignore[method-assign, assignment]
        check(in_time(lambda: client.draw(shards)), shards)
        assert asked and not any("is out" in text for text in client.said)
