"""Messages of a stage that computes on a device, without one: a stand-in copies when, and if, the test lets it.

What is posted must leave in order and not before its copy is done, the main thread must not wait for that, and all
that bounds, parks, settles and fails must do so with copies that are not done. On a GPU: tests/gpu.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_ddg.comm.host_staging import Staging, staging_for
from ds_ddg.comm.message import Header, Kind
from ds_ddg.comm.p2p import Peer, StageError, Wire
from ds_ddg.comm.receiver import Receiver
from ds_ddg.comm.sender import Sender
from ds_ddg.engine.data_feed import Feed
from ds_ddg.weights.stage_groups import StagePeers
from helpers import channel_ends as channel
from helpers.distributed import GetRanks
from helpers.slow_copies import SENDER, TIMEOUT, Device, StandIn, device, senders

pytestmark = pytest.mark.usefixtures("one_thread")


def link(rank: int, made: Device, depth: int = 8) -> tuple[Sender, Receiver]:
    """This rank's two ends, as in test_sender.py."""
    other = 1 - rank
    peer = Peer(dist.new_group([0, 1]), other, f"stage {other} (rank {other})")
    staging = StandIn(made)
    return Sender(Wire(peer, lane=rank), depth, staging), Receiver(Wire(peer, lane=other), staging)


# -- copies -----------------------------------------------------------------------------------------------------------


def test_copies_run_on_streams_of_their_own() -> None:
    with device() as made:
        staging = StandIn(made)
        host, copied = staging.to_host([torch.ones(3), None])
        assert made.log == [
            "compute: down waits for compute",
            "down: copy to the host",
            "down: event on down",
            "compute: memory in use by down",
        ]
        assert host[1] is None
        staging.later(copied.synchronize).result()
        assert torch.equal(host[0], torch.ones(3))  # type: ignore[arg-type]
        made.log.clear()
        there = staging.to_device([torch.ones(3), None])
        assert made.log == ["compute: compute waits for up", "compute: memory in use by compute"]
        assert torch.equal(there[0], torch.ones(3))  # type: ignore[arg-type]
        assert there[1] is None


def test_nothing_is_copied_where_nothing_is_on_the_device() -> None:
    with device() as made:
        assert StandIn(made).to_host([]) == ([], None)
        assert StandIn(Device()).to_host([None]) == ([None], None)
        assert not made.log


def test_what_is_sent_may_be_overwritten_at_once() -> None:
    """As the next run of a captured graph does, on the compute stream, which waits for no copy."""
    with device() as made:
        staging, outputs = StandIn(made), torch.ones(3)
        made.may_copy.clear()
        (host,), copied = staging.to_host([outputs])
        outputs.fill_(7.0)
        made.may_copy.set()
        staging.later(copied.synchronize).result()
    assert torch.equal(host, torch.ones(3))  # type: ignore[arg-type]


def test_sender_is_on_the_device_of_its_stage() -> None:
    """A thread starts on device 0, and whoever waits there opens a context."""
    with device() as made:
        staging = Staging(torch.device("cuda", 3), made, pin=False)
        assert not made.threads, "the main thread's is not ours to set"
        staging.later(lambda: None).result()
    ((name, where),) = made.threads.items()
    assert name.startswith(SENDER)
    assert where == torch.device("cuda", 3)


def test_device_without_a_number_is_the_one_that_is_current() -> None:
    module = mock.Mock()
    module.current_device.return_value = 2
    with mock.patch.object(torch, "get_device_module", return_value=module):
        staging = staging_for(torch.device("cuda"))
    assert staging is not None
    assert staging.device == torch.device("cuda", 2)


@pytest.mark.parametrize("other", ["cuda:1", "meta"])
@pytest.mark.parametrize("own", ["cuda:0", "cpu"])
def test_tensor_on_another_device_is_refused_by_name(own: str, other: str) -> None:
    """What copies it would be the other device, whose work nobody here waits for."""
    staging = None if own == "cpu" else Staging(torch.device(own), Device(), pin=False)
    wire = mock.Mock()
    with FakeTensorMode():
        tensors = [torch.ones(2), None, torch.ones(2, device=other)]
        with pytest.raises(ValueError, match=rf"tensor 2 .* on {other}, .* computes on {own}; .*\.to\('{own}'\)"):
            Sender(wire, 8, staging).post(Kind.DATA, tensors)
    assert not wire.send.called


def test_sender_keeps_the_order_and_ends_with_its_owner() -> None:
    before = senders()
    staging = StandIn(Device())
    done: list[int] = []
    futures = [staging.later(lambda n=n: done.append(n)) for n in range(50)]  # type: ignore[misc]
    assert senders() == before + 1
    del staging
    for future in futures:
        future.result()
    assert done == list(range(50))
    deadline = time.monotonic() + 5
    while senders() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert senders() == before


def test_what_a_lost_device_holds_is_never_freed() -> None:
    with device() as made:
        staging = StandIn(made)
        for made.defect in ("", "out of magic"):
            tensor = torch.ones(3)
            staging.keep_if_lost(tensor)
            reference = weakref.ref(tensor)
            del tensor
            assert (reference() is not None) == bool(made.defect)


def test_data_is_placed_without_waiting() -> None:
    with device() as made:
        feed = Feed(True, True, StagePeers([]), StandIn(made))
        feed.fixed_shape = False
        rows = [(torch.ones(2), torch.zeros(1)), ((torch.ones(2), torch.zeros(3)), {"other": 1})]
        assert feed.fetch(iter(rows), 2, None)
        first, second = feed.take(), feed.take()
        assert [line for line in made.log if "waits" in line] == ["compute: compute waits for up"] * 3
        feed.settle()
        assert made.waits == 0, "torch has copied from memory that is not pinned by the time that it returns"
    assert torch.equal(first[0], torch.ones(2))
    assert isinstance(second[0], tuple)
    assert second[1] == {"other": 1}, "not ours to move"


def test_pinned_data_is_waited_for_once_a_call() -> None:
    """Its loader may write into it as soon as the call is over."""
    with device() as made, mock.patch.object(torch.Tensor, "is_pinned", return_value=True):
        feed = Feed(True, True, StagePeers([]), StandIn(made))
        for call in (1, 2):
            assert feed.fetch(iter([(torch.ones(2), torch.zeros(1))] * 3), 3, None)
            for _ in range(3):
                feed.take()
            assert made.waits == call - 1
            feed.settle()
            feed.settle()
            assert made.waits == call


# -- messages ---------------------------------------------------------------------------------------------------------


def exchange(rank: int, world_size: int) -> None:
    """As in test_sender.py, with copies that take their time; control messages overtake nothing."""
    with device(seconds=0.0005) as made:
        outbox, inbox = link(rank, made, depth=64)
        messages = channel.samples()
        for index, message in enumerate(messages):
            outbox.post(Kind.DATA, message, index=index)
            outbox.post(Kind.BEGIN, index=index)
        for index, message in enumerate(messages):
            received = inbox.take(Kind.DATA)
            assert received.info == {"index": index}
            channel.assert_same(received.tensors, message)
            assert inbox.take(Kind.BEGIN).info == {"index": index}
        channel.close(outbox, inbox)
        assert outbox.pending == 0


def interleave(rank: int, world_size: int) -> None:
    """Shapes that grow and shrink, so that the preposted receive is released and posted anew."""
    with device(seconds=0.0002) as made:
        outbox, inbox = link(rank, made, depth=1000)
        shapes = [(4, 3)] * 6 + [(2, 3)] * 6 + [(4, 3), (2, 3)] * 3 + [(700,)] * 6 + [(40,)] * 25 + [(90,)]
        for n, shape in enumerate(shapes):
            outbox.post(Kind.DATA, [torch.full(shape, float(n))], recurs=n % 5 != 4)
        for n, shape in enumerate(shapes):
            channel.assert_same(inbox.take(Kind.DATA).tensors, (torch.full(shape, float(n)),))
        channel.close(outbox, inbox)


def post_before_the_copy(rank: int, world_size: int) -> tuple[float, list[int], float]:
    """Seconds of the posts, pending messages after each, seconds of the post beyond the depth."""
    with device() as made:
        outbox, inbox = link(rank, made, depth=3)
        if rank == 1:
            for n in range(4):
                channel.assert_same(inbox.take(Kind.DATA).tensors, (torch.full((9,), float(n)),))
                assert inbox.take(Kind.BEGIN).info == {"n": n}
            channel.close(outbox, inbox)
            return 0.0, [], 0.0
        made.may_copy.clear()
        start, pending = time.monotonic(), []
        for n in range(3):
            outbox.post(Kind.DATA, [torch.full((9,), float(n))])
            outbox.post(Kind.BEGIN, n=n)
            pending.append(outbox.pending)
        posted = time.monotonic() - start
        threading.Timer(0.3, made.may_copy.set).start()
        start = time.monotonic()
        outbox.post(Kind.DATA, [torch.full((9,), 3.0)])
        bounded = time.monotonic() - start
        outbox.post(Kind.BEGIN, n=3)
        channel.close(outbox, inbox)
        return posted, pending, bounded


def park_and_leave(rank: int, world_size: int) -> tuple[int, int, str]:
    """Pending before and after a flush with copies that are not done; what settling says when they never are."""
    with device() as made:
        outbox, inbox = link(rank, made)
        for _ in range(2):
            outbox.post(Kind.DATA, [torch.ones(9)])
            inbox.take(Kind.DATA)
        made.may_copy.clear()
        outbox.post(Kind.DATA, [torch.full((9,), 2.0)])
        outbox.post(Kind.BEGIN)
        before = outbox.pending
        threading.Timer(0.2, made.may_copy.set).start()
        # The others' message is here when theirs is copied, whatever this rank's own copies do.
        inbox.take(Kind.DATA)
        inbox.take(Kind.BEGIN)
        channel.close(outbox, inbox)
        after = outbox.pending
        made.may_copy.clear()
        outbox.post(Kind.DATA, [torch.ones(9)])
        outbox.post(Kind.LEAVE)
        with pytest.raises(StageError) as caught:
            outbox.settle(timedelta(milliseconds=50))
        made.may_copy.set()
        inbox.take(Kind.DATA)
        inbox.take(Kind.LEAVE)
        outbox.settle(timedelta(seconds=10))
        dist.barrier()
        return before, after, str(caught.value)


def test_messages_arrive_whole_and_in_order(ranks: GetRanks) -> None:
    ranks(2).run(exchange, timeout=TIMEOUT)
    ranks(2).run(interleave, timeout=TIMEOUT)


def test_posting_waits_for_no_copy_but_beyond_the_depth(ranks: GetRanks) -> None:
    (posted, pending, bounded), _ = ranks(2).run(post_before_the_copy, timeout=TIMEOUT)
    assert posted < 0.2
    assert pending == [2, 4, 6]
    assert bounded > 0.1, "a fourth message must wait until the first has left"


def test_park_and_settle_wait_for_copies(ranks: GetRanks) -> None:
    for before, after, text in ranks(2).run(park_and_leave, timeout=TIMEOUT):
        assert before > 0
        assert after == 0
        assert "was not copied to the host within 0:00:00.05" in text


# -- failures ---------------------------------------------------------------------------------------------------------


def fail_to_copy(rank: int, world_size: int) -> list[str]:
    """What the sender and the receiver of a message that cannot be copied are told, and how often."""
    with device() as made:
        outbox, inbox = link(rank, made)
        outbox.post(Kind.DATA, [torch.ones(9)])
        inbox.take(Kind.DATA)
        outbox.settle(timedelta(seconds=20))  # what fails is the next one
        heard = []
        if rank == 0:
            made.defect = "out of magic"
            made.may_copy.clear()  # or the second post might hear of it already
            outbox.post(Kind.DATA, [torch.ones(9)])
            outbox.post(Kind.BEGIN)
            made.may_copy.set()
            while outbox._failure is None:
                time.sleep(0.01)
            for again in (lambda: outbox.post(Kind.BEGIN), lambda: outbox.settle(timedelta(1)), outbox.flush):
                with pytest.raises(StageError) as caught:
                    again()
                heard.append(str(caught.value))
            outbox.post_error("stage 0 (rank 0) failed: it says so itself")
        else:
            with pytest.raises(StageError) as caught:
                inbox.take(Kind.DATA)
            heard.append(str(caught.value))
        dist.barrier()
        return heard


def test_message_that_cannot_be_copied_leaves_as_an_error(ranks: GetRanks) -> None:
    told, heard = ranks(2).run(fail_to_copy, timeout=TIMEOUT)
    text = "rank 0: a message to stage 1 (rank 1) could not be copied to the host: out of magic"
    assert told == [text] * 3
    assert heard == [text]


def lose_the_device(rank: int, world_size: int) -> int:
    """Copies freed between the loss of the device and the end, of several messages whose copies are under way."""
    with device() as made:
        outbox, inbox = link(rank, made)
        if rank == 0:
            made.may_copy.clear()
            for n in range(4):
                outbox.post(Kind.DATA, [torch.full((9,), float(n))])
            made.defect = "out of magic"
            made.may_copy.set()
            assert outbox.staging is not None
            outbox.staging.later(lambda: None).result()
            with pytest.raises(StageError):
                outbox.post(Kind.BEGIN)
            outbox.post_error("stage 0 (rank 0) failed")
        else:
            with pytest.raises(StageError):
                inbox.take(Kind.DATA)
        dist.barrier()
        del outbox, inbox
        gc.collect()
        return made.freed_too_late


def test_messages_of_a_lost_device_are_never_freed(ranks: GetRanks) -> None:
    assert ranks(2).run(lose_the_device, timeout=TIMEOUT) == [0, 0]


def fail_before_the_copy(rank: int, world_size: int) -> None:
    """The copy never ends, and neither would a wait for it."""
    with device() as made:
        outbox, inbox = link(rank, made)
        dist.barrier()
        if rank == 1:
            made.may_copy.clear()
            outbox.post(Kind.DATA, [torch.ones(9)])
            outbox.post_error("stage 1 (rank 1) failed: enough")
            os.kill(os.getpid(), signal.SIGKILL)
        inbox.take(Kind.DATA, what="a gradient")


def test_error_notices_are_heard_by_both_threads() -> None:
    """A handle of gloo is waited on once, by whichever thread asks first; the other hears the notice as well."""
    error_notice = Header(Kind.ERROR, {"text": "enough"}).encode()
    work, wire = mock.Mock(), mock.Mock()
    wire.recv.side_effect = lambda part, tag, why: work
    inbox = Receiver(wire)
    inbox._error_notice_bytes = error_notice.numpy().data
    work.wait.side_effect = lambda patience: time.sleep(0.1)
    with ThreadPoolExecutor(2) as pool:
        heard = [future.exception() for future in [pool.submit(inbox._raise_error_notice) for _ in range(2)]]
    assert [str(error) for error in heard] == ["enough"] * 2
    assert work.wait.call_count == 1


def lose_the_receiver(rank: int, world_size: int) -> None:
    """It dies while copies are under way; the sender learns of it at one of its next posts."""
    with device() as made:
        outbox, _ = link(rank, made, depth=50)
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        made.may_copy.clear()
        for _ in range(3):
            outbox.post(Kind.DATA, [torch.ones(9)])
        time.sleep(0.5)
        made.may_copy.set()
        for _ in range(40):
            outbox.post(Kind.DATA, [torch.ones(9)])
            time.sleep(0.05)


def test_error_notices_do_not_wait_for_a_copy(ranks: GetRanks) -> None:
    first, _ = ranks(2).run(fail_before_the_copy, timeout=30.0, expect_failure=True)
    assert (first.exc_type, first.message) == ("StageError", "stage 1 (rank 1) failed: enough"), str(first)


def test_lost_receiver_is_named(ranks: GetRanks) -> None:
    channel.survivor(ranks(2).run(lose_the_receiver, timeout=TIMEOUT, expect_failure=True))
