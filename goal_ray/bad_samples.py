"""Samples that a stage cannot use: how they are recorded, told on a line, and counted by kind.

A record holds "shard" (its name or address), "key" (empty for damage of the tar), "stage" (what could not be done) and
"reason".
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_REASON = 1000
# What is of one sample in a reason: an address, a quotation or list, a number.
SPECIFIC = (
    (r"\S+\.tar\b", "….tar"),
    (r"""b?'[^']*'|b?"[^"]*"|\[[^\]]*\]""", "…"),
    (r"0x[0-9a-f]+|(?<![-\w])[0-9][\w.,×]*", "N"),
)


def bad_record(shard: str, key: str, stage: str, reason: str) -> dict[str, str]:
    """The record of one sample."""
    return {"shard": shard, "key": key, "stage": stage, "reason": reason}


def describe_bad(record: Mapping[str, Any]) -> str:
    """A record as one line."""
    shard, key, stage, reason = (record[name] for name in ("shard", "key", "stage", "reason"))
    if reason.startswith(shard):  # it tells all itself
        return str(reason)
    return f"{shard}{f': {key!r}' if key else ''} ({stage}): {reason}"


def kind_of(record: Mapping[str, Any]) -> str:
    """Stage and reason of a record without what only this sample has: addresses, quotations, numbers."""
    # A pattern may take the square of the time that a long reason takes.
    reason = record["reason"].replace(record["shard"], "….tar")[:LONGEST_REASON]
    for pattern, instead in SPECIFIC:
        reason = re.sub(pattern, instead, reason)
    return f"{record['stage']}: {reason}"


def most_frequent(records: Sequence[Mapping[str, Any]]) -> str:
    """The problem that most of the records have, by its first example, and how many have it."""
    kinds = [kind_of(record) for record in records]
    ((kind, number),) = Counter(kinds).most_common(1)
    example = describe_bad(records[kinds.index(kind)])
    return f"the most frequent problem ({number} of {len(records)}), for example {example}"
