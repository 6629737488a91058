"""Several processes that make one run together: who they are, and what they tell one another.

A launcher such as torchrun starts R processes (ranks) of the same command, and says to each which one it is. Rank 0
alone writes and prints. Without a launcher every function here gives back what it got, and imports nothing. This is the
only file that knows of torch.distributed.

What is said to be common is called by all ranks in the same order. When a rank ends early, the next common call of the
others raises what it said, or `RunFailed` that names it.

Letters: R ranks, B rows of a batch of all of them.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from capcli.errors import CapError, CheckFailed, ConfigError, RunFailed, Stopped, first_line

if TYPE_CHECKING:
    from torch import Tensor

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets
LAUNCH = f"start the processes with torchrun, or unset {', '.join(VARIABLES)}"
AGAIN = "run the same command again to continue"
BEAT_SECONDS, SILENCE_SECONDS = 0.5, 5.0  # how often a rank says that it lives; after how long it counts as dead
LOOK_SECONDS = 0.05
BUCKET, NO_LIMIT = 2**23, 2**62  # numbers that are sent together; more than any number of anything


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of the processes this is: `rank` of `size`, and its number on its own machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


@dataclass(kw_only=True)
class _Group:
    """What was joined. store: where ranks leave notes; own: whether the process group was made here; hosts: of all
    ranks; ended: stops the thread that says that this one lives."""

    place: Place
    store: Any
    own: bool
    hosts: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


_joined: list[_Group] = []  # one at most


def place() -> Place:
    """Which of the processes that a launcher started this is. Raises `ConfigError` for a place that cannot be."""
    found = {name: os.environ.get(name, "") for name in VARIABLES}
    if not all(found.values()):
        return Place()
    try:
        rank, size, local = int(found["RANK"]), int(found["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise ConfigError(f"a rank in the environment is not a number: {error}", LAUNCH) from error
    if not 0 <= rank < size:
        raise ConfigError(f"the environment names rank {rank} of {size} processes", LAUNCH)
    return Place(rank=rank, size=size, local=local)


def refuse(what: str) -> None:
    """Raise `ConfigError` when a launcher started several processes of what one alone does."""
    if (n := place().size) > 1:
        error = ConfigError(f"{what} is done by one process, not by {n}", "start it without torchrun")
        error.told = place().rank > 0  # all of them are refused
        raise error


def size() -> int:
    """How many processes make this run, R: 1 unless they have joined."""
    return _joined[0].place.size if _joined else 1


def rank() -> int:
    """Which of them this one is."""
    return _joined[0].place.rank if _joined else 0


def first() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


# Coming and going ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(timeout_minutes: float) -> Iterator[None]:
    """While inside, the processes of a launcher make one run; without a launcher, nothing. Common.

    timeout_minutes: how long to wait for another rank, at the start and in every common call. An error that another
    rank tells the user is marked as `told`.
    """
    here = place()
    if here.size == 1 or _joined:
        yield
        return
    _join(here, timeout_minutes)
    try:
        yield
        wait()  # a rank that is ready before the others must not be missed
    except BaseException as error:
        if (lost := _sign(error)) is not None:
            raise lost from error
        raise
    finally:
        _leave()


def _join(here: Place, timeout_minutes: float) -> None:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    timeout, own = datetime.timedelta(minutes=timeout_minutes), not dist.is_initialized()
    try:
        store = next(iter(rendezvous("env://", timeout=timeout)))[0]
        if own:
            backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        address, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", first_line(error)
        taken = "choose another MASTER_PORT, or --master-port of torchrun"
        alone = "check that all processes were started, and that each machine can reach that address"
        raise RunFailed(
            f"rank {here.rank} of {here.size} cannot join the others at {address}: {reason}",
            taken if "EADDRINUSE" in reason else alone,
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the notes of one before are not of this one
    group = _Group(place=here, store=PrefixStore(f"cap-{attempt}", store), own=own)
    group.store.set(f"host/{here.rank}", socket.gethostname())
    group.hosts += [group.store.get(f"host/{rank}").decode() for rank in range(here.size)]
    threading.Thread(target=_beat, args=(group,), daemon=True).start()
    _joined.append(group)


def _beat(group: _Group) -> None:
    """Say again and again that this rank lives."""
    count = 0
    with contextlib.suppress(RuntimeError):  # the store went with the rank that kept it
        while not group.ended.wait(BEAT_SECONDS):
            count += 1
            group.store.set(f"beat/{group.place.rank}", str(count))


def _leave() -> None:
    group = _joined.pop()
    group.ended.set()
    _close(group)


def _close(group: _Group) -> None:
    """End the process group, so that the others wait for this rank no longer."""
    import torch.distributed as dist

    if group.own and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _sign(error: BaseException) -> CapError | None:
    """Leave a note why this rank ends, and mark the error as told if another rank says it to the user.

    Returns what is to be raised in its place: launchers stop all ranks when one has died, which is no stop by the user.
    """
    group, cause, lost = _joined[0], getattr(error, "rank", None), None
    about = {
        "message": getattr(error, "message", "") or f"{type(error).__name__}: {first_line(error)}",
        "hint": getattr(error, "hint", ""),
        "code": getattr(error, "exit_code", RunFailed.exit_code),
    }
    setattr(error, "told", False)  # noqa: B010 - which may be any exception
    with contextlib.suppress(RuntimeError):  # the store is gone: each speaks for itself
        group.store.set(f"left/{group.place.rank}", json.dumps(about))
        _close(group)
        if isinstance(error, Stopped) and cause is None and (silent := _silent(group)):
            cause, lost = silent[0], _gone(group, silent[0])
        told = _is_told(group, cause)
        setattr(lost or error, "told", told)  # noqa: B010
        if not told:
            if isinstance(error, CapError) and group.place.rank and cause is None:
                error.message = f"{_named(group, group.place.rank)}: {error.message}"
            group.store.set(f"told/{group.place.rank}", "")
        group.store.set(f"done/{group.place.rank}", "")
        if group.place.rank == 0:  # the store may go with it
            alive = [other for other in range(1, group.place.size) if other != cause or _note(group, other)]
            _until(lambda: all(group.store.check([f"done/{other}"]) for other in alive))
    return lost


def _is_told(group: _Group, cause: int | None) -> bool:
    """Whether a lower rank speaks for this one, for which it has a while, or the rank that was the `cause` has done."""
    lower = [other for other in range(group.place.rank) if other != cause or _note(group, other)]
    if lower and _until(lambda: any(_note(group, other) for other in lower)):
        return True
    return cause is not None and bool(group.store.check([f"told/{cause}"]))


def _silent(group: _Group) -> list[int]:
    """The other ranks that leave no note in a while, nor say that they live."""
    others = [other for other in range(group.place.size) if other != group.place.rank]
    beats = {other: _beats(group, other) for other in others}
    if _until(lambda: all(_note(group, other) for other in others)):
        return []
    return [other for other in others if not _note(group, other) and _beats(group, other) == beats[other]]


def _until(found: Callable[[], bool]) -> bool:
    """Whether something comes true in `SILENCE_SECONDS`."""
    end = time.monotonic() + SILENCE_SECONDS
    while not found():
        if time.monotonic() > end:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _note(group: _Group, rank: int) -> dict[str, Any] | None:
    """Why a rank ended, if it did and said so."""
    key = f"left/{rank}"
    found: dict[str, Any] | None = json.loads(group.store.get(key)) if group.store.check([key]) else None
    return found


def _cause(group: _Group) -> CapError | None:
    """Why a common call failed: what another rank said when it ended, or that it has fallen silent."""
    others = [other for other in range(group.place.size) if other != group.place.rank]
    beats = {other: _beats(group, other) for other in others}
    if _until(lambda: any(_note(group, other) for other in others)):
        return next(_as_said(group, other, note) for other in others if (note := _note(group, other)))
    silent = [other for other in others if _beats(group, other) == beats[other]]
    return _gone(group, silent[0]) if silent else None


def _gone(group: _Group, rank: int) -> CapError:
    return _error(RunFailed, f"{_named(group, rank)} ended or no longer answers", AGAIN, rank)


def _beats(group: _Group, rank: int) -> int:
    key = f"beat/{rank}"
    return int(group.store.get(key)) if group.store.check([key]) else 0


def _as_said(group: _Group, rank: int, note: dict[str, Any]) -> CapError:
    kinds = {kind.exit_code: kind for kind in (CheckFailed, CapError, Stopped)}
    kind, message = kinds.get(note["code"], RunFailed), str(note["message"])
    if kind is not Stopped and not message.startswith("rank "):
        message = f"{_named(group, rank)}: {message}"
    return _error(kind, message, str(note["hint"]), rank)


def _error(kind: type[CapError], message: str, hint: str, rank: int) -> CapError:
    error = kind(message, hint)
    error.rank = rank
    return error


def _named(group: _Group, rank: int) -> str:
    return f"rank {rank} on {group.hosts[rank]}"


# Common calls --------------------------------------------------------------------------------------------------------


def _together(call: Callable[[], Any]) -> Any:
    """Do something with all ranks. Raises what another one said when it ended, or that it is silent."""
    try:
        return call()
    except (RuntimeError, ValueError) as error:
        try:
            cause = _cause(_joined[0])
        except RuntimeError:  # the store is gone, and with it the rank that kept it
            cause = _gone(_joined[0], 0)
        raise cause or RunFailed(f"the processes lost one another: {first_line(error)}", AGAIN) from error


def wait() -> None:
    """Go on when all ranks are here. Common."""
    highest([0])


def highest(numbers: Sequence[int]) -> list[int]:
    """The highest of each of some numbers over all ranks. Common."""
    if not _joined:
        return list(numbers)
    import torch
    import torch.distributed as dist

    found = torch.tensor(numbers, dtype=torch.int64)
    _together(lambda: dist.all_reduce(found, op=dist.ReduceOp.MAX))
    return found.tolist()


def lowest(number: int) -> int:
    """The lowest number over all ranks that is not 0; 0 if there is none. Common."""
    found = -highest([-(number or NO_LIMIT)])[0]
    return 0 if found == NO_LIMIT else found


def share(value: Any, source: int = 0) -> Any:
    """What rank `source` has, as JSON can hold it. Common."""
    if not _joined:
        return value
    import torch
    import torch.distributed as dist

    coded = json.dumps(value).encode()
    length = torch.tensor([len(coded)])
    _together(lambda: dist.broadcast(length, source))
    content = torch.zeros(int(length), dtype=torch.uint8)
    if rank() == source:
        content.copy_(torch.frombuffer(bytearray(coded), dtype=torch.uint8))
    _together(lambda: dist.broadcast(content, source))
    return json.loads(bytes(content.tolist()))


def by_first(call: Callable[[], Any]) -> Any:
    """What rank 0 gets from a call that it alone makes, as JSON can hold it. Common."""
    return share(call() if first() else None)


def collect(value: Any) -> list[Any]:
    """What each rank has, as JSON can hold it, by rank. Common."""
    return [share(value, source) for source in range(size())]


def total(tensors: Sequence[Tensor]) -> None:
    """Put in place of each tensor its sum over all ranks. Common, with tensors of the same shapes."""
    if not _joined:
        return
    import torch
    import torch.distributed as dist

    for some in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in some])
        _together(lambda flat=flat: dist.all_reduce(flat))  # type: ignore[misc]
        for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):  # type: ignore[no-untyped-call]
            tensor.copy_(part.view_as(tensor))


def added(sums: Sequence[Tensor], count: int) -> int:
    """`total` of the `sums`; returns the same of `count`, of how many things they are. Common."""
    if not _joined:
        return count
    import torch

    counts = torch.tensor([count])
    total([*sums, counts])
    return int(counts)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type that follow one another, about `BUCKET` numbers at a time."""
    waiting: list[Tensor] = []
    for tensor in tensors:
        full = sum(one.numel() for one in waiting) + tensor.numel() > BUCKET
        if waiting and (full or waiting[0].dtype != tensor.dtype):
            yield waiting
            waiting = []
        waiting.append(tensor)
    if waiting:
        yield waiting


def same(tensor: Tensor) -> Tensor:
    """The tensor of rank 0, copied into that of this rank. Common."""
    if _joined:
        import torch.distributed as dist

        sent = tensor.contiguous()
        _together(lambda: dist.broadcast(sent, 0))
        tensor.copy_(sent)
    return tensor
