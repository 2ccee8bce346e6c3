"""Convert tinygpt's tensors to the layout of another program, and back.

Each step of the conversion moves numbers, copies them or adds neutral ones; it changes none. On the way back, our
tensors must give theirs again: where copies differ, or what was added is not neutral, theirs belong to another model.
H query heads, G key/value heads, D head_dim, C n_embd.
"""

import re
from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.export.families import QKV, Layout
from tinygpt.files import some_of
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import TIED
from tinygpt.model.lora import ADAPTER
from tinygpt.model.weights import MOST_SHOWN, Shapes, expected_tensors, misshapen, shapes_of

Pair = tuple[Tensor, Tensor]  # of an adapter: A (rank, in), an embedding's (V, rank), and B (out, rank)
Tensors = dict[str, Tensor]  # by name, such as "blocks.0.attn.q_proj.weight"

NO_SINK = -1e30  # a logit so low that it takes no probability from the keys


def apply_layout(tensors: Tensors, config: GPTConfig, layout: Layout, n_ctx: int) -> Tensors:
    """A model's tensors with the names and shapes of `layout`, and with `n_ctx` positions if they are learned."""
    if layout.untied and config.tie_weights and "tok_emb.weight" in tensors:
        tensors = tensors | {TIED: tensors["tok_emb.weight"].clone()}
    tensors = _add_zero_biases(tensors, layout.biased + (layout.biased_if_any if config.bias != "none" else ()))
    if layout.sinks:
        queries = [name for name in tensors if _leaf(name) == "q_proj" and name.endswith(".weight")]
        sinks = torch.full((config.n_head,), NO_SINK)
        tensors = tensors | {name.replace("q_proj", "sinks"): sinks for name in queries}
    tensors = {name: _ordered(name, tensor, config, layout) for name, tensor in tensors.items()}
    if layout.fused_qkv:
        tensors = _fuse_qkv(tensors)
    theirs: Tensors = {}
    for name, tensor in tensors.items():
        if _leaf(name) == "pos_emb":
            tensor = tensor[:n_ctx]
        if name.endswith(".weight") and _leaf(name) in layout.transposed:
            tensor = tensor.T
        theirs |= _for_each_head(name, tensor.contiguous(), config, layout)
    return theirs


def _add_zero_biases(tensors: Tensors, modules: tuple[str, ...]) -> Tensors:
    """Give each of these modules a bias, after its weight; one that has a bias keeps it."""
    biased: Tensors = {}
    for name, tensor in tensors.items():
        biased[name] = tensor
        if name.endswith(".weight") and _leaf(name) in modules:
            bias = name.removesuffix("weight") + "bias"
            biased[bias] = tensors.get(bias, tensor.new_zeros(tensor.size(0)))
    return biased


def _ordered(name: str, tensor: Tensor, config: GPTConfig, layout: Layout) -> Tensor:
    """The rows of a weight, or of an adapter's B, in the program's order: in another, it would compute nonsense."""
    if layout.repeated_kv and _leaf(name) in ("k_proj", "v_proj"):  # each H/G times: (G·D, …) -> (H·D, …)
        heads = tensor.unflatten(0, (config.n_kv_head, config.head_dim))
        tensor = heads.repeat_interleave(config.n_head // config.n_kv_head, dim=0).flatten(0, 1)
    if layout.adjacent_rope and _leaf(name) in ("q_proj", "k_proj"):  # of each head 0 1 2 3 4 5 -> 0 3 1 4 2 5
        tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return tensor


def _fuse_qkv(tensors: Tensors) -> Tensors:
    """Stack queries, keys and values under the name of the queries.  (H·D, …), 2 × (G·D, …) -> ((H + 2G)·D, …)"""
    fused: Tensors = {}
    for name, tensor in tensors.items():
        if _leaf(name) == "q_proj":
            fused[name] = torch.cat([tensors[name.replace("q_proj", qkv)] for qkv in QKV])
        elif _leaf(name) not in ("k_proj", "v_proj"):
            fused[name] = tensor
    return fused


def _for_each_head(name: str, tensor: Tensor, config: GPTConfig, layout: Layout) -> Tensors:
    """A tensor by their name; if the layout wants it, the norm of queries or keys, (D,), is repeated for each head.

    The copies are rows of one tensor, (H, D) or (G, D), or tensors: "….q_layernorm.norms.0.weight" and so on.
    """
    theirs = _rename(name, layout)
    n_head = {"q_norm": config.n_head, "k_norm": config.n_kv_head}.get(_leaf(name))
    if n_head is None or layout.head_norms == "shared":
        return {theirs: tensor}
    if layout.head_norms == "stacked":
        return {theirs: tensor.expand(n_head, -1).contiguous()}
    base = theirs.removesuffix(".weight")
    return {f"{base}.norms.{head}.weight": tensor.clone() for head in range(n_head)}


def _rename(name: str, layout: Layout) -> str:
    """Their name for one of our tensors."""
    module, _, kind = name.rpartition(".")
    block = re.match(r"blocks\.(\d+)\.", module)
    if block is None:
        return f"{layout.names[module]}.{kind}"
    template = layout.names["blocks.{i}." + module[block.end() :]]
    return f"{template.format(i=block[1])}.{kind}"


def _leaf(name: str) -> str:
    """The module's own name: "blocks.0.attn.q_proj.weight" -> "q_proj"."""
    return name.split(".")[-2]


def adapter_pairs(adapter: Mapping[str, Tensor], config: GPTConfig, layout: Layout) -> dict[str, Pair]:
    """Each adapted module's A and B, with their names and order of rows; those of a fused matrix are combined."""
    pairs = {
        name.removesuffix(f".{ADAPTER[0]}.weight"): (tensor, adapter[name.replace(*ADAPTER)])
        for name, tensor in adapter.items()
        if name.endswith(f".{ADAPTER[0]}.weight")
    }
    ordered = {name: (a, _ordered(f"{name}.weight", b, config, layout)) for name, (a, b) in pairs.items()}
    if layout.fused_qkv:
        ordered = _fuse_adapters(ordered, config, layout)
    return {
        _rename(f"{name}.weight", layout).removesuffix(".weight"): (a.contiguous(), b.contiguous())
        for name, (a, b) in ordered.items()
    }


def _fuse_adapters(pairs: dict[str, Pair], config: GPTConfig, layout: Layout) -> dict[str, Pair]:
    """Combine the adapters of queries, keys and values: As stacked, Bs as the blocks of a diagonal.

    The rank, which divides alpha, grows; B is scaled up to make up for it.
    """
    fused: dict[str, Pair] = {}
    n_kv_head = config.n_head if layout.repeated_kv else config.n_kv_head
    n_heads = dict(zip(QKV, (config.n_head, n_kv_head, n_kv_head), strict=True))
    for name, (a, b) in pairs.items():
        if _leaf(f"{name}.weight") not in QKV:
            fused[name] = (a, b)
            continue
        owner = name.rpartition(".")[0]
        none = {part: (a[:0], b.new_zeros(n * config.head_dim, 0)) for part, n in n_heads.items()}
        parts = [pairs.get(f"{owner}.{part}", none[part]) for part in QKV]
        all_a = torch.cat([part_a for part_a, _ in parts])
        all_b = torch.block_diag(*(part_b for _, part_b in parts)) * (len(all_a) / len(a))
        fused[f"{owner}.{QKV[0]}"] = (all_a, all_b)
    return fused


class Misfit(UserError):
    """Tensors that do not fit a config: missing, superfluous or of another shape, with `n_problem` problems in all."""

    def __init__(self, problems: list[str]) -> None:
        self.n_problem = len(problems)
        super().__init__(f"the tensors do not fit their config: {some_of(problems, MOST_SHOWN)}")


def check_layout(found: Shapes, config: GPTConfig, layout: Layout) -> tuple[Tensors, Tensors]:
    """The tensors of a model without data, by our names and by theirs.

    Raises Misfit if one of their names was found with another shape, UserError as expected_tensors does.
    """
    ours = expected_tensors(config, found)
    theirs = apply_layout(ours, config, layout, config.block_size)
    if problems := misshapen(found, shapes_of(theirs)):
        raise Misfit(problems)
    return ours, theirs


def revert_layout(tensors: Tensors, config: GPTConfig, layout: Layout) -> Tensors:
    """Convert tensors back to our names and shapes.  Raises Misfit, which uses their names."""
    expected, theirs = check_layout(shapes_of(tensors), config, layout)
    sources = {name: _source(name, layout) for name in expected}
    problems = [f"{name} is missing" for name in {*sources.values()} - tensors.keys()]
    problems += [
        f"{name} is unexpected" for name in tensors if name not in theirs and not _is_neutral(name, tensors, layout)
    ]
    if problems:
        raise Misfit(sorted(problems))
    ours = {name: _reverted(name, tensors[source], config, layout) for name, source in sources.items()}
    for _, block in groupby(ours.items(), lambda item: re.findall(r"blocks\.\d+", item[0])):  # each alone: less memory
        for name, tensor in apply_layout(dict(block), config, layout, config.block_size).items():
            found = tensors.get(name, tensor)
            if found is not tensor and not torch.allclose(found, tensor, 0, 0, equal_nan=True):
                problems.append(f"{name} has values that this GPT has no place for")
    if problems:
        raise Misfit(problems)
    return ours


def _source(name: str, layout: Layout) -> str:
    """The name of their tensor that holds one of ours, or the first that does."""
    if layout.fused_qkv and _leaf(name) in QKV:
        name = name.replace(_leaf(name), QKV[0])
    theirs = _rename(name, layout)
    if layout.head_norms == "listed" and _leaf(name) in ("q_norm", "k_norm"):
        return theirs.replace(".weight", ".norms.0.weight")
    return theirs


def _reverted(name: str, tensor: Tensor, config: GPTConfig, layout: Layout) -> Tensor:
    """One of our tensors, from theirs that holds it; key/value heads stay repeated."""
    leaf = _leaf(name)
    is_fused = layout.fused_qkv and leaf in QKV
    if name.endswith(".weight") and (QKV[0] if is_fused else leaf) in layout.transposed:
        tensor = tensor.T
    if is_fused:
        n_heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        tensor = tensor.split([n * config.head_dim for n in n_heads])[QKV.index(leaf)]
    if layout.adjacent_rope and leaf in ("q_proj", "k_proj"):
        tensor = tensor.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    if layout.head_norms == "stacked" and leaf in ("q_norm", "k_norm"):
        tensor = tensor[0]
    return tensor.contiguous()


def _is_neutral(name: str, tensors: Tensors, layout: Layout) -> bool:
    """Whether a tensor changes nothing: a bias of zeros, or a head that equals the embedding."""
    if name == f"{layout.names['lm_head']}.weight":
        return torch.equal(tensors[name], tensors.get(f"{layout.names['tok_emb']}.weight", tensors[name][:0]))
    return name.endswith(".bias") and not tensors[name].any()
