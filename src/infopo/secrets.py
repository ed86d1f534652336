"""Secrets: what is masked in all that a run writes or prints. Tokens, keys and passwords are never part of a record.

Run directories are pushed and shared. Three things are recognised wherever they stand in a text: the values of
secrets that this process knows (environment variables and settings whose names say that they are secret), URLs with
a password or a token in them, and tokens of well-known services by their prefixes.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
"""What stands in place of a secret. A recipe that holds it takes the secret from the environment."""

_SECRET_NAME = re.compile(
    r"(^|_)(token|secret|credentials?)$|(password|passwd|passphrase)$|_(pwd|pass|pat)$|connection_string$"
    r"|(api|access|private|secret)_?key(_id)?$",
    re.IGNORECASE,
)
"""Names of settings and environment variables whose values are secret, e.g. `hub_token`, `WANDB_API_KEY`."""

_HARMLESS = frozenset({"pad_token", "eos_token", "bos_token", "unk_token"})
"""Names that end so and stand for tokens of a vocabulary."""

_LEAST = 8
"""Characters of a value that is looked for everywhere: a shorter one would be found in words."""

_PATTERNS = (
    (re.compile(r"(?<=://)[^/?#\s'\"@]*:[^/?#\s'\"]+(?=@)"), MASK),  # user:password@host, also with @ in it
    (re.compile(r"(?<=://)[^/\s'\"@:]{16,}(?=@)"), MASK),  # token@host
    (
        re.compile(
            r"(?i)([?&;](?:[\w.-]*(?:token|secret|password|passwd|signature|credential)|(?:[\w-]*api|access)[_-]?key|sig"
            r"|auth|pwd|key)=)[^&;#\s'\"]+"
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}\b"), MASK),
    (re.compile(r"(?i)(\bbearer\s+)[\w.~+/-]{16,}=*"), rf"\1{MASK}"),
    (re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,})"), MASK),
    (re.compile(r"\b(?:sk-[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}|xox[abps]-[A-Za-z0-9-]{10,})\b"), MASK),
)

_known: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether the value under this name is secret.

    >>> is_secret("hub_token"), is_secret("WANDB_API_KEY"), is_secret("pad_token"), is_secret("max_tokens")
    (True, True, False, False)
    """
    snake_case = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return name.lower() not in _HARMLESS and bool(_SECRET_NAME.search(snake_case))


def keep_secret(value: object) -> None:
    """Makes a value known as secret, so that `masked` finds it in any text."""
    if isinstance(value, str) and len(value) >= _LEAST and value != MASK:
        _known.add(value)


def masked(text: str) -> str:
    """The text with `***` in place of every secret in it.

    >>> masked("https://me:pass@host/x.jsonl?token=abc&rows=5")
    'https://***@host/x.jsonl?token=***&rows=5'
    """
    return _without(_secrets(), text)


def _secrets() -> list[str]:
    """Returns the secrets that this process knows, the longest first."""
    return sorted(_known | _from_environment(), key=len, reverse=True)


def _without(secrets: list[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    for pattern, mask in _PATTERNS:
        text = pattern.sub(mask, text)
    return text


def masked_tree(value: Any, name: str = "") -> Any:
    """Settings with every secret masked: those under secret names, and those within texts (keys of mappings too)."""
    return _masked_tree(_secrets(), value, name)


def _masked_tree(secrets: list[str], value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {
            _without(secrets, key) if isinstance(key, str) else key: _masked_tree(secrets, item, str(key))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_masked_tree(secrets, item, name) for item in value]
    if isinstance(value, str):
        return MASK if value and is_secret(name) else _without(secrets, value)
    return value


def masked_argument(argument: str) -> str:
    """An argument of a command line, with its value masked if its name is secret.

    >>> masked_argument("train.hub_token=abc")
    'train.hub_token=***'
    """
    name, equals, _ = argument.partition("=")
    last = re.split(r"[.-]", name)[-1]
    return f"{name}={MASK}" if equals and is_secret(last) else masked(argument)


def learn(value: Any, name: str = "") -> None:
    """Makes the secrets among settings known: values under secret names, at any depth."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            learn(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            learn(item, name)
    elif is_secret(name):
        keep_secret(value)


def _from_environment() -> set[str]:
    # Of variables, any key is one that opens something (`OPENAI_KEY`), while settings have keys to sort by.
    return {
        value
        for name, value in os.environ.items()
        if len(value) >= _LEAST and (is_secret(name) or name.upper().endswith("_KEY"))
    }
