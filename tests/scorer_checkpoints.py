"""Small random checkpoints of the scorers' real classes, one per transformers scorer, saved as a hub repository is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from torch import nn

from slideredit_rt.shapes.editor_recipe import VOCABULARY
from slideredit_rt.training.embedded.text import build_clip_tokenizer

SIDE = 32
PHRASES = ["curly hair", "a warm smile on the man's face"]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
EYE = {"image_size": SIDE, "patch_size": 8, **TOWER}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def _random_weights(model: nn.Module) -> Any:
    """Wider than an initialisation, whose images would all look alike."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def _save(folder: Path, model: Any, processor: Any, tokenizer: Any = None) -> Path:
    for part in (_random_weights(model), processor, tokenizer):
        if part is not None:
            part.save_pretrained(folder)
    return folder


def save_scorer_checkpoints(root: Path) -> None:
    """Save one checkpoint per scorer, named after it."""
    plain = {"image_mean": MEAN, "image_std": STD}
    square = {"size": {"height": SIDE, "width": SIDE}, **plain}
    cropped = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, **plain}

    words = build_clip_tokenizer(VOCABULARY)
    text = {"vocab_size": len(words), "max_position_embeddings": 24, "eos_token_id": words.eos_token_id, **TOWER}
    config = transformers.CLIPConfig(text_config=text, vision_config=EYE, projection_dim=16)
    _save(root / "clip", transformers.CLIPModel(config), transformers.CLIPImageProcessorPil(**cropped), words)

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([phrase.lower() for phrase in PHRASES] * 50),
        model_writer=model, vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (root / "spiece.model").write_bytes(model.getvalue())
    pieces = transformers.SiglipTokenizer(str(root / "spiece.model"), model_max_length=48)
    config = transformers.SiglipConfig(
        text_config={"vocab_size": len(pieces), "max_position_embeddings": 48, "projection_size": 32, **TOWER},
        vision_config=EYE,
    )
    _save(root / "siglip", transformers.SiglipModel(config), transformers.SiglipImageProcessorPil(**square), pieces)

    letters = [*"abcdefghijklmnopqrstuvwxyz'", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "curly", "hair", "smile", *letters]
    bert = transformers.BertTokenizer(vocab={token: i for i, token in enumerate(vocab)})
    text = {"vocab_size": len(vocab), "max_position_embeddings": 48, "encoder_hidden_size": 32, **TOWER}
    config = transformers.BlipConfig(text_config=text, vision_config=EYE)
    blip = transformers.BlipForImageTextRetrieval(config)
    _save(root / "blip-itm", blip, transformers.BlipImageProcessorPil(**square), bert)

    config = transformers.Dinov2Config(**{k: v for k, v in EYE.items() if k != "intermediate_size"})
    _save(root / "dinov2", transformers.Dinov2Model(config), transformers.BitImageProcessorPil(**cropped))
