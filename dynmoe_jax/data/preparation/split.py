"""Choice of the documents that are kept, and of those among them that are held out."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dynmoe_jax.data.preparation.spool import Entry


class Sides(NamedTuple):
    """The documents of one domain."""

    train: list[Entry]
    heldout: list[Entry]


def keep_within(entries: Sequence[Entry], cap_bytes: float) -> list[Entry]:
    """An even sample of the documents whose texts sum up to at most ``cap_bytes``.

    The order of the hashes is random with respect to the texts, and the same wherever they are.
    """
    kept, total = [], 0
    for entry in sorted(entries):
        # One that does not fit must not shut out the smaller ones behind it.
        if total + entry.size <= cap_bytes:
            total += entry.size
            kept.append(entry)
    return kept


def hold_out(domains: Mapping[str, Sequence[Entry]], fraction: float) -> dict[str, Sides]:
    """Splits each domain's documents by the hash of their text.

    Equal texts come to the same side, in whatever domains they are.  Each domain with at least
    two different texts gets at least one document on each side (unless it shares its texts with
    a domain that needs them on the other side).
    """
    hashes = {name: sorted({entry.hash for entry in domain}) for name, domain in domains.items()}
    heldout = {h for domain in hashes.values() for h in domain if h < fraction * 2**64}
    for domain in hashes.values():
        if len(domain) >= 2 and domain[0] not in heldout:
            heldout.add(domain[0])
    for domain in hashes.values():
        if domain and heldout.issuperset(domain):
            heldout.discard(domain[-1])
    return {
        name: Sides(
            train=[entry for entry in domain if entry.hash not in heldout],
            heldout=[entry for entry in domain if entry.hash in heldout],
        )
        for name, domain in domains.items()
    }
