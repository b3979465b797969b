"""Strict JSON, JSON read as a type, and times as clients write them. It knows nothing of jobs."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
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


def _depth(value: Any) -> int:
    depth = 0
    level = [value]
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return depth


class Preview(str):
    """The beginning of the JSON of a payload or a result that a listing cuts."""

    __slots__ = ()

    @classmethod
    def of(cls, value: msgspec.Raw | bytes, size: int) -> Preview | msgspec.Raw:
        """Copy what is shown, because a Raw keeps the whole record in memory."""
        text = memoryview(value)
        if len(text) > size:
            return cls(str(text[:size], "utf-8", "ignore"))
        str(text, "utf-8")  # raises UnicodeDecodeError: nothing else has read it
        return msgspec.Raw(bytes(text))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def error_text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as second:  # the exception's own __str__ may be broken
        return f"(its text raised {type_name(second)})"


def describe(error: BaseException, traceback: str) -> tuple[str, str, str]:
    """Return the type, the text and the end of the traceback of an exception, each shortened.

    Escapes what JSON cannot hold, such as lone surrogates.
    """
    message, trace = (str.encode(text, "utf-8", "backslashreplace").decode() for text in (error_text(error), traceback))
    return type_name(error)[:100], message[:1000], trace[-4000:]


def type_name(error: BaseException) -> str:
    name = type.__dict__["__name__"].__get__(type(error))  # a metaclass may have a __name__ that raises
    return str.__str__(name)


# JSON of a type -------------------------------------------------------------------------------------------------------


class Mismatch(ValueError):
    """A text is not JSON of the type. `rule` says what the value at `path` must be."""

    def __init__(self, rule: str, path: str = "") -> None:
        super().__init__(rule)
        self.rule = rule
        self.path = path


def parser(type: Any) -> Callable[[bytes], Any]:
    """Return a function that decodes JSON as a type. It raises Mismatch."""
    decode = msgspec.json.Decoder(type).decode

    def parse(text: bytes) -> Any:
        try:
            return decode(text)
        except msgspec.ValidationError as error:
            with suppress(msgspec.ValidationError):
                return decode(encode(_whole_floats(msgspec.json.decode(text))))
            rule, _, path = str(error).partition(" - at ")
            is_key = path.startswith("`key` in ")
            path = path.removeprefix("`key` in ").strip("`") or "$"
            if " matching regex " in rule:
                rule = _description(type, path, is_key) or rule
            raise Mismatch(f"wrong key: {rule}" if is_key else rule, path) from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise Mismatch(str(error)) from None

    return parse


def _description(type: Any, path: str, of_keys: bool) -> str:
    """Return the description that a type gives for the part at a path or its keys, or nothing."""
    (root,), parts = msgspec.json.schema_components([type])
    schemas = _alternatives(root, parts)
    for name, index in re.findall(r"\.([^.[]+)|\[([^]]*)\]", path):
        found: list[Any] = []
        for schema in schemas:
            items = schema.get("prefixItems", ())
            if name:
                found.append(schema.get("properties", {}).get(name))
            elif index.isdigit() and int(index) < len(items):
                found.append(items[int(index)])
            else:
                found += [schema.get("items"), schema.get("additionalProperties")]
        schemas = [part for schema in found if isinstance(schema, dict) for part in _alternatives(schema, parts)]
    if of_keys:
        schemas = [schema.get("propertyNames", {}) for schema in schemas]
    return next((str(schema["description"]) for schema in schemas if "description" in schema), "")


def _alternatives(schema: dict[str, Any], parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a schema with its reference resolved, or the alternatives that it consists of."""
    if "$ref" in schema:
        return _alternatives(parts[schema["$ref"].rpartition("/")[2]], parts)
    return [schema, *(one for part in schema.get("anyOf", ()) for one in _alternatives(part, parts))]


def _whole_floats(value: Any) -> Any:
    """Replace 1.0 by 1 throughout. JSON Schema takes both for integers, msgspec only the second."""
    if isinstance(value, dict):
        return {name: _whole_floats(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_whole_floats(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Times and ids --------------------------------------------------------------------------------------------------------

# ISO 8601 with a zone, as languages write it by default: RFC 3339; basic format; hours and minutes
# only; fractions of any length; a blank before the zone (Ruby), its name after it (Java, Go).
TIME = re.compile(
    r"(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{8})[Tt ]"
    r"(?P<time>[0-9]{2}(?::?[0-9]{2}(?::?[0-9]{2}(?:[.,](?P<fraction>[0-9]{1,30}))?)?)?) ?"
    r"(?P<zone>[Zz]|UTC|GMT|[+-][0-9]{2}(?::?[0-9]{2}(?::?[0-9]{2})?)?)"
    r"(?:\[[!-Z^-~]{1,100}\]){0,3}(?: (?:[A-Z]{1,5}|[+-][0-9]{2,4}))?(?: m=[+-][0-9.]{1,30})?"
)


def parse_time(text: str) -> datetime | None:
    """Read a time in the part of ISO 8601 that all supported Pythons read alike.

    A leap second, 23:59:60 in UTC, is the second after it: milliseconds since 1970 have none.
    """
    if not (match := TIME.fullmatch(text)):
        return None
    digits = match["time"].partition(".")[0].partition(",")[0].replace(":", "").ljust(6, "0")
    fraction = (match["fraction"] or "").ljust(6, "0")[:6]
    zone = match["zone"].replace(":", "") if match["zone"][0] in "+-" else "+00"
    leap = digits.endswith("60")
    seconds = "59" if leap else digits[4:]
    with suppress(ValueError, OverflowError):
        time = datetime.fromisoformat(f"{match['day'].replace('-', '')}T{digits[:4]}{seconds}.{fraction}{zone}")
        if not leap:
            return time
        if time.astimezone(UTC).strftime("%H%M%S") == "235959":
            return time + timedelta(seconds=1)
    return None


def epoch_ms(value: Any) -> int | None:
    """Read milliseconds since 1970 from such a number, a datetime, or ISO 8601 with a zone."""
    if isinstance(value, str):
        value = parse_time(value)
    if isinstance(value, datetime) and value.tzinfo:
        value = (value - datetime.fromtimestamp(0, UTC)) // timedelta(milliseconds=1)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def created_at(id: str) -> int:
    """When an id was made: a UUIDv7 (RFC 9562) begins with milliseconds."""
    return int(id[:8] + id[9:13], 16)


_order = itertools.count()


def new_id(now: int) -> str:
    """Make a UUIDv7 from Redis time in ms. A counter keeps the ids of one millisecond in order."""
    noise = int.from_bytes(os.urandom(8), "big")
    number = now << 80 | 7 << 76 | (next(_order) & 0xFFF) << 64 | 2 << 62 | noise & 0x3FFFFFFFFFFFFFFF
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
