"""The asset bundle: models, users, movies and keywords of the MovieLens benchmark in one directory.

    bundle.json            what is in it, and a checksum of every other file
    users.safetensors      ids (n_users,) int64, vectors (n_users, d_x) float32
    items.csv              item_id,title,genres,year; genres separated by |
    keywords.csv           keyword,kind,group; the first n are a balanced catalogue for every n
    no_prompt.csv          item_id,sample,sentence: what the language model says without a keyword
    lm/  simulator/        Hugging Face directories; the simulator's has a head beside the encoder
    encoders/              principal components for sentences, queries and prompts
    collaborative.safetensors

Files are checked against their size and SHA-256 when they are first used.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from offprompts_env.errors import BundleError
from offprompts_env.folders import checksums, difference
from offprompts_env.types import FloatArray, IntArray

if TYPE_CHECKING:
    from offprompts_env.movielens.collaborative import CollaborativeModel
    from offprompts_env.movielens.simulator import LikeSimulator
    from offprompts_env.text.decoding import Decoding
    from offprompts_env.text.encoder import PCAEncoder, Pooling, TextEncoder
    from offprompts_env.text.language_model import CausalLM, LanguageModel
    from offprompts_env.text.prompted import PromptFormatter
    from offprompts_env.text.served import Server

RowT = TypeVar("RowT")

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
_EMBEDDED = Path(str(resources.files("offprompts_env") / "assets" / "movielens"))


@dataclass(frozen=True)
class BundleInfo:
    """What `bundle.json` says, besides checksums.

    Attributes:
        name: of the bundle.
        template: request with ``{query}`` and ``{prompt}``.
        template_without_prompt: request with ``{query}``.
        decoding: settings of :class:`~offprompts_env.text.decoding.Decoding` that differ from its defaults.
        language_model: of a language model from elsewhere: ``source``, a directory or hub id where the bundle holds no
            copy, ``sha256`` or ``revision`` of what was there, ``chat_template``, ``pad_token``, ``dtype``,
            ``device_map``; or ``server``, the address (``url``) and settings of the one that is asked there.
        user_features: names of the columns of user vectors.
        config: settings of the pipeline that built it.
        domain: what its items are: "movies", or "own" for a bundle built from a user's own files.
    """

    name: str
    template: str
    template_without_prompt: str
    decoding: Mapping[str, Any] = field(default_factory=dict)
    language_model: Mapping[str, Any] = field(default_factory=dict)
    user_features: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    domain: str = "movies"


@dataclass(frozen=True, eq=False)
class Users:
    """Users: `ids` (n,) int64 and taste `vectors` (n, d_x) float32."""

    ids: IntArray
    vectors: FloatArray


@dataclass(frozen=True, eq=False)
class Items:
    """Movies: `ids` (n,) int64, titles with the year, genres, years (0 where unknown)."""

    ids: IntArray
    titles: tuple[str, ...]
    genres: tuple[tuple[str, ...], ...]
    years: IntArray


@dataclass(frozen=True, slots=True)
class KeywordEntry:
    """A keyword of the catalogue, with what kind of word it is and to which group it belongs."""

    text: str
    kind: str
    group: str


def write_manifest(directory: str | Path, info: BundleInfo) -> Path:
    """Write `bundle.json` for the files that lie in `directory`, all of them, and return its path."""
    folder = Path(directory)
    described = {"format_version": FORMAT_VERSION, **vars(info), "files": checksums(folder, besides=MANIFEST)}
    target = folder / MANIFEST
    target.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def _remedy(directory: Path) -> str:
    """Return what to do about a bundle that cannot be used."""
    if directory == _EMBEDDED:
        return "reinstall offprompts-env"
    return "build it again with 'offprompts build-assets', or check the path"


class Bundle:
    """A bundle on disk, read piece by piece as it is needed.

    Args:
        directory: where it lies.
        info: what it says of itself.
        files: size and SHA-256 of every file.
        device: where its models compute.
    """

    def __init__(
        self, directory: Path, info: BundleInfo, files: Mapping[str, Mapping[str, Any]], *, device: str = "cpu"
    ) -> None:
        self.directory, self.info, self.files, self.device = directory, info, files, device
        self._checked: set[str] = set()
        self._text_encoders: dict[tuple[Any, ...], TextEncoder] = {}

    @classmethod
    def open(cls, path: str | Path | None = None, *, device: str = "cpu") -> Bundle:
        """Open the bundle in the directory `path`, or the embedded one.

        Raises:
            BundleError: there is none, or its format is newer than this package.
        """
        folder = _EMBEDDED if path is None else Path(path)
        try:
            described = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            version = described.pop("format_version")
            if version > FORMAT_VERSION:
                raise BundleError(
                    f"bundle: {folder} has format version {version}, this package reads up to {FORMAT_VERSION}; "
                    "update offprompts-env"
                )
            files = described.pop("files")
            described["user_features"] = tuple(described["user_features"])
            return cls(folder, BundleInfo(**described), files, device=device)
        except FileNotFoundError as error:
            raise BundleError(f"bundle: expected {MANIFEST} in {folder}, found none; {_remedy(folder)}") from error
        except (ValueError, KeyError, TypeError, AttributeError, NotADirectoryError) as error:
            raise BundleError(f"bundle: cannot read {folder / MANIFEST} ({error!r}); {_remedy(folder)}") from error

    def file(self, name: str) -> Path:
        """Return the path of a file after checking it against its checksum.

        Raises:
            BundleError: the file is missing or differs.
        """
        path = self.directory / name
        if name in self._checked:
            return path
        if name not in self.files:
            raise BundleError(f"bundle: {self.directory} lists no file {name!r}; {_remedy(self.directory)}")
        found = difference(path, self.files[name])
        if found is not None:
            raise BundleError(f"bundle: {path}: {found}; {_remedy(self.directory)}")
        self._checked.add(name)
        return path

    def folder(self, name: str) -> Path:
        """Return the path of a directory after checking all files in it.

        Raises:
            BundleError: a file is missing or differs, or there is no such directory.
        """
        inside = [file for file in self.files if file.startswith(f"{name}/")]
        if not inside:
            raise BundleError(f"bundle: {self.directory} lists no directory {name!r}; {_remedy(self.directory)}")
        for file in inside:
            self.file(file)
        return self.directory / name

    def verify(self) -> None:
        """Check every file.

        Raises:
            BundleError: the first one that is missing or differs.
        """
        for name in self.files:
            self.file(name)

    @cached_property
    def users(self) -> Users:
        """Users and their taste vectors."""
        from safetensors.numpy import load_file

        tensors = load_file(self.file("users.safetensors"))
        return Users(tensors["ids"].astype(np.int64), tensors["vectors"].astype(np.float32))

    @cached_property
    def items(self) -> Items:
        """Movies, or what the domain has in their place: with features for genres, and without years."""
        movies = self.info.domain == "movies"

        def parse(row: Sequence[str]) -> tuple[int, str, tuple[str, ...], int]:
            item, title, genres, year = row if movies else (*row, "")
            return int(item), title, tuple(genres.split("|")), int(year or 0)

        header = ("item_id", "title", "genres", "year") if movies else ("item_id", "title", "features")
        ids, titles, genres, years = zip(*self._rows("items.csv", header, parse), strict=True)
        return Items(np.array(ids), titles, genres, np.array(years))

    @cached_property
    def keywords(self) -> tuple[KeywordEntry, ...]:
        """Keywords, in catalogue order."""
        return tuple(self._rows("keywords.csv", ("keyword", "kind", "group"), lambda row: KeywordEntry(*row)))

    @cached_property
    def no_prompt_sentences(self) -> Mapping[str, tuple[str, ...]]:
        """What the language model says of each title without a keyword."""
        title_of = dict(zip(self.items.ids.tolist(), self.items.titles, strict=True))
        sentences: dict[str, tuple[str, ...]] = {}

        def parse(row: Sequence[str]) -> tuple[str, str]:
            item, sample, sentence = row
            int(sample)
            return title_of[int(item)], sentence

        for title, sentence in self._rows("no_prompt.csv", ("item_id", "sample", "sentence"), parse):
            sentences[title] = (*sentences.get(title, ()), sentence)
        return sentences

    def _rows(self, name: str, header: tuple[str, ...], parse: Callable[[Sequence[str]], RowT]) -> list[RowT]:
        """Return the parsed rows of a table.

        Raises:
            BundleError: the header is another one, a row cannot be parsed, or there is none.
        """
        path, number, row = self.file(name), 0, None
        parsed: list[RowT] = []
        cause: Exception | None = None
        try:
            with path.open(encoding="utf-8", newline="") as file:
                for number, row in enumerate(csv.reader(file)):
                    if number > 0:
                        parsed.append(parse(row))
                    elif tuple(row) != header:
                        break
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            cause = error
        if cause is not None or not parsed:
            raise BundleError(
                f"bundle: {path}, row {number}: expected {','.join(header)}{'' if number else ' and then rows'}, "
                f"got {row!r}{'' if cause is None else f' ({cause!r})'}; {_remedy(self.directory)}"
            ) from cause
        return parsed

    @property
    def formatter(self) -> PromptFormatter:
        """Makes requests as the language model was trained on them."""
        from offprompts_env.text.prompted import PromptFormatter

        return PromptFormatter(self.info.template, self.info.template_without_prompt)

    @property
    def decoding(self) -> Decoding:
        """Decoding settings of the bundle."""
        from offprompts_env.text.decoding import Decoding

        return Decoding.from_mapping(self.info.decoding)

    @property
    def server(self) -> Server | None:
        """The server that writes the sentences; None where the bundle has a language model, or names one."""
        from offprompts_env.text.served import Server

        said = self.info.language_model
        if "server" not in said:
            return None
        named = dict(said["server"])
        return Server.from_mapping(named.pop("url"), named, chat=said.get("chat_template", False))

    @cached_property
    def writer(self) -> LanguageModel:
        """What writes the sentences, with the bundle's own decoding: the server, or else the language model."""
        from offprompts_env.text.served import ServedLM

        return self.language_model if self.server is None else ServedLM(self.server, self.decoding)

    @cached_property
    def language_model(self) -> CausalLM:
        """The language model in process, with the bundle's own decoding.

        Raises:
            BundleError: there is none, since a server writes the sentences.
        """
        from offprompts_env.text.language_model import CausalLM

        said = self.info.language_model
        if "server" in said:
            raise BundleError(
                f"bundle: expected a language model in {self.directory}, but a server writes its sentences; ask "
                "bundle.writer, or build again with a model in a directory"
            )
        return CausalLM.from_pretrained(
            self._named_model() or self.folder("lm"),
            decoding=self.decoding,
            device=self.device,
            dtype=said.get("dtype", "auto"),
            chat_template=said.get("chat_template", False),
            pad_token=said.get("pad_token"),
            device_map=said.get("device_map"),
            model_kwargs=said.get("model_kwargs"),
            revision=said.get("revision"),
        )

    def _named_model(self) -> str | None:
        """Return where the language model is that the bundle only names; None where it holds a copy.

        Raises:
            BundleError: another model has taken its place.
        """
        from offprompts_env.text.loading import pin

        said = self.info.language_model
        source: str | None = said.get("source")
        if source is not None and "sha256" in said and (found := pin(source)) != {"sha256": said["sha256"]}:
            raise BundleError(
                f"bundle: expected the language model in {source} that this was built with, of checksum "
                f"{said['sha256'][:16]}, got another one, {found.get('sha256', 'from the hub')[:16]}; bring it back, "
                "or build again"
            )
        return source

    @cached_property
    def simulator(self) -> LikeSimulator:
        """The reward simulator."""
        from offprompts_env.movielens.simulator import LikeSimulator
        from offprompts_env.text.loading import quiet_loading

        with quiet_loading():
            return LikeSimulator.load(self.folder("simulator"), device=self.device)

    @cached_property
    def collaborative(self) -> CollaborativeModel:
        """The collaborative-filtering model; it reads the states of :attr:`reward_encoder`."""
        from offprompts_env.movielens.collaborative import CollaborativeModel

        return CollaborativeModel.load(self.file("collaborative.safetensors"))

    def encoder(self, name: str) -> PCAEncoder:
        """Return the encoder "sentence", "query" or "prompt".

        Encoders of the bundle share one copy of each model, also with the language model and the simulator.
        """
        from offprompts_env.text.encoder import PCAEncoder

        for suffix in ("json", "safetensors"):
            self.file(f"encoders/{name}.{suffix}")
        described = json.loads((self.directory / "encoders" / f"{name}.json").read_text(encoding="utf-8"))
        states = self.text_encoder(
            Path(described["model"]).name, described["pooling"], described["layer"], described["max_tokens"]
        )
        return PCAEncoder.load(self.directory / "encoders", name, encoder=states)

    @property
    def reward_encoder(self) -> TextEncoder:
        """The encoder whose states the simulator reads."""
        config = self.simulator.config
        return self.text_encoder("simulator", config.pooling, -1, config.max_tokens)

    def text_encoder(self, model: str, pooling: Pooling, layer: int, max_tokens: int | None) -> TextEncoder:
        """Return the pooled states of the bundle's model "lm" or "simulator".

        The same settings give the same object, which remembers its last batch: a sentence that is embedded and then
        judged is encoded once.
        """
        from offprompts_env.text.encoder import TextEncoder

        pad_token = None
        if model == "simulator":
            network, tokenizer = self.simulator.encoder, self.simulator.tokenizer
        elif model == "lm":
            network, tokenizer = self.language_model.model.base_model, self.language_model.tokenizer
            pad_token = self.info.language_model.get("pad_token")
        else:
            raise BundleError(
                f"bundle: expected an encoder of 'lm' or 'simulator', got {model!r}; {_remedy(self.directory)}"
            )
        made = TextEncoder(network, tokenizer, pooling=pooling, layer=layer, max_tokens=max_tokens, pad_token=pad_token)
        return self._text_encoders.setdefault((model, pooling, layer, made.max_tokens), made)
