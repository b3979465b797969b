"""Strict JSON, and times as clients write them. Nothing in here knows what a job is."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from contextlib import suppress
from datetime import datetime
from typing import Any

import msgspec

MAX_DEPTH = 100  # levels of arrays and objects in a payload: few enough for every JSON parser


def _plain(value: Any) -> Any:
    """Encode a subclass of str, int or float, such as libraries return, as its base class."""
    for base in (str, int, float):
        if isinstance(value, base):
            return base.__str__(value) if base is str else base(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


encode = msgspec.json.Encoder(enc_hook=_plain).encode


def to_json(value: Any) -> bytes:
    """Encode a payload or a result. Dates, sets, bytes and dataclasses are encoded as by msgspec.

    Raises ValueError for what JSON cannot hold, and for more than MAX_DEPTH levels.
    """
    try:
        encoded = encode(value)
        decoded = msgspec.json.decode(encoded)  # msgspec does not check what is in a msgspec.Raw
        if b"null" in encoded:  # msgspec turns NaN into null; json.dumps is slow, but refuses NaN
            json.dumps(msgspec.to_builtins(value, str_keys=True), allow_nan=False)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.DecodeError) as error:
        raise ValueError(f"is not JSON: {error_text(error) or type(error).__name__}"[:300]) from None
    if encoded.count(b"[") + encoded.count(b"{") > MAX_DEPTH and _depth(decoded) > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
    return encoded


def from_json(text: bytes, levels: int = MAX_DEPTH) -> Any:
    """Decode what a client sent, strictly. Raises ValueError with the reason.

    Refuses encodings other than UTF-8, NaN, numbers too large for a float, duplicate names in an
    object (parsers differ in which value they keep), and more than `levels` levels of nesting.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
        if text.count(b"[") + text.count(b"{") > levels and _depth(value) > levels:
            raise RecursionError
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {levels} levels") from None
    return value


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(members)
    if len(made) < len(members):
        twice = next(name for name, count in Counter(name for name, _ in members).items() if count > 1)
        raise ValueError(f"duplicate name {ascii(twice)[:100]} in one object")
    return made


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"JSON cannot hold the number {text[:100]}")
    return number


def whole_floats(value: Any) -> Any:
    """Replace 1.0 by 1 throughout. JSON Schema takes both for integers, msgspec only the second."""
    if isinstance(value, dict):
        return {name: whole_floats(part) for name, part in value.items()}
    if isinstance(value, list):
        return [whole_floats(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _depth(value: Any) -> int:
    depth = 0
    level = [value]
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return depth


def error_text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as second:  # the exception's own __str__ may be broken
        return f"(its text raised {type_name(second)})"


def type_name(error: BaseException) -> str:
    name = type.__dict__["__name__"].__get__(type(error))  # a metaclass may have a __name__ that raises
    return str.__str__(name)


# Times ----------------------------------------------------------------------------------------------------------------

# ISO 8601 with a zone, as languages write it by default: RFC 3339; basic format; hours and minutes
# only; fractions of any length; a blank before the zone (Ruby), its name after it (Java, Go).
TIME = re.compile(
    r"(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{8})[Tt ]"
    r"(?P<time>[0-9]{2}(?::?[0-9]{2}(?::?[0-9]{2}(?:[.,](?P<fraction>[0-9]{1,30}))?)?)?) ?"
    r"(?P<zone>[Zz]|UTC|GMT|[+-][0-9]{2}(?::?[0-9]{2}(?::?[0-9]{2})?)?)"
    r"(?:\[[!-Z^-~]{1,100}\]){0,3}(?: (?:[A-Z]{1,5}|[+-][0-9]{2,4}))?(?: m=[+-][0-9.]{1,30})?"
)


def parse_time(text: str) -> datetime | None:
    """Read a time in the part of ISO 8601 that all supported Pythons read alike."""
    if not (match := TIME.fullmatch(text)):
        return None
    digits = match["time"].partition(".")[0].partition(",")[0].replace(":", "").ljust(6, "0")
    fraction = (match["fraction"] or "").ljust(6, "0")[:6]
    zone = match["zone"].replace(":", "") if match["zone"][0] in "+-" else "+00"
    with suppress(ValueError):
        return datetime.fromisoformat(f"{match['day'].replace('-', '')}T{digits}.{fraction}{zone}")
    return None
