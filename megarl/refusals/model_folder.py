"""Refusals of the folder that model.path names: its config.json, weights and tokenizer, and whether they agree.

Weights are judged by the headers of their files: no tensor is read.
"""

from __future__ import annotations

import os
from pathlib import Path

from megarl.checkpoints import STATE, damage, hf_files, is_hf_folder
from megarl.errors import shown
from megarl.refusals.case import Case


def model_path(case: Case) -> str | None:
    path = case.config.model.path
    if not path:
        return "model.path is empty; give a Hugging Face checkpoint folder, e.g. model.path=runs/tiny"
    if not Path(path).exists():
        return f"model.path {path!r} does not exist; nothing is fetched from a hub: give the path of a local folder"
    if not (hf_files(path) / "config.json").is_file():
        return (
            f"model.path {path!r} has no config.json; give a Hugging Face checkpoint folder, or a run's "
            "checkpoints/step_N"
        )
    try:
        read = case.hf
    except ValueError as error:
        return f"model.path {path!r}: config.json is not JSON ({error}); copy the checkpoint again"
    if not isinstance(read, dict):
        return f"model.path {path!r}: config.json holds a {type(read).__name__}; copy the checkpoint again"
    return None


def megatron_checkpoint(case: Case) -> str | None:
    folder = Path(case.config.model.path)
    if is_hf_folder(folder):
        return None
    if not (folder / ".metadata").is_file():
        return f"model.path {str(folder)!r} is not a whole checkpoint, it has no .metadata; give another"
    if (folder / STATE).is_file() and (fault := damage(folder)):
        return f"model.path {str(folder)!r} is damaged ({fault}); copy the checkpoint again, or give another"
    if case.command in ("generate", "eval") and "RANK" in os.environ:  # megarl's own launcher converts it first
        hint = f"python checkpoints_conversion/megatron_to_hf.py --megatron {folder} --out DIR"
        return (
            f"model.path {str(folder)!r} is a Megatron checkpoint, which {case.command} cannot give to vLLM; convert "
            f"it first: {hint}"
        )
    return None


def family(case: Case) -> str | None:
    from megarl.weights.map.weight_map import FAMILIES

    kind = case.hf.get("model_type", "?")
    if not isinstance(kind, str) or kind not in FAMILIES:
        return f"model.path: model_type {shown(kind)} is not supported; supported are {', '.join(sorted(FAMILIES))}"
    return None


def architecture(case: Case) -> str | None:
    _ = case.model  # raises UserError: what the family refuses, by name
    return None


def weights(case: Case) -> str | None:
    """Raises UserError for a file that is missing or cut short, and a tensor that does not fit config.json."""
    folder = Path(case.config.model.path)
    if not is_hf_folder(folder):
        from megarl.weights.files.megatron_folder import MegatronReader  # imports torch

        with MegatronReader(folder, case.weight_map):
            return None
    from megarl.weights.files.hf_index import HfIndex

    index = HfIndex(folder)
    index.carried(case.weight_map)
    if index.left_aside:
        case.notes.append(index.left_aside)
    return None


def served_weights(case: Case) -> str | None:
    """vLLM (default_loader.py) reads every safetensors file, or those of the index where there is one."""
    from megarl.weights.files.hf_index import INDEX, HfIndex, read_index

    folder = Path(case.config.model.path)
    if not is_hf_folder(folder):
        return None  # the first sync brings the weights
    ours = set(HfIndex(folder).files)
    theirs, how = {file.name for file in folder.glob("*.safetensors")}, "too"
    if (folder / INDEX).is_file():
        theirs, how = set(read_index(folder).values()), f"by {INDEX}"
    if theirs == ours:
        return None
    return (
        f"model.path {str(folder)!r}: the trainer reads {', '.join(sorted(ours))}, as transformers does, but vLLM "
        f"reads {', '.join(sorted(theirs - ours))} {how}; move what is stale out of the folder"
    )


def block_fp8(case: Case) -> str | None:
    if not case.hf.get("quantization_config"):
        return None
    path = case.config.model.path
    return (
        f"model.path {path!r} is quantised (quantization_config): vLLM would keep it so, but is sent bfloat16; "
        "convert it first: "
        f"python checkpoints_conversion/hf_to_megatron.py --hf {path} --out DIR, then model.path=DIR"
    )


def deepseek_router(case: Case) -> str | None:
    """The trainer knows no other router for this family; vLLM
    (deepseek_v2.py) takes another where config.json does not say which.
    """
    needed = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    missing = [f'"{key}": "{value}"' for key, value in needed.items() if key not in case.hf]
    if case.hf.get("model_type") != "deepseek_v3" or not missing:
        return None
    return (
        f"model.path {case.config.model.path!r}: vLLM would route otherwise than the trainer; add "
        f"{', '.join(missing)} to its config.json"
    )


def glm_head_dim(case: Case) -> str | None:
    """vLLM (glm4_moe.py) has no default for it, transformers and the trainer hidden_size / num_attention_heads."""
    if case.hf.get("model_type") != "glm4_moe" or "head_dim" in case.hf:
        return None
    size = case.hf["hidden_size"] // case.hf["num_attention_heads"]
    return f'model.path {case.config.model.path!r}: vLLM wants head_dim; add "head_dim": {size} to its config.json'


def tokenizer(case: Case) -> str | None:
    """Raises UserError for one that cannot be read."""
    from megarl.data.tokenizer import code_alone, load_tokenizer, quick_encoder

    model = case.config.model
    folder = hf_files(model.path)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return f"model.path {str(folder)!r} has no tokenizer.json; save the tokenizer beside the weights"
    if sentence := code_alone(model):
        return sentence
    if quick_encoder(model.path) is None:
        load_tokenizer(model)  # imports transformers
    return None


def chat_template(case: Case) -> str | None:
    """Every prompt goes through it. Raises UserError for one that cannot be read."""
    from megarl.data.template import template_fault

    fault = template_fault(case.config.model.path)
    return fault and f"model.path: {fault}"


def ends(case: Case) -> str | None:
    """Raises UserError where no token would end a response."""
    from megarl.data.tokenizer import load_tokenizer
    from megarl.data.vocabulary import declared_ends, vocabulary_of

    model, stops, size = case.config.model, case.config.rollout.stop_token_ids, case.hf["vocab_size"]
    for token in stops:
        if not 0 <= token < size:
            return f"rollout.stop_token_ids {stops}: {token} is not below the model's vocab_size {size}; give its ids"
    if not any(0 <= token < size for token in [*stops, *declared_ends(model.path)]):
        vocabulary_of(case.config, load_tokenizer(model))  # imports transformers
    return None
