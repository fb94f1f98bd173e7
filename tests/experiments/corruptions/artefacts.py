"""Every kind of file that is written and read again, small: how one is made, and how it is read.

`make(folder, variant)` writes a whole artefact, where variants differ in content and owner, and
returns the file to corrupt; `read(path)` reads it as the project does, and returns what is used of
it in a form that can be compared, or None where nothing is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import models
from experiments.analyses.perturbation import read_trials
from experiments.evaluate import fp_gate, references
from experiments.evaluate.features import FeatureStream
from experiments.evaluate.likelihood import load_held_out
from experiments.evaluate.references import Reference
from experiments.identity import places
from experiments.identity.results import committed_results, stored_result
from experiments.identity.whole import whole_identity
from experiments.images import image_sets
from experiments.images.microbatches import draw_pool
from experiments.render.pictures import read_samples
from experiments.render.report import load_local
from experiments.run import cell
from experiments.sample import sampling
from experiments.store import files, folders, results
from experiments.table.job_queue import JobQueue
from experiments.table.jobs import Job
from experiments.train_zoo import model_cards
from experiments.train_zoo.loop import Schedule, Training
from models import registry
from models.preset import Source
from models.weights import added, conversions, pins
from models.weights.added import AddedFile
from models.weights.checkpoints import read_checkpoint as read_state
from ptq.files import seal_object, write_tensors
from ptq.int8.exports.export_files import Export, read_export, save_export
from ptq.omniquant import block_files
from ptq.omniquant.block_files import TrainedBlock
from ptq.transform import InputTransform
from tests.experiments.corruptions import damage
from tests.experiments.corruptions.damage import plain_value
from tests.experiments.evaluate.evaluations import Linear, made_up_features
from tests.experiments.identity.identities import made_origin
from tests.experiments.images.test_image_sets import pictures, save_shards

CPU = torch.device("cpu")
NUMBER = 4  # of rows, images, figures


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A kind of file; `meaning` reads its bytes apart from the project."""

    make: Callable[[Path, int], Path]
    read: Callable[[Path], Any]
    meaning: Callable[[bytes], Any]


def made_up_numbers(variant: int, *shape: int) -> Tensor:
    """Made-up numbers, others for every variant."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(variant))


# --- caches


def make_pool(folder: Path, variant: int) -> Path:
    cache = folder / f"pool-{variant}.safetensors"
    read_pool(cache)
    return cache


def read_pool(cache: Path) -> Any:
    variant = int(cache.stem.rpartition("-")[2])
    generator = SimpleNamespace(sample=lambda labels, *_: made_up_numbers(variant, len(labels), 5))
    labels = torch.arange(NUMBER)
    tokens = draw_pool(generator, labels, 0, NUMBER, {}, CPU, cache, lambda items, what: items)
    return plain_value(tokens)


def read_features(path: Path) -> Any:
    images = SimpleNamespace(
        field="samples",
        path=path,
        n=NUMBER,
        size=8,
        chunks=lambda length: iter([pictures(NUMBER + variant_of(path))[-NUMBER:]]),
    )
    stream = FeatureStream(images, Linear(), "linear", path.parents[1])
    return plain_value(list(stream))


def variant_of(path: Path) -> int:
    """The variant of an artefact, which its folder is called after."""
    return int(path.parents[2].name)


def make_features(folder: Path, variant: int) -> Path:
    cache = folder / str(variant) / "cache"
    read_features(cache / "any" / "x")
    (path,) = cache.rglob("*.safetensors")
    return path


def make_conversion(folder: Path, variant: int) -> Path:
    source = folder / f"{variant}.pth"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"a": made_up_numbers(variant, 8)}, source)
    return conversions.convert_file(source)


def read_conversion(path: Path) -> Any:
    (source,) = path.parents[1].glob("*.pth")
    return plain_value(read_state(conversions.convert_file(source)))


def make_added(folder: Path, variant: int) -> Path:
    """The list of files that a user has added."""
    source = Source(f"{variant}.bin", "some/where")
    added.add_entries({source: AddedFile(folder / "weights.bin", f"{variant}" * 64)})
    return added.entries_file()


def read_added(path: Path) -> Any:
    return {key: str(entry) for key, entry in added.read_entries().items()}


def make_trials(folder: Path, variant: int) -> Path:
    path = folder / f"perturbation-{variant}" / "trials.json"
    files.write_sealed(
        path, {"of": path.parent.name, "kl": made_up_numbers(variant, NUMBER).tolist()}
    )
    return path


def make_blocks(folder: Path, variant: int) -> Path:
    path = folder / "trained.safetensors"
    block = TrainedBlock(
        {"b.qkv": InputTransform(made_up_numbers(variant, 4), None)},
        {},
        made_up_numbers(variant, 2),
    )
    shift = dataclasses.replace(block.transforms["b.qkv"], shift=made_up_numbers(variant, 4))
    trained = {"b": dataclasses.replace(block, transforms={"b.qkv": shift})}
    block_files.write_blocks(path, trained, str(variant), 1.0)
    return path


def read_blocks(path: Path) -> Any:
    adapter = SimpleNamespace(model=nn.Linear(1, 1), blocks=["b"])
    seconds = block_files.training_seconds(path)
    trained = block_files.read_blocks(path, adapter, "0")
    losses = {name: plain_value(block.losses) for name, block in trained.items()}
    return (seconds, losses) if trained else None


# --- what ships, and what was trained


def make_shipped(name: str) -> Callable[[Path, int], Path]:
    """A file of the zoo; the other variant is the one of another family."""

    def make(folder: Path, variant: int) -> Path:
        path = folder / name.replace("FAMILY", "par")
        source = registry.ZOO / name.replace("FAMILY", ("par", "rar")[variant])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read_bytes())
        (folder / pins.TABLE).write_bytes((registry.ZOO / pins.TABLE).read_bytes())
        return path

    return make


def in_zoo(read: Callable[[], Any]) -> Callable[[Path], Any]:
    """A reader of the zoo that a file lies in."""

    def read_there(path: Path) -> Any:
        shipped = registry.ZOO
        folder = path.parent if path.suffix == ".safetensors" else path.parents[1]
        registry.ZOO = model_cards.ZOO = folder
        try:
            return plain_value(read())
        finally:
            registry.ZOO = model_cards.ZOO = shipped

    return read_there


def read_tokenizer() -> Any:
    return registry.state_of(models.PRESETS["par_twin"].tokenizer_weights, None, "tokenizer")


def make_pins(folder: Path, variant: int) -> Path:
    return make_shipped("FAMILY_tokenizer.safetensors")(folder, 0).with_name(pins.TABLE)


def read_pinned(path: Path) -> Any:
    return in_zoo(read_tokenizer)(path.with_name("par_tokenizer.safetensors"))


def line_of_tokenizer(content: bytes) -> Any:
    (line,) = {
        line for line in content.splitlines() if line.endswith(b"  par_tokenizer.safetensors")
    }
    return line


def make_reference(folder: Path, variant: int) -> Path:
    path = folder / "reference.safetensors"
    Reference.from_features(made_up_features(str(variant), 8), f"extractor{variant}").save(path)
    return path


def read_reference(path: Path) -> Any:
    return plain_value(vars(Reference.load(path, "extractor0")))


def make_training(variant: int) -> Training:
    torch.manual_seed(variant)
    task = SimpleNamespace(model=nn.Linear(3, 2), size=8)
    return Training(task, Schedule(steps=2, batch=2, lr=0.1), f"training {variant}")


def make_checkpoint(folder: Path, variant: int) -> Path:
    path = folder / "x.checkpoint.pt"
    make_training(variant).save(path, 1, seconds=0.5)
    return path


def read_checkpoint(path: Path) -> Any:
    training = make_training(0)
    return training.load(path), plain_value(dict(training.model.state_dict()))


# --- results


def make_result(variant: int) -> dict[str, Any]:
    kl, nll = (float(figure) for figure in made_up_numbers(variant, 2).abs())
    return {
        "schema": results.SCHEMA,
        "cell": {"model": "m"},
        "seed": 0,
        "metrics": {"kl": kl, "nll": nll},
        "cost": {"cell_s": 1.5},
        "provenance": made_origin(variant=variant),
    }


def make_run(folder: Path, variant: int) -> Path:
    """The folder of a run, with images and features beside its figures."""
    result = make_result(variant)
    run = folder / f"m-fp-s0-{result['provenance']['hash']}"
    images = pictures(NUMBER + variant)[-NUMBER:]
    files.save_arrays({"arr_0": images.transpose(0, 2, 3, 1)}, run / "samples.npz")
    write_tensors({"pool": made_up_numbers(variant, NUMBER, 3)}, run / "features.safetensors")
    image = run / "grid.png"
    image_sets.write_pngs([images[:1]], run / "png")
    (run / "png" / "000000.png").rename(image)
    result["files"] = folders.describe_files(run, cell.KEPT)
    departures = result["provenance"]["identity"]
    places.save_identity(run, whole_identity(departures, "cuda"))
    results.write_result(run / "metrics.json", result)
    return run


def make_in_run(name: str) -> Callable[[Path, int], Path]:
    return lambda folder, variant: make_run(folder, variant) / name


def read_run(path: Path) -> Any:
    places.announce_ignored.cache_clear()
    try:
        departures = results.read_result(path.parent / results.RESULT)["provenance"]["identity"]
    except results.ResultError:
        departures = make_result(0)["provenance"]["identity"]
    return stored_result(path.parent, whole_identity(departures, "cuda"), contents=True)


def read_identity(path: Path) -> Any:
    places.announce_ignored.cache_clear()
    return places.stated_digest(path.parent)


def read_pictures(path: Path) -> Any:
    """What a grid of samples shows of a run."""
    key = path.parent.name.rpartition("-")[2]
    images = read_samples(path.parents[1], key)
    return None if images is None else images.tobytes()


def make_committed(folder: Path, variant: int) -> Path:
    """A file of two results; another variant is of another model."""
    model = f"m{variant}"
    copies = []
    for number in range(2):
        table = {"name": "methods", "row": f"row {number}", "point": {}}
        copies.append(make_result(variant) | {"cell": {"model": model}, "table": table})
    path = folder / "methods" / f"{model}.jsonl"
    results.write_committed(path, copies)
    return path


def read_committed(path: Path) -> Any:
    root = results.ROOT
    results.ROOT = path.parents[1]
    try:
        counting, ignored = committed_results("methods")
        # what is whole beside a damaged line counts; here it is compared as one value
        return say_ignored([] if ignored else counting, ignored)
    finally:
        results.ROOT = root


def say_ignored(counting: list[Any], ignored: list[str]) -> Any:
    """The results that count, if they do; the others are named as the report names them."""
    for line in ignored:
        print(f"ignored: {line}")
    return counting or None


def make_table(folder: Path, variant: int) -> Path:
    path = folder / "methods" / "results.json"
    place = {"table": {"name": "methods", "scale": "twin", "row": "a", "point": {}}}
    files.write_json(path, [seal_object(make_result(variant) | place)])
    return path


def read_table(path: Path) -> Any:
    return say_ignored(*load_local(path.parent))


def make_evaluation(folder: Path, variant: int) -> Path:
    path = folder / "evaluation-inception.json"
    origin = {"images": 50_000, "evaluator": {"extractor": "inception", "weights": "6726825d"}}
    fid = float(made_up_numbers(variant, 1).abs())
    content = {"cell": {}, "metrics": {"fid": fid, "sfid": 1.5}, "provenance": origin}
    files.write_sealed(path, content)
    return path


def make_layers(folder: Path, variant: int) -> Path:
    path = folder / "layers.json"
    error, other = made_up_numbers(variant, 2).tolist()
    files.write_sealed(path, {"layers": [{"layer": "a", "error": error}, {"error": other}]})
    return path


def read_layers(path: Path) -> Any:
    shown: list[Any] = []
    cell.show_layers(path, SimpleNamespace(diagnostics=shown.append))
    return shown or None


def make_record(folder: Path, variant: int) -> Path:
    name = ("par_twin", "rar_twin")[variant]
    path = folder / "records" / "par_twin.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((registry.ZOO / "records" / f"{name}.json").read_bytes())
    (folder / pins.TABLE).write_bytes((registry.ZOO / pins.TABLE).read_bytes())
    return path


# --- images


def make_samples(folder: Path, variant: int) -> Path:
    """A folder of `experiments.sample` with all that is made of its shards."""
    run = folder / "run"
    images = pictures(NUMBER + variant)[-NUMBER:]
    save_shards(run, images, NUMBER, run=f"run{variant}")
    manifest = image_sets.read_manifest(run) | {"scale": 1.5, "other": 2.5}
    files.write_sealed(run / "manifest.json", manifest)
    for kind in ("npz", "png"):
        sampling.write_images(run, kind)
    return run


def make_in_samples(name: str) -> Callable[[Path, int], Path]:
    return lambda folder, variant: make_samples(folder, variant) / name


def read_shards(path: Path) -> Any:
    folder = next(parent for parent in path.parents if parent.name == "run")
    found = image_sets.open_images("samples", folder)
    return [chunk.tobytes() for chunk in found.chunks(NUMBER)], found.tokens().tolist()


def read_made(path: Path) -> Any:
    """What a repeated `sample` leaves at the path."""
    folder = next(parent for parent in path.parents if parent.name == "run")
    made = sampling.write_images(folder, "npz" if path.suffix == ".npz" else "png")
    return [chunk.tobytes() for chunk in image_sets.open_images("samples", made).chunks(NUMBER)]


# --- files of users


def make_user_npz(folder: Path, variant: int) -> Path:
    path = folder / "mine.npz"
    images = pictures(NUMBER + variant)[-NUMBER:]
    files.save_arrays({"arr_0": images.transpose(0, 2, 3, 1)}, path)
    return path


def read_images(path: Path) -> Any:
    found = image_sets.open_images("samples", path if path.suffix == ".npz" else path.parent)
    return [chunk.tobytes() for chunk in found.chunks(NUMBER)]


def make_user_png(folder: Path, variant: int) -> Path:
    image_sets.write_pngs([pictures(NUMBER + variant)[-NUMBER:]], folder / "mine")
    return folder / "mine" / "000001.png"


def make_statistics(folder: Path, variant: int) -> Path:
    path = folder / "statistics.npz"
    values = made_up_numbers(variant, 3, 3).double().numpy()
    files.save_arrays({"mu": values[0], "sigma": values @ values.T}, path)
    return path


def read_statistics(path: Path) -> Any:
    target = references.load_target(path, "inception", "", {"pool": 3}, 8, None)
    return plain_value(list(target.pool))


def make_weights(folder: Path, variant: int) -> Path:
    path = folder / "weights.pth"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"model": {"a": made_up_numbers(variant, 9), "b": made_up_numbers(variant, 2, 3)}}, path
    )
    return path


def read_weights(path: Path) -> Any:
    return plain_value(read_state(path))


# --- jobs and exports


def make_queue(folder: Path, variant: int) -> Path:
    jobs = [Job("run", (f"seed={variant + 10 * number}", "method.alpha=0.5")) for number in (0, 1)]
    JobQueue.create(folder / f".board-{variant}", jobs)
    return folder / f".board-{variant}" / "jobs.json"


def read_queue(path: Path) -> Any:
    return JobQueue(path.parent).jobs


def make_outcome(folder: Path, variant: int) -> Path:
    queue = JobQueue(make_queue(folder, variant).parent)
    queue.finish(0, make_result(variant))
    return queue.folder / "0.json"


def read_outcome(path: Path) -> Any:
    return JobQueue(path.parent).outcome(0)


def make_export(folder: Path, variant: int) -> Path:
    path = folder / "export" / "m.json"
    tensors = {
        "head.weight.codes": made_up_numbers(variant, 4, 4).char(),
        "norm": made_up_numbers(variant, 4),
    }
    scales = {"damping": 0.5, "alpha": float(made_up_numbers(variant, 1))}
    save_export(Export({"layers": {}, "products": {}}, tensors), path, {"model": "m", **scales})
    return path


def make_export_tensors(folder: Path, variant: int) -> Path:
    return make_export(folder, variant).with_suffix(".safetensors")


def read_whole_export(path: Path) -> Any:
    export = read_export(path.with_suffix(".json"))
    return export.plain, plain_value(dict(export.tensors))


ARTEFACTS = {
    "pool": Artefact(make_pool, read_pool, damage.as_tensors),
    "features of evaluate": Artefact(make_features, read_features, damage.as_tensors),
    "conversion": Artefact(make_conversion, read_conversion, damage.as_tensors),
    "added files": Artefact(make_added, read_added, damage.as_json),
    "trials": Artefact(make_trials, lambda path: read_trials(path) or None, damage.as_json),
    "trained blocks": Artefact(make_blocks, read_blocks, damage.as_tensors),
    "held-out tokens": Artefact(
        make_shipped("FAMILY_heldout.safetensors"),
        in_zoo(lambda: load_held_out(models.PRESETS["par_twin"], 100)),
        damage.as_tensors,
    ),
    "shipped weights": Artefact(
        make_shipped("FAMILY_tokenizer.safetensors"), in_zoo(read_tokenizer), damage.as_tensors
    ),
    "table of what ships": Artefact(make_pins, read_pinned, line_of_tokenizer),
    "record": Artefact(
        make_record, in_zoo(lambda: model_cards.read_record("par_twin")), damage.as_json
    ),
    "reference": Artefact(make_reference, read_reference, damage.as_tensors),
    "checkpoint": Artefact(make_checkpoint, read_checkpoint, damage.as_checkpoint),
    "metrics.json": Artefact(make_in_run("metrics.json"), read_run, damage.as_json),
    "identity of a run": Artefact(make_in_run("identity.json"), read_identity, damage.as_json),
    "samples of a run": Artefact(make_in_run("samples.npz"), read_run, damage.as_arrays),
    "samples in a picture": Artefact(make_in_run("samples.npz"), read_pictures, damage.as_arrays),
    "features of a run": Artefact(make_in_run("features.safetensors"), read_run, damage.as_tensors),
    "grid of a run": Artefact(make_in_run("grid.png"), read_run, damage.as_picture),
    "committed results": Artefact(make_committed, read_committed, damage.as_json_lines),
    "results of a table": Artefact(make_table, read_table, damage.as_json),
    "evaluation": Artefact(make_evaluation, fp_gate.read_result, damage.as_json),
    "layers.json": Artefact(make_layers, read_layers, damage.as_json),
    "shard": Artefact(make_in_samples("shards/00000.npz"), read_shards, damage.as_arrays),
    "manifest": Artefact(make_in_samples("manifest.json"), read_shards, damage.as_json),
    "npz of sample": Artefact(make_in_samples("samples.npz"), read_made, damage.as_arrays),
    "PNG of sample": Artefact(make_in_samples("png/000002.png"), read_made, damage.as_picture),
    "npz of a user": Artefact(make_user_npz, read_images, damage.as_arrays),
    "PNG of a user": Artefact(make_user_png, read_images, damage.as_picture),
    "statistics of a user": Artefact(make_statistics, read_statistics, damage.as_arrays),
    "weights of a user": Artefact(make_weights, read_weights, damage.as_checkpoint),
    "jobs": Artefact(make_queue, read_queue, damage.as_json),
    "outcome of a job": Artefact(make_outcome, read_outcome, damage.as_json),
    "export": Artefact(make_export, read_whole_export, damage.as_json),
    "tensors of an export": Artefact(make_export_tensors, read_whole_export, damage.as_tensors),
}
