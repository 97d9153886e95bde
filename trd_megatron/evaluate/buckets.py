"""Problems by how often the base model solves them: what training does to those it never, sometimes or mostly solves."""


def bounds(n: int) -> list[tuple[int, int]]:
    """(fewest, most) passes in n samples of each bucket: none, up to half, more than half (0, 1-8 and 9-16 of 16)."""
    half = n // 2
    return [(low, high) for low, high in ((0, 0), (1, half), (half + 1, n)) if low <= high]


def name(low: int, high: int) -> str:
    """1-8; 0."""
    return str(low) if low == high else f"{low}-{high}"
