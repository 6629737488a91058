"""The Hugging Face hub: names, revisions, whether it can be reached, and what its errors mean."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from capcli.config import ALIASES, BUILTIN_MODEL, nearest
from capcli.errors import ModelError

BUILTIN_FOLDER = Path(__file__).parent / "data" / "mini"


def resolve(source: str) -> tuple[str, str | None]:
    """The local folder or hub id behind a MODEL argument, and the revision after `@`, if any."""
    if source == BUILTIN_MODEL:
        return str(BUILTIN_FOLDER), None
    if Path(source).is_dir():
        return source, None
    name, _, revision = source.partition("@")
    name = ALIASES.get(name, name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "-")):
        raise ModelError(f"no model folder at {source!r}, and it is not a hub name either", _model_hint(source))
    return name, revision or None


def _model_hint(source: str) -> str:
    return "a folder, a hub id, or a short name; " + nearest(source, (BUILTIN_MODEL, *ALIASES))


def reach(name: str, source: str, revision: str | None) -> None:
    """One quick request for a model that is not cached; the hub's own client would try again for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        with quiet():
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except Exception as error:
        raise explained(error, name, source) from error


def explained(error: Exception, path: str, source: str) -> ModelError:
    """What a failed load of the model `source` from `path` means, in one line with a hint."""
    text = first_line(error)
    chain = " ".join(type(e).__name__ for e in (error, error.__cause__, error.__context__) if e is not None)
    if "SafetensorError" in chain:
        return ModelError(f"the weights of {source} are corrupt: {text}", "download or copy the model again")
    if "trust_remote_code" in str(error):
        return ModelError(f"{source} needs its own code; capcli never runs code from a model folder")
    if Path(path).is_dir():
        if "safetensors" in str(error):
            return _no_safetensors(source)
        return ModelError(f"cannot load {source}: {text}")
    if "RemoteEntryNotFound" in chain:
        return ModelError(f"{source} is on the hub, but without a file that is needed: {str(error).splitlines()[-1]}")
    if "RepositoryNotFound" in chain or "404" in text or "not a valid model identifier" in str(error):
        return ModelError(f"there is no model {source!r} on the hub", _model_hint(source))
    if (
        any(word in chain for word in ("Connect", "Offline", "LocalEntryNotFound", "Timeout"))
        or "connect" in text.lower()
    ):
        return ModelError(
            f"cannot reach the model hub for {source!r}, and it is not in the local cache",
            f"check the network, give a local folder, or try the built-in model {BUILTIN_MODEL!r}; "
            + nearest(source, (BUILTIN_MODEL, *ALIASES)),
        )
    if "safetensors" in str(error) or "Can't load the model" in str(error):
        return _no_safetensors(source)
    return ModelError(f"cannot load {source!r}: {text}", _model_hint(source))


def _no_safetensors(source: str) -> ModelError:
    return ModelError(
        f"{source} has no model.safetensors",
        "pickled weights are never read; save the model again as safetensors",
    )


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the hub client's own warnings away; what they would say is said by us."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
