"""What a GPU computes is what the CPU computes. Each test also runs on the CPU, so that the test
itself is known to work. `make gpu-check` runs those of the GPU.
"""

from __future__ import annotations

import functools
import json
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from data.batches import Batch
from data.cache.reader import FeatureCache
from data.datasets.sample import draw_sample
from data.vocabulary import BOS, EOS, PAD, SPECIALS, Vocabulary
from models.decoders.registry import DECODERS, create_decoder
from models.generation.beam_search import beam_search
from models.generation.cuda_graph import BeamSearch
from models.generation.options import Generation
from models.generation.ranking import candidate_log_p
from models.generation.sampling import sample
from models.losses import Noise
from models.regions import Regions
from pipeline import evaluate, extract, train
from pipeline.runtime import Machine, open_machine
from pipeline.scoring.metrics import cider
from pipeline.scoring.ngrams import References
from pipeline.scoring.token_cider import TokenCider
from pipeline.training import distributed
from pipeline.training.objectives import supervised_loss
from tests.conftest import NO_GPU
from tests.test_commands import LOOK, SMALL, works
from tests.test_objectives import images, objective, small

SCENES = 24
GPU_ALONE = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)]
on_each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu"), pytest.param("cuda", marks=GPU_ALONE)]
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Drawn scenes and their cache, computed on the CPU in fp32."""
    folder = tmp_path_factory.mktemp("scenes")
    draw_sample(folder / "sample", count=SCENES, seed=3)
    extract_scenes(folder, folder / "cache", "--device", "cpu", "--precision", "fp32")
    return folder


def extract_scenes(folder: Path, out: Path, *more: object) -> None:
    dataset = ["--dataset", "karpathy", "--root", folder / "sample"]
    works(extract.main, *dataset, *LOOK, "--out", out, "--views", "flip", *more)


def run_training(scenes: Path, out: Path, *more: object) -> list[dict]:
    """Train a small decoder for two epochs, and return the lines of its metrics."""
    works(
        train.main,
        *["--dataset", "karpathy", "--root", scenes / "sample", "--features", scenes / "cache"],
        *["--out", out, *SMALL, "--epochs", 2, "--batch", 8, "--min-count", 1, "--beam", 2],
        *["--dropout", 0, "--log-every", 1, *more],
    )
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict]) -> list[float]:
    return [line["train"]["loss"] for line in lines if line["train"]]


def fp32(device: str) -> Machine:
    return open_machine(device, precision="fp32")


def some_regions(device: str = "cpu", count: int = 4, seed: int = 1) -> Regions:
    """Regions of images with 3 to 5 regions, 6 channels."""
    batch = images(count, seed)
    return Regions(*(part.to(device) for part in (batch.features, batch.boxes, batch.counts)))


def small_decoder(name: str, **sizes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    heads = {} if name == "lstm" else {"heads": 2, "decoder_layers": 2, "feedforward": 32}
    config = DECODERS[name].Config(
        40, 6, **{"width": 16, "dropout": 0.0, "max_length": 7, "max_prompt": 3, **heads, **sizes}
    )
    decoder = create_decoder(name, config)
    for weight in decoder.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))
    return decoder


def gradient(decoder: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of all weights that are trained; a decoder with classes trains no words."""
    weights = [weight for weight in decoder.parameters() if weight.requires_grad]
    parts = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(weight) if part is None else part).flatten()
            for weight, part in zip(weights, parts, strict=True)
        ]
    )


def same_gradient(ours: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool(torch.cosine_similarity(ours.cpu(), reference, dim=0) > 0.9999)


# --------------------------------------------------------------------------------------- extraction


@on_each_device
def test_extraction_gives_the_rows_of_the_cpu_in_fp32(device, scenes, tmp_path):
    """On a GPU: bf16 if it has it, channels last, decoding in processes, pinned memory, copies that
    overlap. Small batches, so that several are on their way.
    """
    more = ["--device", device, "--batch", 5, "--workers", 2]
    extract_scenes(scenes, tmp_path / "cache", *more)
    ours, reference = (FeatureCache(folder / "cache") for folder in (tmp_path, scenes))
    assert ours.ids.tolist() == reference.ids.tolist()
    for view in range(2):
        views = [view] * SCENES
        rows, wanted = (cache.rows(cache.ids, views=views) for cache in (ours, reference))
        pairs = (torch.from_numpy(part.features).float().flatten(1) for part in (rows, wanted))
        assert torch.cosine_similarity(*pairs).min() > 0.995
        np.testing.assert_allclose(rows.boxes, wanted.boxes, atol=1e-6)
        np.testing.assert_array_equal(rows.counts, wanted.counts)


# --------------------------------------------------------------------------------------- generation


@on_each_device
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_beam_search_as_a_graph_is_eager_beam_search(device, name, precision):
    """The second search of a shape is captured, later ones are replayed, on other values."""
    machine = open_machine(device, precision=precision)
    decoder, options = small_decoder(name).to(device).eval(), Generation(num_beams=3)
    search = BeamSearch(decoder, options)
    with torch.inference_mode(), machine.autocast():
        for seed in range(4):
            memory = decoder.encode(some_regions(device, seed=seed))
            prompts = torch.randint(4, 40, (4, 3), device=device)
            for given in (None, prompts):
                found, wanted = search(memory, given), beam_search(decoder, memory, options, given)
                assert torch.equal(found.tokens, wanted.tokens)
                torch.testing.assert_close(found.log_p, wanted.log_p)
    assert len(search.captured) == (2 if device == "cuda" else 0)


@on_each_device
def test_token_cider_of_samples_of_the_device_is_the_scorers(device):
    decoder = small_decoder("transformer").to(device)
    vocabulary = Vocabulary([*SPECIALS, *(f"w{number}" for number in range(4, 40))])
    captions = np.random.default_rng(0).integers(4, 40, (4, 5, 6))
    references = {i: [vocabulary.decode(row).split() for row in captions[i]] for i in range(4)}
    with torch.no_grad(), fp32(device).autocast():
        memory = decoder.encode(some_regions(device))
        drawn = sample(decoder, memory, Generation(do_sample=True, num_return_sequences=6)).tokens
    assert drawn.device.type == device
    token_cider = TokenCider(references, vocabulary)
    found = token_cider(token_cider.rows(range(4)), drawn.cpu().numpy())
    texts = [vocabulary.decode(row).split() for row in drawn.flatten(0, 1).tolist()]
    wanted = cider(References(references), np.repeat(range(4), 6), texts)
    np.testing.assert_allclose(found.flatten(), wanted, atol=1e-5)


# ----------------------------------------------------------------------------------- training steps


@on_each_device
def test_a_self_critical_step_has_the_cpus_figures_and_gradient(device):
    captioner, four = small(60, 12, 64), images(4)
    wanted = objective(captioner)(captioner, four, 0, 0.0)
    wanted_gradient = gradient(captioner, wanted.loss)
    captioner.to(device)
    ours = objective(captioner, machine=fp32(device))(
        captioner, four.to(torch.device(device)), 0, 0
    )
    torch.testing.assert_close(ours.metrics.cpu(), wanted.metrics, rtol=1e-3, atol=1e-3)
    assert same_gradient(gradient(captioner, ours.loss), wanted_gradient)


@on_each_device
@pytest.mark.parametrize("name", DECODERS)
def test_a_step_on_questions_and_dialogues_has_the_cpus_loss_and_gradient(device, name):
    """Answers as classes, answers as words, and the ranking of answers, after prompts."""
    decoder, classifier = small_decoder(name), small_decoder(name, classes=5)
    tokens = torch.randint(4, 40, (4, 3, 6))
    tokens[:, :, 2], tokens[0, 2, 5], tokens[1, 2] = BOS, EOS, PAD
    regions = some_regions()
    words = Batch(*regions, tokens, [0, 1, 2, 3])
    classes = replace(words, tokens=tokens[:, :, :3], labels=torch.rand(11, 5))
    candidates = torch.randint(4, 40, (4, 4, 3))
    prompts = torch.randint(4, 40, (4, 3))
    prompts[0, 0] = PAD

    def log_p(device: str) -> torch.Tensor:
        with torch.no_grad():
            memory = decoder.encode(some_regions(device))
            return candidate_log_p(decoder, memory, prompts.to(device), candidates.to(device))

    wanted_log_p = log_p("cpu")
    for model, batch in ((decoder, words), (classifier, classes)):
        wanted = supervised_loss(model, batch)
        wanted_gradient = gradient(model, wanted)
        ours = supervised_loss(model.to(device), batch.to(torch.device(device)))
        torch.testing.assert_close(ours.cpu(), wanted, rtol=1e-4, atol=1e-4)
        assert same_gradient(gradient(model, ours), wanted_gradient)
    torch.testing.assert_close(log_p(device).cpu(), wanted_log_p, rtol=1e-3, atol=1e-3)


@on_each_device
def test_scheduled_sampling_in_bf16_leaves_every_weight_its_gradient(device):
    """Autocast must not keep the casts of the first pass, which has no gradient."""
    decoder, machine = small_decoder("transformer"), open_machine(device, precision="bf16")
    decoder.to(device)
    tokens = torch.randint(4, 40, (4, 2, 6))
    tokens[:, :, 0] = BOS
    batch = Batch(*some_regions(device), tokens, [0, 1, 2, 3])
    with machine.autocast():
        loss = supervised_loss(decoder, batch, noise=Noise(sampled=1.0))
    loss.backward()
    assert not [name for name, weight in decoder.named_parameters() if weight.grad is None]


@on_each_device
def test_a_step_in_a_process_group_is_the_step_of_one_process(device, monkeypatch):
    """NCCL on a GPU, gloo on the CPU; a group of one process, with DistributedDataParallel."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 1, "RANK": 0}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    machine = fp32(device)
    decoder, batch = small_decoder("transformer").to(device), images(4)
    batch = replace(batch, tokens=torch.randint(4, 40, (4, 2, 6))).to(machine.device)
    batch.tokens[:, :, 0] = BOS
    wanted = supervised_loss(decoder, batch)
    wanted_gradient = gradient(decoder, wanted)
    with distributed.process_group(replace(machine, world=2)):  # of one, by the environment
        assert distributed.all_reduce(1.5, 2) == [1.5, 2]
        assert distributed.broadcast({"a": 1}) == {"a": 1} and distributed.all_gather(3) == [3]
        distributed.barrier()
        ddp = DistributedDataParallel(decoder)
        with ddp.no_sync():
            (supervised_loss(ddp, batch) / 2).backward()
        ours = supervised_loss(ddp, batch)
        (ours / 2).backward()
        found = torch.cat([weight.grad.flatten() for weight in decoder.parameters()])
    torch.testing.assert_close(ours.detach(), wanted.detach())
    torch.testing.assert_close(found, wanted_gradient, rtol=1e-3, atol=1e-5)
    assert not torch.distributed.is_initialized()


# --------------------------------------------------------------------------------------------- runs


@on_each_device
def test_features_on_the_device_train_as_those_on_disk_do(device, scenes, tmp_path):
    more = ["--device", device, "--precision", "fp32", "--ema", 0.9]
    disk = run_training(scenes, tmp_path / "disk", *more, "--cache-in", "disk")
    ours = run_training(scenes, tmp_path / "device", *more, "--cache-in", "device")
    assert losses(ours) == pytest.approx(losses(disk), rel=1e-4)


@on_each_device
@pytest.mark.slow
def test_a_compiled_decoder_trains_as_an_eager_one_does(device, scenes, tmp_path, monkeypatch):
    """On the CPU torch only traces the decoder, because to compile it takes minutes."""
    if device == "cpu":
        traced = functools.partial(torch.compile, backend="eager")
        monkeypatch.setattr(torch, "compile", traced)
    more = ["--device", device, "--precision", "fp32", "--limit", 16]
    eager = run_training(scenes, tmp_path / "eager", *more)
    compiled = run_training(scenes, tmp_path / "compiled", *more, "--compile")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)


@on_each_device
def test_a_run_in_the_devices_precision_is_resumed_and_evaluated(device, scenes, tmp_path):
    lines = run_training(scenes, tmp_path / "run", "--device", device)
    assert all(np.isfinite(losses(lines)))
    more = ["--device", device, "--resume", "--epochs", 3]
    assert losses(run_training(scenes, tmp_path / "run", *more))[-1] < losses(lines)[0]
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    dataset = ["--dataset", "karpathy", "--root", scenes / "sample"]
    dataset += ["--checkpoint", tmp_path / "run", "--features", scenes / "cache"]
    told = works(evaluate.main, *dataset, "--device", device, "--split", "val")
    assert "CIDEr" in told
