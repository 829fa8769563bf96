"""Statistics of batch norms, computed anew."""

import copy

import timm
import torch
from torch.optim.swa_utils import update_bn

from finetune.models.batch_norm import recompute_statistics
from helpers import same_tensors


def test_statistics_are_those_of_update_bn():
    """Of all batch norms, they are torch's update_bn's, bit for bit; of some, the others stay, and so do modes and momenta."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=3).eval()
    batches = [torch.randn(6, 3, 32, 32) for _ in range(3)]
    names = [name for name, module in net.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
    reference, before = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    update_bn(batches, reference)
    momenta = [module.momentum for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    recompute_statistics(net, names, batches)
    assert same_tensors(net.state_dict(), reference.state_dict()) and not same_tensors(net.state_dict(), before)
    assert momenta == [module.momentum for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert not any(module.training for module in net.modules())
    net.load_state_dict(before)
    recompute_statistics(net, names[-1:], batches)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{names[-1]}.{kind}" for kind in ("running_mean", "running_var", "num_batches_tracked")}
