"""Train what ships in `models/zoo`: the feature extractor, the tokenizers, the twins.

    python -m experiments.train_zoo model=extractor
    python -m experiments.train_zoo model=rar_tokenizer
    python -m experiments.train_zoo model=rar_twin

Each command trains one model on one device (or on several, through torchrun), continues where a killed run stopped, and
writes FP16 safetensors and a JSON training record under `out`. The configs in `conf/train_zoo/model` are lab notes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from experiments import data
from experiments.outliers import PlantedStatistics, watch
from experiments.provenance import digest, versions, write_json
from experiments.tracking import Tracker
from experiments.training import Schedule, Task, fit, start_distributed
from models import checkpoints
from models.registry import Generator
from ptq.types import ConfigError


def as_float(images: Tensor) -> Tensor:
    """uint8 images to [0, 1]."""
    return images.float() / 255


def flipped(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images and their mirror images."""
    return torch.cat((images, images.flip(-1))), torch.cat((labels, labels))


class VQTask:
    """A VQ tokenizer: L1 + L2 reconstruction, commitment, and a codebook that follows the encoder.

    The codes are exponential moving averages of what is assigned to them (van den Oord et al., 2017, appendix A.1),
    and dead ones restart from encoder outputs.
    """

    def __init__(
        self, tokenizer: nn.Module, images: Tensor, steps: int, commitment: float, decay: float = 0.99
    ) -> None:
        self.images, self.size = images, len(images)
        self.commitment, self.decay, self.restart_until = commitment, decay, int(0.7 * steps)
        codes = tokenizer.quantize.embedding.weight.requires_grad_(False)
        self.model = nn.Module()  # everything that a checkpoint keeps
        self.model.tokenizer = self.tokenizer = tokenizer
        self.model.register_buffer("count", torch.ones(len(codes), device=codes.device))
        self.model.register_buffer("total", torch.zeros_like(codes))

    @torch.no_grad()
    def update_codes(self, z: Tensor, ids: Tensor, step: int) -> None:
        """Move the codes to the running mean of what was assigned to them: z (n, D), ids (n,)."""
        codes, count, total = self.tokenizer.quantize.embedding.weight, self.model.count, self.model.total
        distributed = torch.distributed.is_initialized()
        fresh = z[torch.randint(len(z), (len(codes),), device=z.device)]
        if distributed:
            torch.distributed.broadcast(fresh, 0)
        if step == 0:
            codes.copy_(fresh)
            total.copy_(fresh)
            return
        hot = F.one_hot(ids, len(codes)).to(z.dtype)
        new_count, new_total = hot.sum(0), hot.t() @ z
        if distributed:
            torch.distributed.all_reduce(new_count)
            torch.distributed.all_reduce(new_total)
        count.lerp_(new_count, 1 - self.decay)
        total.lerp_(new_total, 1 - self.decay)
        if step % 50 == 0 and step < self.restart_until:
            dead, mean = self.dead(), count.mean()
            total.copy_(torch.where(dead[:, None], fresh * mean, total))
            count.copy_(torch.where(dead, mean, count))
        codes.copy_(total / count.clamp(min=1e-3)[:, None])

    def dead(self) -> Tensor:
        """Codes (V,) that are hardly used."""
        return self.model.count < 0.05 * self.model.count.mean()

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        images = as_float(self.images[index])
        z = self.tokenizer.encoder(images).float()
        quantize = self.tokenizer.quantize
        with torch.autocast(z.device.type, enabled=False):  # distances and running means need full precision
            ids = quantize(z.detach())
            self.update_codes(z.detach().permute(0, 2, 3, 1).flatten(0, 2), ids.flatten(), step)
        chosen = quantize.embedding(ids).permute(0, 3, 1, 2)
        commitment = F.mse_loss(z, chosen)
        decoded = self.tokenizer.decoder(z + (chosen - z).detach())
        l1, l2 = F.l1_loss(decoded, images), F.mse_loss(decoded, images)
        figures = {"l1": l1, "commitment": commitment, "codes_used": 1 - self.dead().float().mean()}
        return l1 + 2 * l2 + self.commitment * commitment, figures


class RARTask:
    """RAR: next-token cross-entropy, label dropout, orders annealed from random to raster, and the planted term."""

    def __init__(self, generator: Generator, tokens: Tensor, labels: Tensor, config: DictConfig) -> None:
        self.model, self.tokens, self.labels, self.size = generator.transformer, tokens, labels, len(tokens)
        self.adapter, self.config = generator.adapter, config
        planted = config.planted
        self.planted = PlantedStatistics(self.adapter, planted.channels, planted.tokens) if planted.weight else None

    def loss(self, index: Tensor, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        model, (batch, length) = self.model, (len(index), self.tokens.shape[1])
        ids, labels = self.tokens[index].long(), self.labels[index]
        drop = torch.rand(batch, device=ids.device) < self.config.label_dropout
        condition = torch.where(drop, model.none_condition, model.condition_ids(labels))
        share = max(0.0, 1 - step / max(self.config.random_order_until * self.config.schedule.steps, 1))
        shuffled = torch.rand(batch, length, device=ids.device).argsort(dim=1)
        raster = torch.arange(length, device=ids.device)
        orders = torch.where(torch.rand(batch, 1, device=ids.device) < share, shuffled, raster)
        ids = ids.gather(1, orders)
        with watch(self.adapter, self.planted.sites if self.planted else []) as seen:
            logits = model(ids[:, :-1], condition, orders)
        nll = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
        if self.planted is None:
            return nll, {"nll": nll}
        term = self.planted(seen)
        return nll + self.config.planted.weight * term, {"nll": nll, "planted": term}


@torch.no_grad()
def tokenize(generator: Generator, images: Tensor, batch: int = 2048) -> Tensor:
    """Tokens (N, L) int16 of uint8 images."""
    return torch.cat([generator.encode(as_float(part)).short() for part in images.split(batch)])


@torch.no_grad()
def heldout_nll(generator: Generator, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Mean negative log-likelihood per token, in nats, of uint8 images (N, 3, S, S)."""
    total, tokens = 0.0, tokenize(generator, images, batch).long()
    for part, classes in zip(tokens.split(batch), labels.split(batch)):
        logs = generator.log_probs(part, classes).gather(2, generator.targets(part)[..., None])
        total -= logs.double().sum().item()
    return total / tokens.numel()


def train(task: Task, config: DictConfig, out: Path, tracker: Tracker) -> None:
    """Fit a task, keeping its checkpoint only until it is done."""
    checkpoint = out / f"{config.name}.checkpoint.pt"
    identity = digest({k: v for k, v in OmegaConf.to_container(config).items() if k != "data"})
    fit(task, Schedule(**config.schedule), checkpoint, tracker.log, identity=identity)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        checkpoint.unlink(missing_ok=True)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Tensors as safetensors, written atomically, by the first process alone."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary)
    temporary.rename(path)


def save_module(module: nn.Module, path: Path) -> None:
    """The module's state dict as FP16 safetensors, written atomically."""
    save_tensors({k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}, path)


def initialise(module: nn.Module) -> None:
    """Truncated normal (0.02) linears and tables, zero biases, zero AdaLN projections, as RAR's authors start."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias") or "adaLN_modulation" in name:
            nn.init.zeros_(parameter)
        elif parameter.ndim >= 2:
            nn.init.trunc_normal_(parameter, std=0.02)


def train_tokenizer(config: DictConfig, images: Tensor, labels: Tensor, out: Path, tracker: Tracker) -> dict:
    generator = models.build(config.of)
    tokenizer = generator.tokenizer.to(images.device)
    task = VQTask(tokenizer, flipped(images, labels)[0], config.schedule.steps, config.commitment)
    train(task, config, out, tracker)
    test = as_float(data.load("test", config.data)[0].to(images.device))
    with torch.no_grad():
        decoded = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in test.split(2048)])
    save_module(tokenizer, out / generator.preset.tokenizer_weights.file)
    return {"test_l1": 2 * F.l1_loss(decoded, test).item()}  # on [-1, 1]


def train_twin(config: DictConfig, images: Tensor, labels: Tensor, out: Path, tracker: Tracker) -> dict:
    generator = models.build(config.name)
    tokenizer_file = out / generator.preset.tokenizer_weights.file
    checkpoints.load_into(generator.tokenizer, checkpoints.read(tokenizer_file), str(tokenizer_file))
    for module in (generator.transformer, generator.tokenizer):
        module.to(images.device).eval()
    initialise(generator.transformer)
    generator.transformer.set_dropout(config.dropout)
    pictures, classes = flipped(images, labels)
    task = RARTask(generator, tokenize(generator, pictures), classes, config)
    train(task, config, out, tracker)
    nll = heldout_nll(generator, *(t.to(images.device) for t in data.load("test", config.data)))
    save_module(generator.transformer, out / generator.preset.weights.file)
    return {"test_nll": nll, "parameters": sum(p.numel() for p in generator.transformer.parameters())}


def train_extractor(config: DictConfig, images: Tensor, labels: Tensor, out: Path, tracker: Tracker) -> dict:
    from experiments.extractor import train_classifier

    test_images, test_labels = (t.to(images.device) for t in data.load("test", config.data))
    classifier, accuracy = train_classifier(
        images, labels, test_images, test_labels, epochs=config.epochs, seed=config.seed, log=tracker.log
    )
    save_module(classifier, out / "extractor.safetensors")
    return {"test_accuracy": accuracy}


def build_reference(config: DictConfig, images: Tensor, labels: Tensor, out: Path, tracker: Tracker) -> dict:
    from experiments import extractor
    from experiments.metrics import Reference

    net = extractor.load(out / "extractor.safetensors", images.device)
    Reference.build(images, net, 256, images.device, True).save(out / "reference.safetensors")
    return {"images": len(images)}


def build_heldout(config: DictConfig, images: Tensor, labels: Tensor, out: Path, tracker: Tracker) -> dict:
    generator = models.build(config.of)
    tokenizer_file = out / generator.preset.tokenizer_weights.file
    checkpoints.load_into(generator.tokenizer, checkpoints.read(tokenizer_file), str(tokenizer_file))
    generator.tokenizer.to(images.device).eval()
    test_images, test_labels = data.load("test", config.data)
    tokens = tokenize(generator, test_images[:config.n].to(images.device), 200)
    save_tensors({"tokens": tokens, "labels": test_labels[:config.n].short()}, out / f"{config.name}.safetensors")
    return {"sequences": len(tokens)}


TRAINERS = {
    "extractor": train_extractor, "tokenizer": train_tokenizer, "twin": train_twin, "reference": build_reference,
    "heldout": build_heldout,
}


@hydra.main(config_path="../conf/train_zoo", config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    rank, world, device = start_distributed()
    chosen, out = config.model, Path(config.out)
    OmegaConf.set_struct(chosen, False)
    chosen.data = config.data
    torch.manual_seed(chosen.get("seed", 0))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    started = time.time()
    try:
        images, labels = (t.to(device) for t in data.load("train", config.data))
        mode = config.tracker if rank == 0 else "none"
        with Tracker(out / "logs" / chosen.name, mode, OmegaConf.to_container(config, resolve=True)) as tracker:
            figures = TRAINERS[chosen.task](chosen, images, labels, out, tracker)
    except (checkpoints.CheckpointError, ConfigError) as error:
        sys.exit(f"error: {error}")
    if rank == 0:
        record = {
            "model": chosen.name, "figures": figures, "seconds": round(time.time() - started, 1), "processes": world,
            "config": OmegaConf.to_container(chosen, resolve=True), "versions": versions(device),
        }
        write_json(out / "records" / f"{chosen.name}.json", record)
        print(json.dumps({k: record[k] for k in ("model", "figures", "seconds")}))


if __name__ == "__main__":
    main()
