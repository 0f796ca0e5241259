"""Prompts to token ids and back, for engines that take ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Codec:
    """A tokenizer, with or without its chat template."""

    def __init__(self, tokenizer: Any, chat: bool = False) -> None:
        """Keep the tokenizer.

        Args:
            tokenizer: of transformers.
            chat: a prompt is the user's message and goes through the chat template, up to where the answer begins;
                otherwise it is raw text.

        Raises:
            ValueError: `chat` with a tokenizer that has no chat template.
        """
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "chat is True, but the tokenizer has no chat template; allowed: False, or another tokenizer"
            )
        self.tokenizer, self.chat = tokenizer, chat

    @classmethod
    def from_pretrained(cls, model: str | Path, chat: bool = False) -> "Codec":
        """Return the codec of a model's folder or name."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(model)), chat)

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Return the prompt's token ids.

        Raises:
            ValueError: there are none.
        """
        if self.chat:
            messages = [{"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise ValueError(f"prompt {prompt!r} has no tokens; allowed: one or more")
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, leaving out special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
