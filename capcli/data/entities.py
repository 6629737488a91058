"""Tags as entities: whether labels are of such a scheme, and which entities a row of tags holds."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PREFIXED = re.compile(r"[BIESLU](-.+)?", re.DOTALL)


def is_entity_scheme(names: Sequence[str]) -> bool:
    """Whether the tags are IOB1, IOB2, IOE, BIOES or BILOU: O, and names such as B-PER, of which there is one at least.

    A letter without a type (B, I) counts only beside O: on its own it can be the name of anything.
    """
    others = [name for name in names if name != "O"]
    typed = all("-" in name for name in others) or len(others) < len(names)
    return bool(others) and typed and all(_PREFIXED.fullmatch(name) for name in others)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, last word) of the entities of one sentence, by the lenient rules of conlleval and seqeval.

    An entity begins at B, S and U, after E, L and S, U, after O, and where the type changes; I and E need no B before.
    nervaluate knows B, I, O and types, so the other letters are first said with these.
    """
    from nervaluate import collect_named_entities

    plain = []
    for before, tag in zip(["O", *tags], tags, strict=False):
        begins = tag[:1] in "BSU" or before[:1] in "ESLU"
        plain.append("O" if tag == "O" else ("B" if begins else "I") + tag[1:])
    return {(one["label"], one["start"], one["end"]) for one in collect_named_entities(plain)}
