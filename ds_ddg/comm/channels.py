"""A stage's channels to the others, from opening to shutdown; what travels over them is in ``stage_links.py``.

Each direction has a lane of its own, so that a receive pending in one never delays a send in the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

import torch.distributed as dist
from deepspeed.constants import default_pg_timeout

from ds_ddg.comm.all_ranks import AllRanks
from ds_ddg.comm.host_staging import Staging
from ds_ddg.comm.message import Kind
from ds_ddg.comm.p2p import Peer, StageError, Wire
from ds_ddg.comm.receiver import Receiver
from ds_ddg.comm.sender import Sender
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.stage import name_of

__all__ = ["Channels", "group_of_all", "own_group"]


def own_group(groups: Sequence[Sequence[int]], rank: int) -> Any:
    """Create a gloo group for each of `groups`; collective over all ranks.

    Args:
        groups: lists of global ranks.
        rank: this global rank.

    Returns:
        The group that `rank` is in; None if it is alone there.
    """
    own = None
    for ranks in groups:
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), default_pg_timeout, backend="gloo")
            own = group if rank in ranks else own
    return own


def group_of_all(rank: int) -> Any:
    """Create a gloo group of all ranks, as gloo notices who has gone; collective.

    Returns:
        The group; None, which means the default group, if that one uses gloo.
    """
    return None if dist.get_backend() == "gloo" else own_group([range(dist.get_world_size())], rank)


class Channels:
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
        self._activations_in: Receiver | None = None
        self._activations_out: Sender | None = None
        self._gradients_in: Receiver | None = None
        self._gradients_out: Sender | None = None
        self._losses_in: Receiver | None = None
        self._losses_out: list[Sender] = []
        self._more: list[tuple[Sender, Receiver]] = []
        self._peers: dict[int, Peer] = {}
        self._staging = staging
        self._failed = False
        self._left = False
        self._group = own_group(pipelines, rank)
        if self._group is not None:
            ranks = next(list(ranks) for ranks in pipelines if rank in ranks)
            self._open(ranks, ranks.index(rank), self._group, plan)
        self.all_ranks = AllRanks(self._other_peers(pipelines, rank))
        """The other ranks, those of this pipeline and of its replicas."""

    def _open(self, ranks: list[int], stage: int, group: Any, plan: DDGPlan) -> None:
        for other in range(len(ranks)):
            if other != stage:
                self._peers[other] = Peer(group, ranks[other], name_of(other, ranks[other]))
        self._stage = stage
        down, up, across = range(3)
        last = len(ranks) - 1
        if stage > 0:
            self._activations_in = Receiver(Wire(self._peers[stage - 1], down), self._staging)
            self._gradients_out = Sender(Wire(self._peers[stage - 1], up), 0, self._staging)
        if stage < last:
            self._activations_out = Sender(Wire(self._peers[stage + 1], down), 0, self._staging)
            self._gradients_in = Receiver(Wire(self._peers[stage + 1], up), self._staging)
            # Losses are plain numbers, which need no staging.
            self._losses_in = Receiver(Wire(self._peers[last], across))
        else:
            self._losses_out = [Sender(Wire(self._peers[k], across), depth=0) for k in range(last)]
        self.expect(plan)

    def _other_peers(self, pipelines: Sequence[Sequence[int]], rank: int) -> Iterator[Peer]:
        yield from self._peers.values()
        if len(pipelines) > 1:
            group = own_group([sorted(chain.from_iterable(pipelines))], rank)
            for ranks in pipelines:
                if rank not in ranks:
                    yield from (Peer(group, other, name_of(stage, other)) for stage, other in enumerate(ranks))

    def expect(self, plan: DDGPlan) -> None:
        """Bound the messages on their way by `plan` from here on; nothing may be in flight."""
        # A Sender waits for its oldest message beyond `depth`, so depth is what may still be unread by the receiver:
        # the gradient of n tells that the activation of n was read; the activation of n, that the stage before has
        # used the gradient that its tick n - 1 needs; being in call t, that every stage has read loss t - L - 1.
        if self._gradients_out is not None:
            self._gradients_out.depth = plan.delay(self._stage - 1) - plan.delay(self._stage) + 1
        if self._activations_out is not None:
            self._activations_out.depth = plan.activations(self._stage)
        for sender in self._losses_out:
            sender.depth = plan.delay(0) + 1

    def open(self, stage: int, lane_out: int, lane_in: int, depth: int) -> tuple[Sender, Receiver]:
        """Open another pair of channels to `stage`, which must open it with the lanes exchanged.

        Args:
            stage: the other stage.
            lane_out: the lane to send in, 3 or above, as those below are taken.
            lane_in: the lane to receive in, likewise.
            depth: data messages that may be on their way, see `Sender`.
        """
        peer = self._peers[stage]
        self._more.append(
            (Sender(Wire(peer, lane_out), depth, self._staging), Receiver(Wire(peer, lane_in), self._staging))
        )
        return self._more[-1]

    def flush(self) -> None:
        """Wait until everything sent has arrived, and release the preposted receives; all stages must be drained."""
        for receiver in self._receivers():
            receiver.listen()
        for sender in self._senders():
            sender.flush()
        for receiver in self._receivers():
            receiver.take(Kind.FLUSH, what="the end of a drain")

    @property
    def usable(self) -> bool:
        """Whether another stage can be reached: there is one, and the process group has not been destroyed."""
        try:
            return self._group is not None and bool(dist.get_process_group_ranks(self._group))
        except (KeyError, ValueError):
            return False

    def leave(self) -> None:
        """Tell the stages that are still there that this one will send nothing more."""
        if self._left or self._failed:
            return
        self._left = True
        for sender in self._senders():
            try:
                sender.post(Kind.LEAVE)
            except StageError:
                continue  # it is gone already or has failed, which others report

    def shutdown(self, patience: timedelta) -> None:
        """Wait, at the end of the process, until the other stages leave too.

        A process takes with it what it has sent and others have not received, and what others send to it fails. The
        first stage is done long before the last, so it reads on until no stage needs it any more. The
        other stages report their failures themselves.

        Args:
            patience: the longest wait for each message of the others.
        """
        try:
            self.leave()
            for receiver in [] if self._failed else self._receivers():
                receiver.staging = None  # messages that still come are not used, and the device may have failed
                while receiver.take(*Kind, what="the end of training", patience=patience).kind is not Kind.LEAVE:
                    pass
            for sender in [] if self._failed else self._senders():
                sender.settle(patience)
        except StageError:
            return

    def tell_failure(self, text: str) -> None:
        """Let the neighbours (from the last stage: all) know that this stage failed; they pass it on."""
        self._failed = True
        for sender in self._senders():
            sender.post_error(text)

    def keep_if_lost(self, *things: Any) -> None:
        """Never free `things` if the device has failed for good; see ``Staging.keep_if_lost``."""
        if self._staging is not None:
            self._staging.keep_if_lost(*things)

    def raise_error_notice(self, peers: Iterable[Peer] | None = None) -> None:
        """Raise StageError if one of `peers` (default: all stages) has said why it failed."""
        for peer in self._peers.values() if peers is None else peers:
            for raise_notice in peer.error_notices:
                raise_notice()

    @property
    def pending(self) -> int:
        """The number of messages sent and not known to have arrived."""
        return sum(sender.pending for sender in self._senders())

    def _senders(self) -> list[Sender]:
        channels = self._activations_out, self._gradients_out, *self._losses_out, *(sender for sender, _ in self._more)
        return [channel for channel in channels if channel is not None]

    def _receivers(self) -> list[Receiver]:
        channels = self._activations_in, self._gradients_in, self._losses_in, *(receiver for _, receiver in self._more)
        return [channel for channel in channels if channel is not None]
