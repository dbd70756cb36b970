"""Surrogates of personal data: the same one for the same person as long as the key stays, and of a form that nobody's can have.

An address is of example.org and a number of a range that is reserved for examples, so a surrogate is known as one when it is met again.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from jaxtune.types import UserError

_KEY_BYTES = 32
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"

_FORMS = (  # of surrogates, wherever they stand in a text
    r"(?<![\w.@+-])person_[0-9a-f]{10}@example\.org(?![\w@-])"
    r"|(?<![\w.@/])https://site-[0-9a-f]{10}\.example\.org(?![\w@-])"
    r"|(?<![\w.-])(?:\+1-[2-9]\d\d-555-01\d\d|9999 \d{4} \d{4} \d{4}|ZZ\d{20}|000-\d\d-\d{4})(?![\w-])"
    r"|(?<![\w.:])(?:24\d|25[0-4])(?:\.\d{1,3}){3}(?![\w.])"
    r"|(?<![\w.:])2001:db8(?::[0-9a-f]{4}){6}(?![\w:])"
)


LONGEST = 64  # characters of a mask or surrogate, and one on either side of it


def known(kinds: Iterable[str]) -> re.Pattern[str]:
    """Returns what matches masks of these kinds, and surrogates: nobody's data, to be left as they are."""
    masks = "|".join(sorted(re.escape(kind.upper()) for kind in kinds))
    return re.compile(rf"\[(?:{masks})(?::[0-9a-f]{{10}})?\]|{_FORMS}")


def surrogate(kind: str, text: str, identity: str, key: bytes) -> str:
    """Returns what stands for `text` of this kind: by HMAC-SHA-256 (RFC 2104) of who it is, `identity`, under the key."""
    digest = hmac.new(key, identity.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
    number, short = int.from_bytes(digest, "big"), digest.hex()[:10]
    make = _MAKERS.get(kind)
    return make(text, number, short) if make else f"[{kind.upper()}:{short}]"


def key(file: str, variable: str) -> bytes:
    """Returns the key: of the environment variable where it is set, else of the file, which is made if absent.

    Raises:
      UserError: neither is given, the key is too short, or others than its owner may read the file.
    """
    value = os.environ.get(variable, "").strip() if variable else ""  # as of the file, whose line may end
    if value:
        return _long_enough(value.encode(), f"the environment variable {variable} (privacy.key_variable)")
    if not file:
        raise UserError(
            f"surrogates need a key: set privacy.key_file to a file (it is made if absent; keep it out of version control), or put a key in "
            f"the environment variable {variable or 'that privacy.key_variable names'}"
        )
    path = Path(file).expanduser()
    if not path.exists():
        _make(path)
    rights = stat.S_IMODE(path.stat().st_mode)
    if rights & 0o077:
        raise UserError(
            f"privacy.key_file {str(path)!r} may be read by others (rights {rights:04o}); make it yours alone: chmod 600 {path}"
        )
    return _long_enough(path.read_bytes().strip(), f"privacy.key_file {str(path)!r}")


def _make(path: Path) -> None:
    """A new key, readable by its owner alone from the first byte on; another process's, where that one was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(_KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, path)  # unlike a rename, it replaces no file
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _long_enough(found: bytes, what: str) -> bytes:
    if len(found) < _KEY_BYTES:
        raise UserError(f"{what} holds {len(found)} characters; expected a key of at least {_KEY_BYTES}")
    return found


def _email(text: str, number: int, short: str) -> str:
    return f"person_{short}@example.org"


def _url(text: str, number: int, short: str) -> str:
    return f"https://site-{short}.example.org"


def _phone(text: str, number: int, short: str) -> str:
    """555-0100 to 555-0199 are kept for fiction in every area of North America."""
    area = 200 + number % 800
    area += area % 100 == 11  # 411, 911 and the like are no areas
    return f"+1-{area}-555-01{number // 800 % 100:02d}"


def _card(text: str, number: int, short: str) -> str:
    """A number of 16 digits with its check digit; no issuer's begins with 9999: of a country, which 999 is not (ISO/IEC 7812)."""
    digits = f"9999{number % 10**11:011d}"
    doubled = [int(d) * (1 + (place % 2 == 0)) for place, d in enumerate(reversed(digits))]
    check = -sum(d - 9 * (d > 9) for d in doubled) % 10
    digits += str(check)
    return " ".join(digits[at : at + 4] for at in range(0, 16, 4))


def _iban(text: str, number: int, short: str) -> str:
    """Of ZZ, which ISO 3166 gives to no country, with its check digits (ISO 13616)."""
    account = f"{number % 10**18:018d}"
    return f"ZZ{98 - int(account + '353500') % 97:02d}{account}"


def _ssn(text: str, number: int, short: str) -> str:
    """No number of the area 000 was ever given out."""
    return f"000-{1 + number % 99:02d}-{1 + number // 99 % 9999:04d}"


def _ip(text: str, number: int, short: str) -> str:
    """Of 240.0.0.0/4, reserved (RFC 1112), or 2001:db8::/32, for documentation (RFC 3849)."""
    if ":" in text:
        return "2001:db8:" + ":".join(f"{number >> 16 * part & 0xFFFF:04x}" for part in range(6))
    return ".".join(str(part) for part in (240 + number % 15, *(number >> 8 * shift & 255 for shift in (1, 2, 3))))


def _name(text: str, number: int, short: str) -> str:
    """Two words of three syllables, as many as the digest has room for: about 10^11 of them."""
    words = []
    for _ in range(2):
        syllables = []
        for _ in range(3):
            number, which = divmod(number, len(_CONSONANTS) * len(_VOWELS))
            syllables.append(_CONSONANTS[which // len(_VOWELS)] + _VOWELS[which % len(_VOWELS)])
        words.append("".join(syllables).capitalize())
    return " ".join(words)


_MAKERS: dict[str, Callable[[str, int, str], str]] = {
    "email": _email, "url": _url, "phone": _phone, "credit_card": _card, "iban": _iban, "us_ssn": _ssn, "ip": _ip, "name": _name,
}  # fmt: skip
