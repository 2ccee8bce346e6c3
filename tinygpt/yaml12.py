"""YAML 1.2 with ruamel.yaml, as DVC reads params.yaml; texts that would take seconds or gigabytes are refused."""

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import Node

MOST_BYTES, MOST_NODES, MOST_DEPTH = 200_000, 10_000, 20  # read within a second; params.yaml has 9,000, 300 and 4
MOST_DIGITS = 400  # of a number: no float has more before its point


def load_yaml(text: bytes) -> Any:
    """One document of plain values.  Raises ValueError with a message of one line, whatever is wrong with it."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has {len(text):,} bytes, more than the limit of {MOST_BYTES:,}")
    if text.startswith(b"%YAML") or b"\n%YAML" in text:  # in YAML 1.1, `on` is true
        raise ValueError("only YAML 1.2 is read: remove %YAML")
    reader = YAML(typ="safe", pure=True)
    reader.Composer, reader.Constructor = _Composer, _Constructor
    try:
        return reader.load(text.decode())  # only UTF-8: ruamel.yaml would accept UTF-16, which DVC does not
    except (YAMLError, ValueError, OverflowError, LookupError) as error:  # the last two for "\Uffffffff"
        raise ValueError(" ".join(_reason(error).replace('in "<unicode string>",', "at").split())) from None


def _reason(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError):  # without its advice on how to use ruamel.yaml
        mark = error.problem_mark or error.context_mark
        return f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}" if mark else f"{error.problem}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8"
    return str(error) if isinstance(error, ValueError) else "a value or character is not valid"


class _Composer(Composer):
    """Refuses long numbers, deep nesting, and aliases of aliases, a few lines of which may stand for gigabytes."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False
        self.level = self.n_node = 0  # of the current node; of nodes so far, an alias counting as all it stands for
        self.sizes = dict[Node, int]()  # how many nodes each has

    def compose_node(self, parent: Any, index: Any) -> Node:
        """The next node, and all that is in it."""
        before, is_alias, mark = self.n_node, self.parser.check_event(AliasEvent), self.parser.peek_event().start_mark
        if self.level == MOST_DEPTH:
            raise ComposerError(None, None, f"at most {MOST_DEPTH} levels are read", mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        # an alias inside the node that it stands for finds no size yet: that node has not ended
        self.n_node += self.sizes.get(node, MOST_NODES) if is_alias else 1
        if self.n_node > MOST_NODES:
            raise ComposerError(None, None, f"at most {MOST_NODES:,} values are read", mark)
        if str(node.tag).endswith(":int") and len(node.value) > MOST_DIGITS:
            raise ComposerError(None, None, f"at most {MOST_DIGITS} digits are read", mark)
        self.sizes.setdefault(node, self.n_node - before)
        return node


class _Constructor(SafeConstructor):
    """Reports where a number, date or other value is not valid: each kind raises its own error, without a place."""

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """The value of a node."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError, AttributeError, TypeError):
            raise ConstructorError(None, None, "this value is not valid", node.start_mark) from None
