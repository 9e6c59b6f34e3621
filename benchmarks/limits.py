"""What benchmarks say of figures that have limits."""

from typing import Sequence


def verdict(missed: Sequence[str], smoke: bool = False) -> int:
    """Prints which limits were missed, or that all are met; the exit status: 1 where one is missed, but for `smoke`."""
    print(f"\nlimits: {'missed by ' + '; '.join(missed) if missed else 'met'}")
    return 1 if missed and not smoke else 0


def show(rows, limits) -> int:
    """Prints (name, text, limit's name, value) rows; returns 1 when a value is above its limit."""
    print("| what | measured | limit |\n|---|---|---|")
    missed = []
    for name, text, key, value in rows:
        limit = limits.get(key)
        print(f"| {name} | {text} | {'' if limit is None else f'{limit:g}'} |")
        if limit is not None and value > limit:
            missed.append(name)
    return verdict(missed) if limits else 0
