"A toy that tuners are tried on: an untrained policy with large weights, two tasks, a judge for the environment."

from dataclasses import asdict

import numpy as np
import torch

from promptnb.core import Steps
from promptnb.data import demos, from_arrays
from promptnb.models.context import ContextConfig, ContextPolicy
from promptnb.models.dt import DTConfig, Policy

S, A, P, K, G = 3, 2, 3, 4, 2  # sizes of state and action, steps of a prompt and of a window, tasks


def toy(prompt=True, T=40, context=False, **kw):
    """(policy, demonstrations): two tasks with nearly constant actions, T steps an episode (below P: padded prompts).

    With `context`, the policy of the Contextual Meta Transformer, whose encoder writes 5 vectors."""
    g = np.random.default_rng(0)
    trajectories = [
        dict(
            observations=g.normal(size=(T, S)), actions=0.5 - i + 0.2 * g.normal(size=(T, A)), rewards=np.arange(T) % 3
        )
        for i in range(G)
        for _ in range(3)
    ]
    store = from_arrays(trajectories, np.repeat(np.arange(G), 3))
    torch.manual_seed(0)
    if context:
        encoder = "mean" if prompt else "none"
        config = ContextConfig(S, A, width=16, layers=2, encoder=encoder, reward_scale=12.0, **kw)
        policy = ContextPolicy(asdict(config), K=K, rtg_scale=12.0)
    else:
        config = DTConfig(S, A, width=16, layers=2, prompt=prompt, **kw)
        policy = Policy(asdict(config), K=K, rtg_scale=12.0)
    for p in policy.model.parameters():
        p.data.mul_(3 if context else 4)  # larger weights: the prompt matters more
    return policy.eval(), demos(store, store, policy, n=3, K=K, batch=8, H=P)


class Judge:
    """A stand-in for the environment: the return is higher the nearer a prompt's actions are to 1.

    What is seen in an episode follows from the task alone. Steps are counted from 77 on."""

    env_steps = 77

    def __call__(self, prompts):
        assert prompts.t.shape[0] == G and prompts.t.shape[2] == P
        self.env_steps += prompts.t[..., 0].numel() * 10
        return -(prompts.a - 1).square().mean((-1, -2))

    def play(self, contexts):
        G, m = contexts.t.shape[:2]
        self.env_steps += G * m * 6

        def seen(*shape):
            x = torch.randn(G, 1, 6, *shape, generator=torch.Generator().manual_seed(6))
            return x.expand(G, m, 6, *shape)

        returns = torch.arange(G)[:, None].expand(G, m).float()
        return returns, Steps(seen(S), seen(A).tanh(), seen(1), torch.arange(6).expand(G, m, 6), torch.ones(G, m, 6))
