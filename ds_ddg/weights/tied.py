"""Weights that layers of several stages share (``TiedLayerSpec``), without a collective and without a wait.

A tied parameter belongs to the earliest stage that holds it, its *owner*, and has that stage's delay; the later ones,
its *holders*, have a copy. So the equation needs no special case, and messages go two ways:

    holder -> owner   this stage's part of a micro-batch's gradient, after each backward; the owner's own backward of
                      that micro-batch, which comes later, adds it to its part (d_owner > d_holder)
    owner -> holder   the weights of the next call, after each update; the holder takes them at the end of the same
                      call, which comes later, as every call does on a later stage

The natural skew between the stages covers both, and the copies are equal at every call. The holder's optimizer knows
nothing of them. DeepSpeed all-reduces the gradients of tied weights instead, which makes their stages wait; each stage
then updates its copy with an optimizer state of its own, equal to the others'. So in a checkpoint a holder has its
owner's.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from torch import Tensor

from ds_ddg.comm.message import Kind
from ds_ddg.comm.receiver import Receiver
from ds_ddg.comm.sender import Sender
from ds_ddg.comm.stage_links import Links
from ds_ddg.host import Host
from ds_ddg.schedules.ddg import DDGPlan
from ds_ddg.weights.optimizer_wrappers import add_no_gradient

__all__ = ["TiedWeights", "left_out_of_checkpoints"]

_GRADIENTS, _WEIGHTS = 3, 4  # lanes


class TiedWeights:
    """The tied parameters of one stage.

    Args:
        module: the ``PipelineModule``.
        enabled: whether DDG is enabled; otherwise nothing is touched.
    """

    def __init__(self, module: Any, enabled: bool) -> None:
        self._owned_shared: dict[int, list[torch.nn.Parameter]] = {}
        """Parameters that this stage owns, by the stage that borrows them."""
        self._borrowed: dict[int, list[torch.nn.Parameter]] = {}
        """Parameters that this stage borrows, by the stage that owns them."""
        self._comms: list[tuple[int, Any, list[torch.nn.Parameter]]] = []
        """The ties: the owner's rank, DeepSpeed's group of the stages that have it, its trained parameters."""
        self._groups_given: list[list[torch.nn.Parameter]] = []
        """The parameters of each of the optimizer's groups as they were given."""
        self._senders: dict[int, Sender] = {}
        self._receivers: dict[int, Receiver] = {}
        for tie in module.tied_comms.values() if enabled else ():
            owner, *holders = (module.topology().get_coord(rank).pipe for rank in tie["ranks"])
            tied = [module._recursive_getattr(tie["module"], name) for name in tie["weight_attr"]]
            # DeepSpeed counts nothing of the module as a holder's own, though it ties only the attributes named.
            for parameter in tie["module"].parameters():
                parameter.ds_pipe_replicated = owner != module.stage_id and any(parameter is p for p in tied)
            trained = [parameter for parameter in tied if parameter.requires_grad]
            self._comms.append((tie["ranks"][0], tie["group"], trained))
            for holder in holders:
                if module.stage_id == owner and trained:
                    self._owned_shared.setdefault(holder, []).extend(trained)
                elif module.stage_id == holder and trained:
                    self._borrowed.setdefault(owner, []).extend(trained)

    @property
    def tied(self) -> list[torch.nn.Parameter]:
        """Parameters of this stage that others have as well, owned or borrowed."""
        return [parameter for _, _, parameters in self._comms for parameter in parameters]

    @property
    def borrowed(self) -> list[torch.nn.Parameter]:
        """Parameters of this stage that belong to another."""
        return [parameter for parameters in self._borrowed.values() for parameter in parameters]

    def connect(self, links: Links, stage: int, plan: DDGPlan) -> None:
        """Open the channels to the stages that share weights with this one.

        Args:
            links: the links of this stage.
            stage: the number of this stage.
            plan: says how many messages can be on their way.
        """
        self._links = links
        for other in (*self._owned_shared, *self._borrowed):
            mine, its = (_WEIGHTS, _GRADIENTS) if other in self._owned_shared else (_GRADIENTS, _WEIGHTS)
            self._senders[other], self._receivers[other] = links.open(other, mine, its, depth=0)
        self._stage = stage
        self.expect(plan)

    def expect(self, plan: DDGPlan) -> None:
        """Bound the messages on their way by `plan` from here on; nothing may be in flight."""
        for other, sender in self._senders.items():
            # A holder is at most so many ticks behind its owner, plus the one that each of them is in.
            sender.depth = abs(plan.delay(self._stage) - plan.delay(other)) + 2

    def send_gradients(self) -> None:
        """Send the gradients of a micro-batch to their owners, on a holder after each backward."""
        for owner, parameters in self._borrowed.items():
            gradients = [parameter.grad for parameter in parameters]
            self._senders[owner].post(Kind.DATA, gradients, scale=self._links.loss_scale())
            for parameter in parameters:
                parameter.grad = None

    def recv_gradients(self) -> list[tuple[torch.nn.Parameter, Tensor]]:
        """Wait for the gradients that holders add, on an owner before each backward.

        Returns:
            Owned parameters with the sums of the holders' gradients, added in the order of autograd.
        """
        total: dict[torch.nn.Parameter, Tensor] = {}
        for holder in sorted(self._owned_shared, reverse=True):
            message = self._receivers[holder].take(Kind.DATA, what="the gradient of a tied weight")
            gradients = self._links.rescaled(message)
            self._receivers[holder].listen()
            for parameter, gradient in zip(self._owned_shared[holder], gradients, strict=True):
                if gradient is not None:
                    total[parameter] = total[parameter] + gradient if parameter in total else gradient
        return list(total.items())

    def send_weights(self) -> None:
        """Send the weights of the next call to their holders, on an owner after each update."""
        for holder, parameters in self._owned_shared.items():
            self._senders[holder].post(Kind.DATA, [parameter.detach().clone() for parameter in parameters])

    def recv_weights(self, owners: set[int] | None = None) -> None:
        """Wait for the weights of `owners` (default: of all) and copy them, on a holder at the end of each call."""
        for owner, parameters in self._borrowed.items():
            if owners is not None and owner not in owners:
                continue
            weights = self._receivers[owner].take(Kind.DATA, what="tied weights").tensors
            self._receivers[owner].listen()
            for parameter, weight in zip(parameters, weights, strict=True):
                assert weight is not None, "owners send no None"
                parameter.data.copy_(weight)

    @property
    def owners(self) -> set[int]:
        """Stages whose weights this one borrows."""
        return set(self._borrowed)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside this block borrowed parameters look frozen; DeepSpeed would all-reduce zeros as their gradients."""
        borrowed = self.borrowed
        for parameter in borrowed:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in borrowed:
                parameter.requires_grad_(True)

    def reduce_by_deepspeed(self, host: Host) -> None:
        """Sum tied gradients as DeepSpeed does, on its own schedule.

        DeepSpeed's wrappers neither accumulate nor clear gradients of parameters that they do not have.
        """
        for parameter in self.tied:
            if parameter.grad is None:  # a stage that does not use it; DeepSpeed would let the others wait for it
                add_no_gradient(parameter, host.optimizer)
        wrapped: list[Any] = self.borrowed if isinstance(host.optimizer, DeepSpeedOptimizer) else []
        for borrowed in wrapped:
            if host.using_bf16_optimizer and borrowed.grad is not None:
                borrowed._hp_grad = borrowed.grad.to(host.optimizer.grad_acc_dtype)
        host.carry_out(ReduceTiedGrads)
        for borrowed in wrapped:
            borrowed.grad = borrowed._hp_grad = None

    def remove_from(self, optimizer: torch.optim.Optimizer) -> None:
        """Take borrowed parameters out of an optimizer that has not stepped yet.

        A group of nothing else stays, with its learning rate, for schedulers and for callers that ask for it.
        """
        borrowed = {id(parameter) for parameter in self.borrowed}
        self._groups_given = [list(group["params"]) for group in optimizer.param_groups] if borrowed else []
        for group in optimizer.param_groups if borrowed else ():
            kept = [parameter for parameter in group["params"] if id(parameter) not in borrowed]
            group["params"] = kept or [torch.nn.Parameter(torch.empty(0))]

    @contextmanager
    def returned_to(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside this block `optimizer` has borrowed parameters again, as in DeepSpeed's own engine."""
        own = [group["params"] for group in optimizer.param_groups]
        for group, given in zip(optimizer.param_groups, self._groups_given, strict=False):  # more may have been added
            group["params"] = given
        try:
            yield
        finally:
            for group, parameters in zip(optimizer.param_groups, own, strict=True):
                group["params"] = parameters
            for parameter in self.borrowed:
                optimizer.state.pop(parameter, None)

    def share_states(self, optimizer: torch.optim.Optimizer, meet: Callable[[], Any]) -> None:
        """Give borrowed parameters their owner's state in `optimizer`. Collective over the stages of each tie.

        Args:
            optimizer: the optimizer of this stage.
            meet: a function called on every rank before the first stage waits for another, after all that can fail.
        """
        here = dist.get_rank()
        ours = {
            index: pickle.dumps([_on_host(optimizer.state.get(p)) for p in parameters])
            for index, (owner, _, parameters) in enumerate(self._comms)
            if owner == here
        }
        meet()
        for index, (owner, group, parameters) in enumerate(self._comms):
            told: list[Any] = [ours.get(index)]
            dist.broadcast_object_list(told, src=owner, group=group)
            if owner != here:
                known = zip(parameters, pickle.loads(told[0]), strict=True)
                optimizer.state.update({parameter: state for parameter, state in known if state is not None})


def _on_host(state: dict[str, Any] | None) -> dict[str, Any] | None:
    """Copy the state of one parameter to the host, as another process may not have this device."""
    return state and {name: value.cpu() if torch.is_tensor(value) else value for name, value in state.items()}


def left_out_of_checkpoints(module: Any) -> dict[str, torch.nn.Module]:
    """Return tied modules of this stage, by key, that DeepSpeed 0.19.8 doesn't save, used only by a ``forward_fn``.

    DeepSpeed saves what it runs, and a function has no state; what is tied comes back from the other stages, the rest
    (a decoder's bias) is lost.
    """
    run = {id(layer) for layer in module.forward_funcs}
    return {key: tied for key, tied in module.tied_modules.items() if id(tied) not in run}
