"""What a function gives for a list of inputs, found in the sandbox: the expected results of benchmarks that bring a solution instead."""

from types import TracebackType
from typing import Any

from trd_megatron.verify import sandbox
from trd_megatron.verify.code import _answer, _Limits, _load, _Outcome
from trd_megatron.verify.plain_values import encode
from trd_megatron.verify.sandbox import Sandbox


class FunctionRunner:
    """Runs one program after the other; a context manager that leaves no process behind.

    Parameters as of CodeVerifier, whose UserError it raises where this machine gives no sandbox and less is not allowed.
    """

    def __init__(self, timeout_s: float = 60, total_timeout_s: float = 600, memory_mb: int = 4096, allow_unsandboxed: bool = False) -> None:
        self.timeout_s, self.total_timeout_s, self.memory_mb = timeout_s, total_timeout_s, memory_mb
        self._sandbox = Sandbox(sandbox.require(allow_unsandboxed))

    def __enter__(self) -> "FunctionRunner":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sandbox.kill()

    def run(self, program: str, fn_name: str, inputs: list[Any]) -> list[Any]:
        """The results of fn_name, one for each input (a list of arguments); inputs and results as in plain_values.

        Raises RuntimeError that says what went wrong: the program raised, took too long, or gave no plain value.
        """
        limits, results = _Limits(self.timeout_s, self.total_timeout_s, self.memory_mb), []
        self._sandbox.begin(self.memory_mb, self.total_timeout_s)
        try:
            _load(self._sandbox, program, "", limits, mutable=False)
            for number, arguments in enumerate(inputs, 1):
                line = self._sandbox.ask({"call": fn_name, "arguments": arguments, "keywords": {}}, limits.of_a_test())
                answer = _answer(line, f"input {number}", limits)
                if "value" not in answer:
                    raise RuntimeError(f"{fn_name}: input {number}: {answer.get('detail', 'no result')}")
                results.append(encode(answer["value"]))
        except _Outcome as outcome:
            raise RuntimeError(f"{fn_name}: {outcome.detail}") from None
        finally:
            self._sandbox.end()
        return results
