"""Transformers models as layer specs: the library's outputs to the last bit, from the library's own modules."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import Tensor, nn

from ds_ddg import models
from ds_ddg.models.library_layer import Piece
from ds_ddg.models.transformers.layers import TransformerLayer
from helpers.distributed import GetRanks
from helpers.transformers_models import MODELS, SIZES, batch, build_config, in_a_row, original

transformers = pytest.importorskip("transformers")


def copy_weights(modules: nn.Module, state: dict[str, Tensor]) -> set[str]:
    filled = set()
    for module in modules.modules():
        if isinstance(module, Piece):
            for key, tensor in module.original_state().items():
                with torch.no_grad():
                    tensor.copy_(state[key])
                filled.add(key)
    return filled


def as_pipeline(model: Any, **options: Any) -> Callable[[Any], Tensor]:
    specs = models.from_transformers(model.config, type(model), **options)
    modules, functions = in_a_row(specs)
    modules.eval()
    copy_weights(modules, model.state_dict())

    def run(x: Any) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return run


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_librarys_to_the_last_bit(name: str) -> None:
    model = original(name)
    run = as_pipeline(model)
    words, mask = batch()
    with torch.no_grad():
        assert torch.equal(run(words), model(input_ids=words).logits)
        assert torch.equal(run((words, mask)), model(input_ids=words, attention_mask=mask).logits)
        # Another shape, and the first one again: nothing of the last call is left.
        assert torch.equal(run(words[:2, :5]), model(input_ids=words[:2, :5]).logits)
        other = torch.ones_like(mask)
        assert torch.equal(run((words, other)), model(input_ids=words, attention_mask=other).logits)


def test_inputs_may_change_inside_the_same_tensors() -> None:
    """DeepSpeed receives one micro-batch after another into one buffer, unseen by autograd."""
    model = original("llama")
    run = as_pipeline(model)
    words, mask = batch()
    with torch.no_grad():
        run((words, mask))
        words.data.copy_(words.flip(0)), mask.data.copy_(mask.flip(0))
        assert torch.equal(run((words, mask)), model(input_ids=words, attention_mask=mask).logits)


@pytest.mark.parametrize("name", ["bert_mlm", "llama", "gpt2"])
def test_attention_implementation_of_the_config_counts(name: str) -> None:
    model = original(name, attention="eager")
    model.config.use_cache = False  # as in training; a cache copies the keys, and products of copies round differently
    run = as_pipeline(model)
    words, mask = batch()
    with torch.no_grad():
        assert torch.equal(run((words, mask)), model(input_ids=words, attention_mask=mask).logits)


def test_further_inputs_have_names() -> None:
    words, mask = batch()
    kinds = torch.randint(2, words.shape, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).flip(0).repeat(3, 1)
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    model = original("bert_mlm")
    run = as_pipeline(model, inputs=names)
    values = (words, mask, kinds, positions)
    with torch.no_grad():
        assert torch.equal(run(values), model(**dict(zip(names, values, strict=True))).logits)
    llama = original("llama")
    llama.config.use_cache = False  # with a cache, positions that start anew do not separate sequences
    run = as_pipeline(llama, inputs=("input_ids", "position_ids"))
    with torch.no_grad():
        assert torch.equal(run((words, positions)), llama(input_ids=words, position_ids=positions).logits)


def test_too_many_inputs_are_refused() -> None:
    run = as_pipeline(original("llama"), inputs=("input_ids",))
    with pytest.raises(ValueError, match=r"the data has 2 inputs, the layers were built for 1: .*name them all"):
        run(batch())


@pytest.mark.parametrize("name", ["bert_mlm", "gpt2", "llama_tied", "gemma2"])
def test_gradients_are_the_librarys(name: str) -> None:
    """Of the tied weight as well, and of a bias that travels."""
    model = original(name)
    modules, functions = in_a_row(models.from_transformers(model.config, type(model)))
    modules.eval()
    copy_weights(modules, model.state_dict())
    words, mask = batch()
    x: Any = (words, mask)
    for function in functions:
        x = function(x)
    models.masked_lm_loss(x, words).backward()
    models.masked_lm_loss(model(input_ids=words, attention_mask=mask).logits, words).backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    found = {}
    for module in modules:
        found.update({key: tensor.grad for key, tensor in module.original_state().items()})
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_one_spec_is_one_layer_and_each_weight_in_one_place(name: str) -> None:
    config, auto = build_config(name)
    specs = models.from_transformers(config, auto)
    assert [spec.typename for spec in specs].count(TransformerLayer) == 4
    model = auto.from_config(config)
    modules, _ = in_a_row(specs)
    keys = [key for module in modules for key in module.original_state()]
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    assert sorted(keys) == sorted(model.state_dict().keys() - tied)
    assert sum(p.numel() for p in modules.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["bert_mlm", "gpt2", "llama"])
def test_initial_weights_are_distributed_as_the_librarys(name: str) -> None:
    config, auto = build_config(name)
    expected = {key: p.detach() for key, p in auto.from_config(config).named_parameters()}
    modules, _ = in_a_row(models.from_transformers(config, auto))
    for module in modules:
        for key, tensor in module.original_state().items():
            value = tensor.detach()
            spread = float(expected[key].std(correction=0))
            assert float(value.std(correction=0)) == pytest.approx(spread, rel=0.35, abs=1e-6), key
            assert float(value.mean()) == pytest.approx(float(expected[key].mean()), abs=0.02), key


def test_dropout_is_at_work_in_training_not_in_evaluation() -> None:
    """GPT-2 has dropout between its embeddings and its first layer, in no module with weights."""
    config, auto = build_config("gpt2")
    config.attn_pdrop = config.resid_pdrop = 0.0
    modules, functions = in_a_row(models.from_transformers(config, auto))
    words, _ = batch()

    def embedded() -> Tensor:
        x: Any = words
        for function in functions[:2]:
            x = function(x)
        return x[0]

    modules.train()
    zeros = float((embedded() == 0).float().mean())
    assert 0.05 < zeros < 0.2
    modules.eval()
    assert not (embedded() == 0).any()
    modules.train()
    assert (embedded() == 0).any()


def test_no_rank_builds_the_whole_model() -> None:
    """A hundred terabytes of weights: the specs cost nothing, a layer costs a layer."""
    sizes = {**SIZES, "num_hidden_layers": 200, "vocab_size": 10**12, "tie_word_embeddings": False}
    specs = models.causal_lm(transformers.LlamaConfig(**sizes))
    assert len(specs) == 202
    assert all(type(spec) is LayerSpec for spec in specs)
    layer = specs[17].build()
    assert {p.device.type for p in layer.parameters()} == {"cpu"}
    assert sum(p.numel() for p in layer.parameters()) < 10**5


@pytest.mark.parametrize(
    ("config", "auto", "message"),
    [
        ("T5Config", "AutoModelForSeq2SeqLM", r"2 stacks of transformer layers"),
        ("DebertaV2Config", "AutoModelForMaskedLM", "does more between its layers"),
    ],
)
def test_models_that_cannot_be_cut_are_refused(config: str, auto: str, message: str) -> None:
    sizes = {**SIZES, "d_model": 32, "num_layers": 2} if config == "T5Config" else SIZES
    with pytest.raises(ValueError, match=message):
        models.from_transformers(getattr(transformers, config)(**sizes), getattr(transformers, auto))


def test_source_is_checked() -> None:
    with pytest.raises(TypeError, match="source must be a transformers config or a directory, got dict"):
        models.causal_lm({})
    with pytest.raises(ValueError, match=r"no config.json in '/nowhere'"):
        models.causal_lm("/nowhere")
    with pytest.raises(ValueError, match=r"names no model class .*pass model_class"):
        models.from_transformers(transformers.LlamaConfig(**SIZES))


def test_losses_are_the_librarys() -> None:
    words, _ = batch()
    labels = words.masked_fill(torch.rand(words.shape) < 0.5, -100)
    for name, loss_fn in (("gpt2", models.next_token_loss), ("bert_mlm", models.masked_lm_loss)):
        output = original(name)(input_ids=words, labels=labels)
        assert torch.equal(loss_fn(output.logits, labels), output.loss)
    kinds = torch.tensor([0, 2, 1])
    output = original("bert_classifier")(input_ids=words, labels=kinds)
    assert torch.equal(models.classification_loss(output.logits, kinds), output.loss)


def test_the_package_imports_without_the_libraries() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('transformers', 'torchvision', 'safetensors', 'accelerate')))\n"
        "import ds_ddg.models; print(len(ds_ddg.models.cifar_resnet(8)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1:] == ["5"], result.stderr


def evaluate(rank: int, world_size: int, name: str, masked: bool) -> Tensor | None:
    """Logits of the second of two micro-batches."""
    from deepspeed.pipe import PipelineModule

    import ds_ddg
    from helpers import toy

    model = original(name)
    loss_fn = models.classification_loss if "classifier" in name else models.masked_lm_loss
    net = PipelineModule(
        models.from_transformers(model.config, type(model)),
        num_stages=world_size,
        loss_fn=loss_fn,
        partition_method="type:TransformerLayer",
    )
    copy_weights(net, model.state_dict())
    engine, *_ = ds_ddg.initialize(
        model=net,
        config={**toy.config(2), "train_micro_batch_size_per_gpu": 3},
        optimizer=toy.OPTIMIZERS["sgd"],
        model_parameters=list(net.parameters()),
    )
    words, mask = batch()
    labels = torch.zeros(3, dtype=torch.long) if "classifier" in name else words
    inputs = (words, mask) if masked else words
    other = (inputs[0].flip(0), inputs[1].flip(0)) if masked else inputs.flip(0)
    _, logits = engine.eval_batch(iter([(other, labels), (inputs, labels)]), return_logits=True)
    return logits if engine.is_last_stage() else None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["bert_mlm", "bert_classifier", "gpt2", "llama", "llama_tied"])
def test_logits_over_two_stages_are_the_librarys(ranks: GetRanks, name: str, masked: bool) -> None:
    got = ranks(2).run(evaluate, name, masked)[-1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the ranks
    words, mask = batch()
    with torch.no_grad():
        expected = original(name)(input_ids=words, **({"attention_mask": mask} if masked else {})).logits
    torch.set_num_threads(threads)
    assert torch.equal(got, expected)  # of the last micro-batch
