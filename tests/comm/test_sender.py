"""Messages between two ranks: what is put in comes out, in order, in buffers of its own, and nothing ever blocks."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_ddg.comm import sender as outboxes
from ds_ddg.comm.message import Kind
from ds_ddg.comm.p2p import Peer, StageError, Wire
from ds_ddg.comm.receiver import Receiver
from ds_ddg.comm.sender import Sender
from ds_ddg.comm.stage_links import Links
from ds_ddg.schedules.ddg import DDGPlan
from helpers.channel_ends import assert_same, close, samples, survivor
from helpers.distributed import GetRanks

TIMEOUT = 60.0


def link(rank: int, depth: int = 8, inline: int = 0) -> tuple[Sender, Receiver]:
    """This rank's two ends towards the other of two ranks: a lane for each direction, as between two stages.

    Tensors of up to `inline` bytes ride in the header; with 0, what is tested is how the others travel.
    """
    outboxes.INLINE_BYTES = inline
    group = dist.new_group([0, 1])
    other = 1 - rank
    peer = Peer(group, other, f"stage {other} (rank {other})")
    return Sender(Wire(peer, lane=rank), depth), Receiver(Wire(peer, lane=other))


def exchange_samples(rank: int, world_size: int, first: int, inline: int) -> None:
    outbox, inbox = link(rank, 64, inline)
    messages = samples()
    # What there is room for depends on what came before; none may depend on that.
    messages = messages[first:] + messages[:first]
    for _ in range(2):
        for index, message in enumerate(messages):
            outbox.post(Kind.DATA, message, index=index)
        for index, message in enumerate(messages):
            received = inbox.take(Kind.DATA)
            assert received.info == {"index": index}
            assert_same(received.tensors, message)
            assert not any(t.requires_grad for t in received.tensors if t is not None)
    close(outbox, inbox)


@pytest.mark.parametrize("inline", [0, 32, 1024])
@pytest.mark.parametrize("first", [0, 12, 14, 15, 19, 21])
def test_every_kind_of_tensor_arrives(ranks: GetRanks, first: int, inline: int) -> None:
    ranks(2).run(exchange_samples, first, inline, timeout=TIMEOUT)


def interleave_shapes(rank: int, world_size: int, most: int) -> None:
    """Training of changing shapes, `most` rows at most, and evaluation of larger ones, in a fixed random order."""
    outbox, inbox = link(rank, depth=1000)
    torch.manual_seed(1)
    shapes = [(4, 3)] + [[(4, 3), (2, 3), (4, 3, 1), (), (most, 3), (8, 3)][i] for i in torch.randint(6, (300,))]
    ahead = 5
    for n in range(len(shapes) + ahead):
        if n < len(shapes):
            kind = Kind.BEGIN if n % 7 == 3 else Kind.DATA
            tensors = [] if kind is Kind.BEGIN else [torch.full(shapes[n], float(n))]
            outbox.post(kind, tensors, recurs=shapes[n] != (8, 3), n=n)
        if n >= ahead:
            m = n - ahead
            message = inbox.take(Kind.BEGIN, Kind.DATA)
            assert message.info == {"n": m}
            assert message.kind is (Kind.BEGIN if m % 7 == 3 else Kind.DATA)
            if message.kind is Kind.DATA:
                assert_same(message.tensors, (torch.full(shapes[m], float(m)),))
    close(outbox, inbox)


@pytest.mark.parametrize("most", [4, 7, 9])
def test_other_shapes_between_preposted_ones_keep_order(ranks: GetRanks, most: int) -> None:
    ranks(2).run(interleave_shapes, most, timeout=TIMEOUT)


def exchange_big(rank: int, world_size: int) -> None:
    """32 MiB is far beyond what sockets buffer: with a blocking send both ranks would wait for each other."""
    outbox, inbox = link(rank)
    for n in range(2):
        for part in range(2):
            outbox.post(Kind.DATA, [torch.full((8 << 20,), float(10 * n + part + rank))])
        for part in range(2):
            (tensor,) = inbox.take(Kind.DATA).tensors
            assert tensor is not None
            assert tensor.numel() == 8 << 20
            assert bool((tensor == float(10 * n + part + 1 - rank)).all())
    close(outbox, inbox)


def test_big_messages_in_both_directions_at_once(ranks: GetRanks) -> None:
    ranks(2).run(exchange_big, timeout=TIMEOUT)


def post_to_one_who_sleeps(rank: int, world_size: int) -> float:
    outbox, inbox = link(rank, depth=3)
    if rank == 1:
        time.sleep(1.5)
        for n in range(3):
            assert_same(inbox.take(Kind.DATA).tensors, (torch.full((1 << 20,), float(n)),))
        close(outbox, inbox)
        return 0.0
    start = time.monotonic()
    for n in range(3):
        tensor = torch.full((1 << 20,), float(n))
        outbox.post(Kind.DATA, [tensor])
        del tensor  # the outbox must keep it until it is sent; what is allocated next would take its place
        torch.full((1 << 20,), -1.0)
    elapsed = time.monotonic() - start
    close(outbox, inbox)
    return elapsed


def test_posting_waits_for_nobody(ranks: GetRanks) -> None:
    elapsed, _ = ranks(2).run(post_to_one_who_sleeps, timeout=TIMEOUT)
    assert elapsed < 1.0


def send_to_one_who_works(rank: int, world_size: int, sizes: list[int]) -> bool:
    """Whether the last message arrives while the receiver works on the one before, or only when it asks for it."""
    outbox, inbox = link(rank)
    arrived = torch.zeros(())
    if rank == 0:
        for size in sizes:
            outbox.post(Kind.DATA, [torch.ones(size)])
        with suppress(StageError):
            outbox.settle(timedelta(seconds=20))
        arrived += outbox.pending == 0
    else:
        for _ in sizes[1:]:
            inbox.take(Kind.DATA)
    dist.broadcast(arrived, 0)  # the receiver is at work until here
    if rank == 1:
        assert_same(inbox.take(Kind.DATA).tensors, (torch.ones(sizes[-1]),))
    close(outbox, inbox)
    return bool(arrived)


@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 0.6], [0.6, 1, 0.7]], ids=str)
def test_a_large_message_travels_while_the_receiver_works(ranks: GetRanks, sizes: list[float]) -> None:
    """Of any size that there is room for; how much that should be, the first of its size tells."""
    assert ranks(2).run(send_to_one_who_works, [round(2**19 * size) for size in sizes], timeout=TIMEOUT) == [True] * 2


def room_by_message(rank: int, world_size: int, messages: list[tuple[list[int], bool]]) -> list[tuple[int, ...]]:
    """Bytes of the receives that are posted ahead, after each message of bytes and whether more will follow."""
    outbox, inbox = link(rank)
    seen = []
    for n, (sizes, recurs) in enumerate(messages):
        sent = tuple(torch.full((size,), n, dtype=torch.uint8) for size in sizes)
        outbox.post(Kind.DATA, sent, recurs)
        assert_same(inbox.take(Kind.DATA).tensors, sent)
        inbox.listen()
        posted, _ = inbox._preposted or ([], [])
        seen.append(tuple(part.numel() for part in posted))
    close(outbox, inbox)
    return seen


def test_room_follows_what_training_needs(ranks: GetRanks) -> None:
    course = [
        (([10, 4], False), ()),  # an evaluation before there is any training
        (([10, 4], True), (10, 4)),
        *[(([9, 1], True), (10, 4)), (([1, 4], True), (10, 4)), (([10], True), (10, 4))] * 6,
        (([8, 4], True), (10, 4)),
        (([9], True), (10, 4)),
        (([50], False), (10, 4)),
        (([8, 6], True), (10, 6)),
        (([1, 1, 2], True), (10, 6, 2)),
        (([], True), (10, 6, 2)),
        *[(([2, 3], True), (10, 6, 2))] * 14,
        (([9, 1], True), (10, 6, 2)),  # as much as half of it is in use again
        *[(([2, 3], True), (10, 6, 2))] * 14,
        (([1, 4, 1], True), (10, 6, 2)),
        (([2, 3], True), (2, 4, 1)),
        (([2, 4], True), (2, 4, 1)),
        *[(([0, 1], True), (2, 4, 1)), (([1, 0, 0], True), (2, 4, 1))] * 7,
        (([0, 2], True), (2, 4, 1)),
        (([1], True), (2,)),
    ]
    messages, expected = (list(column) for column in zip(*course, strict=True))
    assert ranks(2).run(room_by_message, messages, timeout=TIMEOUT) == [expected] * 2


def take_what_an_evaluation_made_room_for(rank: int, world_size: int) -> list[int]:
    """Bytes that what training receives keeps from being freed."""
    outbox, inbox = link(rank)
    seen = []
    for size in (2**19, 2**19, 2**18 - 1, 2**17):
        outbox.post(Kind.DATA, [torch.ones(size)])
    for n in range(4):
        with torch.inference_mode(n == 1):
            (tensor,) = inbox.take(Kind.DATA).tensors
        assert tensor is not None
        if n != 1:
            tensor.requires_grad_()  # fails for what belongs to an evaluation
            seen.append(tensor.untyped_storage().nbytes())
    close(outbox, inbox)
    return seen


def test_what_is_taken_can_be_trained_on_and_freed(ranks: GetRanks) -> None:
    """Receives are posted ahead: in the evaluation before, and with room for the largest message."""
    expected = [2**21, 2**20 - 4, 2**19]
    assert ranks(2).run(take_what_an_evaluation_made_room_for, timeout=TIMEOUT) == [expected] * 2


def spoil_what_was_received(rank: int, world_size: int) -> None:
    outbox, inbox = link(rank, depth=64)
    for n in range(6):
        outbox.post(Kind.DATA, [torch.full((100,), float(n)), torch.full((3,), n)])
    held: list[tuple[Tensor | None, ...]] = []
    for n in range(6):
        tensors = inbox.take(Kind.DATA).tensors
        assert_same(tensors, (torch.full((100,), float(n)), torch.full((3,), n)))
        for tensor in tensors:
            assert tensor is not None
            tensor.fill_(-1 - n)
        held.append(tensors)
    for n, tensors in enumerate(held):
        assert_same(tensors, (torch.full((100,), float(-1 - n)), torch.full((3,), -1 - n)))
    close(outbox, inbox)


def test_receiver_owns_what_it_took(ranks: GetRanks) -> None:
    ranks(2).run(spoil_what_was_received, timeout=TIMEOUT)


def count_and_park(rank: int, world_size: int) -> list[int]:
    outbox, inbox = link(rank, depth=2)
    pending = [outbox.pending]
    for shape in [(4,), (2, 2, 2)]:  # after a flush the first message decides anew what is preposted
        for n in range(5):
            outbox.post(Kind.BEGIN, n=n)
            outbox.post(Kind.DATA, [torch.full(shape, float(n))])
            inbox.take(Kind.BEGIN)
            assert_same(inbox.take(Kind.DATA).tensors, (torch.full(shape, float(n)),))
            dist.barrier()
            pending.append(outbox.pending)
        inbox.listen()
        assert inbox._preposted is not None, "a receive is posted ahead"
        outbox.flush()
        pending.append(outbox.pending)
        assert inbox.take(Kind.FLUSH).tensors == ()
        assert inbox._preposted is None, "a flushed inbox holds no buffers"
        dist.barrier()
    close(outbox, inbox)  # flushed already: nothing to release, nothing to wait for
    return pending


def test_pending_and_park(ranks: GetRanks) -> None:
    """A message stands for itself and what was sent before it, up to two data messages back."""
    for pending in ranks(2).run(count_and_park, timeout=TIMEOUT):
        assert pending == [0, 2, 4, 4, 4, 4, 0, 2, 4, 4, 4, 4, 0]


# -- errors -----------------------------------------------------------------------------------------------------------


def fail_and_tell(rank: int, world_size: int, text: str) -> str:
    outbox, inbox = link(rank)
    if rank == 0:
        outbox.post(Kind.DATA, [torch.ones(3)])
        outbox.post_error(text)
        dist.barrier()
        return ""
    inbox.take(Kind.DATA)  # what came before the failure is still good
    with pytest.raises(StageError) as caught:
        inbox.take(Kind.DATA)
    dist.barrier()
    return str(caught.value)


def test_error_arrives_in_place_of_a_message(ranks: GetRanks) -> None:
    text = "stage 0 (rank 0) failed in call 3: ValueError: no way"
    assert ranks(2).run(fail_and_tell, text, timeout=TIMEOUT)[1] == text


@pytest.mark.parametrize("letter", ["x", "\n", '"', "ü", "中", "\U0001f600", "\udcff"])
def test_long_error_arrives_at_least_in_part(ranks: GetRanks, letter: str) -> None:
    """Headers have a fixed size, and a letter can take several bytes of it."""
    text = "stage 0 (rank 0) failed: " + 9999 * letter
    received = ranks(2).run(fail_and_tell, text, timeout=TIMEOUT)[1]
    assert received.startswith("stage 0 (rank 0) failed: ")
    assert len(received) > 200


def send_what_does_not_fit(rank: int, world_size: int) -> str:
    outbox, inbox = link(rank)
    with pytest.raises(ValueError, match="2000 tensors") as caught:
        outbox.post(Kind.DATA, [torch.ones(1)] * 2000)
    outbox.post(Kind.DATA, [torch.ones(1)])
    assert_same(inbox.take(Kind.DATA).tensors, (torch.ones(1),))
    close(outbox, inbox)
    return str(caught.value)


def test_too_many_tensors_are_refused_before_any_is_sent(ranks: GetRanks) -> None:
    assert "4096" in ranks(2).run(send_what_does_not_fit, timeout=TIMEOUT)[0]


def get_out_of_step(rank: int, world_size: int) -> str:
    outbox, inbox = link(rank)
    outbox.post(Kind.BEGIN, what="train_batch")
    with pytest.raises(RuntimeError) as caught:
        inbox.take(Kind.DATA, Kind.FLUSH, what="an activation")
    assert not isinstance(caught.value, StageError)
    close(outbox, inbox)
    return str(caught.value)


def test_message_of_another_kind(ranks: GetRanks) -> None:
    for rank, message in enumerate(ranks(2).run(get_out_of_step, timeout=TIMEOUT)):
        for part in ("out of step", "an activation", "DATA or FLUSH", f"stage {1 - rank}", "got BEGIN", "every rank"):
            assert part in message


def lose_the_sender(rank: int, world_size: int, when: str) -> None:
    outbox, inbox = link(rank)
    outbox.post(Kind.DATA, [torch.ones(5)])
    inbox.take(Kind.DATA)
    dist.barrier()
    if rank == 1:
        if when == "waiting":
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if when == "busy":
        time.sleep(0.5)
    inbox.take(Kind.DATA, what="a gradient")


def lose_the_sender_of_a_large_message(rank: int, world_size: int) -> None:
    outbox, inbox = link(rank)
    if rank == 1:
        for n in range(2):
            outbox.post(Kind.DATA, [torch.full((2**18,), float(n))])
        outbox.settle(timedelta(seconds=20))
        os.kill(os.getpid(), signal.SIGKILL)
    for n in range(2):
        assert_same(inbox.take(Kind.DATA, what="an activation").tensors, (torch.full((2**18,), float(n)),))
        time.sleep(0.5)
    inbox.take(Kind.DATA, what="a gradient")


def lose_the_receiver(rank: int, world_size: int) -> None:
    outbox, _ = link(rank, depth=2)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        outbox.post(Kind.DATA, [torch.ones(5)])
        time.sleep(0.05)


def give_up(rank: int, world_size: int) -> str:
    """The second rank waits too briefly; the first, which had time, for one that listens no more."""
    _, inbox = link(rank)
    dist.barrier()
    with pytest.raises(StageError) as caught:
        inbox.take(Kind.DATA, what="a gradient", patience=timedelta(seconds=0.5 if rank == 1 else 30))
    dist.barrier()
    return str(caught.value)


def test_who_waits_too_long_or_gives_up_is_not_called_lost(ranks: GetRanks) -> None:
    first, second = ranks(2).run(give_up, timeout=30.0)
    assert second.startswith("stage 0 (rank 0) has not answered (it is stuck, or waits for another stage itself): ")
    assert first.startswith(
        "stage 1 (rank 1) has given up waiting for another stage: this stage waited for a gradient"
    )


def ask_twice(rank: int, world_size: int) -> list[str]:
    """Of a stage that said why it left, then of one that is gone for good."""
    outbox, inbox = link(rank)
    dist.barrier()
    if rank == 1:
        outbox.post_error("stage 1 (rank 1) failed: enough")
        os.kill(os.getpid(), signal.SIGKILL)
    heard = []
    for _ in range(3):
        try:
            inbox.take(Kind.DATA, what="a gradient")
        except StageError as error:
            heard.append(str(error))
    raise ValueError(" | ".join(heard))


def test_asking_the_dead_again_is_answered_again(ranks: GetRanks) -> None:
    first, _ = ranks(2).run(ask_twice, timeout=30.0, expect_failure=True)
    assert (first.state, first.exc_type) == ("raised", "ValueError"), str(first)
    answers = first.message.split(" | ")
    assert len(answers) == 3, "each time an error, never a hang"
    assert answers[0] == "stage 1 (rank 1) failed: enough"


def send_to_the_dead(rank: int, world_size: int) -> None:
    """First over a channel of the test's own, then at the end of training, over those of a pipeline."""
    outbox, _ = link(rank)
    links = Links([[0, 1]], rank, DDGPlan(2))
    dist.barrier()
    if rank == 1:
        outbox.post_error("stage 1 (rank 1) failed: enough")
        os.kill(os.getpid(), signal.SIGKILL)

    def send_on() -> None:
        while True:
            outbox.post(Kind.DATA, [torch.ones(4)])
            time.sleep(0.01)

    with pytest.raises(StageError) as caught:
        send_on()
    links.leave()
    raise caught.value


def test_whoever_sends_to_the_dead_hears_its_error_notice(ranks: GetRanks) -> None:
    first, _ = ranks(2).run(send_to_the_dead, timeout=30.0, expect_failure=True)
    assert (first.state, first.exc_type) == ("raised", "StageError"), str(first)
    assert first.message == "stage 1 (rank 1) failed: enough"


@pytest.mark.parametrize("when", ["waiting", "busy"])
def test_lost_sender_is_named(ranks: GetRanks, when: str) -> None:
    outcomes = ranks(2).run(lose_the_sender, when, timeout=TIMEOUT, expect_failure=True)
    assert "waited for a gradient" in survivor(outcomes).message


def test_what_came_before_a_loss_is_still_good(ranks: GetRanks) -> None:
    outcomes = ranks(2).run(lose_the_sender_of_a_large_message, timeout=TIMEOUT, expect_failure=True)
    assert "waited for a gradient" in survivor(outcomes).message


def test_lost_receiver_is_named(ranks: GetRanks) -> None:
    survivor(ranks(2).run(lose_the_receiver, timeout=TIMEOUT, expect_failure=True))


def tell_the_dead(rank: int, world_size: int) -> float:
    outbox, _ = link(rank)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    start = time.monotonic()
    outbox.post_error("stage 0 (rank 0) failed too")  # must neither raise nor take long
    elapsed = time.monotonic() - start
    raise ValueError(f"told in {elapsed:.3f} s")


def test_telling_one_who_is_gone_is_harmless(ranks: GetRanks) -> None:
    first, _ = ranks(2).run(tell_the_dead, timeout=TIMEOUT, expect_failure=True)
    assert first.exc_type == "ValueError", str(first)
    assert float(first.message.split()[2]) < 2.0
