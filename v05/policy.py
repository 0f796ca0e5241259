"""The policy that is trained: a causal language model with its tokenizer."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v05.quiet import without_bars


@dataclass(frozen=True)
class Policy:
    """A causal language model of transformers and its tokenizer, which alone turns prompts into tokens.

    Attributes:
        model: the model; its parameters are what is trained.
        tokenizer: its tokenizer; one with a chat template makes a user's turn of every prompt.
        dtype: of the products in a forward pass; the parameters keep theirs.
        put_to_zero: configurations, names and values of the model's settings that are 0 here but not where it is saved.
    """

    model: Any
    tokenizer: Any
    dtype: torch.dtype = torch.float32
    put_to_zero: tuple[tuple[Any, str, float], ...] = field(default=(), compare=False, repr=False)

    @property
    def parameters(self) -> int:
        """Return the number of trainable scalars."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def device(self) -> torch.device:
        """Return where the parameters are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def precision(self) -> torch.autocast:
        """Return a context in which products are made in `dtype`."""
        lower = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype if lower else torch.bfloat16, enabled=lower)

    @property
    def pad_id(self) -> int:
        """Return the token that fills up a batch, one that the model surely has; nothing attends to it."""
        return self.end_ids[0]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return the tokens that end an answer: the tokenizer's, and those of the model's generation settings."""
        settings = getattr(self.model, "generation_config", None)
        more = getattr(settings, "eos_token_id", None)
        found = [self.tokenizer.eos_token_id, *(more if isinstance(more, list | tuple) else [more])]
        return tuple(dict.fromkeys(int(token) for token in found if token is not None))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each prompt, without an end token.

        Args:
            texts: non-empty strings.

        Returns:
            One list of ids per text; with a chat template, those of a conversation that the text opens.

        Raises:
            ValueError: a text is empty or has a character that the tokenizer does not know.
        """
        chat = bool(getattr(self.tokenizer, "chat_template", None))
        prompts = [self._conversation(text) for text in texts] if chat else list(texts)
        ids: list[list[int]] = self.tokenizer(prompts, add_special_tokens=not chat)["input_ids"] if texts else []
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)  # which some have for unknown text as well
        unknown = set() if self.tokenizer.unk_token_id in known else {self.tokenizer.unk_token_id}
        for text, row in zip(texts, ids, strict=True):
            if not chat and row and row[-1] == self.tokenizer.eos_token_id:
                row.pop()
            if not text or not row or unknown & set(row):
                allowed = f"one or more of {alphabet!r}" if (alphabet := self.alphabet) else "text that it knows"
                raise ValueError(f"the tokenizer cannot encode {text!r}; allowed: {allowed}")
        return ids

    def _conversation(self, text: str) -> str:
        turns = [{"role": "user", "content": text}]
        conversation: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return conversation

    @property
    def alphabet(self) -> str:
        """Return the characters of a tokenizer that has a token for each and no other; empty for any other one."""
        special = set(self.tokenizer.all_special_tokens)
        tokens = sorted(token for token in self.tokenizer.get_vocab() if token not in special)
        return "".join(tokens) if all(len(token) == 1 for token in tokens) else ""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, leaving out special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def response_logits(self, prompts: Sequence[Sequence[int]], tokens: Tensor, sequence_offsets: Tensor) -> Tensor:
        """Return the logits that predict each response token.

        Args:
            prompts: N lists of prompt token ids, none empty.
            tokens: response token ids of all sequences, one after the other, [T] int64.
            sequence_offsets: where each response starts and ends in `tokens`, [N + 1] int64.

        Returns:
            Logits [T, vocabulary] float32 on the model's device, differentiable in the weights.
        """
        padded, sequence, column = self._padded(prompts, tokens, sequence_offsets)
        with self.precision:
            logits = self.model(input_ids=padded, use_cache=False).logits
        selected: Tensor = logits[sequence, column]
        return selected.float()

    def response_hidden(self, prompts: Sequence[Sequence[int]], tokens: Tensor, sequence_offsets: Tensor) -> Tensor:
        """Return the last hidden states, from which the output layer predicts each response token.

        Args:
            prompts, tokens, sequence_offsets: as for `response_logits`.

        Returns:
            Hidden states [T, hidden size] in `dtype`, on the model's device, differentiable in the weights.
        """
        padded, sequence, column = self._padded(prompts, tokens, sequence_offsets)
        with self.precision:
            states = self.model.base_model(input_ids=padded, use_cache=False).last_hidden_state
        selected: Tensor = states[sequence, column]
        return selected.to(self.dtype)

    @property
    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [vocabulary, hidden size] and bias [vocabulary], if any, in `dtype`, differentiable."""
        layer = self.model.get_output_embeddings()
        bias = getattr(layer, "bias", None)
        return layer.weight.to(self.dtype), None if bias is None else bias.to(self.dtype)

    def _padded(
        self, prompts: Sequence[Sequence[int]], tokens: Tensor, sequence_offsets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return prompts and responses padded on the right, and for each response token where it is predicted."""
        bounds = sequence_offsets.tolist()
        responses = [tokens[first:last] for first, last in itertools.pairwise(bounds)]
        rows = [torch.cat([torch.tensor(prompt), reply]) for prompt, reply in zip(prompts, responses, strict=True)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)
        lengths = sequence_offsets.diff()
        starts = torch.tensor([len(prompt) - 1 for prompt in prompts])
        sequence = torch.repeat_interleave(torch.arange(len(prompts)), lengths)
        column = torch.arange(len(tokens)) - sequence_offsets[sequence] + starts[sequence]
        return padded.to(self.device), sequence.to(self.device), column.to(self.device)

    @contextlib.contextmanager
    def _with_its_own_settings(self) -> Iterator[None]:
        try:
            for config, name, value in self.put_to_zero:
                setattr(config, name, value)
            yield
        finally:
            for config, name, _ in self.put_to_zero:
                setattr(config, name, 0.0)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the model and the tokenizer so that transformers can load them from `folder`.

        Args:
            folder: made where missing.
            weights: by parameter name, whole; None for the model's own.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with without_bars(), self._with_its_own_settings():
            self.model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
        self.tokenizer.save_pretrained(folder)
