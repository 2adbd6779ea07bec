"""Exported decoders with the `generate` of Transformers: sampling, beams, stopping rules and streamers are theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import UserError
from .cache import BEAMS, MASK, complete
from .compiled import CompiledModel


class State(Cache):
    """The state of an inference request, where `generate` expects a cache.

    Attributes:
        rows: For each row of the next step the row of the state that it goes on from; `None` for the same.
        length: Tokens in the state.
    """

    is_compileable = False

    def __init__(self):
        super().__init__(layers=[])
        self.rows: np.ndarray | None = None
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.length

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beams go on from other beams at the next step."""
        self.rows = beam_idx.numpy().astype(np.int32)

    def crop(self, max_length: int) -> None:
        """Not possible."""
        raise UserError("an exported model cannot take tokens back, which assisted generation needs")


class Decoder(CompiledModel, GenerationMixin):
    """A compiled decoder that keeps keys and values as its state.

    It is called like any `CompiledModel`, which forgets what was before, and generates like a model of Transformers.
    One text, or batch of texts, is generated at a time.
    """

    main_input_name = "input_ids"
    _is_stateful = True  # as Transformers calls models whose past cannot be taken back

    def __init__(self, compiled: Any, actives: tuple[float, ...], active: float, operation: str, folder: Path):
        super().__init__(compiled, actives, active, operation)
        self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = GenerationConfig.from_pretrained(folder)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def can_generate(self) -> bool:
        """It can."""
        return True

    def get_experts_implementation(self) -> dict[str, str]:
        """Of the experts that Transformers knows there are none."""
        return {}

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, active: float | None = None, **options: Any):
        """As `generate` of Transformers.

        Args:
            inputs: Token ids ``(batch, length)``; or give `input_ids` and `attention_mask` by name.
            args, options: Of Transformers' method.
            active: A budget of `actives` for this text.

        Returns:
            Token ids ``(batch, length)``, or what Transformers returns with these options.

        Raises:
            UserError: If the budget is none of `actives`.
        """
        before, self.active = self.active, self.actives[self.place(active)]
        try:
            return super().generate(inputs, *args, past_key_values=State(), **options)
        finally:
            self.active = before

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, past_key_values: State, attention_mask: torch.Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        """What the next step takes: the tokens that are not in the state."""
        return {
            "input_ids": input_ids[:, past_key_values.length :],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }

    def forward(
        self, input_ids: torch.Tensor, past_key_values: State, attention_mask: torch.Tensor | None = None, **unused: Any
    ) -> CausalLMOutputWithPast:
        """One step of `generate`: new tokens ``(batch, new)`` to logits ``(batch, new, vocabulary)``."""
        state = past_key_values
        if not state.length:
            self.request.reset_state()
        state.length += input_ids.shape[1]
        mask = input_ids.new_ones(len(input_ids), state.length) if attention_mask is None else attention_mask
        feed = {"input_ids": input_ids.numpy(), MASK: mask.numpy().astype(np.int64)}
        if state.rows is not None:
            feed[BEAMS], state.rows = state.rows, None
        feed |= self.budget()
        logits = self.request.infer(complete(feed, self.ports))["logits"]
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits), past_key_values=state)

    def __call__(self, *args: Any, **inputs: Any):
        """As of `CompiledModel`; within `generate`, `forward`."""
        if isinstance(inputs.get("past_key_values"), State):
            return self.forward(*args, **inputs)
        return super().__call__(*args, **inputs)
