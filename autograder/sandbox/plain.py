"""Text and JSON as any program can read them, made of whatever student code has sent or handed in."""

import re

NESTED = 40
"""Levels that lists and dicts of a notebook may be nested in each other; what lies deeper is dropped."""


def whole(text: str) -> str:
    """Return the text with U+FFFD where only half of a surrogate pair stands, which cannot be encoded."""
    if not re.search("[\ud800-\udfff]", text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def bounded(value: object, depth: int = NESTED) -> object:
    """Return a value from JSON with what is nested too deep left out, and all of its text encodable."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, dict):
        return {whole(str(key)): bounded(item, depth - 1) for key, item in value.items()} if depth else None
    if isinstance(value, list | tuple):
        return [bounded(item, depth - 1) for item in value] if depth else None
    return value if value is None or isinstance(value, bool | int | float) else whole(str(value))
