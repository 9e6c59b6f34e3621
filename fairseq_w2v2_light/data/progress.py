"""Progress of long work on stderr: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Iterable, Iterator, Optional, TypeVar

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


def progress(items: Iterable[Item], label: str, total: Optional[int] = None) -> Iterator[Item]:
    """Yields `items`; tells stderr how many have passed, and of how many when `total` is given."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            yield from tqdm(items, desc=label, total=total, leave=False)
            return
    reported = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - reported >= SECONDS_BETWEEN_LINES:
            reported = time.monotonic()
            print(f"{label}: {count}" + (f" of {total}" if total else ""), file=sys.stderr, flush=True)
