"""The OpenAPI document of the API, with a schema for the payload of each job type.

Client generators read it, so names are legal identifiers and patterns are regular expressions of
ECMA-262, which JSON Schema prescribes.
"""

from __future__ import annotations

import re
import unicodedata
from contextlib import suppress
from typing import Any

import msgspec

from tinyqueue import HANDLERS, __version__

REF = "#/components/schemas/"
# Keywords whose values hold schemas by name, and keywords whose values are data.
NAMED = {"properties", "patternProperties", "dependentSchemas", "$defs"}
DATA = {"default", "const", "enum", "example", "examples"}


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """Complete the document with this version and with the job types that have a handler."""
    schemas = document["components"]["schemas"]
    document["info"]["version"] = __version__
    general = schemas["Job"]
    optional = {name: schema for name, schema in general["properties"].items() if name not in ("type", "ref")}
    schemas["Replay"] = {key: value for key, value in general.items() if key != "required"} | {"properties": optional}
    jobs = []
    for type, handler in HANDLERS.items():
        payload = _describe_payload(type, handler.payload_type, schemas)
        description = (handler.__doc__ or type).partition("\n")[0]
        own = {"type": {"type": "string", "enum": [type], "description": description}, "payload": payload}
        name = _unused(_pascal(type) + "Job", schemas)
        schemas[name] = general | {"properties": general["properties"] | own}
        jobs.append({"$ref": REF + name})
    if jobs:
        schemas["Job"] = {"oneOf": jobs}
    return document


def _describe_payload(type: str, payload_type: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a payload. Adds the schemas that it refers to."""
    root: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    with suppress(TypeError):  # msgspec has no schema for some types, such as object
        (root,), parts = msgspec.json.schema_components([payload_type], ref_template="{name}")
    names: dict[str, str] = {}
    for part in parts:
        own = "Payload" if root.get("$ref") == part else _pascal(part)
        names[part] = _unused(_pascal(type) + own, schemas)
        schemas[names[part]] = {}
    for part, schema in parts.items():
        # Some generators name a class by its title, which need not be unique.
        schemas[names[part]] = _portable({k: v for k, v in schema.items() if k != "title"}, names)
    payload: dict[str, Any] = _portable(root, names)
    return payload


def _pascal(name: str) -> str:
    """Make an identifier: send-email becomes SendEmail."""
    words = re.findall("[A-Za-z0-9]+", name)
    text = "".join(word[0].upper() + word[1:] for word in words)
    return text if text[:1].isalpha() else "Type" + text


def _unused(name: str, schemas: dict[str, Any]) -> str:
    """Add a number to a name that is taken. Some generators ignore case."""
    taken = {other.lower() for other in schemas}
    candidates = (name, *(f"{name}{number}" for number in range(2, len(taken) + 3)))
    return next(candidate for candidate in candidates if candidate.lower() not in taken)


def _portable(schema: Any, names: dict[str, str]) -> Any:
    """Copy a schema with references to the new names, and with patterns of ECMA-262."""
    if isinstance(schema, list):
        return [_portable(part, names) for part in schema]
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key in DATA:
            copy[key] = value
        elif key in NAMED and isinstance(value, dict):
            copy[key] = {name: _portable(part, names) for name, part in value.items()}
        elif key == "$ref":
            copy[key] = REF + names[value]
        elif key == "discriminator":
            copy[key] = value | {"mapping": {tag: REF + names[part] for tag, part in value["mapping"].items()}}
        elif key == "pattern":
            # The server checks every payload itself, so an untranslatable pattern can be left out.
            with suppress(ValueError):
                copy[key] = ecma_pattern(value)
        else:
            copy[key] = _portable(value, names)
    return copy


# Patterns -------------------------------------------------------------------------------------------------------------

ESCAPED = r"""
      \\ (?: x[0-9a-fA-F]{2} | u[0-9a-fA-F]{4} | U[0-9a-fA-F]{8} | N\{[^}]*\} )
    | \\ (?: 0[0-7]{0,2} | [1-3][0-7]{2} | [1-9][0-9]? | . )
"""
TOKEN = re.compile(
    ESCAPED
    + r"""
    | \[ \^? \]? (?: \\. | [^]\\] )* \]
    | \(\? (?: P<\w+> | P=\w+\) | \#[^)]*\) | <[=!] | . )
    | [*+?]\+
    | \{ (?: [0-9]+ (?: ,[0-9]* )? | ,[0-9]* ) \} \+?
    | .
    """,
    re.VERBOSE | re.DOTALL,
)
TOKEN_OF_CLASS = re.compile(ESCAPED + "| .", re.VERBOSE | re.DOTALL)
CONTROLS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
ANCHORS = {"A": "^", "Z": "$", "z": "$", "b": r"\b", "B": r"\B"}
CLASSES = {"d", "D", "s", "S", "w", "W"}
ASCII_ONLY = "(?a)"
# Python's \w and \W cover all languages, those of ECMA-262 only ASCII.
WORD = r"\w\u0080-\uffff"
NO_WORD = r"\u0000-/:-@\[-\^`{-\u007f"


def ecma_pattern(pattern: str) -> str:
    r"""Translate a regular expression of Python to ECMA-262, valid with and without its flag `u`.

    The result accepts what the pattern accepts, with one exception: \d matches only ASCII digits.
    Because ECMA-262 has no \w for all languages, \w matches every character beyond ASCII. Raises
    ValueError if there is no translation, such as for inline flags.
    """
    ascii_only = pattern.startswith(ASCII_ONLY)
    return "".join(_token(match[0], ascii_only) for match in TOKEN.finditer(pattern.removeprefix(ASCII_ONLY)))


def _token(token: str, ascii_only: bool) -> str:
    if token[0] == "[":
        return _class(token, ascii_only)
    if token == ".":
        return r"[^\n]"
    if token in "{}]/":
        return "\\" + token
    if token[0] == "\\":
        return _escape(token[1:], ascii_only)
    if token[:2] == "(?":
        return _group(token)
    if len(token) > 1 and token[-1] == "+":
        raise ValueError("possessive quantifier")
    return token.replace("{,", "{0,") if token[0] == "{" else _character(token, "")


def _escape(name: str, ascii_only: bool) -> str:
    if name in ANCHORS:
        return ANCHORS[name]
    if name == "w":
        return r"\w" if ascii_only else f"[{WORD}]"
    if name in CLASSES or re.fullmatch("[1-9][0-9]?", name):  # a class, or a reference to a group
        return "\\" + name
    return _character(_named(name), "^$.*+?()[]{}|/\\")


def _group(token: str) -> str:
    if token.startswith("(?#"):
        return ""
    if token.startswith("(?P="):
        return rf"\k<{token[4:-1]}>"
    if token.startswith("(?P<"):
        return "(?" + token[3:]
    if token not in ("(?:", "(?=", "(?!", "(?<=", "(?<!"):
        raise ValueError(f"no translation for {token}")
    return token


def _class(token: str, ascii_only: bool) -> str:
    """Translate a character class."""
    start = "[^" if token.startswith("[^") else "["
    parts = [start]
    for match in TOKEN_OF_CLASS.finditer(token.removeprefix(start)[:-1]):
        part = match[0]
        if part == r"\w" and start == "[":
            parts.append(r"\w" if ascii_only else WORD)
        elif part == r"\W" and start == "[^":
            parts.append(r"\W" if ascii_only else NO_WORD)
        elif part == "-" or part[1:] in CLASSES:
            parts.append(part)
        else:
            parts.append(_character(_named(part[1:]) if part[0] == "\\" else part, "[]^-\\"))
    return "".join(parts) + "]"


def _named(name: str) -> str:
    """Return the character that an escape stands for, without its backslash."""
    if name[0] == "N":
        return unicodedata.lookup(name[2:-1])
    if name[0] in "xuU" and len(name) > 1:
        return chr(int(name[1:], 16))
    if name[0].isdigit():
        return chr(int(name, 8))
    return CONTROLS.get(name, name)


def _character(char: str, special: str) -> str:
    """Spell a character. Beyond ASCII it is escaped, and so readable in every generated client."""
    if char in special:
        return "\\" + char
    if char.isascii() and char.isprintable():
        return char
    if ord(char) > 0xFFFF:
        raise ValueError("without the flag u, this character counts as two")
    return f"\\u{ord(char):04x}"
