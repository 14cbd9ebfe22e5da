"""A drop-in replacement for the SliderEdit authors' FLUX.1-Kontext pipeline that uses this package's masked linears."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slideredit_rt.adapters import fit_adapter, load_adapter
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Kind, get_family
from slideredit_rt.images import read_images
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.sliders import Slider
from slideredit_rt.spans import combine_row_scale, find_spans, normalise, row_mask


class SliderEditFluxKontextPipeline(FluxKontextPipeline):
    """`FluxKontextPipeline` with SliderEdit adapters and the interface of the released code (repository ArmanZarei/SliderEdit).

    Example::

        pipe = SliderEditFluxKontextPipeline.from_pretrained("black-forest-labs/FLUX.1-Kontext-dev")
        pipe.load_stlora("stlora.pt")
        pipe(image=image, prompt="make him smile and make his hair curly",
             subprompts_list=["make him smile", "make his hair curly"], slider_alpha_list=[0.5, -0.5]).images[0]

    An alpha of 1 suppresses an instruction, 0 gives the base model bit for bit, and values below 0 exaggerate. In float32 the
    images equal those of the released code up to rounding, with these differences:

    - A sub-prompt that occurs n times in the prompt can be listed n times, one alpha per occurrence from left to right. The
      released code always uses the first occurrence.
    - Sub-prompts that share a token are refused; the released code multiplies their alphas.
    - Sub-prompts are found by characters, so adjacent quotes or brackets, which change the tokens, do not matter. A sub-prompt
      that is cut off by truncation is refused.
    - Alphas are float32. The released code rounds those of sub-prompts to bfloat16 for any pipeline dtype.
    - Lists of prompts and images, `num_images_per_prompt` and any `max_sequence_length` work. The released mask has one row
      and the tokenizer's maximum length.
    - With `prompt_2`, sub-prompts are looked up in it, because the T5 encoder reads it.
    - The negative pass of true CFG runs without the adapter.
    - `lora_dropout` has no effect, because dropout belongs to training. The released code leaves it on.
    - Images may be paths and PIL images of any mode; the released code takes RGB only.
    - An image that contains NaN or infinity raises an error instead of turning black.
    - The pipeline is thread-safe: concurrent calls run one after the other.
    """

    _backbone: SliderBackbone | None = None
    _hook: RemovableHandle | None = None
    _row_scale: Tensor | None = None
    _text_ids: Sequence[Tensor] = ()

    _lock: threading.RLock

    def __new__(cls, *args: Any, **kwargs: Any) -> SliderEditFluxKontextPipeline:
        # Not in __init__, because diffusers derives a pipeline's components from the signature of __init__.
        self: SliderEditFluxKontextPipeline = super().__new__(cls)
        self._lock = threading.RLock()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}  # each copy gets its own lock

    def load_gstlora(self, ckpt: str | Path) -> None:
        """Load a GST adapter in place of the current adapter.

        Args:
            ckpt: Folder with `pytorch_lora_weights.safetensors`, or anything that `slideredit_rt.adapters.load_adapter` reads.

        Raises:
            SliderEditError: The adapter does not exist, is an ST adapter, or does not fit this transformer.
        """
        self._load(ckpt, "gst", None)

    def load_stlora(self, ckpt: str | Path, lora_rank: int | None = None, lora_dropout: float = 0.0) -> None:
        """Load an ST adapter in place of the current adapter.

        Args:
            ckpt: The authors' `torch.save`d dictionary, or anything that `slideredit_rt.adapters.load_adapter` reads.
            lora_rank: Expected rank; None accepts any.
            lora_dropout: Accepted for compatibility; has no effect.

        Raises:
            SliderEditError: The adapter does not exist, is a GST adapter, has another rank, or does not fit this transformer.
        """
        if not 0 <= lora_dropout <= 1:
            raise SliderEditError(f"lora_dropout is {lora_dropout}; expected a probability, such as 0")
        self._load(ckpt, "st", lora_rank)

    def _load(self, ckpt: str | Path, kind: Kind, rank: int | None) -> None:
        family = get_family("flux_kontext")
        adapter = load_adapter(ckpt, family)
        if adapter.kind != kind:
            raise SliderEditError(
                f"adapter {adapter.source!r} is of kind {adapter.kind}, not {kind}; load it with load_{adapter.kind}lora"
            )
        if rank is not None and rank != adapter.rank:
            raise SliderEditError(f"adapter {adapter.source!r} has rank {adapter.rank}, not {rank}; leave lora_rank out")
        fit_adapter(adapter, family, self.transformer)  # a refused adapter must leave the current one in place
        with self._lock:
            self.unload_slideredit_lora()
            self._backbone = SliderBackbone(family, self.transformer, adapter)
            self._hook = self.transformer.register_forward_pre_hook(self._scale_rows, with_kwargs=True)

    def unload_slideredit_lora(self) -> None:
        """Remove the adapter and restore the base model's own linears. Does nothing if no adapter is loaded."""
        with self._lock:
            if self._backbone is not None and self._hook is not None:
                self._hook.remove()
                self._backbone.remove()
            self._backbone = self._hook = None

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Encode a prompt; see `FluxKontextPipeline.encode_prompt`."""
        with self._lock:
            encoded: tuple[Tensor, Tensor, Tensor] = super().encode_prompt(*args, **kwargs)
            self._text_ids = [*self._text_ids, encoded[2]]
        return encoded

    def _scale_rows(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the row scales of this pass before the transformer runs (a forward pre-hook)."""
        assert self._backbone is not None
        row_scale = self._row_scale
        # The negative prompt is encoded second. Its position ids identify it: callbacks may replace any other tensor.
        if row_scale is None or any(kwargs["txt_ids"] is ids for ids in self._text_ids[1:]):
            self._backbone.set_scales(None, 0, 0)
            return
        text_rows, image_rows = kwargs["encoder_hidden_states"].shape[1], kwargs["hidden_states"].shape[1]
        if self._backbone.kind == "gst":
            row_scale = row_scale.expand(-1, text_rows + image_rows).contiguous()
        self._backbone.set_scales(row_scale.to(kwargs["hidden_states"].device), text_rows, image_rows)

    def __call__(
        self,
        image: Any = None,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        *,
        slider_alpha: float | Sequence[float] | None = None,
        subprompts_list: Sequence[str] | Sequence[Sequence[str]] | None = None,
        slider_alpha_list: Sequence[float] | Sequence[Sequence[float]] | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 512,
        **kwargs: Any,
    ) -> Any:
        """Edit images. Without an adapter this is `FluxKontextPipeline.__call__`.

        Args:
            image: Anything that diffusers takes, a path, a PIL image of any mode (see `slideredit_rt.images.as_rgb`), or a
                list of these.
            prompt: Prompt or list of prompts, see `FluxKontextPipeline.__call__`.
            prompt_2: Prompt of the T5 encoder, see `FluxKontextPipeline.__call__`.
            slider_alpha: Alpha of the whole prompt, or one per prompt of a list; GST adapters only.
            subprompts_list: Instructions exactly as they occur in the prompt, or one such list per prompt; ST adapters only.
            slider_alpha_list: One alpha per sub-prompt, or one such list per prompt; ST adapters only.
            num_images_per_prompt: Images per prompt, see `FluxKontextPipeline.__call__`.
            max_sequence_length: Text rows of the T5 encoder, see `FluxKontextPipeline.__call__`.
            **kwargs: All other arguments of `FluxKontextPipeline.__call__`.

        Returns:
            `FluxPipelineOutput`, or a tuple with `return_dict=False`.

        Raises:
            SliderEditError: The arguments do not match the loaded adapter, a sub-prompt is not in its prompt, lists differ in
                length, an alpha is not finite, or an image contains NaN or infinity.
        """
        with self._lock:
            self._check_sliders(slider_alpha, subprompts_list, slider_alpha_list)
            row_scale = None
            if slider_alpha is not None:
                prompts = kwargs.get("prompt_embeds") if prompt is None else prompt
                row_scale = _gst_row_scale(slider_alpha, 1 if prompts is None or isinstance(prompts, str) else len(prompts))
            elif subprompts_list is not None and slider_alpha_list is not None:
                texts = _searched(prompt, prompt_2)
                # The text that was searched must also be the text that is encoded.
                prompt, prompt_2 = (prompt, texts) if prompt_2 else (texts, None)
                row_scale = self._st_row_scale(texts, subprompts_list, slider_alpha_list, max_sequence_length)
            self._row_scale = None if row_scale is None else row_scale.repeat_interleave(num_images_per_prompt, 0)
            own = {"num_images_per_prompt": num_images_per_prompt, "max_sequence_length": max_sequence_length}
            edited, finite = self._edit(_as_rgb(image), prompt, prompt_2, **own, **kwargs)
            if not finite:
                alphas = slider_alpha_list if slider_alpha is None else slider_alpha
                setting = "without sliders" if alphas is None else f"with the alphas {alphas}"
                raise SliderEditError(
                    f"the edit {setting} produced NaN or infinity; use alphas closer to 0, or check the adapter and the "
                    "pipeline's dtype"
                )
            return edited

    def _check_sliders(self, slider_alpha: Any, subprompts_list: Any, slider_alpha_list: Any) -> None:
        """Raise a `SliderEditError` if the arguments do not match the kind of the loaded adapter."""
        given = [slider_alpha is not None, subprompts_list is not None, slider_alpha_list is not None]
        kind = None if self._backbone is None else self._backbone.kind
        if kind is None and any(given):
            raise SliderEditError("no adapter is loaded; call load_gstlora or load_stlora before passing alphas")
        if kind == "gst" and given != [True, False, False]:
            raise SliderEditError("a GST adapter is loaded; pass slider_alpha and no sub-prompts")
        if kind == "st" and given != [False, True, True]:
            raise SliderEditError("an ST adapter is loaded; pass subprompts_list and slider_alpha_list, and no slider_alpha")

    def _edit(self, *args: Any, **kwargs: Any) -> tuple[Any, bool]:
        """Call the diffusers pipeline with the current row scales; return its output and whether all images are finite."""
        self._text_ids = ()
        finite: list[Tensor] = []
        watch = self.vae.decoder.register_forward_hook(
            lambda _, args, output: finite.extend(map(_finite_rows, (args[0], output)))
        )
        try:
            edited = super().__call__(*args, **kwargs)
        finally:
            watch.remove()
            self._row_scale, self._text_ids = None, ()
        if kwargs.get("output_type") == "latent":
            finite.append(_finite_rows(edited[0]))
        return edited, all(bool(rows.all()) for rows in finite)

    def _st_row_scale(self, prompts: Sequence[str], subprompts: Sequence[Any], alphas: Sequence[Any], text_rows: int) -> Tensor:
        """Return the row scales of ST sliders, float32 `[prompts, text_rows]`."""
        family = get_family("flux_kontext")
        rows = []
        instruction_lists = _per_prompt(subprompts, prompts, "subprompts_list")
        value_lists = _per_prompt(alphas, prompts, "slider_alpha_list")
        for prompt, instructions, values in zip(prompts, instruction_lists, value_lists, strict=True):
            if len(instructions) != len(values):
                raise SliderEditError(
                    f"got {len(instructions)} sub-prompts and {len(values)} alphas for {prompt!r}; pass one alpha for each"
                )
            spans = find_spans(prompt, [Slider(i) for i in instructions], family.tokenize(self, prompt), text_rows)
            rows.append(combine_row_scale(_alphas(values)[None], row_mask(spans, text_rows)[None]))
        return torch.cat(rows)


def _as_rgb(image: Any) -> Any:
    """Convert PIL images and paths to RGB images; return anything else that diffusers takes unchanged."""
    sources = (Image.Image, str, os.PathLike)
    if isinstance(image, list | tuple) and any(isinstance(one, sources) for one in image):
        return read_images(image)
    return read_images(image)[0] if isinstance(image, sources) else image


def _searched(prompt: str | list[str] | None, prompt_2: str | list[str] | None) -> list[str]:
    """Return the texts that sub-prompts are looked up in: those that the T5 encoder reads."""
    texts = prompt_2 or prompt
    if texts is None:
        raise SliderEditError("sub-prompts are looked up in the prompt, but none was given; pass prompt instead of embeddings")
    return [normalise(text) for text in ([texts] if isinstance(texts, str) else texts)]


def _finite_rows(tensor: Tensor) -> Tensor:
    """Return which rows of a tensor `[B, …]` are finite, bool `[B]`."""
    return tensor.isfinite().flatten(1).all(1)


def _gst_row_scale(alpha: float | Sequence[float], count: int) -> Tensor:
    """Return the row scales of a GST slider, float32 `[prompts, 1]`: all rows of a prompt have the same scale."""
    alphas = _alphas(alpha if isinstance(alpha, Sequence) else [alpha] * count)
    if len(alphas) != count:
        raise SliderEditError(f"got {len(alphas)} alphas for {count} prompts; pass one slider_alpha, or one per prompt")
    return alphas[:, None]


def _alphas(values: Sequence[Any]) -> Tensor:
    try:
        alphas = torch.tensor([float(value) for value in values], dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise SliderEditError(f"the alphas {list(values)} are not numbers ({error}); pass numbers such as 0.5") from None
    if not alphas.isfinite().all():
        raise SliderEditError(f"the alphas {list(values)} are not all finite; pass numbers such as 0.5")
    return alphas


def _per_prompt(values: Sequence[Any], prompts: Sequence[str], name: str) -> list[Sequence[Any]]:
    """Return one list per prompt. `values` is either such a nested list, or a flat list for all prompts."""
    nested = [isinstance(value, list | tuple) for value in values]
    if not any(nested):
        return [values] * len(prompts)
    if not all(nested) or len(values) != len(prompts):
        raise SliderEditError(
            f"{name} has {len(values)} entries for {len(prompts)} prompts; pass one flat list for all, or one list per prompt"
        )
    return list(values)
