"""train() and predict_logits(): the loop, top to bottom."""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.utils import ModelEmaV3, adaptive_clip_grad
from torch import nn

from finetune.data.loader import Batch, BatchPlan, ImageDataset, epoch_batches, load_batches
from finetune.models.backbone import memory_format
from finetune.models.batch_norm import set_train_mode
from finetune.models.fuse_conv_bn import fuse_conv_bn
from finetune.models.linear_probe import fit, head_layer, returns_features
from finetune.optim.freezing import describe_stage, starts_stage, unfreeze
from finetune.optim.loss import Criterion
from finetune.optim.optimizers import build_optimizer, wants_closure
from finetune.optim.param_groups import build_param_groups, set_lrs
from finetune.recipe import Recipe
from finetune.train.checkpoint import restore, restore_optimizer, save_checkpoint
from finetune.train.distributed import Stopped, StopRequest, broadcast, check_same_weights, wrap
from finetune.train.evaluate import compute_metrics, predict_logits
from finetune.train.logger import Logger
from finetune.train.micro_batch import find_micro_batches
from finetune.utils.seed import seed_all


def train(
    recipe: Recipe,
    net: nn.Module,
    images: tuple[ImageDataset, ImageDataset],
    record: Logger,
    accelerator: Accelerator,
    accumulate: int = 1,
    workers: int = 0,
    checkpoint_every: int = 0,
) -> nn.Module:
    """Fine-tune `net` in place, as the recipe says, writing what happens to `record`; goes on from its newest checkpoint.

    `images` are the training and the validation set, `accumulate` the micro-batches of an update on each process (more if
    memory asks for it), `workers` the loader's processes, `checkpoint_every` the updates between checkpoints (0: an epoch's).
    Returns the network whose scores were logged: `net`, or the moving average of it. To change how training goes, change this
    function.

    Raises:
        Stopped: after SIGTERM or Ctrl-C, with a checkpoint written.
        RecipeError: if the loss is no number, or an image can't be read.
    """
    train_images, val_images = images
    fuse_conv_bn(recipe, net.to(accelerator.device))
    criterion = Criterion(recipe, net, train_images, accelerator.device)
    ema = ModelEmaV3(net, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    scored = ema.module if ema else net
    steps_per_epoch = recipe.data.updates(len(train_images))
    step = restore(record, net, scored, accelerator)
    if recipe.linear_probe and step == 0:
        fit_linear_probe(recipe, criterion, net, images, accelerator, accumulate, workers)
        if ema:
            ema.set(net)
        logits, labels = predict_logits(recipe, scored, val_images, accelerator, accumulate, workers)
        record.log_linear_probe(compute_metrics(recipe, logits, labels))
        record.save_best(scored)
    first_epoch = len(record.epochs)

    with StopRequest(accelerator) as stop:
        for epoch in range(first_epoch, recipe.epochs):
            if recipe.early_stop and recipe.early_stop.stops(record.epochs, recipe.metric):
                break
            if epoch in (first_epoch, recipe.optimizer_begins(epoch)):
                groups = build_param_groups(recipe, net, epoch)
                optimizer = accelerator.prepare(build_optimizer(groups))
                if step > recipe.optimizer_begins(epoch) * steps_per_epoch:
                    restore_optimizer(record, net, optimizer)
            if epoch == first_epoch or starts_stage(groups, epoch):
                record.say(describe_stage(groups, epoch))
                trained = unfreeze(groups, epoch)
                set_train_mode(net, recipe.batch_norm)
                accumulate = find_micro_batches(recipe, net, accelerator, accumulate, record.say)
                model = wrap(net, accelerator, recipe.torch_compile)
            set_train_mode(net, recipe.batch_norm)
            place = accelerator.process_index, accelerator.num_processes
            updates = epoch_batches(recipe, train_images, epoch, *place, accumulate)[step - epoch * steps_per_epoch :]
            loaded = load_batches(train_images, epoch, updates, workers, accelerator.device)
            for update, batches in record.progress(loaded, epoch, len(updates)):
                rates = set_lrs(optimizer, groups, step, steps_per_epoch, recipe.epochs, record.epochs)
                loss, norm = train_step(recipe, criterion, model, trained, optimizer, update, batches, step, accelerator)
                if ema:
                    ema.update(net, step + 1)
                record.log_step(step, epoch, update, batches, loss, norm, rates)
                step += 1
                if (stopping := stop.agreed()) or (checkpoint_every and step % checkpoint_every == 0):
                    save_checkpoint(record, net, scored, optimizer, accelerator, step)
                if stopping:
                    raise Stopped(f"after update {step - 1}")
            for network in dict.fromkeys((net, scored)):
                broadcast(network.buffers(), accelerator)  # norm statistics, of each process's own share of the images
                check_same_weights(network, accelerator)
            logits, labels = predict_logits(recipe, scored, val_images, accelerator, accumulate, workers)
            record.log_epoch(step, epoch, compute_metrics(recipe, logits, labels), logits, labels)
            record.save_best(scored)
            save_checkpoint(record, net, scored, optimizer, accelerator, step)
    return scored


def fit_linear_probe(
    recipe: Recipe,
    criterion: Criterion,
    net: nn.Module,
    images: tuple[ImageDataset, ImageDataset],
    accelerator: Accelerator,
    accumulate: int,
    workers: int,
) -> None:
    """Fit the head alone to the frozen backbone's features, which are computed once for each view of the training images.

    The first view is as images are scored, the others are varied as for training.
    """
    train_images, val_images = images
    probe = recipe.linear_probe
    assert probe is not None  # asked for by the caller
    layer = head_layer(recipe, net)
    with returns_features(layer):
        views = [
            predict_logits(
                recipe,
                net,
                train_images.seen_as(val_images) if view == 0 else train_images,
                accelerator,
                accumulate,
                workers,
                epoch=-view,
            )
            for view in range(probe.views)
        ]
    device = "cpu" if accelerator.device.type == "mps" else accelerator.device  # Apple's GPUs know no float64
    features, labels = (torch.cat(parts).to(device) for parts in zip(*views, strict=True))
    fit(layer, features, labels, criterion.loss, probe.l2)
    broadcast([layer.weight.data, layer.bias.data], accelerator)


def train_step(
    recipe: Recipe,
    criterion: Criterion,
    model: nn.Module,
    trained: list[nn.Parameter],
    optimizer: AcceleratedOptimizer,
    update: BatchPlan,
    batches: list[Batch],
    step: int,
    accelerator: Accelerator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update: gradient, clipping, optimizer; returns this process's share of the loss, and the norm before clipping."""

    def gradient() -> tuple[torch.Tensor, torch.Tensor]:
        optimizer.zero_grad()
        loss = backward(recipe, criterion, model, update, batches, step, accelerator)
        accelerator.unscale_gradients(optimizer)
        return loss, clip(recipe, trained)

    def closure() -> torch.Tensor:
        return accelerator.reduce(gradient()[0], "sum")

    loss, norm = gradient()
    optimizer.step(closure if wants_closure(optimizer.optimizer) else None)
    optimizer.zero_grad()
    return loss, norm


def backward(
    recipe: Recipe,
    criterion: Criterion,
    model: nn.Module,
    update: BatchPlan,
    batches: list[Batch],
    step: int,
    accelerator: Accelerator,
) -> torch.Tensor:
    """Leave the gradient of the update's mean loss in the parameters; returns this process's share of that loss.

    Each micro-batch adds a sum divided by the size of the whole update, not a mean of means: a short last batch then weighs
    right, on any number of processes and with any accumulation.
    """
    loss = torch.zeros((), device=accelerator.device)
    for i, (images, labels) in enumerate(batches):
        images, targets = criterion.mix(images, labels, step)
        images = images.contiguous(memory_format=memory_format(recipe))
        last = i == len(batches) - 1
        seed_all("forward", recipe.seed, step, update.positions[i])  # dropout and its like
        # Processes exchange gradients once an update, with the last micro-batch.
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                logits = model(images)
            part = criterion.loss(logits.float(), targets) * update.weight / update.size
            if recipe.l2_sp and last:
                part = part + criterion.pull() / accelerator.num_processes
            accelerator.backward(part * accelerator.num_processes)  # DDP takes the mean over processes
        loss += part.detach()
    return loss


def clip(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.Tensor:
    """Clip the gradients as the recipe says: by norm, then by value, then unit by unit; returns the norm from before."""
    norm = nn.utils.clip_grad_norm_(parameters, recipe.clip_norm or float("inf"), recipe.clip_norm_type)
    if recipe.clip_value:
        nn.utils.clip_grad_value_(parameters, recipe.clip_value)
    if recipe.clip_adaptive:
        adaptive_clip_grad(parameters, recipe.clip_adaptive)
    return norm
