"""YAML 1.2 by PyYAML's safe loader, which by itself reads YAML 1.1: `on` is a text here, 1e-3 a number and 010 ten.

DVC reads params.yaml by ruamel.yaml; a test holds that both find the same values.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from yaml import AliasEvent, MappingNode, Node, SafeLoader, ScalarNode, YAMLError, load
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.parser import ParserError

MOST_BYTES, MOST_NODES, MOST_DEPTH = 200_000, 10_000, 20  # read within a second; params.yaml has 9,000, 300 and 4
MOST_DIGITS = 400  # of a number: no float has more before its point
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
    """One document of plain values.  Raises ValueError in one line, whatever is wrong with it."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has {len(text):,} bytes, at most {MOST_BYTES:,} are read")
    try:
        return load(text.decode(), _Loader)  # in UTF-8 alone: PyYAML would take UTF-16, which DVC does not
    except (YAMLError, ValueError, OverflowError) as error:  # the last for "\Uffffffff"
        raise ValueError(" ".join(str(error).replace('in "<unicode string>",', "at").split())) from None


class _Loader(SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.n_node = 0  # of the node that is read; of nodes, each alias with all that it stands for
        self.sizes = dict[Node | None, int]()  # nodes of each

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

    def compose_node(self, parent: Any, index: Any) -> Node:
        """Refuse what is nested too deep, and aliases of aliases, of which a few lines stand for gigabytes."""
        before, is_alias, mark = self.n_node, self.check_event(AliasEvent), self.peek_event().start_mark
        self.depth += 1
        node = super().compose_node(parent, index) if self.depth <= MOST_DEPTH else None
        self.depth -= 1
        # an alias inside of what it stands for has no size yet, as it has no end
        self.n_node += self.sizes.get(node, MOST_NODES) if is_alias else 1
        if node is None or self.n_node > MOST_NODES:
            most = f"{MOST_NODES:,} values" if node else f"{MOST_DEPTH} levels"
            raise ComposerError(None, None, f"at most {most} are read", mark)
        self.sizes.setdefault(node, self.n_node - before)
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """Refuse a number, date or other value that is none, of which each constructor has its own error."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
            raise ConstructorError(
                None, None, f"this is not of type {node.tag.removeprefix(TAG)}", node.start_mark
            ) from error

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
    if len(digits) > MOST_DIGITS:
        raise ValueError
    return int(digits, 0 if digits.lstrip("-+")[:2] in ("0b", "0o", "0x") else 10)


_Loader.add_constructor(TAG + "int", _int)
for _kind, _pattern in SCALARS.items():
    _Loader.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), list(FIRST[_kind]))
