"""Weights in and out: a stage reads its own tensors and no others, and the libraries read what the stages write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_ddg import models
from ds_ddg.models import WeightsError
from ds_ddg.models.library_layer import Piece
from ds_ddg.models.loading import load_pretrained
from helpers import toy
from helpers.distributed import GetRanks
from helpers.model_files import auto_class, layers_of, pipeline
from helpers.transformers_models import MODELS, batch, build_config, in_a_row, original

pytestmark = pytest.mark.usefixtures("one_thread")


transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")


NAMES = ["bert_mlm", "bert_classifier", "gpt2", "llama", "llama_tied"]


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    kinds = {"CausalLM": models.next_token_loss, "MaskedLM": models.masked_lm_loss}
    return kinds.get(MODELS[name][1], models.classification_loss)


def labels_of(name: str) -> Tensor:
    return torch.tensor([0, 1, 2]) if "classifier" in name else batch()[0]


class Opened:
    """Counts the tensors that are read from safetensors files."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handle = self._safe_open(*args, **kwargs)
        counter = self

        class Handle:
            def __enter__(self) -> Any:
                handle.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                handle.__exit__(*error)

            def __getattr__(self, name: str) -> Any:
                return getattr(handle, name)

            def get_tensor(self, key: str) -> Tensor:
                counter.read.append(key)
                return handle.get_tensor(key)

        return Handle()

    def __enter__(self) -> Opened:
        self._safe_open = safetensors.safe_open
        safetensors.safe_open = self
        return self

    def __exit__(self, *_: Any) -> None:
        safetensors.safe_open = self._safe_open


def own_keys(net: nn.Module) -> list[str]:
    pieces = [module for module in net.modules() if isinstance(module, Piece)]
    return sorted({key for piece in pieces for key in piece.original_state()})


def initialized(net: Any, optimizer: str = "sgd") -> Any:
    import ds_ddg

    config = {**toy.config(1), "train_micro_batch_size_per_gpu": 3}
    engine, *_ = ds_ddg.initialize(
        model=net, config=config, optimizer=toy.OPTIMIZERS[optimizer], model_parameters=list(net.parameters())
    )
    return engine


def round_trip(rank: int, world_size: int, name: str, source: str, target: str, shard: int) -> dict[str, Any]:
    """Directory -> stages -> three DDG calls -> directory; the logits before and after."""
    net = pipeline(
        models.from_transformers(source, auto_class(name)), min(world_size, 2), loss_of(name), "type:TransformerLayer"
    )
    with Opened() as opened:
        loaded = models.load_pretrained(net, source)
    engine = initialized(net, "adamw")
    values = (batch(), labels_of(name))

    def logits() -> Any:
        found = engine.eval_batch(iter([values]), return_logits=True)[1]
        net.train()
        return found if engine.is_last_stage() else None

    before = logits()
    for _ in range(3):
        engine.train_batch(iter([values]))
    engine.drain()
    after = logits()
    models.save_pretrained(net, target, max_shard_bytes=shard)
    return {"before": before, "after": after, "read": opened.read, "own": own_keys(net), "loaded": loaded}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sharded", [False, True])
def test_round_trip_through_training(ranks: GetRanks, tmp_path: Path, name: str, sharded: bool) -> None:
    model = original(name)
    source, target = tmp_path / "source", tmp_path / "target"
    model.save_pretrained(source, max_shard_size=20_000 if sharded else "5GB")
    got = ranks(2).run(round_trip, name, str(source), str(target), 20_000 if sharded else 10**9)

    words, mask = batch()
    with torch.no_grad():
        assert torch.equal(got[1]["before"], model(input_ids=words, attention_mask=mask).logits)
    for result in got:
        assert sorted(result["read"]) == result["own"], "a stage reads its own tensors, each once"
    tied = 1 if model.config.tie_word_embeddings and name != "bert_classifier" else 0
    keys = {key for result in got for key in result["own"]}
    assert sum(len(result["own"]) for result in got) == len(keys) + tied, "and what is tied is on both"

    trained, info = auto_class(name).from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    trained.eval()
    with torch.no_grad():
        logits = trained(input_ids=words, attention_mask=mask).logits
    assert torch.equal(logits, got[1]["after"])
    assert not torch.equal(got[1]["after"], got[1]["before"])
    assert trained.config.architectures == [type(model).__name__]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = {path.name for path in target.glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    assert (len(files) > 2) == sharded
    assert keys == index["weight_map"].keys()


def test_replicas_write_once(ranks: GetRanks, tmp_path: Path) -> None:
    original("llama_tied").save_pretrained(tmp_path / "source")
    got = ranks(4).run(round_trip, "llama_tied", str(tmp_path / "source"), str(tmp_path / "target"), 10**9)
    assert len(list((tmp_path / "target").glob("*.safetensors"))) == 2
    trained = auto_class("llama_tied").from_pretrained(tmp_path / "target").eval()
    words, mask = batch()
    with torch.no_grad():
        assert torch.equal(trained(input_ids=words, attention_mask=mask).logits, got[-1]["after"][:3])


def test_an_earlier_save_does_not_win(tmp_path: Path) -> None:
    """transformers reads model.safetensors before an index: what an earlier save left must go."""
    config, auto = build_config("gpt2")
    modules, _ = in_a_row(models.from_transformers(config, auto))
    original("gpt2").save_pretrained(tmp_path)
    models.save_pretrained(modules, tmp_path, max_shard_bytes=10_000)
    assert not (tmp_path / "model.safetensors").exists()
    models.save_pretrained(modules, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    state = {key: t for module in modules for key, t in module.original_state().items()}
    for key, tensor in auto.from_pretrained(tmp_path).state_dict().items():
        if key in state:
            assert torch.equal(tensor, state[key])


def resnet(rank: int, world_size: int, source: str, target: str) -> Any:
    specs = models.torchvision_resnet("resnet18", num_classes=5)
    net = pipeline(specs, world_size, nn.functional.cross_entropy, "type:ResidualBlock")
    models.load_pretrained(net, source)
    engine = initialized(net)
    torch.manual_seed(3)
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 4])
    for _ in range(3):
        engine.train_batch(iter([(images, labels)]))
    engine.drain()
    logits = engine.eval_batch(iter([(images, labels)]), return_logits=True)[1]
    models.save_pretrained(net, target)
    return (images, logits) if engine.is_last_stage() else None


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_torchvision_state_dict_in_and_out(ranks: GetRanks, tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=5)
    source, target = tmp_path / f"resnet18{suffix}", tmp_path / "target"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), source)
    images, logits = ranks(2).run(resnet, str(source), str(target))[-1]
    model.load_state_dict(models.read_state_dict(target))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), logits)
    net = nn.Sequential(*(spec.build() for spec in models.torchvision_resnet("resnet34", num_classes=5)))
    with pytest.raises(WeightsError, match="has the weights of resnet18, the layers are those of resnet34"):
        load_pretrained(net, target)


def test_names_of_older_files_are_understood(tmp_path: Path) -> None:
    """As on the hub: GPT-2 without its prefix and with masks as buffers, BERT with gamma and beta."""
    from safetensors.torch import save_file

    model = original("gpt2")
    state = {key.removeprefix("transformer."): t for key, t in model.state_dict().items() if "lm_head" not in key}
    state.update({f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(4)})
    save_file(state, tmp_path / "model.safetensors")
    assert len(load_pretrained(layers_of("gpt2"), tmp_path).read) == len(state) - 4

    bert = original("bert_mlm")
    state = {}
    for key, tensor in bert.state_dict().items():
        old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state[old] = tensor.clone()
    state["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    save_file(state, tmp_path / "model.safetensors")
    modules = layers_of("bert_mlm")
    with pytest.raises(WeightsError, match=r"has 1 tensors \(cls.seq_relationship.weight\) that the model has no use"):
        load_pretrained(modules, tmp_path)
    assert load_pretrained(modules, tmp_path, strict=False).unused == ("cls.seq_relationship.weight",)
    for module in modules:
        for key, tensor in module.original_state().items():
            assert torch.equal(tensor, bert.state_dict()[key])


def test_new_head_on_a_pretrained_encoder(tmp_path: Path) -> None:
    bert = original("bert_mlm")
    bert.save_pretrained(tmp_path)
    modules = layers_of("bert_classifier")
    with pytest.raises(WeightsError, match=r"lacks 4 tensors \(bert.pooler.dense.bias, .*strict=False leaves them"):
        load_pretrained(modules, tmp_path)
    loaded = load_pretrained(modules, tmp_path, strict=False)
    assert set(loaded.missing) == {f"{part}.{kind}" for part in ("bert.pooler.dense", "classifier") for kind in KINDS}
    assert all(key.startswith("cls.") for key in loaded.unused)


KINDS = ("weight", "bias")


def broken(directory: Path, how: str) -> None:
    index = directory / "model.safetensors.index.json"
    shards = sorted(directory.glob("*.safetensors"))
    if how == "gone":
        shutil.rmtree(directory)
    elif how == "empty":
        for path in (*shards, index):
            path.unlink()
    elif how == "shard gone":
        shards[1].unlink()
    elif how == "cut":
        shards[-1].write_bytes(shards[-1].read_bytes()[:-10])
    elif how == "no safetensors":
        shards[-1].write_bytes(b"version https://git-lfs.github.com/spec/v1")
    elif how == "index":
        index.write_text("{")
    elif how == "other model":
        (directory / "config.json").write_text('{"model_type": "llama"}')


BROKEN = {
    "gone": "does not exist on this machine",
    "empty": r"neither model.safetensors nor .*it has config.json.*save_pretrained",
    "shard gone": r"lacks 1 of the files .*model-00002-of",
    "cut": r"cannot read .*model-.*bytes\).*fetch it again",
    "no safetensors": r"cannot read .*model-.*\(42 bytes\).*fetch it again",
    "index": r"index.json is no index of weights .*fetch it again",
    "other model": r"has the weights of a 'llama' model, the layers are those of a 'gpt2'",
}


@pytest.mark.parametrize("how", BROKEN)
def test_damage_is_named(tmp_path: Path, how: str) -> None:
    directory = tmp_path / "source"
    original("gpt2").save_pretrained(directory, max_shard_size=20_000)
    modules = layers_of("gpt2")
    broken(directory, how)
    with pytest.raises(WeightsError, match=BROKEN[how]):
        load_pretrained(modules, directory)


def test_other_shapes_and_depths_are_named(tmp_path: Path) -> None:
    original("gpt2").save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"'transformer.wpe.weight' .* has the shape \(32, 32\), .* has \(16, 32\)"):
        load_pretrained(layers_of("gpt2", n_positions=16), tmp_path)
    with pytest.raises(WeightsError, match=r"lacks 12 tensors \(transformer.h.4"):
        load_pretrained(layers_of("gpt2", n_layer=5), tmp_path)
    with pytest.raises(WeightsError, match=r"has 11 tensors \(transformer.h.3.* is it the same config"):
        load_pretrained(layers_of("gpt2", n_layer=3), tmp_path)


def test_layers_without_names_are_refused(tmp_path: Path) -> None:
    net = nn.Sequential(*(spec.build() for spec in models.cifar_resnet(8)))
    with pytest.raises(ValueError, match=r"no layer here says .*BasicBlock, Head, Stem.*from_transformers"):
        load_pretrained(net, tmp_path)


def one_shard_is_bad(rank: int, world_size: int, source: str) -> str:
    specs = models.from_transformers(source, auto_class("llama"))
    net = pipeline(specs, world_size, models.next_token_loss, "type:TransformerLayer")
    with pytest.raises(WeightsError) as raised:
        models.load_pretrained(net, source)
    return str(raised.value)


def test_a_shard_that_only_one_stage_reads_stops_all(ranks: GetRanks, tmp_path: Path) -> None:
    original("llama").save_pretrained(tmp_path, max_shard_size=20_000)
    name = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]["model.norm.weight"]
    (tmp_path / name).write_bytes(b"x")
    first, last = ranks(2).run(one_shard_is_bad, str(tmp_path))
    assert first == f"rank 1: {last}"
    assert last.startswith(f"cannot read {tmp_path / name} (1 bytes)")


def peak_of_reading(rank: int, world_size: int, source: str) -> tuple[int, int]:
    """Bytes of this process's own memory, at most, that reading took; and the size of the stage."""
    import threading
    import time

    def private() -> int:
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    net = pipeline(models.from_transformers(source), world_size, models.next_token_loss, "uniform")
    size = sum(p.nbytes for p in net.parameters())
    before = private()
    samples, stop = [before], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            samples.append(private())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    models.load_pretrained(net, source)
    stop.set()
    thread.join()
    return max(samples) - before, size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_reading_takes_no_memory_of_the_size_of_the_model(ranks: GetRanks, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 16}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, bos_token_id=1, eos_token_id=2)
    model = transformers.LlamaForCausalLM(config)
    total = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    for peak, size in ranks(2).run(peak_of_reading, str(tmp_path)):
        assert total > 100e6
        assert size < 0.6 * total
        assert peak < 0.15 * total, "one tensor at a time"
