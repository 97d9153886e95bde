r"""Math answers as text: one spelling for what LaTeX and Unicode write in many ways, and the verdicts that need no algebra.

Everything here is string work on at most MAX_ANSWER_CHARS characters. What it cannot decide goes to math-verify, in a child process.
"""

import re
from fractions import Fraction

from trd_megatron.verify import math_units

EXACT_DECIMALS = 6  # to which a decimal must agree with the reference
AMO_DECIMALS = 4  # the same for the answer types number and set, as AMO-Bench grades
LARGEST_POWER = 4_000  # of ten, that is worked out
RELATIVE_TOLERANCE = Fraction(1, 10_000)  # a second condition, so that 0.0000001 is not 0.0000002

_SYMBOLS = {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ", "∕": "/", "⁄": "/", "±": r"\pm ", "∓": r"\mp ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ", "∅": r"\emptyset ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "°": r"^\circ ", "√": r"\sqrt ", "−": "-", "–": "-", "‒": "-", "﹣": "-", "。": ".", "、": ",", "’": "'", "‘": "'",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅛": r"\frac{1}{8}",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ", "π": r"\pi ",
    "ρ": r"\rho ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ", "Σ": r"\Sigma ", "Ω": r"\Omega ",
}  # fmt: skip
_TABLE = str.maketrans(
    _SYMBOLS
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width forms of ASCII
    | dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t\n\r\f\v", " ")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", "")
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUPERSCRIPT = re.compile(r"(?<=[\w)}\]])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_ORDINAL = re.compile(r"(?<=[0-9])\s*\^\s*\{\s*\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}$")
_MINUS_TWICE = re.compile(r"^-\s*-\s*(?=\d)")

_LAYOUT = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|tiny|small|normalsize|large|Large|LARGE|huge|Huge|boldsymbol|bm|mathbf|mathit"
    r"|mathsf|mathnormal|textstyle|fbox|boxed|left\.|right\.|left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*"
)
_TEXT_COMMAND = re.compile(r"\\(?:text(?:normal|bf|it|rm|sf|tt|sc|up|md)|mathrm|mbox|operatorname)(?=\s*\{)")
_DECORATION = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}|\\tag\*?\s*\{[^{}]*\}|^\*\*|\*\*$")
_OPTION = re.compile(r"^(\\text\s*\{\s*)?(?:[Oo]ption|[Cc]hoice)\s+(?=\(?[A-Z]\)?\s*\}?$)")
_NUMBER_AS_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mathrm)\s*\{\s*(-?[0-9.][^{}]*)\}")
_SPACE = re.compile(r"\\(?:q?quad|thinspace|medspace|thickspace|enspace|hfill)(?![a-zA-Z])|\\[,;: ]|~|\\[hv]space\*?\{[^{}]*\}")
_RENAMED = {
    "varnothing": r"\emptyset", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "dfrac": r"\frac", "tfrac": r"\frac",
    "cfrac": r"\frac", "dbinom": r"\binom", "tbinom": r"\binom", "leqslant": r"\le", "geqslant": r"\ge", "leq": r"\le", "geq": r"\ge",
    "lt": "<", "gt": ">", "neq": r"\ne", "imath": "i", "degree": r"^\circ", "coloneqq": "=", "textdollar": r"\$", "euro": "€",
    "langle": "(", "rangle": ")", "lg": r"\log_{10}",
}  # fmt: skip
_RENAME = re.compile(rf"\\({'|'.join(_RENAMED)})(?![a-zA-Z])")
_DIGIT_GROUP_SPACE = re.compile(r"(?<=[0-9])(?:\\[,;:! ]|~| )(?=[0-9]{3}(?![0-9]))")
_PERCENT_WORD = re.compile(r"\s*(?:\\text\s*\{\s*(?:percent|pct|%|\\%)\s*\}|\b(?:percent|pct)\b)")
_DOTS = re.compile(r"\\(?:l|c)?dots|\.\.\.|…")
_BRACED_COMMA = re.compile(r"\s*\{\s*,\s*\}\s*|(?<=[0-9]),\\!\s*(?=[0-9]{3})")
_GROUPED = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_TRAILING = re.compile(r"\\text\s*\{\s*[.,;]?\s*\}$")
_LEADING = re.compile(r"^(?:\s|=|\\approx(?![a-zA-Z]))+")
_MIXED = re.compile(r"^(-?)\s*([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)$")
_E_NOTATION = re.compile(r"(?<![a-zA-Z0-9.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]+)(?![0-9.a-zA-Z])")
_REPEATING = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{([0-9]+)\}(?![0-9])")
_BARE_PI = re.compile(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])")
_IMAGINARY = re.compile(r"(?<![a-zA-Z\\_])(?:\\text\s*\{\s*i\s*\}|i)(?![a-zA-Z])")
_COUNTING_I = re.compile(r"\\(?:sum|prod|bigcup|bigcap|lim)(?![a-zA-Z])|_\s*\{?\s*i|[a-zA-Z]\s+i\b|\bi\s+[a-zA-Z]|\\text")
_VALUE_FIRST = re.compile(r"^([^=<>a-zA-Z\\]+)=\s*([a-zA-Z])$")
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_ANGLE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*\^\s*\{?\s*\\circ\s*\}?")
_WRAPPED = (("\\(", "\\)"), ("\\[", "\\]"))


def normalise(text: str) -> str:
    """One spelling for equal texts; the meaning stays. For the answer and the reference alike."""
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = text.translate(_TABLE).strip()
    for opening, closing in _WRAPPED:
        if len(text) > 4 and text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    text = _OPTION.sub(r"\1", _DECORATION.sub("", text).strip())
    if (match := _NUMBER_AS_TEXT.fullmatch(text)) is not None:
        text = match[1]
    text = re.sub(r"(?<!\\)\$", "", text.replace(r"\text{\$}", r"\$"))
    text = _BRACED_COMMA.sub(",", _DIGIT_GROUP_SPACE.sub("", text))
    text = text.replace(r"\!", "").replace(":=", "=")
    text = _RENAME.sub(lambda match: _RENAMED[match[1]] + (" " if _RENAMED[match[1]].startswith("\\") else ""), text)
    text = _TEXT_COMMAND.sub(r"\\text", _LAYOUT.sub("", text))
    text = _PERCENT_WORD.sub(r"\\%", text)
    text = _LEADING.sub("", _SPACE.sub(" ", text)).rstrip(".,; ")
    while (match := _TRAILING.search(text)) is not None:
        text = text[: match.start()].rstrip(".,; ")
    text = _GROUPED.sub(_ungroup, text)
    text = _ORDINAL.sub("", _MINUS_TWICE.sub("", text))
    text = _MIXED.sub(lambda m: rf"{m[1]}{m[2]}\frac{{{m[3]}}}{{{m[4]}}}" if int(m[3]) < int(m[4]) else m[0], text)
    text = _E_NOTATION.sub(r"\1\\times 10^{\2}", text)
    text = _REPEATING.sub(_repeating_fraction, text)
    text = _BARE_PI.sub(r"\\pi ", text)
    if not _COUNTING_I.search(text.replace(r"\text{i}", "i")):
        text = _IMAGINARY.sub("{I}", text)  # in braces: the grammar drops the power of a bare I
    if _TRIG.search(text):
        text = _ANGLE.sub(r"{\\frac{\1\\pi}{180}}", text)
    return " ".join(_VALUE_FIRST.sub(r"\2=\1", text).split())


def _ungroup(match: re.Match[str]) -> str:
    """1,234 without its comma; inside of brackets the comma more often parts two values."""
    before, digits = match.string[: match.start()], match[0]
    inside = any(before.count(opening) > before.count(closing) for opening, closing in ("()", "[]", ("\\{", "\\}")))
    if not inside or ",0" in digits or ", " in match.string:
        return digits.replace(",", "")
    return digits.replace(",", ", ")


def _repeating_fraction(match: re.Match[str]) -> str:
    whole, fixed, period = match.groups()
    bottom = (10 ** len(period) - 1) * 10 ** len(fixed)
    value = Fraction(int((whole or "0") + fixed + period) - int((whole or "0") + fixed), bottom)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


_POWER_OF_TEN = r"\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([+-]?[0-9]+)\s*\}|([0-9]))"
_DECIMAL = re.compile(rf"([+-]?)\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:{_POWER_OF_TEN})?")
_RATIO = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:\s*:\s*[0-9]+(?:\.[0-9]+)?)+")
_CLOCK = re.compile(r"[0-9]{1,2}:[0-5][0-9]")
_BASED = re.compile(r"([0-9A-Za-z]+)_\s*(?:([0-9])|\{\s*(?:\\text\s*\{)?\s*([0-9]+|[a-z]+)\s*\}?\s*\})")
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12, "sixteen": 16}
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '.-](?=[^\W\d_]))*")
_CHOICES = re.compile(r"[A-Z](?:,[A-Z])+")
_LOWERED = re.compile(r"(?<![a-zA-Z\\{0-9])[0-9]+\s*_")  # a number with an index
_PLAIN_WORDS = ("yes", "no", "true", "false", "none", "odd", "even", "all", "both", "neither", "never", "always", "finite", "infinite")


def agree(gold: Fraction, answer: Fraction, decimals: int) -> bool:
    """Whether two decimals count as the same: equal, or equal after rounding and within RELATIVE_TOLERANCE."""
    if gold == answer:
        return True
    close = abs(gold - answer) <= RELATIVE_TOLERANCE * max(abs(gold), abs(answer))
    return close and round(gold, decimals) == round(answer, decimals)


def quick_verdict(gold: str, answer: str, decimals: int) -> bool | tuple[str, str]:
    """Whether the normalised answer is right where that takes no algebra; otherwise (gold, answer) without units, for math-verify."""
    if gold == answer:
        return True
    if bool(_DOTS.search(gold)) != bool(_DOTS.search(answer)):  # math-verify drops dots, and 1, 2, ... is no list of two
        return False
    for decide in (_compare_choices, _compare_words, _compare_ratios, _compare_bases):
        decided = decide(gold, answer)
        if decided is not None:
            return decided
    if bool(_LOWERED.search(gold)) != bool(_LOWERED.search(answer)):  # the grammar drops the index
        return False
    gold, gold_unit = math_units.split(gold)
    answer, answer_unit = math_units.split(answer)
    if gold_unit and answer_unit and gold_unit != answer_unit:
        return False
    gold_number, answer_number = _decimal(gold), _decimal(answer)
    if gold_number and answer_number:
        return _compare_numbers(gold_number, answer_number, decimals)
    if {_bracket(gold), _bracket(answer)} in ({"{", "("}, {"{", "["}):
        return False
    return gold == answer or (gold, answer)


def _decimal(text: str) -> tuple[str, int] | None:
    """(digits with sign and point, exponent of ten) of a plain decimal or one in scientific notation, None for anything else."""
    match = _DECIMAL.fullmatch(text)
    return match and ((match[1] if match[1] == "-" else "") + match[2], int(match[3] or match[4] or 0))


def _compare_numbers(gold: tuple[str, int], answer: tuple[str, int], decimals: int) -> bool:
    left, right = Fraction(gold[0]), Fraction(answer[0])
    apart = gold[1] - answer[1]
    if max(abs(gold[1]), abs(answer[1])) <= LARGEST_POWER:
        return agree(left * Fraction(10) ** gold[1], right * Fraction(10) ** answer[1], decimals)
    # Powers that are not worked out. Each number has at most MAX_ANSWER_CHARS digits, so numbers so far apart differ, but for zeros.
    return left == right == 0 if abs(apart) > LARGEST_POWER else left * Fraction(10) ** apart == right


def _plain_words(text: str) -> tuple[str, bool] | None:
    r"""(words, whether they stand in \text or are a word for sure) if the text is nothing but words."""
    wrapped = r"\text" in text
    text = re.sub(r"\\text\s*(?=\{)|[{}\"]", "", text).strip().strip(".").strip()
    if len(text) > 2 and text[0] == "(" and text[-1] == ")":
        text = text[1:-1].strip()
    if not _WORDS.fullmatch(text):
        return None
    capital = len(text) > 1 and (text.isupper() or (len(text) > 2 and text[0].isupper() and text[1:].islower()))
    sure = len(text) > 1 and (wrapped or capital or text.lower() in _PLAIN_WORDS or " " in text)
    return (text if len(text) == 1 else " ".join(text.casefold().split())), sure


def _compare_words(gold: str, answer: str) -> bool | None:
    gold_words, answer_words = _plain_words(gold), _plain_words(answer)
    if not gold_words or not answer_words:
        return None
    if len(gold) > 1 and gold.isupper() and gold.lower() not in _PLAIN_WORDS and r"\text" not in answer:
        return gold == answer  # names of points, as in ABC: their case counts
    if gold_words[1]:  # words are not products of letters, so "on" is not "no"
        return gold_words[0] == answer_words[0]
    return True if gold_words[0] == answer_words[0] and len(gold_words[0]) not in (2, 3) else None


def _compare_choices(gold: str, answer: str) -> bool | None:
    """Of several letters to choose, as in "A, C" and "\\text{(C) and (A)}"."""
    found = [re.sub(r"\\text\s*(?=\{)|[{}()\s]|\\", "", text.replace(" and ", ",")) for text in (gold, answer)]
    if all(_CHOICES.fullmatch(text) for text in found):
        return set(found[0].split(",")) == set(found[1].split(","))
    return None


def _compare_ratios(gold: str, answer: str) -> bool | None:
    """Of 3:2 and 6:4. Times of day must be the same time."""
    ratios = [re.sub(r"\s", "", text) if _RATIO.fullmatch(text) else "" for text in (gold, answer)]
    if not any(ratios):
        return None
    if not all(ratios):
        other = ratios[0] or ratios[1]
        return None if other.count(":") == 1 and Fraction(other.split(":")[1]) else False
    if _CLOCK.fullmatch(ratios[0]):
        return ratios[0].lstrip("0") == ratios[1].lstrip("0")
    left, right = ([Fraction(part) for part in ratio.split(":")] for ratio in ratios)
    if len(left) != len(right) or not all(left) or not all(right):
        return left == right
    return len({a / b for a, b in zip(left, right, strict=True)}) == 1


def _compare_bases(gold: str, answer: str) -> bool | None:
    """Of 1011_2, whose base may be left out, and of 11, which is right as 1011_2 but not as 11_2."""
    left, right = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    bases = [match and _base(match[2] or match[3]) for match in (left, right)]
    if left and bases[0]:
        if right:
            return left[1].lower() == right[1].lower() and bases[0] == bases[1]
        return left[1].lower() == answer.lower() if answer.isalnum() else False
    if right and bases[1] and (gold.isdigit() and gold.isascii()):
        try:
            return int(right[1], bases[1]) == int(gold)
        except ValueError:  # a digit that the base does not have
            return False
    return None


def _base(text: str) -> int | None:
    """2 to 36 of "2" or "two"; None for another subscript."""
    base = _BASES.get(text, int(text) if text.isdigit() and text.isascii() and len(text) < 3 else 0)
    return base if 2 <= base <= 36 else None


def _bracket(text: str) -> str:
    """The bracket that opens the text, if it closes at the end and holds a comma."""
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]")):
        if text.startswith(opening) and text.endswith(closing) and "," in text and text.count(opening) == 1:
            return opening[-1]
    return ""
