"""The table of benchmarks whose figures have limits."""


def show(rows, limits) -> int:
    """Prints (name, text, limit's name, value) rows; returns 1 when a value is above its limit."""
    print("| what | measured | limit |\n|---|---|---|")
    missed = []
    for name, text, key, value in rows:
        limit = limits.get(key)
        print(f"| {name} | {text} | {'' if limit is None else f'{limit:g}'} |")
        if limit is not None and value > limit:
            missed.append(name)
    if limits:
        print(f"\nlimits: {f'missed by {missed}' if missed else 'met'}")
    return 1 if missed else 0
