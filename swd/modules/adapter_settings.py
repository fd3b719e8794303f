"""Reads an adapter's settings as peft does; settings that are not understood are refused by name.

Adapters may come from anybody, and a regular expression can be written so that matching takes forever. Patterns in
settings are therefore never run as regular expressions: the common part of the syntax is matched here in bounded time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

from swd.modules.targets import is_target
from swd.types import UserError

PEFT_RANK = PEFT_ALPHA = 8
"""Peft's defaults for rank and alpha (peft.LoraConfig)."""
WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "loftq_config",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
"""Settings that do not change how an adapter is read, whatever their value: records, settings of training alone, or
options of another setting that would itself be refused."""
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),  # the others change or may change the base
    "megatron_core": ("megatron.core", None),
    "use_rslora": (True, False, None),
}
"""Settings for which only these values are understood. Any other setting must be off: null, false, [] or {}."""
READ = (
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "r",
    "rank_pattern",
    "target_modules",
)
"""Settings that `Settings` follows."""

MOST_PATTERNS = 1024
"""Largest number of patterns in one setting; real adapters have fewer."""
MOST_WILD = 64
"""Largest number of patterns with wildcards among them."""
MOST_SPELLINGS = 1024
"""Largest number of alternatives of one pattern."""

_Number = TypeVar("_Number", int, float)

Token = tuple[str, str]
"""A letter, "any" or "digit", and its repetition: "1", "?", "*" or "+"."""


@dataclass(frozen=True)
class Spelling:
    """One alternative of a pattern: its tokens, and whether it must match from the beginning of the name."""

    tokens: tuple[Token, ...]
    anchored: bool

    @property
    def wild(self) -> bool:
        """Whether it matches names of several lengths."""
        return any(times != "1" for _, times in self.tokens)

    def fits(self, name: str, starts: Sequence[int]) -> bool:
        """Whether it matches a name from one of the positions `starts` to the end."""
        if not self.wild:
            start = len(name) - len(self.tokens)
            return start in starts and all(_is(sign, c) for (sign, _), c in zip(self.tokens, name[start:], strict=True))
        places = set(starts)
        for sign, times in self.tokens:
            places = _advance(places, sign, times, name)
        return len(name) in places


def _is(sign: str, character: str) -> bool:
    return sign == character or sign == "any" or (sign == "digit" and character.isdecimal())


def _advance(places: set[int], sign: str, times: str, name: str) -> set[int]:
    """Positions that are possible after a token that begins at one of `places`."""
    after = set(places) if times in "?*" else set()
    for place in places:
        while place < len(name) and _is(sign, name[place]):
            place += 1
            after.add(place)
            if times in "1?":
                break
    return after


@dataclass(frozen=True)
class Pattern:
    """A name as peft reads it: a regular expression. Only a part of the syntax, which is fast to match, is accepted.

    That is letters, digits, `_`, `-`; `.` for any character and `\\.` for a dot; `\\d` and `[0-9]`; `*`, `+` and `?`
    after these; alternatives `(a|b)`; `^` at the beginning and `$` at the end.

    Attributes:
        text: the pattern as written.
        spellings: its alternatives.
    """

    text: str
    spellings: tuple[Spelling, ...]

    @staticmethod
    def read(text: str) -> Pattern | None:
        """The pattern; None if it uses other syntax or is too long."""
        try:
            return Pattern(text, tuple(_Reader(text).spellings()))
        except _Unknown:
            return None

    @property
    def wild(self) -> bool:
        """Whether one of its alternatives matches names of several lengths."""
        return any(spelling.wild for spelling in self.spellings)

    def fits_end(self, name: str) -> bool:
        """Whether it matches a name, or the end of one after a dot: `re.match(rf"(.*\\.)?({pattern})$", name)`."""
        starts = [0, *(i + 1 for i, character in enumerate(name) if character == ".")]
        return any(spelling.fits(name, [0] if spelling.anchored else starts) for spelling in self.spellings)

    def fits_whole(self, name: str) -> bool:
        """Whether it matches a whole name: `re.fullmatch(pattern, name)`."""
        return any(spelling.fits(name, [0]) for spelling in self.spellings)


class _Unknown(Exception):
    """Syntax of regular expressions that is not accepted."""


class _Reader:
    """Parser that turns a pattern into its alternatives, from left to right."""

    def __init__(self, text: str) -> None:
        if len(text) > 2**16:
            raise _Unknown
        self.text = text
        self.at = 0

    def spellings(self) -> list[Spelling]:
        found = self._alternatives(0)
        if self.at != len(self.text):
            raise _Unknown
        return [self._spelling(tokens) for tokens in found]

    def _spelling(self, tokens: tuple[Token, ...]) -> Spelling:
        anchored = bool(tokens) and tokens[0][0] == "^"
        inner = tokens[1:] if anchored else tokens
        inner = inner[:-1] if inner and inner[-1][0] == "$" else inner
        if any(sign in ("^", "$") for sign, _ in inner) or sum(times in "*+" for _, times in inner) > 3:
            raise _Unknown
        return Spelling(inner, anchored)

    def _alternatives(self, depth: int) -> list[tuple[Token, ...]]:
        found: list[tuple[Token, ...]] = []
        while True:
            found += self._sequence(depth)
            if len(found) > MOST_SPELLINGS:
                raise _Unknown
            if self.text[self.at : self.at + 1] != "|":
                return found
            self.at += 1

    def _sequence(self, depth: int) -> list[tuple[Token, ...]]:
        """Tokens up to `|`, `)` or the end; one sequence for each combination of the alternatives of groups."""
        parts: list[list[tuple[Token, ...]]] = []
        count = 1
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            if self.text[self.at] == "(":
                parts.append(self._group(depth))
                count *= len(parts[-1])
                if count > MOST_SPELLINGS:
                    raise _Unknown
            else:
                parts.append([(self._token(),)])
        return [tuple(token for part in choice for token in part) for choice in product(*parts)]

    def _group(self, depth: int) -> list[tuple[Token, ...]]:
        if depth > 4:
            raise _Unknown
        self.at += 3 if self.text.startswith("(?:", self.at) else 1
        found = self._alternatives(depth + 1)
        if self.text[self.at : self.at + 1] != ")" or self.text[self.at + 1 : self.at + 2] in tuple("*+?{"):
            raise _Unknown
        self.at += 1
        return found

    def _token(self) -> Token:
        sign, length = self._sign()
        self.at += length
        times = self.text[self.at : self.at + 1]
        if times == "" or times not in "*+?{":
            return sign, "1"
        if times == "{" or sign not in ("any", "digit"):
            raise _Unknown
        self.at += 1
        if self.text[self.at : self.at + 1] == "?":  # a lazy repetition matches the same names
            self.at += 1
        return sign, times

    def _sign(self) -> tuple[str, int]:
        """The sign at the current position, and the number of characters that write it."""
        rest = self.text[self.at : self.at + 5]
        if rest.startswith("[0-9]"):
            return "digit", 5
        if rest.startswith(r"\d"):
            return "digit", 2
        if rest[0] == "\\" and rest[1:2] and not rest[1].isalnum() and rest[1].isascii():
            return rest[1], 2
        if rest[0] == ".":
            return "any", 1
        if (rest[0].isalnum() and rest[0].isascii()) or rest[0] in "_-^$":
            return rest[0], 1
        raise _Unknown


@dataclass(frozen=True)
class Settings:
    """An adapter's configuration as peft reads it.

    Attributes:
        where: beginning of messages.
        rank: rank of modules that no pattern matches.
        alpha: alpha of modules that no pattern matches.
        ranks: patterns with ranks; the first that matches a module counts.
        alphas: patterns with alphas; the first that matches a module counts.
        rooted: whether updates are scaled by alpha / sqrt(rank) instead of alpha / rank.
        targets: modules that peft adapts: a pattern, or names or ends of names; None for all.
        excluded: modules that peft leaves out, in the same form; None for none.
        layers: numbers of the layers that peft adapts, None for all.
        lists: names of the module lists in which `layers` are counted; empty for any list.
    """

    where: str
    rank: int
    alpha: float
    ranks: tuple[tuple[Pattern, int], ...] = ()
    alphas: tuple[tuple[Pattern, float], ...] = ()
    rooted: bool = False
    targets: Pattern | frozenset[str] | None = None
    excluded: Pattern | frozenset[str] | None = None
    layers: frozenset[int] | None = None
    lists: tuple[str, ...] = ()

    def scale(self, module: str, rank: int) -> float:
        """Factor by which `lora_B @ lora_A` of a module is multiplied.

        Args:
            module: path of the module in the network.
            rank: rank of its weights.

        Raises:
            UserError: if the settings give the module another rank or exclude it; peft would not load its weights then.
        """
        said = next((value for pattern, value in self.ranks if pattern.fits_end(module)), self.rank)
        if said != rank:
            raise UserError(
                f"{self.where} is damaged: {module} has weights of rank {rank}, but its settings (r, rank_pattern) "
                f"say {said}; copy it again"
            )
        if not self._adapts(module):
            raise UserError(
                f"{self.where} has weights for {module}, which its own settings (target_modules, exclude_modules, "
                "layers_to_transform) leave out; save it again with peft"
            )
        alpha = next((value for pattern, value in self.alphas if pattern.fits_end(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rooted else rank)

    def _adapts(self, module: str) -> bool:
        if self.excluded is not None and _named(self.excluded, module):
            return False
        if self.targets is not None and not _named(self.targets, module):
            return False
        if self.layers is None or isinstance(self.targets, Pattern):
            return True
        number = _layer(module, self.lists)
        return number is not None and number in self.layers


def _named(names: Pattern | frozenset[str], module: str) -> bool:
    if isinstance(names, Pattern):
        return names.fits_whole(module)
    return is_target(module, names)


def _layer(module: str, lists: Sequence[str]) -> int | None:
    """Number of a module's layer as peft counts: the first number after a name, or after one of `lists`."""
    parts = module.split(".")
    numbers = [at for at in range(1, len(parts) - 1) if parts[at].isdecimal()]
    if not lists:
        return next((int(parts[at]) for at in numbers if at >= 2), None)
    return next((int(parts[at]) for name in lists for at in numbers if parts[at - 1] == name), None)


def read_settings(config: Mapping[str, Any], where: str) -> Settings:
    """Read a peft configuration.

    Args:
        config: content of `adapter_config.json`, or of the metadata that diffusers stores with weights, without the
            prefix of the part.
        where: beginning of messages, e.g. "adapter FOLDER".

    Raises:
        UserError: for the first setting that is not understood or damaged, with its name and value.
    """
    # Settings that are not understood are refused.
    for key, value in config.items():
        if key not in (*READ, *WITHOUT_EFFECT):
            _check_known(key, value, where)

    # Which layers are adapted.
    rooted = config.get("use_rslora") is True
    layers = config.get("layers_to_transform")
    if layers is not None:
        layers = [layers] if not isinstance(layers, list) else layers
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in layers):
            raise UserError(_damaged(where, "layers_to_transform", config["layers_to_transform"], "layer numbers"))
    lists = config.get("layers_pattern") or []
    lists = [lists] if isinstance(lists, str) else lists
    if layers and not (isinstance(lists, list) and all(isinstance(n, str) and re.fullmatch(r"\w+", n) for n in lists)):
        raise UserError(_damaged(where, "layers_pattern", config["layers_pattern"], "names of lists of layers"))
    return Settings(
        where,
        _whole(config.get("r", PEFT_RANK), "r", where),
        _number(config.get("lora_alpha", PEFT_ALPHA), "lora_alpha", where),
        _patterns(config, "rank_pattern", where, _whole),
        _patterns(config, "alpha_pattern", where, _number),
        rooted,
        _names(config.get("target_modules"), "target_modules", where),
        _names(config.get("exclude_modules") or None, "exclude_modules", where),
        frozenset(layers) if layers else None,
        tuple(lists) if layers else (),
    )


def _check_known(key: str, value: Any, where: str) -> None:
    """Raise UserError unless a setting is off or has one of the values in `ACCEPTED`."""
    off = value is None or value is False or value in ([], {})
    accepted = ACCEPTED.get(key)
    known = (
        off
        if accepted is None
        else any(value is each or (value == each and isinstance(value, str)) for each in accepted)
    )
    if not known:
        raise UserError(
            f"{where} has {key}={shown(value)}, which is not understood: folding it as a plain LoRA would change what "
            "it does; merge it into the base with the library that made it, and give that as model.path"
        )


def shown(value: Any) -> str:
    """A value on one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _damaged(where: str, key: str, value: Any, expected: str) -> str:
    return f"{where} has {key}={shown(value)}; expected {expected}, so it is damaged: copy it again"


def _number(value: Any, key: str, where: str) -> float:
    """A scale: above 0 and finite."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9:
        return float(value)
    raise UserError(_damaged(where, key, value, "a finite number above 0"))


def _whole(value: Any, key: str, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise UserError(_damaged(where, key, value, "a whole number above 0"))


def _patterns(
    config: Mapping[str, Any], key: str, where: str, read: Callable[[Any, str, str], _Number]
) -> tuple[tuple[Pattern, _Number], ...]:
    """The patterns of a setting with their numbers, each read by `read`."""
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise UserError(_damaged(where, key, given, "an object with names and numbers"))
    if len(given) > MOST_PATTERNS:
        raise UserError(f"{where} has {len(given)} entries in {key}; at most {MOST_PATTERNS} are read")
    found = tuple(
        (_pattern(text, key, where), read(value, f"{key}[{text[:60]}]", where)) for text, value in given.items()
    )
    wild = sum(pattern.wild for pattern, _ in found)
    if wild > MOST_WILD:
        raise UserError(f"{where} has {wild} wildcards in {key}; at most {MOST_WILD} are read, name the layers")
    return found


def _pattern(text: str, key: str, where: str) -> Pattern:
    pattern = Pattern.read(text)
    if pattern is None:
        raise UserError(
            f"{where} has {shown(text)} in {key}: of regular expressions only names, `.`, `.*`, `\\.`, `\\d`, `(a|b)`, "
            "`^` and `$` are read, since others can run without end; name the layers"
        )
    return pattern


def _names(value: Any, key: str, where: str) -> Pattern | frozenset[str] | None:
    if value is None or value == "all-linear":
        return None
    if isinstance(value, str):
        return _pattern(value, key, where)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return frozenset(value)
    raise UserError(_damaged(where, key, value, "names of layers"))
