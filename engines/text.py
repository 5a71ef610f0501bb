"""Text to tokens and back, by the checkpoint's own ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from shuntyard.errors import CheckpointError
from shuntyard.exporter.config_file import token_id
from shuntyard.exporter.strict_json import read_json


class Tokenizer:
    """A tokenizer that opens every text with the checkpoint's begin-of-sequence token, if it has one."""

    def __init__(self, inner: tokenizers.Tokenizer, bos: int | None) -> None:
        self._inner, self._bos = inner, bos

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Reads the tokenizer of a checkpoint, model or engine directory.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file", hint="text needs the checkpoint's tokenizer.json; token ids do without"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: cannot be read: {error}", hint="download it again") from error
        bos = token_id(read_json(directory / "config.json"), "bos_token_id")
        if bos is not None and (
            isinstance(bos, bool) or not isinstance(bos, int) or not 0 <= bos < inner.get_vocab_size()
        ):
            raise CheckpointError(
                f"{directory / 'config.json'}: bos_token_id is {bos!r:.80}, which is no token of tokenizer.json",
                hint="config.json and tokenizer.json must be of the same checkpoint",
            )
        return cls(inner, bos)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, opened by the begin-of-sequence token.

        Raises:
            CheckpointError: the text holds something that is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"the text is not UTF-8: {error}", hint="convert it to UTF-8") from error
        ids = list(self._inner.encode(text, add_special_tokens=False).ids)
        return ids if self._bos is None else [self._bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))
