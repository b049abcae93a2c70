"""Pipeline x data x tensor parallel: the same as one process with whole layers and all the data, to rounding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from helpers import toy
from helpers.distributed import GetRanks
from helpers.modes import DEFAULT, MODE_BLOCKS
from helpers.stale_combos import by_hand
from helpers.stale_runs import Discount, Rule
from helpers.versus import Made, Setup, adamw, farthest, run_oracle, sgd

WIDTH, HIDDEN, CLASSES = 12, 16, 5


# -- a layer in slices, as Megatron has it ----------------------------------------------------------------------------


class Scatter(torch.autograd.Function):
    """The same input on every slice: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Gather(torch.autograd.Function):
    """The sum of what the slices put out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Block(nn.Module):
    """Residual and normalised; in one piece until `slice_up`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.bias = nn.Parameter(torch.linspace(-0.1, 0.1, WIDTH))
        self.group: Any = None

    def slice_up(self, index: int, slices: int, group: Any) -> None:
        """Columns of `up` and rows of `down`: only these are marked, as Megatron does it."""
        self.group = group
        for parameter, dim in ((self.up.weight, 0), (self.up.bias, 0), (self.down.weight, 1)):
            parameter.data = parameter.data.chunk(slices, dim)[index].clone()
            parameter.model_parallel = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.group is None:
            return x + torch.tanh(self.down(torch.tanh(self.up(y))) + self.bias)
        y = Gather.apply(self.down(torch.tanh(self.up(Scatter.apply(y, self.group)))), self.group)
        return x + torch.tanh(y + self.bias)


def blocks() -> list[nn.Module]:
    torch.manual_seed(7)
    return [nn.Linear(WIDTH, WIDTH), *(Block() for _ in range(4)), nn.Linear(WIDTH, CLASSES)]


def vectors(seed: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    for _ in count():
        yield torch.randn(4, WIDTH, generator=generator), torch.randint(CLASSES, (4,), generator=generator)


@dataclass(frozen=True)
class Layout:
    """How many ranks there are for what."""

    stages: int = 2
    replicas: int = 1
    slices: int = 2
    micro_batches: int = 2
    ddg: dict[str, Any] = field(default_factory=dict)
    clip: float = 0.0
    optimizer: Any = sgd
    config: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        mode = "-".join(str(value) for value in self.ddg.values())
        return f"{self.stages}x{self.replicas}x{self.slices}-M{self.micro_batches}-{mode}-clip{self.clip}"

    @property
    def ranks(self) -> int:
        return self.stages * self.replicas * self.slices

    def all_data(self) -> Iterator[Any]:
        """What one process is given: the micro-batches of all replicas as one."""
        for parts in zip(*(vectors(seed) for seed in range(self.replicas)), strict=True):
            yield tuple(map(torch.cat, zip(*parts, strict=True)))

    def setup(self) -> Setup:
        loss_fn = nn.functional.cross_entropy
        common = {"ddg": self.ddg, "clip": self.clip, "optimizer": self.optimizer, "config": self.config}
        return Setup(blocks, self.all_data, self.stages, self.micro_batches, loss_fn=loss_fn, **common)  # type: ignore[arg-type]

    def engine(self) -> Any:
        from deepspeed.pipe import PipelineModule
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        import ds_ddg

        topology = PipeModelDataParallelTopology(num_pp=self.stages, num_mp=self.slices, num_dp=self.replicas)
        settings = {"topology": topology, "loss_fn": nn.functional.cross_entropy, "partition_method": "uniform"}
        net = PipelineModule(blocks(), **{**settings, **self.module})
        grid = net.mpu()
        for layer in net.modules():
            if isinstance(layer, Block):
                layer.slice_up(grid.get_slice_parallel_rank(), self.slices, grid.get_slice_parallel_group())
        config = toy.config(self.micro_batches, self.ddg, **{"gradient_clipping": self.clip, **self.config})
        parameters = list(net.parameters())
        return ds_ddg.initialize(model=net, config=config, optimizer=self.optimizer, model_parameters=parameters)[0]


def whole_state(engine: Any, slices: int) -> list[Tensor]:
    """Parameters of this stage, put together again where they are in slices."""
    state = []
    for name, parameter in engine.module.named_parameters():
        whole = parameter.detach().clone()
        if slices > 1 and getattr(parameter, "model_parallel", False):
            parts = [torch.empty_like(whole) for _ in range(slices)]
            dist.all_gather(parts, whole, group=engine.grid.get_slice_parallel_group())
            whole = torch.cat(parts, dim=1 if name.endswith("down.weight") else 0)
        state.append(whole)
    return state


def train(rank: int, world_size: int, layout: Layout) -> tuple[int, Made]:
    """Stage of this rank, losses and states as `versus.run` has them."""
    engine, setup = layout.engine(), layout.setup()
    assert not any((engine.is_pipe_partitioned, engine.is_grad_partitioned))
    data = vectors(engine.grid.get_data_parallel_rank())
    losses, states = [], []
    for calls in (setup.calls, setup.refill):
        for _ in range(calls):
            loss = float(engine.train_batch(data))
            losses.append((engine.loss_step, loss))
        states.append(whole_state(engine, layout.slices))
        engine.drain()
        states.append(whole_state(engine, layout.slices))
    return engine.stage_id, (losses, states)


LAYOUTS = [
    *(Layout(micro_batches=1 + i % 2, ddg=mode, clip=(0.0, 0.3)[i // 2]) for i, mode in enumerate(MODE_BLOCKS)),
    Layout(3, 1, 2, 1, {"weights": "stash", "activations": "recompute"}, 0.3),
    Layout(3, 1, 2, 2, {"weights": "current", "activations": "keep", "slack": 1}, optimizer=adamw),
    Layout(1, 1, 2, 2, {}, 0.3),
    Layout(2, 2, 2, 2, {}, 0.3),
    Layout(2, 1, 2, 1, {}, 0.3, module={"activation_checkpoint_interval": 1}),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.proves("pipeline x data x tensor", exact=False, modes="layout.ddg")
def test_tensor_slices_equal_one_process(ranks: GetRanks, layout: Layout) -> None:
    """The clip goes by the norm of the whole stage: slices add up, what they all hold counts once."""
    expected = run_oracle(layout.setup())
    found = ranks(layout.ranks).run(train, layout, timeout=180)
    for stage, made in found:
        assert farthest(made, expected[stage]) < 1e-6, f"stage {stage}"
    for stage in range(layout.stages):
        one, *others = (made for k, made in found if k == stage)
        for other in others:
            # Exactly: what is replicated must never drift apart.
            for mine, its in zip(one[1], other[1], strict=True):
                assert all(map(torch.equal, mine, its)), f"ranks of stage {stage} are apart"


@pytest.mark.proves('"staleness" with a clip, pipeline x data x tensor', exact=False, modes=DEFAULT)
def test_rules_for_stale_gradients(ranks: GetRanks) -> None:
    """The clip of the rules goes by the norm of the whole stage, too."""
    rule = Rule("", {"learning_rate": 1.0, "extrapolation": 0.5, "clip": 0.3}, Discount(1.0), lead=0.5, clip=0.3)
    layout = Layout(2, 1, 2, 1, {"staleness": rule.staleness})
    expected, unclipped = (run_oracle(by_hand(layout.setup(), it)) for it in (rule, replace(rule, clip=0.0)))
    for stage, made in ranks(layout.ranks).run(train, layout, timeout=180):
        assert farthest(made, expected[stage]) < 1e-6, f"stage {stage}"
        assert farthest(made, unclipped[stage]) > 1e-4, "the clip was not at work"


def test_the_clip_and_the_slices_show() -> None:
    """The comparison above proves something only if another norm would be seen."""
    clipped = run_oracle(Layout(clip=0.3).setup())
    looser = run_oracle(Layout(clip=0.3 * 1.02).setup())
    for one, other in zip(clipped, looser, strict=True):
        assert farthest(one, other) > 1e-5


def train_deepspeeds_own(rank: int, world_size: int, layout: Layout) -> tuple[list[tuple[int, float]], list[Tensor]]:
    engine = layout.engine()
    data = vectors(0)
    losses = [(call, float(engine.train_batch(data))) for call in range(6)]
    engine.drain()
    return losses, [p.detach().clone() for p in engine.module.parameters()]


def test_one_stage_in_slices_equals_deepspeeds_own(ranks: GetRanks) -> None:
    """Nothing is delayed: its clip over the slices and ours are the same to the last bit."""
    ours = ranks(2).run(train_deepspeeds_own, Layout(1, 1, 2, clip=0.3))
    own = ranks(2).run(train_deepspeeds_own, Layout(1, 1, 2, clip=0.3, ddg={"enabled": False}))
    for (losses, weights), (its_losses, its_weights) in zip(ours, own, strict=True):
        assert losses == its_losses
        assert all(map(torch.equal, weights, its_weights))


# -- around it --------------------------------------------------------------------------------------------------------


def collectives(rank: int, world_size: int) -> tuple[int, int]:
    """Across stages, and inside, in calls of the filled pipeline with DeepSpeed's default clip."""
    from helpers.census import census

    layout = Layout(2, 1, 2, 1, clip=1.0)
    engine, data = layout.engine(), vectors(0)
    stage_of = [engine.grid.topology().get_coord(r).pipe for r in range(world_size)]
    for _ in range(3):
        engine.train_batch(data)
    with census() as seen:
        for _ in range(4):
            engine.train_batch(data)
    engine.drain()
    across = sum(n for (_, members), n in seen.items() if len({stage_of[r] for r in members}) > 1)
    return across, seen.total() - across


def test_no_collective_crosses_stages(ranks: GetRanks) -> None:
    for across, inside in ranks(4).run(collectives):
        assert across == 0
        assert inside > 0


def one_slice_reads(rank: int, world_size: int) -> list[str]:
    """Only slice 0 has a loader, and hands on what it reads; the data ends inside the third call."""
    layout = Layout(2, 1, 2, 2)
    engine = layout.engine()
    group, reads = engine.grid.get_slice_parallel_group(), engine.grid.get_slice_parallel_rank() == 0

    def hand_on(batch: Any) -> Any:
        x, y = batch if reads else (torch.empty(4, WIDTH), torch.empty(4, dtype=torch.int64))
        for tensor in (x, y):
            dist.broadcast(tensor, src=dist.get_process_group_ranks(group)[0], group=group)
        return x, y

    engine.set_batch_fn(hand_on)
    data = itertools.islice(vectors(0), 5) if reads else None
    heard = []
    for _ in range(3):
        try:
            heard.append(f"{float(engine.train_batch(data)):.6f}")
        except StopIteration:
            heard.append("the end")
    engine.drain()
    return heard


def test_data_of_one_slice_ends_on_every_rank(ranks: GetRanks) -> None:
    (_, first), *_ = run_oracle(Layout().setup())[0][0]
    for heard in ranks(4).run(one_slice_reads):
        assert heard[2] == "the end"
        assert abs(float(heard[0]) - first) < 1e-5


def checkpoint(rank: int, world_size: int, directory: str) -> list[bool]:
    layout = Layout(2, 1, 2, 1)
    engine, data = layout.engine(), vectors(0)
    for _ in range(4):
        engine.train_batch(data)
    engine.save_checkpoint(directory)
    saved = [p.detach().clone() for p in engine.module.parameters()]
    loss = float(engine.eval_batch(vectors(5), num_micro_batches=2))
    for _ in range(3):
        engine.train_batch(data)
    other = layout.engine()
    other.load_checkpoint(directory)
    equal = [torch.equal(p, s) for p, s in zip(other.module.parameters(), saved, strict=True)]
    engine.drain()
    return [*equal, loss == float(other.eval_batch(vectors(5), num_micro_batches=2))]


def test_checkpoint_of_slices(ranks: GetRanks, tmp_path: Any) -> None:
    for equal in ranks(4).run(checkpoint, str(tmp_path)):
        assert all(equal)


def refused(rank: int, world_size: int, what: str) -> str:
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import ProcessTopology

    import ds_ddg

    try:
        if what == "sequence":
            axes = ProcessTopology(axes=["pipe", "data", "sequence"], dims=[1, 1, 2])
            net = PipelineModule(blocks(), topology=axes, loss_fn=nn.functional.cross_entropy)
            ds_ddg.initialize(model=net, config=toy.config(1), optimizer=sgd, model_parameters=list(net.parameters()))
        else:
            Layout(1, 1, 2, config={"pipeline": {what: True}}).engine()
    except (ValueError, AssertionError) as error:
        return str(error)
    return ""


@pytest.mark.refuses("`pipe_partitioned` or `grad_partitioned` set with tensor parallelism", "leave them out")
@pytest.mark.refuses("parallel axes other than pipe, data and model", "`PipeModelDataParallelTopology`")
@pytest.mark.parametrize("what", ["pipe_partitioned", "grad_partitioned", "sequence"])
def test_refuses_by_name(ranks: GetRanks, what: str) -> None:
    for heard in ranks(2).run(refused, what):
        assert what in heard
        assert "DDG cannot train this set-up" in heard
