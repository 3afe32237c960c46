"""What the unquantized source says about a text: computed once in float32, kept on disk, used for every variant of it.

    with open_reference(source, args, windows, progress) as reference:     # args: add_loading and add_reference
        for each variant:
            require_same_tokenizer(reference, runtime)
            found = divergence.measure(reference, runtime, windows, steps.advance)
        floor = divergence.noise_floor(reference, args, windows, progress)

`windows` is any iterable of Window that gives the same ones each time it is iterated (a list, or an object that reads
the text again); nothing here grows with the text but the file on disk: 2 bytes per token and entry of the vocabulary.

When a file is reused: see `identity.py`.
"""

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl_runtime.console.progress import Progress, Steps
from exl_runtime.errors import EvalError, StorageError
from exl_runtime.files import cache_home, read_json, require_space, write_json

from .identity import Source, Survey, difference, key_of
from .protocol import Window

if TYPE_CHECKING:
    from exl_runtime.runtime import Runtime
    from exl_runtime.tokenizer.tokenizer import Tokenizer

    from .logprobs import Rows
    from .reference_file import Layout, ReferenceFile

COMPUTED = "fp32"  # activations, keys and values of the source


def add_reference(parser: argparse.ArgumentParser) -> None:
    """--reference-cache and --no-reference-cache."""
    group = parser.add_argument_group("reference")
    group.add_argument(
        "--reference-cache",
        type=Path,
        metavar="DIR",
        help="keep what the source says here (default: $XDG_CACHE_HOME or ~/.cache, in exl-runtime/reference)",
    )
    group.add_argument(
        "--no-reference-cache",
        action="store_true",
        help="keep nothing: the source runs beside the model, both in memory at once",
    )


def cache_folder(args: argparse.Namespace) -> Path:
    """Where the options of `add_reference` in `args` keep references; by the XDG base directory specification."""
    if args.reference_cache is not None:
        return Path(os.path.expanduser(args.reference_cache))
    return cache_home() / "exl-runtime" / "reference"


class Reference:
    """The log-probabilities of a source for given windows. Made by `open_reference`; a context manager.

    name        of the source             folder    of the source       path      of the file; None: nothing is kept
    tokenizer   its tokenizer             vocab     entries of a row    longest   tokens of the longest window
    reused      the file was there already              windows   how many
    `rows` may be called from several threads when `path` is not None.
    """

    def __init__(self, source: "Source", survey: "Survey", *, path: Path | None, reused: bool) -> None:
        self.name, self.folder, self.vocab = source.name, source.folder, source.vocab
        self.tokenizer: Tokenizer = source.tokenizer
        self.windows, self.longest = len(survey.counts), survey.longest
        self.path, self.reused = path, reused
        self._counts = survey.counts
        self._runtime: Runtime | None = None
        self._file: ReferenceFile | None = None

    def rows(self, index: int, window: Window) -> "Rows":
        """What the source says about `window`, which is number `index` of those it was opened for.

        Raises ValueError for another window; StorageError; EvalError when the source gives NaN.
        """
        if not 0 <= index < self.windows or len(window.ids) - window.first != self._counts[index]:
            raise ValueError(f"window {index} is not one that this reference was opened for")
        if self._file is not None:
            return self._file.rows(index)
        if self._runtime is None:
            raise ValueError("this reference is closed")
        return _rows(self._runtime, window, self.vocab)

    def remember(self, name: str, facts: Mapping[str, object]) -> None:
        """Keep a small result that belongs to this reference, for `recall`. Raises StorageError."""
        if self.path is not None:
            write_json(self._beside(name), {"key": self.path.stem, **facts})

    def recall(self, name: str) -> dict[str, Any] | None:
        """What `remember` kept; None: nothing. Raises StorageError when damaged, or of another reference."""
        if self.path is None or not self._beside(name).exists():
            return None
        facts = read_json(self._beside(name))
        if facts.pop("key", None) != self.path.stem:
            raise StorageError(f"{self._beside(name)}: belongs to another reference", hint="delete it")
        return facts

    def describe(self) -> str:
        """One line about where the figures of the source come from."""
        how = f"{self.name} in float32"
        if self.path is None:
            return f"{how}, computed beside the model"
        size = f"{self.path.stat().st_size / 2**20:.1f} MiB" if self.path.exists() else "deleted since"
        return f"{how}, {'reused from' if self.reused else 'kept in'} {self.path} ({size})"

    def close(self) -> None:
        """Free the memory or the file."""
        if self._file is not None:
            self._file.close()
        if self._runtime is not None:
            self._runtime.close()
        self._file = self._runtime = None

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _beside(self, name: str) -> Path:
        assert self.path is not None
        return self.path.with_suffix(f".{name}.json")


def open_reference(
    source: str | Path, args: argparse.Namespace, windows: Iterable[Window], progress: Progress
) -> Reference:
    """What `source` says about `windows`, out of the cache, or computed now and put there.

    source    a model folder, or "demo"; opened with dtype and cache fp32 when its file is not there
    args      the options of `opening.add_loading` and `add_reference`
    windows   see the top of this file
    With --no-reference-cache the source is opened and stays open until `close`.
    Raises EvalError for no window or NaN logits, StorageError when the disk is full or refuses, and what opening a
    model and `windows` raise. A file that is damaged or not ours is reported in one line and made anew.
    """
    from .opening import open_model

    opened = Source.find(source)
    survey = Survey.of(windows)

    def run() -> Any:
        return open_model(source, args, progress, context=max(2, survey.longest), cache=COMPUTED, dtype=COMPUTED)

    if args.no_reference_cache:
        reference = Reference(opened, survey, path=None, reused=False)
        reference._runtime = run()
        return reference

    from .reference_file import SUFFIX, Layout, ReferenceFile

    layout = Layout(key_of(opened, survey, COMPUTED, (args.device, args.backend)), opened.vocab, survey.counts)
    path = cache_folder(args) / f"{layout.key}{SUFFIX}"
    reused = _usable(path, layout, progress)
    if not reused:
        _require_space(path, layout)
        with (
            run() as runtime,
            progress.stage(f"reference {opened.name}", total=len(survey.counts), unit="windows") as steps,
        ):
            _keep(path, layout, _computed(runtime, windows, opened.vocab, steps))
    reference = Reference(opened, survey, path=path, reused=reused)
    reference._file = ReferenceFile(path, layout)
    return reference


def require_same_tokenizer(a: "Runtime | Reference", b: "Runtime | Reference") -> None:
    """EvalError, one line, unless both read and write the same token ids: same vocabulary, same ids for some texts."""
    names = [x.name if isinstance(x, Reference) else x.info.name for x in (a, b)]
    why = difference(a.tokenizer, b.tokenizer)
    if why:
        raise _not_comparable(names[0], names[1], why)


def require_comparable(source: str | Path, model: str | Path) -> None:
    """`require_same_tokenizer` and the same number of logits, from the folders: before anything large is opened.

    Raises EvalError, and what opening the tokenizers and configurations raises.
    """
    a, b = Source.find(source), Source.find(model)
    why = difference(a.tokenizer, b.tokenizer)
    if not why and a.vocab != b.vocab:
        why = f"the models have {a.vocab} and {b.vocab} logits per token"
    if why:
        raise _not_comparable(a.name, b.name, why)


# --- inside -----------------------------------------------------------------------------------------------------------


def _usable(path: Path, layout: "Layout", progress: Progress) -> bool:
    from .reference_file import flaw

    try:
        why = flaw(path, layout)
    except FileNotFoundError:
        return False
    if why:
        progress.warn(f"{path}: {why}; it is computed anew")
    return not why


def _require_space(path: Path, layout: "Layout") -> None:
    try:
        require_space(path.parent, layout.nbytes, "the reference")
    except StorageError as err:
        raise StorageError(
            err.problem, hint="fewer --rows, --reference-cache on another disk, or --no-reference-cache"
        ) from err


def _keep(path: Path, layout: "Layout", computed: "Iterator[Rows]") -> None:
    from .reference_file import write

    try:
        write(path, layout, computed)
    except StorageError as err:
        raise StorageError(err.problem, hint=f"{err.hint}; or use --reference-cache, --no-reference-cache") from err


def _computed(runtime: "Runtime", windows: Iterable[Window], vocab: int, steps: Steps) -> "Iterator[Rows]":
    for window in windows:
        yield _rows(runtime, window, vocab)
        steps.advance()


def _rows(runtime: "Runtime", window: Window, vocab: int) -> "Rows":
    import torch

    from .logprobs import Rows
    from .scoring import score

    targets = torch.tensor(window.ids[window.first :])
    rows = Rows.empty(len(targets), vocab)
    score(runtime, window, lambda positions, logprobs: rows.put(positions, logprobs, targets[positions]))
    return rows


def _not_comparable(a: str, b: str, why: str) -> EvalError:
    return EvalError(
        f"{a} and {b} cannot be compared: {why}", hint="the reference must be the model that this one was made from"
    )
