"""The command line of finetune.py, made from the fields of dataclasses and the tables of the original's other flags."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Iterable
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from megatron_llm.flags.original_flags import NO_EFFECT, ONLY, REFUSED, SWITCHES_WITHOUT_EFFECT
from run_contract.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are UserErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as one line."""
        raise UserError(f"{message}; run with --help for the list of flags")


class Refused(argparse.Action):
    """A flag of the original's that is refused; the error does not repeat its value, which could be a secret."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Raise UserError with the reason, which is the flag's help."""
        raise UserError(f"{self.option_strings[0]} is {self.help}")


class OnlyThese(argparse.Action):
    """A flag of the original's that accepts only the values of its metavar: those that ask for what is done anyway."""

    def __call__(self, parser: argparse.ArgumentParser, _namespace: object, value: Any, *_: object) -> None:
        """Raise UserError, with the reason that the flag's help gives, for every other value."""
        if value not in str(self.metavar).split("|"):
            raise UserError(f"{self.option_strings[0]} {value} is refused, only {self.metavar} is valid: {self.help}")


def make(sections: Iterable[type[Any]], optional: Collection[str], **about: str) -> Parser:
    """A parser with a flag for each field of these dataclasses, and the original's other flags.

    A flag that is not given is absent from the result, so that it differs from one that was given its default;
    those of `optional` need not be given although their field has no default.
    """
    parser = Parser(**about, allow_abbrev=False, argument_default=argparse.SUPPRESS)  # type: ignore[arg-type]
    for section in sections:
        hints = get_type_hints(section, include_extras=True)
        for entry in dataclasses.fields(section):
            required = entry.default is dataclasses.MISSING and entry.name not in optional
            parser.add_argument(f"--{entry.name}", required=required, **_options(hints[entry.name]))
    for name, reason in NO_EFFECT.items():
        switch: dict[str, Any] = {"action": "store_true"} if name in SWITCHES_WITHOUT_EFFECT else {}
        parser.add_argument(f"--{name}", help=f"no effect: {reason}", **switch)
    for name, (values, reason) in ONLY.items():
        parser.add_argument(f"--{name}", action=OnlyThese, metavar="|".join(values), help=reason)
    for name, reason in REFUSED.items():
        parser.add_argument(f"--{name}", action=Refused, nargs="*", help=f"refused: {reason}")
    return parser


def _options(hint: Any) -> dict[str, Any]:
    """argparse options of a field: bool is a switch, list takes several, Literal is a choice, `| None` is optional."""
    kind, text = get_args(hint)
    if type(None) in get_args(kind):
        kind = next(part for part in get_args(kind) if part is not type(None))
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if kind is bool:
        return options | {"action": "store_true", "default": argparse.SUPPRESS}
    if get_origin(kind) is list:
        options, kind = options | {"nargs": "+"}, get_args(kind)[0]
    if get_origin(kind) is Literal:
        return options | {"choices": get_args(kind)}
    return options | {"type": kind}
