"""Write and read folders of transformers (https://github.com/huggingface/transformers), without that library.

    AutoModelForCausalLM.from_pretrained("data/export/hf"), AutoTokenizer.from_pretrained("data/export/hf")

load such a folder offline and without remote code. Settings whose default differs between model classes, or between
transformers 4 and 5, are written out, so that every release reads the same model. A folder is refused if it asks for
what this GPT does not compute, such as scaled rotary positions: it would load and compute something else.
"""

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from tinygpt.errors import UserError, shown
from tinygpt.export.card import CARDS
from tinygpt.export.families import ANY_BIAS, FULL, family_of, misfit, switches_of
from tinygpt.export.hf_families import ACTIVATIONS, TRANSFORMERS, HFFamily
from tinygpt.export.layout import Misfit, adapter_pairs, apply_layout, check_layout, revert_layout
from tinygpt.files import atomic_folder, must_exist, read_object, write_json
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import ADAPTER
from tinygpt.model.weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Shapes,
    load_tensors,
    model_tensors,
    not_weights,
    read_shapes,
    save_tensors,
)
from tinygpt.params import ParamsError, from_mapping
from tinygpt.paths import TOKENIZER_FILE
from tinygpt.tokenizer import Tokenizer

OTHER_NAMES = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}  # of the same activation
DERIVED_KEYS = ("num_key_value_heads", "head_dim", "n_inner")  # if missing, derived as in our params
PLAIN_ROPE = {"rope_scaling": None, "partial_rotary_factor": 1.0, "rope_type": "default"}  # of all our models
PEFT_FILE = "adapter_model.safetensors"
BASE_HF = "data/base-hf"  # the base as a folder of transformers; the card says how to write it
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # in older files; not weights


def export_hf(model: GPT, tokenizer: Tokenizer, tokenizer_dir: str | Path, folder: str | Path) -> tuple[str, int]:
    """Write the folder, whole or not at all; tokenizer.json is copied from `tokenizer_dir` as it is.

    Returns the model_type and the tokens of context, fewer than the model's if the class lacks its window.
    """
    family, n_ctx = family_of(TRANSFORMERS, model.config)
    source = must_exist(Path(tokenizer_dir) / TOKENIZER_FILE, stage="train_tokenizer")
    with atomic_folder(folder) as partial:
        write_json(partial / CONFIG_FILE, _model_config(model.config, family, tokenizer, n_ctx))
        write_json(partial / "generation_config.json", _special_ids(tokenizer))
        write_json(partial / "tokenizer_config.json", _tokenizer_config(tokenizer, n_ctx))
        shutil.copyfile(source, partial / TOKENIZER_FILE)
        save_tensors(partial / WEIGHTS_FILE, apply_layout(model_tensors(model), model.config, family.layout, n_ctx))
    return family.name, n_ctx


def _model_config(config: GPTConfig, family: HFFamily, tokenizer: Tokenizer, n_ctx: int) -> dict[str, Any]:
    return {
        "architectures": [family.cls],
        "model_type": family.name,
        "vocab_size": config.vocab_size,
        **family.document(config, n_ctx),
        family.eps: config.norm_eps,
        "tie_word_embeddings": config.tie_weights,  # the classes disagree on the default
        **_special_ids(tokenizer),
        "use_cache": True,
        "torch_dtype": "float32",  # transformers 5 calls it dtype and reads both
    }


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def _tokenizer_config(tokenizer: Tokenizer, n_ctx: int) -> dict[str, Any]:
    names: dict[int | None, str] = {id: name for name, id in tokenizer.special_tokens.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the model's own class would rebuild the pre-tokenizer
        "model_max_length": n_ctx,
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "pad_token": names.get(tokenizer.pad_id),
        "unk_token": names.get(tokenizer.unk_id),
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }


def export_peft(folder: Path, adapter: Mapping[str, Tensor], config: GPTConfig, lora: Mapping[str, Any]) -> None:
    """Write a folder for PEFT (https://github.com/huggingface/peft); `lora` has the params of the training."""
    family, _ = family_of(TRANSFORMERS, config)
    pairs = adapter_pairs(adapter, config, family.layout)
    ranks = {name: b.size(1) for name, (_, b) in pairs.items()}
    tensors = {
        f"base_model.model.{name}.{part}.weight": tensor
        for name, pair in pairs.items()
        for part, tensor in zip(ADAPTER, pair, strict=True)
    }
    embedding = f"base_model.model.{family.layout.names['tok_emb']}.lora_"
    if f"{embedding}A.weight" in tensors:
        tensors[f"{embedding}embedding_A"] = tensors.pop(f"{embedding}A.weight").T.contiguous()
        tensors[f"{embedding}embedding_B"] = tensors.pop(f"{embedding}B.weight")
    with atomic_folder(folder) as partial:
        save_tensors(partial / PEFT_FILE, tensors)
        document = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": BASE_HF,
            "r": lora["rank"],
            "lora_alpha": lora["alpha"],
            "lora_dropout": lora["dropout"],
            "target_modules": sorted(pairs),  # whole names: gpt2 has two modules named c_proj
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != lora["rank"]},
            "fan_in_fan_out": bool(family.layout.transposed),
            "bias": "none",
            "inference_mode": True,
        }
        write_json(partial / "adapter_config.json", document)
        shutil.copyfile(CARDS / "adapters.md", partial / "README.md")


def read_hf(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config of a folder, and its tensors in float32, by our names.  Raises UserError with all that is wrong."""
    path = folder / CONFIG_FILE
    document = _read_json(path)
    families = {family.name: family for family in TRANSFORMERS.families}
    kind = document.get("model_type")
    if (family := families.get(str(kind))) is None:
        hint = "" if "model_type" in document else ", as tinygpt's own have none: for those, `promote`"
        raise UserError(f"{path} has model_type {shown(kind)} (supported: {', '.join(families)}){hint}")
    config = _read_config(path, document, family)
    shapes = {path: read_shapes(path) for path in _weight_files(folder)}
    misfits: list[Misfit] = []
    try:
        tensors = _read_tensors(shapes, config, family)
        for bias in (bias for bias in ANY_BIAS if bias in family.switches["bias"]):
            try:  # the fewest biases that have a place for all that is not zero
                biased = replace(config, bias=bias)
                return biased, revert_layout(tensors, biased, family.layout)
            except Misfit as misfit:
                misfits.append(misfit.with_traceback(None))  # its frames would keep another copy of all tensors
        # the one with the fewest problems; of equal ones, that with the most biases
        raise min(reversed(misfits), key=lambda misfit: misfit.n_problem)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _read_config(path: Path, document: Mapping[str, Any], family: HFFamily) -> GPTConfig:
    """The config, with bias still to be found.  Raises UserError with all that is wrong with the document."""
    problems: list[str] = []
    try:
        found = {**family.silent, **document, **(document.get("rope_parameters") or {})}
        fixed = {**PLAIN_ROPE, **family.fixed}
        odd = [key for key, value in fixed.items() if found.get(key, value) != value]
        problems += [f"{key}={found[key]}, not {fixed[key]}" for key in odd]
        config = from_mapping(GPTConfig, _fields(document, family), prefix="model.")
        ours = switches_of(config)
        if different := ", ".join(f"{key}: {ours[key]}" for key in misfit(ours, {**family.switches, **family.read})):
            problems.append(f"a {family.name} with {different} would compute something else here")
    except KeyError as error:
        problems.append(f"it has no {error.args[0]}")
    except (TypeError, AttributeError) as error:
        problems.append(f"a value has the wrong type ({error})")
    except ParamsError as error:
        problems += error.problems
    if problems:
        raise UserError(f"{path} is not a model that tinygpt supports: {'; '.join(problems)}")
    return config


def _fields(document: Mapping[str, Any], family: HFFamily) -> dict[str, Any]:
    """The fields of our config, with bias still to be found.  Raises KeyError with a key that the document lacks."""
    found = {**family.silent, **document}
    rope = {**document, **(document.get("rope_parameters") or {})}
    sizes: dict[str, Any] = {
        ours: document.get(theirs) or None if theirs in DERIVED_KEYS else document[theirs]
        for ours, theirs in family.sizes.items()
    }
    has_window = family.switches["window"] != (FULL,)  # the other classes ignore these keys
    if "use_sliding_window" in family.silent:
        has_window = has_window and found["use_sliding_window"]
    window = found.get("sliding_window") if has_window else None
    window = window if window and window < sizes["block_size"] else None
    layer_types = document.get("layer_types") if window and family.layer_types != "ignored" else None
    if window and family.layer_types == "required" and not layer_types:
        raise KeyError("layer_types")
    full_every = _full_every(layer_types, sizes["n_layer"])
    if full_every == 1:  # no layer has a window
        window = full_every = None
    return {
        "n_kv_head": None,
        "head_dim": None,
        **sizes,
        "position": family.switches["position"][0],
        "rope_theta": rope.get("rope_theta", 10000.0),
        "norm": family.switches["norm"][0],
        "norm_eps": document[family.eps],
        "mlp": _mlp(document[family.activation_key], family),
        "parallel_block": document.get("use_parallel_residual", family.switches["parallel_block"][0]),
        "window": window,
        "full_every": full_every,
        "bias": "none",
        "qk_norm": document.get("qk_layernorm", family.switches["qk_norm"][0]),
        "tie_weights": found.get("tie_word_embeddings", False),
        "dropout": 0.0,
        "attention": "sdpa",
        "vocab_size": document["vocab_size"],
    }


def _mlp(activation: str, family: HFFamily) -> str:
    mlps = {ACTIVATIONS[mlp]: mlp for mlp in family.switches["mlp"]}
    name = OTHER_NAMES.get(activation, activation)
    if name not in mlps:
        raise ParamsError([f"it has the activation {activation} (supported: {', '.join(mlps)})"])
    return mlps[name]


def _full_every(layer_types: list[str] | None, n_layer: int) -> int | None:
    """The n for which every n-th layer sees everything; None if none does."""
    if layer_types and (len(layer_types) != n_layer or not {*layer_types} <= {"full_attention", "sliding_attention"}):
        raise ParamsError(["layer_types must give full_attention or sliding_attention for each layer"])
    full = [i + 1 for i, kind in enumerate(layer_types or []) if kind == "full_attention"]
    if not full:
        return None
    if full != [*range(full[0], n_layer + 1, full[0])]:
        raise ParamsError(["layer_types must have full_attention in every n-th layer"])
    return full[0]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path} not found: give a folder saved by transformers")
    return read_object(path, remedy="give a folder saved by transformers")


def _read_tensors(shapes: Mapping[Path, Shapes], config: GPTConfig, family: HFFamily) -> dict[str, Tensor]:
    """The tensors of these files; all shapes must fit the config before any data is read."""
    if twice := [name for name, n in Counter(chain.from_iterable(shapes.values())).items() if n > 1]:
        raise UserError(f"{len(twice)} tensors are in two files, such as {twice[0]}")
    found = {name: shape for each in shapes.values() for name, shape in each.items()}
    whole = family.layout.names["tok_emb"] + ".weight"  # the oldest files lack the prefix, such as "transformer."
    prefix = whole.partition(".")[0] + "." if whole.partition(".")[2] in found else ""
    names = {name: prefix + name for name in found if not name.endswith(BUFFERS)}
    check_layout({theirs: found[name] for name, theirs in names.items()}, config, family.layout)
    tensors = {name: tensor for path in shapes for name, tensor in load_tensors(path).items() if name in names}
    if problems := not_weights(tensors):
        raise UserError("; ".join(problems))
    return {names[name]: tensor.float() for name, tensor in tensors.items()}


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS_FILE}.index.json"
    if not index.exists():
        return [folder / WEIGHTS_FILE]
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index} has no weight_map from tensors to files")
    if outside := sorted(name for name in files.values() if Path(name).name != name):
        raise UserError(f"{index} names {shown(outside[0])}, which is not a file in its folder")
    return [folder / name for name in sorted(set(files.values()))]
