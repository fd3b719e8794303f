"""Removes passwords, keys, tokens and secrets of the environment from values and texts before they are written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_SECRET = re.compile(
    r"key|token|passw|passphrase|pwd|secret|credential|bearer|cookie"
    r"|(?:^|_)(?:pass|pin|auth|authorization|signature|sig)(?:_|$)"
)
_SEVERAL = re.compile(r"(?:api|access|secret|private|auth|hub|hf)_?(?:key|token)s")
_HARMLESS = re.compile(
    r"tokeni[sz]\w*|tokens|token_(?:limit|ind(?:ex|ices)|ids?)|key_?error|keys|keep|keyword|keyboard|key_?(?:frame|point)|monkey|donkey|turkey|hockey"
)
"""Words in which `key` and `token` mean something else: max_text_tokens, tokenizer, keyframes, KeyError."""
_NAMES_A_NUMBER = re.compile(r"key|token")
"""Numbers under such keys are sizes and ids (`eos_token_id`), never secrets."""

_URL_USER = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#'\"<>]*@")
_URL_ODD_PASSWORD = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/:@'\"<>]*:(?!\d{1,5}(?:[/?#]|$))[^\s'\"@<>]*@")
"""Like `_URL_USER`, for passwords that hold a slash."""
_URL_QUERY = re.compile(r"([?&;])([^=&;?\s'\"]+)=([^&;\s'\"<>#]+)")
_ASSIGNED = re.compile(r"([A-Za-z_][\w.@/-]*)(?:['\"]?\s*[:=]\s*)")
_VALUE = re.compile(r"\"[^\"]*\"?|'[^']*'?|\{[^}]*\}?|\[[^\]]*\]?|(?:Bearer|Basic)\s+\S+|[^\s,;}\]&)'\"]+")
_LEAST = 8
"""Shortest secret of the environment that is searched for in texts: shorter strings occur by chance."""


def is_secret(key: Any) -> bool:
    """Whether a key's name says that its value is a credential: api_key, hfToken, but not tokenizer or keys."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key).rpartition(".")[2]).lower().replace("-", "_")
    return bool(_SEVERAL.search(name) or _SECRET.search(_HARMLESS.sub("", name)))


def mask(value: Any, key: Any = "") -> Any:
    """A copy of plain values without credentials: values of secret keys, and credentials inside URLs.

    Args:
        value: dicts, lists and plain values.
        key: name of the value.
    """
    if is_secret(key) and _holds_something(value, key):
        return MASK
    if isinstance(value, Mapping):
        return {name: mask(inner, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask(inner) for inner in value]
    return mask_url(value) if isinstance(value, str) else value


def _holds_something(value: Any, key: Any) -> bool:
    if value is None or isinstance(value, bool) or (isinstance(value, str | list | tuple | Mapping) and not value):
        return False
    if isinstance(value, str) and re.fullmatch(r"\$\{[^{}]*\}", value):
        return False  # a reference to the value, not the value itself
    return not (isinstance(value, int | float) and _NAMES_A_NUMBER.search(str(key).lower()))


def mask_url(text: str) -> str:
    """A text without users, passwords and signatures in its URLs, and without secrets of the environment."""
    if "://" in text:
        text = _URL_USER.sub(rf"\1{MASK}@", text)
        text = _URL_ODD_PASSWORD.sub(rf"\1{MASK}@", text)
        text = _URL_QUERY.sub(lambda m: f"{m[1]}{m[2]}={MASK}" if is_secret(m[2]) else m[0], text)
    for value in secrets_of_environment().values():
        text = text.replace(value, MASK)
    return text


def mask_text(text: str) -> str:
    """A message or a command line without credentials: `mask_url`, and values behind `api_key=` and similar names."""
    text = mask_url(text)
    done = 0
    parts: list[str] = []
    for found in _ASSIGNED.finditer(text):
        value = _VALUE.match(text, found.end())
        prose = found[1] in ("key", "full_key") or (found[1] == "token" and ":" in found[0])
        if found.start() < done or value is None or prose or not is_secret(found[1]) or value[0] in ("null", MASK):
            continue
        parts += [text[done : found.end()], MASK]
        done = value.end()
    return "".join([*parts, text[done:]])


def secrets_of_environment() -> dict[str, str]:
    """Environment variables whose names say that they hold a credential, with their values."""
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= _LEAST and is_secret(name) and not os.path.exists(value) and not value.isdigit()
    }
