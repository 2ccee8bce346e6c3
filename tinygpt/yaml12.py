"""YAML 1.2 by PyYAML's safe loader, which by itself reads YAML 1.1: `on` is a text here, 1e-3 a number and 010 ten.

DVC reads params.yaml by ruamel.yaml; a test holds that both find the same values.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from yaml import MappingNode, Node, SafeLoader, ScalarNode, load
from yaml.constructor import ConstructorError
from yaml.parser import ParserError

TAG = "tag:yaml.org,2002:"
# Of plain scalars, as the core schema has them (https://yaml.org/spec/1.2.2/#103-core-schema), with what ruamel.yaml
# takes beyond it: 0b1010 and 1_000.
SCALARS = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9_]+)",
    "float": r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|\.[0-9_]+([eE][-+][0-9]+)?|\.(inf|Inf|INF))"
    r"|\.(nan|NaN|NAN)",
}
FIRST = {"bool": "tTfF", "int": "-+0123456789", "float": "-+.0123456789"}  # characters that one begins with


def load_yaml(text: bytes) -> Any:
    """One document of plain values.

    Raises YAMLError, or ValueError and OverflowError for a number or date that is none.
    """
    return load(text, _Loader)


class _Loader(SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(TAG) not in SCALARS]
        for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
    }

    def process_directives(self) -> Any:
        """Refuse `%YAML 1.1`, which ruamel.yaml heeds."""
        found = super().process_directives()
        if self.yaml_version not in (None, (1, 2)):
            raise ParserError(None, None, "YAML 1.2 is read here: remove the line %YAML")
        return found

    def compose_mapping_node(self, anchor: str | None) -> MappingNode:
        """Refuse a key that is there twice, of which PyYAML takes the last."""
        node, keys = super().compose_mapping_node(anchor), set[Any]()
        for key in (key for key, _ in node.value if isinstance(key, ScalarNode) and key.tag != TAG + "merge"):
            name = self.construct_object(key)
            if name in keys:
                raise ConstructorError(None, None, f"the key {name!r} is there twice", key.start_mark)
            keys.add(name)
        return node


def _int(loader: SafeLoader, node: Node) -> int:
    digits = loader.construct_scalar(node).replace("_", "")
    return int(digits, 0 if digits.lstrip("-+")[:2] in ("0b", "0o", "0x") else 10)


_Loader.add_constructor(TAG + "int", _int)
for _kind, _pattern in SCALARS.items():
    _Loader.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), list(FIRST[_kind]))
