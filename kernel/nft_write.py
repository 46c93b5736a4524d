"""Our nftables tables with all that belongs into them, as one transaction: no packet sees them without.

- Where a table of this version is there, only its rules are exchanged, and what its sets lack is added: chains and sets
  stay the same objects, so a packet that is under way sees the old rules or the new ones, and each element that was
  there all the time.
- Where it is of another version, or somebody put something else into it, it goes and comes back in the same
  transaction.
- A transaction is not one moment for sets with intervals: the new rules hold at once, but such a set seems to be empty
  until the kernel has gone through everything else (milliseconds with thousands of elements). Meanwhile nothing that is
  to be forwarded begins: the set `hold` is a hash, and right from the first moment on. Its elements end by themselves,
  should the process die.

Sources: nft(8); net/netfilter/nf_tables_api.c (nf_tables_commit: gencursor, then nft_set_commit_update);
net/netfilter/nft_set_pipapo.c (nft_pipapo_commit).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Sequence

from kernel import libnftables, nft
from kernel.errors import KernelError
from kernel.nft import Chain, Element
from kernel.nft_tables import SETS, TABLE, current, removal, table
from kernel.session import Session

# What nft reads as it is meant, in quotes or without. An asterisk would be a pattern.
_PLAIN = re.compile(r"[A-Za-z0-9_.:/@~+=, -]*", re.ASCII)
_COMMENT_BYTES = 127  # NFTNL_UDATA_COMMENT_MAXLEN, but for the byte that ends it
_HELD_S = 2
_CHAIN = re.compile(r"^\tchain (\w+) \{", re.MULTILINE)


def write(session: Session, families: Iterable[str], elements: Collection[Element], chains: Collection[Chain]) -> int:
    """Write the tables of these families, with these elements, and these chains of attachments.

    What is there beyond that stays, as far as the table does; so does an element of another owner. Of several elements
    with one key the first counts. Left to `nft.converge` is, too, what nft could not read: an element with an odd name
    in it, an owner whose name is odd.

    Returns:
        How many elements were not there.

    Raises:
        KernelError: a chain was refused, or libnftables; then nothing was done.
    """
    wanted = list(families)
    elements = {(one.set, one.key): one for one in reversed(list(elements))}.values()
    kept = {family for family in wanted if _is_whole(session, family)}
    if kept:
        there = {(one.set, one.key) for name, of in SETS.items() if of.family in kept
                 for one in nft.all_elements(session, name)}  # fmt: skip
        missing = [one for one in elements if (one.set, one.key) not in there]
        with contextlib.suppress(KernelError):  # a set or a chain of that name is something else by now
            return _run(wanted, kept, missing, chains)
    return _run(wanted, set(), elements, chains)


def _run(families: Sequence[str], kept: Collection[str], elements: Iterable[Element], chains: Iterable[Chain]) -> int:
    of_set: dict[str, list[str]] = {}
    for element in elements:
        if text := text_of(element):
            of_set.setdefault(element.set, []).append(text)
    held = "inet" in families and any("network" in SETS[name].key for name in of_set)
    commands = []
    for family in families:
        if family in kept:
            commands.append(f"table {family} {TABLE}\nflush table {family} {TABLE}\n")
        else:
            commands.append(f"{removal(family)}add table {family} {TABLE}\n")
        ours = list(chains) if family == "inet" else []
        # Elements lead to them: they come first. Their rules may name sets: these come last.
        commands += [f"add chain {family} {TABLE} {chain.name}\n" for chain in ours]
        commands.append(table(family, of_set, _HELD_S if held else 0))
        commands += [nft.rules(chain) for chain in ours]
    libnftables.run("".join(commands), f"write the tables {TABLE}")
    if held:
        with contextlib.suppress(KernelError):  # the table is gone again, with the set
            libnftables.run(f"flush set inet {TABLE} hold", "let connections begin again")
    return sum(map(len, of_set.values()))


def text_of(element: Element) -> str:
    """An element as nft reads it; "" where it cannot be said in its words."""
    one = SETS[element.set]
    if not all(_PLAIN.fullmatch(word) for word in (*element.key, *element.data)):
        return ""
    text = " . ".join(_word(kind, word) for kind, word in zip(one.key, element.key, strict=True))
    if element.comment and _PLAIN.fullmatch(element.comment) and len(element.comment) <= _COMMENT_BYTES:
        text += f' comment "{element.comment}"'
    if one.data == ("verdict",):
        text += f" : jump {element.data[0]}"
    elif one.data:
        text += " : " + " . ".join(element.data)
    return text


def _word(kind: str, word: str) -> str:
    return f'"{word}"' if kind == "ifname" else word


def _is_whole(session: Session, family: str) -> bool:
    """Whether a table is there, of this version, and without a chain that is not ours."""
    ours = set(_CHAIN.findall(table(family)))
    found = nft.all_chains(session, family)
    return current(session, family) and all(one in ours or one.startswith(nft.CHAIN_PREFIX) for one in found)
