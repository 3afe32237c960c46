"""`load`: from a name or a folder to a `Runtime`."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..cache.storage import KVStorage
from ..cache.tiers import check_host_cache, host_limit
from ..checkpoint.packed import NOT_KEPT, PackedCache
from ..checkpoint.reader import Checkpoint
from ..config.read import load_config
from ..config.resolve import resolve
from ..config.spec import ModelSpec
from ..errors import ConfigError, NoTemplate, TemplateError, UsageError
from ..generation.request import SPECULATE, Speculate
from ..generation.scheduler import PREFILL_TOKENS
from ..model.attending import attention_lines
from ..model.loader import load_transformer
from ..model.placement import (
    auto_context,
    cache_pages,
    geometry_of,
    require_room,
    resolve_cache,
    resolve_device,
    resolve_dtype,
    working_bytes,
)
from ..model.split_model import SplitCache, SplitTransformer
from ..model.summary import stored_weights
from ..model.transformer import Transformer
from ..ops import native
from ..ops.attention.choose import describe, refusal
from ..tokenizer.files import read_text
from ..tokenizer.template import ChatTemplate
from ..tokenizer.tokenizer import Tokenizer
from .draft import DraftNeeds, draft_geometry, open_draft
from .info import RuntimeInfo
from .packed import packed_cache as open_packed_cache
from .runtime import Runtime
from .spread import check_split, open_spread

DEMO = "demo"
ACCURACIES = ("exact", "fast")
MOST_STEP_TOKENS = 8192
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"
log = logging.getLogger("exl_runtime")


def load(
    model: str | Path = DEMO,
    *,
    device: str = "auto",
    backend: str = "auto",
    context: int | str = "auto",
    cache: str = "auto",
    dtype: str = "auto",
    accuracy: str = "exact",
    threads: int | None = None,
    gpu_split: str | None = None,
    template: str | Path | None = None,
    draft: str | Path | None = None,
    speculate: Speculate = "auto",
    packed_cache: bool = True,
    step_tokens: int = PREFILL_TOKENS,
    host_cache: int | str = "auto",
    progress: Callable[[str], None] | None = None,
) -> Runtime:
    """Open a model.

    model     a folder with config.json, *.safetensors and tokenizer.json; or "demo", the bundled toy
    device    "auto" | "cpu" | "cuda" | "cuda:N"
    backend   "auto" | "cpu" | "cuda" | "reference": whose kernels run
    context   tokens of the longest conversation; "auto": the model's own, or what fits the free memory
    cache     type of keys and values: "auto" | "fp32" | "fp16" | "bf16", or quantized: "q8" | "q6" | "q4" | "k6v4" ...
              (kXvY: 2 to 8 bits for keys, for values)
    dtype     element type of what goes into the matrices: "auto" (fp32 on the CPU, fp16 elsewhere) or one of those
    accuracy  "exact", or "fast": prompts of quantized models with 8-bit inputs on the CPU, up to twice the speed for a
              KL of about 3e-4; replies may then depend on what else runs in the same step (batches, guesses)
    threads   CPU threads; None: one per physical core
    gpu_split  over several GPUs, layer by layer: "auto", or GiB for each GPU in order ("20,24", 0 leaves one out); what
              they have no room for runs on the CPU. None: one device
    template  a Jinja file to use instead of the model's own chat template
    draft     a smaller model with the same tokens, or this one with fewer bits: it guesses ahead, which saves time
              where it is often right and changes no token
    speculate  where guesses come from when a request does not say: "auto" | "ngram" | "draft" | "off"
    packed_cache  on the CPU, keep what quantized models of 64 MB and more are repacked into under the user's cache
              folder (about the model's size; the three used last; README, "The packed cache"), and start from that
    step_tokens  most tokens of one step: what running replies do not need of it is for prompts. Fewer keep replies that
              run beside a long prompt more fluent, more read the prompt faster
    host_cache  bytes of host memory for what leaves the cache: an earlier prompt then comes back without being
              computed. "auto": a quarter of what is free (at most 16 GiB) beside a GPU, 0 on the CPU, whose cache is
              in host memory already
    progress  called with one line of text now and then (building kernels, loading layers)
    Raises ConfigError, UnsupportedModel, CheckpointError, FormatError, NonFiniteError, TokenizerError, TemplateError,
    BackendUnavailable, OutOfMemory or UsageError; each says what to do.
    """
    started = time.perf_counter()
    if speculate not in SPECULATE or (speculate == "draft" and draft is None):
        raise UsageError(
            f"speculate is {speculate!r}" + (" and there is no draft model" if speculate == "draft" else ""),
            hint=f"use one of {', '.join(SPECULATE)}; draft needs a draft model",
        )
    if accuracy not in ACCURACIES:
        raise UsageError(f"accuracy is {accuracy!r}", hint=f"use one of {', '.join(ACCURACIES)}")
    if isinstance(step_tokens, bool) or not isinstance(step_tokens, int) or not 1 <= step_tokens <= MOST_STEP_TOKENS:
        raise UsageError(f"step_tokens is {step_tokens!r}", hint=f"give a number of tokens up to {MOST_STEP_TOKENS}")
    check_split(gpu_split, device, backend)
    check_host_cache(host_cache)
    folder = find(model)
    draft_folder = None if draft is None else find(draft)
    report = progress or (lambda text: None)
    where = resolve_device(device)
    kv_type = resolve_cache(cache, where)
    files = load_config(folder)
    spec = resolve(files.config, files.generation)
    # Small things first: a broken tokenizer or template is known before gigabytes are read.
    tokenizer = Tokenizer.open(folder)
    chat_template = open_template(folder, tokenizer, template)
    wanted = check_context(context, spec)
    kernels = native.resolve_backend(None if backend == "auto" else backend, where)
    native.set_threads(threads)

    def opened(
        model: Transformer | SplitTransformer,
        kv: KVStorage | SplitCache,
        *,
        context: int,
        device: str,
        attention: str = "",
    ) -> RuntimeInfo:
        return RuntimeInfo(
            name="demo" if folder == DEMO_FOLDER else folder.name,
            path=str(folder),
            architecture=spec.architecture,
            format=stored.format,
            bits_per_weight=stored.bits_per_weight,
            context=context,
            cache=kv_type.name,
            backend=model.backend,
            device=device,
            weight_bytes=model.nbytes,
            cache_bytes=kv.nbytes,
            load_seconds=time.perf_counter() - started,
            is_demo=folder == DEMO_FOLDER,
            accuracy=accuracy,
            attention=attention,
        )

    def drafting(
        beside: KVStorage | SplitCache, device: torch.device, backend: str, packed: PackedCache | None = None
    ) -> tuple[Transformer, KVStorage]:
        assert draft_folder is not None
        return open_draft(
            draft_folder,
            tokenizer=tokenizer,
            beside=beside,
            device=device,
            backend=backend,
            dtype=resolve_dtype(dtype),
            packed=packed,
            progress=lambda done, total: report(f"loading layer {done} of {total} of the draft model"),
        )

    needs = None if draft_folder is None else DraftNeeds.of(draft_folder)
    if gpu_split is not None:
        with Checkpoint.open(folder) as checkpoint:
            spread = open_spread(
                checkpoint,
                files,
                spec,
                split=gpu_split,
                cache=kv_type,
                context=wanted,
                dtype=resolve_dtype(dtype),
                hurry=accuracy == "fast",
                draft=needs,
                report=report,
            )
            stored = stored_weights(checkpoint, spec)
        info = opened(spread.model, spread.kv, context=spread.context, device=spread.devices)
        parts = {"model": spread.model, "kv": spread.kv, "tokenizer": tokenizer, "template": chat_template}
        if spread.beside is not None:
            parts["draft"] = drafting(spread.kv, spread.beside.device, spread.beside.backend)
        beside = host_limit(host_cache, spread.kv.device)
        return Runtime(**parts, info=info, speculate=speculate, step_tokens=step_tokens, host_cache=beside)
    kept = open_packed_cache() if packed_cache and kernels == "cpu" else None
    with Checkpoint.open(folder) as checkpoint:
        stored = stored_weights(checkpoint, spec)
        weight_bytes = stored.nbytes + (0 if needs is None else needs.weight_bytes)
        require_room(spec, context=wanted, weight_bytes=weight_bytes, cache=kv_type, device=where)
        packed = NOT_KEPT if kept is None else kept.open(checkpoint, [files.config, files.quantization])
        transformer = load_transformer(
            checkpoint,
            spec,
            quantization=files.quantization,
            device=where,
            backend=kernels,
            dtype=resolve_dtype(dtype),
            hurry=accuracy == "fast",
            packed=packed,
            progress=lambda done, total: report(f"loading layer {done} of {total}"),
        )
        packed.keep()
    room = None if needs is None else needs.left(spec, geometry_of(spec, kv_type).bytes_per_page, where)
    length = wanted
    if length is None:
        beside = None if room is None else room + working_bytes(spec)
        length = auto_context(spec, cache=kv_type, device=where, free=beside)
    geometry = geometry_of(spec, kv_type, length)
    if draft_folder is not None and draft_geometry(draft_folder, geometry, where) is None:
        geometry = geometry_of(spec, kv_type)  # what one of the models still sees has to stay for both
    kv = KVStorage(geometry, cache_pages(geometry, length, device=where, free=room), where)
    if kernels == "cuda":
        pages = kv.layer(0)[0]
        for line in attention_lines(spec, pages, where):
            report(line)
        if (why := refusal(spec.head_dim, pages)) is not None:
            log.warning("attention runs in plain torch, which is slow: %s", why)
    info = opened(transformer, kv, context=length, device=str(where), attention=attention_of(kernels, spec, kv))
    return Runtime(
        model=transformer,
        kv=kv,
        tokenizer=tokenizer,
        template=chat_template,
        info=info,
        draft=None if draft_folder is None else drafting(kv, where, kernels, kept),
        speculate=speculate,
        step_tokens=step_tokens,
        host_cache=host_limit(host_cache, where),
    )


def attention_of(backend: str, spec: ModelSpec, kv: KVStorage) -> str:
    """What attends over prompts, in a word."""
    if backend != "cuda":
        return "native" if backend == "cpu" else backend
    pages, windows = kv.layer(0)[0], dict.fromkeys(layer.window for layer in spec.layers)
    options = {"head_dim": spec.head_dim, "pages": pages, "softcap": spec.attention_softcap}
    names = [describe(pages.device, window=window, **options)["prefill"].name for window in windows]
    return "+".join(dict.fromkeys(names))


def find(model: str | Path) -> Path:
    """The folder `model` means. Raises ConfigError with the way out when there is none."""
    if str(model) == DEMO:
        return DEMO_FOLDER
    folder = Path(os.path.expanduser(model))  # leaves ~nobody as it is, where Path.expanduser raises
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        hint = "give the folder that holds it"
        if folder.suffix == ".gguf":
            hint = "GGUF files are not supported; this runtime reads EXL2, GPTQ and safetensors folders"
        raise ConfigError(f"{model} is a file, a model is a folder", hint=hint)
    raise ConfigError(
        f"there is no folder {model}",
        hint="nothing is downloaded: fetch the model first, then give its folder (or `demo`)",
    )


def open_template(folder: Path, tokenizer: Tokenizer, override: str | Path | None) -> ChatTemplate | None:
    """The model's chat template, or the one in the file `override`; None when the model has none (base models)."""
    if override is not None:
        path = Path(os.path.expanduser(override))
        return ChatTemplate.from_text(read_text(path, TemplateError), tokenizer, where=str(path))
    try:
        return ChatTemplate.open(folder, tokenizer)
    except NoTemplate:
        return None


def check_context(context: int | str, spec: ModelSpec) -> int | None:
    """A context length in tokens, None for "auto". Raises UsageError."""
    if context == "auto":
        return None
    if isinstance(context, bool) or not isinstance(context, int) or context < 2:
        raise UsageError(f"context is {context!r}", hint='give a number of tokens from 2 up, or "auto"')
    if context > spec.context_length:
        log.warning(
            "the context of %d tokens is beyond the %d the model was made for; late text may be worse",
            context,
            spec.context_length,
        )
    return context
