"""One run in several processes: what they tell each other, and nothing of what is trained.

There is no wrapper around the model. The trained tensors are the same on all ranks from the start; each computes the
gradients of its share of a step's samples, and these are added up afterwards, in flat buckets and in the order of the
ranks: the sum is the same to the bit on every rank, whatever the network does (a ring adds in another order). A rank that
fails says so where the others come next, so that all end for the same reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from whitetuner.errors import Stopped, UserError
from whitetuner.train.watch import Presence, Watch, told_error, words

T = TypeVar("T")
#: (name of a block, its gradients by name): both are changed to the sums of all ranks.
BlockShare = Callable[[str, dict[str, torch.Tensor]], None]
#: Bytes of gradients that travel at once, and are held twice while they do.
BUCKET_BYTES = 64 * 2**20
#: A collective ends when its ranks do (see watch.py), not by the clock: one rank may draw previews for half an hour.
PATIENCE = timedelta(days=30)
#: Between looks for a word of another rank.
_LOOK_EVERY_S = 0.02
_FINE, _FAILED, _STOPPED = 0.0, 1.0, 2.0


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a step: stop: somebody asked for it; rows: of each rank, the values it gave."""

    stop: bool
    rows: list[list[float]]


class Ranks:
    """A process on its own: every question is answered at once. `Several` is one of many.

    first: this one writes the run's folder; node: its machine, among the run's; local: its number there; ranks_here: all there
    """

    rank, world, node, local = 0, 1, 0, 0
    ranks_here: Sequence[int] = (0,)
    presences: tuple[Presence, ...] = ()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """The first rank on this machine."""
        return True

    def on_loss(self, last_words: Callable[[UserError], None], orphaned: Callable[[], None]) -> None:
        """last_words: called from a thread before this process is ended because another rank is lost; orphaned: when the
        process that started the ranks is gone."""

    def meet(self, error: UserError | Stopped | None = None) -> None:
        """Comes back when all ranks are here. Raises, on all of them, what one of them brings along."""
        if error is not None:
            raise error

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Ends for all ranks together; an error or a stop of one within it is raised on all."""
        yield

    def told(self, value: T) -> list[T]:
        """What every rank says (values of JSON), in their order."""
        return [value]

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes (values of JSON)."""
        return make()

    def agree(self, stop: bool, values: Sequence[float], most: int) -> Agreed:
        """One small exchange a step. most: values that any rank may give."""
        return Agreed(stop, [list(values)])

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Adds up the gradients of all ranks in place; a parameter that no rank used keeps None."""

    def block_shares(self, blocks: Mapping[str, Mapping[str, torch.nn.Parameter]]) -> BlockShare | None:
        """For gradients that are used block by block in the backward pass; None: nothing is to be shared.

        blocks: name -> its parameters. On all ranks the blocks end in the same order.
        """
        return None

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Rank 0's values, in place."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work in which ranks wait for each other in ways that are not of this class (FSDP's): one that fails
        within it isn't met by the others, who find it gone, and its words."""
        yield

    def say(self, key: str, text: str) -> None:
        """Leaves a word for others, under a key that is used once."""

    def said(self, key: str, rank: int) -> str:
        """What a rank has said under a key, as soon as it has."""
        raise AssertionError("a process on its own hears nobody")


class Several(Ranks):
    """One of several. store: of the run, where words that are no numbers are left; watch: looks after the others."""

    def __init__(
        self, store: dist.Store, presences: Sequence[Presence], rank: int, local: int, watch: Watch
    ) -> None:
        self._store, self._watch, self.local = store, watch, local
        self.rank, self.world, self.presences = rank, len(presences), tuple(presences)
        machines = list(dict.fromkeys(one.machine for one in presences))
        self.node = machines.index(presences[rank].machine)
        self.ranks_here = [one.rank for one in presences if one.machine == presences[rank].machine]
        self._calls = 0
        self._most = 0
        self._over = self._midway = False

    @property
    def first_here(self) -> bool:
        return self.ranks_here[0] == self.rank

    def on_loss(self, last_words: Callable[[UserError], None], orphaned: Callable[[], None]) -> None:
        self._watch.last_words, self._watch.orphaned = last_words, orphaned

    # -- words -----------------------------------------------------------------------------------------------------

    def _exchange(self, word: float, stop: bool, values: Sequence[float]) -> torch.Tensor:
        mine = torch.zeros(2 + self._most, dtype=torch.float64)
        mine[0], mine[1] = word, float(stop)
        if values:
            mine[2 : 2 + len(values)] = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        with self._asking():
            dist.all_gather(everyone, mine)
        table = torch.stack(everyone)
        failed = (table[:, 0] == _FAILED).nonzero().flatten().tolist()
        if failed:
            self._over = True
            if self.rank not in failed:
                one = self.presences[failed[0]]
                raise told_error(one, self._store) or AssertionError(f"{one} left no words")
        if (table[:, 0] == _STOPPED).any():
            self._over = True
            if not failed:
                raise Stopped
        return table

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """gloo and NCCL tell of a rank that is gone by a RuntimeError; who it was is known to the watch."""
        try:
            yield
        except RuntimeError as error:
            self._over = True
            lost = self._watch.verdict()
            if lost is None:
                raise
            self._watch.stop()
            raise lost from error

    def meet(self, error: UserError | Stopped | None = None) -> None:
        if self._over:  # all know already
            if error is not None:
                raise error
            return
        if isinstance(error, UserError):
            self._store.set(f"failed/{self.rank}", words(error))
            if (
                self._midway
            ):  # the others may wait for gradients of a block: they find this rank gone, and its words
                self._over = True
                raise error
        word = _FINE if error is None else _STOPPED if isinstance(error, Stopped) else _FAILED
        self._exchange(word, False, ())
        if error is not None:
            raise error

    @contextmanager
    def phase(self) -> Iterator[None]:
        try:
            yield
        except (UserError, Stopped) as error:
            self.meet(error)
        else:
            self.meet()

    def agree(self, stop: bool, values: Sequence[float], most: int) -> Agreed:
        if most > self._most:  # the same on all ranks, since they know each other's shares
            self.meet()
            self._most = most
        self._midway = False
        table = self._exchange(_FINE, stop, values)
        return Agreed(bool(table[:, 1].any()), table[:, 2:].tolist())

    def told(self, value: T) -> list[T]:
        key = self._key("told")
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        self.meet()
        return [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.world)]

    def from_first(self, make: Callable[[], T]) -> T:
        key = self._key("first")
        if self.first:
            self._store.set(key, json.dumps(make()))
        self.meet()
        return json.loads(self._store.get(key))

    def _key(self, kind: str) -> str:
        self._calls += 1
        return f"{kind}/{self._calls}"

    def said(self, key: str, rank: int) -> str:
        """What a rank has said, or will say: comes back when it has. A rank that is lost meanwhile ends this process (watch)."""
        while not self._store.check([f"{key}/{rank}"]):
            time.sleep(_LOOK_EVERY_S)
        return self._store.get(f"{key}/{rank}").decode()

    def say(self, key: str, text: str) -> None:
        self._store.set(f"{key}/{self.rank}", text)

    @contextmanager
    def together(self) -> Iterator[None]:
        self._midway = True
        full: torch.OutOfMemoryError | None = None
        with self._asking():
            try:
                yield
            except torch.OutOfMemoryError as error:  # its own, not of a rank that is gone
                full = error
        if full is not None:
            raise full
        self._midway = False

    # -- tensors ---------------------------------------------------------------------------------------------------

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        with self._asking(), torch.no_grad():
            for tensor in tensors:
                flat = _fabric(tensor.detach()).contiguous()
                dist.broadcast(flat.view(-1).view(torch.uint8), 0)
                tensor.copy_(flat)

    def block_shares(self, blocks: Mapping[str, Mapping[str, torch.nn.Parameter]]) -> BlockShare | None:
        numbers = {name: number for number, name in enumerate(blocks, start=1)}

        def share(name: str, gradients: dict[str, torch.Tensor]) -> None:
            self._midway = True
            came = list(gradients)
            keys, parameters = list(blocks[name]), list(blocks[name].values())
            used = torch.tensor(
                [float(numbers[name]), *(float(key in gradients) for key in keys)],
                device=parameters[0].device,
            )
            full = []
            for key, parameter in zip(keys, parameters, strict=True):
                wide = torch.promote_types(parameter.dtype, torch.float32)
                found = gradients.pop(key, None)
                full.append(
                    torch.zeros(parameter.shape, dtype=wide, device=used.device)
                    if found is None
                    else found.to(wide)
                )
            with self._asking(), torch.no_grad():
                for bucket in _buckets([used, *full]):
                    self._sum_bucket(bucket)
            number, *counts = used.tolist()
            assert number == numbers[name] * self.world, f"{name}: ranks are at other blocks"
            total = {key: one for key, one, count in zip(keys, full, counts, strict=True) if count}
            # What is summed up over them (a norm) must have the same bits on all ranks: where all have all of them, in the
            # order in which they came, as without ranks; else in the block's.
            order = came if all(count == self.world for count in counts) else list(total)
            gradients.update({key: total[key] for key in order})

        return share

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        with self._asking(), torch.no_grad():
            for bucket in _buckets([*gradients, used]):  # who used what travels along
                self._sum_bucket(bucket)
        for parameter, gradient, count in zip(parameters, gradients, used.tolist(), strict=True):
            parameter.grad = gradient if count else None

    def _sum_bucket(self, gradients: list[torch.Tensor]) -> None:
        flat = torch.cat([one.reshape(-1) for one in gradients])
        total = _summed(_fabric(flat), self.world).to(flat.device)
        start = 0
        for one in gradients:
            one.copy_(total[start : start + one.numel()].view_as(one))
            start += one.numel()

    def close(self) -> None:
        """Leaves in good order: nobody takes this rank for lost; rank 0, who may keep the store, waits for the others."""
        self._watch.stop()
        try:
            if not self._midway:
                self._store.set(f"bye/{self.rank}", "1")
            if self.first:
                self._store.wait(
                    [f"bye/{rank}" for rank in range(self.world)], timedelta(seconds=5 if self._over else 60)
                )
        except RuntimeError:
            pass  # the store or a rank is gone; the reason was told where it mattered
        dist.destroy_process_group()


def _fabric(tensor: torch.Tensor) -> torch.Tensor:
    """Where the tensor can travel: NCCL takes those of cards, gloo the CPU's."""
    on_card = tensor.device.type == "cuda" and "nccl" in dist.get_backend_config()
    return tensor if on_card else tensor.cpu()


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Of one dtype, in order, of at most BUCKET_BYTES unless a single one has more."""
    bucket: list[torch.Tensor] = []
    size = 0
    for one in tensors:
        num_bytes = one.numel() * one.element_size()
        if bucket and (bucket[0].dtype != one.dtype or size + num_bytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(one)
        size += num_bytes
    if bucket:
        yield bucket


def _summed(flat: torch.Tensor, world: int) -> torch.Tensor:
    """((g0 + g1) + g2) + ... of every element, in float32 at least, the same bits on every rank.

    Two summands have one order. More: each rank gets its stretch of all vectors, adds it up and gives the sum to all: the
    bytes of a ring all-reduce, in an order that is ours.
    """
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if world == 2 and wide.dtype == flat.dtype:
        total = wide.clone() if wide is flat else wide
        dist.all_reduce(total)
        return total
    stretch = -(-flat.numel() // world)
    padded = torch.zeros(stretch * world, dtype=flat.dtype, device=flat.device)
    padded[: flat.numel()] = flat
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts.view(torch.uint8), padded.view(torch.uint8))
    rows = parts.view(world, stretch)
    total = rows[0].to(wide.dtype, copy=True)
    for row in rows[1:]:
        total += row
    mine = total.to(flat.dtype)
    gathered = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(gathered, mine)
    return torch.cat(gathered)[: flat.numel()]
