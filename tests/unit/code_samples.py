# ruff: noqa: E501 (programs are data)
"""Problems with right and wrong programs, in the forms of TACO, LiveCodeBench and MBPP."""

# name -> (tests, right programs, wrong programs), in the form of TACO's rows, with its standard input, function and class forms
SAMPLES = {
    "sum of two": (
        {"inputs": ["1 2\n", "-3 3\n", "1000000000000 1\n"], "outputs": ["3\n", "0\n", "1000000000001\n"]},
        [
            "a, b = map(int, input().split())\nprint(a + b)",
            "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
            "print(sum(map(int, open(0).read().split())))",
        ],
        [
            "print(3)",
            "a, b = map(int, input().split())\nprint(a - b)",
            "a, b = map(int, input().split())\nprint(a + b, file=__import__('sys').stderr)",
            "",
        ],
    ),
    "many lines": (
        {"inputs": ["3\n1\n2\n3\n", "1\n5\n"], "outputs": ["1\n4\n9\n", "25\n"]},
        [
            "def main():\n    for _ in range(int(input())):\n        print(int(input()) ** 2)\n\nif __name__ == '__main__':\n    main()",
            "import sys\nsys.stdout.write('\\n'.join(str(int(x) ** 2) for x in sys.stdin.read().split()[1:]))",
            "import threading\ndef main():\n    for _ in range(int(input())):\n        print(int(input()) ** 2)\nthreading.stack_size(1 << 26)\nthreading.Thread(target=main).start()",
            "for _ in range(int(input())):\n    print(f'  {int(input()) ** 2}  ')\nexit(3)",
            "import atexit\nout = []\natexit.register(lambda: print('\\n'.join(out)))\nfor _ in range(int(input())):\n    out.append(str(int(input()) ** 2))",
        ],
        [
            "print('1\\n4\\n9')",
            "for _ in range(int(input())):\n    print(int(input()) ** 2, end=' ')",
            "print(1)\nraise SystemExit",
            "while True:\n    print(int(input()) ** 2)",
        ],
    ),
    "lines given as lists": (
        {"inputs": [["2", "a b"], ["1", "c"]], "outputs": [["b", "a"], ["c"]]},
        ["n = int(input())\nprint(*reversed(input().split()), sep='\\n')"],
        ["n = int(input())\nprint(*input().split(), sep='\\n')"],
    ),
    "fractions": (
        {"inputs": ["1 2", "1 4"], "outputs": ["0.5", "0.25"]},
        ["a, b = map(int, input().split())\nprint(f'{a / b:.6f}')", "a, b = map(float, input().split())\nprint(a / b)"],
        ["a, b = map(int, input().split())\nprint(a // b)", "print('half')"],
    ),
    "deep recursion": (
        {"inputs": ["20000"], "outputs": ["20000"]},
        ["import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(int(input())))"],
        ["def f(n): return 0 if n == 0 else 2 + f(n - 1)\nprint(f(int(input())))"],
    ),
    "big numbers": (
        {"inputs": ["20000"], "outputs": [str(int("7" * 4000)) + "1"]},
        ["print('7' * 4000 + '1')\nassert len(str(10 ** int(input()))) == 20001"],
        ["print('7' * 4001)"],
    ),
    "function": (
        {"inputs": [[[3, 1, 2]], [[]], [[5]]], "outputs": [[[1, 2, 3]], [[]], [[5]]], "fn_name": "ordered"},
        [
            "def ordered(values):\n    return sorted(values)",
            "def ordered(values):\n    values.sort()\n    return tuple(values)",
            "ordered = sorted",
        ],
        [
            "def ordered(values):\n    return values",
            "def ordered(values):\n    values.sort()",
            "def sort(values):\n    return sorted(values)",
            "def ordered():\n    return []",
        ],
    ),
    "function with starter code and usual names": (
        {"inputs": [[[1, 1, 2], 2]], "outputs": [{"1": 2, "2": 1}], "fn_name": "count"},
        [
            "def count(values: List[int], n: int) -> Dict[int, int]:\n    return Counter(values)",
            "def count(values, n):\n    return {str(k): v for k, v in collections.Counter(values).items()}",
        ],
        ["def count(values, n):\n    return Counter(values).most_common()", "def count(values, n):\n    return dict.fromkeys(values, 2)"],
    ),
    "class Solution": (
        {"inputs": [[[2, 7, 11, 15], 9], [[3, 3], 6]], "outputs": [[0, 1], [0, 1]], "fn_name": "twoSum"},
        [
            "class Solution:\n    def twoSum(self, nums: List[int], target: int) -> List[int]:\n        seen = {}\n        for i, x in enumerate(nums):\n            if target - x in seen:\n                return [seen[target - x], i]\n            seen[x] = i"
        ],
        [
            "class Solution:\n    def twoSum(self, nums, target):\n        return [0, 0]",
            "class Solution:\n    pass",
            "class Solution:\n    def __init__(self, x): pass\n    def twoSum(self, nums, target): return [0, 1]",
        ],
    ),
    "state between calls": (
        {"inputs": [[], [], []], "outputs": [1, 2, 3], "fn_name": "tick"},
        [
            "count = 0\ndef tick():\n    global count\n    count += 1\n    return count",
            "import itertools\ntick = itertools.count(1).__next__",
        ],
        ["def tick():\n    return 1"],
    ),
    "exceptions": (
        {
            "asserts": "try:\n    f(-1)\n    assert False\nexcept ValueError as error:\n    assert 'negative' in str(error)\nassert f(4) == 2",
            "fn_name": "f",
        },
        ["class Negative(ValueError):\n    pass\ndef f(x):\n    if x < 0:\n        raise Negative('negative')\n    return x ** 0.5"],
        [
            "def f(x):\n    return 2",
            "def f(x):\n    raise ValueError('negative')",
            "def f(x):\n    raise KeyError('negative')",
            "def f(x):\n    raise SystemExit",
        ],
    ),
    "arguments changed in place": (
        {
            "asserts": "x = [3, 1, 2]\nassert f(x) is None\nassert x == [1, 2, 3]\nd = {1: 2}\ng(d, key=3)\nassert d == {1: 2, 3: (4,)}\ns = {1}\nh(s)\nassert s == {1, 2}",
            "fn_name": ["f", "g", "h"],
        },
        ["def f(x): x.sort()\ndef g(d, key): d[key] = (4,)\ndef h(s): s.add(2)"],
        ["def f(x): return sorted(x)\ndef g(d, key): d[key] = (4,)\ndef h(s): s.add(2)"],
    ),
    "values that JSON lacks": (
        {
            "asserts": "assert f((1, 2)) == (1, 2)\nassert f({1, 2}) == {1, 2}\nassert f(b'x') == b'x'\nassert f(1j) == 1j\nassert f({1: 'a', (2,): None}) == {1: 'a', (2,): None}\n"
            "assert f(float('inf')) == float('inf')\nassert type(f(True)) is bool\nassert f(2 ** 100) == 2 ** 100\nassert f(range(3)) == range(3)\nassert f('\\ud800') == '\\ud800'",
            "fn_name": "f",
        },
        ["def f(x): return x"],
        ["def f(x): return list(x)", "class T(tuple):\n    def __eq__(self, other): return True\ndef f(x): return T()"],
    ),
    "setup and free names": (
        {
            "asserts": "import math\ndef near(a, b):\n    return math.isclose(a, b)\nassert near(area(radius(2)), math.pi * 2 * SCALE)",
            "setup": "SCALE = 2",
        },
        ["from math import pi\nradius = lambda x: x / SCALE * 2\ndef area(r): return pi * r ** 2"],
        [
            "from math import pi\nradius = lambda x: x\ndef area(r): return pi",
            "def area(r): return math.pi * 4\ndef radius(x): return x",
            "def near(a, b): return True\ndef area(r): return 0\ndef radius(r): return 0",
        ],
    ),
}
