"""What a server's answer to /generate must be. Every answer is taken as hostile: a wrong one raises BadAnswerError, nothing else."""

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trd_megatron.engine.base import FinishReason

_ABOVE_ZERO = 1e-3  # rounding of log-softmax


class BadAnswerError(Exception):
    """The answer is not one to the request that was sent. One line."""


class WrongWeightsError(BadAnswerError):
    """The sample was drawn from other weights."""


@dataclass(frozen=True)
class Draw:
    """ids array("i") and logprobs array("f"), of one length, at least 1."""

    ids: "array[int]"
    logprobs: "array[float]"
    finish: FinishReason


def size_limit(max_new_tokens: int) -> int:
    """Bytes that an answer may have: meta_info, and per token an id, a logprob and text."""
    return 4096 + 200 * max_new_tokens


def one_line(text: str, limit: int = 300) -> str:
    """Text of a server, fit for a message."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def error_message(body: bytes) -> str:
    """What the body of an error says."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    for key in ("error", "message"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return one_line(value if isinstance(value, str) else body[:2000].decode(errors="replace")) or "no message"


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises BadAnswerError."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise BadAnswerError(f"not JSON: {one_line(body[:80].decode(errors='replace'))!r}") from None
    if not isinstance(value, dict):
        raise BadAnswerError("not a JSON object")
    return value


def read_answer(body: bytes, *, rid: str, prompt_tokens: int, max_new_tokens: int, vocab_size: int, label: str) -> Draw:
    """The sample in the answer to the request `rid`.

    Raises WrongWeightsError if it does not come from the weights `label`, BadAnswerError for whatever else is wrong with it.
    """
    answer = parse_object(body)
    meta = answer.get("meta_info")
    if not isinstance(meta, dict):
        raise BadAnswerError("no meta_info in the answer")
    if meta.get("id") != rid:
        raise BadAnswerError(f"the answer is to another request: id {_short(meta.get('id'))}, not '{rid}'")
    finish = meta["finish_reason"].get("type") if isinstance(meta.get("finish_reason"), dict) else None
    if finish == "abort":
        raise BadAnswerError(f"the server aborted it: {_short(meta['finish_reason'].get('message'))}")
    if finish != "stop" and finish != "length":
        raise BadAnswerError(f"finish reason {_short(finish)}")
    _check_weights(meta, label)
    if not _equal(meta.get("prompt_tokens"), prompt_tokens):
        raise BadAnswerError(f"the server saw {_short(meta.get('prompt_tokens'))} prompt tokens, {prompt_tokens} were sent")
    ids, triples = answer.get("output_ids"), meta.get("output_token_logprobs")
    if not isinstance(ids, list) or set(map(type, ids)) != {int}:
        raise BadAnswerError("output_ids is not a list of ids")
    if not isinstance(triples, list) or len(triples) != len(ids):
        raise BadAnswerError(f"{len(ids)} ids but {len(triples) if isinstance(triples, list) else 'no'} logprobs")
    if set(map(type, triples)) != {list} or min(map(len, triples)) < 2:
        raise BadAnswerError("output_token_logprobs is not a list of [logprob, id, text]")
    if [triple[1] for triple in triples] != ids:
        raise BadAnswerError("output_token_logprobs names other ids than output_ids")
    if not _equal(meta.get("completion_tokens"), len(ids)):
        raise BadAnswerError(f"{len(ids)} ids but completion_tokens {_short(meta.get('completion_tokens'))}")
    if len(ids) > max_new_tokens:
        raise BadAnswerError(f"{len(ids)} tokens, {max_new_tokens} were asked for")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise BadAnswerError(f"an id beyond the vocabulary of {vocab_size}")
    logprobs = _logprobs([triple[0] for triple in triples])
    if finish == "length" and len(ids) < max_new_tokens:
        raise BadAnswerError(
            f"cut after {len(ids)} of {max_new_tokens} tokens: the server's context is too short, raise its context_length"
        )
    return Draw(array("i", ids), logprobs, "stop" if finish == "stop" else "length")


def _check_weights(meta: dict[str, Any], label: str) -> None:
    """weight_version, and every stretch of weight_versions, which newer servers give: weights can change in mid-sample."""
    stretches = meta.get("weight_versions")
    if stretches is not None and not (isinstance(stretches, list) and all(isinstance(s, dict) for s in stretches)):
        raise BadAnswerError("weight_versions is not a list")
    for found in [meta.get("weight_version"), *(s.get("version") for s in stretches or ())]:
        if found != label:
            raise WrongWeightsError(f"drawn from the weights {_short(found)}, not '{label}'")


def _logprobs(values: Sequence[Any]) -> "array[float]":
    if not set(map(type, values)) <= {float, int}:
        raise BadAnswerError("a logprob is not a number")
    try:
        logprobs = array("f", values)
    except OverflowError:
        raise BadAnswerError("a logprob is not finite") from None
    if not all(map(math.isfinite, logprobs)):
        raise BadAnswerError("a logprob is not finite")
    if max(logprobs) > _ABOVE_ZERO:
        raise BadAnswerError(f"a logprob of {max(logprobs):g}")
    return logprobs


def _equal(value: Any, wanted: int) -> bool:
    return type(value) is int and value == wanted


def _short(value: Any) -> str:
    return one_line(repr(value) if isinstance(value, str | int | float | None) else type(value).__name__, 80)
