"""Texts for networks of transformers that read them: tokens and embeddings, by the tokenizer of a folder."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .offline import offline

TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


@torch.no_grad()
def read_text(folder: Path, model: Any, text: str) -> Tensor:
    """The embedding of a text, (1, D)."""
    length, padded = model.config.text_config.max_position_embeddings, "siglip" in model.config.model_type
    tokens = _tokens(folder, text, length, padded)
    return text_features(model, tokens["input_ids"])


def text_model(model: Any) -> Any:
    """The part of a network that reads texts."""
    return getattr(model, "clip", model)


def text_features(model: Any, tokens: Tensor) -> Tensor:
    """The embedding of a text that is given as tokens (1, n), (1, D)."""
    features = model.get_text_features(input_ids=tokens)  # no mask: SigLIP was trained to read its padding
    return features if isinstance(features, Tensor) else features.pooler_output


def task_tokens(folder: Path, length: int) -> Tensor:
    """The task that OneFormer is given, (1, length)."""
    tokens = _tokens(folder, "the task is semantic", length, padded=True)
    return tokens["input_ids"] * tokens["attention_mask"]


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, AttributeError):  # of a class that another release has; tokenizer.json is all that a fast one does
        if not (folder / "tokenizer.json").exists():
            raise
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _tokens(folder: Path, text: str, length: int, padded: bool) -> Mapping[str, Tensor]:
    if not any((folder / name).exists() for name in TOKENIZERS):  # transformers 5 would make one that knows no word
        raise FileNotFoundError(f"{folder.name} has no tokenizer: expected one of {', '.join(TOKENIZERS)}; copy the "
                                "tokenizer's files from the network's own page")
    try:
        with offline():
            tokenizer = _tokenizer(folder)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"the tokenizer in {folder.name} cannot be read ({' '.join(str(error).split())[:150]}): copy its "
                         "files again from the network's own page") from error
    return tokenizer([text], padding="max_length" if padded else False, truncation=True, max_length=length,
                     return_tensors="pt", return_attention_mask=True)
