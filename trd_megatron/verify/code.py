"""Code verification: takes the last python block of a response and runs it against its problem's tests in a sandbox.

The tests of a problem (the column `tests`), as JSON, in one of three forms:

    {"inputs": ["1 2\\n"], "outputs": ["3\\n"]}                        standard input and output; text, or lists of lines
    {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}            calls of a function, or of a method of `class Solution`
    {"asserts": "assert add(1, 2) == 3", "fn_name": "add"}            Python text that calls the program's functions (see below)

    "setup"      Python text that is run before the program, and before the asserts; it takes the place of the usual imports (the
                 names of typing, math, collections, itertools, ..., as LiveCodeBench's grader gives them). "" means nothing at all.
    "tolerance"  of numbers in function results: |result - expected| <= tolerance, default 0
    "compare"    how a function's result is compared; without it as TACO's and LiveCodeBench's graders do: tuples are lists, at any
                 depth; where [x] is expected, x will do. Else one of EvalPlus' ways, which know tuples from lists:
        "exact"            ==; numbers within tolerance + 1e-7 |expected| where the types agree, with a tolerance of 1e-6 where
                           floats are expected and none is given
        "set"              set(result) == set(expected)
        "not_none"         a bool must be the expected one; of anything else, whether it is not None
        "any"              every result passes (Mbpp/164)
        "or_zero"          as exact, or the result is 0 (Mbpp/295)
        "surface_area"     as exact, or within the tolerance of the pyramid's surface by its perpendicular height (Mbpp/581)
        "digit_distance"   as exact, or the sum of the differences of the digits (Mbpp/558)
        "polynomial_root"  the result is a root, within the tolerance, of the polynomial that is the argument (HumanEval/32)

Values that JSON cannot hold are written as in plain_values.py. In the assert form "fn_name" is a name or a list of names; without it
every name counts that the asserts use and neither they nor the setup nor Python define.
"""
