"""What trains each of the shipped models, by the kind of its config (`TRAINERS`)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

import models
from experiments.config.compose import explain_refusal
from experiments.data.sets import DataSet, find_set
from experiments.evaluate import likelihood
from experiments.evaluate.references import Reference
from experiments.store.provenance import package_versions
from experiments.store.tracking import Tracker, sync_command
from experiments.train_zoo.loop import Budget, Paused, Schedule, Task, fit, start_distributed
from experiments.train_zoo.model_cards import write_record
from experiments.train_zoo.ranges import check_training
from experiments.train_zoo.tasks.base import as_float, tokenize, with_mirrored
from experiments.train_zoo.tasks.mar import KLTask, MARTask
from experiments.train_zoo.tasks.par import PARTask, UnitVQTask
from experiments.train_zoo.tasks.rar import RARTask
from experiments.train_zoo.tasks.var import MultiScaleVQTask, VARTask
from experiments.train_zoo.tasks.vq import VQTask
from models.registry import PRESETS, Generator
from models.weights import checkpoints
from models.weights.pins import pin_file, require_pinned
from ptq.files import digest_tensors, value_digest, write_tensors
from ptq.spec import ConfigError


@torch.no_grad()
def heldout_nll(generator: Generator, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Mean negative log-likelihood per token in nats, of uint8 images; MAR's diffusion loss."""
    # through the number formats of files, as the shipped held-out tokens have gone
    tokens = likelihood.widen_tokens(tokenize(generator, images, batch))
    return likelihood.score_likelihood(generator, tokens, labels, batch)["nll"]


def dataset_of(config: DictConfig) -> DataSet:
    """The data set of a training: the one that it names, or that of the model it is for."""
    name = config.get("dataset")
    if name is None:
        preset = PRESETS.get(config.get("of", config.name))
        name = "fashion_mnist" if preset is None else preset.dataset
    return find_set(name)


def train(task: Task, config: DictConfig, out: Path, tracker: Tracker) -> dict[str, float]:
    """Fit a task, keeping its checkpoint only until it is done.

    Returns:
        Of a training in pieces the seconds of the steps of all but the last, by name.

    Raises:
        Paused: its time is spent, and the checkpoint kept.
    """
    checkpoint = out / f"{config.name}.checkpoint.pt"
    settings = OmegaConf.to_container(config)
    # where the images lie and when to pause change nothing
    settings.pop("data", None)
    until = settings.pop("until", None)
    budget = Budget() if until is None else Budget(until)
    schedule = Schedule(**config.schedule)
    fit(task, schedule, checkpoint, tracker.log, identity=value_digest(settings), budget=budget)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        checkpoint.unlink(missing_ok=True)
    return {"earlier_s": round(budget.earlier_s, 1)} if budget.earlier_s else {}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Tensors as safetensors, written atomically, by the first process alone.

    A zoo's table of digests follows.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    write_tensors(tensors, path)
    pin_file(path)


def save_module(module: nn.Module, path: Path) -> None:
    """The module's state dict as FP16 safetensors, written atomically."""
    tensors = {}
    for name, value in module.state_dict().items():
        tensors[name] = value.half() if value.is_floating_point() else value
    save_tensors(tensors, path)


def train_tokenizer(
    config: DictConfig, images: Tensor, labels: Tensor, out: Path, tracker: Tracker
) -> dict:
    generator = models.build(config.of)
    generator.tokenizer.to(images.device)
    task_class = TOKENIZER_TASKS[generator.preset.family]
    mirrored, _ = with_mirrored(images, labels)  # (2 N, 3, S, S)
    task = task_class(generator.tokenizer, mirrored, config)
    figures = train(task, config, out, tracker)
    if isinstance(task, KLTask):
        figures |= task.finish()
    test_images, _ = dataset_of(config).load_split("test", config.data)
    test = as_float(test_images.to(images.device))  # (N, 3, S, S) in [0, 1]
    decoded = []
    for part in test.split(2048):
        decoded.append(generator.decode(generator.encode(part)))  # (B, 3, S, S) in [0, 1]
    save_module(generator.tokenizer, out / generator.preset.tokenizer_weights.file)
    error = F.l1_loss(torch.cat(decoded), test).item()
    return {"test_l1": 2 * error, **figures}  # on [-1, 1], twice as wide


def load_tokenizer(name: str, out: Path, device: torch.device) -> Generator:
    """The model `name` in eval mode, with its trained tokenizer and no weights of a transformer."""
    generator = models.build(name)
    path = require_pinned(out / generator.preset.tokenizer_weights.file)
    checkpoints.load_into(generator.tokenizer, checkpoints.read_checkpoint(path), str(path))
    for module in (generator.transformer, generator.tokenizer):
        module.to(device).eval()
    return generator


def train_transformer(
    config: DictConfig, images: Tensor, labels: Tensor, out: Path, tracker: Tracker
) -> dict:
    generator = load_tokenizer(config.name, out, images.device)
    task_class = TRANSFORMER_TASKS[generator.preset.family]
    task_class.initialise(generator.transformer)
    generator.transformer.set_dropout(config.dropout)
    if config.mirrored:
        images, labels = with_mirrored(images, labels)
    task = task_class(generator, images, labels, config)
    figures = train(task, config, out, tracker)
    task.detach()  # the planted term reads no more
    test_images, test_labels = dataset_of(config).load_split("test", config.data)
    nll = heldout_nll(generator, test_images.to(images.device), test_labels.to(images.device))
    save_module(generator.transformer, out / generator.preset.weights.file)
    parameters = sum(parameter.numel() for parameter in generator.transformer.parameters())
    return {"test_nll": nll, "parameters": parameters, **figures}


def train_extractor(
    config: DictConfig, images: Tensor, labels: Tensor, out: Path, tracker: Tracker
) -> dict:
    from experiments.evaluate.extractors.fashion_training import train_classifier

    test_images, test_labels = dataset_of(config).load_split("test", config.data)
    classifier, accuracy = train_classifier(
        images,
        labels,
        test_images.to(images.device),
        test_labels.to(images.device),
        epochs=config.epochs,
        seed=config.seed,
        log=tracker.log,
    )
    save_module(classifier, out / "extractor.safetensors")
    return {"test_accuracy": accuracy}


def build_reference(
    config: DictConfig, images: Tensor, labels: Tensor, out: Path, tracker: Tracker
) -> dict:
    from experiments.evaluate.extractors import fashion
    from experiments.evaluate.small_images import make_reference

    if config.get("extractor") == "lite0":
        return build_lite0_reference(config, images.device, out)
    weights = require_pinned(out / "extractor.safetensors")
    net = fashion.load_classifier(weights, images.device)
    reference = make_reference(images, net, 256, images.device, True)
    reference.save(out / "reference.safetensors")
    pin_file(out / "reference.safetensors")
    return {"images": len(images)}


def build_lite0_reference(config: DictConfig, device: torch.device, out: Path) -> dict:
    """The reference of natural images: Lite0's features of the validation set.

    It is too large to ship; its record has the digests by which results know it, and they are of
    what it is made of: features differ in their last bits from one making to the next.
    """
    from experiments.evaluate.extractors import lite0
    from experiments.evaluate.small_images import extract_features

    extractor = lite0.load_lite0(None, device)
    images, _ = dataset_of(config).load_split("test", config.data)
    features = extract_features(images, extractor, 256, device, progress=True)
    reference = Reference.from_features(features, extractor.digest)
    path = out / f"{config.name}.safetensors"
    reference.save(path)
    pin_file(path)
    made_of = {"images": digest_tensors({"images": images}), "extractor": extractor.digest}
    digest = value_digest(made_of, 16)
    return {"images": len(images), "extractor": extractor.digest, "digest": digest}


def build_heldout(
    config: DictConfig, images: Tensor, labels: Tensor, out: Path, tracker: Tracker
) -> dict:
    generator = load_tokenizer(config.of, out, images.device)
    test_images, test_labels = dataset_of(config).load_split("test", config.data)
    # int16 ids (n, L), or FP16 latents (n, L, D)
    tokens = tokenize(generator, test_images[: config.n].to(images.device), 200)
    tensors = {"tokens": tokens, "labels": test_labels[: config.n].short()}
    path = out / f"{config.name}.safetensors"
    save_tensors(tensors, path)
    figures = {"sequences": len(tokens)}
    if generator.preset.dataset == "tiny_imagenet":
        # it does not ship: results know it by its record
        figures["digest"] = digest_tensors(tensors)
    return figures


TOKENIZER_TASKS = {"var": MultiScaleVQTask, "rar": VQTask, "par": UnitVQTask, "mar": KLTask}
TRANSFORMER_TASKS = {"var": VARTask, "rar": RARTask, "par": PARTask, "mar": MARTask}
TRAINERS = {
    "extractor": train_extractor,
    "tokenizer": train_tokenizer,
    "twin": train_transformer,
    "transformer": train_transformer,
    "reference": build_reference,
    "heldout": build_heldout,
}


def plain_settings(config: DictConfig) -> dict[str, Any]:
    """A composed config as plain values.

    Raises:
        ConfigError: a field refers to one that is not there.
    """
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_refusal(error)) from error


def train_model(config: DictConfig) -> None:
    """Train the model of a config of `conf/train_zoo`, and write it and its record.

    Raises:
        ConfigError, CheckpointError: one line.
    """
    settings = plain_settings(config)
    check_training(settings)
    rank, world, device = start_distributed()
    chosen = config.model
    out = Path(config.out)
    OmegaConf.set_struct(chosen, False)  # `data` is no field of it
    chosen.data = config.data
    started = time.time()
    if config.limit_s is not None:
        if world > 1:
            raise ConfigError(f"limit_s: {config.limit_s} is for one process, not for {world}")
        chosen.until = started + config.limit_s
    torch.manual_seed(chosen.get("seed", 0))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    images, labels = dataset_of(chosen).load_split("train", config.data)  # (N, 3, S, S), (N,)
    mode = config.tracker if rank == 0 else "none"  # one process is tracked for all
    logs = out / "logs"
    with Tracker(logs / chosen.name, mode, settings, place=logs) as tracker:
        train_kind = TRAINERS[chosen.task]
        try:
            figures = train_kind(chosen, images.to(device), labels.to(device), out, tracker)
        except Paused as pause:
            print(pause)
            return
    chosen.pop("until", None)
    if rank == 0:
        record = {
            "model": chosen.name,
            "figures": figures,
            "seconds": round(time.time() - started, 1),
            "processes": world,
            "config": OmegaConf.to_container(chosen, resolve=True),
            "versions": package_versions(device),
        }
        write_record(chosen.name, record, out)
        print(json.dumps({key: record[key] for key in ("model", "figures", "seconds")}))
        upload = None if config.tracker == "none" else sync_command(logs)
        if upload is not None:
            print(f"to upload: {upload}")
