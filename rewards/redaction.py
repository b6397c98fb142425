"""Secrets in settings: found by name and form, refused in a spec, and never written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SECRET = re.compile(  # the end of a secret's name; not "max_tokens", "token_env" or "monkey"
    r"(^|_)(token|passw(or)?d|pwd|passphrase|secrets?|authorization|auth|bearer|credentials?|cookie"
    r"|(api|access|auth|private|secret|account)_?(key|token)s?|passwords)$"
)
_KEY = re.compile(r"(^|_)keys?$")
_NAME = re.compile(r"[a-z_]*")  # looks like a mapping's key, such as "caption", not like a secret
_IN_TEXT = re.compile(  # a URL's user:password@, secrets in its query, tokens with a known prefix
    r"(?<=://)[^/\s@]+(?=@)"
    r"|(?<=[?&])((?:[a-z]+[-_])?(?:key|token|password|secret|signature)=)[^&\s#]+"
    r"|\b(?:hf_|sk-|gh[po]_)[\w-]{20,}",
    re.IGNORECASE,
)


def redact(value: Any) -> Any:
    """A copy of nested mappings, lists and scalars with *** in place of every secret: a value whose
    key names a secret (token, api_key, password ...), a URL's user and password, a token in its
    query, and any text with the prefix of a hub's or a service's tokens."""
    if isinstance(value, Mapping):
        return {k: HIDDEN if _is_secret(str(k), v) else redact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(redact, value)) if type(value) in (list, tuple) else value
    if isinstance(value, str):
        return _IN_TEXT.sub(lambda match: (match[1] or "") + HIDDEN, value)
    return value


def refuse_secrets(options: Mapping[str, Any], prefix: str = "") -> None:
    """Raise ValueError for an option that holds a secret, which a run would write to its files;
    the message names the option and does not show the value."""
    for key, value in options.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and not _is_secret(str(key), value):
            refuse_secrets(value, f"{name}.")
        elif redact({key: value}) != {key: value} or value == HIDDEN:
            raise ValueError(
                f"{name} looks like a secret, and a run writes its settings to files; put it in an "
                f"environment variable and give the variable's name, as in token_env: MY_TOKEN (a "
                "reward of your own reads os.environ; rename an option that is no secret)"
            )


def _is_secret(key: str, value: Any) -> bool:
    if value is None or isinstance(value, (bool, float)) or value in ("", HIDDEN, [], {}):
        return False
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|\W", "_", key).lower()
    if _SECRET.search(words):
        return True
    return bool(_KEY.search(words)) and isinstance(value, str) and not _NAME.fullmatch(value)
