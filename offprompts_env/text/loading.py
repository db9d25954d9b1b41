"""Loading frozen Hugging Face models and tokenizers: devices, number types, fingerprints, and readable errors."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offprompts_env.config import PLACEMENT
from offprompts_env.errors import ConfigError, ModelError, missing_dependency, unknown_name

# Weights up to this size are hashed whole; of larger ones every tensor gives an evenly spaced sample.
_HASHED_WHOLE = 256 << 20
_HASHED_SAMPLE = 4096

# What a model is made of, by the ends of file names.
_MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja")

# Arguments of `from_pretrained` that are set here, and by what else they are asked for.
_SET_HERE = {
    **dict.fromkeys(("dtype", "torch_dtype"), "pass dtype="),
    "device_map": "pass device_map=",
    "revision": "pass revision=",
    **dict.fromkeys(
        ("trust_remote_code", "use_safetensors", "weights_only", "allow_all_kernels", "use_kernels", "kernel_config"),
        "no code that comes with a model is run",
    ),
    **dict.fromkeys(
        (
            "config",
            "generation_config",
            "state_dict",
            "local_files_only",
            "subfolder",
            "cache_dir",
            "token",
            "output_loading_info",
            "pretrained_model_name_or_path",
            "gguf_file",
        ),
        "leave it out",
    ),
}

MODEL_KWARGS = '{"attn_implementation": "eager"}'
"""An example of further arguments, as JSON."""

DTYPES = ("auto", "float32", "float16", "bfloat16")


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; ``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: no such device, or none of its kind on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:0', got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} was asked for, but torch finds no CUDA device here; use 'cpu' or 'auto'")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Return the number type to compute in.

    ``"auto"`` is float32 on the CPU, where half precision is slow, and the checkpoint's own type elsewhere.
    """
    if name not in DTYPES:
        raise unknown_name("dtype", name, DTYPES)
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Load models without progress bars, and without drawing from torch's global generator."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_frozen(
    auto_class: Any,
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Return the model and the tokenizer at `source`, in evaluation mode and without gradients.

    Only safetensors weights are read, and no code that comes with a model is run.

    Args:
        auto_class: ``AutoModel``, ``AutoModelForCausalLM`` or the like.
        source: a directory, or the id of a model on the hub.
        device: where it computes; see :func:`resolve_device`.
        dtype: what it computes in; see :func:`resolve_dtype`.
        device_map: how its layers are spread over devices, in place of `device`; needs accelerate.
        revision: commit of a model on the hub; None for the newest.
        model_kwargs: further arguments of ``from_pretrained``; see :func:`check_model_kwargs`.

    Raises:
        ConfigError: `device_map` is neither text nor a mapping; or `model_kwargs` names what is set here, or what needs
            a `device_map`.
        MissingDependencyError: accelerate is needed (`device_map`, quantized models) and not installed.
        ModelError: there is no such model, or it cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    place = resolve_device(device if device_map is None else "auto")
    number_type = resolve_dtype(dtype, place)
    more = check_model_kwargs(model_kwargs or {}, spread=device_map is not None)
    if device_map is not None and not isinstance(device_map, str | Mapping):
        raise ConfigError(f"device_map: expected 'auto' or modules and their devices, got {device_map!r}")
    with _found(source) as (name, where):
        # The smallest file first: without a hub, every file asked for waits through retries of its own.
        config = AutoConfig.from_pretrained(name, **where, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(name, **where, revision=revision)
    if device_map is None and ("quantization_config" in more or getattr(config, "quantization_config", None)):
        # Most of what quantizes cannot be moved later, and would choose a device of its own.
        device_map = {"": str(place)}
    if device_map is not None:
        if importlib.util.find_spec("accelerate") is None:
            raise missing_dependency("accelerate", "accelerate", "device_map or a quantized model")
        more["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    given = {**more, "dtype": number_type, "revision": revision, **where}
    with _loadable(name, more), quiet_loading():
        model = auto_class.from_pretrained(name, config=config, use_safetensors=True, **given)
    return freeze(model if device_map is not None else model.to(place)), tokenizer


def check_model_kwargs(model_kwargs: Mapping[str, Any], *, spread: bool = True) -> dict[str, Any]:
    """Return further arguments of ``from_pretrained``, as that takes them.

    Such as ``attn_implementation``, ``max_memory``, ``offload_folder``, or ``quantization_config``, a mapping with its
    ``quant_method``.

    Args:
        model_kwargs: the arguments.
        spread: whether there is a ``device_map``.

    Raises:
        ConfigError: it is no mapping that JSON can hold, names what this package sets, would let code be run that comes
            with a model, or says how layers are spread where they are not.
    """
    if not isinstance(model_kwargs, Mapping) or not all(isinstance(name, str) for name in model_kwargs):
        raise ConfigError(f"model_kwargs: expected names and values, such as {MODEL_KWARGS}, got {model_kwargs!r}")
    for name in model_kwargs:
        if name in _SET_HERE or name.startswith("_"):
            remedy = _SET_HERE.get(name, "leave it out")
            raise ConfigError(f"model_kwargs: expected arguments that are not set already, got {name!r}; {remedy}")
        if name in PLACEMENT and not spread:
            raise ConfigError(f"model_kwargs: {name} says how layers are spread; pass device_map too, 'auto' say")
    attention = model_kwargs.get("attn_implementation")
    if "/" in str(attention):
        raise ConfigError(
            f"model_kwargs: expected an attn_implementation of transformers, got {attention!r} of a hub; no code that "
            "comes from there is run"
        )
    try:
        json.dumps(dict(model_kwargs), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model_kwargs: expected values that JSON can hold, got {model_kwargs!r}: {error}") from error
    found = dict(model_kwargs)
    if isinstance(room := found.get("max_memory"), Mapping):
        # Accelerators are called 0, 1, ..., which are texts in JSON.
        found["max_memory"] = {int(name) if str(name).isdigit() else name: size for name, size in room.items()}
    return found


@contextmanager
def _found(source: str | Path) -> Iterator[tuple[str, dict[str, bool]]]:
    """Give the name of the model at `source` and where to look for it; what goes wrong inside becomes a ModelError."""
    local = Path(source).expanduser()
    looks_local = isinstance(source, Path) or str(source).startswith((".", "/", "~", "\\"))
    if not local.is_dir() and looks_local:
        raise ModelError(f"model: expected a directory at {str(source)!r}, found none; check the path")
    name = str(local) if local.is_dir() else str(source)
    try:
        yield name, {"local_files_only": local.is_dir()}
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = (
            f"the directory {name!r} is not a complete model with a tokenizer and safetensors weights"
            if local.is_dir()
            else f"there is no directory {name!r}, and the model hub has no such id or cannot be reached from here; "
            "download the model on a machine with hub access and pass its directory"
        )
        raise ModelError(f"model: cannot load {name!r}: {where} ({_first_line(error)})") from error


@contextmanager
def _loadable(name: str, given: Mapping[str, Any]) -> Iterator[None]:
    """Weights are loaded inside; what goes wrong becomes a ModelError that names the arguments `given`."""
    if not given:
        with _found(name):
            yield
        return
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # Whatever an argument may be wrong in, each architecture and each way to quantize has errors of its own.
    except Exception as error:
        raise ModelError(
            f"model: cannot load {name!r} with {given}: {_first_line(error)} ({type(error).__name__}); check these "
            "arguments, what they need to be installed, and that it is a complete model with safetensors weights"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def pin(source: str | Path) -> dict[str, str]:
    """Return what tells the model at `source` from another one that takes its place.

    Of a directory ``{"sha256": digest}`` over names, sizes and contents of its weights, settings and tokenizer; a file
    above 256 MiB enters by 4,096 evenly spaced blocks of 4 KiB. Of a model on the hub ``{"revision": commit}``.

    Raises:
        ModelError: there is no such model.
    """
    local = Path(source).expanduser()
    if local.is_dir():
        digest = hashlib.sha256()
        for file in sorted(path for path in local.iterdir() if path.suffix in _MODEL_FILES and path.is_file()):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            _read_into(digest, file)
        return {"sha256": digest.hexdigest()}
    from transformers.utils.hub import cached_file

    with _found(source) as (name, where):
        # The hub's cache has a folder a commit: …/snapshots/<commit>/config.json.
        return {"revision": Path(str(cached_file(name, "config.json", **where))).parent.name}


def _read_into(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as data:
        if size <= _HASHED_WHOLE:
            while block := data.read(1 << 20):
                digest.update(block)
            return
        for number in range(_HASHED_SAMPLE):
            data.seek(number * size // _HASHED_SAMPLE)
            digest.update(data.read(4096))


def input_device(model: Any) -> torch.device:
    """Return the device on which token ids go in: that of the embedding, also where its weights are put aside."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    return embedding.weight.device if place is None else torch.device(place)


def freeze(model: Any) -> Any:
    """Return `model` in evaluation mode with gradients off."""
    return model.eval().requires_grad_(False)


def fingerprint_of(model: nn.Module, tokenizer: Any, *settings: object) -> str:
    """Return 16 hexadecimal digits of SHA-256 over weights, tokenizer and whatever else shapes the output.

    Weights above 256 MiB enter by name, shape and 4,096 evenly spaced values of each tensor, so that a model of many
    gigabytes is told apart from another one without reading it all.
    """
    digest = hashlib.sha256()
    state = model.state_dict()
    if any(value.is_meta for value in state.values()):
        # Layers that device_map put aside are read one after the other, as in a forward pass.
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        state = get_state_dict_offloaded_model(model)
    whole = sum(value.numel() * value.element_size() for value in state.values()) <= _HASHED_WHOLE
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().flatten()
        if not whole:
            flat = flat[:: max(1, flat.numel() // _HASHED_SAMPLE)]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if quantized := getattr(getattr(model, "config", None), "quantization_config", None):
        # What is computed in, and from where on, is in no weight.
        told = quantized if isinstance(quantized, dict) else quantized.to_dict()
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    digest.update((backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))).encode())
    digest.update(repr(settings).encode())
    return digest.hexdigest()[:16]


def pad_id(tokenizer: Any, pad_token: str | None = None) -> int:
    """Return the token that fills short rows: `pad_token` where given, else the tokenizer's own.

    Raises:
        ModelError: there is none, or `pad_token` is not in the vocabulary.
    """
    if pad_token is not None:
        token_id = tokenizer.convert_tokens_to_ids(pad_token)
        if token_id is None or (token_id == tokenizer.unk_token_id and pad_token != tokenizer.unk_token):
            raise ModelError(f"pad_token: {pad_token!r} is not a token of this tokenizer; pass one of its vocabulary")
        return int(token_id)
    if tokenizer.pad_token_id is None:
        usual = tokenizer.eos_token or "</s>"
        raise ModelError(
            f"tokenizer: it has no pad token, which batches need; pass pad_token={usual!r} "
            "(the end-of-sentence token is the usual choice; padding is masked and changes no result)"
        )
    return int(tokenizer.pad_token_id)
