"""Text to tokens and back, and the chat template, from a GGUF file's fields or a Hugging Face folder."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from models.config import Config
from paxattn.damage import Blame

END_OF_TEXT = {
    "<|endoftext|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "</s>",
}
CONTROL, USER_DEFINED, BYTE = 3, 4, 6

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Special:
    """What a tokenizer knows besides its vocabulary: tokens that end a text, the chat template and its names."""

    stop_ids: tuple[int, ...]
    chat_template: str | None = None
    bos_token: str = ""
    eos_token: str = ""


class Tokenizer:
    def __init__(self, backend: Backend, special: Special):
        self.backend = backend
        self.special = special

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.special.stop_ids

    def encode(self, text: str, *, parse_special: bool = True, add_special: bool = True) -> list[int]:
        """Token ids. parse_special: "<|im_end|>" in the text is that token; add_special: begin as the model expects."""
        self.backend.encode_special_tokens = not parse_special
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ids add to the prompt's, special tokens left out."""
        stream = TextStream(self, prompt)
        return "".join(stream.put(token) for token in ids) + stream.end()

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, ready for the assistant's turn.

        Raises:
          ValueError: the model has no chat template, or the template refuses the messages.
        """
        if self.special.chat_template is None:
            raise ValueError("this model has no chat template")
        try:
            text = (
                _template_environment()
                .from_string(self.special.chat_template)
                .render(
                    messages=messages,
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                    bos_token=self.special.bos_token,
                    eos_token=self.special.eos_token,
                )
            )
        except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(f"the chat template failed: {error}") from error
        begun = bool(self.special.bos_token) and text.startswith(self.special.bos_token)
        return self.encode(text, add_special=not begun)

    def save(self, folder: Path) -> None:
        self.backend.save(str(folder / "tokenizer.json"))
        (folder / "special.json").write_text(json.dumps(asdict(self.special)), encoding="utf-8")


class TextStream:
    """Text of one row's tokens as it comes; a character in several tokens comes with the last of them.

    Only the newest tokens are decoded again, together with those before them, as a token's text may depend on what
    it follows (SentencePiece's first space).
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._begin, self._read = 0, len(self._ids)

    def put(self, token: int) -> str:
        self._ids.append(token)
        text = self._rest()
        if not text or text.endswith("\ufffd"):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return text

    def end(self) -> str:
        """What is still held back."""
        return self._rest()

    def _rest(self) -> str:
        told = self._tokenizer.decode(self._ids[self._begin : self._read], skip_special=True)
        return self._tokenizer.decode(self._ids[self._begin :], skip_special=True)[len(told) :]


def _template_environment() -> ImmutableSandboxedEnvironment:
    """Jinja with what chat templates written for Hugging Face's transformers expect of it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def checked(tokenizer: Tokenizer, config: Config, path: Path) -> Tokenizer:
    """The same, once every token it can make is known to have an embedding."""
    largest = max(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    if max(largest, *tokenizer.stop_ids, 0) >= config.vocab_size:
        raise ValueError(f"{path}: the tokenizer has more tokens than the model's {config.vocab_size} embeddings")
    return tokenizer


def from_saved(folder: Path) -> Tokenizer:
    fields = json.loads((folder / "special.json").read_text(encoding="utf-8"))
    fields["stop_ids"] = tuple(fields["stop_ids"])
    return Tokenizer(Backend.from_file(str(folder / "tokenizer.json")), Special(**fields))


def from_huggingface(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """Of a folder with tokenizer.json and, where there are, tokenizer_config.json and generation_config.json.

    Raises:
      ValueError: there is no tokenizer.json.
    """
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder}: has no tokenizer.json")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    names = {
        **_json_or_empty(folder / "special_tokens_map.json"),
        **_json_or_empty(folder / "tokenizer_config.json"),
    }
    stops = _json_or_empty(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    eos = _token_text(names.get("eos_token"))
    if eos and backend.token_to_id(eos) is not None:
        stops = [*stops, backend.token_to_id(eos)]
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.exists() else names.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    special = Special(tuple(sorted(set(stops))), template, _token_text(names.get("bos_token")), eos)
    return Tokenizer(backend, special)


def _json_or_empty(path: Path) -> dict[str, Any]:
    with Blame(path):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _token_text(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


def from_gguf_fields(fields: dict[str, Any]) -> Tokenizer:
    """Of a GGUF file's tokenizer.ggml.* fields: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

    Raises:
      ValueError: another kind of tokenizer or of pre-tokenizer.
    """
    kind = fields.get("tokenizer.ggml.model")
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if kind == "gpt2":
        backend = _byte_level(fields, tokens)
    elif kind == "llama":
        backend = _sentencepiece(fields, tokens, types)
    else:
        raise ValueError(f"tokenizer.ggml.model: got {kind!r}, must be 'gpt2' or 'llama'")
    for token, type_ in zip(tokens, types, strict=True):
        if type_ == CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif type_ == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    begins = kind == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"
    bos, eos = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", begins):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    stops = {i for i, token in enumerate(tokens) if types[i] == CONTROL and token in END_OF_TEXT}
    stops |= {fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom") if _has(fields, name)}
    special = Special(
        stop_ids=tuple(sorted(stops)),
        chat_template=fields.get("tokenizer.chat_template"),
        bos_token="" if bos is None else tokens[bos],
        eos_token="" if eos is None else tokens[eos],
    )
    return Tokenizer(backend, special)


def _has(fields: dict[str, Any], name: str) -> bool:
    return f"tokenizer.ggml.{name}_token_id" in fields


def _byte_level(fields: dict[str, Any], tokens: list[str]) -> Backend:
    """Byte-level BPE; tokenizer.ggml.pre names how text is cut up first, as in llama.cpp."""
    pre = fields.get("tokenizer.ggml.pre", "default")
    cuts: dict[str, list[Any]] = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)],
        "gpt-2": [pre_tokenizers.ByteLevel(False)],
        "llama-bpe": _cut_words(_WORDS % 3),
        "qwen2": _cut_words(_WORDS % 1),
    }
    if pre not in cuts:
        raise ValueError(f"tokenizer.ggml.pre: got {pre!r}, must be one of {', '.join(cuts)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts[pre])
    backend.decoder = decoders.ByteLevel()
    return backend


def _cut_words(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]


def _sentencepiece(fields: dict[str, Any], tokens: list[str], types: list[int]) -> Backend:
    """SentencePiece BPE: the best-scored merge first, unknown characters as bytes."""
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = fields["tokenizer.ggml.scores"]
    merges = []
    for token, i in vocab.items():
        if types[i] in (CONTROL, BYTE):
            continue
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(-scores[i], vocab[a], vocab[b], (a, b)) for a, b in halves if a in vocab and b in vocab]
    pairs = [pair for *_, pair in sorted(merges)]
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    backend = Backend(models.BPE(vocab, pairs, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    ends: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        ends.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(ends)
    return backend
