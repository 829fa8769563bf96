"""The training loop, top to bottom: to change how training goes, change train()."""

from contextlib import nullcontext
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.utils import adaptive_clip_grad
from torch import nn

from finetune.data.batches import Cut
from finetune.data.loader import Batch, ImageDataset, epoch_batches, load_batches
from finetune.metrics.compute import best_row, compute_metrics
from finetune.metrics.thresholds import fit_outputs
from finetune.models.batch_norm import keep_buffers, set_train_mode
from finetune.models.kept_images import stage_inputs
from finetune.models.linear_probe import fit, head_layer, returns_features
from finetune.models.saving import save_model
from finetune.models.sharding import gather, whole
from finetune.optim.average import MovingAverage
from finetune.optim.freezing import describe_stage, stage_epochs, start_stage, starts_stage
from finetune.optim.lora import merged
from finetune.optim.loss import Criterion
from finetune.optim.optimizers import build_optimizer, step_optimizer
from finetune.optim.param_groups import build_param_groups, set_lrs
from finetune.recipe import Recipe
from finetune.training.checkpoint import restore, save_checkpoint
from finetune.training.distributed import Stopped, StopRequest, broadcast, check_same_weights, wrap
from finetune.training.evaluate import predict_logits
from finetune.training.logger import Logger
from finetune.training.memory import find_micro_batches
from finetune.training.setup import DEFAULTS, RunOptions
from finetune.utils.seed import seed_all
from finetune.utils.text import fill_lines, progress


def train(
    recipe: Recipe,
    net: nn.Module,
    datasets: tuple[ImageDataset, ImageDataset],
    logger: Logger,
    accelerator: Accelerator,
    options: RunOptions = DEFAULTS,
) -> nn.Module:
    """Fine-tune `net` in place, as the recipe says; goes on from the newest checkpoint in the logger's run folder.

    `datasets` are the training and the validation images. Returns the network whose metrics were logged: `net`, or the moving
    average of it.

    Raises:
        Stopped: after SIGTERM, SIGHUP or Ctrl-C, with a checkpoint written.
        RecipeError: if the loss is no number, or an image can't be read.
    """
    train_images, val_images = datasets
    groups = build_param_groups(recipe, net.to(accelerator.device))
    optimizer = accelerator.prepare(build_optimizer(groups))
    criterion = Criterion(recipe, net, train_images, accelerator.device)
    ema = MovingAverage(net, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    evaluated = ema.module if ema else net
    steps_per_epoch = recipe.data.steps_per_epoch(len(train_images))
    step = restore(recipe, logger, net, evaluated, optimizer, accelerator, len(train_images))
    with StopRequest(accelerator, options.quiet) as stop:
        if recipe.linear_probe and step == 0:
            l2 = fit_linear_probe(recipe, net, criterion, datasets, accelerator, options)
            if ema:
                ema.set(net)
            logits, labels = predict_logits(recipe, evaluated, val_images, accelerator, options, text="validation")
            logger.log_linear_probe({**compute_metrics(recipe, logits, labels, criterion.units), "linear_probe_l2": l2})
            save_if_best(recipe, evaluated, val_images, logger, logits, labels)
        first_epoch = len(logger.history)
        stop.stepping = True
        for epoch in range(first_epoch, recipe.epochs):
            if recipe.early_stop and recipe.early_stop.should_stop(logger.history, recipe.metric):
                break
            if epoch == first_epoch or starts_stage(groups, epoch):
                logger.say(fill_lines(describe_stage(groups, epoch)))
                start_stage(groups, optimizer, epoch)
                set_train_mode(net, recipe.batch_norm)
                options = replace(
                    options, accumulate=find_micro_batches(recipe, net, accelerator, options.accumulate, logger.say)
                )
                inputs = stage_inputs(
                    recipe, net, datasets, stage_epochs(groups, epoch, recipe.epochs), accelerator, logger.folder, logger.say
                )
                model = wrap(recipe, inputs.model(net), accelerator)
            inputs.prepare(epoch, net, accelerator, options.workers, options.quiet)
            set_train_mode(net, recipe.batch_norm)
            cut = Cut(accelerator.process_index, accelerator.num_processes, options.accumulate)
            plans = epoch_batches(recipe, train_images, epoch, cut)[step - epoch * steps_per_epoch :]
            loaded = load_batches(inputs.train, inputs.view(epoch), plans, options.workers, accelerator.device)
            for batch in logger.progress(loaded, epoch, len(plans)):
                lrs = set_lrs(optimizer, groups, step, steps_per_epoch, recipe.epochs, logger.history)
                loss, norm = train_step(recipe, model, criterion, optimizer, batch, accelerator)
                step += 1
                if ema:
                    ema.update(net, step)
                logger.log_step(batch, epoch, loss, norm, lrs)
                if (stopping := stop.agreed()) or (options.checkpoint_every and step % options.checkpoint_every == 0):
                    save_checkpoint(logger, net, evaluated, optimizer, accelerator, step, steps_per_epoch)
                if stopping:
                    raise Stopped(f"after step {step}, with a checkpoint")
            for network in dict.fromkeys((net, evaluated)):
                broadcast(network.buffers(), accelerator)  # norm statistics, of each process's own share of the images
                check_same_weights(network, accelerator)
            logits, labels = predict_logits(recipe, *inputs.validated(evaluated), accelerator, options, text="validation")
            logger.log_epoch(step, epoch, compute_metrics(recipe, logits, labels, criterion.units), logits, labels)
            save_if_best(recipe, evaluated, val_images, logger, logits, labels)
            save_checkpoint(logger, net, evaluated, optimizer, accelerator, step, steps_per_epoch)
    return whole(evaluated)


def train_step(
    recipe: Recipe,
    model: nn.Module,
    criterion: Criterion,
    optimizer: AcceleratedOptimizer,
    batch: Batch,
    accelerator: Accelerator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step: gradient, clipping, optimizer; returns this process's share of the loss, and the norm before clipping."""

    def compute_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        optimizer.zero_grad()
        loss = backward(recipe, model, criterion, batch, accelerator)
        accelerator.unscale_gradients(optimizer)
        return loss, clip_gradients(recipe, optimizer)

    loss, norm = step_optimizer(optimizer, compute_gradient, accelerator)
    optimizer.zero_grad()
    return loss, norm


def backward(recipe: Recipe, model: nn.Module, criterion: Criterion, batch: Batch, accelerator: Accelerator) -> torch.Tensor:
    """Leave the gradient of the batch's mean loss in the parameters; returns this process's share of that loss.

    Each micro-batch adds a sum divided by the size of the whole batch, not a mean of means: a short last batch then weighs
    right, on any number of processes and with any accumulation.
    """
    plan, loss = batch.plan, torch.zeros((), device=accelerator.device)
    for i, (images, labels) in enumerate(batch.micro_batches):
        images, targets = criterion.mix(images, labels, plan.step)
        last = i == len(batch.micro_batches) - 1
        seed_all("forward", recipe.seed, plan.step, plan.positions[i])  # dropout and its like
        # Processes exchange gradients once a step, with the last micro-batch.
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                logits = model(images)
            part = criterion.loss(logits.float(), targets) * plan.weight / plan.size
            if recipe.l2_sp and last:
                part = part + criterion.l2_sp() / accelerator.num_processes
            # Checkpointing computes layers again in the backward pass: their norms have moved already.
            with keep_buffers(model) if recipe.gradient_checkpointing else nullcontext():
                accelerator.backward(part * accelerator.num_processes)  # DDP takes the mean over processes
        loss += part.detach()
    return loss


def clip_gradients(recipe: Recipe, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Clip by norm, then by value, then unit by unit, as the recipe says; returns the norm from before."""
    parameters = [parameter for row in optimizer.param_groups for parameter in row["params"] if parameter.grad is not None]
    norm = gradient_norm([parameter.grad for parameter in parameters], recipe.clip_norm_type)
    if recipe.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, recipe.clip_norm, norm)
    if recipe.clip_value:
        nn.utils.clip_grad_value_(parameters, recipe.clip_value)
    if recipe.clip_adaptive:
        adaptive_clip_grad(parameters, recipe.clip_adaptive)
    return norm


def gradient_norm(gradients: list[torch.Tensor], kind: float) -> torch.Tensor:
    """The norm of all gradients together; not finite only if one of them is not, or the norm itself is too large a number.

    Except on a GPU, which would have to be waited for in each step: there a norm whose powers overflow ends the run.
    """
    norm = gather(nn.utils.get_total_norm(gradients, kind))
    if norm.device.type == "cpu" and not norm.isfinite():
        largest = gather(nn.utils.get_total_norm(gradients, float("inf")))
        if largest.isfinite():  # the powers overflowed alone: take out the scale
            norm = largest * gather(nn.utils.get_total_norm([gradient / largest for gradient in gradients], kind))
    return norm


def fit_linear_probe(
    recipe: Recipe,
    net: nn.Module,
    criterion: Criterion,
    datasets: tuple[ImageDataset, ImageDataset],
    accelerator: Accelerator,
    options: RunOptions,
) -> float:
    """Fit the head to features of the frozen backbone, computed once for each view of the training images.

    The first view is preprocessed as for evaluation, the others are augmented. Returns the l2 of the fit.
    """
    train_images, val_images = datasets
    probe = recipe.linear_probe
    assert probe is not None  # asked for by the caller
    layer, plain = head_layer(recipe, net), train_images.transformed_as(val_images)
    with returns_features(layer):
        views = [
            predict_logits(recipe, net, train_images if view else plain, accelerator, options, -view, text)
            for view, text in enumerate(f"features, view {view + 1} of {probe.views}" for view in range(probe.views))
        ]
    device = "cpu" if accelerator.device.type == "mps" else accelerator.device  # Apple's GPUs know no float64
    features, labels = (torch.cat(parts).to(device) for parts in zip(*views, strict=True))
    with progress(None, None, "fit of the head", accelerator.is_main_process and not options.quiet) as bar:

        def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            bar.update()
            return criterion.loss(logits, targets)

        l2 = fit(layer, features, labels, loss, probe.l2, probe.views)
    broadcast([layer.weight.data, layer.bias.data], accelerator)
    return l2


def save_if_best(
    recipe: Recipe, net: nn.Module, images: ImageDataset, logger: Logger, logits: torch.Tensor, labels: torch.Tensor
) -> None:
    """Write model-best/ if the metrics logged last, of these logits, are the best so far."""
    rows = logger.rows()
    if best_row(rows, recipe.metric) is rows[-1]:
        net = whole(net)
        if logger.accelerator.is_main_process:
            groups, inputs = getattr(images.images, "groups", None), images.transform.preprocessing
            fitted = fit_outputs(recipe.loss, logits, labels, groups)
            with merged(net):
                save_model(logger.folder / "model-best", net, inputs, images.classes, *fitted)
