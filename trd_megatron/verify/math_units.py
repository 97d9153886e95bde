r"""Units and currencies at the end (or front) of a math answer: "12\text{ cm}", "90^\circ", "\$5".

Only units of the table are told apart; every other word beside a number ("12 apples", "5\text{ ways}") is dropped unread.
"""

import re

_SPELLINGS = {
    "m": "meter meters metre metres",
    "cm": "centimeter centimeters centimetre centimetres",
    "mm": "millimeter millimeters millimetre millimetres",
    "km": "kilometer kilometers kilometre kilometres kms",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards yds",
    "mi": "mile miles",
    "g": "gram grams gm",
    "mg": "milligram milligrams",
    "kg": "kilogram kilograms kgs",
    "lb": "lbs pound pounds",
    "oz": "ounce ounces",
    "s": "sec secs second seconds",
    "ms": "millisecond milliseconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "l": "L liter liters litre litres",
    "ml": "mL milliliter milliliters",
    "mph": "",
    "km/h": "kmh kph kmph",
    "m/s": "",
    "degree": "degrees deg \\circ ° \\degree",
    "rad": "radian radians",
    "dollar": "dollars USD \\$ $",
    "cent": "cents",
    "euro": "euros EUR €",
    "pound sterling": "GBP £",
    "yen": "JPY ¥",
    "rupee": "rupees Rs ₹",
}
UNITS = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in (unit, *spellings.split())}
POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# Words that say something about the number itself: what they stand beside is no plain "number and its unit".
_NO_UNIT = re.compile(
    r"\b(?:or|and|to|not|no|less|more|least|most|over|under|above|below|up|down|between|if|for|when|where|but|times|half|halves|thirds?"
    r"|fourths?|fifths?|quarters?|tenths?|hundredths?|squared|cubed|factorial|percent|pct|minus|plus|negative|score|base|mod|per)\b",
    re.IGNORECASE,
)
_ORDINALS = ("st", "nd", "rd", "th")
_TEXT_END = re.compile(r"\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*([1-9])\s*\}?)?$")
_DEGREE_END = re.compile(r"\s*(?:\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree)$")
_WORD_END = re.compile(r"(?<=[\d})\s])\s*(?<![\\a-zA-Z])([a-zA-Z][a-zA-Z/. ]*[a-zA-Z]|(?<=\s)[a-zA-Z])\s*(?:\^\s*\{?\s*([1-9])\s*\}?)?$")
_CURRENCY_FRONT = re.compile(r"^(-?)\s*(\\\$|[€£¥₹])\s*(?=[-+.\d])")
_CURRENCY_END = re.compile(r"(?<=\d)\s*(\\\$|[€£¥₹])$")
_NUMBER_LIKE = re.compile(r"[\d})!]\s*$")


def _known(words: str, power: str | None) -> str | None:
    """The unit's name in the table, with its power; None if it is not there."""
    parts = words.strip().rstrip(".").split()
    power = f"^{power}" if power else ""
    if len(parts) == 2 and parts[0].lower() in POWERS and not power:
        power, parts = POWERS[parts[0].lower()], parts[1:]
    elif len(parts) == 2 and parts[1].lower() in ("squared", "cubed") and not power:
        power, parts = {"squared": "^2", "cubed": "^3"}[parts[1].lower()], parts[:1]
    if len(parts) != 1:
        return None
    word = parts[0]
    unit = UNITS.get(word) or UNITS.get(word.lower() if len(word) > 2 else word)
    return unit and unit + ("" if power == "^1" else power)


def split(text: str) -> tuple[str, str | None]:
    r"""(text without its unit, unit of the table or None) of a normalised answer.

    "5\text{ million}" becomes "5\times 1000000". Text that is nothing but words stays as it is.
    """
    if match := _CURRENCY_FRONT.search(text):
        return match[1] + text[match.end() :], UNITS[match[2]]
    if match := _CURRENCY_END.search(text):
        return text[: match.start()], UNITS[match[1]]
    if match := _DEGREE_END.search(text):
        return text[: match.start()], "degree"
    match = _TEXT_END.search(text) or _WORD_END.search(text)
    if not match:
        return text, None
    before, words = text[: match.start()].rstrip(), match[1]
    if not _NUMBER_LIKE.search(before) and not (match.re is _TEXT_END and before):
        return text, None
    first, _, rest = words.strip().partition(" ")
    if first.lower() in MULTIPLIERS:
        return rf"{before}\times {MULTIPLIERS[first.lower()]}", _known(rest, match[2])
    unit = _known(words, match[2])
    if unit:
        return before, unit
    if _NO_UNIT.search(words):
        return text, None
    last = words.split()[-1] if words.split() else ""
    dropped = last in _ORDINALS or (len(last) > 2 and not (match.re is _WORD_END and match[2]))  # one or two letters are variables
    return (before if dropped else text), None
