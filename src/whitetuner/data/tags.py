"""Captions of tags between commas, in other orders: a function of the caption alone, so that runs find them in the cache."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections import Counter

#: A tag: anything but commas, of which those in quotes are none. An apostrophe inside of a word opens no quotes.
_TAG = re.compile(r"""(?:"[^"]*"|“[^”]*”|‘[^’]*’|「[^」]*」|『[^』]*』|(?<!\w)'[^']*'(?!\w)|[^,，])+""")


def tags(caption: str) -> list[str]:
    """What stands between commas (Chinese ones too), without outer blanks; empty tags left out."""
    return [tag for tag in (found.strip() for found in _TAG.findall(caption)) if tag]


def orders_of(caption: str, count: int, keep: int) -> tuple[str, ...]:
    """At most so many different orders of the caption's tags, the written one not among them; fewer where there are fewer.

    keep: tags at the beginning that stay there
    """
    if count <= 0:
        return ()
    found = tags(caption)
    first, free = found[:keep], found[keep:]
    possible = math.factorial(len(free))
    for times in Counter(free).values():
        possible //= math.factorial(times)
    comma = "，" if "，" in caption and "," not in caption else ", "
    orders: dict[tuple[str, ...], None] = {}
    number = 0
    while len(orders) < min(count, possible - 1):
        order = _shuffled(free, f"{number}\0{caption}")
        if order != free:
            orders[tuple(order)] = None
        number += 1
    # Quotes that are left open can make two orders read alike.
    texts = dict.fromkeys(comma.join([*first, *order]) for order in orders)
    return tuple(text for text in texts if text != comma.join(found))


def _shuffled(values: list[str], key: str) -> list[str]:
    """By Python's `random.Random(int).random()` alone, whose numbers do not change between versions."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    source = random.Random(int.from_bytes(digest, "little"))
    places = [source.random() for _ in values]
    return [values[place] for place in sorted(range(len(values)), key=places.__getitem__)]
