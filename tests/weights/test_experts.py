"""Mixture-of-experts layers of DeepSpeed in a pipeline whose replicas share out the experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import toy
from helpers.census import census
from helpers.distributed import GetRanks
from helpers.formats import ZERO_1, fp16_allowed
from helpers.modes import DEFAULT, MODE_BLOCKS
from helpers.stale_combos import by_hand
from helpers.stale_runs import RULES
from helpers.versus import Made, Setup, adamw, farthest, run_oracle, sgd

WIDTH, TOKENS, EXPERTS = 12, 6, 4

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16, ZeRO-1": {"bf16": {"enabled": True}, **ZERO_1},
    "ZeRO-1": ZERO_1,
    "fp16": {"fp16": {"enabled": True, "loss_scale": 64}},
    "fp16, ZeRO-1": {"fp16": {"enabled": True, "loss_scale": 64}, **ZERO_1},
}


# -- a model with experts, shared out or in one process ---------------------------------------------------------------


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


class Dense(nn.Module):
    """Adds to the first entry of ``(x, auxiliary loss)``."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, auxiliary = values
        return x + torch.tanh(self.linear(x)), auxiliary


class Begin(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(())


class Routed(nn.Module):
    """DeepSpeed's layer; the loss that balances its router goes on with the activation."""

    def __init__(self, ep_size: int, **more: Any) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        settings = {"k": 1, "min_capacity": 2, "use_rts": False, **more}
        self.moe = MoE(WIDTH, expert(), num_experts=EXPERTS, ep_size=ep_size, **settings)

    def forward(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, auxiliary = values
        y, own, _ = self.moe(x)
        return x + y, auxiliary + own.to(auxiliary.dtype)


class Whole(nn.Module):
    """The same with all experts in one process: each replica's tokens are routed among themselves.

    Its parameters stand in the order of `Routed`, with all experts in place of some.
    """

    def __init__(self, replicas: int) -> None:
        super().__init__()
        self.replicas = replicas
        self.wg = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        from deepspeed.moe.sharded_moe import top1gating

        x, auxiliary = values
        parts, balance = [], []
        for tokens in x.chunk(self.replicas):
            own, combine, dispatch, _ = top1gating(self.wg(tokens), 1.0, 2, use_rts=False)
            sent = torch.einsum("sec,sm->ecm", dispatch.type_as(tokens), tokens)
            back = torch.stack([expert(slots) for expert, slots in zip(self.experts, sent, strict=True)])
            parts.append(tokens + torch.einsum("sec,ecm->sm", combine, back))
            balance.append(own)
        return torch.cat(parts), auxiliary + torch.stack(balance).mean()


def loss_fn(values: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    x, auxiliary = values
    return F.mse_loss(x, labels) + 0.1 * auxiliary


def vectors(seed: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in count():
        made = [torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2)]
        yield made[0].to(dtype), (3.0 * made[1]).to(dtype)


def distinct(layer: nn.Module, first: int, seed: int) -> None:
    """Give each expert weights of its own, by its number; DeepSpeed makes them all alike."""
    for index, own in enumerate(layer.children()):
        generator = torch.Generator().manual_seed(seed + first + index)
        for parameter in own.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


@dataclass(frozen=True)
class Layout:
    """How many ranks there are for what, and where the experts are."""

    stages: int = 2
    replicas: int = 2
    ep_size: int = 2
    routed: tuple[int, ...] = (2, 4)
    micro_batches: int = 1
    ddg: dict[str, Any] = field(default_factory=dict)
    clip: float = 0.0
    optimizer: Any = sgd
    config: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        mode = "-".join(str(value) for value in self.ddg.values())
        return f"{self.stages}x{self.replicas}-ep{self.ep_size}-{self.routed}-M{self.micro_batches}-{mode}"

    @property
    def ranks(self) -> int:
        return self.stages * self.replicas

    def layers(self, routed: Any) -> list[nn.Module]:
        torch.manual_seed(7)
        made: list[nn.Module] = [Begin()]
        for index in range(1, 6):
            torch.manual_seed(7 + index)
            made.append(routed() if index in self.routed else Dense())
        return made

    def whole(self) -> list[nn.Module]:
        made = self.layers(partial(Whole, self.replicas))
        for index in self.routed:
            torch.manual_seed(90 + index)
            made[index].wg.reset_parameters()  # type: ignore[operator, union-attr]
            distinct(made[index].experts, 0, 100 * index)  # type: ignore[arg-type]
        return made

    def all_data(self) -> Iterator[Any]:
        for parts in zip(*(vectors(seed) for seed in range(self.replicas)), strict=True):
            yield tuple(map(torch.cat, zip(*parts, strict=True)))

    def setup(self) -> Setup:
        common: dict[str, Any] = {"ddg": self.ddg, "optimizer": self.optimizer}
        return Setup(self.whole, self.all_data, self.stages, self.micro_batches, loss_fn=loss_fn, **common)

    def engine(self, initialize: Any = None) -> Any:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as in_groups
        from deepspeed.pipe import PipelineModule

        import ds_ddg

        forget_expert_groups()
        routed = partial(Routed, self.ep_size, **self.more)
        net = PipelineModule(self.layers(routed), num_stages=self.stages, loss_fn=loss_fn, partition_method="uniform")
        local = EXPERTS // self.ep_size
        first = net.mpu().get_data_parallel_rank() % self.ep_size * local
        for index, layer in enumerate(net.forward_funcs, net._local_start):
            if isinstance(layer, Routed):
                torch.manual_seed(90 + index)
                layer.moe.deepspeed_moe.gate.wg.reset_parameters()
                distinct(layer.moe.deepspeed_moe.experts.deepspeed_experts, first, 100 * index)
        groups = in_groups({"params": [p for p in net.parameters() if p.requires_grad], "name": "all"})
        config = toy.config(self.micro_batches, self.ddg, **{"gradient_clipping": self.clip, **self.config})
        make = initialize or ds_ddg.initialize
        return make(model=net, config=config, optimizer=self.optimizer, model_parameters=groups)[0]


def forget_expert_groups() -> None:
    """DeepSpeed keeps them for the life of a process, and the ranks of these tests live on with other groups."""
    from deepspeed.utils import groups

    for kept in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        kept.clear()


def data_of(engine: Any) -> Iterator[Any]:
    return vectors(engine.grid.get_data_parallel_rank(), next(engine.module.parameters()).dtype)


def shared(engine: Any) -> list[Tensor]:
    """Parameters that every replica must have alike."""
    from deepspeed.moe.utils import is_moe_param

    return [p.detach().clone() for p in engine.module.parameters() if not is_moe_param(p)]


# -- against one process ----------------------------------------------------------------------------------------------


def whole_state(engine: Any, ep_size: int) -> list[Tensor]:
    """Parameters of this stage with all experts, in the order of `Whole`."""
    import torch.distributed as dist
    from deepspeed.utils import groups

    state: list[Tensor] = []
    for layer in engine.module.forward_funcs:
        if not isinstance(layer, Routed):
            state += [p.detach().clone() for p in layer.parameters()]
            continue
        state.append(layer.moe.deepspeed_moe.gate.wg.weight.detach().clone())
        own = [p.detach().clone() for p in layer.moe.deepspeed_moe.experts.parameters()]
        everywhere: list[Any] = [None] * ep_size
        dist.all_gather_object(everywhere, own, group=groups._get_expert_parallel_group(f"ep_size_{ep_size}"))
        state += [parameter for parameters in everywhere for parameter in parameters]
    return state


def train(rank: int, world_size: int, layout: Layout) -> tuple[int, Made, list[Tensor], int]:
    """Stage of this rank, losses and states as `versus.run` has them, shared parameters, collectives across stages."""
    engine, setup = layout.engine(), layout.setup()
    stage_of = [engine.grid.topology().get_coord(r).pipe for r in range(world_size)]
    data, losses, states, across = data_of(engine), [], [], 0
    for calls in (setup.calls, setup.refill):
        for _ in range(calls):
            with census() as seen:
                loss = float(engine.train_batch(data))
            across += sum(n for (_, ranks), n in seen.items() if len({stage_of[r] for r in ranks}) > 1)
            losses.append((engine.loss_step, loss))
        states.append(whole_state(engine, layout.ep_size))
        engine.drain()
        states.append(whole_state(engine, layout.ep_size))
    return engine.stage_id, (losses, states), shared(engine), across


LAYOUTS = [
    *(Layout(micro_batches=1 + i % 2, ddg=mode) for i, mode in enumerate(MODE_BLOCKS)),
    Layout(routed=(1,), ddg=MODE_BLOCKS[1], optimizer=adamw),
    Layout(routed=(4,), ep_size=1, micro_batches=2, ddg=MODE_BLOCKS[0]),
    Layout(4, 1, 1, ddg={**MODE_BLOCKS[0], "slack": 1}),
    Layout(1, 4, 2, micro_batches=2, ddg=MODE_BLOCKS[0]),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.proves("expert layers (MoE) over replicas, auxiliary loss", exact=False, modes="layout.ddg")
def test_experts_equal_one_process(ranks: GetRanks, layout: Layout) -> None:
    expected = run_oracle(layout.setup())
    found = ranks(layout.ranks).run(train, layout, timeout=180)
    for stage, made, _, across in found:
        assert farthest(made, expected[stage]) < 2e-6, f"stage {stage}"
        assert across == 0
    assert_replicas_agree([(stage, own) for stage, _, own, _ in found])


@pytest.mark.proves('"staleness", expert layers (MoE) over replicas', exact=False, modes=DEFAULT)
def test_rules_for_stale_gradients(ranks: GetRanks) -> None:
    """Each replica steps the experts that it has."""
    layout = Layout(ddg={"staleness": RULES["A"].staleness}, optimizer=adamw)
    expected = run_oracle(by_hand(layout.setup(), RULES["A"]))
    found = ranks(layout.ranks).run(train, layout, timeout=180)
    for stage, made, _, across in found:
        assert farthest(made, expected[stage]) < 1e-5, f"stage {stage}"
        assert across == 0
    assert_replicas_agree([(stage, own) for stage, _, own, _ in found])


def assert_replicas_agree(found: list[tuple[int, list[Tensor]]]) -> None:
    """To the last bit."""
    for stage in {stage for stage, _ in found}:
        one, *others = (own for at, own in found if at == stage)
        for other in others:
            assert all(map(torch.equal, one, other)), f"replicas of stage {stage} are apart"


# -- clipping ---------------------------------------------------------------------------------------------------------


@fp16_allowed()
def train_clipped(rank: int, world_size: int, layout: Layout, own: bool = False) -> dict[str, Any]:
    """With `own` by DeepSpeed's engine."""
    import deepspeed

    engine = layout.engine(deepspeed.initialize if own else None)
    data = data_of(engine)
    stage_of = [engine.grid.topology().get_coord(r).pipe for r in range(world_size)]
    losses, norms, across = [], [], 0
    for _ in range(7):
        with census() as seen:
            losses.append(float(engine.train_batch(data)))
        across += sum(n for (_, ranks), n in seen.items() if len({stage_of[r] for r in ranks}) > 1)
        norms.append(engine.get_global_grad_norm())
    if not own:
        engine.drain()
    return {
        "stage": engine.stage_id,
        "losses": losses,
        "norms": norms,
        "across": across,
        "state": toy.state(engine.module),
        "shared": shared(engine),
    }


@pytest.mark.parametrize("clip", ["stage", "global"])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_replicas_stay_equal(ranks: GetRanks, name: str, micro_batches: int, clip: str) -> None:
    """Their expert gradients differ, so the norm that decides over the other weights must be one of all of them."""
    layout = Layout(clip=0.5, micro_batches=micro_batches, config=FORMATS[name], ddg={"clip": clip})
    found = ranks(4).run(train_clipped, layout)
    assert_replicas_agree([(result["stage"], result["shared"]) for result in found])
    for result in found:
        assert result["across"] == 0, "collectives across stages"
        assert result["norms"] == found[0]["norms"], "the pipeline has one norm"
        assert result["losses"] == found[0]["losses"]
    assert float(found[0]["norms"][-1]) > 0.5, "nothing was clipped"


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp16"])
@pytest.mark.proves("expert layers (MoE), one stage: DeepSpeed's own", modes=DEFAULT)
def test_one_stage_equals_deepspeeds_own(ranks: GetRanks, name: str) -> None:
    """But for fp16 without ZeRO, where DeepSpeed does not scale the loss."""
    layout = Layout(1, 2, clip=0.5, micro_batches=2, config=FORMATS[name])
    ours = ranks(2).run(train_clipped, layout)
    its = ranks(2).run(train_clipped, layout, True)
    for mine, other in zip(ours, its, strict=True):
        assert mine["losses"] == other["losses"]
        assert all(map(torch.equal, mine["state"], other["state"]))


# -- saved and loaded -------------------------------------------------------------------------------------------------


def checkpoint(rank: int, world_size: int, layout: Layout, directory: str) -> tuple[list[Any], list[Any]]:
    """What an engine comes to that goes on after a checkpoint, and another one that loads it."""
    engine = layout.engine()
    data = data_of(engine)
    for _ in range(4):
        engine.train_batch(data)
    engine.save_checkpoint(directory)
    other = layout.engine()
    other.load_checkpoint(directory)
    found = []
    for trainer in (engine, other):
        states: list[Any] = [toy.state(trainer.module)]
        data = vectors(20 + trainer.grid.get_data_parallel_rank())
        losses = [float(trainer.train_batch(data)) for _ in range(5)]
        trainer.drain()
        found.append([losses, *states, toy.state(trainer.module)])
    return found[0], found[1]


@pytest.mark.parametrize("routed", [(2, 4), (1,), (4,)])
@pytest.mark.proves("expert layers (MoE), resumed from a checkpoint", modes=DEFAULT)
def test_checkpoint_has_every_expert(ranks: GetRanks, tmp_path: Path, routed: tuple[int, ...]) -> None:
    layout = Layout(clip=0.5, routed=routed, optimizer=adamw)
    for (losses, *states), (its_losses, *its_states) in ranks(4).run(checkpoint, layout, str(tmp_path)):
        assert losses == its_losses
        for mine, other in zip(states, its_states, strict=True):
            assert all(map(torch.equal, mine, other))


# -- refused ----------------------------------------------------------------------------------------------------------


def refused(rank: int, world_size: int, what: str) -> str:
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology, ProcessTopology

    import ds_ddg

    forget_expert_groups()
    topology = {
        "slices": lambda: PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1),
        "order": lambda: ProcessTopology(axes=["data", "pipe"], dims=[2, 2]),
        "ep_size": lambda: ProcessTopology(axes=["pipe", "data"], dims=[2, 2]),
        "auto": lambda: ProcessTopology(axes=["pipe", "data"], dims=[2, 2]),
    }[what]()
    # Experts on one stage alone: the other has to refuse as well.
    net: list[nn.Module] = [Begin(), Dense(), Dense(), Routed(4 if what == "ep_size" else 2)]
    more = {"expert_parallel": {"enabled": True, "autoep_size": 2}} if what == "auto" else {}
    try:
        module = PipelineModule(net, topology=topology, loss_fn=loss_fn, partition_method="uniform")
        ds_ddg.initialize(
            model=module, config=toy.config(1, **more), optimizer=sgd, model_parameters=list(module.parameters())
        )
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.refuses("expert layers (MoE) with tensor parallelism", "use replicas alone")
@pytest.mark.refuses('"expert_parallel" (AutoEP)', "build the layers with `deepspeed.moe.layer.MoE`")
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("slices", "expert layers (MoE) with tensor parallelism"),
        ("order", "leaves its stage"),
        ("ep_size", "expert layers with ep_size=4: a stage has 2 replicas"),
        ("auto", '"expert_parallel" (AutoEP)'),
    ],
)
def test_refuses_on_every_rank(ranks: GetRanks, what: str, said: str) -> None:
    for heard in ranks(4).run(refused, what):
        assert said in heard


def load_without(rank: int, world_size: int, directory: str, pattern: str) -> str:
    """What a rank hears of a load, after the files of that name have been lost."""
    import torch.distributed as dist

    engine = Layout(optimizer=adamw).engine()
    data = data_of(engine)
    engine.train_batch(data)
    engine.save_checkpoint(directory)
    if rank == 0:
        found = list(Path(directory).glob(f"global_step1/{pattern}"))
        assert found, "nothing is lost"
        for path in found:
            path.unlink()
    dist.barrier()
    before = toy.state(engine.module)
    try:
        engine.load_checkpoint(directory)
    except (ValueError, RuntimeError) as error:
        assert all(map(torch.equal, before, toy.state(engine.module)))
        return str(error)
    return ""


@pytest.mark.parametrize("pattern", ["layer_0_expert_3_mp_rank_01_model_states.pt", "expp_rank_1_mp_rank_00*"])
def test_a_lost_file_of_experts_is_named(ranks: GetRanks, tmp_path: Path, pattern: str) -> None:
    for heard in ranks(4).run(load_without, str(tmp_path), pattern):
        assert pattern.rstrip("*") in heard
        assert "is missing" in heard
