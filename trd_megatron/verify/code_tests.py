"""The forms of a code problem's tests (the JSON in the column `tests`), checked before anything is run."""

import json
from typing import Any

FORMS = '{"inputs": [...], "outputs": [...]}, the same with "fn_name", or {"asserts": "...", "fn_name": "..."}'
KEYS = {"inputs", "outputs", "fn_name", "asserts", "setup", "tolerance", "compare"}


def parse(tests: Any) -> dict[str, Any]:
    """The tests of a JSON text or of an object. Raises ValueError that says what is wrong, in one line."""
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except RecursionError:
            raise ValueError("is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"is no JSON ({error})") from None
    if not isinstance(tests, dict):
        raise ValueError(f"must be an object: {FORMS}")
    unknown = sorted(set(tests) - KEYS)
    if unknown:
        raise ValueError(f"has an unknown key '{unknown[0]}': it is {FORMS}")
    fn_name, setup = tests.get("fn_name"), tests.get("setup")
    if setup is not None and not isinstance(setup, str):
        raise ValueError("setup must be a text")
    if "asserts" in tests:
        names = fn_name if isinstance(fn_name, list) else [fn_name]
        if not isinstance(tests["asserts"], str) or not tests["asserts"].strip():
            raise ValueError("asserts must be a text of Python")
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError("asserts need fn_name, the function or functions that they call")
        return tests
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError("needs inputs and outputs, two lists of the same length, at least 1")
    if fn_name is None:
        if not all(isinstance(line, str) for text in [*inputs, *outputs] for line in (text if isinstance(text, list) else [text])):
            raise ValueError("without fn_name every input and output is a text, or a list of lines: what the program reads and writes")
    elif not isinstance(fn_name, str) or not all(isinstance(arguments, list) for arguments in inputs):
        raise ValueError("with fn_name every input is the list of the function's arguments")
    return tests
