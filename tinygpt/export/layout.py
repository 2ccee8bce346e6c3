"""Convert tinygpt's tensors to the layout of another program, and back.

Each step of the conversion moves numbers, copies them or adds neutral ones; it changes none. So the way back is found
by converting row numbers: rows that were copied must be equal, and rows that were added must be neutral, else the
tensors belong to another model. H query heads, G key/value heads, D head_dim, C n_embd.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.export.families import QKV, Layout
from tinygpt.files import some_of
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import TIED
from tinygpt.model.lora import ADAPTER
from tinygpt.model.weights import MOST_SHOWN, Shapes, expected_tensors, misshapen, shapes_of

Pair = tuple[Tensor, Tensor]  # of an adapter: A (rank, in) and B (out, rank)
Tensors = dict[str, Tensor]  # by name, such as "blocks.0.attn.q_proj.weight"

NO_SINK = -1e30  # a logit so low that it takes no probability from the keys


def apply_layout(tensors: Tensors, config: GPTConfig, layout: Layout, n_ctx: int) -> Tensors:
    """A model's tensors with the names and shapes of `layout`, and with `n_ctx` positions if they are learned."""
    if layout.untied and TIED not in tensors:
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
    """The rows of a weight, or of an adapter's B, in the program's order.

    llama.cpp loads rows in the wrong order without complaint and computes nonsense from them.
    """
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
    return name.split(".")[-2:][0]  # a tensor of another program may have no module


def adapter_pairs(adapter: Mapping[str, Tensor], config: GPTConfig, layout: Layout) -> dict[str, Pair]:
    """Each adapted module's A and B, with the names and the row order of a layout.

    If the program has a fused matrix, its adapters are combined into one of higher rank.
    """
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
    others = [
        f"{name} is unexpected" for name in tensors if name not in theirs and not _is_neutral(name, tensors, layout)
    ]
    ours, wrong = _collected(tensors, expected, config, layout)
    if problems := others + wrong:
        raise Misfit(sorted(problems))
    return ours


def _collected(tensors: Tensors, expected: Tensors, config: GPTConfig, layout: Layout) -> tuple[Tensors, list[str]]:
    """Our tensors, collected from theirs, and what is wrong with those.

    Our rows are numbered from 1. The layout moves these numbers as it moves rows; what it adds is below 1.
    """
    ends = [*accumulate(map(len, expected.values()), initial=1)]
    spans = zip(expected.items(), pairwise(ends), strict=True)
    places = {name: torch.arange(*span).view(-1, *[1] * (tensor.ndim - 1)) for (name, tensor), span in spans}
    sizes = [(len(tensor), tensor[0].numel()) for tensor in expected.values()]
    ours = dict[int, Tensor]()
    moved = apply_layout(places, config, layout, config.block_size)
    rows_of = {name: place.flatten() for name, place in moved.items()}
    there = {name: (rows, _as_rows(tensors[name], moved[name])) for name, rows in rows_of.items() if name in tensors}
    for rows, found in there.values():
        for number, here, at in _owners(rows, ends):
            if here.all() and torch.equal(at, torch.arange(sizes[number][0])):
                ours.setdefault(number, found.float())  # in order, as most are: no copy is needed
            else:
                ours.setdefault(number, torch.zeros(sizes[number]))[at] = found[here].float()
    own_rows = {name: rows.clamp(min=0).long() for name, rows in rows_of.items()}  # 0: added rows
    n_times = torch.cat([torch.zeros(2).long(), *(own_rows[name] for name in there)]).bincount(minlength=ends[-1])
    wrong = [f"{name} is missing" for name, at in own_rows.items() if not n_times[at].all()]
    for name in (name for name in there if (n_times[own_rows[name]] > 1).any()):
        rows, found = there[name]
        same = rows[:, None].to(found.dtype).expand_as(found).clone()
        for number, here, at in _owners(rows, ends):
            same[here] = ours[number][at]
        if not torch.allclose(same, found, 0, 0, equal_nan=True):
            wrong.append(f"{name} {'is unexpected' if (rows < 1).any() else 'differs from the weights it must repeat'}")
    made = ((number, *each) for number, each in enumerate(expected.items()) if number in ours)
    return {name: ours[number].reshape(tensor.shape) for number, name, tensor in made}, wrong


def _owners(rows: Tensor, ends: list[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each of our tensors with some of these rows: its number, a mask of them, and their positions in it."""
    owners = torch.bucketize(rows, torch.tensor(ends), right=True) - 1
    for owner in owners[owners >= 0].unique().tolist():
        here = owners == owner
        yield owner, here, rows[here].long() - ends[owner]


def _as_rows(tensor: Tensor, place: Tensor) -> Tensor:
    """Their tensor, with a row for each element of `place`."""
    if tensor.numel() == place.numel():
        return tensor.reshape(-1, 1)
    return tensor if len(tensor) == len(place) else tensor.T


def _is_neutral(name: str, tensors: Tensors, layout: Layout) -> bool:
    """Whether a tensor changes nothing: a bias of zeros, or a head that equals the embedding."""
    if name == f"{layout.names['lm_head']}.weight":
        return torch.equal(tensors[name], tensors.get(f"{layout.names['tok_emb']}.weight", tensors[name][:0]))
    return name.endswith(".bias") and not tensors[name].any()
