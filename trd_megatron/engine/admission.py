"""What a server must be before it gets work: healthy, with the right weights, reporting logprobs at temperature 1."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trd_megatron.engine.answers import BadAnswerError, error_message, one_line, parse_object
from trd_megatron.engine.base import Weights
from trd_megatron.engine.client_options import ClientOptions
from trd_megatron.engine.server_link import LINK_ERRORS, ServerLink, status_reason
from trd_megatron.errors import UserError

UNNAMED = "default"  # what SGLang calls weights that nobody gave a name
_PROBE_TEMPERATURES = (0.5, 2.0)
_SAME_LOGPROB = 0.1  # temperature moves the logprobs of the first three by far more, rounding in bfloat16 by far less


class NotReadyError(Exception):
    """The server cannot be used yet. One line."""


@dataclass(frozen=True)
class ServerFacts:
    """context: tokens of prompt and response together that one request may have. deterministic: whether seeds count.

    is_router: sglang-router, whose figures are the smallest of its workers'.
    """

    version: str
    deterministic: bool
    context: int
    is_router: bool


class Admission:
    """Lets servers in. may_update: other weights may be replaced (the student's servers); else they are an error (a teacher's)."""

    def __init__(self, weights: Weights, options: ClientOptions, *, may_update: bool, say: Callable[[str], None]) -> None:
        self._weights, self._options, self._may_update, self._say = weights, options, may_update, say
        self.role = "student" if may_update else "teacher"

    async def healthy(self, link: ServerLink, is_router: bool, timeout_s: float) -> None:
        """Raises NotReadyError for a bad answer, one of LINK_ERRORS for none. A router's /health says nothing about its workers."""
        status, body = await link.get("/health_generate" if is_router else "/health", timeout_s)
        if status != 200:
            raise NotReadyError(f"not healthy ({status_reason(status, b'' if is_router else body)})")

    async def admit(self, link: ServerLink) -> ServerFacts:
        """Facts of a server or router that is ready for work, its weights put right if they may be.

        Raises NotReadyError if that cannot be said yet, UserError if the user has to put something right.
        """
        try:
            workers = await self._workers(link)
            if workers is None:
                return await self._admit_server(link)
            if not workers:
                raise NotReadyError("the router has no healthy worker")
            await self.healthy(link, True, self._options.health_timeout_s)
            facts = [await self._admit_server(worker) for worker in workers]
        except LINK_ERRORS as error:
            raise NotReadyError(str(error)) from None
        return ServerFacts(
            version=" ".join(sorted({f.version for f in facts})),
            deterministic=all(f.deterministic for f in facts),
            context=min(f.context for f in facts),
            is_router=True,
        )

    async def _workers(self, link: ServerLink) -> list[ServerLink] | None:
        """The healthy workers of a router, None for a server, which has no such path."""
        status, body = await link.get("/workers", self._options.health_timeout_s)
        if status != 200:
            return None
        workers = parse_object(body).get("workers")
        if not isinstance(workers, list) or not all(isinstance(w, dict) and isinstance(w.get("url"), str) for w in workers):
            raise BadAnswerError("/workers lists no workers")
        urls = {w["url"].split("@")[0]: None for w in workers if w.get("is_healthy") is True}  # URL@RANK: one rank of a server
        return [link.beside(url) for url in urls]

    async def _admit_server(self, link: ServerLink) -> ServerFacts:
        await self.healthy(link, False, self._options.health_timeout_s)
        facts = await self._facts(link)
        await self._put_weights_right(link)
        await self._probe_logprobs(link)
        return facts

    async def _get_object(self, link: ServerLink, path: str) -> dict[str, Any]:
        status, body = await link.get(path, self._options.health_timeout_s)
        if status == 404:
            raise UserError(f"{link.url} is no SGLang server (it has no {path}): correct engine.{self.role}.urls")
        if status != 200:
            raise NotReadyError(status_reason(status, body))
        return parse_object(body)

    async def _facts(self, link: ServerLink) -> ServerFacts:
        info = await self._get_object(link, "/server_info")
        longest, total = info.get("max_req_input_len"), info.get("max_total_num_tokens")
        if type(longest) is not int or type(total) is not int:
            raise UserError(f"{link.url}/server_info gives no max_req_input_len and max_total_num_tokens: use SGLang 0.5.23 or newer")
        return ServerFacts(
            version=one_line(str(info.get("version")), 80),
            deterministic=info.get("enable_deterministic_inference") is True,
            context=min(longest + 6, total),  # SGLang keeps 6 tokens of its context back from a prompt
            is_router=False,
        )

    async def _put_weights_right(self, link: ServerLink) -> None:
        label = self._weights.label
        found = (await self._get_object(link, "/model_info")).get("weight_version")
        if found == label:
            return
        if found == UNNAMED and self._weights.version == 0:  # the user started it with the model's own weights
            await self._change(link, "/update_weight_version", {"new_version": label}, self._options.health_timeout_s)
        elif self._may_update:
            path = str(self._weights.path.resolve())
            self._say(f"{link.url}: loading the weights {path} in place of '{one_line(str(found), 80)}'")
            await self._change(
                link, "/update_weights_from_disk", {"model_path": path, "weight_version": label}, self._options.request_timeout_s
            )
        else:
            raise UserError(
                f"{link.url} serves the weights '{one_line(str(found), 80)}', the teacher's are '{label}': "
                f"start it with model {self._weights.path} and --weight-version {label}, or correct engine.teacher.urls"
            )
        found = (await self._get_object(link, "/model_info")).get("weight_version")
        if found != label:
            raise UserError(f"{link.url} keeps the weights '{one_line(str(found), 80)}' though '{label}' were loaded: restart it")

    async def _change(self, link: ServerLink, path: str, order: dict[str, str], timeout_s: float) -> None:
        status, body = await link.post(path, json.dumps(order).encode(), timeout_s)
        if status == 503:
            raise NotReadyError(status_reason(status, body))
        if status != 200 or parse_object(body).get("success") is False:
            raise UserError(
                f"{link.url} does not take the weights {self._weights.path} ({error_message(body)}): "
                f"the folder must lie at the same path on the server's machine, and be of the model that it was started with"
            )

    async def _probe_logprobs(self, link: ServerLink) -> None:
        """A server not told otherwise divides by the request's temperature before it takes logprobs."""
        seen = []
        for temperature in _PROBE_TEMPERATURES:
            request = {
                "input_ids": [1, 2, 3],
                "sampling_params": {"temperature": temperature, "max_new_tokens": 1},
                "return_logprob": True,
                "top_logprobs_num": 3,
            }
            # It queues behind what the server does for others.
            status, body = await link.post("/generate", json.dumps(request).encode(), 4 * self._options.health_timeout_s)
            if status != 200:
                raise NotReadyError(status_reason(status, body))
            try:
                seen.append([float(entry[0]) for entry in parse_object(body)["meta_info"]["output_top_logprobs"][0]])
            except (KeyError, IndexError, TypeError, ValueError):
                raise BadAnswerError("no output_top_logprobs in the answer to a probe") from None
        if len(seen[0]) != 3 or len(seen[1]) != 3:
            raise BadAnswerError("not three output_top_logprobs in the answer to a probe")
        if not all(abs(a - b) < _SAME_LOGPROB for a, b in zip(*seen, strict=True)):
            raise UserError(
                f"{link.url} gives logprobs after temperature, training needs them at temperature 1: "
                "restart it with SGLANG_RETURN_ORIGINAL_LOGPROB=1 in its environment"
            )
