"""Tokenizers and text encoders of an embedded editor.

Three choices make the text side behave like the large model's:

- FLUX gives text rows no positions, so the T5 encoder must bind "red" to "circle". Its attention is limited to the next two
  tokens, so rows of one instruction contain no information about another instruction.
- Training uses the pooled CLIP vector of a different prompt (see `slideredit_rt.training.embedded.flow`). A pooled vector
  cannot be masked, so the instruction has to be encoded in the text rows, as SliderEdit assumes (paper, section on selective
  tokens).
- Some words are split into two pieces, like most words of a real prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from slideredit_rt.families.flux_kontext import FluxKontext

TEXT_WIDTH = 128
POOLED_WIDTH = 32

# Text that gives the tokenizers letters and word pieces beyond the few words of a world.
_CORPUS = """
Turn the man's hair curly, then give him a beard and a warm smile. Make her look younger and remove the glasses.
Add freckles, change the eye colour to green, and put a small silver ring on the left hand.
Replace the sky with a dramatic sunset; keep the houses, the trees and the people exactly as they are.
Convert this photograph into a watercolour painting with soft edges, muted tones and visible brush strokes.
Zoom out until the whole mountain is visible, blur the background, and sharpen the face in the foreground.
"Surprised" expression (mouth open), raised eyebrows: 30% stronger than before! What about 2 or 3 of them?
Let the dog wear a red-and-white striped jumper while the cat sleeps quietly under the wooden kitchen table.
Increase brightness, lower contrast, add fog; quickly fix the exposure of every pixel just below the horizon.
""".strip()


@dataclass(frozen=True)
class Vocabulary:
    """Text that the tokenizers of a world are trained on.

    Attributes:
        prompts: Prompts of the world.
        pieces: Pieces that the T5 tokenizer shall have, with the mark of a word start.
        size: Number of pieces that the T5 tokenizer learns, without `pieces`.
        rows: Largest number of tokens of a prompt, the end mark included.
    """

    prompts: Sequence[str]
    pieces: Sequence[str]
    size: int = 400
    rows: int = 24

    @property
    def corpus(self) -> list[str]:
        """The prompts, the neutral prompt and general text."""
        return [*self.prompts, FluxKontext.neutral_prompt, *(line for line in _CORPUS.splitlines() for _ in range(20))]


def build_t5_tokenizer(vocabulary: Vocabulary) -> T5TokenizerFast:
    """Train a Unigram tokenizer that behaves like T5's: word-start marks, NFKC, `</s>` appended, no byte fallback."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary.size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(vocabulary.corpus, trainer)
    scored = [(token, round(score, 6)) for token, score in json.loads(trained.to_str())["model"]["vocab"]]
    # The trainer orders equal scores at random, but token ids must not depend on the run.
    pieces = {token: score for token, score in sorted(scored, key=lambda p: (-p[1], p[0])) if token not in special}
    pieces |= dict.fromkeys(vocabulary.pieces, -3.0)
    tokenizer = T5TokenizerFast(
        vocab=[(token, 0.0) for token in special] + list(pieces.items()), extra_ids=0, model_max_length=vocabulary.rows
    )
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def build_clip_tokenizer(vocabulary: Vocabulary) -> CLIPTokenizer:
    """Train a byte-level BPE tokenizer with CLIP's rules: lower case, `</w>` at word ends, 77 positions."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    trained.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator(vocabulary.corpus, trainer)
    model = json.loads(trained.to_str())["model"]
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokens = set(model["vocab"]) - set(special)
    tokens |= {f"{token}</w>" for token in tokens if len(token) == 1}
    # Sorted, because the trainer's order differs between runs. Special tokens come last, as in CLIP's own vocabulary.
    ordered = sorted(tokens, key=lambda t: (len(t), t)) + special
    merges = sorted((tuple(m) for m in model["merges"]), key=lambda m: (len(m[0] + m[1]), m))
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(ordered)}, merges=merges, model_max_length=77)


def build_text_encoders(t5: T5TokenizerFast, clip: CLIPTokenizer) -> tuple[T5EncoderModel, CLIPTextModel]:
    """Build a one-layer T5 encoder that attends to the next two tokens, and a small random CLIP text model."""
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=1,
            num_heads=4,
            relative_attention_num_buckets=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    attention = text_encoder_2.encoder.block[0].layer[0].SelfAttention
    bias = attention.relative_attention_bias.weight.data
    offsets = torch.tensor([0, 1, 2])
    visible = attention._relative_position_bucket(offsets, bidirectional=True, num_buckets=32)
    hidden = torch.ones(len(bias), dtype=torch.bool)
    hidden[visible] = False
    # The value is finite so that the weights can be cast to float16. The softmax still gives exactly 0.
    bias[hidden] = -1e4
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=POOLED_WIDTH,
            intermediate_size=64,
            projection_dim=POOLED_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    return text_encoder_2, text_encoder
