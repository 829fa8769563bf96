"""train() and evaluate(): the loop, top to bottom."""

import math
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy

from finetune.backbone import memory_format
from finetune.batches import SeededImages, Update, load, load_updates, plan_epoch, seed_all
from finetune.checkpoint import restore, save_checkpoint
from finetune.memory import fitting_accumulation
from finetune.param_groups import ParamGroup, build_optimizer, set_rates
from finetune.processes import Stopped, StopRequest, check_agreement, share_buffers
from finetune.recipe import Recipe
from finetune.run_record import RunRecord
from finetune.unfreeze import begins_stage, train_mode, unfreeze, wrap


def train(recipe: Recipe, net: nn.Module, groups: list[ParamGroup], images: tuple[SeededImages, SeededImages],
          record: RunRecord, accelerator: Accelerator, accumulate: int = 1, workers: int = 0,
          checkpoint_every: int = 0) -> None:
    """Fine-tune `net` in place, as the recipe says, writing what happens to `record`; goes on from its newest checkpoint.

    `images` are the training and the validation set, `accumulate` the micro-batches of an update on each process (more if
    memory asks for it), `workers` the loader's processes, `checkpoint_every` the updates between checkpoints (0: an epoch's).
    To change how training goes, change this function.

    Raises:
        Stopped: after SIGTERM or Ctrl-C, with a checkpoint written.
        RecipeError: if the loss is no number, or an image can't be read.
    """
    train_images, val_images = images
    net.to(accelerator.device)
    optimizer = accelerator.prepare(build_optimizer(recipe, groups))
    steps_per_epoch = math.ceil(len(train_images) / recipe.data.batch_size)
    step = restore(record, net, optimizer, groups, accelerator)
    first_epoch = len(record.epochs)

    with StopRequest(accelerator) as stop:
        for epoch in range(first_epoch, recipe.epochs):
            if epoch == first_epoch or begins_stage(groups, epoch):
                trained = unfreeze(groups, epoch)
                train_mode(net, recipe.norm_stats)
                accumulate = fitting_accumulation(recipe, net, accelerator, accumulate, record.say)
                model = wrap(net, accelerator)
            train_mode(net, recipe.norm_stats)
            updates = plan_epoch(len(train_images), recipe.data.batch_size, recipe.seed, epoch, accelerator.process_index,
                                 accelerator.num_processes, accumulate)[step - epoch * steps_per_epoch:]
            scores = [row[recipe.schedule.monitor] for row in record.epochs]
            for update, batches in record.progress(load_updates(train_images, epoch, updates, workers), epoch, len(updates)):
                rates = set_rates(optimizer, recipe.schedule.scale(step, steps_per_epoch, recipe.epochs, scores))
                loss = backward(recipe, model, update, batches, step, accelerator)
                norm = accelerator.clip_grad_norm_(trained, recipe.clip_norm or math.inf)
                optimizer.step()
                optimizer.zero_grad()
                record.log_update(step, epoch, update, loss, norm, rates)
                step += 1
                if (stopping := stop.agreed()) or (checkpoint_every and step % checkpoint_every == 0):
                    save_checkpoint(record, net, optimizer, groups, accelerator, step)
                if stopping:
                    raise Stopped(f"after update {step - 1}")
            share_buffers(net, accelerator)
            check_agreement(net, accelerator)
            record.log_epoch(step, epoch, evaluate(recipe, net, val_images, accelerator, accumulate, workers))
            record.keep_best(net)
            save_checkpoint(record, net, optimizer, groups, accelerator, step)


def backward(recipe: Recipe, model: nn.Module, update: Update, batches: list, step: int,
             accelerator: Accelerator) -> torch.Tensor:
    """Leave the gradient of the update's mean loss in the parameters; returns this process's share of that loss.

    Each micro-batch adds a sum divided by the size of the whole update, not a mean of means: a short last batch then weighs
    right, on any number of processes and with any accumulation.
    """
    loss = torch.zeros((), device=accelerator.device)
    for i, (images, labels) in enumerate(batches):
        seed_all("forward", recipe.seed, step, update.positions[i])  # dropout and its like
        images = images.to(accelerator.device, non_blocking=True, memory_format=memory_format(recipe))
        labels = labels.to(accelerator.device, non_blocking=True)
        # Processes exchange gradients once an update, with the last micro-batch.
        with nullcontext() if i == len(batches) - 1 else accelerator.no_sync(model):
            with accelerator.autocast():
                logits = model(images)
            part = cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=recipe.label_smoothing)
            part = part * update.weight / update.size
            accelerator.backward(part * accelerator.num_processes)  # DDP takes the mean over processes
        loss += part.detach()
    return loss


@torch.no_grad()
def evaluate(recipe: Recipe, net: nn.Module, images: SeededImages, accelerator: Accelerator, accumulate: int = 1,
             workers: int = 0) -> dict:
    """Loss, top-1 (top-5 where there are more than 5 classes), macro F1 and accuracy of each class, all as fractions.

    Every image counts once, on any number of processes, and every process gets the same numbers: each counts its own share
    and the counts are added up. Macro F1 is the mean over classes of 2 TP / (2 TP + FP + FN), 0 where that is 0 / 0.
    """
    net.eval()
    mine = list(range(accelerator.process_index, len(images), accelerator.num_processes))
    size = recipe.data.batch_size // (accelerator.num_processes * accumulate)
    num_classes, device = len(images.classes), accelerator.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    counts = torch.zeros(3, num_classes, dtype=exact, device=device)  # right, predicted, there
    totals = torch.zeros(4, dtype=exact, device=device)  # images, readable ones, loss, right within the top 5
    for batch, labels in load(images, 0, [mine[i:i + size] for i in range(0, len(mine), size)], workers):
        batch = batch.to(device, non_blocking=True, memory_format=memory_format(recipe))
        labels = labels.to(device, non_blocking=True)
        with accelerator.autocast():
            logits = net(batch)
        readable = labels >= 0
        logits, labels = logits.float()[readable], labels[readable]
        top = logits.topk(min(5, num_classes)).indices
        right = top == labels[:, None]
        counts += torch.stack([torch.bincount(kind, minlength=num_classes)
                               for kind in (labels[right[:, 0]], top[:, 0], labels)])
        loss = cross_entropy(logits.to(exact), labels, reduction="sum")
        totals += torch.stack([torch.tensor(len(readable), device=device), readable.sum(), loss, right.any(1).sum()])
    (right, predicted, there), (loaded, seen, loss, top5) = accelerator.reduce([counts, totals], "sum")
    assert loaded == len(images)
    f1 = 2 * right / (predicted + there).clamp(min=1)
    scores = {"top1": (right.sum() / seen).item(), "loss": (loss / seen).item(), "macro_f1": f1.mean().item()}
    if num_classes > 5:
        scores["top5"] = (top5 / seen).item()
    return scores | {"val_images": int(seen), "class_accuracy": (right / there.clamp(min=1)).tolist()}
