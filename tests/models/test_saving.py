"""What is saved is what was trained: the library's keys and shapes and nothing else, or an error on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from ds_ddg import models
from ds_ddg.models import WeightsError, load_pretrained, save_pretrained
from helpers import toy
from helpers.distributed import GetRanks
from helpers.model_files import auto_class, layers_of, pipeline
from helpers.transformers_models import batch, build_config, in_a_row, original

transformers = pytest.importorskip("transformers")


pytestmark = pytest.mark.usefixtures("one_thread")


class Adapter(nn.Module):
    """As peft's: the layer that it takes the place of is its child, and no key is what it was."""

    def __init__(self, base_layer: Any, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        self.base_layer.weight += self.lora_B.weight @ self.lora_A.weight
        return self.base_layer


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Scaled(Tensor):
    """A tensor that is more than its numbers."""


def exchange(net: nn.Module, ending: str, make: Callable[[Any], nn.Module]) -> None:
    """Put ``make(module)`` in place of every module whose path has this end."""
    for path, module in list(net.named_modules()):
        if path.endswith(ending):
            net.set_submodule(path, make(module))


def each(net: nn.Module, ending: str) -> list[Any]:
    return [module for path, module in net.named_modules() if path.endswith(ending)]


def parametrize(net: nn.Module) -> None:
    for module in each(net, "q_proj"):
        parametrizations.weight_norm(module)


def normalize(net: nn.Module) -> None:
    for module in each(net, "q_proj"):
        with pytest.warns(FutureWarning):
            weight_norm(module)


def prune_some(net: nn.Module) -> None:
    for module in each(net, "q_proj"):
        prune.random_unstructured(module, "weight", 0.5)


def resize(net: nn.Module) -> None:
    exchange(net, "embed_tokens", lambda module: nn.Embedding(70, module.embedding_dim))


def quantize(net: nn.Module) -> None:
    for module in each(net, "q_proj"):
        module.weight = nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)


def to_float8(net: nn.Module) -> None:
    for module in each(net, "q_proj"):
        module.weight = nn.Parameter(module.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def subclass(net: nn.Module) -> None:
    for module in each(net, "q_proj"):
        module.weight = nn.Parameter(module.weight.detach().as_subclass(Scaled))


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "adapters": (
        lambda net: exchange(net, "q_proj", Adapter),
        r"LlamaForCausalLM have 12 tensors \(model.layers.0.self_attn.q_proj.base_layer.weight, .* lacks: .*merge",
    ),
    "a parametrization": (parametrize, r"parametrizations.weight.original0.*remove_parametrizations"),
    "weight_norm": (normalize, r"q_proj.weight_g.*remove_weight_norm"),
    "pruned": (prune_some, r"q_proj.weight_mask.*prune.remove"),
    "compiled": (lambda net: exchange(net, "q_proj", torch.compile), r"q_proj._orig_mod.weight.*module.compile\(\)"),
    "another wrapper": (
        lambda net: exchange(net, "mlp", Wrapper),
        r"mlp.module.up_proj.weight.*library's own modules",
    ),
    "a larger vocabulary": (
        resize,
        r"'model.embed_tokens.weight' has the shape \(70, 32\) here and \(61, 32\) in Llama",
    ),
    "another width": (
        lambda net: exchange(net, "lm_head", lambda old: nn.Linear(32, 60, bias=False)),
        r"'lm_head.weight' has the shape \(60, 32\) here and \(61, 32\)",
    ),
    "a module less": (
        lambda net: (
            exchange(net, "2.self_attn.q_proj", lambda old: nn.Identity())
            or exchange(net, "model__layers__2.self_attn.q_proj", lambda old: nn.Identity())
        ),
        r"all layers together lack 1 tensors \(model.layers.2.self_attn.q_proj.weight\) of LlamaForCausalLM",
    ),
    "a layer less": (
        lambda net: net.__delitem__(2),
        r"together lack 9 tensors \(model.layers.1.*a config that says so",
    ),
    "a layer twice": (
        lambda net: net.append(type(net[2])(net[2].origin, 1)),
        r"two layers have a 'model.layers.1.*spec once",
    ),
    "integers": (quantize, r"q_proj.weight' is a Parameter of torch.int8, .* of torch.float32 .*dequantize"),
    "eight bits": (to_float8, r"q_proj.weight' is a Parameter of torch.float8_e4m3fn, .*dequantize"),
    "more than numbers": (subclass, r"q_proj.weight' is a .*Scaled of torch.float32.*dequantize"),
    "a layer of its own": (
        lambda net: net.append(nn.Linear(3, 3)),
        r"layers of other origin have 2 tensors \(6.weight, 6.bias\) that LlamaForCausalLM .*strict=False",
    ),
}


def assert_earlier_save(directory: Path, model: Any) -> None:
    """It is there still, whole, and nothing beside it."""
    assert {path.name for path in directory.iterdir()} <= {
        "config.json", "generation_config.json", "model.safetensors"
    }  # fmt: skip
    found, info = auto_class("llama").from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    for key, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key


@pytest.mark.parametrize("how", CHANGES)
def test_what_is_not_the_librarys_model_is_not_saved(tmp_path: Path, how: str) -> None:
    model = original("llama")
    model.save_pretrained(tmp_path)
    net = layers_of("llama")
    change, words = CHANGES[how]
    change(net)
    with pytest.raises(WeightsError, match=words):
        save_pretrained(net, tmp_path)
    assert_earlier_save(tmp_path, model)


def test_own_layers_are_left_out_when_asked(tmp_path: Path) -> None:
    net = layers_of("llama")
    state = {key: tensor for piece in net for key, tensor in piece.original_state().items()}
    net.append(nn.Linear(3, 3))
    save_pretrained(net, tmp_path, strict=False)
    assert models.read_state_dict(tmp_path).keys() == state.keys()


def test_a_loss_with_weights_is_no_layer(tmp_path: Path) -> None:
    net = layers_of("llama")
    net.loss_fn = nn.CrossEntropyLoss(weight=torch.ones(61))
    save_pretrained(net, tmp_path)


def test_weights_that_have_come_apart(tmp_path: Path) -> None:
    """BERT's decoder has one bias under two names."""
    net = layers_of("bert_mlm")
    save_pretrained(net, tmp_path)
    head = net[-1].part("cls").predictions
    head.bias = nn.Parameter(head.bias.detach() + 1)
    for refused in (lambda: save_pretrained(net, tmp_path), lambda: load_pretrained(net, tmp_path)):
        with pytest.raises(WeightsError, match=r"decoder.bias' .*are one weight in BertForMaskedLM, and two here"):
            refused()


@pytest.mark.parametrize("narrow", ["first", "last"])
def test_no_weight_is_rounded_by_who_reads_it(tmp_path: Path, narrow: str) -> None:
    """transformers casts all weights to the type that config.json names."""
    net = layers_of("llama")
    list(net)[0 if narrow == "first" else -1].to(torch.bfloat16)
    save_pretrained(net, tmp_path)
    found = auto_class("llama").from_pretrained(tmp_path)
    assert found.dtype == torch.float32
    for piece in net:
        for key, tensor in piece.original_state().items():
            assert torch.equal(found.state_dict()[key], tensor.float()), key


def test_an_adapters_directory_is_refused(tmp_path: Path) -> None:
    """transformers would read the weights of the model that it names."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        WeightsError, match=r"adapter_config.json, by which transformers would read .*another directory"
    ):
        save_pretrained(layers_of("llama"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_other_files_stay(tmp_path: Path) -> None:
    names = ["model-best.safetensors", "model.fp16.safetensors", "tokenizer.json"]
    for name in names:
        (tmp_path / name).write_text("mine")
    for size in (10_000, 10**9):
        save_pretrained(layers_of("llama"), tmp_path, max_shard_bytes=size)
        assert [(tmp_path / name).read_text() for name in names] == ["mine"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "config.json", "model.safetensors"])


def until_killed(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let so many changes to the file system happen, and no more."""

    def limited(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise OSError("killed")
            return method(*args, **kwargs)

        return call

    for name in ("unlink", "replace", "write_text", "mkdir"):
        monkeypatch.setattr(Path, name, limited(getattr(Path, name)))


def test_a_save_that_is_cut_off_is_no_model(tmp_path: Path) -> None:
    """Whenever it stops, a reader finds the earlier weights, or the later ones, or says that there are none."""
    before, net = original("llama"), layers_of("llama")
    later = {key: tensor for piece in net for key, tensor in piece.original_state().items()}
    outcomes = []
    for steps in range(100):
        target = tmp_path / str(steps)
        before.save_pretrained(target, max_shard_size=20_000)
        with pytest.MonkeyPatch.context() as patch:
            until_killed(patch, steps)
            try:
                save_pretrained(net, target, max_shard_bytes=40_000)
            except WeightsError:
                pass
            else:
                break
        try:
            found = models.read_state_dict(target)
        except WeightsError:
            outcomes.append("none")
            with pytest.raises(OSError, match="no file named"):
                auto_class("llama").from_pretrained(target)
        else:
            outcomes.append("before")
            assert found.keys() == later.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in before.state_dict().items())
        save_pretrained(net, target, max_shard_bytes=40_000)  # over what is left of it
        found = models.read_state_dict(target)
        assert all(torch.equal(found[key], tensor) for key, tensor in later.items())
        named = set(json.loads((target / "model.safetensors.index.json").read_text())["weight_map"].values())
        assert {path.name for path in target.glob("**/*.safetensors")} == named
    assert outcomes.count("before") >= 3
    assert outcomes == sorted(outcomes)
    assert outcomes.count("none") > 5


@pytest.mark.parametrize("strict", [True, False])
def test_wrapped_layers_are_not_filled(tmp_path: Path, strict: bool) -> None:
    original("llama").save_pretrained(tmp_path)
    net = layers_of("llama")
    exchange(net, "q_proj", Adapter)
    with pytest.raises(WeightsError, match=r"the layers of Llama.* have .*base_layer.weight.* lacks: .*adapters"):
        load_pretrained(net, tmp_path, strict=strict)


def test_weights_that_no_layer_takes_are_named(tmp_path: Path) -> None:
    original("llama").save_pretrained(tmp_path)
    net = layers_of("llama")
    del net[2]
    with pytest.raises(WeightsError, match=r"has 9 tensors \(model.layers.1.* no layer of this pipeline"):
        load_pretrained(net, tmp_path)
    assert len(load_pretrained(net, tmp_path, strict=False).unused) == 9


@pytest.mark.parametrize("equal", [True, False])
def test_files_with_tied_weights_twice(tmp_path: Path, equal: bool) -> None:
    from safetensors.torch import save_file

    state = {key: tensor.clone() for key, tensor in original("llama_tied").state_dict().items()}
    if not equal:
        state["lm_head.weight"] += 1
    save_file(state, tmp_path / "model.safetensors")
    net = layers_of("llama_tied")
    if equal:
        load_pretrained(net, tmp_path)
    else:
        with pytest.raises(WeightsError, match=r"'lm_head.weight' .*differ, and are one weight.*tie_word_embeddings"):
            load_pretrained(net, tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_not_read_as_others(tmp_path: Path, dtype: torch.dtype) -> None:
    """Without their scale, which strict=False would skip."""
    from safetensors.torch import save_file

    state = original("llama").state_dict()
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file({**state, key: state[key].to(dtype), f"{key}_scale": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        WeightsError, match=rf"'{key}' has numbers of {dtype} and the model has torch.float32.*dequant"
    ):
        load_pretrained(layers_of("llama"), tmp_path, strict=False)


def test_a_config_of_quantized_weights_is_refused() -> None:
    config, auto = build_config("llama")
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match=r"quantization_config, by which transformers would read .*dequantize"):
        models.from_transformers(config, auto)


def test_names_that_only_look_like_older_ones(tmp_path: Path) -> None:
    """transformers renames keys of older versions, but none that the model has."""
    config = getattr(transformers, "LagunaConfig", None)
    if config is None:
        pytest.skip("needs a transformers with Laguna")
    small = config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_experts=4, moe_intermediate_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    net, other = (in_a_row(models.from_transformers(small, transformers.AutoModelForCausalLM))[0] for _ in range(2))
    save_pretrained(net, tmp_path)
    load_pretrained(other, tmp_path)
    for piece, filled in zip(net, other, strict=True):
        for key, tensor in piece.original_state().items():
            assert torch.equal(filled.original_state()[key], tensor), key


def refusal(net: Any, target: str, **options: Any) -> str:
    with pytest.raises(WeightsError) as raised:
        save_pretrained(net, target, **options)
    return str(raised.value)


def one_stage_refuses(rank: int, world_size: int, source: str, target: str) -> dict[str, str]:
    """What each rank says if the last one alone has a reason not to write."""
    import safetensors.torch

    def build(name: str, change: Callable[[list[Any]], Any] = lambda specs: None) -> Any:
        specs = models.from_transformers(build_config(name)[0], auto_class(name))
        change(specs)
        return pipeline(specs, world_size, models.next_token_loss, "type:TransformerLayer")

    last = rank == world_size - 1
    said = {}

    net = build("llama")
    if last:
        exchange(net, "q_proj", Adapter)
    said["adapter"] = refusal(net, target)

    net = build("llama")
    real = safetensors.torch.save_file

    def full(*args: Any, **kwargs: Any) -> Any:
        if last:
            raise safetensors.SafetensorError("No space left on device")  # type: ignore[attr-defined]
        return real(*args, **kwargs)

    safetensors.torch.save_file = full
    try:
        said["full"] = refusal(net, target)
    finally:
        safetensors.torch.save_file = real

    net = build("llama_tied")
    if last:
        with torch.no_grad():
            net.tied_modules["embed"].weight[3, 4] += 1e-3
    said["tied"] = refusal(net, target)

    net = build("llama", lambda specs: specs.insert(-1, specs[1]))
    said["twice"] = refusal(net, target)
    net = build("llama", lambda specs: specs.append(LayerSpec(nn.Linear, 61, 61)))
    said["own"] = refusal(net, target)

    said["unheld"] = ""
    with pytest.raises(WeightsError) as raised:
        load_pretrained(build("llama", lambda specs: specs.pop(2)), source)
    said["unheld"] = str(raised.value)
    return said


def test_a_stage_that_refuses_stops_all_of_them(ranks: GetRanks, tmp_path: Path) -> None:
    model = original("llama")
    model.save_pretrained(tmp_path / "target")
    first, last = ranks(2).run(one_stage_refuses, str(tmp_path / "target"), str(tmp_path / "target"))
    assert_earlier_save(tmp_path / "target", model)
    for case in ("adapter", "full", "own"):
        assert first[case] == f"rank 1: {last[case]}"
    for case in ("tied", "twice", "unheld"):
        assert first[case] == last[case]
    assert last["adapter"].startswith(
        "the layers of LlamaForCausalLM have 6 tensors (model.layers.2.self_attn.q_proj.base_layer.weight"
    )
    assert last["full"] == "SafetensorError: No space left on device"
    assert first["tied"].startswith("stages 0 and 1 share 'model.embed_tokens.weight', and their copies differ")
    assert "9 tensors (model.layers.0." in first["twice"]
    assert last["own"].startswith("layers of other origin have 2 tensors (")
    assert "no layer of this pipeline" in first["unheld"]


def adapted(rank: int, world_size: int, source: str, target: str, schedule: str) -> Any:
    """Adapters trained, refused, merged, saved; the logits of the merged layers."""
    import ds_ddg

    net = pipeline(
        models.from_transformers(source, auto_class("llama")),
        world_size,
        models.next_token_loss,
        "type:TransformerLayer",
    )
    load_pretrained(net, source)
    net.requires_grad_(False)
    exchange(net, "q_proj", Adapter)
    config = {**toy.config(1), "train_micro_batch_size_per_gpu": 3, "ddg": {"enabled": schedule == "ddg"}}
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = toy.OPTIMIZERS["adamw"](trained)
    engine, *_ = ds_ddg.initialize(model=net, config=config, model_parameters=trained, optimizer=optimizer)
    for _ in range(3):
        engine.train_batch(iter([(batch(), batch()[0])]))
    if schedule == "ddg":
        engine.drain()
    refused = refusal(net, target)
    for path, module in list(net.named_modules()):
        if isinstance(module, Adapter):
            net.set_submodule(path, module.merge())
    save_pretrained(net, target)
    logits = engine.eval_batch(iter([(batch(), batch()[0])]), return_logits=True)[1]
    return refused, logits if engine.is_last_stage() else None


@pytest.mark.parametrize("schedule", ["ddg", "1f1b"])
def test_adapters_are_saved_when_merged(ranks: GetRanks, tmp_path: Path, schedule: str) -> None:
    model = original("llama")
    model.save_pretrained(tmp_path / "source")
    got = ranks(2).run(adapted, str(tmp_path / "source"), str(tmp_path / "target"), schedule)
    assert all("base_layer.weight" in refused and "get_base_layer" in refused for refused, _ in got)
    found, info = auto_class("llama").from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not any(info.values()), info
    words, mask = batch()
    with torch.no_grad():
        logits = found.eval()(input_ids=words, attention_mask=mask).logits
        assert torch.equal(logits, got[1][1])
        assert not torch.equal(logits, model(input_ids=words, attention_mask=mask).logits)
    for key, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor) == ("q_proj" not in key), key
