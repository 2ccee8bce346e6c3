"""An adapter on its own, for those who have its base: a folder of the PEFT library, and a GGUF file.

https://github.com/huggingface/peft and llama.cpp's convert_lora_to_gguf.py. Where a program has fused matrices, their
adapters are stacked into one of higher rank; where it orders rows otherwise, so are the rows of B.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.export.base import BASE_DIR
from tinygpt.export.card import ADAPTER_CARD, TRAINING_FILE
from tinygpt.export.config import ExportParams
from tinygpt.export.family import QKV, Layout, family_of
from tinygpt.export.gguf import write_gguf
from tinygpt.export.gguf_families import LLAMA_CPP
from tinygpt.export.hf_families import TRANSFORMERS
from tinygpt.export.layout import leaf, pair_rope, rename, repeat_kv
from tinygpt.files import atomic_folder, atomic_write, human_bytes, must_exist, read_json, sha256_file, write_json
from tinygpt.model.config import GPTConfig
from tinygpt.model.lora import ADAPTER
from tinygpt.model.weights import WEIGHTS_FILE, load_tensors, save_tensors

ADAPTER_FILE = "adapter.safetensors"
PEFT_FILE = "adapter_model.safetensors"
BASE_HF = "data/base-hf"  # the base as a folder of transformers, which the README tells how to write

Pair = tuple[Tensor, Tensor]  # A (rank, in) and B (out, rank)


def export_adapters(folder: Path, model_dir: Path, config: GPTConfig, params: ExportParams) -> list[str]:
    """Write those of a model that was trained with adapters, for the programs that know its base as it is.

    Returns a line for each file, none for a model without adapters.  Raises UserError when data/base is another model.
    """
    training = read_json(model_dir / TRAINING_FILE, stage="train")
    lora = training["lora"]
    if lora is None:
        return []
    base = BASE_DIR / WEIGHTS_FILE
    if not base.exists() or sha256_file(base) != training.get("base_sha256"):
        raise UserError(
            f"{BASE_DIR} is not the model that these adapters were trained on: put that one back, or run `dvc repro "
            "train` to train adapters of this one"
        )
    adapter = load_tensors(must_exist(model_dir / ADAPTER_FILE, stage="train"))
    files = []
    if params.hf:
        export_peft(folder / "peft", adapter, config, lora)
        files.append(folder / "peft" / PEFT_FILE)
    if params.gguf:
        files.append(folder / "gguf" / "tinygpt-lora.gguf")
        export_gguf_adapter(files[-1], adapter, config, lora)
    return [
        f"{file.relative_to(folder)} {human_bytes(file.stat().st_size)}, adapters of rank {lora['rank']} for data/base"
        for file in files
    ]


def export_peft(folder: Path, adapter: Mapping[str, Tensor], config: GPTConfig, lora: Mapping[str, Any]) -> None:
    """Write a folder for PeftModel.from_pretrained; `adapter` is by our names, `lora` has the params of training."""
    family, _ = family_of(TRANSFORMERS, config)
    pairs = adapter_pairs(adapter, config, family.layout)
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    tensors = {
        f"base_model.model.{name}.{part}.weight": tensor
        for name, pair in pairs.items()
        for part, tensor in zip(ADAPTER, pair, strict=True)
    }
    with atomic_folder(folder) as partial:
        save_tensors(partial / PEFT_FILE, tensors)
        document = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": BASE_HF,
            "r": lora["rank"],
            "lora_alpha": lora["alpha"],
            "lora_dropout": lora["dropout"],
            "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != lora["rank"]},
            "fan_in_fan_out": bool(family.layout.transposed),
            "bias": "none",
            "inference_mode": True,
        }
        write_json(partial / "adapter_config.json", document)
        (partial / "README.md").write_text(ADAPTER_CARD, encoding="utf-8")


def export_gguf_adapter(path: Path, adapter: Mapping[str, Tensor], config: GPTConfig, lora: Mapping[str, Any]) -> None:
    """Write a file for llama.cpp's --lora."""
    family, _ = family_of(LLAMA_CPP, config)
    with atomic_write(path, "wb") as file:
        writer = GGUFWriter(file.name, family.name)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", lora["alpha"])
        for name, (a, b) in adapter_pairs(adapter, config, family.layout).items():
            writer.add_tensor(f"{name}.weight.lora_a", a.detach().float().cpu().numpy())
            writer.add_tensor(f"{name}.weight.lora_b", b.detach().float().cpu().numpy())
        write_gguf(writer)


def adapter_pairs(adapter: Mapping[str, Tensor], config: GPTConfig, layout: Layout) -> dict[str, Pair]:
    """Each adapted module's A and B, by the names and in the row order of a layout."""
    pairs = {
        name.removesuffix(f".{ADAPTER[0]}.weight"): (tensor, adapter[name.replace(*ADAPTER)])
        for name, tensor in adapter.items()
        if name.endswith(f".{ADAPTER[0]}.weight")
    }
    ordered = {name: (a, _ordered(name, b, config, layout)) for name, (a, b) in pairs.items()}
    if layout.fused_qkv:
        ordered = _fused(ordered, config, layout)
    return {
        rename(f"{name}.weight", layout).removesuffix(".weight"): (a.contiguous(), b.contiguous())
        for name, (a, b) in ordered.items()
    }


def _ordered(name: str, b: Tensor, config: GPTConfig, layout: Layout) -> Tensor:
    weight = f"{name}.weight"
    b = repeat_kv(weight, b, config) if layout.repeated_kv else b
    return pair_rope(weight, b, config) if layout.adjacent_rope else b


def _fused(pairs: dict[str, Pair], config: GPTConfig, layout: Layout) -> dict[str, Pair]:
    """Adapters of queries, keys and values as one of the fused matrix: As below each other, Bs in blocks.

    The rank grows, and with it the divisor of alpha, for which B is made larger.
    """
    fused: dict[str, Pair] = {}
    n_kv_head = config.n_head if layout.repeated_kv else config.n_kv_head
    rows = dict(zip(QKV, (config.n_head, n_kv_head, n_kv_head), strict=True))
    for name, (a, b) in pairs.items():
        if leaf(f"{name}.weight") not in QKV:
            fused[name] = (a, b)
            continue
        owner = name.rpartition(".")[0]
        parts = [pairs.get(f"{owner}.{part}") for part in QKV]
        zero = [(a[:0], b.new_zeros(rows[part] * config.head_dim, 0)) for part in QKV]
        there = [part or none for part, none in zip(parts, zero, strict=True)]
        all_a = torch.cat([part[0] for part in there])
        all_b = torch.block_diag(*(part[1] for part in there)) * (len(all_a) / len(a))
        fused[f"{owner}.{QKV[0]}"] = (all_a, all_b)
    return fused
