"""Text to token ids and back, from the tokenizer files of a model folder.

Knows no model: ids up to the model's own vocabulary size may exist without a token here (padding rows of the
embedding); they decode to nothing.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import TokenizerError
from . import protect
from .build import build_backend, guarded
from .decoding import CleanUp, Stage, stages_for, token_bytes
from .detokenizer import Detokenizer
from .special import SpecialTokens


class Tokenizer:
    """The tokenizer of one model. Immutable, and safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens, *, where: str) -> None:
        """`where` names the tokenizer in error messages. Use `Tokenizer.open`."""
        self._backend = backend
        self._where = where
        self._added = backend.get_added_tokens_decoder()
        self._special_texts = frozenset(token.content for token in self._added.values() if token.special)
        self.special_ids: frozenset[int] = frozenset(index for index, t in self._added.items() if t.special)
        self.special_tokens: dict[str, str] = dict(special.roles)
        # Clean-up would eat spaces that byte-pair models mean: as in transformers, it is for the others only.
        self._clean_up = special.clean_up_spaces and type(backend.model).__name__ != "BPE"
        prefix = self._template_prefix()
        self.bos_id: int | None = self._role_id("bos_token", prefix[0] if prefix else None)
        self.eos_id: int | None = self._role_id("eos_token", None)
        self.adds_bos: bool = self.bos_id is not None and (
            special.add_bos if special.add_bos is not None else self.bos_id in prefix
        )

    @classmethod
    def open(cls, folder: Path | str) -> "Tokenizer":
        """Read `folder`. Raises TokenizerError naming the file that is missing, broken or of an unknown kind."""
        folder = Path(folder)
        special = SpecialTokens.read(folder)
        return cls(build_backend(folder, special), special, where=str(folder))

    # text -> ids

    def encode(self, text: str, *, add_bos: bool | None = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_bos        True: begin with BOS (if the model has one); None: as the model's files say for plain text.
                       A text that already begins with BOS gets no second one.
        parse_special  False: text that looks like a control token ("<|end|>") is encoded as ordinary text.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text to encode must be a string, not {type(text).__name__}")
        ids = self._parsed(text) if parse_special else self._plain(text)
        add = self.adds_bos if add_bos is None else add_bos
        if add and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a rendered chat: control tokens parsed, no BOS added (the template writes it).

        Places marked by `protect.mark` before rendering are encoded as ordinary text.
        """
        pieces = protect.split(text)
        if len(pieces) == 1 and not pieces[0][1]:
            return self._parsed(pieces[0][0])
        ids: list[int] = []
        for index, (piece, is_plain) in enumerate(pieces):
            encode = self._unforged if is_plain else self._parsed
            ids += encode(piece) if index == 0 else self._continued(piece, encode)
        return ids

    def control_texts(self, template: str = "") -> frozenset[str]:
        """Texts with a meaning of their own: special tokens, and other added tokens that `template` spells out."""
        added = {token.content for token in self._added.values() if token.content in template}
        return self._special_texts | added

    # ids -> text

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids without a token are skipped."""
        ids = list(ids)
        for token_id in ids:
            self._check(token_id)
        text = guarded(
            lambda: self._backend.decode(ids, skip_special_tokens=skip_special), f"{self._where}: decoding failed"
        )
        return CleanUp.whole(text) if self._clean_up else text

    def detokenizer(self, skip_special: bool = True) -> Detokenizer:
        """A fresh incremental decoder."""
        maker = self._stage_maker
        stages = None if maker is None else maker()
        if stages is not None and self._clean_up:
            stages.append(CleanUp())
        hidden = self._special_texts if skip_special else frozenset()

        def token_of(token_id: int) -> str | None:
            self._check(token_id)
            token = self._backend.id_to_token(token_id)
            return None if token in hidden else token

        def decode_whole(ids: Sequence[int]) -> str:
            return self.decode(ids, skip_special=skip_special)

        return Detokenizer(token_of, stages, decode_whole)

    # the vocabulary

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id with a token."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def piece(self, token_id: int) -> str:
        """The token as the vocabulary writes it ("Ġthe", "▁the", "<0x0A>"). Raises TokenizerError if there is none."""
        self._check(token_id)
        token = self._backend.id_to_token(token_id)
        if token is None:
            raise TokenizerError(f"token id {token_id} has no token; ids go from 0 to {self.vocab_size - 1}")
        return token

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary writes it, special tokens included."""
        return self._backend.token_to_id(token)

    def as_json(self) -> str:
        """The whole tokenizer in the format of tokenizer.json, with the tokens that side files added."""
        return self._backend.to_str()

    def text_of(self, token_id: int) -> str:
        """What the token alone contributes to a text, its leading space kept; a broken character is U+FFFD."""
        self._check(token_id)
        token = self._backend.id_to_token(token_id)
        return "" if token is None else self._texts_of([token])[0]

    def ids_containing(self, strings: Iterable[str]) -> frozenset[int]:
        """Ids of the tokens whose text contains any of `strings`."""
        wanted = [string for string in strings if string]
        if not wanted:
            return frozenset()
        ids, texts = self._all_texts
        return frozenset(index for index, text in zip(ids, texts, strict=True) if any(w in text for w in wanted))

    # inside

    def _parsed(self, text: str) -> list[int]:
        return self._guarded(lambda t: self._backend.encode(t, add_special_tokens=False).ids, text)

    def _plain(self, text: str) -> list[int]:
        """The library's pipeline without its search for added tokens, and without touching shared state."""

        def pipeline(text: str) -> list[int]:
            if not text:
                return []
            if self._backend.normalizer is not None:
                text = self._backend.normalizer.normalize_str(text)
            words = [text]
            if self._backend.pre_tokenizer is not None:
                words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
            model = self._backend.model
            return [token.id for word in words for token in model.tokenize(word)]

        return self._guarded(pipeline, text)

    def _unforged(self, text: str) -> list[int]:
        """`_plain`, and if the model's own vocabulary still yields a control token, the text is cut inside it."""
        ids = self._plain(text)
        if len(text) > 1 and not self._added.keys().isdisjoint(ids):
            return self._unforged(text[:1]) + self._continued(text[1:], self._unforged)
        return ids

    def _continued(self, piece: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Encode the middle of a text: behind a newline, lest the start-of-text space is put before it."""
        newline = self._plain("\n")
        ids = encode("\n" + piece)
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(piece)

    def _guarded(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        problem = f"{self._where}: the tokenizer failed on a text of {len(text)} characters"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # lone surrogates, as terminals in a wrong locale deliver them
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return guarded(lambda: encode(text), problem)

    def _check(self, token_id: Any) -> None:
        if isinstance(token_id, bool) or not hasattr(token_id, "__index__") or not 0 <= token_id < 2**32:
            raise TokenizerError(f"a token id is a whole number from 0 to {self.vocab_size - 1}, not {token_id!r}")

    def _role_id(self, role: str, default: int | None) -> int | None:
        text = self.special_tokens.get(role)
        return default if text is None else self._backend.token_to_id(text)

    def _template_prefix(self) -> list[int]:
        """The ids that tokenizer.json's post-processor puts before a text."""
        problem = f"{self._where}: the tokenizer cannot encode"
        bare = guarded(lambda: self._backend.encode("a", add_special_tokens=False).ids, problem)
        full = guarded(lambda: self._backend.encode("a", add_special_tokens=True).ids, problem)
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start]
        return []

    @cached_property
    def _decoder(self) -> dict[str, Any] | None:
        decoder = self._backend.decoder
        return None if decoder is None else json.loads(decoder.__getstate__())

    @cached_property
    def _stage_maker(self) -> Callable[[], list[Stage]] | None:
        return stages_for(self._decoder)

    def _texts_of(self, tokens: Sequence[str]) -> list[str]:
        """Each token's text on its own. The stages that look at neighbours see one token between two others."""
        decoder = self._decoder
        if decoder is not None and decoder.get("type") == "ByteLevel":
            return [token_bytes(token).decode("utf-8", "replace") for token in tokens]
        if self._stage_maker is None:
            return [guarded(lambda t=token: self._backend.decoder.decode([t]), self._where) for token in tokens]
        texts = []
        for token in tokens:
            stages = self._stage_maker()
            probe = Detokenizer(lambda index, t=token: ("a", t)[index], stages, lambda ids: "")
            texts.append((probe.push(0) + probe.push(1) + probe.finish())[1:])
        return texts

    @cached_property
    def _all_texts(self) -> tuple[list[int], list[str]]:
        vocab = self._backend.get_vocab(with_added_tokens=True)
        return list(vocab.values()), self._texts_of(list(vocab))
