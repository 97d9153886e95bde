"""What a server must be before it gets work: healthy, with the right weights, reporting logprobs at temperature 1."""

import asyncio
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trd_megatron.engine.answers import BadAnswerError, error_message, one_line, parse_object
from trd_megatron.engine.base import Weights
from trd_megatron.engine.client_options import ClientOptions
from trd_megatron.engine.server_link import LINK_ERRORS, BrokenError, ServerLink, SlowError, StatusError, status_reason
from trd_megatron.errors import UserError

UNNAMED = "default"  # what SGLang calls weights that nobody gave a name
BENCHMARK = "benchmark"  # the role of servers that are named by --url
SHAPE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip
_PROBE_TEMPERATURES = (0.5, 2.0)
_SAME_LOGPROB = 0.1  # temperature moves the logprobs of the first three by far more, rounding in bfloat16 by far less


class NotReadyError(Exception):
    """The server cannot be used yet. One line."""


@dataclass(frozen=True)
class ServerFacts:
    """context: tokens of prompt and response together that one request may have. deterministic: whether seeds count.

    start: tells one start of the server from another. workers: (URL, start) of those of an sglang-router that were let in, None for
    a plain server. A router's other figures are the smallest of its workers'.
    """

    version: str
    deterministic: bool
    context: int
    start: str = ""
    workers: frozenset[tuple[str, str]] | None = None


class Admission:
    """Lets servers in. may_update: other weights may be replaced (the student's servers); else they are an error (a teacher's).

    role: student, teacher or BENCHMARK, for messages.
    """

    def __init__(self, weights: Weights, options: ClientOptions, *, may_update: bool, role: str, say: Callable[[str], None]) -> None:
        self._weights, self._options, self._may_update, self._say = weights, options, may_update, say
        self.role = role
        self._urls = "--url" if role == BENCHMARK else f"engine.{role}.urls"
        self._ended_loading: set[str] = set()  # URLs
        self._probed: set[tuple[str, str]] = set()  # (URL, start) of routers' workers whose logprobs are right

    @property
    def context_hint(self) -> str:
        """What to do about a context that is too short."""
        if self.role == BENCHMARK:
            return "start it with a longer --context-length, or ask for shorter prompts or fewer new tokens"
        return f"raise engine.{self.role}.context_length (and the memory for it), or lower max_prompt_tokens and max_response_tokens"

    async def admit(self, link: ServerLink, *, known: bool) -> ServerFacts:
        """Facts of a server or router that is ready for work, its weights put right if they may be.

        known: it was let in before. Raises NotReadyError if it is not ready yet, UserError if the user has to put something right.
        """
        try:
            workers = await self._workers(link)
            if workers is not None:
                facts = await self._admit_workers(workers)
                await self.probe(link)
            else:
                await self._healthy(link, self._options.health_timeout_s)
                facts = await self._facts(link, known)
                await self._put_weights_right(link, known)
                await self._probe_logprobs(link)
        except (StatusError, *LINK_ERRORS) as error:
            raise NotReadyError(str(error)) from None
        return facts

    async def look_again(self, link: ServerLink, facts: ServerFacts, timeout_s: float) -> ServerFacts:
        """Facts of one that was let in and is still healthy. A router's new and restarted workers are let in, too.

        Raises NotReadyError for a bad answer, one of LINK_ERRORS for none, UserError as `admit` does.
        """
        if facts.workers is None:
            await self._healthy(link, timeout_s)
            return facts
        # A router's own /health says nothing about its workers, and its /health_generate asks but one of them.
        workers = await self._workers(link)
        if workers is None:
            raise NotReadyError("it was a router, and has no workers now")
        return await self._admit_workers(workers)

    async def probe(self, link: ServerLink) -> None:
        """A small request. Raises StatusError or one of LINK_ERRORS unless the server or router serves it."""
        await self._top_logprobs(link, 1.0)

    async def _healthy(self, link: ServerLink, timeout_s: float) -> None:
        status, body = await link.call("GET", "/health", limit=1 << 20, timeout_s=timeout_s)
        if status != 200:
            raise NotReadyError(f"not healthy ({status_reason(status, body)})")

    # Routers

    async def _workers(self, link: ServerLink) -> list[ServerLink] | None:
        """The workers that a router takes for healthy, None for a server, which has no such path."""
        status, body = await link.control("GET", "/workers", timeout_s=self._options.health_timeout_s)
        if status in (404, 405):
            return None
        if status != 200:
            raise NotReadyError(f"/workers: {status_reason(status, body)}")
        workers = parse_object(body).get("workers")
        if not isinstance(workers, list) or not all(isinstance(w, dict) and isinstance(w.get("url"), str) for w in workers):
            raise BadAnswerError("/workers lists no workers")
        urls = {w["url"].split("@")[0]: None for w in workers if w.get("is_healthy") is True}  # URL@RANK: one rank of a server
        return [link.beside(url) for url in urls]

    async def _admit_workers(self, workers: list[ServerLink]) -> ServerFacts:
        """Lets in those that are ready: a router needs a while to see that a worker died, and asks the others meanwhile.

        Raises NotReadyError if none is, SlowError if one may only be busy.
        """
        found = await asyncio.gather(*map(self._admit_worker, workers))
        facts = [one for one in found if isinstance(one, ServerFacts)]
        if not facts:
            reasons = "; ".join(f"{worker.url}: {error}" for worker, error in zip(workers, found, strict=True))
            kind = SlowError if any(isinstance(one, SlowError) for one in found) else NotReadyError
            raise kind(f"the router has no healthy worker{f' ({reasons})' if reasons else ''}")
        return ServerFacts(
            version=" ".join(sorted({one.version for one in facts})),
            deterministic=all(one.deterministic for one in facts),
            context=min(one.context for one in facts),
            workers=frozenset((w.url, one.start) for w, one in zip(workers, found, strict=True) if isinstance(one, ServerFacts)),
        )

    async def _admit_worker(self, worker: ServerLink) -> ServerFacts | Exception:
        """Only one that is new or was restarted is probed. Returns what it is not ready for."""
        try:
            facts = await self._facts(worker, known=True)
            await self._put_weights_right(worker, known=True)
            if (worker.url, facts.start) not in self._probed:
                await self._probe_logprobs(worker)
                self._probed.add((worker.url, facts.start))
        except (NotReadyError, StatusError, *LINK_ERRORS) as error:
            return error
        return facts

    # Servers

    async def _get_object(self, link: ServerLink, path: str, known: bool) -> dict[str, Any]:
        status, body = await link.control("GET", path, timeout_s=self._options.health_timeout_s)
        if status == 404 and not known:
            raise UserError(f"{link.url} is no SGLang server (it has no {path}): correct {self._urls}")
        if status != 200:
            raise NotReadyError(f"{path}: {status_reason(status, body)}")
        return parse_object(body)

    async def _facts(self, link: ServerLink, known: bool) -> ServerFacts:
        info = await self._get_object(link, "/server_info", known)
        longest, total = info.get("max_req_input_len"), info.get("max_total_num_tokens")
        if type(longest) is not int or type(total) is not int:
            raise UserError(f"{link.url}/server_info gives no max_req_input_len and max_total_num_tokens: use SGLang 0.5.23 or newer")
        return ServerFacts(
            version=one_line(str(info.get("version")), 80),
            deterministic=info.get("enable_deterministic_inference") is True,
            context=min(longest + 6, total),  # SGLang keeps 6 tokens of its context back from a prompt
            start=json.dumps([info.get("startup_time"), info.get("random_seed")]),  # how long each step of it took; drawn at it
        )

    async def _put_weights_right(self, link: ServerLink, known: bool) -> None:
        label = self._weights.label
        info = await self._get_object(link, "/model_info", known)
        found = info.get("weight_version")
        if found == label:
            return
        path = str(self._weights.path.resolve())
        # One without a label was started by hand, as a rule with the model that the run starts with.
        named = f"the weights '{one_line(str(found), 80)}' of the model {one_line(str(info.get('model_path')), 200)}"
        if found == UNNAMED and self._weights.version == 0 and same_model(self._weights, info.get("model_path")):
            await self._change(link, "/update_weight_version", {"new_version": label}, self._options.health_timeout_s)
        elif self._may_update:
            self._check_shape(link, info.get("model_path"))
            self._say(f"{link.url}: loading the weights {path} in place of {named}")
            await self._load(link, {"model_path": path, "weight_version": label}, named)
        else:
            raise UserError(
                f"{link.url} serves {named}, the {self.role}'s are '{label}' of {self._weights.path}: "
                f"start it with model {self._weights.path} and --weight-version {label}, or correct {self._urls}"
            )
        found = (await self._get_object(link, "/model_info", known)).get("weight_version")
        if found != label:
            raise UserError(f"{link.url} keeps the weights '{one_line(str(found), 80)}' though '{label}' were loaded: restart it")

    def _check_shape(self, link: ServerLink, theirs: Any) -> None:
        """Raises UserError for a server whose model has another shape: it would end while it loads our weights."""
        if not isinstance(theirs, str) or not ((folder := Path(theirs)) / "config.json").is_file():
            return  # not on this machine
        ours, found = shape(self._weights.path), shape(folder)
        differing = sorted(key for key in ours if ours[key] != found[key])
        if differing:
            key = differing[0]
            raise UserError(
                f"{link.url} runs the model {one_line(theirs, 200)}, of another shape than {self._weights.path} "
                f"({key} {found[key]}, not {ours[key]}): start it with this model, or correct {self._urls}"
            )

    async def _load(self, link: ServerLink, order: dict[str, str], named: str) -> None:
        try:
            await self._change(link, "/update_weights_from_disk", order, self._options.request_timeout_s)
        except BrokenError:
            if link.url in self._ended_loading:  # once may be anybody's fault
                raise UserError(
                    f"{link.url} ended twice while it loaded {order['model_path']} in place of {named}: its log says why; "
                    f"start it with this model, or correct {self._urls}"
                ) from None
            self._ended_loading.add(link.url)
            raise

    async def _change(self, link: ServerLink, path: str, order: dict[str, str], timeout_s: float) -> None:
        status, body = await link.control("POST", path, order, timeout_s=timeout_s)
        if status == 503:
            raise NotReadyError(status_reason(status, body))
        if status != 200 or parse_object(body).get("success") is False:
            raise UserError(
                f"{link.url} does not take the weights {self._weights.path} ({error_message(body)}): "
                f"the folder must lie at the same path on the server's machine, and be of the model that it was started with"
            )

    async def _probe_logprobs(self, link: ServerLink) -> None:
        """A server not told otherwise divides by the request's temperature before it takes logprobs."""
        seen = [await self._top_logprobs(link, temperature) for temperature in _PROBE_TEMPERATURES]
        if not all(abs(a - b) < _SAME_LOGPROB for a, b in zip(*seen, strict=True)):
            raise UserError(
                f"{link.url} gives logprobs after temperature, training needs them at temperature 1: "
                "restart it with SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment"
            )

    async def _top_logprobs(self, link: ServerLink, temperature: float) -> list[float]:
        """The three highest logprobs of one token. Raises StatusError or one of LINK_ERRORS."""
        request = {
            "input_ids": [1, 2, 3],
            "sampling_params": {"temperature": temperature, "max_new_tokens": 1},
            "return_logprob": True,
            "top_logprobs_num": 3,
        }
        # It queues behind what the server does for others.
        timeout_s = 4 * self._options.health_timeout_s
        status, body = await link.call("POST", "/generate", json.dumps(request).encode(), limit=1 << 20, timeout_s=timeout_s)
        if status != 200:
            raise StatusError(status, body)
        try:
            values = [float(entry[0]) for entry in parse_object(body)["meta_info"]["output_top_logprobs"][0]]
        except (KeyError, IndexError, TypeError, ValueError, OverflowError):
            raise BadAnswerError("no output_top_logprobs in the answer to a probe") from None
        if len(values) != 3:
            raise BadAnswerError("not three output_top_logprobs in the answer to a probe")
        if not all(map(math.isfinite, values)):
            raise BadAnswerError("logprobs that are not finite in the answer to a probe: its weights or its dtype are at fault")
        return values


def shape(model: Path) -> dict[str, Any]:
    """What of a model's config.json decides the shapes of its weights; None where it has no such key."""
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {key: settings.get(key) for key in SHAPE}


def same_model(weights: Weights, theirs: Any) -> bool:
    """Whether what a server calls its model (a folder or a hub id) can be these weights."""
    if not isinstance(theirs, str) or not theirs:
        return False
    if Path(theirs).is_dir():  # here too: its content says
        from trd_megatron.builtin_models import model_fingerprint

        return Path(theirs).samefile(weights.path) or model_fingerprint(Path(theirs)) == weights.fingerprint
    name, revision = _hub_name(str(weights.path))
    their_name, their_revision = _hub_name(theirs)
    return name == their_name and (revision is None or their_revision is None or revision == their_revision)


def _hub_name(path: str) -> tuple[str, str | None]:
    """(name, revision): of a snapshot in the hub's cache those of the hub, else the last component."""
    snapshot = re.search(r"models--(?:[^/]+--)?([^/]+)/snapshots/([^/]+)/?$", path)
    return (snapshot[1], snapshot[2]) if snapshot else (Path(path).name, None)
