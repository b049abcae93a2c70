"""A stage's channels to the others, from opening to farewell; what travels over them is in ``links.py``.

Each direction has a lane of its own, so that a receive pending in one never delays a send in the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

import torch.distributed as dist
from deepspeed.constants import default_pg_timeout

from ds_ddg.comm.all_ranks import Everyone
from ds_ddg.comm.host_staging import Staging
from ds_ddg.comm.message import Kind
from ds_ddg.comm.p2p import Peer, StageError, Wire
from ds_ddg.comm.receiver import Inbox
from ds_ddg.comm.sender import Outbox
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.stage import name_of

__all__ = ["Connections", "group_of_all", "own_group"]


def own_group(groups: Sequence[Sequence[int]], rank: int) -> Any:
    """That of `groups` (global ranks) which `rank` is in, over gloo; None if it is alone there. Collective."""
    own = None
    for ranks in groups:
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), default_pg_timeout, backend="gloo")
            own = group if rank in ranks else own
    return own


def group_of_all(rank: int) -> Any:
    """Of all ranks, over gloo, which notices who has gone; None, the default group, if that is one. Collective."""
    return None if dist.get_backend() == "gloo" else own_group([range(dist.get_world_size())], rank)


class Connections:
    """The channels of one rank. Constructing them is collective: every rank creates the groups of every pipeline.

    Args:
        pipelines: global ranks of each pipeline in stage order (one for each data-parallel replica).
        rank: this global rank.
        plan: says how many messages can be on their way.
        staging: between this stage's device and host memory; None: it computes on the CPU.
    """

    def __init__(
        self, pipelines: Sequence[Sequence[int]], rank: int, plan: DDGPlan, staging: Staging | None = None
    ) -> None:
        self._activations_in: Inbox | None = None
        self._activations_out: Outbox | None = None
        self._gradients_in: Inbox | None = None
        self._gradients_out: Outbox | None = None
        self._losses_in: Inbox | None = None
        self._losses_out: list[Outbox] = []
        self._more: list[tuple[Outbox, Inbox]] = []
        self._peers: dict[int, Peer] = {}
        self._staging = staging
        self._failed = False
        self._left = False
        self._group = own_group(pipelines, rank)
        if self._group is not None:
            ranks = next(list(ranks) for ranks in pipelines if rank in ranks)
            self._open(ranks, ranks.index(rank), self._group, plan)
        self.everyone = Everyone(self._everyone(pipelines, rank))
        """All other ranks, of this pipeline and of its replicas."""

    def _open(self, ranks: list[int], stage: int, group: Any, plan: DDGPlan) -> None:
        for other in range(len(ranks)):
            if other != stage:
                self._peers[other] = Peer(group, ranks[other], name_of(other, ranks[other]))
        self._stage = stage
        down, up, across = range(3)
        last = len(ranks) - 1
        if stage > 0:
            self._activations_in = Inbox(Wire(self._peers[stage - 1], down), self._staging)
            self._gradients_out = Outbox(Wire(self._peers[stage - 1], up), 0, self._staging)
        if stage < last:
            self._activations_out = Outbox(Wire(self._peers[stage + 1], down), 0, self._staging)
            self._gradients_in = Inbox(Wire(self._peers[stage + 1], up), self._staging)
            # Losses are plain numbers, which need no staging.
            self._losses_in = Inbox(Wire(self._peers[last], across))
        else:
            self._losses_out = [Outbox(Wire(self._peers[k], across), depth=0) for k in range(last)]
        self.expect(plan)

    def _everyone(self, pipelines: Sequence[Sequence[int]], rank: int) -> Iterator[Peer]:
        yield from self._peers.values()
        if len(pipelines) > 1:
            group = own_group([sorted(chain.from_iterable(pipelines))], rank)
            for ranks in pipelines:
                if rank not in ranks:
                    yield from (Peer(group, other, name_of(stage, other)) for stage, other in enumerate(ranks))

    def expect(self, plan: DDGPlan) -> None:
        """With nothing in flight: from here on `plan` says how many messages can be on their way."""
        # An Outbox waits for its oldest message beyond `depth`, so depth is what may still be unread by the receiver:
        # the gradient of n tells that the activation of n was read; the activation of n, that the stage before has
        # used the gradient that its tick n - 1 needs; being in call t, that every stage has read loss t - L - 1.
        if self._gradients_out is not None:
            self._gradients_out.depth = plan.delay(self._stage - 1) - plan.delay(self._stage) + 1
        if self._activations_out is not None:
            self._activations_out.depth = plan.activations(self._stage)
        for outbox in self._losses_out:
            outbox.depth = plan.delay(0) + 1

    def open(self, stage: int, lane_out: int, lane_in: int, depth: int) -> tuple[Outbox, Inbox]:
        """Another pair of channels to `stage`, which opens it with the lanes exchanged; lanes below 3 are taken."""
        peer = self._peers[stage]
        self._more.append(
            (Outbox(Wire(peer, lane_out), depth, self._staging), Inbox(Wire(peer, lane_in), self._staging))
        )
        return self._more[-1]

    def park(self) -> None:
        """With all stages drained: wait until everything sent has arrived, and release the posted receives."""
        for inbox in self._inboxes():
            inbox.listen()
        for outbox in self._outboxes():
            outbox.park()
        for inbox in self._inboxes():
            inbox.take(Kind.PARK, what="the end of a drain")

    @property
    def usable(self) -> bool:
        """Whether there is anybody to talk to: another stage, over a process group that has not been destroyed."""
        try:
            return self._group is not None and bool(dist.get_process_group_ranks(self._group))
        except (KeyError, ValueError):
            return False

    def leave(self) -> None:
        """Tell the others, those that are still there, that this stage will send nothing more."""
        if self._left or self._failed:
            return
        self._left = True
        for outbox in self._outboxes():
            try:
                outbox.post(Kind.LEAVE)
            except StageError:
                continue  # it is gone already, or has failed, which is for others to report

    def shutdown(self, patience: timedelta) -> None:
        """At the end of the process: wait until the others leave too.

        A process takes with it what it has sent and others have not received, and what others send to it fails. The
        first stage is done long before the last, so it reads on until nobody needs it any more. Failures of others
        are theirs to report.

        Args:
            patience: for each message of the others.
        """
        try:
            self.leave()
            for inbox in [] if self._failed else self._inboxes():
                inbox.staging = None  # what still comes is not worked on, and the device may have failed
                while inbox.take(*Kind, what="the end of training", patience=patience).kind is not Kind.LEAVE:
                    pass
            for outbox in [] if self._failed else self._outboxes():
                outbox.settle(patience)
        except StageError:
            return

    def tell_failure(self, text: str) -> None:
        """Let the neighbours (from the last stage: all) know that this stage failed; they pass it on."""
        self._failed = True
        for outbox in self._outboxes():
            outbox.post_error(text)

    def keep_if_lost(self, *things: Any) -> None:
        """See ``Staging.keep_if_lost``."""
        if self._staging is not None:
            self._staging.keep_if_lost(*things)

    def raise_last_words(self, peers: Iterable[Peer] | None = None) -> None:
        """StageError if one of `peers` (default: all stages) has said why it failed, and nobody has read it yet."""
        for peer in self._peers.values() if peers is None else peers:
            for said in peer.last_words:
                said()

    @property
    def pending(self) -> int:
        """Messages sent and not known to have arrived."""
        return sum(outbox.pending for outbox in self._outboxes())

    def _outboxes(self) -> list[Outbox]:
        boxes = self._activations_out, self._gradients_out, *self._losses_out, *(outbox for outbox, _ in self._more)
        return [box for box in boxes if box is not None]

    def _inboxes(self) -> list[Inbox]:
        boxes = self._activations_in, self._gradients_in, self._losses_in, *(inbox for _, inbox in self._more)
        return [box for box in boxes if box is not None]
