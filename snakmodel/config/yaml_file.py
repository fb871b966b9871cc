"""Reads the YAML files that users write, more strictly than YAML 1.1.

No key may be there twice, and no value is silently turned into another one. YAML 1.1, which PyYAML follows, reads
`24:00:00` as the number 86400, `010` as 8 and `no` (a source of Norwegian text) as false. Here they stay the text that
was written, as in YAML 1.2.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from run_contract.errors import UserError

_INT, _BOOL = "tag:yaml.org,2002:int", "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with the rules of this module."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping. Raises a YAML error that names both lines if a key is there twice."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(getattr(key, "value", key)), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(
                    f"the key {name!r} is there twice, in lines {lines[name]} and {line}; remove one of them"
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _BOOL)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
_Loader.add_implicit_resolver(_INT, _NUMBER, [*"-+0123456789"])
_Loader.add_implicit_resolver(_BOOL, re.compile("(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])


def read_yaml(path: Path) -> Any:
    """The content of a file. Raises FileNotFoundError, or UserError that names the file and the lines at fault."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from error
