"""Temp-LoRA against the same written down in plain torch, in float64; and the host after it."""

import copy
import math
import sys

import pytest
import torch
from support.helpers import (
    TEXT,
    assert_same_host,
    chunk_bounds,
    logits_of,
    random_ids,
    snapshot,
    tiny_model,
    tiny_opt,
    truncated_nll,
    window_begin,
)

from locas_ext import LocasError
from locas_ext.evaluation.methods.temp_lora import lora, temp_lora
from locas_ext.evaluation.methods.truncation import truncation


def linear_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"}


class PlainLora:
    """LoRA by forward hooks on a float64 copy of the host, starting from the adapter under test."""

    def __init__(self, model, wrapped, scaling):
        self.model = copy.deepcopy(model).double().requires_grad_(False)
        self.parameters = []
        for name, linear in linear_layers(self.model).items():
            pair = [getattr(wrapped[name], kind)["default"].weight for kind in ("lora_A", "lora_B")]
            down, up = (weight.detach().double().clone().requires_grad_(True) for weight in pair)
            self.parameters += [down, up]
            linear.register_forward_hook(lambda module, args, y, down=down, up=up: y + scaling * (args[0] @ down.T @ up.T))

    def run(self, ids, window, stride, learning_rate, epochs, bos=None):
        """Scores each chunk, then learns it; the adapter acts on the context too, without gradient."""
        optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0, foreach=False)
        nlls, update = [], 0
        for start, end in chunk_bounds(len(ids), stride):
            if end == 1:
                continue
            begin, first = window_begin(start, end, window if bos is None else window - 1), max(start, 1)
            prefix = [] if bos is None else [bos]
            context = torch.tensor(prefix + ids[begin : first - 1].tolist(), dtype=torch.int64)
            for epoch in range(epochs):
                cache = None
                if len(context):
                    with torch.no_grad():
                        cache = self.model(input_ids=context[None], use_cache=True).past_key_values
                logits = self.model(input_ids=ids[None, first - 1 : end - 1], past_key_values=cache).logits[0]
                nll = -logits.log_softmax(-1).gather(1, ids[first:end, None]).sum()
                if epoch == 0:
                    nlls.append(nll.item())
                update += 1
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * (0.5 if update == 1 else 1.0)  # a warm-up of two updates
                optimizer.zero_grad()
                (nll / (end - first)).backward()
                optimizer.step()
        return nlls


@pytest.mark.parametrize(
    "make, alpha, bos",
    [
        (lambda: tiny_model("qwen3"), None, None),
        (lambda: tiny_model("llama"), 10.0, 1),
        (tiny_opt, 4.0, None),
    ],
    ids=["qwen3", "llama with bos", "opt"],
)
def test_it_is_lora_by_hand(make, alpha, bos):
    window, stride, rank = 23, 7, 5
    model = make()
    host = copy.deepcopy(model)
    with lora(model, rank, alpha, seed=3) as parameters:
        wrapped = dict(model.named_modules())
        plain = PlainLora(host, wrapped, 1.0 if alpha is None else alpha / rank)
        expected = plain.run(TEXT, window, stride, 1e-2, epochs=2, bos=bos)
        report = temp_lora(model, parameters, TEXT, window, stride, 1e-2, epochs=2, progress=False, bos=bos is not None)
        assert [(chunk.start, chunk.end) for chunk in report.chunks] == chunk_bounds(len(TEXT), stride)
        assert [chunk.memory_version for chunk in report.chunks] == [2 * i for i in range(len(report.chunks))]
        assert [chunk.nll for chunk in report.chunks] == pytest.approx(expected, rel=1e-4)
        assert report.perplexity == pytest.approx(math.exp(sum(expected) / (len(TEXT) - 1)), rel=1e-4)
        for mine, theirs in zip(parameters, plain.parameters, strict=False):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-2, atol=2e-4)
    assert report.nll < 0.97 * truncation(model, TEXT, window, stride, progress=False).nll


def test_every_linear_but_the_head_is_adapted():
    model = tiny_model("qwen3")
    expected = sum(3 * (linear.in_features + linear.out_features) for linear in linear_layers(model).values())
    assert len(linear_layers(model)) == 14
    with lora(model, 3) as parameters:
        assert sum(parameter.numel() for parameter in parameters) == expected
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert len(trainable) == len(parameters) == 28 and not any("lm_head" in name for name in trainable)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_host_is_untouched_afterwards(frozen):
    model = tiny_model("qwen3").requires_grad_(not frozen)
    before, logits = snapshot(model), logits_of(model, TEXT)
    with lora(model, 4) as parameters:
        assert torch.equal(logits_of(model, TEXT), logits)  # nothing learned yet
        temp_lora(model, parameters, TEXT, 24, 8, 1e-2, progress=False)
        assert not torch.equal(logits_of(model, TEXT), logits)
    assert_same_host(model, before)
    assert torch.equal(logits_of(model, TEXT), logits)

    def stop(chunk):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lora(model, 4) as parameters:
        temp_lora(model, parameters, TEXT, 24, 8, progress=False, callback=stop)
    assert_same_host(model, before)


def test_no_score_depends_on_what_comes_later():
    other = torch.cat([TEXT[:32], random_ids(32, seed=9)])
    nlls = []
    for ids in (TEXT, other):
        model = tiny_model("llama")
        with lora(model, 4) as parameters:
            report = temp_lora(model, parameters, ids, 24, 8, 1e-2, progress=False)
        nlls.append([chunk.nll for chunk in report.chunks])
    assert nlls[0][:4] == nlls[1][:4] and nlls[0][4:] != nlls[1][4:]
    plain = tiny_model("llama").double()  # the first chunk is the plain host's
    assert nlls[0][0] == pytest.approx(truncated_nll(plain, TEXT, 0, 8, 24).item(), rel=1e-5)


def test_the_seed_decides_the_adapter_and_nothing_else_is_drawn():
    model = tiny_model("llama")

    def adapter(seed):
        with lora(model, 4, seed=seed) as parameters:
            return parameters[0].detach().clone()

    before = torch.get_rng_state()
    first = adapter(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(adapter(1), first) and not torch.equal(adapter(2), first)


def test_a_bfloat16_host_has_a_float32_adapter():
    model = tiny_model("llama", dtype=torch.bfloat16)
    with lora(model, 4) as parameters:
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        report = temp_lora(model, parameters, TEXT, 24, 8, 1e-2, progress=False)
    assert report.nll < 0.97 * truncation(model, TEXT, 24, 8, progress=False).nll


def test_a_loss_that_is_not_finite_ends_the_run():
    model = tiny_model("llama")
    with pytest.raises(LocasError, match="the loss is (nan|inf)"), lora(model, 4) as parameters:
        temp_lora(model, parameters, TEXT, 24, 8, 1e30, progress=False)


def test_without_peft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(LocasError, match=r"pip install 'locas_ext\[eval\]'"), lora(model, 4):
        pass
    assert_same_host(model, before)
