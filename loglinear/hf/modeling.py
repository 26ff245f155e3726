"""The model as transformers wants it: a configuration, a cache, and `LanguageModel` behind `AutoModelForCausalLM`.

An exported folder carries this module with everything of ours that it imports, as one file (`loglinear.hf.assemble`).

Shapes: b batch, t time, d model width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from loglinear.errors import UserError
from loglinear.model.layers import Documents
from loglinear.model.lm import DecodeState, LanguageModel
from loglinear.ops.projections import Layer, Projections

# What transformers calls the cache: it was renamed in version 5.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class LogLinearLMConfig(PretrainedConfig):
    """The `model` section of a run's configuration; `tie_embeddings` goes by transformers' name."""

    model_type = "loglinear"
    attribute_map = {  # noqa: RUF012  # transformers reads it from the class
        "hidden_size": "dim",
        "num_hidden_layers": "layers",
        "max_position_embeddings": "seq_len",
        "tie_embeddings": "tie_word_embeddings",
    }

    def __init__(
        self,
        vocab_size: int = 1,
        seq_len: int = 1,
        dim: int = 1,
        layers: int = 0,
        pattern: tuple[str, ...] = ("log_linear",),
        log_linear: dict[str, Any] | None = None,
        softmax: dict[str, Any] | None = None,
        mlp_dim: int = 1,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        tie_word_embeddings: bool = True,
        **others: Any,
    ) -> None:
        self.vocab_size, self.seq_len, self.dim, self.layers = vocab_size, seq_len, dim, layers
        self.pattern, self.log_linear, self.softmax = list(pattern), log_linear or {}, softmax or {}
        self.mlp_dim, self.norm_eps, self.init_std = mlp_dim, norm_eps, init_std
        super().__init__(**others)
        self.tie_word_embeddings = tie_word_embeddings

    def of_model(self) -> SimpleNamespace:
        """The same as `LanguageModel` reads it."""
        names = ("vocab_size", "seq_len", "dim", "layers", "mlp_dim", "norm_eps", "init_std", "tie_embeddings")
        return SimpleNamespace(
            **{name: getattr(self, name) for name in names},
            log_linear=SimpleNamespace(**self.log_linear),
            softmax=SimpleNamespace(**self.softmax),
            mixer_of=lambda layer: self.pattern[layer % len(self.pattern)],
        )


class LogLinearCache:
    """What the model has read: O(log T) matrices a head in log-linear layers, keys and values in softmax ones.

    Attributes:
        state: of the documents, one a row.
        columns: tokens and padding that every row has given.
    """

    is_compileable = False

    def __init__(self, state: DecodeState, columns: int = 0) -> None:
        self.state, self.columns = state, columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were read, padding among them."""
        return self.columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row b what row `beam_idx[b]` was; `beam_idx` is int64 [B]. Beam search asks for it."""
        self.state = _each(self.state, lambda x: x[beam_idx.to(x.device)])


def _each(part: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A state whose tensors are changed."""
    if isinstance(part, torch.Tensor):
        return change(part)
    if isinstance(part, tuple):
        return tuple(_each(each, change) for each in part)
    return replace(part, **{field.name: _each(getattr(part, field.name), change) for field in fields(part)})


class CalledLayers(nn.Module):
    """In place of `Projections`: it calls the layers, for others may have wrapped, hooked or replaced them.

    Adapters (peft), weights that are brought from the CPU when they are needed (accelerate) and quantised layers live
    by that. Weights that are in no layer of their own, `mlp_token`'s, are as they are.
    """

    def forward(self, x_btd: torch.Tensor, layers: Sequence[Layer]) -> tuple[torch.Tensor, ...]:
        """What each layer makes of x [B, T, D], [B, T, E] each."""
        return tuple(F.linear(x_btd, layer) if isinstance(layer, torch.Tensor) else layer(x_btd) for layer in layers)


class LogLinearForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model whose mixers are log-linear or softmax attention.

    Prompts go through the chunked form, single tokens through the recurrent form. Padding may stand on the left of
    rows, where `attention_mask` is 0; on the right it is harmless, since no token looks ahead.
    """

    config_class = LogLinearLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # a cache cannot forget its last tokens
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LogLinearLMConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.of_model())  # pyright: ignore[reportArgumentType]  # reads as a ModelConfig
        for half in self.model.modules():
            if isinstance(getattr(half, "project", None), Projections):
                half.project = CalledLayers()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        cache: LogLinearCache | None = None,
        past_key_values: LogLinearCache | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss if there are labels.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, all columns so far], 0 at padding; None if there is none.
            labels: int64 [B, T], the inputs themselves, -100 where the loss does not count; they are shifted here.
            use_cache: also return what was read, to go on from.
            logits_to_keep: how many last columns to give logits of, 0 for all; or which, int64 [K].
            cache: what was read before, under its new name.
            past_key_values: the same under its old name.
            num_items_in_batch: labels of all micro-batches of a step, by which to divide; None for those of this one.
            ignored: what transformers says besides.

        Returns:
            fp32 `logits` [B, T, V], `loss` (nats a label) and the cache, where asked for.
        """
        given = cache if cache is not None else past_key_values
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        mask_bt = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        if use_cache or given is not None:
            given = given or self._empty_cache(input_ids)
            x_btd, state = self.model.read(input_ids, given.state, _lengths(mask_bt))
            given = LogLinearCache(state, given.columns + input_ids.shape[1])
            logits_btv = self.model.logits(x_btd[:, kept])
        else:
            logits_btv = self.model(input_ids, documents=_documents(mask_bt))[:, kept]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_btv, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss, logits=logits_btv, **{CACHE: given})  # pyright: ignore[reportArgumentType]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Take another embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Take another head."""
        self.model.head = new_embeddings

    def _empty_cache(self, input_ids: torch.Tensor) -> LogLinearCache:
        """Before the first token; where weights are brought from elsewhere, they do not tell the device."""
        state = self.model.initial_state(len(input_ids))
        return LogLinearCache(_each(state, lambda x: torch.zeros_like(x, device=input_ids.device) if x.is_meta else x))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """`LanguageModel` has initialised itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The first call makes a cache of our own."""
        return False


def _lengths(mask_bt: torch.Tensor | None) -> torch.Tensor | None:
    """Tokens of each row that is padded on the left, int64 [B] on the CPU."""
    if mask_bt is None:
        return None
    if not mask_bt.equal(mask_bt.cummax(1).values):
        raise UserError("attention_mask has padding behind a token: with a cache, pad on the left")
    return mask_bt.sum(1).cpu()


def _documents(mask_bt: torch.Tensor | None) -> Documents | None:
    """Documents that begin where padding ends; padding is a document of its own, which nobody looks at."""
    if mask_bt is None or bool(mask_bt.all()):
        return None
    starts_bt = torch.ones_like(mask_bt)
    starts_bt[:, 1:] = mask_bt[:, 1:] != mask_bt[:, :-1]
    starts = starts_bt.flatten().nonzero()[:, 0].cpu()
    return Documents.packed(F.pad(starts, (0, 1), value=mask_bt.numel()).to(torch.int32), mask_bt.device)
