"""Optimizers of torch and timm by name, several of them as one, and one after another."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

from finetune.models.sharding import is_shard
from finetune.optim.param_groups import ParamGroup
from finetune.recipe import Optimizer
from finetune.utils.errors import RecipeError
from finetune.utils.text import nearest

FUSED_ON = {name: ("cpu", "cuda") for name in ("Adam", "AdamW", "SGD")}  # one pass over the memory of each tensor


def build_optimizer(groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
    """An optimizer over all groups that ever train, those still frozen too; where groups name several, these as one.

    Raises:
        RecipeError: for an unknown optimizer or an option that it does not have.
    """
    named: dict[str, list[ParamGroup]] = {}
    for group in groups:
        if group.ever_trains:
            named.setdefault(repr((group.optimizer.name, group.optimizer.options)), []).append(group)
    optimizers = [one_optimizer(members[0].optimizer, members) for members in named.values()]
    optimizer = optimizers[0] if len(optimizers) == 1 else SeveralOptimizers(optimizers)
    if after := [group.after_switch for group in groups if group.after_switch]:
        return SwitchedOptimizer(optimizer, build_optimizer(after), groups[0].switch_at)
    return optimizer


def one_optimizer(wanted: Optimizer, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
    """One optimizer over these groups; their weight decay is set here and nowhere else, their learning rate at each step."""
    kind = optimizer_class(wanted.name)
    accepted = inspect.signature(kind).parameters
    # Some of timm's are torch's with defaults bound: their own names are listed by the class behind.
    known = [name for name in accepted if name not in ("params", "lr", "args", "kwargs")]
    unknown = [name for name in wanted.options if name not in known]
    if unknown:
        raise RecipeError(
            f"optimizer {wanted.name} has no option '{unknown[0]}'.{nearest(unknown[0], known)} Its options: {', '.join(known)}"
        )
    decays = "weight_decay" in accepted
    if not decays and any(group.weight_decay for group in groups):
        raise RecipeError(f"optimizer {wanted.name} has no weight_decay; leave it out")
    if wanted.name == "LBFGS" and len(groups) > 1:
        raise RecipeError(
            f"optimizer LBFGS takes one group, not {', '.join(group.name for group in groups)}: give the others "
            "an optimizer of their own, or freeze them with lr=0"
        )
    if wanted.name == "Muon":
        named = [(group.name, name, parameter) for group in groups for name, parameter in group.params.items()]
        for group_name, name, parameter in [row for row in named if row[2].ndim != 2]:
            raise RecipeError(
                f"optimizer Muon takes matrices, and {name} of group {group_name} is {tuple(parameter.shape)}: give it to a "
                "group with another optimizer"
            )
    rows: list[dict[str, Any]] = []
    for group in groups:
        parts = ((group.decay, group.weight_decay), (group.no_decay, 0.0)) if decays else ((group.params, 0.0),)
        for params, decay in parts:
            if params:
                row = {"name": group.name, "params": list(params.values()), "lr": group.lr}
                rows.append(row | ({"weight_decay": decay} if decays else {}))
    options = dict(wanted.options)
    # Of complex ones, and of most in shards, torch has no fused steps; of some optimizers it has none for a GPU.
    devices = FUSED_ON.get(wanted.name, ("cpu",))
    fusable = all(p.device.type in devices and p.is_floating_point() and not is_shard(p) for row in rows for p in row["params"])
    if fusable and "fused" in accepted and not options.keys() & {"fused", "foreach", "differentiable"}:
        options["fused"] = True
    try:
        return kind(rows, lr=rows[0]["lr"], **options)
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        raise RecipeError(f"optimizer {wanted.name} refuses its options: {error}") from error


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """torch.optim's class of that exact name, or timm's of that registered name."""
    base = torch.optim.Optimizer
    kinds = {n: kind for n, kind in vars(torch.optim).items() if isinstance(kind, type) and base in kind.mro()[1:]}
    if name == "SparseAdam":
        raise RecipeError("optimizer SparseAdam works on sparse gradients only, and images give none")
    if name in kinds:
        return kinds[name]
    timm_names = [str(name) for name in list_optimizers()]
    if name not in timm_names:
        raise RecipeError(
            f"no optimizer '{name}'.{nearest(name, [*kinds, *timm_names])} torch.optim has "
            f"{', '.join(kinds)}; timm has {', '.join(timm_names)}"
        )
    if get_optimizer_info(name).second_order:
        raise RecipeError(f"optimizer {name} needs second derivatives, and a step here computes first ones only")
    return get_optimizer_class(name)


def plain_optimizers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers of torch or timm that an optimizer consists of now, Accelerate's wrapper taken off."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return getattr(inner, "optimizers", [inner])


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step evaluates the loss itself, several times."""
    return any(isinstance(one, torch.optim.LBFGS) for one in plain_optimizers(optimizer))


def step_optimizer(
    optimizer: AcceleratedOptimizer, compute_gradient: Callable[[], tuple[torch.Tensor, torch.Tensor]], accelerator: Accelerator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step by the gradient that `compute_gradient` leaves in the parameters; returns what it returns, loss and norm.

    LBFGS computes the gradient several times; the loss that it is given is the sum over processes. Whether the gradient is
    finite is not looked at here, where a GPU would have to be waited for: the log does, and ends the run.
    """

    def closure() -> torch.Tensor:
        return accelerator.reduce(compute_gradient()[0], "sum")

    loss, norm = compute_gradient()
    optimizer.step(closure if needs_closure(optimizer) else None)
    return loss, norm


def start_epoch(optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Let the optimizer of an epoch step from now on, where the recipe switches from one to another."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, SwitchedOptimizer):
        inner.start_epoch(epoch)


def just_switched(optimizer: torch.optim.Optimizer, epoch: int) -> bool:
    """Whether the epoch is the first of the optimizer that the recipe switches to."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return isinstance(inner, SwitchedOptimizer) and epoch == inner.switch_at


class SeveralOptimizers(torch.optim.Optimizer):
    """Optimizers of different parameters as one: stepped, zeroed, unscaled, saved and loaded together.

    `param_groups` and `state` are those of the optimizers within, not copies of them.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)
        super().__init__([row for optimizer in self.optimizers for row in optimizer.param_groups], {})
        self.share_state()

    def share_state(self) -> None:
        """Have the optimizers within use this one's param_groups and state."""
        rows = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(rows) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # makes new param_groups and a new state
        self.share_state()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each with the present gradients, or those of `closure`; returns the loss that it returns.

        LBFGS comes last: its evaluations replace the gradients the others step by.
        """
        loss = torch.enable_grad()(closure)() if closure else None
        for optimizer in sorted(self.optimizers, key=needs_closure):
            optimizer.step(closure if needs_closure(optimizer) else None)
        return loss


class SwitchedOptimizer(torch.optim.Optimizer):
    """One optimizer up to an epoch, from there on another of the same parameters, without the state of the first."""

    def __init__(self, before: torch.optim.Optimizer, after: torch.optim.Optimizer, switch_at: float):
        self.before, self.after, self.switch_at = before, after, switch_at
        super().__init__(before.param_groups, {})
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Show the param_groups and the state of the epoch's optimizer, which steps from now on."""
        self.current = self.after if epoch >= self.switch_at else self.before
        self.optimizers = plain_optimizers(self.current)
        self.param_groups, self.state = self.current.param_groups, self.current.state

    def state_dict(self) -> dict[str, Any]:
        return self.current.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.current.load_state_dict(state_dict)
        self.param_groups, self.state = self.current.param_groups, self.current.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self.current.step(closure)
