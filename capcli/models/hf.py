"""Calling transformers safely: no pickle, no remote code, failures as one clear line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from capcli.data.kinds import KINDS
from capcli.errors import ModelError, first_line
from capcli.sources import requests

UNSEEN = "sdpa_unseen"  # what `attend` calls its way to attend, where transformers looks these up


def auto_class(kind: str) -> Any:
    """The class of transformers that makes networks for this kind of task."""
    import transformers

    return getattr(transformers, KINDS[kind].head)


def class_for(config: Any, kind: str) -> Any:
    """The class of transformers for this kind of task and model. Raises `KeyError`."""
    return auto_class(kind)._model_mapping[type(config)]


def class_name(config: Any, kind: str) -> str:
    """The name of that class; empty where transformers has none."""
    return getattr(auto_class(kind)._model_mapping.get(type(config), None), "__name__", "")


def key_mapping(config: Any, kind: str) -> dict[str, str] | None:
    """Where the network of this kind calls its base model otherwise than the others of its family do, as Llama's."""
    own = _prefix(config, kind)
    others = {_prefix(config, other) for other in KINDS} - {own, ""}
    return {rf"^{other}\.": f"{own}." for other in sorted(others)} if own and others else None


def _prefix(config: Any, kind: str) -> str:
    """What the network of this kind calls its base model; empty where transformers has none."""
    return getattr(auto_class(kind)._model_mapping.get(type(config), None), "base_model_prefix", "")


def read_pretrained(reader: Callable[..., Any], path: str, source: str, **options: Any) -> Any:
    """Call a `from_pretrained` safely: no pickle, no remote code, 32-bit floats; failures as one clear line."""
    if reader.__self__.__name__.startswith("AutoModel"):  # type: ignore[attr-defined]
        options |= {"use_safetensors": True, "dtype": torch.float32}
    try:
        with quietly():
            return reader(path, trust_remote_code=False, **options)
    except Exception as error:
        raise unread(error, path, source) from error


def read_config(path: str, source: str) -> Any:
    """The configuration in a folder. Raises `ModelError`."""
    from transformers import AutoConfig

    return read_pretrained(AutoConfig.from_pretrained, path, source)


def unread(error: Exception, path: str, source: str) -> ModelError:
    """What it means that transformers does not read the model `source` in the folder `path`."""
    if "Unrecognized configuration class" in str(error):
        return ModelError(f"transformers has no head of this kind for {source}: {first_line(error)}")
    return requests.explained(error, path, source)


def model_output(found: Mapping[str, torch.Tensor]) -> Any:
    """Tensors by name, in the type that networks of transformers return."""
    from transformers.utils import ModelOutput

    return ModelOutput(**found)


def base_output(states: Tensor, pooled: Tensor | None, hidden_states: tuple[Tensor, ...] | None) -> Any:
    """What a base model puts out, for heads that another implementation of its layers serves."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled, hidden_states=hidden_states)


def attend(net: Any, device: torch.device) -> None:
    """Let a network that attends by `sdpa` apply the mask of the padding on an accelerator, whatever is in it.

    Transformers looks for padding in each forward pass, to do without a mask where there is none, and so waits for the
    device. Results differ in rounding at most.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    wanted = "sdpa" if device.type == "cpu" else UNSEEN
    if getattr(net.config, "_attn_implementation", None) not in {"sdpa", UNSEEN} - {wanted}:
        return
    AttentionInterface.register(UNSEEN, AttentionInterface()["sdpa"])
    AttentionMaskInterface.register(UNSEEN, _mask_unseen)
    net.set_attn_implementation(wanted)


def _mask_unseen(*args: Any, **named: Any) -> Tensor | None:
    """The mask of `sdpa`, made without a look at the padding."""
    from transformers import AttentionMaskInterface

    looks = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    made: Tensor | None = AttentionMaskInterface()["sdpa"](*args, **(named | looks))
    return made


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' progress bars and load reports away; what they would say is checked or said by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with requests.quiet():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
