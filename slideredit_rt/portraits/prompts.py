"""Prompts of the portraits world as tensors, assembled on the device that trains."""

from __future__ import annotations

import random
from itertools import combinations

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from slideredit_rt.families.flux_kontext import FluxKontext
from slideredit_rt.portraits.world import INSTRUCTIONS
from slideredit_rt.training.embedded.text import Vocabulary

MOST = 3
"""Largest number of instructions in a prompt."""

_TEXTS = tuple(i.text for i in INSTRUCTIONS)
# Rows of the table of segments that follow those of the instructions.
_AND, _NOTHING, _NEUTRAL, _END = range(len(_TEXTS), len(_TEXTS) + 4)
_POOLED = 1024
# Words in two pieces, like most words of a real prompt.
_SPLIT = ("▁back", "ground", "▁sun", "glasses", "▁surpris", "ed", "▁long", "er", "▁old", "▁big", "ger")
_WORDS = sorted(
    {word for text in _TEXTS for word in text.split()} - {"background", "sunglasses", "surprised", "longer", "older"}
)

VOCABULARY = Vocabulary(
    prompts=[f"{a.text} and {b.text}" for a in INSTRUCTIONS for b in INSTRUCTIONS if a.attribute != b.attribute],
    pieces=(*(f"▁{word}" for word in (*_WORDS, "and", "keep", "image", "same")), *_SPLIT),
    size=420,
    rows=24,
)


def some_prompts(number: int) -> list[str]:
    """Return prompts of zero to three instructions, the same for the same number."""
    rng = random.Random("portraits/prompts")
    fitting = [
        one for count in (1, 2, 3) for one in combinations(INSTRUCTIONS, count) if len({i.attribute for i in one}) == count
    ]
    prompts = ["", FluxKontext.neutral_prompt]
    while len(prompts) < number:
        chosen = list(rng.choice(fitting))
        rng.shuffle(chosen)
        prompts.append(" and ".join(i.text for i in chosen))
    return prompts


class Prompts:
    """Token ids and pooled vectors of prompts, from tables that are made once.

    The T5 tokenizer splits words apart from each other, so a prompt has the tokens of its instructions one after the other.

    Args:
        pipeline: Pipeline with the tokenizers and the CLIP encoder.
        device: Device of the tables, and of the pipeline.
    """

    def __init__(self, pipeline: FluxKontextPipeline, device: torch.device) -> None:
        tokenizer = pipeline.tokenizer_2
        texts = (*_TEXTS, "and", "", FluxKontext.neutral_prompt)
        ids = [list(tokenizer(text, add_special_tokens=False).input_ids) for text in texts] + [[tokenizer.eos_token_id]]
        width = max(map(len, ids))
        self.padding = int(tokenizer.pad_token_id)
        self.lengths = torch.tensor([len(one) for one in ids], device=device)
        self.tokens = torch.tensor([one + [self.padding] * (width - len(one)) for one in ids], device=device)
        per_instruction = sorted((len(one) for one in ids[: len(_TEXTS)]), reverse=True)[:MOST]
        self.longest = sum(per_instruction) + (MOST - 1) * len(ids[_AND]) + 1
        """An upper bound of the tokens of a prompt, the end mark included."""
        prompts = some_prompts(_POOLED)
        with torch.no_grad():
            parts = [pipeline._get_clip_prompt_embeds(prompts[i : i + 128], device=device) for i in range(0, _POOLED, 128)]
        self.pooled = torch.cat(parts).float()

    def draw_pooled(self, count: int, generator: torch.Generator) -> Tensor:
        """Return pooled vectors of random prompts, `[count, P]`."""
        chosen = torch.randint(len(self.pooled), (count,), generator=generator, device=self.pooled.device)
        return self.pooled[chosen]

    def draw_order(self, strengths: Tensor, generator: torch.Generator) -> Tensor:
        """Put the instructions of each prompt in a random order. Half of the prompts without any are the neutral one.

        Args:
            strengths: Strength of each instruction, `[N, I]`; up to three of a row are not 0.
            generator: Generator on the device of the tables.

        Returns:
            Segments of the table, `[N, 3]`.
        """
        device = self.tokens.device
        score = (strengths > 0) * (1 + torch.rand(strengths.shape, generator=generator, device=device))
        top = score.topk(MOST, dim=1)
        order = torch.where(top.values > 0, top.indices, _NOTHING)
        neutral = torch.rand(len(order), generator=generator, device=device) < 0.5
        first = torch.where((order[:, 0] == _NOTHING) & neutral, _NEUTRAL, order[:, 0])
        return torch.cat([first[:, None], order[:, 1:]], dim=1)

    def nothing(self, count: int) -> Tensor:
        """Return the order of `count` empty prompts."""
        return torch.full((count, MOST), _NOTHING, device=self.tokens.device)

    def ids(self, order: Tensor, rows: int) -> Tensor:
        """Return T5 token ids, `[N, rows]`, as the tokenizer gives them for the whole prompts.

        Args:
            order: Segments of each prompt, `[N, 3]`.
            rows: Number of tokens, at least `longest`.
        """
        joint = torch.where(order[:, 1:] == _NOTHING, _NOTHING, _AND)
        end = torch.full_like(order[:, :1], _END)
        parts = [order[:, :1], *(p for i in range(MOST - 1) for p in (joint[:, i : i + 1], order[:, i + 1 : i + 2])), end]
        segments = torch.cat(parts, dim=1)
        lengths = self.lengths[segments]
        starts = lengths.cumsum(1) - lengths
        place = torch.arange(self.tokens.shape[1], device=order.device)
        inside = place < lengths[:, :, None]
        # What lies beyond the end of a segment goes to a last column, which is dropped.
        where = torch.where(inside, starts[:, :, None] + place, rows)
        ids = torch.full((len(order), rows + 1), self.padding, device=order.device)
        return ids.scatter_(1, where.flatten(1), self.tokens[segments].flatten(1))[:, :rows]
