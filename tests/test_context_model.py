"The Contextual Meta Transformer's model against formulas written out plainly, and what its contexts forget."

import json
from dataclasses import asdict, replace

import pytest
import torch
from context_toys import (
    ALL,
    FIELDS,
    TASKS,
    A,
    D,
    K,
    L,
    S,
    close,
    made_up,
    net_and_batch,
    plain_choices,
    plain_embedding,
    plain_hidden,
    plain_nce,
    plain_parts,
    plain_read,
    plain_transitions,
    plain_vectors,
    raises,
    steps,
)

from promptnb.core import Batch, PromptnbError, Steps, choice_loss
from promptnb.data import Sampler, in_order
from promptnb.models.context import ContextConfig, ContextDT, ContextPolicy, info_nce, transitions
from promptnb.models.dt import DTConfig, PromptDT
from promptnb.tuners.checks import same
from promptnb.tuners.core import windows_loss

MADT = dict(activation="gelu", mlp_ratio=2, tanh=True)
encoders = pytest.mark.parametrize("encoder", ["mean", "transformer"])


def label(kw):
    return ",".join(f"{k}={v}" for k, v in kw.items())


# ---- losses

LOSSES = [
    dict(),
    ALL,
    dict(ALL, encoder="transformer"),
    dict(ALL, discrete=True),
    dict(ALL, **MADT),
    dict(ALL, use_rtg=False),
    dict(ALL, encoder="one-hot", w_nce=0.0, w_class=0.0),
    dict(w_state=1.0, w_return=0.5, encoder="none"),
    dict(w_state=1.0, encoder="none", discrete=True, **MADT),
    dict(w_nce=1.0),
    dict(w_class=1.0),
    dict(w_return=2.0),
]


@pytest.mark.parametrize("kw", LOSSES, ids=label)
def test_losses(kw):
    "Each part, and their sum, against the formulas; contexts that say nothing do not enter InfoNCE and classification."
    net, b = net_and_batch(empty=(2, 3), **kw)
    got, want = net.losses(b), plain_parts(net.state_dict(), net.config, b)
    assert got.keys() == want.keys() and got["action"] > 0
    for k in want:
        close(got[k], want[k])
    close(net.loss(b), sum(want.values()))
    close(got["action"], want["action"], 1e-10)


@pytest.mark.parametrize("kw", [kw for kw in LOSSES if kw.get("encoder") != "one-hot"], ids=label)
def test_fine_tuning_has_the_action_loss_alone(kw):
    net, b = net_and_batch(empty=(2, 3), **kw)
    tuned = replace(b, task=None)
    assert net.losses(tuned).keys() == {"action"}
    close(net.loss(tuned), plain_parts(net.state_dict(), net.config, b)["action"], 1e-10)


@encoders
def test_embedding(encoder):
    net, b = net_and_batch(encoder=encoder, empty=(4,))
    some = [bool(r) for r in plain_transitions(b.prompt, 3.0)]
    assert some.count(False) == 1
    z, got = net.embedding(b.prompt)
    assert got.tolist() == some
    close(z[got], plain_embedding(net.state_dict(), net.config, b.prompt)[some], 1e-9)


@encoders
def test_context_vectors_stand_in_front(encoder):
    net, b = net_and_batch(encoder=encoder, empty=(4,))
    w, c = net.state_dict(), net.config
    some = [bool(r) for r in plain_transitions(b.prompt, 3.0)]
    x, mask = net.prompt_tokens(b.prompt)
    assert x.shape == (8, L, D) and mask.shape == (8, L) and (mask == 1).all()
    close(x, plain_vectors(w, c, plain_embedding(w, c, b.prompt), some), 1e-9)
    with torch.no_grad():
        close(net(b.history, net.prefix(x, mask)), plain_read(w, c, plain_hidden(w, c, b.history, x)[:, 1::3]), 1e-9)


def test_transitions():
    x = steps(6, 12, 3, 5, segment=4)
    got, real = transitions(x, 7.0)
    want = plain_transitions(x, 7.0)
    assert got.shape == (6, 11, 2 * S + A + 1)
    assert real.sum(1).tolist() == [len(r) for r in want] and {len(r) for r in want} > {9}
    for g, r, w in zip(got, real, want):
        close(g[r > 0], torch.stack(w), 1e-12)
        assert not g[r == 0].any()


def test_rewards_are_in_the_scale_of_returns():
    x = steps(6, 12, 3, 5, segment=4)
    once, twice = transitions(x, 7.0)[0], transitions(x, 14.0)[0]
    close(twice[..., S + A], 2 * once[..., S + A], 1e-12)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(
    "task", [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5], [3] * 6, [0, 0, 0, 0, 0, 1]], ids=str
)
def test_info_nce(task, temperature):
    "Where no two contexts share a task there is nothing to learn, and no NaN."
    z = torch.randn(6, D, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    got = info_nce(z, torch.tensor(task), temperature)
    close(got, plain_nce(z, task, temperature), 1e-5)
    got.backward()
    assert torch.isfinite(z.grad).all()
    assert bool(z.grad.abs().max() > 0) == (len(set(task)) < 6)


@pytest.mark.parametrize("n", [0, 1])
def test_info_nce_of_almost_nothing(n):
    "One context, or none: no loss and no NaN."
    z = torch.randn(n, D, requires_grad=True)
    loss = info_nce(z, torch.zeros(n).long())
    loss.backward()
    assert loss == 0 and not z.grad.any() and torch.isfinite(z.grad).all()


def test_info_nce_in_full_precision():
    "Under bf16 autocast as without."
    z, task = torch.randn(32, D, generator=torch.Generator().manual_seed(0)), torch.arange(32) // 4
    want = info_nce(z, task)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(info_nce(z, task), want)


def test_choice_loss():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(4, K, A, generator=g)
    target = torch.eye(A)[torch.randint(A, (4, K), generator=g)]
    mask = (torch.rand(4, K, generator=g) < 0.6).float()
    mask[:, -1] = 1
    close(choice_loss(scores, target, mask), plain_choices(scores, target, mask).mean())
    each = torch.stack([plain_choices(*x).mean() for x in zip(scores, target, mask)])
    close(choice_loss(scores, target, mask, "none"), each)


# ---- switches


@pytest.mark.parametrize(
    "kw",
    [dict(activation="gelu"), dict(mlp_ratio=2), dict(tanh=True), dict(discrete=True, **MADT), dict(discrete=True)],
    ids=str,
)
def test_switches_of_madt(kw):
    """Of the plain Decision Transformer too.

    Gelu is by the error function, MLPs are narrower, tanh comes before the timestep; choices are scores."""
    torch.manual_seed(0)
    net = PromptDT(DTConfig(S, A, width=D, layers=2, heads=2, max_timestep=120, prompt=False, **kw)).eval().double()
    for p in net.parameters():
        p.data.add_(0.15 * torch.randn_like(p))
    h = steps(8, K, 0, K - 2, discrete=kw.get("discrete", False))
    w, c = net.state_dict(), net.config
    pred = plain_read(w, c, plain_hidden(w, c, h)[:, 1::3])
    assert w["blocks.0.fc.weight"].shape == (kw.get("mlp_ratio", 4) * D, D)
    with torch.no_grad():
        close(net(h), pred, 1e-10)
        close(net(h, last=True), pred[:, -1:], 1e-10)
        if c.discrete:
            close(net.loss(Batch(h)), plain_choices(pred, h.a, h.mask).mean(), 1e-10)
        else:
            close(net.loss(Batch(h)), ((pred - h.a) ** 2)[h.mask > 0].mean(), 1e-10)


def test_bad_switches():
    with raises("unknown activation 'gelo': did you mean 'gelu'"):
        PromptDT(DTConfig(S, A, activation="gelo"))
    with raises("unknown encoder 'meen': did you mean 'mean'"):
        ContextDT(ContextConfig(S, A, encoder="meen"))
    with raises("L is 0, but a prompt has at least 1"):
        ContextDT(ContextConfig(S, A, L=0))


@pytest.mark.parametrize(
    "kw",
    [
        dict(encoder="one-hot", w_class=1.0),
        dict(encoder="none", w_class=1.0),
        dict(loss_on_prompt=True),
        dict(prompt_norm=True),
    ],
    ids=str,
)
def test_switches_without_effect_are_refused(kw):
    with pytest.raises(PromptnbError):
        ContextDT(ContextConfig(S, A, width=D, tasks=TASKS, **kw))


@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        ALL,
        dict(encoder="transformer", w_nce=0.1),
        dict(encoder="none", w_state=0.1, w_return=0.1),
        dict(encoder="one-hot", w_state=0.1),
        dict(w_state=1.0),
        dict(w_return=1.0),
        dict(w_class=1.0),
        dict(encoder="none"),
    ],
    ids=str,
)
def test_no_idle_parameters(kw):
    "Heads are there where their losses are; every parameter gets a gradient."
    net, b = net_and_batch(**kw)
    net.loss(b).backward()
    c = net.config
    assert not [n for n, p in net.named_parameters() if p.grad is None]
    for name, weight, size in (
        ("next_state", c.w_state, S),
        ("next_return", c.w_return, 1),
        ("classify", c.w_class, len(TASKS)),
    ):
        head = getattr(net, name)
        assert (head is not None) == bool(weight) == any(n.startswith(f"{name}.") for n, _ in net.named_parameters())
        assert head is None or len(head.weight) == size
    reads = c.encoder in ("mean", "transformer")
    assert hasattr(net, "encode") == hasattr(net, "vectors") == reads
    assert hasattr(net, "table") == (c.encoder == "one-hot") and net.embed_prompt is None


# ---- the prompt in front of a frozen backbone


@pytest.mark.parametrize(
    "kw",
    [dict(encoder="none"), dict(encoder="mean"), dict(encoder="none", discrete=True, **MADT), dict(encoder="one-hot")],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 5, 20])
def test_vectors_in_front(kw, n):
    """A policy with n vectors acts as the same model on [vectors; tokens], each row with its own.

    States are normalised, returns scaled."""
    net, b = net_and_batch(**kw)
    w, c, h = net.state_dict(), net.config, b.history
    policy = ContextPolicy(asdict(c), K=K, rtg_scale=7.0).double()
    policy.model.load_state_dict(w)
    policy.mean.copy_(torch.arange(S))
    policy.std.copy_(torch.arange(S) + 2.0)
    x = torch.randn(3, n, D, generator=torch.Generator().manual_seed(1)).double()
    rows = [2, 0, 0, 1, 2, 2, 1, 0]
    prompted = policy.with_prompt((x, torch.ones(3, n).double()))
    raw = replace(h, s=h.s * policy.std + policy.mean, rtg=h.rtg * 7)
    got = prompted.act(raw, prompted.begin(rows))
    close(got, plain_read(w, c, plain_hidden(w, c, h, x[rows])[:, -2:-1])[:, 0])


def test_weighted_error():
    "What is minimised: of each task, the mean over its windows of weight times the window's error."
    net, _ = net_and_batch(encoder="none")
    w, c = net.state_dict(), net.config
    g = torch.Generator().manual_seed(2)
    h = steps(6, K, 5, K - 2).map(lambda x: x.unflatten(0, (2, 3)))
    x, weight = torch.randn(2, 4, D, generator=g).double(), torch.rand(2, 3, generator=g).double()

    def error(t, i):
        pred = plain_read(w, c, plain_hidden(w, c, h[t][i : i + 1], x[t : t + 1])[:, 1::3])[0]
        return ((pred - h.a[t, i]) ** 2).mean(-1)[h.mask[t, i] > 0].mean()

    e = torch.stack([torch.stack([error(t, i) for i in range(3)]) for t in range(2)])
    prefix = net.prefix(x, torch.ones(2, 4).double())
    with torch.no_grad():
        close(windows_loss(net, prefix, h)[:, 0], e.mean(1), 1e-10)
        close(windows_loss(net, prefix, h, weight)[:, 0], (weight * e).mean(1), 1e-10)


# ---- what a context forgets


@pytest.fixture(params=["mean", "transformer"])
def unchanged(request):
    "(contexts, a function that says that changed ones give the same vectors), for both encoders."
    net, b = net_and_batch(encoder=request.param)
    vectors, tokens = net.embedding(b.prompt)[0], net.prompt_tokens(b.prompt)[0]

    def check(changed):
        close(net.embedding(changed)[0], vectors, 1e-9)
        close(net.prompt_tokens(changed)[0], tokens, 1e-9)

    return b.prompt, check


@pytest.mark.parametrize("turn", [[2, 0, 1], [1, 2, 0], [0, 2, 1]], ids=str)
def test_the_order_of_segments_is_forgotten(unchanged, turn):
    x, check = unchanged
    check(x[:, torch.arange(12).view(3, 4)[turn].flatten()])


@pytest.mark.parametrize("times", [2, 3])
def test_repetition_is_forgotten(unchanged, times):
    x, check = unchanged
    check(x[:, torch.arange(12).repeat(times)])


def test_padding_between_segments_is_forgotten(unchanged):
    x, check = unchanged
    check(
        Steps(
            *(torch.cat([f[:, :4], torch.zeros_like(f[:, :3]), f[:, 4:]], 1) for f in (getattr(x, n) for n in FIELDS))
        )
    )


def test_what_lies_under_the_mask_is_forgotten(unchanged):
    x, check = unchanged
    assert (x.mask == 0).any()

    def wild(f):
        real = x.mask.view(*x.mask.shape, *[1] * (f.dim() - 2)) > 0
        return torch.where(real, f, 99 * torch.ones_like(f))

    check(Steps(wild(x.s), wild(x.a), wild(x.rtg), wild(x.t), x.mask))


@encoders
def test_the_order_of_transitions_is_forgotten(encoder):
    net, b = net_and_batch(encoder=encoder)
    rows, real = transitions(b.prompt, 3.0)
    order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(3))
    close(net.encode(rows[:, order], real[:, order]), net.embedding(b.prompt)[0], 1e-9)


@encoders
def test_what_is_not_there_is_missed(encoder):
    net, b = net_and_batch(encoder=encoder)
    want, some = net.embedding(b.prompt)
    assert some.all()
    assert (net.embedding(b.prompt.map(lambda f: f[:, 4:]))[0] - want).abs().max() > 1e-3


@encoders
def test_inference_embeds_as_training_does(encoder):
    "It may take another kernel."
    net, b = net_and_batch(encoder=encoder)
    net = net.float()
    x = b.prompt.map(lambda f: f.float() if f.is_floating_point() else f)
    with torch.no_grad():
        fast = net.embedding(x)[0]
    close(fast, net.embedding(x)[0], 1e-5)


def without_steps(x):
    return replace(x, mask=0 * x.mask)


NULLS = {
    "masked": without_steps,
    "values under the mask": lambda x: replace(without_steps(x), s=x.s + 9, a=x.a - 3, rtg=x.rtg * 5),
    "lone steps": lambda x: replace(x, mask=x.mask * (torch.arange(12) % 2)),
    "one step": lambda x: x.map(lambda f: f[:, -1:]),
    "two masked steps": lambda x: without_steps(x).map(lambda f: f[:, :2]),
}


@encoders
@pytest.mark.parametrize("null", NULLS)
def test_null_prompt(encoder, null):
    "Zeros, whatever lies under the mask; also where single steps make no transition."
    if (encoder, null) == ("transformer", "one step"):
        return  # test_context_of_one_step
    net, b = net_and_batch(encoder=encoder)
    x = NULLS[null](b.prompt)
    z, some = net.embedding(x)
    tokens, mask = net.prompt_tokens(x)
    assert not z.any() and not some.any() and not tokens.any()
    assert (mask == 1).all() and tokens.shape == (8, L, D)


@encoders
def test_acting_with_the_null_prompt(encoder):
    net, b = net_and_batch(encoder=encoder)
    w, c = net.state_dict(), net.config
    zeros = torch.zeros(8, L, D).double()
    with torch.no_grad():
        got = net(b.history, net.prefix(*net.prompt_tokens(without_steps(b.prompt))))
    close(got, plain_read(w, c, plain_hidden(w, c, b.history, zeros)[:, 1::3]), 1e-9)


def test_context_of_one_step():
    net, b = net_and_batch(encoder="transformer")
    assert not net.prompt_tokens(b.prompt.map(lambda f: f[:, -1:]))[0].any()


def test_segments_that_meet():
    "Two segments of different trajectories hold no transition between them, though they meet in time."
    st = made_up("cheetah-vel", "expert", (0, 1), 8, T=60)
    s = Sampler(st, torch.zeros(20), torch.ones(20), 1.0, 4, 32, None, 4, 6, "random", in_order(st, st.task), gap=True)
    for t in range(20):
        x, real = transitions(s.batch(t).prompt)
        assert not real[:, 5::7].any() and not real[:, 6::7].any()


def test_forgotten():
    "Of the rows, that share; a forgotten one keeps nothing; the same seed forgets the same."
    net, _ = net_and_batch(null=0.3)
    x = steps(4000, 2, 1)
    torch.manual_seed(0)
    y = net.forgotten(x)
    gone = y.mask.sum(1) == 0
    assert abs(gone.double().mean() - 0.3) < 0.03
    assert (y.mask[~gone] == 1).all() and torch.equal(y.s, x.s)
    torch.manual_seed(0)
    assert torch.equal(net.forgotten(x).mask, y.mask)
    assert not torch.equal(net.forgotten(x).mask, y.mask)


@pytest.mark.parametrize("null, kept", [(0.0, [8]), (0.5, range(2, 7)), (1.0, [0])], ids=["none", "half", "all"])
def test_training_without_context(null, kept):
    "The loss is that of the batch with some contexts emptied."
    net, b = net_and_batch(null=null, **ALL)
    torch.manual_seed(4)
    got = net.losses(b)
    torch.manual_seed(4)
    keep = (torch.rand(8) >= null).double() if null else torch.ones(8)
    assert keep.sum() in kept
    some = replace(b, prompt=replace(b.prompt, mask=b.prompt.mask * keep[:, None]))
    if keep.any():
        want = plain_parts(net.state_dict(), net.config, some)
    else:
        want = dict(action=net.losses(replace(some, task=None))["action"])
        assert got["nce"] == 0 and got["class"] == 0 and torch.isfinite(net.loss(b))
    for k in want:
        close(got[k], want[k])


@pytest.mark.parametrize("null", [0.0, 0.5, 1.0])
def test_fine_tuning_forgets_no_context(null):
    net, b = net_and_batch(null=null, **ALL)
    action_alone = replace(net.config, w_state=0.0, w_return=0.0, w_nce=0.0, w_class=0.0)
    close(net.loss(replace(b, task=None)), plain_parts(net.state_dict(), action_alone, b)["action"])


# ---- policies


def test_one_hot_rows_are_in_the_order_of_tasks():
    net, _ = net_and_batch(encoder="one-hot")
    policy = ContextPolicy(asdict(net.config), K=K).with_prompt((torch.zeros(1, L, D), torch.ones(1, L)))
    p = policy.prompted(None, [7, 2, 2, 5])
    assert torch.equal(p.prompt_tokens, policy.model.table[[2, 0, 0, 1]].detach())
    assert p.prompt_tokens.shape == (4, L, D) and not p.prompt_tokens.requires_grad and (p.prompt_mask == 1).all()


def test_one_hot_knows_no_other_task_and_reads_no_context():
    net, b = net_and_batch(encoder="one-hot")
    policy = ContextPolicy(asdict(net.config), K=K)
    with raises("unknown task of this one-hot policy '4'"):
        policy.prompted(None, [2, 4])
    with raises("encoder 'one-hot' reads no context"):
        policy.model.prompt_tokens(b.prompt)


def saved_policy(encoder):
    config = ContextConfig(S, A, width=D, layers=1, encoder=encoder, tasks=TASKS, L=L, **ALL)
    policy = ContextPolicy(asdict(config), K=K, rtg_scale=3.0)
    return policy.with_prompt(steps(2, 12, segment=4, dtype=torch.float32)).eval()


@encoders
def test_saved_and_loaded(encoder, tmp_path):
    policy = saved_policy(encoder)
    policy.save_pretrained(tmp_path)
    again = ContextPolicy.from_pretrained(tmp_path)
    assert type(again.model) is ContextDT and again.config == policy.config and again.config.tasks == TASKS
    assert same(again.state_dict(), policy.state_dict())
    h = steps(4, K, 2, dtype=torch.float32)
    assert torch.equal(again.act(h, again.begin([0, 1, 1, 0])), policy.act(h, policy.begin([0, 1, 1, 0])))


@encoders
@pytest.mark.parametrize("other", [dict(w_class=0.0), dict(L=L + 1), dict(encoder="none")], ids=str)
def test_no_policy_is_loaded_in_part(encoder, other, tmp_path):
    saved_policy(encoder).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(dict(config, model=dict(config["model"], **other))))
    with pytest.raises((RuntimeError, PromptnbError)):
        ContextPolicy.from_pretrained(tmp_path)
