"""The frozen layers that a network starts with: where they end, and the network from there on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.models.batch_norm import has_statistics, keep_buffers, set_train_mode
from finetune.utils.seed import seed_all

TOLERANCE = 1e-4  # of two ways to the same numbers in float32, relative


class Reached(Exception):
    """The module whose output is kept has returned: what comes after it need not be computed."""


@dataclass(frozen=True)
class FrozenPrefix:
    """Where the frozen layers end.

    `last` names the module whose output is all that the later layers see of an image, and `kept`, [2, ...], is that output for
    two images. `skipped` are the outputs, for two images, of the modules before it that need not be computed for that.
    """

    last: str
    kept: torch.Tensor
    skipped: dict[str, torch.Tensor]
    shape: tuple[int, int, int]


class Suffix(nn.Module):
    """A network after its frozen layers: takes what they make of images, [n, ...], in place of images.

    The network's own forward pass runs, on no image: each frozen module returns zeros at no cost, the last one what was kept.
    """

    def __init__(self, net: nn.Module, prefix: FrozenPrefix):
        super().__init__()
        self.net, self.prefix = net, prefix

    def forward(self, kept: torch.Tensor) -> Any:
        n = len(kept)
        outputs = {name: value.new_zeros(()).expand(n, *value.shape[1:]) for name, value in self.prefix.skipped.items()}
        with returning(self.net, outputs | {self.prefix.last: kept}):
            return self.net(kept.new_zeros(()).expand(n, *self.prefix.shape))


@contextmanager
def returning(net: nn.Module, outputs: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within, these modules of the network compute nothing and return these tensors."""
    own = [(net.get_submodule(name), output) for name, output in outputs.items()]
    before = [(module, module.__dict__.get("forward")) for module, _ in own]
    try:
        for module, output in own:
            module.__dict__["forward"] = lambda *_, output=output, **__: output
        yield
    finally:
        for module, forward in before:
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def find_prefix(net: nn.Module, shape: tuple[int, int, int], batch_norm: str) -> FrozenPrefix | None:
    """The longest frozen prefix of a network whose training mode, which this sets, is that of `batch_norm`; or None.

    Found by trial on two random images: from what is kept, logits and gradients must be those of the whole network, and what is
    kept must not depend on the other image, nor on chance.
    """
    device = next(net.parameters()).device
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    set_train_mode(net, batch_norm)
    with keep_buffers(net):
        outputs = frozen_outputs(net, images)
        wanted = logits_and_gradients(net, images) if outputs else []
        while outputs:
            last, kept = outputs.popitem()
            prefix = FrozenPrefix(last, kept, {name: value for name, value in outputs.items() if len(value) == 2}, shape)
            still = is_still(net.eval(), prefix, images)
            set_train_mode(net, batch_norm)
            if still and equals(wanted, from_kept(net, prefix)):
                return prefix
    return None


def frozen_outputs(net: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs, by module, of all that returns before the first module that trains is called; of nested ones the outermost.

    Left out are modules that are called again, and those that return anything but one tensor.
    """
    outputs: dict[str, Any] = {}
    called: list[str] = []
    reached = False

    def before(name: str, module: nn.Module, inputs: Any) -> None:
        nonlocal reached
        called.append(name)
        trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        reached = reached or trains or (module.training and has_statistics(module))

    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not reached:
            for inner in [other for other in outputs if other.startswith(f"{name}.")]:
                del outputs[inner]
            outputs[name] = output.detach().clone() if isinstance(output, torch.Tensor) else None

    hooks = [
        handle
        for name, module in net.named_modules()
        for handle in (
            module.register_forward_pre_hook(partial(before, name)),
            module.register_forward_hook(partial(after, name)),
        )
    ]
    try:
        with torch.no_grad():
            net(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: output for name, output in outputs.items() if output is not None and called.count(name) == 1}


def logits_and_gradients(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """Logits of two images, and the gradients of all that trains; empty for what has none."""
    seed_all("frozen prefix")
    logits = model(inputs)
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((weights * logits.float()).sum(), parameters, allow_unused=True)
    return [logits.detach(), *(torch.empty(0) if gradient is None else gradient for gradient in gradients)]


def from_kept(net: nn.Module, prefix: FrozenPrefix) -> list[torch.Tensor]:
    """`logits_and_gradients` from what is kept; nothing if the network can't be run so."""
    try:
        return logits_and_gradients(Suffix(net, prefix), prefix.kept.clone())
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):  # what it makes of zeros is its own matter
        return []


def is_still(net: nn.Module, prefix: FrozenPrefix, images: torch.Tensor) -> bool:
    """Whether the last frozen module of a network in eval mode returns the same for an image alone, after other draws."""
    seed_all("another draw")
    return len(prefix.kept) == 2 and equals([prefix.kept[:1]], [frozen_part(net, prefix.last, images[:1])])


@torch.no_grad()
def frozen_part(net: nn.Module, last: str, images: torch.Tensor) -> torch.Tensor:
    """What the frozen layers make of images; the layers after them are not run."""
    outputs = []

    def stop(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        outputs.append(output)
        raise Reached

    hook = net.get_submodule(last).register_forward_hook(stop)
    try:
        with suppress(Reached):
            net(images)
    finally:
        hook.remove()
    return outputs[0]


def share_of_forward(net: nn.Module, prefix: FrozenPrefix) -> float:
    """The frozen layers' share of the floating point operations of a forward pass."""
    image = torch.zeros(1, *prefix.shape, device=prefix.kept.device)
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        net.eval()(image)
    with FlopCounterMode(display=False) as part:
        frozen_part(net, prefix.last, image)
    return part.get_total_flops() / max(1, whole.get_total_flops())


def equals(wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> bool:
    """Whether these tensors are the same but for rounding."""
    if [value.shape for value in wanted] != [value.shape for value in found]:
        return False
    error = sum(float((a - b).norm()) ** 2 for a, b in zip(wanted, found, strict=True))
    return error <= TOLERANCE**2 * sum(float(value.norm()) ** 2 for value in wanted)
