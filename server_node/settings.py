"""The flags of `umbel-node` from a TOML file and from environment variables, too.

    command line  >  UMBEL_NODE_<FLAG>  >  the file of --config  >  default

A key of the file is a flag's long name with underscores (`num_blocks = 4`), a variable is the same in capitals
(`UMBEL_NODE_NUM_BLOCKS=4`); MODEL is `model`. There is no second table of flags: all of it is read off the parser.
"""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swarm_protocol.errors import ConfigError

PREFIX = "UMBEL_NODE_"
_CONFIG = "config"
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


class Settings:
    """A parser with one subparser per command. Parses once."""

    def __init__(self, parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> None:
        self._parser = parser
        self._commands = commands

    def parse(self, argv: Sequence[str] | None, environ: Mapping[str, str]) -> argparse.Namespace:
        """Return all values of a command. Exits as argparse does; raises ConfigError for a wrong file or variable."""
        flags = {name: _flags(command) for name, command in self._commands.items()}
        defaults = {name: {action.dest: action.default for action in some.values()} for name, some in flags.items()}
        for action in (action for some in flags.values() for action in some.values()):
            action.help = (action.help or "").replace("%(default)s", str(action.default))
        for name, command in self._commands.items():
            command.set_defaults(**dict.fromkeys(defaults[name]))  # None: not given
        found = self._parser.parse_args(argv)
        command, mine = self._commands[found.command], flags[found.command]
        values = {dest: value for dest, value in vars(found).items() if value is not None}
        known = {key for some in flags.values() for key in some}
        path = values.get(_CONFIG) or (environ.get(PREFIX + "CONFIG") if _CONFIG in mine else None)
        for where, given in (("", _variables(environ, known)), (f"{path}: ", _file(path))):
            taken = _excluded(command, values) | values.keys()
            level: dict[str, Any] = {}
            for name, raw in given.items():
                key = name.removeprefix(PREFIX).lower() if not where else name
                if (where and key not in mine) or key == _CONFIG:
                    raise ConfigError(f"{where}{key} is no setting of `umbel-node {found.command}`")
                if key not in mine or mine[key].dest in taken:
                    continue
                action = mine[key]
                if action.dest in _excluded(command, level):
                    raise ConfigError(f"{where}{name} cannot stand beside what excludes it")
                level[action.dest] = _converted(action, raw, defaults[found.command][action.dest], f"{where}{name}")
            values |= level
        for dest, default in defaults[found.command].items():
            values.setdefault(dest, default)
        for action in mine.values():
            if not action.option_strings and values[action.dest] is None:
                command.error(f"the following arguments are required: {action.metavar}")
        return argparse.Namespace(**values)


def _flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return a parser's actions by their key."""
    # argparse has no public way to its actions.
    return {
        (action.option_strings[-1].lstrip("-").replace("-", "_") if action.option_strings else action.dest): action
        for action in parser._actions
        if action.dest != "help"
    }


def _excluded(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> set[str]:
    """Return what may not stand beside `values`."""
    return {
        action.dest
        for group in parser._mutually_exclusive_groups
        for action in group._group_actions
        if any(other.dest in values for other in group._group_actions if other is not action)
    }


def _variables(environ: Mapping[str, str], known: set[str]) -> dict[str, str]:
    found = {name: text for name, text in environ.items() if name.startswith(PREFIX) and name != PREFIX + "CONFIG"}
    for name in found:
        if name.removeprefix(PREFIX).lower() not in known or not name.isupper():
            raise ConfigError(f"{name} is no setting of umbel-node")
    return found


def _file(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _converted(action: argparse.Action, raw: object, default: object, where: str) -> object:
    """Return what the command line would make of `raw`. Raises ConfigError."""
    if action.nargs == 0:
        truth = raw if isinstance(raw, bool) else str(raw).strip().lower()
        if truth is True or truth in _TRUE:
            return action.const
        if truth is False or truth in _FALSE:
            return default
        raise ConfigError(f"{where}: true or false is needed, not {raw!r}")
    if action.nargs == "+":
        items = raw.split() if isinstance(raw, str) else raw
        if not isinstance(items, list):
            raise ConfigError(f"{where}: a list of texts is needed, not {raw!r}")
        return [_one(action, item, where) for item in items]
    return _one(action, raw, where)


def _one(action: argparse.Action, raw: object, where: str) -> object:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise ConfigError(f"{where}: a text or a number is needed, not {raw!r}")
    try:
        value = action.type(str(raw)) if callable(action.type) else str(raw)
    except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if action.choices is not None and value not in action.choices:
        raise ConfigError(f"{where}: {', '.join(map(str, action.choices))} are possible, not {raw!r}")
    return value
